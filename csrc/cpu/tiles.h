// Register tiles of C = X W^T, where both X and W are contiguous along the summed dimension (that of nn.Linear), so W is
// read exactly as transformers stores it: no repacking, no second copy.
//
// A weight row is walked in *units* of 4 bytes: one float, or two bf16 that one dot-product instruction multiplies with
// the two bf16 of a lane. Two kinds of tile share a block of 16 weight rows:
//   lane tiles   W tokens side by side in the lanes of a vector ("a panel"), the weight unit broadcast. No reduction
//                at the end; runs at the multiply-add peak when the lanes are full.
//   dot tiles    one token at a time, W units of its row against W units of a weight row, lane-wise partial sums
//                reduced at the end. For the few tokens that would leave lanes empty.
#pragma once
#include <type_traits>

#include "vec.h"

#define INLINE_LAMBDA __attribute__((always_inline))

namespace omnigene {
namespace {

constexpr int ROWS = 16;      // weight rows of a block: two runs of 8 (gate and up, or simply neighbours)
constexpr int HALF = ROWS / 2;
constexpr int MAX_V = 3;      // vectors of tokens in a lane tile

// How elements of type Weight are multiplied. PAIRS: bf16 pairs in hardware; otherwise everything is float32.
template <class WeightT, bool Pairs>
struct Mode {
  using Weight = WeightT;
  static constexpr bool PAIRS = Pairs;
  static constexpr int PER_UNIT = Pairs ? 2 : 1;                      // elements in a unit
  using Activation = std::conditional_t<Pairs, bf16, float>;          // X as the tiles read it
  static constexpr bool CONVERT = !Pairs && !std::is_same_v<Weight, float>;  // lane tiles need W as float
};

template <bool PAIRS>
INLINE VF multiply_add(VF acc, VF x, VF w) {
#if OMNIGENE_BF16
  if constexpr (PAIRS) return (VF)_mm512_dpbf16_ps((__m512)acc, (__m512bh)x, (__m512bh)w);
#endif
  return acc + x * w;
}
INLINE VF broadcast_unit(const char* p) {
  float unit;  // its bits, whatever they mean
  std::memcpy(&unit, p, 4);
#if OMNIGENE_WIDTH == 16
  return (VF)_mm512_set1_ps(unit);
#elif defined(__AVX2__)
  return (VF)_mm256_set1_ps(unit);
#else
  VF v;
  for (int i = 0; i < W; ++i) v[i] = unit;
  return v;
#endif
}

// Rows of the next block, fetched into the second-level cache a line at a time while this one computes: every weight
// leaves memory once, at the pace at which it is used. A tile fetches a share of the two runs of rows.
struct Prefetch {
  const char *a = nullptr, *b = nullptr;
  int rows_a = 0, rows_b = 0;
  int64_t stride = 0;  // bytes
  INLINE void line(int64_t offset) const {
    const char* p = a + offset;
    for (int r = 0; r < rows_a; ++r, p += stride) __builtin_prefetch(p, 0, 2);
    p = b + offset;
    for (int r = 0; r < rows_b; ++r, p += stride) __builtin_prefetch(p, 0, 2);
  }
};

// Rows [0, R/2) at `a`, rows [R/2, R) at `b`; `stride` in bytes; `unit_bytes` of stored weight go into a unit (2 when a
// 16-bit weight was widened). c[r * c_stride + v * W ...] receives the sums.
template <bool PAIRS, int V, int R>
inline __attribute__((noinline)) void lane_tile(const char* a, const char* b, int64_t stride, const float* panel,
                                                int64_t units, bool odd, float* c, int c_stride, Prefetch next,
                                                int unit_bytes) {
  VF acc[R][V] = {};
  const int64_t stride3 = 3 * stride;
  // Four rows hang on one pointer: [p], [p + s], [p + 2s], [p + 3s] keep the addresses in few registers.
  constexpr int QUADS = R >= 8 ? R / 4 : 2, PER_QUAD = R / QUADS;
  const char* p[QUADS];
  for (int q = 0; q < QUADS; ++q)
    p[q] = q < QUADS / 2 ? a + q * PER_QUAD * stride : b + (q - QUADS / 2) * PER_QUAD * stride;
  auto step = [&](const char* const* at, const float* x, int64_t offset) INLINE_LAMBDA {
    VF xv[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) xv[v] = vload(x + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const char* quad = at[r / PER_QUAD] + offset;
      const int i = r % PER_QUAD;
      const VF w = broadcast_unit(i == 0 ? quad : i == 1 ? quad + stride : i == 2 ? quad + 2 * stride : quad + stride3);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = multiply_add<PAIRS>(acc[r][v], xv[v], w);
    }
  };
  const int64_t full = units - odd;
  int64_t u = 0;
  for (; u + 16 <= full; u += 16) {  // one cache line of each weight row
    next.line(u * unit_bytes);
#pragma GCC unroll 4
    for (int i = 0; i < 16; ++i) step(p, panel + (u + i) * V * W, (u + i) * 4);
  }
  if (u < units) next.line(u * unit_bytes);
  for (; u < full; ++u) step(p, panel + u * V * W, u * 4);
  if (odd) {  // the last bf16 has no partner: the next two bytes belong to somebody else
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      uint16_t bits;
      std::memcpy(&bits, p[r / PER_QUAD] + (r % PER_QUAD) * stride + u * 4, 2);
      const uint32_t unit = bits;
      const VF w = broadcast_unit(reinterpret_cast<const char*>(&unit));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = multiply_add<PAIRS>(acc[r][v], vload(panel + (u * V + v) * W), w);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) vstore(c + r * c_stride + v * W, acc[r][v]);
}

template <class M>
INLINE VF load_units(const typename M::Weight* p) {
  if constexpr (M::PAIRS)
    return vload(reinterpret_cast<const float*>(p));
  else
    return load_as_float(p);
}

// R weight rows against N tokens' rows; c[n * ROWS + r] receives the sums.
template <class M, int R, int N>
inline __attribute__((noinline)) void dot_tile(const typename M::Weight* w, int64_t stride,
                                               const typename M::Activation* const* x, int64_t count, float* c,
                                               Prefetch next) {
  using Weight = typename M::Weight;
  using Activation = typename M::Activation;
  constexpr int STEP = W * M::PER_UNIT;
  static_assert(R * N <= 24);
  VF acc[32] = {};  // acc[n * R + r]; beyond R * N zeros, for the reduction
  auto step = [&](auto weight_at, auto x_at) INLINE_LAMBDA {
    VF xv[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) xv[n] = vload(reinterpret_cast<const float*>(x_at(n)));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const VF wv = load_units<M>(weight_at(r));
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[n * R + r] = multiply_add<M::PAIRS>(acc[n * R + r], xv[n], wv);
    }
  };
  int64_t k = 0;
  for (; k + STEP <= count; k += STEP) {
    next.line(k * int64_t(sizeof(Weight)));
    step([&](int r) INLINE_LAMBDA { return w + r * stride + k; }, [&](int n) INLINE_LAMBDA { return x[n] + k; });
  }
  if (k < count) {  // the rest, padded with zeros
    Weight wt[R][STEP] = {};
    Activation xt[N][STEP] = {};
    for (int r = 0; r < R; ++r) std::memcpy(wt[r], w + r * stride + k, (count - k) * sizeof(Weight));
    for (int n = 0; n < N; ++n) std::memcpy(xt[n], x[n] + k, (count - k) * sizeof(Activation));
    next.line(k * int64_t(sizeof(Weight)));
    step([&](int r) INLINE_LAMBDA { return wt[r]; }, [&](int n) INLINE_LAMBDA { return xt[n]; });
  }
  float sums[32];
  for (int first = 0; first < R * N; first += W) vstore(sums + first, sum_each(acc + first));
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) std::memcpy(c + n * ROWS, sums + n * R, R * sizeof(float));
}

// Packs n <= V * W rows of X into a panel [units][V][W]; missing tokens and a missing half unit are zeros.
template <class M, class X>
inline void pack_panel(const X* const* rows, int n, int V, int64_t count, float* panel) {
  const int64_t units = (count + M::PER_UNIT - 1) / M::PER_UNIT;
  for (int v = 0; v < V; ++v) {
    const int live = n - v * W < W ? n - v * W : W;
    int64_t u = 0;
    for (; (u + W) * M::PER_UNIT <= count; u += W) {
      VF t[W];
      for (int i = 0; i < W; ++i) {
        if (i >= live) t[i] = VF{};
        else if constexpr (M::PAIRS) t[i] = vload(reinterpret_cast<const float*>(rows[v * W + i] + u * 2));
        else t[i] = load_as_float(rows[v * W + i] + u);
      }
      transpose(t);
      for (int i = 0; i < W; ++i) vstore(panel + ((u + i) * V + v) * W, t[i]);
    }
    for (; u < units; ++u) {
      float lane[W] = {};
      for (int i = 0; i < live; ++i) {
        const X* row = rows[v * W + i];
        if constexpr (M::PAIRS) {
          const int64_t k = u * 2;
          const uint32_t pair = row[k].bits | (k + 1 < count ? uint32_t(row[k + 1].bits) << 16 : 0);
          std::memcpy(&lane[i], &pair, 4);
        } else {
          lane[i] = to_float(row[u]);
        }
      }
      std::memcpy(panel + (u * V + v) * W, lane, sizeof lane);
    }
  }
}

// The tokens that one block of weight rows meets: up to two panels in lanes, and up to DOT_MAX single rows.
constexpr int MAX_CHUNKS = 2;
constexpr int MAX_LANES = MAX_CHUNKS * MAX_V;  // vectors
constexpr int MAX_TOKENS = MAX_LANES * W;
constexpr int DOT_MAX = OMNIGENE_DOT_MAX;  // a remainder up to this is cheaper row by row than in padded lanes
constexpr int DOT_TOKENS = W == 16 ? 6 : 3;

template <int V>
constexpr int LANE_ROWS = W == 16 ? (V == 1 ? 16 : 8) : (V == 1 ? 8 : 4);  // by the number of registers
constexpr int dot_rows(int tokens) { return tokens == 1 ? 8 : 4; }

// How n tokens are shared between lanes and dot tiles.
struct Split {
  int lanes = 0;   // vectors of W tokens, the last perhaps padded
  int single = 0;  // tokens left to dot tiles
  Split() = default;
  explicit Split(int n) : lanes(n / W), single(n % W) {
    if (single > DOT_MAX) {
      ++lanes;
      single = 0;
    }
  }
  int chunks() const { return lanes > MAX_V ? 2 : lanes > 0; }
  int vectors(int chunk) const { return lanes <= MAX_V ? lanes : chunk == 0 ? (lanes + 1) / 2 : lanes / 2; }
  int dot_groups() const { return (single + DOT_TOKENS - 1) / DOT_TOKENS; }
  int dot_first(int group) const { return single * group / dot_groups(); }
  int dot_take(int group) const { return dot_first(group + 1) - dot_first(group); }
  int tiles() const {
    int n = 0;
    for (int i = 0; i < chunks(); ++i) {
      const int v = vectors(i);
      n += ROWS / (v == 1 ? LANE_ROWS<1> : v == 2 ? LANE_ROWS<2> : LANE_ROWS<3>);
    }
    for (int g = 0; g < dot_groups(); ++g) n += ROWS / dot_rows(dot_take(g));
    return n;
  }
};

template <class M>
struct Tokens {
  Split split;
  int64_t count;                                  // elements of a row
  const float* panel[MAX_CHUNKS];                 // [units][V][W] each
  const typename M::Activation* row[DOT_MAX];     // the single tokens
};

// Results of a block: c[row][lane token], d[single token][row].
struct Block {
  alignas(64) float c[ROWS * MAX_TOKENS];
  alignas(64) float d[DOT_MAX * ROWS];
};

// Deals the next block's 16 rows out to this block's tiles.
class PrefetchDealer {
 public:
  PrefetchDealer(const void* a, const void* b, int64_t stride, int tiles)
      : a_(static_cast<const char*>(a)), b_(static_cast<const char*>(b)), stride_(stride), tiles_(tiles) {}
  Prefetch deal() {
    Prefetch p;
    if (!a_) return p;
    const int first = ROWS * tile_ / tiles_, last = ROWS * (tile_ + 1) / tiles_;
    ++tile_;
    p.stride = stride_;
    if (first < HALF) {
      p.a = a_ + first * stride_;
      p.rows_a = (last < HALF ? last : HALF) - first;
    }
    if (last > HALF) {
      const int from = first > HALF ? first : HALF;
      p.b = b_ + (from - HALF) * stride_;
      p.rows_b = last - from;
    }
    return p;
  }

 private:
  const char *a_, *b_;
  int64_t stride_;
  int tiles_, tile_ = 0;
};

template <bool PAIRS, int V>
INLINE void lane_block(const char* a, const char* b, int64_t stride, const float* panel, int64_t units, bool odd,
                       float* c, PrefetchDealer& dealer, int unit_bytes) {
  constexpr int R = LANE_ROWS<V>;
  for (int r = 0; r < HALF; r += R / 2) {
    float sums[R][V * W];
    lane_tile<PAIRS, V, R>(a + r * stride, b + r * stride, stride, panel, units, odd, sums[0], V * W, dealer.deal(),
                           unit_bytes);
    for (int i = 0; i < R / 2; ++i) {
      std::memcpy(c + (r + i) * MAX_TOKENS, sums[i], sizeof sums[i]);
      std::memcpy(c + (HALF + r + i) * MAX_TOKENS, sums[R / 2 + i], sizeof sums[i]);
    }
  }
}

template <class M, int N>
INLINE void dot_block(const typename M::Weight* a, const typename M::Weight* b, int64_t stride,
                      const typename M::Activation* const* x, int64_t count, float* d, PrefetchDealer& dealer) {
  constexpr int R = dot_rows(N);
  for (int r = 0; r < HALF; r += R) dot_tile<M, R, N>(a + r * stride, stride, x, count, d + r, dealer.deal());
  for (int r = 0; r < HALF; r += R) dot_tile<M, R, N>(b + r * stride, stride, x, count, d + HALF + r, dealer.deal());
}

// X W^T for the 16 rows of W that begin at a (8 rows) and b (8 rows), `stride` elements apart. next_a and next_b begin
// the block that will follow, or are null. `wide` is room for the 16 rows in float, used where Mode::CONVERT.
template <class M>
inline void multiply_block(const Tokens<M>& x, const typename M::Weight* a, const typename M::Weight* b, int64_t stride,
                           const void* next_a, const void* next_b, float* wide, Block& out) {
  using Weight = typename M::Weight;
  PrefetchDealer dealer(next_a, next_b, stride * int64_t(sizeof(Weight)), x.split.tiles());
  if (x.split.lanes) {
    const char *la = reinterpret_cast<const char*>(a), *lb = reinterpret_cast<const char*>(b);
    int64_t bytes = stride * int64_t(sizeof(Weight));
    if constexpr (M::CONVERT) {
      for (int r = 0; r < ROWS; ++r) {
        const Weight* row = r < HALF ? a + r * stride : b + (r - HALF) * stride;
        float* to = wide + r * x.count;
        int64_t k = 0;
        for (; k + W <= x.count; k += W) vstore(to + k, load_as_float(row + k));
        for (; k < x.count; ++k) to[k] = to_float(row[k]);
      }
      la = reinterpret_cast<const char*>(wide);
      lb = reinterpret_cast<const char*>(wide + HALF * x.count);
      bytes = x.count * int64_t(sizeof(float));
    }
    const int64_t units = (x.count + M::PER_UNIT - 1) / M::PER_UNIT;
    const bool odd = M::PAIRS && x.count % 2;
    const int unit_bytes = M::PER_UNIT * int(sizeof(Weight));
    int first = 0;
    for (int i = 0; i < x.split.chunks(); ++i) {
      const int v = x.split.vectors(i);
      float* c = out.c + first;
      first += v * W;
      if (v == 1) lane_block<M::PAIRS, 1>(la, lb, bytes, x.panel[i], units, odd, c, dealer, unit_bytes);
      else if (v == 2) lane_block<M::PAIRS, 2>(la, lb, bytes, x.panel[i], units, odd, c, dealer, unit_bytes);
      else lane_block<M::PAIRS, 3>(la, lb, bytes, x.panel[i], units, odd, c, dealer, unit_bytes);
    }
  }
  for (int g = 0; g < x.split.dot_groups(); ++g) {
    const int first = x.split.dot_first(g);
    const auto* const* row = x.row + first;
    float* d = out.d + first * ROWS;
    switch (x.split.dot_take(g)) {
      case 1: dot_block<M, 1>(a, b, stride, row, x.count, d, dealer); break;
      case 2: dot_block<M, 2>(a, b, stride, row, x.count, d, dealer); break;
      case 3: dot_block<M, 3>(a, b, stride, row, x.count, d, dealer); break;
#if OMNIGENE_WIDTH == 16
      case 4: dot_block<M, 4>(a, b, stride, row, x.count, d, dealer); break;
      case 5: dot_block<M, 5>(a, b, stride, row, x.count, d, dealer); break;
      case 6: dot_block<M, 6>(a, b, stride, row, x.count, d, dealer); break;
#endif
    }
  }
}

}  // namespace
}  // namespace omnigene

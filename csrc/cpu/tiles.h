// Register tiles of C = X W^T, where both X and W are contiguous along the summed dimension (that of nn.Linear), so W is
// read exactly as transformers stores it: no repacking, no second copy.
//
// A weight row is walked in *units* of 4 bytes: one float, or two bf16 that one dot-product instruction multiplies with
// the two bf16 of a lane. Two kinds of tile share a block of weight rows:
//   lane tiles   W tokens side by side in the lanes of a vector ("a panel"), the weight unit broadcast. No reduction
//                at the end; runs at the multiply-add peak when the lanes are full.
//   dot tiles    one token at a time, W units of its row against W units of a weight row, lane-wise partial sums
//                reduced at the end. For the few tokens that would leave lanes empty.
#pragma once
#include "vec.h"

#define INLINE_LAMBDA __attribute__((always_inline))

namespace omnigene {
namespace {

constexpr int HALF = 32;          // a block of weight rows is two runs of up to HALF rows: gate and up, or neighbours
constexpr int ROWS = 2 * HALF;
constexpr int MAX_V = 3;          // vectors of tokens in a lane tile
constexpr int MAX_CHUNKS = 2;      // lane tiles side by side in a block
constexpr int MAX_TOKENS = MAX_CHUNKS * MAX_V * W;

// How elements of type Weight are multiplied. PAIRS: bf16 pairs in hardware; otherwise everything is float32.
template <class WeightT, bool Pairs>
struct Mode {
  using Weight = WeightT;
  static constexpr bool PAIRS = Pairs;
  static constexpr int PER_UNIT = Pairs ? 2 : 1;                      // elements in a unit
  using Activation = std::conditional_t<Pairs, bf16, float>;          // X as the tiles read it
  static constexpr bool CONVERT = !Pairs && !std::is_same_v<Weight, float>;  // lane tiles need W as float
  using Wide = Mode<Activation, Pairs>;  // of rows that were converted for the lane tiles
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

// The next block's rows, fetched into the second-level cache while this one computes, in address order and at the pace at
// which weights are used: every weight leaves memory once. The two runs of rows are fetched side by side; a tile
// fetches its share of their lines, so many at each step.
struct Prefetch {
  const char *a = nullptr, *b = nullptr;
  int64_t lines = 0;  // of each run
  int64_t per_step = 0;
  INLINE void step() {
    const int64_t n = per_step < lines ? per_step : lines;
    for (int64_t i = 0; i < n; ++i) {
      __builtin_prefetch(a + i * 64, 0, 2);
      __builtin_prefetch(b + i * 64, 0, 2);
    }
    a += n * 64;
    b += n * 64;
    lines -= n;
  }
};

// Rows [0, R/2) at `a`, rows [R/2, R) at `b`; `stride` in bytes. The sums go to ca and cb, MAX_TOKENS apart from row to
// row, in place of what is there or added to it.
template <bool PAIRS, int V, int R>
inline __attribute__((noinline)) void lane_tile(const char* a, const char* b, int64_t stride, const float* panel,
                                                int64_t units, bool odd, float* ca, float* cb, Prefetch next,
                                                bool add) {
  const int64_t stride3 = 3 * stride;
  // Four rows hang on one pointer: [p], [p + s], [p + 2s], [p + 3s] keep the addresses in few registers.
  constexpr int QUADS = R >= 8 ? R / 4 : 2, PER_QUAD = R / QUADS;
  const char* p[QUADS];
  for (int q = 0; q < QUADS; ++q)
    p[q] = q < QUADS / 2 ? a + q * PER_QUAD * stride : b + (q - QUADS / 2) * PER_QUAD * stride;
  VF acc[R][V];
  // N units of each row. With one vector of tokens a broadcast load per product is more than the load ports give, so
  // half of the units are loaded in pairs and spread by shuffles (docs/performance.md).
  auto step = [&](auto count, const float* x, int64_t offset) INLINE_LAMBDA {
    constexpr int N = decltype(count)::value;
    VF xv[N][V];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) xv[n][v] = vload(x + (n * V + v) * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const char* quad = p[r / PER_QUAD] + offset;
      const int i = r % PER_QUAD;
      const char* row = i == 0 ? quad : i == 1 ? quad + stride : i == 2 ? quad + 2 * stride : quad + stride3;
      VF w[N];
#if OMNIGENE_WIDTH == 16
      if constexpr (N == 4) {
        double two;
        std::memcpy(&two, row + 8, 8);
        const __m512 last = (__m512)_mm512_set1_pd(two);
        w[0] = broadcast_unit(row);
        w[1] = broadcast_unit(row + 4);
        w[2] = (VF)_mm512_moveldup_ps(last);
        w[3] = (VF)_mm512_movehdup_ps(last);
      } else
#endif
        for (int n = 0; n < N; ++n) w[n] = broadcast_unit(row + n * 4);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] = multiply_add<PAIRS>(acc[r][v], xv[n][v], w[n]);
    }
  };
  using One = std::integral_constant<int, 1>;
  using Group = std::integral_constant<int, W == 16 && V == 1 ? 4 : 1>;  // as many as registers allow
  // One long float32 sum of H products loses two bits against a sum of shorter ones; bf16 inputs cannot tell.
  const int64_t segment = PAIRS ? units : 256;
  for (int64_t u = 0; u < units;) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = VF{};
    const bool first = u == 0 && !add;
    const int64_t end = units - u < segment ? units : u + segment, full = end == units ? end - odd : end;
    for (; u + 16 <= full; u += 16) {  // one cache line of each weight row
      next.step();
      // More streams than the hardware follows: the line after next of each row comes into the first-level cache.
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
        __builtin_prefetch(p[r / PER_QUAD] + (r % PER_QUAD) * stride + u * 4 + 128, 0, 3);
#pragma GCC unroll 4
      for (int i = 0; i < 16; i += Group::value) step(Group{}, panel + (u + i) * V * W, (u + i) * 4);
    }
    if (u < end) next.step();
    for (; u < full; ++u) step(One{}, panel + u * V * W, u * 4);
    if (u < end) {  // odd: the last bf16 has no partner, the next two bytes belong to somebody else
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        uint16_t bits;
        std::memcpy(&bits, p[r / PER_QUAD] + (r % PER_QUAD) * stride + u * 4, 2);
        const uint32_t unit = bits;
        const VF w = broadcast_unit(reinterpret_cast<const char*>(&unit));
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] = multiply_add<PAIRS>(acc[r][v], vload(panel + (u * V + v) * W), w);
      }
      ++u;
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      float* c = r < R / 2 ? ca + r * MAX_TOKENS : cb + (r - R / 2) * MAX_TOKENS;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) vstore(c + v * W, first ? acc[r][v] : vload(c + v * W) + acc[r][v]);
    }
  }
}

// W units of a row, from M::Weight or from 8 bits.
template <class M, class S>
INLINE VF load_units(const S* p) {
  if constexpr (!M::PAIRS) return load_as_float(p);
#if OMNIGENE_BF16
  else if constexpr (IS_STORED<S>) return (VF)_mm512_cvtne2ps_pbh((__m512)load_as_float(p + W), (__m512)load_as_float(p));
#endif
  else return vload(reinterpret_cast<const float*>(p));
}

// R weight rows against N tokens' rows; c[n * ROWS + r] receives the sums, or they are added to it.
template <class M, int R, int N, class Weight = typename M::Weight>
inline __attribute__((noinline)) void dot_tile(const Weight* w, int64_t stride,
                                               const typename M::Activation* const* x, int64_t count, float* c,
                                               Prefetch next, bool add) {
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
    next.step();
    step([&](int r) INLINE_LAMBDA { return w + r * stride + k; }, [&](int n) INLINE_LAMBDA { return x[n] + k; });
  }
  if (k < count) {  // the rest, padded with zeros
    Weight wt[R][STEP] = {};
    Activation xt[N][STEP] = {};
    for (int r = 0; r < R; ++r) std::memcpy(wt[r], w + r * stride + k, (count - k) * sizeof(Weight));
    for (int n = 0; n < N; ++n) std::memcpy(xt[n], x[n] + k, (count - k) * sizeof(Activation));
    next.step();
    step([&](int r) INLINE_LAMBDA { return wt[r]; }, [&](int n) INLINE_LAMBDA { return xt[n]; });
  }
  float sums[32];
  for (int first = 0; first < R * N; first += W) vstore(sums + first, sum_each(acc + first));
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
    for (int r = 0; r < R; ++r) c[n * ROWS + r] = add ? c[n * ROWS + r] + sums[n * R + r] : sums[n * R + r];
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
};

template <class M>
struct Tokens {
  Split split;
  int64_t count;                                  // elements of a row
  const float* panel[MAX_CHUNKS];                 // [units][V][W] each
  const typename M::Activation* row[DOT_MAX];     // the single tokens
};

// Results of a block: c[row][lane token], d[single token][row]; the second run's rows begin at HALF.
struct Block {
  alignas(64) float c[ROWS * MAX_TOKENS];
  alignas(64) float d[DOT_MAX * ROWS];
};

// Brings rows into the second-level cache with plain loads, which the hardware prefetchers follow at full bandwidth.
// Nothing is computed meanwhile, so this is for blocks with few tokens: memory is their bound. With NANS, whether a NaN of
// e4m3 is among them: looking for it here is free, in a tile it is not.
template <bool NANS = false>
inline bool stream_in(const void* from, int64_t row_bytes, int64_t stride_bytes, int64_t rows) {
  constexpr int RUNS = 4;
  if (row_bytes == stride_bytes) {  // one long row
    row_bytes *= rows;
    rows = 1;
  }
  // Four runs side by side: of rows, or of one row.
  const int64_t some = rows >= RUNS ? rows / RUNS : 1, apart = rows >= RUNS ? some * stride_bytes : row_bytes / RUNS / 64 * 64;
  const int64_t bytes = rows >= RUNS ? row_bytes : apart;
  const char* p = static_cast<const char*>(from);
  VU seen[RUNS] = {};  // bits, not numbers: some processors take long over subnormal ones
  for (int64_t row = 0; row < some; ++row, p += stride_bytes)
    for (int64_t i = 0; i + 64 <= bytes; i += 64)
#pragma GCC unroll 4
      for (int r = 0; r < RUNS; ++r) {
        const float* line = reinterpret_cast<const float*>(p + r * apart + i);
        if constexpr (NANS) {
          for (int j = 0; j < 16; j += W) seen[r] |= (VU)(((VBytes)vload(line + j) | 0x80) == 0xff);
        } else {
          seen[r] |= (VU)vload(line);
        }
      }
  for (VU& each : seen) __asm__ volatile("" : OMNIGENE_KEEP(each));
  if constexpr (!NANS) return false;
  const VU all = (seen[0] | seen[1]) | (seen[2] | seen[3]);
  bool found = false;
  for (int i = 0; i < W; ++i) found |= all[i] != 0;
  // What is no whole line of a run.
  auto rest = [&](int64_t begin, int64_t end) {
    const uint8_t* byte = static_cast<const uint8_t*>(from);
    for (int64_t i = begin; i < end; ++i) found |= (byte[i] | 0x80) == 0xff;
  };
  const int64_t whole = bytes / 64 * 64, streamed = rows >= RUNS ? RUNS * some : 1;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t begin = row * stride_bytes;
    rest(begin + (row >= streamed ? 0 : rows >= RUNS ? whole : RUNS * apart), begin + row_bytes);
  }
  return found;
}

// Deals the lines of the next block's rows out to this block's tiles.
class PrefetchDealer {
 public:
  // a and b begin runs of `bytes`, or are null
  PrefetchDealer(const void* a, const void* b, int64_t bytes, int tiles)
      : a_(static_cast<const char*>(a)), b_(static_cast<const char*>(b)), lines_(a ? bytes / 64 : 0), tiles_(tiles) {}
  Prefetch deal(int64_t steps) {
    const int64_t first = lines_ * tile_ / tiles_, last = lines_ * (tile_ + 1) / tiles_;
    ++tile_;
    return {a_ + first * 64, b_ + first * 64, last - first, (last - first + steps - 1) / steps};
  }

 private:
  const char *a_, *b_;
  int64_t lines_;
  int tiles_, tile_ = 0;
};

template <bool PAIRS, int V>
INLINE void lane_block(const char* a, const char* b, int64_t stride, int half, const float* panel, int64_t units,
                       bool odd, float* c, PrefetchDealer& dealer, bool add) {
  constexpr int R = LANE_ROWS<V>;
  for (int r = 0; r < half; r += R / 2)
    lane_tile<PAIRS, V, R>(a + r * stride, b + r * stride, stride, panel, units, odd, c + r * MAX_TOKENS,
                           c + (HALF + r) * MAX_TOKENS, dealer.deal((units + 15) / 16), add);
}

template <class M, int N, class S>
INLINE void dot_block(const S* a, const S* b, int64_t stride, int half, const typename M::Activation* const* x,
                      int64_t count, float* d, PrefetchDealer& dealer, bool add) {
  constexpr int R = dot_rows(N);
  const int64_t steps = (count + W * M::PER_UNIT - 1) / (W * M::PER_UNIT);
  for (int r = 0; r < half; r += R)
    dot_tile<M, R, N>(a + r * stride, stride, x, count, d + r, dealer.deal(steps), add);
  for (int r = 0; r < half; r += R)
    dot_tile<M, R, N>(b + r * stride, stride, x, count, d + HALF + r, dealer.deal(steps), add);
}

// The dot tiles of a block over its rows, in memory or converted.
template <class M, class S>
inline void dot_blocks(const Tokens<M>& x, const S* a, const S* b, int64_t stride, int half, float* to,
                       PrefetchDealer& dealer, bool add) {
  const Split& s = x.split;
  for (int g = 0; g < s.dot_groups(); ++g) {
    const int first = s.dot_first(g);
    const auto* const* row = x.row + first;
    float* d = to + first * ROWS;
    switch (s.dot_take(g)) {
      case 1: dot_block<M, 1>(a, b, stride, half, row, x.count, d, dealer, add); break;
      case 2: dot_block<M, 2>(a, b, stride, half, row, x.count, d, dealer, add); break;
      case 3: dot_block<M, 3>(a, b, stride, half, row, x.count, d, dealer, add); break;
#if OMNIGENE_WIDTH == 16
      case 4: dot_block<M, 4>(a, b, stride, half, row, x.count, d, dealer, add); break;
      case 5: dot_block<M, 5>(a, b, stride, half, row, x.count, d, dealer, add); break;
      case 6: dot_block<M, 6>(a, b, stride, half, row, x.count, d, dealer, add); break;
#endif
    }
  }
}

// A row as the tiles read it.
template <class S, class A>
inline void convert_row(const S* from, int64_t count, A* to) {
  int64_t k = 0;
  for (; k + W <= count; k += W) store_rounded(to + k, load_any(from + k));
  if (k == count) return;
  S rest[W] = {};
  std::memcpy(rest, from + k, (count - k) * sizeof(S));
  store_live(to + k, load_any(rest), count - k);
}

// X W^T for two runs of `half` rows (a multiple of 8, at most HALF) of W that begin at a and b, `stride` elements from
// row to row. next_a and next_b begin the two runs that will follow, or are null. `wide` is room for ROWS rows in float.
//
// Rows of M::Weight are read where they stand, but for the lane tiles where Mode::CONVERT. Rows of 8 bits are converted
// in the loads of the dot tiles if no lane tile needs them, else once for all tokens; their sums lack the scale.
template <class M, class S>
inline void multiply_block(const Tokens<M>& x, const S* a, const S* b, int64_t stride, int half, const void* next_a,
                           const void* next_b, float* wide, Block& out, bool add = false) {
  using Weight = S;
  constexpr bool STORED = IS_STORED<S>, E4M3 = std::is_same_v<S, e4m3>;
  using Activation = typename M::Activation;
  const Split& s = x.split;
  bool nan = false;
  const int64_t units = (x.count + M::PER_UNIT - 1) / M::PER_UNIT;
  int tiles = 0;
  for (int i = 0; i < s.chunks(); ++i) {
    const int v = s.vectors(i);
    tiles += 2 * half / (v == 1 ? LANE_ROWS<1> : v == 2 ? LANE_ROWS<2> : LANE_ROWS<3>);
  }
  for (int g = 0; g < s.dot_groups(); ++g) tiles += 2 * half / dot_rows(s.dot_take(g));
  const int64_t run = half * stride * int64_t(sizeof(Weight));
  if (s.lanes == 0) {
    const int64_t row = x.count * int64_t(sizeof(Weight)), apart = stride * int64_t(sizeof(Weight));
    nan |= stream_in<E4M3>(a, row, apart, half);
    nan |= stream_in<E4M3>(b, row, apart, half);
    // Half the bytes and a conversion: computing takes as long as reading, and the next rows come meanwhile.
    if constexpr (!STORED) next_a = next_b = nullptr;
  }
  PrefetchDealer dealer(next_a, next_b, run, tiles);
  Activation* const converted = reinterpret_cast<Activation*>(wide);
  if constexpr (STORED || M::CONVERT) {
    if (s.lanes || nan)
      for (int r = 0; r < 2 * half; ++r)
        convert_row(r < half ? a + r * stride : b + (r - half) * stride, x.count, converted + r * x.count);
  }
  if (s.lanes) {
    const char *la = reinterpret_cast<const char*>(a), *lb = reinterpret_cast<const char*>(b);
    int64_t bytes = stride * int64_t(sizeof(Weight));
    if constexpr (STORED || M::CONVERT) {
      la = reinterpret_cast<const char*>(converted);
      lb = reinterpret_cast<const char*>(converted + half * x.count);
      bytes = x.count * int64_t(sizeof(Activation));
    }
    const bool odd = M::PAIRS && x.count % 2;
    int first = 0;
    for (int i = 0; i < s.chunks(); ++i) {
      const int v = s.vectors(i);
      float* c = out.c + first;
      first += v * W;
      if (v == 1) lane_block<M::PAIRS, 1>(la, lb, bytes, half, x.panel[i], units, odd, c, dealer, add);
      else if (v == 2) lane_block<M::PAIRS, 2>(la, lb, bytes, half, x.panel[i], units, odd, c, dealer, add);
      else lane_block<M::PAIRS, 3>(la, lb, bytes, half, x.panel[i], units, odd, c, dealer, add);
    }
  }
  if constexpr (STORED) {
    // The tokens as the mode of converted rows has them: all modes of float32 share these tiles.
    Tokens<typename M::Wide> rows;
    rows.split = s;
    rows.count = x.count;
    for (int n = 0; n < s.single; ++n) rows.row[n] = x.row[n];
    if (s.lanes || nan)
      dot_blocks<typename M::Wide>(rows, converted, converted + half * x.count, x.count, half, out.d, dealer, add);
    else
      dot_blocks<typename M::Wide>(rows, a, b, stride, half, out.d, dealer, add);
  } else {
    dot_blocks<M>(x, a, b, stride, half, out.d, dealer, add);
  }
}

// The scales of the rows of a block, times `unit`; rows past the live ones stay as they are.
inline void scale_block(Block& block, const Split& s, float unit, const float* a, int64_t live_a, const float* b,
                        int64_t live_b) {
  for (int run = 0; run < 2; ++run) {
    const float* scale = run ? b : a;
    const int64_t live = run ? live_b : live_a;
    float *c = block.c + run * HALF * MAX_TOKENS, *d = block.d + run * HALF;
    for (int64_t r = 0; r < live; ++r)
      for (int i = 0; i < s.lanes; ++i) {
        float* to = c + r * MAX_TOKENS + i * W;
        vstore(to, vload(to) * unit * scale[r]);
      }
    for (int n = 0; n < s.single; ++n)
      for (int64_t r = 0; r < live; ++r) d[n * ROWS + r] = d[n * ROWS + r] * unit * scale[r];
  }
}

}  // namespace
}  // namespace omnigene

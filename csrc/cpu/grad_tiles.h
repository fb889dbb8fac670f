// Register tiles of the two products that a backward adds to X W^T of tiles.h:
//   times_rows   Y = A W, W [rows, columns] contiguous along the columns of Y: two rows of W are interleaved on the fly,
//                so that the pair instruction of bf16 sums over rows, and a token's pair is broadcast
//   outer        dW = A^T B, summed over tokens: pairs of tokens are interleaved while A and B are packed
// Units are those of tiles.h: one float, or two bf16 that one instruction multiplies with two others.
#pragma once
#include "tiles.h"

namespace omnigene {
namespace {

constexpr int STRIP = 2 * W;                     // columns of a tile of times_rows
constexpr int MAX_GROUP = W == 16 ? 12 : 6;      // its tokens, by the number of registers
constexpr int OUTER_ROWS = W == 16 ? 6 : 3;      // rows of a tile of outer, of up to OUTER_V vectors
constexpr int OUTER_V = 4;

// Interleaves two rows of bf16: lane i of the result holds (a[i], b[i]) of 2 W columns, in natural order.
INLINE void natural_order(VF low, VF high, VF& first, VF& second) {
#if OMNIGENE_WIDTH == 16
  first = __builtin_shufflevector(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  second = __builtin_shufflevector(low, high, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
#else
  first = low;
  second = high;
#endif
}

// A region of memory, row by row, fetched into the second-level cache a few lines at each step of a tile.
class FetchAhead {
 public:
  FetchAhead() = default;
  FetchAhead(const void* from, int64_t row_bytes, int64_t stride_bytes, int64_t rows, int64_t steps)
      : row_(static_cast<const char*>(from)), stride_(stride_bytes), lines_((row_bytes + 63) / 64),
        left_(from ? lines_ * rows : 0), per_step_(steps > 0 ? (left_ + steps - 1) / steps : 0) {}
  INLINE void step() {
    int64_t n = per_step_ < left_ ? per_step_ : left_;
    left_ -= n;
    for (; n > 0; --n) {
      __builtin_prefetch(row_ + line_ * 64, 0, 2);
      if (++line_ == lines_) {
        line_ = 0;
        row_ += stride_;
      }
    }
  }

 private:
  const char* row_ = nullptr;
  int64_t stride_ = 0, lines_ = 0, left_ = 0, per_step_ = 0, line_ = 0;
};

// A strip of W on its way through the groups of tokens that meet it: the first group leaves its rows, interleaved, in
// `staged`, where the others find them in the first-level cache. Read from W again they would miss it: rows lie a power
// of two apart, or nearly, and fall into few sets.
enum class Strip { alone, first, later };

// out[t][0:STRIP] (+)= sum over `rows` of x[row][t] * w[row][0:STRIP] for R tokens; x holds units, xs apart.
template <class M, int R, Strip S>
inline __attribute__((noinline)) void rows_tile(const float* x, int64_t xs, const typename M::Weight* w, int64_t ws,
                                                int64_t rows, float* staged, float* const* out, int64_t at, bool add,
                                                FetchAhead& fetch) {
  FetchAhead next = fetch;  // in registers
  VF acc[R][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = VF{};
  auto multiply = [&](VF w0, VF w1) INLINE_LAMBDA {
    if constexpr (S == Strip::first) {
      vstore(staged, w0);
      vstore(staged + W, w1);
      staged += STRIP;
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const VF v = broadcast_unit(reinterpret_cast<const char*>(x + r));
      acc[r][0] = multiply_add<M::PAIRS>(acc[r][0], v, w0);
      acc[r][1] = multiply_add<M::PAIRS>(acc[r][1], v, w1);
    }
    x += xs;
  };
  if constexpr (S == Strip::later) {
    for (int64_t k = 0; k < rows; k += M::PER_UNIT, staged += STRIP) {
      next.step();
      multiply(vload(staged), vload(staged + W));
    }
  } else {
#if OMNIGENE_BF16
    if constexpr (M::PAIRS) {
      int64_t k = 0;
      for (; k + 2 <= rows; k += 2, w += 2 * ws) {
        next.step();
        const __m512i a = _mm512_loadu_si512(w), b = _mm512_loadu_si512(w + ws);
        multiply((VF)_mm512_unpacklo_epi16(a, b), (VF)_mm512_unpackhi_epi16(a, b));
      }
      if (k < rows) {  // the last row has no partner
        const __m512i a = _mm512_loadu_si512(w), b = _mm512_setzero_si512();
        multiply((VF)_mm512_unpacklo_epi16(a, b), (VF)_mm512_unpackhi_epi16(a, b));
      }
    }
#endif
    if constexpr (!M::PAIRS)
      for (int64_t k = 0; k < rows; ++k, w += ws) {
        next.step();
        multiply(load_as_float(w), load_as_float(w + W));
      }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    VF first = acc[r][0], second = acc[r][1];
    if constexpr (M::PAIRS) natural_order(acc[r][0], acc[r][1], first, second);
    float* to = out[r] + at;
    vstore(to, add ? vload(to) + first : first);
    vstore(to + W, add ? vload(to + W) + second : second);
  }
  fetch = next;
}

template <class M, Strip S>
INLINE void rows_group(int tokens, const float* x, int64_t xs, const typename M::Weight* w, int64_t ws, int64_t rows,
                       float* staged, float* const* out, int64_t at, bool add, FetchAhead& next) {
  switch (tokens) {
#define OMNIGENE_CASE(R) \
  case R: return rows_tile<M, R, S>(x, xs, w, ws, rows, staged, out, at, add, next);
    OMNIGENE_CASE(1) OMNIGENE_CASE(2) OMNIGENE_CASE(3) OMNIGENE_CASE(4) OMNIGENE_CASE(5) OMNIGENE_CASE(6)
#if OMNIGENE_WIDTH == 16
    OMNIGENE_CASE(7) OMNIGENE_CASE(8) OMNIGENE_CASE(9) OMNIGENE_CASE(10) OMNIGENE_CASE(11) OMNIGENE_CASE(12)
#endif
#undef OMNIGENE_CASE
  }
}

// Tokens packed by pack_panel: units of a token's row, `stride` floats from one unit to the next.
struct Panel {
  const float* units;
  int64_t stride;
  int n;
};

// Rows and columns of W in one block, and what follows it: the same shape at `next`, or null. `scale` of each row where
// Weight is of 8 bits.
template <class Weight>
struct Slab {
  const Weight* w;
  int64_t stride, rows, columns;
  const void* next;
  const float* scale = nullptr;
};

// A strip of 8-bit rows, times their scales, as Strip::first would have staged it; zeros past the last column.
template <class M, class S>
inline void stage_strip(const S* w, int64_t stride, int64_t rows, int64_t columns, const float* scale, float* staged) {
  using Activation = typename M::Activation;
  for (int64_t k = 0; k < rows; k += M::PER_UNIT, staged += STRIP) {
    alignas(64) Activation row[M::PER_UNIT][STRIP];
    for (int i = 0; i < M::PER_UNIT; ++i) {
      if (k + i == rows) {  // the last row has no partner
        std::memset(static_cast<void*>(row[i]), 0, sizeof(row[i]));
        continue;
      }
      const S* from = w + (k + i) * stride;
      S part[STRIP] = {};
      if (columns < STRIP) {
        std::memcpy(part, from, columns * sizeof(S));
        from = part;
      }
      const float factor = scale[k + i];
      for (int j = 0; j < STRIP; j += W) store_rounded(row[i] + j, load_any(from + j) * unit_of<S> * factor);
    }
#if OMNIGENE_BF16
    if constexpr (M::PAIRS) {
      const __m512i a = _mm512_load_si512(row[0]), b = _mm512_load_si512(row[1]);
      vstore(staged, (VF)_mm512_unpacklo_epi16(a, b));
      vstore(staged + W, (VF)_mm512_unpackhi_epi16(a, b));
    }
#endif
    if constexpr (!M::PAIRS)
      for (int j = 0; j < STRIP; j += W) vstore(staged + j, vload(row[0] + j));
  }
}

constexpr int64_t BLOCK_BYTES = 320 << 10;  // of a slab that a core holds in its second-level cache while tokens pass
constexpr int64_t BLOCK_ROWS = 256;         // at most: a staged strip stays in the first-level cache
constexpr int FEW = 8;                      // tokens for which memory is the bound: see stream_in

// Room that times_rows needs.
template <class Weight>
struct StripRoom {
  alignas(64) float staged[BLOCK_ROWS * STRIP];
  Weight tail[BLOCK_ROWS * STRIP];  // the last columns of a block, padded to a strip
};

// out[t][at : at + columns] (+)= tokens times the slab. Rows of `out` have room for whole strips.
template <class M, class Weight>
inline void times_rows(const Panel& x, const Slab<Weight>& slab, float* const* out, int64_t at, bool add,
                       StripRoom<typename M::Weight>& room) {
  const int64_t strips = (slab.columns + STRIP - 1) / STRIP, rest = slab.columns % STRIP;
  const int groups = (x.n + MAX_GROUP - 1) / MAX_GROUP;
  const int64_t row_bytes = slab.columns * int64_t(sizeof(Weight)), stride_bytes = slab.stride * int64_t(sizeof(Weight));
  int64_t block = BLOCK_BYTES / row_bytes / 2 * 2;
  block = block < 32 ? 32 : block > BLOCK_ROWS ? BLOCK_ROWS : block;
  auto rows_at = [&](int64_t k) { return slab.rows - k < block ? slab.rows - k : block; };
  for (int64_t k = 0; k < slab.rows; k += block) {
    const int64_t rows = rows_at(k);
    const Weight* w = slab.w + k * slab.stride;
    const bool last = k + block >= slab.rows;
    const void* ahead = last ? slab.next : w + block * slab.stride;
    if (x.n <= FEW) {
      stream_in(w, row_bytes, stride_bytes, rows);
      ahead = nullptr;
    }
    FetchAhead next(ahead, row_bytes, stride_bytes, rows_at(last ? 0 : k + block),
                    strips * groups * ((rows + M::PER_UNIT - 1) / M::PER_UNIT));
    for (int64_t s = 0; s < strips; ++s) {
      const Weight* strip = w + s * STRIP;
      int64_t stride = slab.stride;
      if constexpr (IS_STORED<Weight>) {
        const int64_t live = rest && s == strips - 1 ? rest : STRIP;
        stage_strip<M>(strip, stride, rows, live, slab.scale + k, room.staged);
      } else if (rest && s == strips - 1) {
        for (int64_t r = 0; r < rows; ++r) {
          std::memset(static_cast<void*>(room.tail + r * STRIP), 0, STRIP * sizeof(Weight));
          std::memcpy(static_cast<void*>(room.tail + r * STRIP), strip + r * stride, rest * sizeof(Weight));
        }
        strip = room.tail;
        stride = STRIP;
      }
      for (int g = 0; g < groups; ++g) {
        const int first = x.n * g / groups, tokens = x.n * (g + 1) / groups - first;
        const float* units = x.units + k / M::PER_UNIT * x.stride + first;
        auto group = [&](auto how) INLINE_LAMBDA {
          if constexpr (IS_STORED<Weight>)  // all modes of float32 share these tiles
            rows_group<typename M::Wide, decltype(how)::value>(tokens, units, x.stride, nullptr, 0, rows, room.staged,
                                                               out + first, at + s * STRIP, add || k > 0, next);
          else
            rows_group<M, decltype(how)::value>(tokens, units, x.stride, strip, stride, rows, room.staged, out + first,
                                                at + s * STRIP, add || k > 0, next);
        };
        if constexpr (IS_STORED<Weight>) group(std::integral_constant<Strip, Strip::later>{});
        else if (groups == 1) group(std::integral_constant<Strip, Strip::alone>{});
        else if (g == 0) group(std::integral_constant<Strip, Strip::first>{});
        else group(std::integral_constant<Strip, Strip::later>{});
      }
    }
  }
}

// Units along tokens: those of tokens 2p and 2p + 1 (bf16 pairs), or of token p.
template <class M>
constexpr int64_t token_units(int64_t n) {
  return (n + M::PER_UNIT - 1) / M::PER_UNIT;
}

template <class M, class S>
INLINE float token_unit(const S* const* row, [[maybe_unused]] int64_t n, int64_t p, int64_t column) {
  if constexpr (M::PAIRS) {
    const uint32_t low = row[2 * p][column].bits, high = 2 * p + 1 < n ? row[2 * p + 1][column].bits : 0;
    return float_of(low | high << 16);
  } else {
    return to_float(row[p][column]);
  }
}

// Two vectors (PAIRS) or one of units of tokens at `column` and on.
template <class M, class S>
INLINE void load_token_units(const S* const* row, [[maybe_unused]] int64_t n, int64_t p, int64_t column, VF* to) {
#if OMNIGENE_BF16
  if constexpr (M::PAIRS) {
    const __m512i a = _mm512_loadu_si512(row[2 * p] + column);
    const __m512i b = 2 * p + 1 < n ? _mm512_loadu_si512(row[2 * p + 1] + column) : _mm512_setzero_si512();
    natural_order((VF)_mm512_unpacklo_epi16(a, b), (VF)_mm512_unpackhi_epi16(a, b), to[0], to[1]);
    return;
  }
#endif
  if constexpr (!M::PAIRS) to[0] = load_as_float(row[p] + column);
}

// B of outer: [units of tokens][padded columns], zeros beyond `columns`.
template <class M, class S>
inline void pack_columns(const S* const* row, int64_t n, int64_t column, int64_t columns, int64_t padded, float* to) {
  constexpr int STEP = M::PER_UNIT * W;
  for (int64_t p = 0; p < token_units<M>(n); ++p, to += padded) {
    int64_t c = 0;
    for (; c + STEP <= columns; c += STEP) {
      VF v[2];
      load_token_units<M>(row, n, p, column + c, v);
      for (int i = 0; i < M::PER_UNIT; ++i) vstore(to + c + i * W, v[i]);
    }
    for (; c < padded; ++c) to[c] = c < columns ? token_unit<M>(row, n, p, column + c) : 0.0f;
  }
}

// A^T of outer: [rows][stride >= units of tokens, a multiple of W], zeros beyond the last token.
template <class M, class S>
inline void pack_transposed(const S* const* row, int64_t n, int64_t first, int64_t rows, int64_t stride, float* to) {
  constexpr int STEP = M::PER_UNIT * W;
  const int64_t units = token_units<M>(n);
  for (int64_t p = 0; p < stride; p += W) {
    int64_t r = 0;
    for (; r + STEP <= rows; r += STEP) {
      VF t[2][W];
      for (int i = 0; i < W; ++i) {
        VF v[2] = {VF{}, VF{}};
        if (p + i < units) load_token_units<M>(row, n, p + i, first + r, v);
        t[0][i] = v[0];
        t[1][i] = v[1];
      }
      for (int half = 0; half < M::PER_UNIT; ++half) {
        transpose(t[half]);
        for (int i = 0; i < W; ++i) vstore(to + (r + half * W + i) * stride + p, t[half][i]);
      }
    }
    for (; r < rows; ++r)
      for (int i = 0; i < W; ++i)
        to[r * stride + p + i] = p + i < units ? token_unit<M>(row, n, p + i, first + r) : 0.0f;
  }
}

// Results that are not read again soon go past the caches where the address allows it.
template <class D>
INLINE void stream_out(D* to, VF a, VF b, int live) {
  if (live >= STRIP) {
#if OMNIGENE_BF16
    if constexpr (std::is_same_v<D, bf16>) {
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
      if (reinterpret_cast<uintptr_t>(to) % 64 == 0) _mm512_stream_si512(reinterpret_cast<__m512i*>(to), both);
      else _mm512_storeu_si512(to, both);
      return;
    }
#endif
    store_rounded(to, a);
    store_rounded(to + W, b);
    return;
  }
  D part[STRIP];
  store_rounded(part, a);
  store_rounded(part + W, b);
  std::memcpy(static_cast<void*>(to), part, live * sizeof(D));
}

// out[r][0 : V * W] = sum over units of a[r][u] * b[u]; `live` columns are stored.
template <class M, int R, int V>
inline __attribute__((noinline)) void outer_tile(const float* a, int64_t as, const float* b, int64_t bs, int64_t units,
                                                 typename M::Weight* out, int64_t stride, int64_t live) {
  VF acc[R][V];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = VF{};
  for (int64_t u = 0; u < units; ++u, b += bs) {
    VF w[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) w[v] = vload(b + v * W);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const VF x = broadcast_unit(reinterpret_cast<const char*>(a + r * as + u));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = multiply_add<M::PAIRS>(acc[r][v], x, w[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; v += 2) {
      const int64_t left = live - v * W;
      if (left > 0) stream_out(out + r * stride + v * W, acc[r][v], acc[r][v + 1], left < STRIP ? int(left) : STRIP);
    }
}

// out[rows, columns] = A^T B for packed A and B.
template <class M>
inline void outer(const float* a, int64_t as, int64_t rows, const float* b, int64_t bs, int64_t columns, int64_t units,
                  typename M::Weight* out, int64_t stride) {
  for (int64_t r = 0; r < rows; r += OUTER_ROWS) {
    const int64_t some = rows - r < OUTER_ROWS ? rows - r : OUTER_ROWS;
    for (int64_t c = 0; c < columns; c += OUTER_V * W) {
      const int64_t live = columns - c < OUTER_V * W ? columns - c : OUTER_V * W;
      typename M::Weight* to = out + r * stride + c;
      const float* x = a + r * as;
      if (some < OUTER_ROWS) {
        for (int64_t i = 0; i < some; ++i) {
          if (live > STRIP) outer_tile<M, 1, OUTER_V>(x + i * as, as, b + c, bs, units, to + i * stride, stride, live);
          else outer_tile<M, 1, 2>(x + i * as, as, b + c, bs, units, to + i * stride, stride, live);
        }
      } else if (live > STRIP) {
        outer_tile<M, OUTER_ROWS, OUTER_V>(x, as, b + c, bs, units, to, stride, live);
      } else {
        outer_tile<M, OUTER_ROWS, 2>(x, as, b + c, bs, units, to, stride, live);
      }
    }
  }
}

}  // namespace
}  // namespace omnigene

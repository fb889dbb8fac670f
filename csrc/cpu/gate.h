// The router: RMSNorm without weight, scale, projection, softmax, top-k, renormalise, per-expert scale.
#pragma once
#include <omp.h>

#include <cmath>

#include "api.h"
#include "experts.h"
#include "tiles.h"

namespace omnigene {
namespace {

// Writes what a token's gate decided into row t of the trace.
inline void record(const TraceArgs& trace, int64_t t, int64_t K, bool routed, const int64_t* index,
                   const float* weights, const float* stats) {
  auto write = [&](auto* ids) {
    for (int64_t k = 0; k < K; ++k) ids[t * K + k] = routed ? index[k] : UNROUTED;
  };
  if (trace.id_bytes == 1) write(static_cast<uint8_t*>(trace.ids));
  else write(static_cast<uint16_t*>(trace.ids));
  if (trace.weights)
    for (int64_t k = 0; k < K; ++k) trace.weights[t * K + k] = round_to(weights[k], static_cast<f16*>(nullptr)).bits;
  if (trace.stats)
    for (int i = 0; i < 3; ++i) trace.stats[t * 3 + i] = round_to(stats[i], static_cast<f16*>(nullptr)).bits;
}

// softmax of logits[E] into probabilities[E], then the K largest, equals by lowest id. Both logits and `room` have
// round_up(E, W) floats of space, `room` as many again for one maximum per vector. stats: null, or three floats as in
// TraceArgs. Whether the row was routed: false where a logit was NaN or +Inf.
inline bool select_experts(float* logits, int64_t E, int64_t K, const float* per_expert_scale, float* probabilities,
                           float* weights, int64_t* index, float* room, float* stats) {
  const int64_t vectors = ceil_div(E, W), padded = vectors * W;
  float* top = room + padded;
  for (int64_t e = E; e < padded; ++e) logits[e] = -INFINITY;
  VF best = vset(-INFINITY), total = {};
  for (int64_t e = 0; e < padded; e += W) best = vmax(best, vload(logits + e));
  const float largest = vtop(best);
  for (int64_t e = 0; e < padded; e += W) {
    const VF p = vexp_below(vload(logits + e) - largest);
    vstore(room + e, p);
    total += p;
  }
  const float sum = vsum(total);
  for (int64_t e = 0; e < padded; e += W) vstore(room + e, vload(room + e) / sum);
  std::memcpy(probabilities, room, E * sizeof(float));
  if (!(sum == sum)) {  // a NaN token: every weight is NaN, the ids stay valid and distinct
    for (int64_t k = 0; k < K; ++k) {
      index[k] = k;
      weights[k] = NAN;
    }
    if (stats) stats[0] = stats[1] = stats[2] = NAN;
    return false;
  }
  if (stats) {
    // ln p = (logit - largest) - ln sum, so one logarithm serves all; where p is 0 the logit may be -Inf.
    VF inner = {};
    for (int64_t e = 0; e < padded; e += W) {
      const VF p = vload(room + e), below = vload(logits + e) - largest;
      inner += p > 0.0f ? p * below : VF{};
    }
    stats[0] = std::log(sum) - vsum(inner);
  }
  for (int64_t e = E; e < padded; ++e) room[e] = -1.0f;
  for (int64_t v = 0; v < vectors; ++v) top[v] = vtop(vload(room + v * W));
  float selected = 0.0f;
  for (int64_t k = 0; k < K; ++k) {
    int64_t v = 0;
    for (int64_t i = 1; i < vectors; ++i) v = top[i] > top[v] ? i : v;
    const float p = top[v];
    const int64_t id = v * W + first_equal(vload(room + v * W), p);
    index[k] = id;
    weights[k] = p;
    selected += p;
    room[id] = -1.0f;
    top[v] = vtop(vload(room + v * W));
  }
  if (stats) {
    float next = top[0];
    for (int64_t i = 1; i < vectors; ++i) next = next < top[i] ? top[i] : next;
    stats[1] = selected;
    stats[2] = weights[K - 1] - (next > 0.0f ? next : 0.0f);  // -1 marks what was chosen
  }
  for (int64_t k = 0; k < K; ++k) weights[k] = weights[k] / selected * per_expert_scale[index[k]];
  return true;
}

// select_experts for token t of a call, with its record.
template <class Args>
inline void select_token(const Args& g, int64_t t, float* logits, const float* per_expert_scale, float* room) {
  float stats[3];
  int64_t* index = g.index + t * g.K;
  float* weights = g.weights + t * g.K;
  const bool routed = select_experts(logits, g.E, g.K, per_expert_scale, g.probabilities + t * g.E, weights, index,
                                     room, g.trace.ids && g.trace.stats ? stats : nullptr);
  if (g.trace.ids) record(g.trace, t, g.K, routed, index, weights, stats);
}

template <class T>
inline void widen(const void* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_float(static_cast<const T*>(from)[i]);
}
inline void widen(Dtype dtype, const void* from, int64_t n, float* to) {
  switch (dtype) {
    case Dtype::f32: return widen<float>(from, n, to);
    case Dtype::bf16: return widen<bf16>(from, n, to);
    case Dtype::f16: return widen<f16>(from, n, to);
  }
}
INLINE int64_t element_size(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }

inline void topk_gate(const GateArgs& g) {
  const int threads = g.T * g.E < 8192 ? 1 : g.threads;
  const int64_t own = round_up(g.E, W) * 3;
  float* scale = static_cast<float*>(scratch(0, (g.E + own * threads) * sizeof(float)));
  float* rooms = scale + g.E;
  widen(g.scale_dtype, g.per_expert_scale, g.E, scale);
#pragma omp parallel num_threads(threads)
  {
    const int id = omp_get_thread_num(), team = omp_get_num_threads();
    float *room = rooms + own * id, *logits = room + own / 3 * 2;
    for (int64_t t = g.T * id / team; t < g.T * (id + 1) / team; ++t) {
      const char* row = static_cast<const char*>(g.logits) + t * g.logits_stride * element_size(g.logits_dtype);
      widen(g.logits_dtype, row, g.E, logits);
      select_token(g, t, logits, scale, room);
    }
  }
}

// X: dtype of hidden, projection and scale. HF: round to X where transformers does.
template <class X, bool HF>
class Route {
  using M = Mode<X, OMNIGENE_BF16 && HF && std::is_same_v<X, bf16>>;
  using Activation = typename M::Activation;
  static constexpr int64_t CHUNK = MAX_V * W;  // tokens that meet the projection together

 public:
  explicit Route(const RouteArgs& args) : g_(args) {}

  void run() {
    const int64_t H = g_.H, E = g_.E, T = g_.T;
    int threads = double(T) * double(E) * double(H) < 1e5 ? 1 : g_.threads;
    // Few tokens: each thread normalises all of them and takes some of the experts. Else each takes whole chunks. Chunks
    // begin at multiples of W, so a token meets the same kind of tile, and gets the same bits, with any thread count.
    const bool split_rows = T < 2 * W;
    const int64_t rows = split_rows ? round_up(T, W) : CHUNK;
    const int64_t row = round_up(H, 32);
    const int64_t x_bytes = round_up(rows * row * int64_t(sizeof(Activation)), 64);
    const int64_t panel_bytes = round_up(ceil_div(H, M::PER_UNIT) * CHUNK * 4, 64);
    const int64_t wide_bytes = M::CONVERT ? round_up(ROWS * H * 4, 64) : 0;
    const int64_t tail_bytes = round_up(ROWS * H * int64_t(sizeof(X)), 64);
    const int64_t room_bytes = round_up(E, 16) * 8;
    const int64_t own = x_bytes + panel_bytes + wide_bytes + tail_bytes + room_bytes;
    const int64_t blocks = ceil_div(E, 16), padded = blocks * 16;
    const int64_t logit_rows = split_rows ? T : CHUNK * threads;
    char* memory = static_cast<char*>(scratch(0, own * threads));
    float* scale = static_cast<float*>(scratch(1, (H + E) * sizeof(float)));
    float* logits = static_cast<float*>(scratch(2, logit_rows * padded * sizeof(float)));
    widen<X>(g_.scale, H, scale);
    widen<X>(g_.per_expert_scale, E, scale + H);
    scale_ = scale;
    padded_ = padded;
    row_ = row;

#pragma omp parallel num_threads(threads)
    {
      const int id = omp_get_thread_num(), team = omp_get_num_threads();
      char* m = memory + own * id;
      Workspace ws;
      ws.x = reinterpret_cast<Activation*>(m);
      ws.panel = reinterpret_cast<float*>(m += x_bytes);
      ws.wide = reinterpret_cast<float*>(m += panel_bytes);
      ws.tail = reinterpret_cast<X*>(m += wide_bytes);
      ws.room = reinterpret_cast<float*>(m + tail_bytes);
      if (split_rows) {
        for (int64_t t = 0; t < T; ++t) normalise(t, ws.x + t * row);
        for (int64_t t = 0; t < T; t += CHUNK)
          project(ws, ws.x + t * row, T - t < CHUNK ? T - t : CHUNK, blocks * id / team, blocks * (id + 1) / team,
                  logits + t * padded);
#pragma omp barrier
        for (int64_t t = T * id / team; t < T * (id + 1) / team; ++t) select(t, logits + t * padded, ws.room);
      } else {
        float* mine = logits + id * CHUNK * padded;
        const int64_t fair = round_up(ceil_div(T, team), W), size = fair < CHUNK ? fair : CHUNK;
#pragma omp for schedule(dynamic, 1)
        for (int64_t t0 = 0; t0 < T; t0 += size) {
          const int64_t t1 = t0 + size < T ? t0 + size : T;
          for (int64_t t = t0; t < t1; ++t) normalise(t, ws.x + (t - t0) * row);
          project(ws, ws.x, t1 - t0, 0, blocks, mine);
          for (int64_t t = t0; t < t1; ++t) select(t, mine + (t - t0) * padded, ws.room);
        }
      }
    }
    trim_scratch();
  }

 private:
  struct Workspace {
    Activation* x;
    float *panel, *wide;
    X* tail;
    float* room;
    Block block;
  };

  static INLINE VF rounded(VF x) {
    if constexpr (HF) return rounded_through(x, static_cast<X*>(nullptr));
    return x;
  }

  void normalise(int64_t t, Activation* out) const {
    const X* x = static_cast<const X*>(g_.hidden) + t * g_.hidden_stride;
    const int64_t H = g_.H;
    // The tail is handled as a whole vector padded with zeros.
    X last_x[W] = {};
    float last_scale[W] = {};
    const int64_t whole = H / W * W;
    std::memcpy(last_x, x + whole, (H - whole) * sizeof(X));
    std::memcpy(last_scale, scale_ + whole, (H - whole) * sizeof(float));
    VF squares[4] = {};
    int64_t k = 0;
    for (; k + 4 * W <= H; k += 4 * W)
      for (int i = 0; i < 4; ++i) {
        const VF v = load_as_float(x + k + i * W);
        squares[i] += v * v;
      }
    for (; k < whole; k += W) {
      const VF v = load_as_float(x + k);
      squares[0] += v * v;
    }
    const VF v = load_as_float(last_x);
    squares[1] += v * v;
    const float mean = vsum((squares[0] + squares[1]) + (squares[2] + squares[3])) / float(H);
    const float reciprocal = 1.0f / std::sqrt(mean + g_.eps);
    auto one = [&](const X* from, const float* scale) {
      return rounded(rounded(rounded(load_as_float(from) * reciprocal) * vload(scale)) * g_.root);
    };
    for (k = 0; k < whole; k += W) store_rounded(out + k, one(x + k, scale_ + k));
    if (whole < H) {
      Activation part[W];
      store_rounded(part, one(last_x, last_scale));
      std::memcpy(out + whole, part, (H - whole) * sizeof(Activation));
    }
  }

  // logits[n, e] for the experts of blocks [first, last), 16 experts each.
  void project(Workspace& ws, const Activation* x, int64_t n, int64_t first, int64_t last, float* logits) const {
    if (n == 0) return;
    Tokens<M> tokens;
    tokens.split = Split(int(n));
    tokens.count = g_.H;
    const Activation* row[MAX_TOKENS];
    for (int64_t i = 0; i < n; ++i) row[i] = x + i * row_;
    const int in_lanes = int(n) - tokens.split.single;
    float* panel = ws.panel;
    for (int i = 0, from = 0; i < tokens.split.chunks(); ++i) {
      const int vectors = tokens.split.vectors(i);
      pack_panel<M>(row + from, in_lanes - from < vectors * W ? in_lanes - from : vectors * W, vectors, g_.H, panel);
      tokens.panel[i] = panel;
      panel += ceil_div(g_.H, M::PER_UNIT) * vectors * W;
      from += vectors * W;
    }
    for (int i = 0; i < tokens.split.single; ++i) tokens.row[i] = row[in_lanes + i];
    // Few tokens wait for memory: small blocks, so that each fetches the next one's rows.
    const int64_t step = n < W ? 1 : ROWS / 16;
    for (int64_t b = first; b < last; b += step) {
      const int64_t e0 = b * 16, rows = (last - b < step ? last - b : step) * 16, live = g_.E - e0;
      const int half = int(rows / 2);
      const X* w = static_cast<const X*>(g_.proj) + e0 * g_.proj_stride;
      int64_t stride = g_.proj_stride;
      const X* next = live >= 2 * rows && b + step < last ? w + rows * stride : nullptr;
      if (live < rows) {
        w = pad_rows(w, stride, live, rows, g_.H, ws.tail);
        stride = g_.H;
      }
      multiply_block<M>(tokens, w, w + half * stride, stride, half, next, next ? next + half * stride : nullptr, ws.wide,
                        ws.block);
      for (int run = 0; run < 2; ++run) {
        const float *c = ws.block.c + run * HALF * MAX_TOKENS, *d = ws.block.d + run * HALF;
        float* to = logits + e0 + run * half;
        for (int r = 0; r < half; r += 8)
          for (int i = 0; i < in_lanes; i += W) transpose_rows(c + r * MAX_TOKENS + i, to + i * padded_ + r, in_lanes - i);
        for (int i = 0; i < tokens.split.single; ++i)
          std::memcpy(to + (in_lanes + i) * padded_, d + i * ROWS, half * sizeof(float));
      }
    }
  }

  // Eight rows of W tokens into eight columns of up to `live` tokens.
  void transpose_rows(const float* c, float* to, int live) const {
    VF t[W];
    for (int i = 0; i < W; ++i) t[i] = i < 8 ? vload(c + i * MAX_TOKENS) : VF{};
    transpose(t);
    for (int i = 0; i < W && i < live; ++i) std::memcpy(to + i * padded_, &t[i], 8 * sizeof(float));
  }

  void select(int64_t t, float* logits, float* room) const {
    for (int64_t e = 0; e < padded_; e += W) vstore(logits + e, rounded(vload(logits + e)));
    select_token(g_, t, logits, scale_ + g_.H, room);
  }

  const RouteArgs& g_;
  const float* scale_ = nullptr;  // [H] then per-expert [E], widened
  int64_t padded_ = 0, row_ = 0;
};

inline void route(const RouteArgs& args) {
  auto with = [&](auto x) {
    using X = decltype(x);
    if (args.round_like_hf) Route<X, true>(args).run();
    else Route<X, false>(args).run();
  };
  switch (args.dtype) {
    case Dtype::f32: return with(float{});
    case Dtype::bf16: return with(bf16{});
    case Dtype::f16: return with(f16{});
  }
}

}  // namespace
}  // namespace omnigene

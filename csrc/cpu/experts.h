// The gated experts: sort the picks by expert, up-projection with the activation in its epilogue, down-projection,
// combine. One parallel region for the whole block; tasks come from an atomic counter, because routing is skewed and
// cores are shared. Every sum has a fixed order, so the result has the same bits on every run and thread count.
//
//   pick   p = t * K + k, one (token, expert) pair
//   order  [picks] p sorted by expert, stable
//   pass   up to max_pass() picks of one expert, multiplied with the expert's weights together
//   h      activations of a pass, already in the layout in which the down-projection reads them
//   y      [T * K, columns] float, the down-projection's rows of one slab of columns, by pick
#pragma once
#include <omp.h>

#include "api.h"
#include "tiles.h"

namespace omnigene {
namespace {

struct Pass {
  int64_t expert, first, h;  // first: position in `order`; h: offset in bytes
  int n;
};

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <class M>
constexpr int max_pass() {  // what keeps the packed tokens of a pass in the second-level cache
  return M::PAIRS || W == 8 ? MAX_TOKENS : MAX_TOKENS / 2;
}

constexpr int64_t UP_BLOCKS = 2;    // blocks of HALF gate and HALF up rows in a task
constexpr int64_t DOWN_BLOCKS = 4;  // blocks of ROWS rows in a task

// The single tokens and panels of a pass inside h.
template <class M>
struct HiddenLayout {
  int64_t units, row;  // units of a panel; elements from one single token's row to the next
  explicit HiddenLayout(int64_t I) : units(ceil_div(I, M::PER_UNIT)), row(round_up(I, 32)) {}
  int64_t panel_bytes(int vectors) const { return units * vectors * W * 4; }
  int64_t bytes(const Split& s) const {
    return round_up(panel_bytes(s.lanes) + s.single * row * int64_t(sizeof(typename M::Activation)), 64);
  }
  Tokens<M> tokens(const Split& s, char* h, int64_t I) const {
    Tokens<M> x;
    x.split = s;
    x.count = I;
    for (int i = 0; i < s.chunks(); ++i) {
      x.panel[i] = reinterpret_cast<const float*>(h);
      h += panel_bytes(s.vectors(i));
    }
    for (int n = 0; n < s.single; ++n)
      x.row[n] = reinterpret_cast<const typename M::Activation*>(h) + n * row;
    return x;
  }
};

// act(gate) * up for up to HALF rows beginning at i0, written into h.
template <class M, int A>
inline void store_gated(const Tokens<M>& h, const Block& block, int64_t i0, int64_t I, int64_t units) {
  const Split& s = h.split;
  for (int chunk = 0, first = 0; chunk < s.chunks(); ++chunk) {
    const int vectors = s.vectors(chunk);
    float* panel = const_cast<float*>(h.panel[chunk]);
    for (int v = 0; v < vectors; ++v) {
      const float* gate = block.c + first + v * W;
      const float* up = gate + HALF * MAX_TOKENS;
      auto value = [&](int j) INLINE_LAMBDA {
        return activate<A>(vload(gate + j * MAX_TOKENS)) * vload(up + j * MAX_TOKENS);
      };
      if constexpr (M::PAIRS) {
        for (int j = 0; j < HALF && (i0 + j) / 2 < units; j += 2) {
          const VU pair = bf16_bits(value(j)) | (bf16_bits(value(j + 1)) << 16);
          vstore(panel + ((i0 + j) / 2 * vectors + v) * W, (VF)pair);
        }
      } else {
        for (int j = 0; j < HALF && i0 + j < units; ++j) vstore(panel + ((i0 + j) * vectors + v) * W, value(j));
      }
    }
    first += vectors * W;
  }
  const int64_t live = I - i0 < HALF ? I - i0 : HALF;
  for (int n = 0; n < s.single; ++n) {
    typename M::Activation y[HALF];
    const float* gate = block.d + n * ROWS;
    for (int j = 0; j < live; j += W)
      store_rounded(y + j, activate<A>(vload(gate + j)) * vload(gate + HALF + j));
    std::memcpy(const_cast<typename M::Activation*>(h.row[n]) + i0, y, live * sizeof(y[0]));
  }
}

// The columns of a block, two runs of `half`, into the rows of y that belong to the pass's picks.
template <class M>
inline void store_down(const Split& s, const Block& block, int half, const int64_t* picks, int n, float* y,
                       int64_t columns) {
  const int in_lanes = n - s.single;
  for (int run = 0; run < 2; ++run, y += half) {
    const float *c = block.c + run * HALF * MAX_TOKENS, *d = block.d + run * HALF;
    for (int first = 0; first < in_lanes; first += W) {
      for (int r = 0; r < half; r += W) {
        VF t[W];
        for (int i = 0; i < W; ++i) t[i] = vload(c + (r + i) * MAX_TOKENS + first);
        transpose(t);
        for (int i = 0; i < W && first + i < in_lanes; ++i) vstore(y + picks[first + i] * columns + r, t[i]);
      }
    }
    for (int i = 0; i < s.single; ++i)
      std::memcpy(y + picks[in_lanes + i] * columns, d + i * ROWS, half * sizeof(float));
  }
}

// Rows past the end of a weight: copied beside zeros, so that every tile is whole.
template <class Weight>
inline const Weight* pad_rows(const Weight* w, int64_t stride, int64_t live, int64_t rows, int64_t count, Weight* room) {
  std::memset(static_cast<void*>(room), 0, rows * count * sizeof(Weight));
  for (int64_t r = 0; r < live; ++r) std::memcpy(room + r * count, w + r * stride, count * sizeof(Weight));
  return room;
}

template <class M, class X>
class ExpertMlp {
  using Weight = typename M::Weight;
  using Activation = typename M::Activation;

 public:
  explicit ExpertMlp(const ExpertArgs& args) : g_(args), layout_(args.I) {}

  void run() {
    sort_picks();
    const int64_t TK = g_.T * g_.K;
    // A slab of columns keeps y near the cores: about 4 MB, at least one task wide.
    const int64_t blocks = ceil_div(g_.H, ROWS);
    int64_t slab_blocks = (int64_t(4) << 20) / (TK * ROWS * 4);
    slab_blocks = slab_blocks < 1 ? 1 : slab_blocks > blocks ? blocks : slab_blocks;
    const int64_t slabs = ceil_div(blocks, slab_blocks);
    slab_blocks = ceil_div(blocks, slabs);
    const int64_t columns = slab_blocks * ROWS;
    const int64_t y_bytes = round_up(TK * columns * 4, 64);
    h_ = static_cast<char*>(scratch(1, h_bytes_));
    float* y[2];  // slabs alternate, so that combining one needs no second barrier before the next is written
    y[0] = static_cast<float*>(scratch(2, 2 * y_bytes));
    y[1] = y[0] + y_bytes / 4;
    const double flops = 6.0 * double(TK) * double(g_.H) * double(g_.I);
    const int threads = flops < 4e6 ? 1 : g_.threads;
    const int64_t own = workspace_bytes();
    char* workspaces = static_cast<char*>(scratch(3, own * threads));
    const int64_t up_tasks = passes_ * ceil_div(ceil_div(g_.I, HALF), UP_BLOCKS);
    int64_t* counter = static_cast<int64_t*>(scratch(4, (1 + slabs) * 64));
    for (int64_t i = 0; i <= slabs; ++i) counter[i * 8] = 0;

#pragma omp parallel num_threads(threads)
    {
      const int id = omp_get_thread_num(), team = omp_get_num_threads();
      Workspace ws(*this, workspaces + own * id);
      for_each_task(counter, up_tasks, [&](int64_t task, int64_t next) { up(ws, task, next < up_tasks ? next : -1); });
#pragma omp barrier
      for (int64_t s = 0; s < slabs; ++s) {
        const int64_t first = s * slab_blocks, last = first + slab_blocks < blocks ? first + slab_blocks : blocks;
        const int64_t per_pass = ceil_div(last - first, DOWN_BLOCKS), tasks = passes_ * per_pass;
        for_each_task(counter + (1 + s) * 8, tasks, [&](int64_t task, int64_t next) {
          const int64_t after = next < tasks ? next : -1;
          down(ws, first, last, per_pass, task, after, y[s % 2], columns);
        });
#pragma omp barrier
        combine(g_.T * id / team, g_.T * (id + 1) / team, first * ROWS, last * ROWS < g_.H ? last * ROWS : g_.H,
                y[s % 2], columns);
      }
    }
    trim_scratch();
  }

 private:
  struct Workspace {
    float* panel;
    float* rows;  // single tokens widened to float
    float* wide;
    Weight* tail;
    Block block;
    int64_t loaded = -1;  // the pass whose tokens stand in `tokens`
    Tokens<M> tokens;
    Workspace(const ExpertMlp& e, char* memory) {
      panel = reinterpret_cast<float*>(memory);
      rows = reinterpret_cast<float*>(memory += e.panel_bytes());
      wide = reinterpret_cast<float*>(memory += e.rows_bytes());
      tail = reinterpret_cast<Weight*>(memory += e.wide_bytes());
    }
  };

  int64_t longest() const { return g_.H > g_.I ? g_.H : g_.I; }
  int64_t panel_bytes() const { return round_up(ceil_div(g_.H, M::PER_UNIT) * max_pass<M>() * 4, 64); }
  int64_t rows_bytes() const { return std::is_same_v<X, Activation> ? 0 : round_up(DOT_MAX * g_.H * 4, 64); }
  int64_t wide_bytes() const { return M::CONVERT ? round_up(ROWS * longest() * 4, 64) : 0; }
  int64_t workspace_bytes() const {
    return panel_bytes() + rows_bytes() + wide_bytes() + round_up(ROWS * longest() * int64_t(sizeof(Weight)), 64);
  }

  template <class F>
  static void for_each_task(int64_t* counter, int64_t tasks, F&& body) {
    int64_t task = __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
    while (task < tasks) {  // the next task is claimed early: its first rows are fetched while this one computes
      const int64_t next = __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
      body(task, next);
      task = next;
    }
  }

  void sort_picks() {
    const int64_t TK = g_.T * g_.K, E = g_.E;
    int64_t* start = static_cast<int64_t*>(scratch(0, (TK + E + 1) * sizeof(int64_t)));
    int64_t* order = start + E + 1;
    for (int64_t e = 0; e <= E; ++e) start[e] = 0;
    for (int64_t p = 0; p < TK; ++p)
      if (g_.index[p] < E) ++start[g_.index[p] + 1];
    int64_t count = 0;
    for (int64_t e = 0; e < E; ++e) {
      count += ceil_div(start[e + 1], max_pass<M>());
      start[e + 1] += start[e];
    }
    passes_ = 0;
    pass_ = static_cast<Pass*>(scratch(5, (count + 1) * sizeof(Pass)));
    int64_t offset = 0;
    for (int64_t e = 0; e < E; ++e) {
      const int64_t n = start[e + 1] - start[e], parts = ceil_div(n, max_pass<M>());
      for (int64_t i = 0, first = 0; i < parts; ++i) {
        // even parts, in whole vectors where there are several
        int64_t last = parts == 1 ? n : round_up(n * (i + 1) / parts, W);
        if (last > n) last = n;
        pass_[passes_++] = {e, start[e] + first, offset, int(last - first)};
        offset += layout_.bytes(Split(int(last - first)));
        first = last;
      }
    }
    h_bytes_ = offset;
    for (int64_t p = 0; p < TK; ++p)
      if (g_.index[p] < E) order[start[g_.index[p]]++] = p;
    order_ = order;
  }

  void load_tokens(Workspace& ws, int64_t index) const {
    if (ws.loaded == index) return;
    ws.loaded = index;
    const Pass& pass = pass_[index];
    Tokens<M>& x = ws.tokens;
    x.split = Split(pass.n);
    x.count = g_.H;
    const X* row[MAX_TOKENS];
    for (int i = 0; i < pass.n; ++i)
      row[i] = static_cast<const X*>(g_.hidden) + order_[pass.first + i] / g_.K * g_.hidden_stride;
    float* panel = ws.panel;
    const int in_lanes = pass.n - x.split.single;
    for (int i = 0, first = 0; i < x.split.chunks(); ++i) {
      const int vectors = x.split.vectors(i);
      const int live = in_lanes - first < vectors * W ? in_lanes - first : vectors * W;
      pack_panel<M>(row + first, live, vectors, g_.H, panel);
      x.panel[i] = panel;
      panel += ceil_div(g_.H, M::PER_UNIT) * vectors * W;
      first += vectors * W;
    }
    for (int n = 0; n < x.split.single; ++n) {
      if constexpr (std::is_same_v<X, Activation>) {
        x.row[n] = row[in_lanes + n];
      } else {
        float* to = ws.rows + n * g_.H;
        for (int64_t k = 0; k < g_.H; ++k) to[k] = to_float(row[in_lanes + n][k]);
        x.row[n] = to;
      }
    }
  }

  const Weight* gate_rows(int64_t expert) const {
    return static_cast<const Weight*>(g_.gate_up) + expert * g_.gate_up_expert_stride;
  }
  const Weight* down_rows(int64_t expert) const {
    return static_cast<const Weight*>(g_.down) + expert * g_.down_expert_stride;
  }

  void up(Workspace& ws, int64_t task, int64_t next) const {
    const int64_t blocks = ceil_div(g_.I, HALF), per_pass = ceil_div(blocks, UP_BLOCKS), I = g_.I;
    const int64_t which = task / per_pass, first = task % per_pass * UP_BLOCKS;
    const int64_t last = first + UP_BLOCKS < blocks ? first + UP_BLOCKS : blocks;
    load_tokens(ws, which);
    const Pass& pass = pass_[which];
    const Tokens<M> h = layout_.tokens(ws.tokens.split, h_ + pass.h, I);
    const Weight* gate = gate_rows(pass.expert);
    const int64_t stride = g_.gate_up_row_stride;
    for (int64_t b = first; b < last; ++b) {
      const int64_t i0 = b * HALF;
      const Weight *a = gate + i0 * stride, *u = a + I * stride, *next_a = nullptr, *next_u = nullptr;
      if (b + 1 < last) next_a = a + HALF * stride;
      else if (next >= 0) next_a = gate_rows(pass_[next / per_pass].expert) + next % per_pass * UP_BLOCKS * HALF * stride;
      if (next_a) next_u = next_a + I * stride;
      if (I - i0 < HALF) {
        const int half = int(round_up(I - i0, 8));
        a = pad_rows(a, stride, I - i0, half, g_.H, ws.tail);
        u = pad_rows(u, stride, I - i0, half, g_.H, ws.tail + HALF * g_.H);
        multiply_block<M>(ws.tokens, a, u, g_.H, half, nullptr, nullptr, ws.wide, ws.block);
      } else {
        multiply_block<M>(ws.tokens, a, u, stride, HALF, next_a, next_u, ws.wide, ws.block);
      }
      switch (g_.activation) {
        case omnigene::Activation::gelu_tanh: store_gated<M, 0>(h, ws.block, i0, I, layout_.units); break;
        case omnigene::Activation::gelu: store_gated<M, 1>(h, ws.block, i0, I, layout_.units); break;
        case omnigene::Activation::silu: store_gated<M, 2>(h, ws.block, i0, I, layout_.units); break;
      }
    }
  }

  void down(Workspace& ws, int64_t slab_first, int64_t slab_last, int64_t per_pass, int64_t task, int64_t next,
            float* y, int64_t columns) const {
    const int64_t which = task / per_pass, first = slab_first + task % per_pass * DOWN_BLOCKS, H = g_.H;
    const int64_t last = first + DOWN_BLOCKS < slab_last ? first + DOWN_BLOCKS : slab_last;
    const Pass& pass = pass_[which];
    const Split split(pass.n);
    const Tokens<M> h = layout_.tokens(split, h_ + pass.h, g_.I);
    const Weight* weights = down_rows(pass.expert);
    const int64_t stride = g_.down_row_stride;
    for (int64_t b = first; b < last; ++b) {
      const int64_t n0 = b * ROWS;
      const Weight *a = weights + n0 * stride, *next_a = nullptr;
      if (b + 1 < last) next_a = a + ROWS * stride;
      else if (next >= 0)
        next_a = down_rows(pass_[next / per_pass].expert) + (slab_first + next % per_pass * DOWN_BLOCKS) * ROWS * stride;
      int half = HALF;
      if (H - n0 < ROWS) {
        half = int(round_up(ceil_div(H - n0, 2), 16));
        a = pad_rows(a, stride, H - n0, 2 * half, g_.I, ws.tail);
        multiply_block<M>(h, a, a + half * g_.I, g_.I, half, nullptr, nullptr, ws.wide, ws.block);
      } else {
        multiply_block<M>(h, a, a + HALF * stride, stride, HALF, next_a, next_a ? next_a + HALF * stride : nullptr,
                          ws.wide, ws.block);
      }
      store_down<M>(split, ws.block, half, order_ + pass.first, pass.n, y + (n0 - slab_first * ROWS), columns);
    }
  }

  // out[t, first:last] = sum over k, in order, of weight * y; one rounding.
  void combine(int64_t t0, int64_t t1, int64_t first, int64_t last, const float* y, int64_t columns) const {
    for (int64_t t = t0; t < t1; ++t) {
      X* out = static_cast<X*>(g_.out) + t * g_.H;
      const int64_t* id = g_.index + t * g_.K;
      const float* weight = g_.weights + t * g_.K;
      for (int64_t j = 0; j < last - first; j += W) {
        VF sum = {};
        for (int64_t k = 0; k < g_.K; ++k)
          if (id[k] < g_.E) sum += weight[k] * vload(y + (t * g_.K + k) * columns + j);
        if (first + j + W <= g_.H) {
          store_rounded(out + first + j, sum);
        } else {
          X part[W];
          store_rounded(part, sum);
          std::memcpy(out + first + j, part, (g_.H - first - j) * sizeof(X));
        }
      }
    }
  }

  const ExpertArgs& g_;
  HiddenLayout<M> layout_;
  Pass* pass_ = nullptr;
  int64_t passes_ = 0, h_bytes_ = 0;
  const int64_t* order_ = nullptr;
  char* h_ = nullptr;
};

inline void expert_mlp(const ExpertArgs& args) {
  switch (args.dtype) {
    case Dtype::f32: return ExpertMlp<Mode<float, false>, float>(args).run();
    case Dtype::bf16: return ExpertMlp<Mode<bf16, OMNIGENE_BF16>, bf16>(args).run();
    case Dtype::f16: return ExpertMlp<Mode<f16, false>, f16>(args).run();
  }
}

}  // namespace
}  // namespace omnigene

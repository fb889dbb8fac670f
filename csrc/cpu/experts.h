// The gated experts: sort the picks by expert, up-projection with the activation in its epilogue, down-projection,
// combine. One parallel region for the whole block; tasks come from an atomic counter, because routing is skewed and
// cores are shared. Every sum has a fixed order, so the result has the same bits on every run and thread count.
//
//   h      activations of a pass, already in the layout in which the down-projection reads them
//   y      [T * K, columns] float, the down-projection's rows of one slab of columns, by pick
//   u      x rhs^T of a low-rank update, [picks of a pass, r], in the layout in which the up-projection reads tokens
#pragma once
#include "picks.h"

namespace omnigene {
namespace {

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

// value(lanes) for up to HALF rows beginning at i0 of I, written into h; value(p, step) reads the vector of row j at
// p + j * step.
template <class M, class Value>
inline void store_units(const Tokens<M>& h, const Block& block, int64_t i0, int64_t I, int64_t units, Value value) {
  const Split& s = h.split;
  for (int chunk = 0, first = 0; chunk < s.chunks(); ++chunk) {
    const int vectors = s.vectors(chunk);
    float* panel = const_cast<float*>(h.panel[chunk]);
    for (int v = 0; v < vectors; ++v) {
      const float* c = block.c + first + v * W;
      if constexpr (M::PAIRS) {
        for (int j = 0; j < HALF && (i0 + j) / 2 < units; j += 2) {
          const VU pair = bf16_bits(value(c + j * MAX_TOKENS, HALF * MAX_TOKENS)) |
                          (bf16_bits(value(c + (j + 1) * MAX_TOKENS, HALF * MAX_TOKENS)) << 16);
          vstore(panel + ((i0 + j) / 2 * vectors + v) * W, (VF)pair);
        }
      } else {
        for (int j = 0; j < HALF && i0 + j < units; ++j)
          vstore(panel + ((i0 + j) * vectors + v) * W, value(c + j * MAX_TOKENS, HALF * MAX_TOKENS));
      }
    }
    first += vectors * W;
  }
  const int64_t live = smaller(I - i0, HALF);
  for (int n = 0; n < s.single; ++n) {
    typename M::Activation y[HALF];
    for (int j = 0; j < live; j += W) store_rounded(y + j, value(block.d + n * ROWS + j, HALF));
    std::memcpy(const_cast<typename M::Activation*>(h.row[n]) + i0, y, live * sizeof(y[0]));
  }
}

// The two runs of a block, `live` columns of each, into the rows of a and b that belong to the pass's picks.
template <class D>
inline void store_rows(const Split& s, const Block& block, int live, const int64_t* picks, int n, D* a, D* b,
                       int64_t stride) {
  const int in_lanes = n - s.single;
  for (int run = 0; run < 2; ++run) {
    const float *c = block.c + run * HALF * MAX_TOKENS, *d = block.d + run * HALF;
    D* to = run ? b : a;
    for (int first = 0; first < in_lanes; first += W) {
      for (int r = 0; r < live; r += W) {
        VF t[W];
        for (int i = 0; i < W; ++i) t[i] = vload(c + (r + i) * MAX_TOKENS + first);
        transpose(t);
        for (int i = 0; i < W && first + i < in_lanes; ++i) store_live(to + picks[first + i] * stride + r, t[i], live - r);
      }
    }
    for (int i = 0; i < s.single; ++i)
      for (int r = 0; r < live; r += W) store_live(to + picks[in_lanes + i] * stride + r, vload(d + i * ROWS + r), live - r);
  }
}

template <class M, class X>
class ExpertMlp {
  using Weight = typename M::Weight;
  using Activation = typename M::Activation;

 public:
  explicit ExpertMlp(const ExpertArgs& args)
      : g_(args), gate_up_(gate_up_of(args)), down_(down_of(args)), layout_(args.I),
        up_layout_(args.gate_up_lora.rank), down_layout_(args.down_lora.rank) {}

  // With out == nullptr only the pre-activation is computed.
  void run() {
    const int64_t TK = g_.T * g_.K;
    picks_ = sort_picks(g_.index, TK, g_.E, max_pass<M>());
    place_passes();
    // A slab of columns keeps y near the cores: about 4 MB, at least one task wide.
    const int64_t blocks = ceil_div(g_.H, ROWS);
    int64_t slab_blocks = (int64_t(4) << 20) / (TK * ROWS * 4);
    slab_blocks = slab_blocks < 1 ? 1 : smaller(slab_blocks, blocks);
    const int64_t slabs = g_.out ? ceil_div(blocks, slab_blocks) : 0;
    slab_blocks = slabs ? ceil_div(blocks, slabs) : 0;
    const int64_t columns = slab_blocks * ROWS;
    const int64_t y_bytes = round_up(TK * columns * 4, 64);
    float* y[2];  // slabs alternate, so that combining one needs no second barrier before the next is written
    y[0] = static_cast<float*>(scratch(2, 2 * y_bytes));
    y[1] = y[0] + y_bytes / 4;
    const double flops = 6.0 * double(TK) * double(g_.H) * double(g_.I);
    const int threads = flops < 4e6 ? 1 : g_.threads;
    const int64_t own = workspace_bytes();
    char* workspaces = static_cast<char*>(scratch(3, own * threads));
    const int64_t passes = picks_.passes, up_tasks = passes * ceil_div(ceil_div(g_.I, HALF), UP_BLOCKS);
    int64_t* counter = static_cast<int64_t*>(scratch(4, (3 + slabs) * 64));
    for (int64_t i = 0; i < 3 + slabs; ++i) counter[i * 8] = 0;

#pragma omp parallel num_threads(threads)
    {
      const int id = omp_get_thread_num(), team = omp_get_num_threads();
      Workspace ws(*this, workspaces + own * id);
      if (g_.gate_up_lora.rank) {
        for_each_task(counter + 8, passes, [&](int64_t pass, int64_t) {
          load_tokens(ws, pass);
          low_rank(ws, ws.tokens, pass, g_.gate_up_lora, up_layout_, u_ + place_[pass].u);
        });
#pragma omp barrier
      }
      for_each_task(counter, up_tasks, [&](int64_t task, int64_t next) { up(ws, task, next); });
#pragma omp barrier
      if (g_.down_lora.rank && g_.out) {
        for_each_task(counter + 16, passes, [&](int64_t pass, int64_t) {
          const Tokens<M> h = layout_.tokens(Split(picks_.pass[pass].n), h_ + place_[pass].h, g_.I);
          low_rank(ws, h, pass, g_.down_lora, down_layout_, v_ + place_[pass].v);
        });
#pragma omp barrier
      }
      for (int64_t s = 0; s < slabs; ++s) {
        const int64_t first = s * slab_blocks, last = smaller(first + slab_blocks, blocks);
        const int64_t per_pass = ceil_div(last - first, DOWN_BLOCKS), tasks = passes * per_pass;
        for_each_task(counter + (3 + s) * 8, tasks, [&](int64_t task, int64_t next) {
          down(ws, first, last, per_pass, task, next, y[s % 2], columns);
        });
#pragma omp barrier
        combine(g_.T * id / team, g_.T * (id + 1) / team, first * ROWS, smaller(last * ROWS, g_.H), y[s % 2], columns);
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
  struct Place {  // of a pass in h, u and v, in bytes
    int64_t h, u, v;
  };

  int64_t longest() const {
    return larger(larger(g_.H, g_.I), larger(g_.gate_up_lora.rank, g_.down_lora.rank));
  }
  int64_t panel_bytes() const { return round_up(ceil_div(g_.H, M::PER_UNIT) * max_pass<M>() * 4, 64); }
  int64_t rows_bytes() const { return std::is_same_v<X, Activation> ? 0 : round_up(DOT_MAX * g_.H * 4, 64); }
  int64_t wide_bytes() const {
    return M::CONVERT || g_.stored != Stored::like_hidden ? round_up(ROWS * longest() * int64_t(sizeof(Activation)), 64) : 0;
  }
  int64_t workspace_bytes() const {
    return panel_bytes() + rows_bytes() + wide_bytes() + round_up(ROWS * longest() * int64_t(sizeof(Weight)), 64);
  }

  void place_passes() {
    Place at = {0, 0, 0};
    place_ = static_cast<Place*>(scratch(6, (picks_.passes + 1) * sizeof(Place)));
    for (int64_t i = 0; i < picks_.passes; ++i) {
      place_[i] = at;
      const Split split(picks_.pass[i].n);
      at.h += layout_.bytes(split);
      at.u += up_layout_.bytes(split);
      at.v += down_layout_.bytes(split);
    }
    h_ = static_cast<char*>(scratch(1, at.h + at.u + at.v));
    u_ = h_ + at.h;
    v_ = u_ + at.u;
  }

  void load_tokens(Workspace& ws, int64_t index) const {
    if (ws.loaded == index) return;
    ws.loaded = index;
    const Pass& pass = picks_.pass[index];
    Tokens<M>& x = ws.tokens;
    x.split = Split(pass.n);
    x.count = g_.H;
    const X* row[MAX_TOKENS];
    for (int i = 0; i < pass.n; ++i)
      row[i] = static_cast<const X*>(g_.hidden) + picks_.order[pass.first + i] / g_.K * g_.hidden_stride;
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

  // x times two runs of `live` rows of a weight, added to the block or in place of it.
  template <class S>
  void multiply_runs(Workspace& ws, const Tokens<M>& x, const S* a, const S* b, int64_t stride, int64_t live_a,
                     int64_t live_b, int half, const void* next_a, const void* next_b, bool add) const {
    if (live_a < half || live_b < half) {
      S* tail = reinterpret_cast<S*>(ws.tail);
      a = pad_rows(a, stride, live_a, half, x.count, tail);
      b = pad_rows(b, stride, live_b, half, x.count, tail + half * x.count);
      stride = x.count;
      next_a = next_b = nullptr;
    }
    multiply_block<M>(x, a, b, stride, half, next_a, next_b, ws.wide, ws.block, add);
  }

  // The same for rows ra and rb, and on, of an expert's projection, and their scales.
  void multiply_projection(Workspace& ws, const Tokens<M>& x, const Projection& p, int64_t expert, int64_t ra, int64_t rb,
                           int64_t live_a, int64_t live_b, int half, const char* next_a, const char* next_b) const {
    const char *a = p.at(expert, ra), *b = p.at(expert, rb);
    with_stored<Weight>(p.stored, [&](auto* type) {
      using S = const std::remove_pointer_t<decltype(type)>*;
      multiply_runs(ws, x, reinterpret_cast<S>(a), reinterpret_cast<S>(b), p.row / p.element, live_a, live_b, half, next_a,
                    next_b, false);
    });
    if (p.scale)
      scale_block(ws.block, x.split, p.unit(), p.scale_of(expert, ra), live_a, p.scale_of(expert, rb), live_b);
  }

  // x rhs^T of a pass, where x are its tokens or its h.
  void low_rank(Workspace& ws, const Tokens<M>& x, int64_t pass, const LoraArgs& lora, const HiddenLayout<M>& layout,
                char* to) const {
    const int64_t rank = lora.rank;
    const Tokens<M> u = layout.tokens(x.split, to, rank);
    const Weight* rhs = static_cast<const Weight*>(lora.rhs) + picks_.pass[pass].expert * rank * x.count;
    for (int64_t r0 = 0; r0 < rank; r0 += HALF) {
      const int64_t live = smaller(rank - r0, HALF);
      // One run of rows; the other is zeros, which nobody reads.
      const int half = int(round_up(live, 8));
      multiply_runs(ws, x, rhs + r0 * x.count, rhs, x.count, live, 0, half, nullptr, nullptr, false);
      store_units<M>(u, ws.block, r0, rank, layout.units, [](const float* p, int) INLINE_LAMBDA { return vload(p); });
    }
  }

  void up(Workspace& ws, int64_t task, int64_t next) const {
    const int64_t blocks = ceil_div(g_.I, HALF), per_pass = ceil_div(blocks, UP_BLOCKS), I = g_.I;
    const int64_t which = task / per_pass, first = task % per_pass * UP_BLOCKS;
    const int64_t last = smaller(first + UP_BLOCKS, blocks);
    load_tokens(ws, which);
    const Pass& pass = picks_.pass[which];
    const Tokens<M> h = layout_.tokens(ws.tokens.split, h_ + place_[which].h, I);
    const int64_t rank = g_.gate_up_lora.rank;
    for (int64_t b = first; b < last; ++b) {
      const int64_t i0 = b * HALF, live = smaller(I - i0, HALF);
      const int half = live < HALF ? int(round_up(live, 8)) : HALF;
      const char* next_a = nullptr;
      if (b + 1 < last) next_a = gate_up_.at(pass.expert, i0 + HALF);
      else if (next >= 0)
        next_a = gate_up_.at(picks_.pass[next / per_pass].expert, next % per_pass * UP_BLOCKS * HALF);
      multiply_projection(ws, ws.tokens, gate_up_, pass.expert, i0, I + i0, live, live, half, next_a,
                          next_a ? next_a + I * gate_up_.row : nullptr);
      if (rank) {
        const Weight* lhs = static_cast<const Weight*>(g_.gate_up_lora.lhs) + (pass.expert * 2 * I + i0) * rank;
        const Tokens<M> u = up_layout_.tokens(ws.tokens.split, u_ + place_[which].u, rank);
        multiply_runs(ws, u, lhs, lhs + I * rank, rank, live, live, half, nullptr, nullptr, true);
      }
      if (g_.preactivation) {
        X* to = static_cast<X*>(g_.preactivation) + i0;
        store_rows(ws.tokens.split, ws.block, int(live), picks_.order + pass.first, pass.n, to, to + I, 2 * I);
        if (!g_.out) continue;
      }
      auto gated = [&](auto activation) INLINE_LAMBDA {
        store_units<M>(h, ws.block, i0, I, layout_.units, [](const float* p, int up) INLINE_LAMBDA {
          return activate<decltype(activation)::value>(vload(p)) * vload(p + up);
        });
      };
      switch (g_.activation) {
        case omnigene::Activation::gelu_tanh: gated(std::integral_constant<int, 0>{}); break;
        case omnigene::Activation::gelu: gated(std::integral_constant<int, 1>{}); break;
        case omnigene::Activation::silu: gated(std::integral_constant<int, 2>{}); break;
      }
    }
  }

  void down(Workspace& ws, int64_t slab_first, int64_t slab_last, int64_t per_pass, int64_t task, int64_t next,
            float* y, int64_t columns) const {
    const int64_t which = task / per_pass, first = slab_first + task % per_pass * DOWN_BLOCKS, H = g_.H;
    const int64_t last = smaller(first + DOWN_BLOCKS, slab_last);
    const Pass& pass = picks_.pass[which];
    const Split split(pass.n);
    const Tokens<M> h = layout_.tokens(split, h_ + place_[which].h, g_.I);
    const int64_t rank = g_.down_lora.rank;
    for (int64_t b = first; b < last; ++b) {
      const int64_t n0 = b * ROWS, live = smaller(H - n0, ROWS);
      const char* next_a = nullptr;
      if (b + 1 < last) next_a = down_.at(pass.expert, n0 + ROWS);
      else if (next >= 0)
        next_a = down_.at(picks_.pass[next / per_pass].expert, (slab_first + next % per_pass * DOWN_BLOCKS) * ROWS);
      const int half = live < ROWS ? int(round_up(ceil_div(live, 2), 16)) : HALF;
      const int64_t live_a = smaller(live, half);
      multiply_projection(ws, h, down_, pass.expert, n0, n0 + half, live_a, live - live_a, half, next_a,
                          next_a ? next_a + HALF * down_.row : nullptr);
      if (rank) {
        const Weight* lhs = static_cast<const Weight*>(g_.down_lora.lhs) + (pass.expert * H + n0) * rank;
        const Tokens<M> v = down_layout_.tokens(split, v_ + place_[which].v, rank);
        multiply_runs(ws, v, lhs, lhs + half * rank, rank, live_a, live - live_a, half, nullptr, nullptr, true);
      }
      float* to = y + (n0 - slab_first * ROWS);
      store_rows(split, ws.block, half, picks_.order + pass.first, pass.n, to, to + half, columns);
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
        store_live(out + first + j, sum, g_.H - first - j);
      }
    }
  }

  const ExpertArgs& g_;
  const Projection gate_up_, down_;
  HiddenLayout<M> layout_, up_layout_, down_layout_;
  Picks picks_;
  Place* place_ = nullptr;
  char *h_ = nullptr, *u_ = nullptr, *v_ = nullptr;
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

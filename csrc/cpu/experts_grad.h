// Gradients of the gated experts, after the formulas of reference.expert_mlp_bwd. One parallel region; phases are divided
// by barriers, tasks inside a phase come from an atomic counter, and every sum has a fixed order.
//
//   g       gradient of the output, by token
//   d_pre   [T * K, 2I] gradient of the pre-activation (gate, up), by pick, rounded as the products read it
//   wh      [T * K, I]  weight * h
//   y       [T * K, columns] float, gradient of the pick's hidden state, one slab of columns
//   and with low-rank updates, [T * K, r] each: g_lhs = g lhs_down, d_lhs = d_pre lhs_gate_up, x_rhs = x rhs_gate_up^T,
//   h_rhs = wh rhs_down^T
#pragma once
#include "grad_tiles.h"
#include "picks.h"

namespace omnigene {
namespace {

constexpr int64_t Y_BYTES = 32 << 20;
constexpr int64_t UP_COLUMNS = 512;  // of the up-projection's gradient product in one go: 1 KB of each row

template <class M, class X>
class ExpertGrad {
  using Weight = typename M::Weight;
  using Activation = typename M::Activation;

 public:
  explicit ExpertGrad(const ExpertGradArgs& args)
      : g_(args), f_(args.forward), gate_up_(gate_up_of(args.forward)), down_(down_of(args.forward)) {}

  void run() {
    const int64_t TK = f_.T * f_.K, H = f_.H, I = f_.I;
    picks_ = sort_picks(f_.index, TK, f_.E, max_pass<M>());
    const bool up_grads = g_.d_gate_up || g_.d_gate_up_lhs || g_.d_gate_up_rhs;
    const bool down_grads = g_.d_down || g_.d_down_lhs || g_.d_down_rhs;
    up_rank_ = f_.gate_up_lora.rank;
    down_rank_ = f_.down_lora.rank;
    want_pre_ = g_.d_hidden || up_grads;
    slabs_ = ceil_div(I, 384);
    slab_ = round_up(ceil_div(I, slabs_), STRIP);
    const bool want_d_lhs = up_rank_ && want_pre_ && (g_.d_hidden || g_.d_gate_up_rhs);

    Arena arena;
    arena.take(d_pre_, want_pre_ ? TK * 2 * I : 0);
    arena.take(wh_, down_grads ? TK * I : 0);
    arena.take(partial_, g_.d_weights ? TK * slabs_ : 0);
    arena.take(g_lhs_, TK * down_rank_);
    arena.take(d_lhs_, want_d_lhs ? TK * up_rank_ : 0);
    arena.take(x_rhs_, g_.d_gate_up_lhs ? TK * up_rank_ : 0);
    arena.take(h_rhs_, g_.d_down_lhs ? TK * down_rank_ : 0);
    arena.place(static_cast<char*>(scratch(1, arena.bytes)));

    // d_hidden: slabs only bound y, which is written once. Long pieces of the weights' rows matter more.
    int64_t columns = Y_BYTES / (TK * 4) / STRIP * STRIP;
    columns = larger(columns, 4 * STRIP);
    const int64_t slabs = g_.d_hidden ? ceil_div(H, columns) : 0;
    if (slabs) columns = round_up(ceil_div(H, slabs), STRIP);
    const int64_t y_size = round_up(TK * columns, 16);
    float* y = slabs ? static_cast<float*>(scratch(2, smaller(slabs, 2) * y_size * 4)) : nullptr;  // in turn, as in the forward

    list_outer_jobs();
    const double flops = 6.0 * double(TK) * double(H) * double(I);
    const int threads = flops < 4e6 ? 1 : f_.threads;
    const int64_t own = workspace_bytes();
    char* workspaces = static_cast<char*>(scratch(3, own * threads));
    int64_t* counter = static_cast<int64_t*>(scratch(4, (4 + slabs) * 64));
    for (int64_t i = 0; i < 4 + slabs; ++i) counter[i * 8] = 0;
    const int64_t passes = picks_.passes;

#pragma omp parallel num_threads(threads)
    {
      const int id = omp_get_thread_num(), team = omp_get_num_threads();
      Workspace ws(*this, workspaces + own * id);
      if (down_rank_) {
        for_each_task(counter, passes, [&](int64_t pass, int64_t) {
          load_grad_out(ws, pass);
          times_lhs(ws, pass, f_.down_lora, H, g_lhs_);
        });
#pragma omp barrier
      }
      for_each_task(counter + 8, passes * slabs_, [&](int64_t task, int64_t next) { down(ws, task, next); });
#pragma omp barrier
      if (g_.d_weights) sum_weights(f_.T * id / team, f_.T * (id + 1) / team);
      if (want_d_lhs || x_rhs_ || h_rhs_) {
        for_each_task(counter + 16, passes, [&](int64_t pass, int64_t) {
          if (want_d_lhs) {
            load_d_pre(ws, pass);
            times_lhs(ws, pass, f_.gate_up_lora, 2 * I, d_lhs_);
          }
          if (x_rhs_) times_rhs(ws, pass, Source{f_.hidden, f_.hidden_stride, H, true}, f_.gate_up_lora, x_rhs_);
          if (h_rhs_) times_rhs(ws, pass, Source{wh_, I, I, false}, f_.down_lora, h_rhs_);
        });
#pragma omp barrier
      }
      for (int64_t s = 0; s < slabs; ++s) {
        const int64_t first = s * columns, live = smaller(H - first, columns);
        float* to = y + s % 2 * y_size;
        for_each_task(counter + (4 + s) * 8, passes, [&](int64_t pass, int64_t next) {
          up(ws, pass, next, first, live, to, columns);
        });
#pragma omp barrier
        combine(f_.T * id / team, f_.T * (id + 1) / team, first, live, to, columns);
      }
      for_each_task(counter + 24, outer_tasks_, [&](int64_t task, int64_t) { outer_task(ws, task); });
#if !defined(OMNIGENE_NO_X86)
      _mm_sfence();  // results that went past the caches
#endif
    }
    trim_scratch();
  }

 private:
  // Rows of a [*, width] tensor: by token in X, or by pick in Activation.
  struct Source {
    const void* base;
    int64_t stride, width;
    bool by_token;
  };
  struct OuterJob {  // out [E, a.width, b.width] = A^T B over an expert's picks
    Source a, b;
    void* out;
    int64_t blocks;  // of rows
  };

  struct Arena {
    struct Piece {
      void** to;
      int64_t at;
    };
    Piece pieces[8];
    int count = 0;
    int64_t bytes = 0;
    template <class T>
    void take(T*& to, int64_t elements) {
      to = nullptr;
      if (!elements) return;
      pieces[count++] = {reinterpret_cast<void**>(&to), bytes};
      bytes += round_up(elements * int64_t(sizeof(T)), 64) + 64;  // a last vector may be read past the end
    }
    void place(char* memory) {
      for (int i = 0; i < count; ++i) *pieces[i].to = memory + pieces[i].at;
    }
  };

  struct Workspace {
    float *panel, *sums, *rows;
    Weight* rhs;  // of a low-rank update, padded to whole tiles
    StripRoom<Weight>* room;
    const void** row;     // [most] rows of A or tokens of a pass
    const void** other;   // [most] rows of B
    float **out;
    int64_t loaded = -1;  // what stands in `panel`: 2 * pass for g, 2 * pass + 1 for d_pre
    Panel x;
    Workspace(const ExpertGrad& e, char* memory) {
      auto take = [&](auto*& to, int64_t bytes) {
        to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(memory);
        memory += round_up(bytes, 64);
      };
      take(panel, e.panel_bytes());
      take(sums, e.sums_bytes());
      take(rows, e.rows_bytes());
      take(rhs, e.rhs_bytes());
      take(room, sizeof(StripRoom<Weight>));
      take(row, e.list_bytes());
      take(other, e.list_bytes());
      take(out, max_pass<M>() * 8);
    }
  };

  int64_t longest_rank() const { return larger(up_rank_, down_rank_); }
  int64_t units(int64_t elements) const { return ceil_div(elements, M::PER_UNIT); }
  int64_t outer_stride() const { return round_up(token_units<M>(picks_.most), W); }
  int64_t outer_columns(int64_t n) const {  // of B that are packed at once
    return larger((int64_t(256) << 10) / (token_units<M>(n) * 4) / STRIP * STRIP, OUTER_V * W);
  }
  int64_t panel_bytes() const {
    const int64_t longest = larger(larger(f_.H, 2 * f_.I), longest_rank());
    return larger(units(longest) * max_pass<M>() * 4, outer_tasks_ ? outer_rows_ * outer_stride() * 4 : 0);
  }
  int64_t sums_bytes() const {
    const int64_t width = larger(slab_, round_up(longest_rank(), larger(STRIP, ROWS)));
    const int64_t b = outer_tasks_ ? larger(token_units<M>(picks_.most) * OUTER_V * W * 4, int64_t(256) << 10) : 0;
    return larger(max_pass<M>() * width * 4, b);
  }
  int64_t rows_bytes() const { return std::is_same_v<X, Activation> || !x_rhs_ ? 0 : max_pass<M>() * f_.H * 4; }
  int64_t rhs_bytes() const {
    return larger(x_rhs_ ? f_.H : 0, h_rhs_ ? f_.I : 0) * round_up(longest_rank(), 8) * int64_t(sizeof(Weight));
  }
  int64_t list_bytes() const { return larger(picks_.most, max_pass<M>()) * 8; }
  int64_t workspace_bytes() const {
    return round_up(panel_bytes(), 64) + round_up(sums_bytes(), 64) + round_up(rows_bytes(), 64) +
           round_up(rhs_bytes(), 64) + int64_t(sizeof(StripRoom<Weight>)) + 2 * round_up(list_bytes(), 64) + round_up(max_pass<M>() * 8, 64);
  }

  const int64_t* picks_of(const Pass& pass) const { return picks_.order + pass.first; }

  // The panel times columns of an expert's projection, into ws.out; the same columns of another follow, or null.
  void times_projection(Workspace& ws, const Projection& p, int64_t expert, int64_t first, int64_t live, const char* ahead,
                        int64_t at) const {
    const char* w = p.at(expert, 0, first);
    with_stored<Weight>(p.stored, [&](auto* type) {
      using S = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
      const Slab<S> slab = {reinterpret_cast<const S*>(w), p.row / p.element, p.rows, live, ahead, p.scale_of(expert, 0)};
      times_rows<M>(ws.x, slab, ws.out, at, false, *ws.room);
    });
  }

  template <class S>
  void gather(const Source& from, const int64_t* picks, int64_t n, const void** row) const {
    for (int64_t i = 0; i < n; ++i)
      row[i] = static_cast<const S*>(from.base) + (from.by_token ? picks[i] / f_.K : picks[i]) * from.stride;
  }

  template <class S>
  void load(Workspace& ws, const Pass& pass, const Source& from) const {
    const int vectors = int(ceil_div(pass.n, W));
    gather<S>(from, picks_of(pass), pass.n, ws.row);
    pack_panel<M>(reinterpret_cast<const S* const*>(ws.row), pass.n, vectors, from.width, ws.panel);
    ws.x = {ws.panel, vectors * W, pass.n};
  }
  void load_grad_out(Workspace& ws, int64_t pass) const {
    if (ws.loaded == 2 * pass) return;
    ws.loaded = 2 * pass;
    load<X>(ws, picks_.pass[pass], Source{g_.grad_out, g_.grad_out_stride, f_.H, true});
  }
  void load_d_pre(Workspace& ws, int64_t pass) const {
    if (ws.loaded == 2 * pass + 1) return;
    ws.loaded = 2 * pass + 1;
    load<Activation>(ws, picks_.pass[pass], Source{d_pre_, 2 * f_.I, 2 * f_.I, false});
  }

  // The panel times lhs [width, r], into the rows of `to` [*, r].
  void times_lhs(Workspace& ws, int64_t index, const LoraArgs& lora, int64_t width, Activation* to) const {
    const Pass& pass = picks_.pass[index];
    const int64_t rank = lora.rank, padded = round_up(rank, STRIP);
    const Weight* lhs = static_cast<const Weight*>(lora.lhs) + pass.expert * width * rank;
    for (int i = 0; i < pass.n; ++i) ws.out[i] = ws.sums + i * padded;
    times_rows<M>(ws.x, Slab<Weight>{lhs, rank, width, rank, nullptr}, ws.out, 0, false, *ws.room);
    for (int i = 0; i < pass.n; ++i)
      for (int64_t j = 0; j < rank; j += W)
        store_live(to + picks_of(pass)[i] * rank + j, vload(ws.out[i] + j), rank - j);
  }

  // Rows times rhs^T [r, width], into the rows of `to` [*, r]: dot tiles, as these rows are no panel.
  void times_rhs(Workspace& ws, int64_t index, const Source& from, const LoraArgs& lora, Activation* to) const {
    const Pass& pass = picks_.pass[index];
    const int64_t rank = lora.rank, padded = round_up(rank, 8), width = from.width;
    const Weight* rhs = static_cast<const Weight*>(lora.rhs) + pass.expert * rank * width;
    if (padded != rank) rhs = pad_rows(rhs, width, rank, padded, width, ws.rhs);
    if (!from.by_token || std::is_same_v<X, Activation>) {
      gather<Activation>(from, picks_of(pass), pass.n, ws.row);
    } else {
      gather<X>(from, picks_of(pass), pass.n, ws.row);
      for (int i = 0; i < pass.n; ++i) {
        Activation* wide = reinterpret_cast<Activation*>(ws.rows) + i * width;
        for (int64_t k = 0; k < width; ++k) wide[k] = round_to(to_float(static_cast<const X*>(ws.row[i])[k]), wide);
        ws.row[i] = wide;
      }
    }
    const Activation* const* row = reinterpret_cast<const Activation* const*>(ws.row);
    constexpr int GROUP = 3;
    for (int i = 0; i < pass.n; i += GROUP) {
      const int some = pass.n - i < GROUP ? pass.n - i : GROUP;
      for (int64_t r = 0; r < padded; r += 4) {
        const Weight* w = rhs + r * width;
        float c[GROUP * ROWS];
        switch (some) {
          case 1: dot_tile<M, 4, 1>(w, width, row + i, width, c, Prefetch{}, false); break;
          case 2: dot_tile<M, 4, 2>(w, width, row + i, width, c, Prefetch{}, false); break;
          case 3: dot_tile<M, 4, 3>(w, width, row + i, width, c, Prefetch{}, false); break;
        }
        for (int n = 0; n < some; ++n)
          for (int64_t j = r; j < smaller(r + 4, rank); ++j)
            to[picks_of(pass)[i + n] * rank + j] = round_to(c[n * ROWS + j - r], static_cast<Activation*>(nullptr));
      }
    }
  }

  // a = g W_down for one pass and a slab of its columns, then everything that follows from a.
  void down(Workspace& ws, int64_t task, int64_t next) const {
    const int64_t which = task / slabs_, first = task % slabs_ * slab_, live = smaller(f_.I - first, slab_);
    const Pass& pass = picks_.pass[which];
    load_grad_out(ws, which);
    for (int i = 0; i < pass.n; ++i) ws.out[i] = ws.sums + i * slab_;
    const char* ahead = next < 0 ? nullptr : down_.at(picks_.pass[next / slabs_].expert, 0, next % slabs_ * slab_);
    times_projection(ws, down_, pass.expert, first, live, ahead, 0);
    if (down_rank_) {
      ws.loaded = -1;
      load<Activation>(ws, pass, Source{g_lhs_, down_rank_, down_rank_, false});
      const Weight* rhs = static_cast<const Weight*>(f_.down_lora.rhs) + pass.expert * down_rank_ * f_.I + first;
      times_rows<M>(ws.x, Slab<Weight>{rhs, f_.I, down_rank_, live, nullptr}, ws.out, 0, true, *ws.room);
    }
    switch (f_.activation) {
      case omnigene::Activation::gelu_tanh: return through_activation<0>(ws, pass, first, live);
      case omnigene::Activation::gelu: return through_activation<1>(ws, pass, first, live);
      case omnigene::Activation::silu: return through_activation<2>(ws, pass, first, live);
    }
  }

  template <int A>
  void through_activation(Workspace& ws, const Pass& pass, int64_t first, int64_t live) const {
    const int64_t I = f_.I;
    for (int i = 0; i < pass.n; ++i) {
      const int64_t pick = picks_of(pass)[i];
      const X* pre = static_cast<const X*>(g_.preactivation) + pick * 2 * I + first;
      const float weight = f_.weights[pick];
      VF inner = {};
      for (int64_t j = 0; j < live; j += W) {
        VF gate, up;
        if (j + W <= live) {
          gate = load_as_float(pre + j);
          up = load_as_float(pre + I + j);
        } else {
          X part[2][W] = {};
          std::memcpy(static_cast<void*>(part[0]), pre + j, (live - j) * sizeof(X));
          std::memcpy(static_cast<void*>(part[1]), pre + I + j, (live - j) * sizeof(X));
          gate = load_as_float(part[0]);
          up = load_as_float(part[1]);
        }
        const VF a = vload(ws.out[i] + j);  // zeros past the last column
        VF act, slope;
        activate_with_slope<A>(gate, act, slope);
        const VF h = act * up, weighted = weight * a;
        inner += a * h;
        if (want_pre_) {
          store_live(d_pre_ + pick * 2 * I + first + j, weighted * up * slope, live - j);
          store_live(d_pre_ + pick * 2 * I + I + first + j, weighted * act, live - j);
        }
        if (wh_) store_live(wh_ + pick * I + first + j, weight * h, live - j);
      }
      if (partial_) partial_[pick * slabs_ + first / slab_] = vsum(inner);
    }
  }

  void sum_weights(int64_t t0, int64_t t1) const {
    for (int64_t p = t0 * f_.K; p < t1 * f_.K; ++p) {
      float sum = 0.0f;
      if (f_.index[p] < f_.E)
        for (int64_t s = 0; s < slabs_; ++s) sum += partial_[p * slabs_ + s];
      g_.d_weights[p] = sum;
    }
  }

  // y = d_pre W_gate_up for one pass, columns [first, first + live).
  void up(Workspace& ws, int64_t which, int64_t next, int64_t first, int64_t live, float* y, int64_t columns) const {
    const Pass& pass = picks_.pass[which];
    load_d_pre(ws, which);
    for (int i = 0; i < pass.n; ++i) ws.out[i] = y + picks_of(pass)[i] * columns;
    const int64_t step = pass.n <= FEW ? live : UP_COLUMNS;  // few tokens wait for memory, which likes whole rows
    for (int64_t c = 0; c < live; c += step) {
      const int64_t some = smaller(live - c, step);
      const char* ahead = nullptr;
      if (c + step < live) ahead = gate_up_.at(pass.expert, 0, first + c + step);
      else if (next >= 0) ahead = gate_up_.at(picks_.pass[next].expert, 0, first);
      times_projection(ws, gate_up_, pass.expert, first + c, some, ahead, c);
    }
    if (up_rank_) {
      ws.loaded = -1;
      load<Activation>(ws, pass, Source{d_lhs_, up_rank_, up_rank_, false});
      const Weight* rhs = static_cast<const Weight*>(f_.gate_up_lora.rhs) + pass.expert * up_rank_ * f_.H + first;
      times_rows<M>(ws.x, Slab<Weight>{rhs, f_.H, up_rank_, live, nullptr}, ws.out, 0, true, *ws.room);
    }
  }

  // d_hidden[t, first : first + live] = sum over k, in order; one rounding.
  void combine(int64_t t0, int64_t t1, int64_t first, int64_t live, const float* y, int64_t columns) const {
    for (int64_t t = t0; t < t1; ++t) {
      X* out = static_cast<X*>(g_.d_hidden) + t * f_.H + first;
      for (int64_t j = 0; j < live; j += W) {
        VF sum = {};
        for (int64_t p = t * f_.K; p < (t + 1) * f_.K; ++p)
          if (f_.index[p] < f_.E) sum += vload(y + p * columns + j);
        store_live(out + j, sum, live - j);
      }
    }
  }

  void list_outer_jobs() {
    const int64_t H = f_.H, I = f_.I;
    const Source x = {f_.hidden, f_.hidden_stride, H, true}, g = {g_.grad_out, g_.grad_out_stride, H, true};
    const Source d_pre = {d_pre_, 2 * I, 2 * I, false}, wh = {wh_, I, I, false};
    auto add = [&](void* out, const Source& a, const Source& b) {
      if (out) jobs_[job_count_++] = {a, b, out, 0};
    };
    add(g_.d_gate_up, d_pre, x);
    add(g_.d_down, g, wh);
    add(g_.d_gate_up_lhs, d_pre, {x_rhs_, up_rank_, up_rank_, false});
    add(g_.d_gate_up_rhs, {d_lhs_, up_rank_, up_rank_, false}, x);
    add(g_.d_down_lhs, g, {h_rhs_, down_rank_, down_rank_, false});
    add(g_.d_down_rhs, {g_lhs_, down_rank_, down_rank_, false}, wh);
    const int64_t units = token_units<M>(picks_.most);
    outer_rows_ = units <= 64 ? 384 : units <= 256 ? 192 : 96;  // multiples of a tile's rows and of a packing step
    for (int j = 0; j < job_count_; ++j) {
      jobs_[j].blocks = ceil_div(jobs_[j].a.width, outer_rows_);
      outer_tasks_ += jobs_[j].blocks * f_.E;
    }
  }

  // A block of rows of one expert's gradient.
  void outer_task(Workspace& ws, int64_t task) const {
    const OuterJob* job = jobs_;
    while (task >= job->blocks * f_.E) task -= job++->blocks * f_.E;
    const int64_t expert = task / job->blocks, first = task % job->blocks * outer_rows_;
    const int64_t rows = smaller(job->a.width - first, outer_rows_), width = job->b.width;
    const int64_t *picks = picks_.order + picks_.start[expert], n = picks_.start[expert + 1] - picks_.start[expert];
    Weight* out = static_cast<Weight*>(job->out) + (expert * job->a.width + first) * width;
    if (n == 0) {
      std::memset(static_cast<void*>(out), 0, rows * width * sizeof(Weight));
      return;
    }
    const int64_t units = token_units<M>(n), stride = round_up(units, W);
    with_rows(job->a, picks, n, ws.row, [&](auto* row) { pack_transposed<M>(row, n, first, rows, stride, ws.panel); });
    const int64_t some = outer_columns(n);
    for (int64_t c = 0; c < width; c += some) {
      const int64_t live = smaller(width - c, some), padded = round_up(live, STRIP);
      with_rows(job->b, picks, n, ws.other, [&](auto* row) { pack_columns<M>(row, n, c, live, padded, ws.sums); });
      outer<M>(ws.panel, stride, rows, ws.sums, padded, live, units, out + c, width);
    }
  }

  template <class F>
  void with_rows(const Source& from, const int64_t* picks, int64_t n, const void** row, F&& body) const {
    if (from.by_token) {
      gather<X>(from, picks, n, row);
      body(reinterpret_cast<const X* const*>(row));
    } else {
      gather<Activation>(from, picks, n, row);
      body(reinterpret_cast<const Activation* const*>(row));
    }
  }

  const ExpertGradArgs& g_;
  const ExpertArgs& f_;
  const Projection gate_up_, down_;
  Picks picks_;
  int64_t up_rank_ = 0, down_rank_ = 0, slabs_ = 0, slab_ = 0;
  bool want_pre_ = false;
  Activation *d_pre_ = nullptr, *wh_ = nullptr, *g_lhs_ = nullptr, *d_lhs_ = nullptr, *x_rhs_ = nullptr,
             *h_rhs_ = nullptr;
  float* partial_ = nullptr;
  OuterJob jobs_[6];
  int job_count_ = 0;
  int64_t outer_rows_ = 0, outer_tasks_ = 0;
};

inline void expert_mlp_grad(const ExpertGradArgs& args) {
  switch (args.forward.dtype) {
    case Dtype::f32: return ExpertGrad<Mode<float, false>, float>(args).run();
    case Dtype::bf16: return ExpertGrad<Mode<bf16, OMNIGENE_BF16>, bf16>(args).run();
    case Dtype::f16: return ExpertGrad<Mode<f16, false>, f16>(args).run();
  }
}

}  // namespace
}  // namespace omnigene

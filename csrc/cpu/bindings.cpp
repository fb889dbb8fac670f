// pybind11 over raw pointers: no torch headers, so the module builds in seconds and does not break when torch moves.
// Arguments arrive checked by omnigene_fast.backends.cpu; only the expert ids, whose values Python has not read, are
// checked here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>

#include "api.h"

namespace py = pybind11;
using namespace omnigene;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void check_ids(const int64_t* ids, int64_t count, int64_t E, bool expert_parallel) {
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || (ids[i] >= E && !expert_parallel))
      throw py::index_error("index: expected expert ids in [0, " + std::to_string(E) + "), got " +
                            std::to_string(ids[i]) +
                            "; pass expert_parallel=True if ids >= E are sentinels of other ranks.");
}

// (hidden, row stride), (gate_up, expert stride, row stride), (down, ...), index, weights, (lhs, rhs, rank) twice, scales
using Rows = std::tuple<uintptr_t, int64_t>;
using Projection = std::tuple<uintptr_t, int64_t, int64_t>;
using Lora = std::tuple<uintptr_t, uintptr_t, int64_t>;
using Scales = std::tuple<int, uintptr_t, uintptr_t>;  // how the projections are stored, the scales of gate_up and down

ExpertArgs expert_args(Rows hidden, Projection gate_up, Projection down, uintptr_t index, uintptr_t weights,
                       Lora gate_up_lora, Lora down_lora, Scales scales,
                       std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> sizes, int dtype, int activation,
                       int threads) {
  auto lora = [](Lora from) {
    return LoraArgs{at<const void>(std::get<0>(from)), at<const void>(std::get<1>(from)), std::get<2>(from)};
  };
  ExpertArgs args = {};
  args.hidden = at<const void>(std::get<0>(hidden));
  args.hidden_stride = std::get<1>(hidden);
  args.gate_up = at<const void>(std::get<0>(gate_up));
  std::tie(std::ignore, args.gate_up_expert_stride, args.gate_up_row_stride) = gate_up;
  args.down = at<const void>(std::get<0>(down));
  std::tie(std::ignore, args.down_expert_stride, args.down_row_stride) = down;
  args.index = at<const int64_t>(index);
  args.weights = at<const float>(weights);
  args.gate_up_lora = lora(gate_up_lora);
  args.down_lora = lora(down_lora);
  args.stored = Stored(std::get<0>(scales));
  args.gate_up_scale = at<const float>(std::get<1>(scales));
  args.down_scale = at<const float>(std::get<2>(scales));
  std::tie(args.T, args.K, args.E, args.H, args.I) = sizes;
  args.dtype = Dtype(dtype);
  args.activation = Activation(activation);
  args.threads = threads;
  return args;
}

void expert_mlp(ExpertArgs args, uintptr_t out, uintptr_t preactivation, bool expert_parallel) {
  check_ids(args.index, args.T * args.K, args.E, expert_parallel);
  args.out = at<void>(out);
  args.preactivation = at<void>(preactivation);
  py::gil_scoped_release release;
  kernels().expert_mlp(args);
}

// grads: hidden, gate_up, down, weights, then lhs and rhs of gate_up and of down; 0 where not wanted
void expert_mlp_grad(const ExpertArgs& args, Rows grad_out, uintptr_t preactivation, std::array<uintptr_t, 8> grads) {
  const ExpertGradArgs all = {args, at<const void>(std::get<0>(grad_out)), std::get<1>(grad_out),
                              at<const void>(preactivation), at<void>(grads[0]), at<void>(grads[1]),
                              at<void>(grads[2]), at<float>(grads[3]), at<void>(grads[4]), at<void>(grads[5]),
                              at<void>(grads[6]), at<void>(grads[7])};
  py::gil_scoped_release release;
  kernels().expert_mlp_grad(all);
}

void topk_gate_grad(uintptr_t grad_probabilities, uintptr_t grad_weights, uintptr_t probabilities, uintptr_t index,
                    uintptr_t per_expert_scale, uintptr_t d_logits, uintptr_t d_scale, int64_t T, int64_t K, int64_t E,
                    int threads) {
  const GateGradArgs args = {at<const float>(grad_probabilities), at<const float>(grad_weights),
                             at<const float>(probabilities), at<const int64_t>(index),
                             at<const float>(per_expert_scale), at<float>(d_logits), at<float>(d_scale), T, K, E,
                             threads};
  py::gil_scoped_release release;
  kernels().topk_gate_grad(args);
}

void norm_scale_grad(uintptr_t d_scaled, Rows hidden, uintptr_t scale, uintptr_t d_hidden, uintptr_t d_scale, int64_t T,
                     int64_t H, float eps, double root, int dtype, int threads) {
  const NormScaleGradArgs args = {at<const void>(d_scaled), at<const void>(std::get<0>(hidden)), std::get<1>(hidden),
                                  at<const void>(scale), at<void>(d_hidden), at<float>(d_scale), T, H, eps,
                                  float(root), Dtype(dtype), threads};
  py::gil_scoped_release release;
  kernels().norm_scale_grad(args);
}

// ids, bytes of an id, weights, statistics; all 0: no trace
using Trace = std::tuple<uintptr_t, int, uintptr_t, uintptr_t>;

TraceArgs trace_args(Trace from) {
  return {at<void>(std::get<0>(from)), std::get<1>(from), at<uint16_t>(std::get<2>(from)),
          at<uint16_t>(std::get<3>(from))};
}

void route(uintptr_t hidden, int64_t hidden_stride, uintptr_t proj, int64_t proj_stride, uintptr_t scale,
           uintptr_t per_expert_scale, uintptr_t probabilities, uintptr_t weights, uintptr_t index, int64_t T, int64_t K,
           int64_t E, int64_t H, float eps, double root, int dtype, bool round_like_hf, int threads, Trace trace) {
  const RouteArgs args = {at<const void>(hidden), hidden_stride, at<const void>(proj), proj_stride,
                          at<const void>(scale), at<const void>(per_expert_scale), at<float>(probabilities),
                          at<float>(weights), at<int64_t>(index), T, K, E, H, eps, float(root), Dtype(dtype),
                          round_like_hf, threads, trace_args(trace)};
  py::gil_scoped_release release;
  kernels().route(args);
}

void topk_gate(uintptr_t logits, int64_t logits_stride, uintptr_t per_expert_scale, uintptr_t probabilities,
               uintptr_t weights, uintptr_t index, int64_t T, int64_t K, int64_t E, int logits_dtype, int scale_dtype,
               int threads, Trace trace) {
  const GateArgs args = {at<const void>(logits), logits_stride, at<const void>(per_expert_scale),
                         at<float>(probabilities), at<float>(weights), at<int64_t>(index), T, K, E,
                         Dtype(logits_dtype), Dtype(scale_dtype), threads, trace_args(trace)};
  py::gil_scoped_release release;
  kernels().topk_gate(args);
}

// The picks of L layers of n tokens each: ids [L, n, K] contiguous, out [D, L, E] of D slots.
void count_layers(uintptr_t ids, int id_bytes, uintptr_t slot, int64_t L, int64_t n, int64_t K, int64_t E,
                  uintptr_t out) {
  int64_t wrong = -1;
  {
    py::gil_scoped_release release;
    for (int64_t l = 0; l < L && wrong < 0; ++l)
      wrong = count_picks(at<const char>(ids) + l * n * K * id_bytes, id_bytes, at<const int64_t>(slot), n, K, E,
                          at<int32_t>(out) + l * E, L * E);
  }
  if (wrong >= 0)
    throw py::value_error("ids: expected expert ids in [0, " + std::to_string(E) + "), got " + std::to_string(wrong) +
                          ".");
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of omnigene_fast; use them through omnigene_fast.ops.";
  m.def("isa", [] { return std::string(kernels().name); });
  py::class_<ExpertArgs>(m, "ExpertArgs", py::module_local()).def(py::init(&expert_args));
  m.def("advise_huge_pages", [](uintptr_t memory, size_t bytes) { advise_huge_pages(at<void>(memory), bytes); });
  m.def("expert_mlp", &expert_mlp);
  m.def("expert_mlp_grad", &expert_mlp_grad);
  m.def("topk_gate_grad", &topk_gate_grad);
  m.def("norm_scale_grad", &norm_scale_grad);
  m.def("route", &route);
  m.def("topk_gate", &topk_gate);
  m.def("count_layers", &count_layers);
  m.def("probe_bandwidth", [](uintptr_t buffer, size_t bytes, double seconds, int threads) {
    py::gil_scoped_release release;
    return probe_bandwidth(at<const void>(buffer), bytes, seconds, threads);
  });
  m.def("probe_peak", [](int dtype, double seconds, int threads) {
    py::gil_scoped_release release;
    return kernels().probe_peak(Dtype(dtype), seconds, threads);
  });
}

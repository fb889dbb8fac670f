// pybind11 over raw pointers: no torch headers, so the module builds in seconds and does not break when torch moves.
// Arguments arrive checked by omnigene_fast.backends.cpu; only the expert ids, whose values Python has not read, are
// checked here.
#include <pybind11/pybind11.h>

#include "api.h"

namespace py = pybind11;
using namespace omnigene;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void expert_mlp(uintptr_t hidden, int64_t hidden_stride, uintptr_t gate_up, int64_t gate_up_expert_stride,
                int64_t gate_up_row_stride, uintptr_t down, int64_t down_expert_stride, int64_t down_row_stride,
                uintptr_t index, uintptr_t weights, uintptr_t out, int64_t T, int64_t K, int64_t E, int64_t H, int64_t I,
                int dtype, int activation, bool expert_parallel, int threads) {
  const int64_t* ids = at<const int64_t>(index);
  for (int64_t i = 0; i < T * K; ++i)
    if (ids[i] < 0 || (ids[i] >= E && !expert_parallel))
      throw py::index_error("index: expected expert ids in [0, " + std::to_string(E) + "), got " +
                            std::to_string(ids[i]) +
                            "; pass expert_parallel=True if ids >= E are sentinels of other ranks.");
  const ExpertArgs args = {at<const void>(hidden), hidden_stride, at<const void>(gate_up), gate_up_expert_stride,
                           gate_up_row_stride, at<const void>(down), down_expert_stride, down_row_stride, ids,
                           at<const float>(weights), at<void>(out), T, K, E, H, I, Dtype(dtype), Activation(activation),
                           threads};
  py::gil_scoped_release release;
  kernels().expert_mlp(args);
}

void route(uintptr_t hidden, int64_t hidden_stride, uintptr_t proj, int64_t proj_stride, uintptr_t scale,
           uintptr_t per_expert_scale, uintptr_t probabilities, uintptr_t weights, uintptr_t index, int64_t T, int64_t K,
           int64_t E, int64_t H, float eps, double root, int dtype, bool round_like_hf, int threads) {
  const RouteArgs args = {at<const void>(hidden), hidden_stride, at<const void>(proj), proj_stride,
                          at<const void>(scale), at<const void>(per_expert_scale), at<float>(probabilities),
                          at<float>(weights), at<int64_t>(index), T, K, E, H, eps, float(root), Dtype(dtype),
                          round_like_hf, threads};
  py::gil_scoped_release release;
  kernels().route(args);
}

void topk_gate(uintptr_t logits, int64_t logits_stride, uintptr_t per_expert_scale, uintptr_t probabilities,
               uintptr_t weights, uintptr_t index, int64_t T, int64_t K, int64_t E, int logits_dtype, int scale_dtype,
               int threads) {
  const GateArgs args = {at<const void>(logits), logits_stride, at<const void>(per_expert_scale),
                         at<float>(probabilities), at<float>(weights), at<int64_t>(index), T, K, E,
                         Dtype(logits_dtype), Dtype(scale_dtype), threads};
  py::gil_scoped_release release;
  kernels().topk_gate(args);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of omnigene_fast; use them through omnigene_fast.ops.";
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("expert_mlp", &expert_mlp);
  m.def("route", &route);
  m.def("topk_gate", &topk_gate);
  m.def("probe_bandwidth", [](uintptr_t buffer, size_t bytes, double seconds, int threads) {
    py::gil_scoped_release release;
    return probe_bandwidth(at<const void>(buffer), bytes, seconds, threads);
  });
  m.def("probe_peak", [](int dtype, double seconds, int threads) {
    py::gil_scoped_release release;
    return kernels().probe_peak(Dtype(dtype), seconds, threads);
  });
}

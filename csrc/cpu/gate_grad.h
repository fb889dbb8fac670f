// Gradients of the router, after the formulas of reference.topk_gate_bwd and reference.route_bwd. Sums over tokens have a
// fixed order, whatever the number of threads.
#pragma once
#include <omp.h>

#include <cmath>

#include "gate.h"

namespace omnigene {
namespace {

inline void topk_gate_grad(const GateGradArgs& g) {
  const int threads = g.T * g.E < 16384 ? 1 : g.threads;
  const int64_t E = g.E, K = g.K;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < g.T; ++t) {
    const float* p = g.probabilities + t * E;
    float* d = g.d_logits + t * E;
    if (g.grad_probabilities) {
      const float* grad = g.grad_probabilities + t * E;
      double inner = 0.0;
      for (int64_t e = 0; e < E; ++e) inner += double(p[e]) * grad[e];
      for (int64_t e = 0; e < E; ++e) d[e] = p[e] * (grad[e] - float(inner));
    } else {
      std::memset(d, 0, E * sizeof(float));
    }
    if (!g.grad_weights) continue;
    const int64_t* id = g.index + t * K;
    const float* grad = g.grad_weights + t * K;
    double chosen = 0.0, inner = 0.0;
    for (int64_t k = 0; k < K; ++k) chosen += p[id[k]];
    for (int64_t k = 0; k < K; ++k) inner += double(p[id[k]]) / chosen * grad[k] * g.per_expert_scale[id[k]];
    for (int64_t k = 0; k < K; ++k)
      d[id[k]] += float(p[id[k]] / chosen * (double(grad[k]) * g.per_expert_scale[id[k]] - inner));
  }
  if (!g.d_scale) return;
  double* sum = static_cast<double*>(scratch(0, E * sizeof(double)));
  for (int64_t e = 0; e < E; ++e) sum[e] = 0.0;
  for (int64_t t = 0; t < g.T && g.grad_weights; ++t) {
    const int64_t* id = g.index + t * K;
    double chosen = 0.0;
    for (int64_t k = 0; k < K; ++k) chosen += g.probabilities[t * E + id[k]];
    for (int64_t k = 0; k < K; ++k)
      sum[id[k]] += g.probabilities[t * E + id[k]] / chosen * g.grad_weights[t * K + k];
  }
  for (int64_t e = 0; e < E; ++e) g.d_scale[e] = float(sum[e]);
}

template <class X>
inline void norm_scale_grad_of(const NormScaleGradArgs& g) {
  constexpr int64_t CHUNK = 64;  // tokens whose share of d_scale is summed before the chunks' sums are
  const int64_t H = g.H, padded = round_up(H, W), chunks = ceil_div(g.T, CHUNK);
  const int threads = g.T * H < 65536 ? 1 : g.threads;
  float* scale = static_cast<float*>(scratch(0, padded * sizeof(float)));
  float* rooms = static_cast<float*>(scratch(1, 2 * padded * threads * sizeof(float)));
  float* partial = g.d_scale ? static_cast<float*>(scratch(2, chunks * padded * sizeof(float))) : nullptr;
  for (int64_t h = H; h < padded; ++h) scale[h] = 0.0f;
  widen<X>(g.scale, H, scale);
#pragma omp parallel num_threads(threads)
  {
    float *normed = rooms + 2 * padded * omp_get_thread_num(), *grad = normed + padded;
    for (int64_t h = H; h < padded; ++h) normed[h] = grad[h] = 0.0f;
#pragma omp for schedule(static)
    for (int64_t c = 0; c < chunks; ++c) {
      float* mine = partial ? partial + c * padded : nullptr;
      if (mine) std::memset(mine, 0, padded * sizeof(float));
      for (int64_t t = c * CHUNK; t < smaller((c + 1) * CHUNK, g.T); ++t) {
        widen<X>(static_cast<const X*>(g.hidden) + t * g.hidden_stride, H, normed);
        widen<X>(static_cast<const X*>(g.d_scaled) + t * H, H, grad);
        VF squares[2] = {}, inner[2] = {};
        for (int64_t h = 0; h < padded; h += W) squares[h / W % 2] += vload(normed + h) * vload(normed + h);
        const float reciprocal = 1.0f / std::sqrt(vsum(squares[0] + squares[1]) / float(H) + g.eps);
        for (int64_t h = 0; h < padded; h += W) {
          const VF n = vload(normed + h) * reciprocal, d = vload(grad + h) * g.root;
          if (mine) vstore(mine + h, vload(mine + h) + n * d);
          const VF d_normed = d * vload(scale + h);
          inner[h / W % 2] += n * d_normed;
          vstore(normed + h, n);
          vstore(grad + h, d_normed);
        }
        if (!g.d_hidden) continue;
        const float mean = vsum(inner[0] + inner[1]) / float(H);
        X* out = static_cast<X*>(g.d_hidden) + t * H;
        for (int64_t h = 0; h < H; h += W) {
          store_live(out + h, reciprocal * (vload(grad + h) - vload(normed + h) * mean), H - h);
        }
      }
    }
  }
  for (int64_t h = 0; partial && h < H; ++h) {
    double sum = 0.0;
    for (int64_t c = 0; c < chunks; ++c) sum += partial[c * padded + h];
    g.d_scale[h] = float(sum);
  }
}

inline void norm_scale_grad(const NormScaleGradArgs& args) {
  switch (args.dtype) {
    case Dtype::f32: return norm_scale_grad_of<float>(args);
    case Dtype::bf16: return norm_scale_grad_of<bf16>(args);
    case Dtype::f16: return norm_scale_grad_of<f16>(args);
  }
}

}  // namespace
}  // namespace omnigene

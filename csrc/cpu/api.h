// What the bindings call: one table of functions per instruction set, filled in isa.h and chosen once in dispatch.cpp.
// Dimensions: T tokens, K experts per token, E experts, H hidden, I intermediate. Strides count elements.
#pragma once
#include <cstddef>
#include <cstdint>

namespace omnigene {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };
enum class Activation : int { gelu_tanh = 0, gelu = 1, silu = 2 };

struct ExpertArgs {
  const void* hidden;  // [T, H], row stride hidden_stride
  int64_t hidden_stride;
  const void* gate_up;  // [E, 2I, H], gate rows first
  int64_t gate_up_expert_stride, gate_up_row_stride;
  const void* down;  // [E, H, I]
  int64_t down_expert_stride, down_row_stride;
  const int64_t* index;  // [T, K] contiguous, checked; an id >= E contributes nothing
  const float* weights;  // [T, K] contiguous
  void* out;             // [T, H] contiguous
  int64_t T, K, E, H, I;
  Dtype dtype;  // of hidden, gate_up, down and out
  Activation activation;
  int threads;
};

struct RouteArgs {
  const void* hidden;  // [T, H], row stride hidden_stride
  int64_t hidden_stride;
  const void* proj;  // [E, H], row stride proj_stride
  int64_t proj_stride;
  const void* scale;             // [H]
  const void* per_expert_scale;  // [E]
  float* probabilities;          // [T, E]
  float* weights;                // [T, K]
  int64_t* index;                // [T, K]
  int64_t T, K, E, H;
  float eps;
  float root;  // H ** -0.5
  Dtype dtype;
  bool round_like_hf;
  int threads;
};

struct GateArgs {
  const void* logits;  // [T, E], row stride logits_stride
  int64_t logits_stride;
  const void* per_expert_scale;  // [E]
  float* probabilities;          // [T, E]
  float* weights;                // [T, K]
  int64_t* index;                // [T, K]
  int64_t T, K, E;
  Dtype logits_dtype, scale_dtype;
  int threads;
};

struct Kernels {
  const char* name;
  void (*expert_mlp)(const ExpertArgs&);
  void (*route)(const RouteArgs&);
  void (*topk_gate)(const GateArgs&);
  double (*probe_peak)(Dtype, double seconds, int threads);  // FLOP/s of this set's widest multiply-add
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();

// The table for this machine, or the one named by OMNIGENE_FAST_CPU_ISA.
const Kernels& kernels();

// Bytes/s of a read-only stream over a buffer, which should be far larger than the last-level cache; the best pass.
double probe_bandwidth(const void* buffer, size_t bytes, double seconds, int threads);

// Memory owned by the calling thread and kept from call to call, 64-byte aligned, contents undefined. It lives here
// and not in the per-instruction-set files, so that nothing compiled for AVX-512 is shared with the other sets.
// Throws std::bad_alloc.
void* scratch(int slot, size_t bytes);
// Gives back what the calling thread holds above a bound, so that one long prefill does not keep its memory for ever.
void trim_scratch();

}  // namespace omnigene

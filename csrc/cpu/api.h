// What the bindings call: one table of functions per instruction set, filled in isa.h and chosen once in dispatch.cpp.
// Dimensions: T tokens, K experts per token, E experts, H hidden, I intermediate. Strides count elements.
#pragma once
#include <cstddef>
#include <cstdint>

namespace omnigene {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };
enum class Stored : int { like_hidden = 0, i8 = 1, e4m3 = 2 };  // how projections stand in memory
enum class Activation : int { gelu_tanh = 0, gelu = 1, silu = 2 };

// A low-rank update W + lhs rhs of a projection [E, out, in]; rank 0: none.
struct LoraArgs {
  const void* lhs;  // [E, out, rank] contiguous
  const void* rhs;  // [E, rank, in] contiguous
  int64_t rank;
};

struct ExpertArgs {
  const void* hidden;  // [T, H], row stride hidden_stride
  int64_t hidden_stride;
  const void* gate_up;  // [E, 2I, H], gate rows first
  int64_t gate_up_expert_stride, gate_up_row_stride;
  const void* down;  // [E, H, I]
  int64_t down_expert_stride, down_row_stride;
  const int64_t* index;  // [T, K] contiguous, checked; an id >= E contributes nothing
  const float* weights;  // [T, K] contiguous
  Stored stored;                       // i8, e4m3: a weight is the stored number times the scale of its row
  const float *gate_up_scale, *down_scale;  // [E, 2I] and [E, H] contiguous, or null
  LoraArgs gate_up_lora, down_lora;
  void* out;            // [T, H] contiguous, or null: only the pre-activation is wanted
  void* preactivation;  // [T * K, 2I] by pick, or null
  int64_t T, K, E, H, I;
  Dtype dtype;  // of every tensor but index, weights and stored projections
  Activation activation;
  int threads;
};

// A null gradient is not wanted. Gradients of weights and factors are [E, out, in] contiguous, like those of hidden.
struct ExpertGradArgs {
  ExpertArgs forward;  // without out; its preactivation is not used
  const void* grad_out;  // [T, H], row stride grad_out_stride
  int64_t grad_out_stride;
  const void* preactivation;  // [T * K, 2I] by pick
  void *d_hidden, *d_gate_up, *d_down;  // the latter two null where projections are stored in 8 bits
  float* d_weights;  // [T, K]
  void *d_gate_up_lhs, *d_gate_up_rhs, *d_down_lhs, *d_down_rhs;
};

constexpr int64_t UNROUTED = -2;  // all ids that a trace gets of a token whose probabilities are NaN

// Where a gate writes its decisions, row t for token t. A null ids: nowhere.
struct TraceArgs {
  void* ids;          // [T_max, K] of id_bytes each
  int id_bytes;       // 1 or 2
  uint16_t* weights;  // [T_max, K] half precision, or null
  uint16_t* stats;    // [T_max, 3] half precision, or null: entropy of the softmax, sum of the chosen, p_K - p_(K+1)
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
  TraceArgs trace;
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
  TraceArgs trace;
};

struct GateGradArgs {
  const float* grad_probabilities;  // [T, E] contiguous or null
  const float* grad_weights;        // [T, K] contiguous or null
  const float* probabilities;       // [T, E] contiguous
  const int64_t* index;             // [T, K] contiguous
  const float* per_expert_scale;    // [E]
  float* d_logits;                  // [T, E]
  float* d_scale;                   // [E] or null
  int64_t T, K, E;
  int threads;
};

// Of x * rms^-1 * scale * root, rms over a row.
struct NormScaleGradArgs {
  const void* d_scaled;  // [T, H] contiguous
  const void* hidden;    // [T, H], row stride hidden_stride
  int64_t hidden_stride;
  const void* scale;  // [H]
  void* d_hidden;     // [T, H] contiguous or null
  float* d_scale;     // [H] or null
  int64_t T, H;
  float eps, root;
  Dtype dtype;  // of all but d_scale
  int threads;
};

struct Kernels {
  const char* name;
  void (*expert_mlp)(const ExpertArgs&);
  void (*expert_mlp_grad)(const ExpertGradArgs&);
  void (*topk_gate_grad)(const GateGradArgs&);
  void (*norm_scale_grad)(const NormScaleGradArgs&);
  void (*route)(const RouteArgs&);
  void (*topk_gate)(const GateArgs&);
  double (*probe_peak)(Dtype, double seconds, int threads);  // FLOP/s of this set's widest multiply-add
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();

// Adds to out[slot[t], id] for the picks ids[t, :] of n tokens, rows of out_stride; UNROUTED counts for no expert.
// Returns an id that is no expert, or -1.
int64_t count_picks(const void* ids, int id_bytes, const int64_t* slot, int64_t n, int64_t K, int64_t E, int32_t* out,
                    int64_t out_stride);

// The table for this machine, or the one named by OMNIGENE_FAST_CPU_ISA.
const Kernels& kernels();

// Bytes/s of a read-only stream over a buffer, which should be far larger than the last-level cache; the best pass.
double probe_bandwidth(const void* buffer, size_t bytes, double seconds, int threads);

// Memory owned by the calling thread and kept from call to call, 64-byte aligned, contents undefined. It lives here
// and not in the per-instruction-set files, so that nothing compiled for AVX-512 is shared with the other sets.
// Throws std::bad_alloc.
void* scratch(int slot, size_t bytes);
// Asks for huge pages under memory that is about to be filled; no more than a hint.
void advise_huge_pages(void* memory, size_t bytes);
// Gives back what the calling thread holds above a bound, so that one long prefill does not keep its memory for ever.
void trim_scratch();

}  // namespace omnigene

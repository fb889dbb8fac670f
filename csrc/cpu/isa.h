// Instantiates every kernel for one instruction set. Included once by each isa_*.cpp, which defines
//   OMNIGENE_TABLE    name of the function that returns the table
//   OMNIGENE_NAME     the set's name, as in OMNIGENE_FAST_CPU_ISA
//   OMNIGENE_WIDTH    floats in a vector (16 or 8)
//   OMNIGENE_BF16     1 if bf16 pairs are multiplied in hardware
//   OMNIGENE_DOT_MAX  tokens up to which dot tiles beat padded lanes
// Everything is in an anonymous namespace and no standard container is used: a template shared between these files would
// be merged by the linker, and code built for AVX-512 could then run on a machine without it.
#pragma once
#include "experts.h"
#include "experts_grad.h"
#include "gate.h"
#include "gate_grad.h"
#include "probe.h"

namespace omnigene {

const Kernels* OMNIGENE_TABLE() {
  static const Kernels table = {OMNIGENE_NAME, expert_mlp, expert_mlp_grad, topk_gate_grad, norm_scale_grad, route, topk_gate,
                                probe_peak};
  return &table;
}

}  // namespace omnigene

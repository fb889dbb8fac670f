// The multiply-add peak of this instruction set, measured with the tiles' own instruction on registers alone.
#pragma once
#include <omp.h>

#include "api.h"
#include "tiles.h"

namespace omnigene {
namespace {

template <bool PAIRS>
inline double peak(double seconds, int threads) {
  constexpr int CHAINS = W == 16 ? 24 : 12;
  constexpr int64_t STEPS = 20000;
  double total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
  {
    VF acc[CHAINS] = {};
    VF x = vset(1.5f), y = vset(0.5f);
    int64_t steps = 0;
#pragma omp barrier
    const double start = omp_get_wtime();
    double now = start;
    while (now - start < seconds) {
      for (int64_t i = 0; i < STEPS; ++i) {
#pragma GCC unroll 24
        for (int c = 0; c < CHAINS; ++c) acc[c] = multiply_add<PAIRS>(acc[c], x, y);
        __asm__ volatile("" : OMNIGENE_KEEP(x), OMNIGENE_KEEP(y));  // the loop must not be folded
      }
      steps += STEPS;
      now = omp_get_wtime();
    }
    VF sum = {};
    for (int c = 0; c < CHAINS; ++c) sum += acc[c];
    __asm__ volatile("" : OMNIGENE_KEEP(sum));
    total += double(steps) * CHAINS * W * 2 * (PAIRS ? 2 : 1) / (now - start);
  }
  return total;
}

inline double probe_peak(Dtype dtype, double seconds, int threads) {
  if (OMNIGENE_BF16 && dtype == Dtype::bf16) return peak<OMNIGENE_BF16>(seconds, threads);
  return peak<false>(seconds, threads);
}

}  // namespace
}  // namespace omnigene

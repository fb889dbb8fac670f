// Chooses the instruction set once, and owns everything that must not be compiled for a particular one.
#include <omp.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "api.h"

namespace omnigene {
namespace {

constexpr size_t KEEP = size_t(64) << 20;  // bytes a thread keeps per slot between calls
constexpr int SLOTS = 6;

struct Scratch {
  void* memory[SLOTS] = {};
  size_t bytes[SLOTS] = {};
  ~Scratch() {
    for (void* m : memory) std::free(m);
  }
};
thread_local Scratch own;

const Kernels* choose() {
  const char* wanted = std::getenv("OMNIGENE_FAST_CPU_ISA");
  const Kernels* available[4] = {portable_kernels()};
  int count = 1;
#if !defined(OMNIGENE_NO_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    available[count++] = avx2_kernels();
  if (count == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    available[count++] = avx512_kernels();
  if (count == 3 && __builtin_cpu_supports("avx512bf16")) available[count++] = avx512_bf16_kernels();
#endif
  if (!wanted || !*wanted) return available[count - 1];
  std::string names;
  for (int i = 0; i < count; ++i) {
    if (!std::strcmp(wanted, available[i]->name)) return available[i];
    names += (i ? ", " : "") + std::string(available[i]->name);
  }
  throw std::runtime_error("OMNIGENE_FAST_CPU_ISA: expected one of " + names + " on this processor, got '" +
                           std::string(wanted) + "'.");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels* const chosen = choose();
  return *chosen;
}

void* scratch(int slot, size_t bytes) {
  if (own.bytes[slot] < bytes) {
    std::free(own.memory[slot]);
    own.bytes[slot] = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    own.memory[slot] = std::aligned_alloc(4096, rounded);
    if (!own.memory[slot]) throw std::bad_alloc();
    own.bytes[slot] = rounded;
  }
  return own.memory[slot];
}

void trim_scratch() {
  for (int slot = 0; slot < SLOTS; ++slot)
    if (own.bytes[slot] > KEEP) {
      std::free(own.memory[slot]);
      own.memory[slot] = nullptr;
      own.bytes[slot] = 0;
    }
}

double probe_bandwidth(const void* buffer, size_t bytes, double seconds, int threads) {
  const size_t lines = bytes / 64;
  double best = 0;
  uint64_t sink = 0;
  const double end = omp_get_wtime() + seconds;
  do {
    const double start = omp_get_wtime();
#pragma omp parallel for num_threads(threads) schedule(static) reduction(^ : sink)
    for (size_t line = 0; line < lines; ++line) {
      const char* address = static_cast<const char*>(buffer) + line * 64;
      uint64_t w[8];
      
      std::memcpy(w, address, 64);
      sink ^= w[0] ^ w[1] ^ w[2] ^ w[3] ^ w[4] ^ w[5] ^ w[6] ^ w[7];
    }
    const double rate = double(lines * 64) / (omp_get_wtime() - start);
    best = rate > best ? rate : best;
  } while (omp_get_wtime() < end);
  volatile uint64_t keep = sink;
  (void)keep;
  return best;
}

}  // namespace omnigene

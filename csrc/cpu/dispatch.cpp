// Chooses the instruction set once, and owns everything that must not be compiled for a particular one.
#include <omp.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "api.h"

namespace omnigene {
namespace {

constexpr size_t KEEP = size_t(64) << 20;  // bytes a thread keeps per slot between calls
constexpr int SLOTS = 7;

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

void advise_huge_pages(void* memory, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t HUGE_PAGE = uintptr_t(2) << 20;
  const uintptr_t first = (uintptr_t(memory) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const uintptr_t end = (uintptr_t(memory) + bytes) / HUGE_PAGE * HUGE_PAGE;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

namespace {

template <class Id>
int64_t count_picks_of(const Id* ids, const int64_t* slot, int64_t n, int64_t K, int64_t E, int32_t* out,
                       int64_t out_stride) {
  constexpr Id unrouted = Id(UNROUTED);
  Id top = 0;
  bool whole = true;
  for (int64_t i = 0; i < n * K; ++i) {
    const bool expert = ids[i] != unrouted;
    whole &= expert;
    top = expert && ids[i] > top ? ids[i] : top;
  }
  if (n * K && top >= E) return top;
  if (!whole) {  // seldom, so simply
    for (int64_t t = 0; t < n; ++t)
      for (int64_t k = 0; k < K; ++k)
        if (ids[t * K + k] != unrouted) ++out[slot[t] * out_stride + ids[t * K + k]];
    return -1;
  }
  // Of a run of tokens of one slot two are counted at a time, into two tables, so that a token that repeats the experts
  // of the one before does not wait for its additions.
  std::vector<int32_t> twin(E, 0);
  for (int64_t t = 0; t < n;) {
    const int64_t here = slot[t];
    int64_t end = t + 1;
    while (end < n && slot[end] == here) ++end;
    int32_t* to = out + here * out_stride;
    if (end - t < 32) {
      for (; t < end; ++t)
        for (int64_t k = 0; k < K; ++k) ++to[ids[t * K + k]];
      continue;
    }
    for (; t + 1 < end; t += 2)
      for (int64_t k = 0; k < K; ++k) {
        ++to[ids[t * K + k]];
        ++twin[ids[(t + 1) * K + k]];
      }
    if (t < end) {
      for (int64_t k = 0; k < K; ++k) ++to[ids[t * K + k]];
      ++t;
    }
    for (int64_t e = 0; e < E; ++e) {
      to[e] += twin[e];
      twin[e] = 0;
    }
  }
  return -1;
}

}  // namespace

int64_t count_picks(const void* ids, int id_bytes, const int64_t* slot, int64_t n, int64_t K, int64_t E, int32_t* out,
                    int64_t out_stride) {
  if (id_bytes == 1) return count_picks_of(static_cast<const uint8_t*>(ids), slot, n, K, E, out, out_stride);
  return count_picks_of(static_cast<const uint16_t*>(ids), slot, n, K, E, out, out_stride);
}

namespace {

// One pass of a thread over its lines, as `streams` runs side by side, each fetched `ahead` bytes early (0: not at all).
uint64_t read_lines(const char* from, size_t lines, int streams, size_t ahead) {
  const size_t run = lines / streams;
  uint64_t sink = 0;
  for (size_t line = 0; line < run; ++line)
    for (int s = 0; s < streams; ++s) {
      const char* address = from + (s * run + line) * 64;
      uint64_t w[8];
      if (ahead) __builtin_prefetch(address + ahead, 0, 2);
      std::memcpy(w, address, 64);
      sink ^= w[0] ^ w[1] ^ w[2] ^ w[3] ^ w[4] ^ w[5] ^ w[6] ^ w[7];
    }
  return sink;
}

}  // namespace

double probe_bandwidth(const void* buffer, size_t bytes, double seconds, int threads) {
  // No one pattern is the fastest on every processor and at every hour: the ceiling is the best of several.
  constexpr int PATTERNS[][2] = {{1, 0}, {1, 4096}, {2, 16384}, {4, 4096}, {8, 0}};
  const char* from = static_cast<const char*>(buffer);
  double best = 0;
  uint64_t sink = 0;
  const double end = omp_get_wtime() + seconds;
  do {
    for (const auto& pattern : PATTERNS) {
      const double start = omp_get_wtime();
#pragma omp parallel num_threads(threads) reduction(^ : sink)
      {
        const size_t lines = bytes / 64 / omp_get_num_threads();
        sink ^= read_lines(from + omp_get_thread_num() * lines * 64, lines, pattern[0], pattern[1]);
      }
      const double rate = double(bytes) / (omp_get_wtime() - start);
      best = rate > best ? rate : best;
    }
  } while (omp_get_wtime() < end);
  volatile uint64_t keep = sink;
  (void)keep;
  return best;
}

}  // namespace omnigene

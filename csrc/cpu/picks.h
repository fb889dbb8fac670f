// The picks of a call, sorted by expert and cut into passes, and how tasks are shared between threads. Forward and
// backward both begin here.
//
//   pick   p = t * K + k, one (token, expert) pair
//   order  [picks] p sorted by expert, stable
//   pass   up to max_pass() picks of one expert, multiplied with the expert's weights together
#pragma once
#include <omp.h>

#include "api.h"
#include "tiles.h"

namespace omnigene {
namespace {

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

struct Pass {
  int64_t expert, first;  // first: position in `order`
  int n;
};

template <class M>
constexpr int max_pass() {  // what keeps the packed tokens of a pass in the second-level cache
  return M::PAIRS || W == 8 ? MAX_TOKENS : MAX_TOKENS / 2;
}

struct Picks {
  const int64_t* order = nullptr;
  const int64_t* start = nullptr;  // [E + 1] positions of an expert's picks
  const Pass* pass = nullptr;
  int64_t passes = 0, most = 0;  // most: picks of the busiest expert
};

// Uses the scratch slots 0 and 5.
inline Picks sort_picks(const int64_t* index, int64_t TK, int64_t E, int max_pass) {
  Picks out;
  int64_t* start = static_cast<int64_t*>(scratch(0, (TK + 2 * E + 2) * sizeof(int64_t)));
  int64_t *next = start + E + 1, *order = next + E + 1;
  for (int64_t e = 0; e <= E; ++e) start[e] = 0;
  for (int64_t p = 0; p < TK; ++p)
    if (index[p] < E) ++start[index[p] + 1];
  int64_t count = 0;
  for (int64_t e = 0; e < E; ++e) {
    count += ceil_div(start[e + 1], max_pass);
    out.most = larger(out.most, start[e + 1]);
    start[e + 1] += start[e];
  }
  Pass* pass = static_cast<Pass*>(scratch(5, (count + 1) * sizeof(Pass)));
  for (int64_t e = 0; e < E; ++e) {
    const int64_t n = start[e + 1] - start[e], parts = ceil_div(n, max_pass);
    for (int64_t i = 0, first = 0; i < parts; ++i) {
      // even parts, in whole vectors where there are several
      const int64_t last = parts == 1 ? n : smaller(round_up(n * (i + 1) / parts, W), n);
      pass[out.passes++] = {e, start[e] + first, int(last - first)};
      first = last;
    }
    next[e] = start[e];
  }
  for (int64_t p = 0; p < TK; ++p)
    if (index[p] < E) order[next[index[p]]++] = p;
  out.order = order;
  out.start = start;
  out.pass = pass;
  return out;
}

// Runs body(task, next) for tasks drawn from a shared counter. The next task is claimed early: its first rows are
// fetched while this one computes. next < 0: there is none.
template <class F>
inline void for_each_task(int64_t* counter, int64_t tasks, F&& body) {
  int64_t task = __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
  while (task < tasks) {
    const int64_t next = __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
    body(task, next < tasks ? next : -1);
    task = next;
  }
}

// A projection of all experts as it stands in memory. Addresses are those of bytes, because a call's data decide what the
// elements are.
struct Projection {
  const char* base;
  int64_t expert, row;  // bytes from one to the next
  int64_t element, rows;
  Stored stored;
  const float* scale;  // [E, rows], or null
  const char* at(int64_t e, int64_t r, int64_t column = 0) const { return base + e * expert + r * row + column * element; }
  const float* scale_of(int64_t e, int64_t r) const { return scale ? scale + e * rows + r : nullptr; }
  float unit() const { return stored == Stored::e4m3 ? unit_of<e4m3> : 1.0f; }
};

inline int64_t element_size(const ExpertArgs& args) {
  return args.stored != Stored::like_hidden ? 1 : args.dtype == Dtype::f32 ? 4 : 2;
}
inline Projection gate_up_of(const ExpertArgs& args) {
  const int64_t size = element_size(args);
  return {static_cast<const char*>(args.gate_up), args.gate_up_expert_stride * size, args.gate_up_row_stride * size, size,
          2 * args.I, args.stored, args.gate_up_scale};
}
inline Projection down_of(const ExpertArgs& args) {
  const int64_t size = element_size(args);
  return {static_cast<const char*>(args.down), args.down_expert_stride * size, args.down_row_stride * size, size, args.H,
          args.stored, args.down_scale};
}

// body(pointer) with the type in which a projection's elements stand.
template <class Weight, class F>
INLINE void with_stored(Stored stored, F&& body) {
  switch (stored) {
    case Stored::like_hidden: return body(static_cast<const Weight*>(nullptr));
    case Stored::i8: return body(static_cast<const i8*>(nullptr));
    case Stored::e4m3: return body(static_cast<const e4m3*>(nullptr));
  }
}

// Rows past the end of a weight: copied beside zeros, so that every tile is whole.
template <class Weight>
inline const Weight* pad_rows(const Weight* w, int64_t stride, int64_t live, int64_t rows, int64_t count, Weight* room) {
  std::memset(static_cast<void*>(room), 0, rows * count * sizeof(Weight));
  for (int64_t r = 0; r < live; ++r) std::memcpy(room + r * count, w + r * stride, count * sizeof(Weight));
  return room;
}

}  // namespace
}  // namespace omnigene

// Runs CUDA kernels on the CPU: every thread of a block is a fiber that runs until it meets others, at a barrier or in
// an instruction of its warp. Included by csrc/cuda/device.cuh in place of what NVRTC compiles.
//
// It is stricter than a GPU where that shows mistakes: shared memory is poisoned before each block, reads and writes
// outside the tensors of a launch and unaligned ones fail, so do lanes that meet in different instructions and threads
// that wait for one that has left. The order of blocks, that of threads between two meetings, and how fast each warp
// runs are drawn from a seed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define DEVICE inline
#define UNROLL
#define ROLLED
#define __global__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("emulated_shared")))
#define threadIdx (emulator::machine.current->index)
#define blockIdx (emulator::machine.block)
#define blockDim (emulator::machine.size)

extern char __start_emulated_shared[] __attribute__((visibility("hidden")));
extern char __stop_emulated_shared[] __attribute__((visibility("hidden")));

struct uint4 {
    u32 x, y, z, w;
};

namespace emulator {

struct Index {
    u32 x, y;
};
enum Meeting { NONE, SYNC_THREADS, SYNC_WARP, BALLOT, SHUFFLE_XOR, MMA_BF16, MMA_FP16 };
enum State { READY, WAITING, LEFT };

struct Fiber {
    Index index;
    State state;
    Meeting meeting;
    bool awaited;  // the previous grid
    u32 in[10], out[4];  // what it brings to a meeting of its warp, and what it takes away
    ucontext_t context;
    std::unique_ptr<char[]> stack;
};

enum Kind { INPUT, OUTPUT, OF_PREVIOUS_GRID };
struct Range {
    const char* begin;
    const char* end;
    Kind kind;
};

struct Machine {
    Index block, size;
    Fiber* current = nullptr;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Range> ranges;
    ucontext_t scheduler;
    std::function<void()> kernel;
    std::string error;
};
inline Machine machine;
constexpr size_t STACK = 256 * 1024;

inline void leave() {
    machine.current->state = LEFT;
    swapcontext(&machine.current->context, &machine.scheduler);
}

[[noreturn]] inline void fail(const std::string& message) {
    if (machine.error.empty())
        machine.error = message + " (block " + std::to_string(machine.block.x) + ", " + std::to_string(machine.block.y) +
                        ", thread " + std::to_string(machine.current->index.x) + ")";
    leave();
    std::abort();
}

inline void check(const void* address, size_t bytes, bool write) {
    const char* begin = static_cast<const char*>(address);
    if (reinterpret_cast<uintptr_t>(begin) % bytes) fail("unaligned access of " + std::to_string(bytes) + " bytes");
    for (const Range& range : machine.ranges)
        if (begin >= range.begin && begin + bytes <= range.end) {
            if (write && range.kind != OUTPUT) fail("write to an input");
            if (range.kind == OF_PREVIOUS_GRID && !machine.current->awaited)
                fail("read of what the previous grid may still be writing");
            return;
        }
    fail(std::string(write ? "write" : "read") + " outside every tensor");
}

inline void meet(Meeting meeting) {
    machine.current->meeting = meeting;
    machine.current->state = WAITING;
    swapcontext(&machine.current->context, &machine.scheduler);
}

float mma_sum(const Fiber* const* warp, Meeting meeting, int row, int column, float sum);

// Carries out what all lanes of a warp wait for, if they do.
inline bool complete_warp(Fiber* const* warp) {
    const Meeting meeting = warp[0]->meeting;
    for (int lane = 0; lane < 32; ++lane) {
        if (warp[lane]->state != WAITING || warp[lane]->meeting == SYNC_THREADS) return false;
        if (warp[lane]->meeting != meeting) {
            machine.current = warp[lane];
            machine.error = "lanes of a warp meet in different instructions";
            return false;
        }
    }
    u32 mask = 0;
    for (int lane = 0; lane < 32; ++lane) mask |= (warp[lane]->in[0] & 1u) << lane;
    for (int lane = 0; lane < 32; ++lane) {
        Fiber& fiber = *warp[lane];
        if (meeting == BALLOT) fiber.out[0] = mask;
        if (meeting == SHUFFLE_XOR) fiber.out[0] = warp[lane ^ fiber.in[1]]->in[0];
        if (meeting == MMA_BF16 || meeting == MMA_FP16)
            for (int i = 0; i < 4; ++i) {
                float sum;
                std::memcpy(&sum, &fiber.in[6 + i], 4);
                sum = mma_sum(warp, meeting, lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2, sum);
                std::memcpy(&fiber.out[i], &sum, 4);
            }
        fiber.state = READY;
    }
    return true;
}

inline void run_block(const std::vector<int>& threads_in, std::mt19937& random, bool shuffled) {
    std::vector<int> order = threads_in;
    const int threads = int(order.size());
    std::vector<Fiber*> fibers;
    for (auto& fiber : machine.fibers) fibers.push_back(fiber.get());
    const u32 poison = 0xffc1ffc1u;
    for (char* p = __start_emulated_shared; p + 4 <= __stop_emulated_shared; p += 4) std::memcpy(p, &poison, 4);
    for (int i = 0; i < threads; ++i) {
        Fiber& fiber = *fibers[i];
        fiber.state = READY;
        fiber.awaited = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, reinterpret_cast<void (*)()>(+[] {
                        machine.kernel();
                        leave();
                    }), 0);
    }
    for (int alive = threads; alive;) {
        if (shuffled) std::shuffle(order.begin(), order.end(), random);
        bool progress = false;
        // Warps have a pace of their own: some stand still while others run ahead of them.
        const u32 standing = shuffled ? random() & random() : 0;
        for (int i : order) {
            if (fibers[i]->state != READY) continue;
            if (standing >> (i / 32 % 32) & 1) {
                progress = true;
                continue;
            }
            machine.current = fibers[i];
            swapcontext(&machine.scheduler, &machine.current->context);
            progress = true;
            alive -= machine.current->state == LEFT;
            if (!machine.error.empty()) return;
        }
        for (int warp = 0; warp < threads; warp += 32) progress |= complete_warp(&fibers[warp]);
        if (!machine.error.empty()) return;
        const auto waits = [](const Fiber* fiber) { return fiber->state == WAITING && fiber->meeting == SYNC_THREADS; };
        if (std::all_of(fibers.begin(), fibers.begin() + threads, waits)) {
            for (int i = 0; i < threads; ++i) fibers[i]->state = READY;
            progress = true;
        }
        if (!progress && alive) {
            machine.error = "threads wait for others that do not come";
            return;
        }
    }
}

// An empty string, or what went wrong. Seed 0: blocks and threads in ascending order.
inline std::string run(u32 grid_x, u32 grid_y, int threads, u32 seed, std::function<void()> kernel) {
    std::mt19937 random(seed);
    machine.kernel = std::move(kernel);
    machine.size = {u32(threads), 1};
    machine.error.clear();
    while (int(machine.fibers.size()) < threads) {
        machine.fibers.push_back(std::make_unique<Fiber>());
        machine.fibers.back()->stack = std::make_unique<char[]>(STACK);
    }
    std::vector<int> order(threads), blocks(grid_x * grid_y);
    std::iota(order.begin(), order.end(), 0);
    std::iota(blocks.begin(), blocks.end(), 0);
    for (int i = 0; i < threads; ++i) machine.fibers[i]->index = {u32(i), 0};
    if (seed) std::shuffle(blocks.begin(), blocks.end(), random);
    for (int block : blocks) {
        machine.block = {u32(block) % grid_x, u32(block) / grid_x};
        run_block(order, random, seed != 0);
        if (!machine.error.empty()) break;
    }
    return machine.error;
}

// Numbers as the hardware rounds them: to nearest, ties to even.

inline u32 float_bits(float x) {
    u32 bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float bits_float(u32 bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline u16 to_bf16(float x) {
    if (x != x) return 0x7fff;
    const u32 bits = float_bits(x);
    return u16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline float from_bf16(u16 bits) { return bits_float(u32(bits) << 16); }
inline u16 to_fp16(float x) {
    const _Float16 half = _Float16(x);
    u16 bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
inline float from_fp16(u16 bits) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return float(half);
}
inline float half_of(Meeting meeting, u32 word, int which) {
    const u16 bits = u16(word >> (16 * which));
    return meeting == MMA_BF16 ? from_bf16(bits) : from_fp16(bits);
}

// One element of c + a b. Tensor cores add exact products and cut the sums off; cutting after each one is no better.
inline float mma_sum(const Fiber* const* warp, Meeting meeting, int row, int column, float sum) {
    for (int k = 0; k < 16; ++k) {
        const int t = k % 8 / 2, high = k / 8;
        const float a = half_of(meeting, warp[row % 8 * 4 + t]->in[row / 8 + 2 * high], k % 2);
        const float b = half_of(meeting, warp[column * 4 + t]->in[4 + high], k % 2);
        const double exact = double(sum) + double(a) * double(b);
        sum = float(exact);
        if (std::isfinite(exact) && std::abs(double(sum)) > std::abs(exact)) sum = std::nextafter(sum, 0.0f);
    }
    return sum;
}

}  // namespace emulator

inline u32 __ballot_sync(u32, bool predicate) {
    emulator::Fiber& fiber = *emulator::machine.current;
    fiber.in[0] = predicate;
    emulator::meet(emulator::BALLOT);
    return fiber.out[0];
}
inline float __shfl_xor_sync(u32, float value, int mask) {
    emulator::Fiber& fiber = *emulator::machine.current;
    fiber.in[0] = emulator::float_bits(value);
    fiber.in[1] = u32(mask);
    emulator::meet(emulator::SHUFFLE_XOR);
    return emulator::bits_float(fiber.out[0]);
}
inline void __syncthreads() { emulator::meet(emulator::SYNC_THREADS); }
inline void __syncwarp() { emulator::meet(emulator::SYNC_WARP); }
inline void let_next_grid_start() {}
inline void wait_for_previous_grid() { emulator::machine.current->awaited = true; }

inline int __popc(u32 x) { return __builtin_popcount(x); }
inline int __ffs(u32 x) { return __builtin_ffs(int(x)); }
inline u32 __float_as_uint(float x) { return emulator::float_bits(x); }
inline float __uint_as_float(u32 x) { return emulator::bits_float(x); }
inline u32 __byte_perm(u32 x, u32 y, u32 selector) {
    const uint64_t bytes = uint64_t(y) << 32 | x;
    u32 out = 0;
    for (int i = 0; i < 4; ++i) out |= u32(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
    return out;
}

inline uint4 load_weights_16(const void* address) {
    emulator::check(address, 16, false);
    uint4 v;
    std::memcpy(&v, address, 16);
    return v;
}
inline uint4 load_hidden_16(const void* address) { return load_weights_16(address); }
template <class T>
T load(const T* address) {
    emulator::check(address, sizeof(T), false);
    return *address;
}
template <class T>
void store(T* address, T value) {
    emulator::check(address, sizeof(T), true);
    *address = value;
}

inline float to_float(fp16 x) { return emulator::from_fp16(x.bits); }
inline void from_float(float x, bf16& y) { y.bits = emulator::to_bf16(x); }
inline void from_float(float x, fp16& y) { y.bits = emulator::to_fp16(x); }
inline u32 fma2(bf16, u32 a, u32 b, u32 c) {
    u32 d = 0;
    for (int i = 0; i < 32; i += 16)
        d |= u32(emulator::to_bf16(std::fma(emulator::from_bf16(u16(a >> i)), emulator::from_bf16(u16(b >> i)),
                                            emulator::from_bf16(u16(c >> i)))))
             << i;
    return d;
}
inline u32 fma2(fp16, u32 a, u32 b, u32 c) {
    u32 d = 0;
    for (int i = 0; i < 32; i += 16)
        d |= u32(emulator::to_fp16(std::fma(emulator::from_fp16(u16(a >> i)), emulator::from_fp16(u16(b >> i)),
                                            emulator::from_fp16(u16(c >> i)))))
             << i;
    return d;
}
inline void emulated_mma(emulator::Meeting meeting, float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    emulator::Fiber& fiber = *emulator::machine.current;
    std::copy(a, a + 4, fiber.in);
    std::copy(b, b + 2, fiber.in + 4);
    std::memcpy(fiber.in + 6, c, 16);
    emulator::meet(meeting);
    std::memcpy(c, fiber.out, 16);
}
inline void mma(bf16, float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    emulated_mma(emulator::MMA_BF16, c, a, b);
}
inline void mma(fp16, float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    emulated_mma(emulator::MMA_FP16, c, a, b);
}

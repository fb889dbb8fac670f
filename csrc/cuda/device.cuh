// Number types, loads and the few instructions that the decode kernels need of the device. NVRTC has no headers at
// hand, so everything is spelled out here; tests/cuda/emulator.h stands in for it where the CPU runs the kernels.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

// The bits of a number; `to_float` and `from_float` give them meaning.
struct bf16 {
    u16 bits;
};
struct fp16 {
    u16 bits;
};
struct int8 {
    signed char bits;
};
struct e4m3 {  // float8_e4m3fn: no infinities, NaN is 0x7f and 0xff
    u8 bits;
};

#ifdef OMNIGENE_EMULATOR
#include "emulator.h"
#else

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")

// A kernel launched with programmatic stream serialisation starts while the one before it still runs (sm_90 on).
DEVICE void let_next_grid_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Returns once the grid before this one has ended and its writes can be read.
DEVICE void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// 16 bytes of weights: read once, so they pass the L1 cache by, and L2 fetches the whole line of 128 bytes.
DEVICE uint4 load_weights_16(const void* address) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
    return v;
}
// 16 bytes of hidden states: read by every block, so they stay in the L1 cache.
DEVICE uint4 load_hidden_16(const void* address) {
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address));
    return v;
}
template <class T>
DEVICE T load(const T* address) {
    return *address;
}
template <class T>
DEVICE void store(T* address, T value) {
    *address = value;
}

DEVICE float to_float(fp16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
DEVICE void from_float(float x, bf16& y) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
DEVICE void from_float(float x, fp16& y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }

// a * b + c on two halves.
DEVICE u32 fma2(bf16, u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
DEVICE u32 fma2(fp16, u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// c += a b with a [16, 16] by rows and b [16, 8] by columns, spread over the warp as the PTX manual has it.
DEVICE void mma(bf16, float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma(fp16, float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

constexpr int WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
DEVICE void from_float(float x, float& y) { y = x; }

// The low 8 bits of two numbers, each in a half of a word, made halves of type bf16 or fp16. All of them exist there.
DEVICE u32 widen_int8(bf16 type, u32 bytes) {
    // 128 + (7 bits) - (128 or, for a negative number, 256): bfloat16 has just the bits for it.
    const u32 minuend = (bytes & 0x007f007fu) | 0x43004300u;
    const u32 minus = (bytes & 0x00800080u) | 0xc300c300u;
    return fma2(type, minuend, 0x3f803f80u, minus);
}
DEVICE u32 widen_int8(fp16 type, u32 bytes) {
    return fma2(type, bytes ^ 0x64806480u, 0x3c003c00u, 0xe480e480u);  // (1024 + 128 + x) - 1152
}
// The same with a float8 in the high 8 bits of each half: its bits at the wider type's place, times the difference of
// the exponents' biases, which puts subnormal numbers right as well. NaN is left to the caller.
DEVICE u32 widen_e4m3(bf16 type, u32 bytes) {
    const u32 small = (bytes & 0x80008000u) | ((bytes & 0x7f007f00u) >> 4);
    return fma2(type, small, 0x7b807b80u, 0x80008000u);  // 2^120; minus zero keeps the sign of a zero
}
DEVICE u32 widen_e4m3(fp16 type, u32 bytes) {
    const u32 small = (bytes & 0x80008000u) | ((bytes & 0x7f007f00u) >> 1);
    return fma2(type, small, 0x5c005c00u, 0x80008000u);  // 2^8
}

// Four weights of a word as two pairs of Hidden's type.
template <class Hidden>
DEVICE void widen(int8, u32 word, u32 (&pairs)[2]) {
    pairs[0] = widen_int8(Hidden{}, __byte_perm(word, 0, 0x4140));
    pairs[1] = widen_int8(Hidden{}, __byte_perm(word, 0, 0x4342));
}
template <class Hidden>
DEVICE void widen(e4m3, u32 word, u32 (&pairs)[2]) {
    pairs[0] = widen_e4m3(Hidden{}, __byte_perm(word, 0, 0x1404));
    pairs[1] = widen_e4m3(Hidden{}, __byte_perm(word, 0, 0x3424));
}

// Number `i` of a word of weights, in float32.
DEVICE float weight_in_word(float, u32 word, int) { return __uint_as_float(word); }
DEVICE float weight_in_word(int8, u32 word, int i) {
    const u32 magic = __byte_perm(word ^ 0x80808080u, 0x4b000000u, 0x7440 | i);  // 2^23 + 128 + x
    return __uint_as_float(magic) - 8388736.0f;
}
DEVICE float weight_in_word(e4m3, u32 word, int i) {
    const u32 byte = word >> (8 * i);
    return __uint_as_float(((byte & 0x80u) << 24) | ((byte & 0x7fu) << 20)) * 1.329227995784916e36f;  // 2^120
}

// Whether one of 16 weights is a NaN: adding 1 to 7 bits carries out of 0x7f alone.
template <class Weight>
DEVICE bool any_nan(const uint4&) {
    return false;  // wider types keep theirs, int8 has none
}
template <>
DEVICE bool any_nan<e4m3>(const uint4& v) {
    const u32 ones = 0x01010101u, low = 0x7f7f7f7fu;
    return ((((v.x & low) + ones) | ((v.y & low) + ones) | ((v.z & low) + ones) | ((v.w & low) + ones)) & 0x80808080u);
}

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + exp2f(fminf(x * -1.4426950408889634f, 126.0f))); }

enum Activation { GELU_TANH = 0, GELU = 1, SILU = 2 };

// The formulas of kernels/activation.py, in float32.
DEVICE float activate(float gate, int activation) {
    if (activation == GELU_TANH) return gate * sigmoid(1.5957691216057308f * gate * (1.0f + 0.044715f * gate * gate));
    if (activation == GELU) return 0.5f * gate * (1.0f + erff(gate * 0.7071067811865476f));
    return gate * sigmoid(gate);
}

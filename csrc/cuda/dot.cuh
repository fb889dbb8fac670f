// A warp's inner products of up to 16 rows of hidden states with 8 rows of each of R weight matrices.
//
// Lane 4 g + t holds of weight row g the chunks of 16 bytes number t, t + 4, t + 8, ...: one load instruction reads 64
// contiguous bytes of 8 rows. bf16 and fp16 go through tensor cores, with the hidden states as their 16 rows (absent
// ones are zero and not read) and the weights as their 8 columns: few instructions for each byte, so that what bounds
// the kernel is memory, up to 16 tokens of one expert. The order of summation inside a product is free, so each lane's
// chunk is used as it lies: its numbers 0, 1 and 2, 3 are what the instruction calls columns 2t, 2t+1 and 2t+8, 2t+9.
// float32 has no exact tensor core product and uses FMA on the same layout.
#pragma once

#include "device.cuh"

constexpr int SLOTS = 16;  // rows of hidden states
constexpr int COLUMNS = 8;  // weight rows of a matrix

template <class Weight>
constexpr int CHUNK = 16 / int(sizeof(Weight));  // weights of one 16-byte load
template <class Weight>
constexpr int STEP = 4 * CHUNK<Weight>;  // numbers of a row that a warp reads at once

template <class T>
DEVICE u32 bits_of(T x) {
    return u32(x.bits) & (sizeof(T) == 1 ? 0xffu : 0xffffu);
}
DEVICE u32 bits_of(float x) { return __float_as_uint(x); }

// COUNT numbers from `row` on as words, zero where fewer than that are `left` of it. ALIGNED: rows begin at multiples of 16
// bytes and hold whole chunks.
template <bool ALIGNED, int COUNT, bool WEIGHTS, class T>
DEVICE void load_chunk(const T* row, int left, u32 (&words)[COUNT * int(sizeof(T)) / 4]) {
    constexpr int EACH = 4 / int(sizeof(T));
    if constexpr (ALIGNED) {
        UNROLL for (int i = 0; i < COUNT * int(sizeof(T)) / 16; ++i) {
            uint4 v = {0, 0, 0, 0};
            if (left > 0) v = WEIGHTS ? load_weights_16(row + i * 4 * EACH) : load_hidden_16(row + i * 4 * EACH);
            words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
        }
    } else {
        UNROLL for (int i = 0; i < COUNT / EACH; ++i) {
            words[i] = 0;
            UNROLL for (int j = 0; j < EACH; ++j) {
                if (i * EACH + j < left) words[i] |= bits_of(load(row + i * EACH + j)) << (j * 8 * int(sizeof(T)) % 32);
            }
        }
    }
}

template <class Hidden, class Weight, bool ALIGNED, int R, int BATCH>
struct Dot {  // bf16, fp16
    float sums[R][4];

    // Adds chunks [begin, end) of the rows of `length` numbers. `weights`: this lane's row of each matrix; `rows`: the
    // `count` rows of hidden states, which may be read only after the previous grid if `wait`.
    DEVICE void run(const Weight* const (&weights)[R], const Hidden* const* rows, int count, int begin, int end,
                    int length, bool wait) {
        UNROLL for (int r = 0; r < R; ++r) UNROLL for (int i = 0; i < 4; ++i) sums[r][i] = 0.0f;
        if (count <= 8) {
            add<false, BATCH>(weights, rows, count, begin, end, length, wait);
        } else {  // twice the registers for hidden states, so fewer for weights
            add<true, (BATCH + 3) / 4>(weights, rows, count, begin, end, length, wait);
        }
    }

    template <bool HIGH, int LOADS>
    DEVICE void add(const Weight* const (&weights)[R], const Hidden* const* rows, int count, int begin, int end,
                    int length, bool wait) {
        constexpr int N = CHUNK<Weight>;
        const int lane = threadIdx.x % WARP, slot = lane / 4;
        const Hidden* low = rows[slot < count ? slot : 0];
        const Hidden* high = HIGH ? rows[slot + 8 < count ? slot + 8 : 0] : nullptr;
        ROLLED for (int step = begin; step < end; step += LOADS) {
            u32 w[LOADS][R][4];
            const int first = step * STEP<Weight> + lane % 4 * N;
            UNROLL for (int b = 0; b < LOADS; ++b) {
                const int left = step + b < end ? length - first - b * STEP<Weight> : 0;
                UNROLL for (int r = 0; r < R; ++r)
                    load_chunk<ALIGNED, N, true>(weights[r] + first + b * STEP<Weight>, left, w[b][r]);
            }
            if (wait && step == begin) wait_for_previous_grid();
            UNROLL for (int b = 0; b < LOADS; ++b) {
                const int left = step + b < end ? length - first - b * STEP<Weight> : 0;
                u32 x[N / 2], x_high[N / 2] = {};
                load_chunk<ALIGNED, N, false>(low + first + b * STEP<Weight>, slot < count ? left : 0, x);
                if (HIGH)
                    load_chunk<ALIGNED, N, false>(high + first + b * STEP<Weight>, slot + 8 < count ? left : 0, x_high);
                UNROLL for (int r = 0; r < R; ++r) multiply(sums[r], w[b][r], x, x_high);
            }
        }
    }

    DEVICE void multiply(float (&sum)[4], const u32 (&w)[4], const u32 (&x)[CHUNK<Weight> / 2],
                         const u32 (&x_high)[CHUNK<Weight> / 2]) {
        if constexpr (sizeof(Weight) == 2) {
            UNROLL for (int i = 0; i < 4; i += 2) {
                const u32 a[4] = {x[i], x_high[i], x[i + 1], x_high[i + 1]}, b[2] = {w[i], w[i + 1]};
                mma(Hidden{}, sum, a, b);
            }
        } else {
            const u32 poison = any_nan<Weight>(uint4{w[0], w[1], w[2], w[3]}) ? 0x7fff7fffu : 0u;
            UNROLL for (int i = 0; i < 4; ++i) {
                u32 b[2];
                widen<Hidden>(Weight{}, w[i], b);
                if (i == 0) b[0] |= poison;
                const u32 a[4] = {x[2 * i], x_high[2 * i], x[2 * i + 1], x_high[2 * i + 1]};
                mma(Hidden{}, sum, a, b);
            }
        }
    }

    // Calls f(matrix, slot, column, sum) for the sums that this lane holds.
    template <class F>
    DEVICE void each(int, F f) {
        const int lane = threadIdx.x % WARP;
        UNROLL for (int r = 0; r < R; ++r) UNROLL for (int i = 0; i < 4; ++i)
            f(r, lane / 4 + i / 2 * 8, lane % 4 * 2 + i % 2, sums[r][i]);
    }
};

template <class Weight, bool ALIGNED, int R, int BATCH>
struct Dot<float, Weight, ALIGNED, R, BATCH> {
    float sums[R][SLOTS];

    DEVICE void run(const Weight* const (&weights)[R], const float* const* rows, int count, int begin, int end,
                    int length, bool wait) {
        constexpr int N = CHUNK<Weight>, EACH = N / 4;  // weights of a word
        const int lane = threadIdx.x % WARP;
        UNROLL for (int r = 0; r < R; ++r) UNROLL for (int m = 0; m < SLOTS; ++m) sums[r][m] = 0.0f;
        ROLLED for (int step = begin; step < end; step += BATCH) {
            u32 w[BATCH][R][4];
            const int first = step * STEP<Weight> + lane % 4 * N;
            UNROLL for (int b = 0; b < BATCH; ++b) {
                const int left = step + b < end ? length - first - b * STEP<Weight> : 0;
                UNROLL for (int r = 0; r < R; ++r)
                    load_chunk<ALIGNED, N, true>(weights[r] + first + b * STEP<Weight>, left, w[b][r]);
            }
            if (wait && step == begin) wait_for_previous_grid();
            UNROLL for (int b = 0; b < BATCH; ++b) {
                const int left = step + b < end ? length - first - b * STEP<Weight> : 0;
                float poison[R];
                UNROLL for (int r = 0; r < R; ++r)
                    poison[r] = any_nan<Weight>(uint4{w[b][r][0], w[b][r][1], w[b][r][2], w[b][r][3]})
                                    ? __uint_as_float(0x7fc00000u)
                                    : 0.0f;
                UNROLL for (int m = 0; m < SLOTS; ++m) {
                    if (m >= count) continue;
                    const float* x = rows[m] + first + b * STEP<Weight>;
                    UNROLL for (int i = 0; i < N; i += 4) {
                        u32 part[4];
                        load_chunk<ALIGNED, 4, false>(x + i, left - i, part);
                        UNROLL for (int r = 0; r < R; ++r) {
                            UNROLL for (int j = 0; j < 4; ++j)
                                sums[r][m] += weight_in_word(Weight{}, w[b][r][(i + j) / EACH], (i + j) % EACH) *
                                              __uint_as_float(part[j]);
                            if (i == 0) sums[r][m] += poison[r];
                        }
                    }
                }
            }
        }
        UNROLL for (int r = 0; r < R; ++r) UNROLL for (int m = 0; m < SLOTS; ++m) {
            if (m >= count) continue;
            sums[r][m] += __shfl_xor_sync(ALL_LANES, sums[r][m], 1);
            sums[r][m] += __shfl_xor_sync(ALL_LANES, sums[r][m], 2);
        }
    }

    template <class F>
    DEVICE void each(int count, F f) {
        const int lane = threadIdx.x % WARP;
        UNROLL for (int r = 0; r < R; ++r) UNROLL for (int m = 0; m < SLOTS; ++m)
            if (m < count && m % 4 == lane % 4) f(r, m, lane / 4, sums[r][m]);
    }
};

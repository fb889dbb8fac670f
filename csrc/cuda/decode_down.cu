// Second kernel of a decode step: out[t] = sum over k of weights[t, k] * down(h[t, k]). Compiled as decode_up.cu is.
//
// Grid: (ceil(H / 8),) blocks of 4 warps. A block owns 8 columns of out for all tokens and all experts that they chose:
// its warps take the experts in turn (and, where there are fewer picks than warps, parts of the sum over I), and leave
// each pick's result in shared memory; then each token adds its K in the order of k, in float32. What comes out is
// written once, and no other kernel has to put it together.
#include "picks.cuh"

constexpr int DOWN_WARPS = 4;
// Chunks that a lane has in flight: 11 are half a row of I = 704 in bf16.
constexpr int DOWN_BATCH = !VEC || (sizeof(HIDDEN) == 4 && sizeof(WEIGHT) == 1) ? 1 : sizeof(HIDDEN) == 2 ? 11 : 4;
constexpr int DOWN_BLOCKS = 4;  // on a multiprocessor

struct DownShared {
    int ids[MAX_PICKS];
    float weights[MAX_PICKS];
    int leaders[MAX_PICKS];  // the first pick of each expert, ascending
    int found[MAX_PICKS / WARP];
    int slots[DOWN_WARPS][SLOTS];
    const HIDDEN* rows[DOWN_WARPS][SLOTS];
    float y[MAX_PICKS][COLUMNS];  // by part of the sum, then by pick
};

enum WeightType { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, FLOAT64 = 3 };

DEVICE float load_weight(const void* weights, int type, int i) {
    if (type == FLOAT32) return load(static_cast<const float*>(weights) + i);
    if (type == BFLOAT16) return to_float(load(static_cast<const bf16*>(weights) + i));
    if (type == FLOAT16) return to_float(load(static_cast<const fp16*>(weights) + i));
    return float(load(static_cast<const double*>(weights) + i));
}

// h         [N, I] HIDDEN, rows `stride_h` apart
// down      [E, H, I] WEIGHT, experts `stride_expert` and rows `stride_row` apart
// scale     [E, H] float32, contiguous; or null
// ids       [N] int64 (`wide_ids`) or int32
// weights   [N] of `weight_type`
// out       [T, H] HIDDEN, contiguous, written
// `splits` parts of the sum over I; splits * N <= 256
extern "C" __global__ void __launch_bounds__(DOWN_WARPS* WARP, DOWN_BLOCKS)
    decode_down(const HIDDEN* h, const WEIGHT* down, const float* scale, const void* ids, const void* weights, HIDDEN* out,
                i64 N, i64 top_k, i64 E, i64 H, i64 I, i64 stride_h, i64 stride_expert, i64 stride_row, i64 wide_ids,
                i64 weight_type, i64 splits) {
    __shared__ DownShared shared;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, picks = int(N), K = int(top_k);
    for (int own = threadIdx.x; own < picks; own += DOWN_WARPS * WARP) {
        shared.ids[own] = load_id(ids, wide_ids, own, E);
        if (shared.ids[own] >= 0) shared.weights[own] = load_weight(weights, int(weight_type), own);
    }
    __syncthreads();
    const int leaders = find_leaders(shared.ids, picks, shared.leaders, shared.found);

    const i64 column = i64(blockIdx.x) * COLUMNS;
    const i64 row = column + lane / 4 < H ? column + lane / 4 : H - 1;  // rows past the end repeat the last, unused
    const int steps = int((I + STEP<WEIGHT> - 1) / STEP<WEIGHT>), share = int((steps + splits - 1) / splits);
    bool wait = true;  // h is the previous grid's: the first weights are fetched before it has ended
    ROLLED for (int task = warp; task < leaders * int(splits); task += DOWN_WARPS) {
        const int expert = shared.ids[shared.leaders[task / int(splits)]], part = task % int(splits);
        const WEIGHT* const matrix_row[1] = {down + expert * stride_expert + row * stride_row};
        const int begin = part * share, end = begin + share < steps ? begin + share : steps;
        int first, total = 1;
        ROLLED for (int done = 0; done < total; done += SLOTS) {
            total = find_picks(shared.ids, picks, expert, done, shared.slots[warp], first);
            const int count = total - done < SLOTS ? total - done : SLOTS;
            if (lane < count) shared.rows[warp][lane] = h + shared.slots[warp][lane] * stride_h;
            __syncwarp();
            Dot<HIDDEN, WEIGHT, VEC, 1, DOWN_BATCH> dot;
            dot.run(matrix_row, shared.rows[warp], count, begin, end, int(I), wait);
            wait = false;
            dot.each(count, [&](int, int slot, int c, float sum) {
                if (slot >= count) return;
                if (scale && column + c < H) sum *= load(scale + expert * H + column + c);
                shared.y[part * picks + shared.slots[warp][slot]][c] = sum;
            });
            __syncwarp();
        }
    }
    wait_for_previous_grid();  // every block waits, or this grid could end before the previous one
    __syncthreads();

    const int token = threadIdx.x / COLUMNS, c = threadIdx.x % COLUMNS;
    if (token * K < picks && column + c < H) {
        float total = 0.0f;
        for (int k = 0; k < K; ++k) {
            const int pick = token * K + k;
            if (shared.ids[pick] < 0) continue;
            float y = 0.0f;
            for (int part = 0; part < int(splits); ++part) y += shared.y[part * picks + pick][c];
            total += shared.weights[pick] * y;
        }
        HIDDEN value;
        from_float(total, value);
        store(out + token * H + column + c, value);
    }
}

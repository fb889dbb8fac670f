// First kernel of a decode step: h = act(gate) * up for the N = T K picks of up to 16 tokens, straight from the ids.
//
// Compiled with HIDDEN (bf16, fp16 or float), WEIGHT (the same, int8 or e4m3) and VEC (1: rows begin at multiples of 16
// bytes and hold whole chunks of 16 bytes; 0: any).
//
// Grid: (ceil(I / 8), N) blocks of 4 warps. A block owns 8 columns of h for the expert of its pick, for all the tokens
// that chose it: only the block of the first such pick stays, so each expert's weights are read once. The warps share
// the sum over H, which is put together in fixed order.
#include "picks.cuh"

constexpr int UP_WARPS = 4;
// Chunks of each matrix that a lane has in flight.
constexpr int UP_BATCH = !VEC || (sizeof(HIDDEN) == 4 && sizeof(WEIGHT) == 1) ? 1 : sizeof(HIDDEN) == 4 ? 2 : 4;
// Blocks on a multiprocessor: the 704 of a token are all there at once, on 132 multiprocessors as on 148.
#if __CUDA_ARCH__ >= 1000
constexpr int UP_BLOCKS = sizeof(HIDDEN) == 2 ? 5 : 3;
#else
constexpr int UP_BLOCKS = sizeof(HIDDEN) == 2 ? 6 : 3;
#endif

struct UpShared {
    int ids[MAX_PICKS];
    int slots[UP_WARPS][SLOTS];
    const HIDDEN* rows[UP_WARPS][SLOTS];
    float sums[UP_WARPS][2][SLOTS][COLUMNS];
};

// hidden   [T, H] HIDDEN, rows `stride_hidden` apart
// gate_up  [E, 2I, H] WEIGHT, experts `stride_expert` and rows `stride_row` apart
// scale    [E, 2I] float32, contiguous; or null
// ids      [N] int64 (`wide_ids`) or int32
// h        [N, I] HIDDEN, rows `stride_h` apart, written; rows of sentinels are left alone
extern "C" __global__ void __launch_bounds__(UP_WARPS* WARP, UP_BLOCKS)
    decode_up(const HIDDEN* hidden, const WEIGHT* gate_up, const float* scale, const void* ids, HIDDEN* h, i64 N, i64 top_k,
              i64 E, i64 H, i64 I, i64 stride_hidden, i64 stride_expert, i64 stride_row, i64 stride_h, i64 wide_ids,
              i64 activation) {
    __shared__ UpShared shared;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, pick = blockIdx.y, picks = int(N);
    let_next_grid_start();
    for (int i = threadIdx.x; i < picks; i += UP_WARPS * WARP) shared.ids[i] = load_id(ids, wide_ids, i, E);
    __syncthreads();
    const int expert = shared.ids[pick];
    if (expert < 0) return;

    const i64 column = i64(blockIdx.x) * COLUMNS;
    const i64 row = column + lane / 4 < I ? column + lane / 4 : I - 1;  // rows past the end repeat the last, unused
    const WEIGHT* gate_row = gate_up + expert * stride_expert + row * stride_row;
    const WEIGHT* const weights[2] = {gate_row, gate_row + I * stride_row};
    const int steps = int((H + STEP<WEIGHT> - 1) / STEP<WEIGHT>), share = (steps + UP_WARPS - 1) / UP_WARPS;
    const int begin = warp * share, end = begin + share < steps ? begin + share : steps;

    ROLLED for (int done = 0;; done += SLOTS) {
        int first;
        const int total = find_picks(shared.ids, picks, expert, done, shared.slots[warp], first);
        if (first < pick) return;  // another block's
        const int count = total - done < SLOTS ? total - done : SLOTS;
        if (lane < count) shared.rows[warp][lane] = hidden + shared.slots[warp][lane] / int(top_k) * stride_hidden;
        __syncwarp();
        Dot<HIDDEN, WEIGHT, VEC, 2, UP_BATCH> dot;
        dot.run(weights, shared.rows[warp], count, begin, end, int(H), false);
        dot.each(count, [&](int matrix, int slot, int c, float sum) { shared.sums[warp][matrix][slot][c] = sum; });
        __syncthreads();

        const int slot = threadIdx.x / COLUMNS, c = threadIdx.x % COLUMNS;
        if (slot < count && column + c < I) {
            float gate = 0.0f, up = 0.0f;
            UNROLL for (int w = 0; w < UP_WARPS; ++w) gate += shared.sums[w][0][slot][c];
            UNROLL for (int w = 0; w < UP_WARPS; ++w) up += shared.sums[w][1][slot][c];
            if (scale) {
                const float* scales = scale + expert * 2 * I + column + c;
                gate *= load(scales);
                up *= load(scales + I);
            }
            HIDDEN value;
            from_float(activate(gate, int(activation)) * up, value);
            store(h + shared.slots[warp][slot] * stride_h + column + c, value);
        }
        if (done + SLOTS >= total) return;
        __syncthreads();
    }
}

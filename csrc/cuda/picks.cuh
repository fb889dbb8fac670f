// The routing of a decode step: N = T K picks, of which each block looks for those that share an expert.
#pragma once

#include "device.cuh"
#include "dot.cuh"

constexpr int MAX_PICKS = 256;  // 16 tokens of 16 picks

// An expert's number, or -1 where it is not in [0, E): a sentinel of expert parallelism, which contributes nothing.
DEVICE int load_id(const void* ids, bool wide, int i, i64 E) {
    const i64 id = wide ? load(static_cast<const i64*>(ids) + i) : load(static_cast<const int*>(ids) + i);
    return id >= 0 && id < E ? int(id) : -1;
}

// How many picks chose `expert`, and in `slots` those of rank begin..begin+15, ascending; `first` is that of rank 0.
// Called by whole warps, with a list of slots for each.
DEVICE int find_picks(const int* ids, int N, int expert, int begin, int* slots, int& first) {
    const int lane = threadIdx.x % WARP;
    int total = 0;
    first = N;
    ROLLED for (int start = 0; start < N; start += WARP) {
        const bool hit = start + lane < N && ids[start + lane] == expert;
        const u32 mask = __ballot_sync(ALL_LANES, hit);
        if (mask && !total) first = start + __ffs(mask) - 1;
        const int rank = total + __popc(mask & ((1u << lane) - 1u));
        if (hit && rank >= begin && rank < begin + SLOTS) slots[rank - begin] = start + lane;
        total += __popc(mask);
    }
    __syncwarp();
    return total;
}

// Lists the first pick of each expert, ascending, and returns their number. `found` has a place for each 32 picks.
// Called by whole blocks.
DEVICE int find_leaders(const int* ids, int N, int* leaders, int* found) {
    const int lane = threadIdx.x % WARP, rounds = (N + WARP - 1) / WARP, warps = blockDim.x / WARP;
    for (int pass = 0; pass < 2; ++pass) {
        for (int round = threadIdx.x / WARP; round < rounds; round += warps) {
            const int own = round * WARP + lane;
            bool leads = own < N && ids[own] >= 0;
            for (int i = 0; leads && i < own; ++i) leads = ids[i] != ids[own];
            const u32 mask = __ballot_sync(ALL_LANES, leads);
            if (pass == 0) {
                if (lane == 0) found[round] = __popc(mask);
            } else if (leads) {
                int before = 0;
                for (int i = 0; i < round; ++i) before += found[i];
                leaders[before + __popc(mask & ((1u << lane) - 1u))] = own;
            }
        }
        __syncthreads();
    }
    int total = 0;
    for (int i = 0; i < rounds; ++i) total += found[i];
    return total;
}

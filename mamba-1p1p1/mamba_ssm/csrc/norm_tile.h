// What the forward and the backward normalisation share: TEAM threads take one row, a warp or, where rows are long, the
// whole block. Each thread has ROUNDS packs of VEC neighbouring elements, TEAM * VEC apart, kept in registers from the
// first read to the last write.
#pragma once

#include "device.h"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / 32;

template <int TEAM> struct RowTeam {
    static constexpr int ROWS = THREADS / TEAM;  // that a block has at once
    float *parts;                                // [WARPS], shared

    static DEVICE int64 first_row() { return int64(blockIdx.x) * ROWS + threadIdx.x / TEAM; }
    static DEVICE int64 row_step() { return int64(gridDim.x) * ROWS; }

    // Over all that have the row, in one order.
    DEVICE float sum(float x) const {
        float one[1] = {x};
        sum_over_lanes<1, 32, 1>(one, threadIdx.x);
        if constexpr (TEAM > 32) {
            __syncthreads();
            if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = one[0];
            __syncthreads();
            one[0] = 0.f;
#pragma unroll
            for (int warp = 0; warp < WARPS; warp++) one[0] += parts[warp];
        }
        return one[0];
    }
};

template <int VEC, int ROUNDS, int TEAM> struct RowPart {
    float v[ROUNDS][VEC];

    static DEVICE int first(int round) { return (round * TEAM + threadIdx.x % TEAM) * VEC; }

    template <class T> DEVICE void read(const T *row, int size) {
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) {
            if (first(r) < size) {
                const Pack<T, VEC> pack = *reinterpret_cast<const Pack<T, VEC> *>(row + first(r));
#pragma unroll
                for (int i = 0; i < VEC; i++) v[r][i] = to_float(pack.v[i]);
            } else {
#pragma unroll
                for (int i = 0; i < VEC; i++) v[r][i] = 0.f;
            }
        }
    }
    template <class T> DEVICE void write(T *row, int size) const {
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) {
            if (first(r) >= size) continue;
            Pack<T, VEC> pack;
#pragma unroll
            for (int i = 0; i < VEC; i++) pack.v[i] = from_float<T>(v[r][i]);
            *reinterpret_cast<Pack<T, VEC> *>(row + first(r)) = pack;
        }
    }
    // Calls f(value, round, place in its pack) for every element that the row has.
    template <class F> DEVICE void each(int size, F f) {
#pragma unroll
        for (int r = 0; r < ROUNDS; r++)
#pragma unroll
            for (int i = 0; i < VEC; i++)
                if (first(r) + i < size) f(v[r][i], r, i);
    }
};

// What the forward and the backward normalisation share: one warp takes one row, each lane ROUNDS packs of VEC
// neighbouring elements, 32 * VEC apart, kept in registers from the first read to the last write.
#pragma once

#include "device.h"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / 32;

DEVICE float sum_over_warp(float x) {
    float one[1] = {x};
    sum_over_lanes<1, 32, 1>(one, threadIdx.x);
    return one[0];
}

template <int VEC, int ROUNDS> struct RowPart {
    float v[ROUNDS][VEC];

    static DEVICE int first(int round) { return (round * 32 + threadIdx.x % 32) * VEC; }

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

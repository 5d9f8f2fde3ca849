// The C interface of the mixer over pooled lines: per function one argument, a struct of 64-bit integers (addresses, sizes,
// strides in elements; factors as the bits of a double). Python reads the structs from here
// (causal_conv1d/native.py).
#pragma once

#include <cstdint>
#include <cstring>

#include "tokens_abi.h"

inline double double_of(int64_t bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// A grid of tokens with up to three axes, in the order in which they are walked, the last one fastest; the last are 1 long
// where there are fewer. Tokens that differ only in where they are along pooled axes are one group. Groups are numbered as
// the walk meets them; their stride is 0 along pooled axes.
struct Lines {
    int64_t sizes[3], strides[3], group_strides[3], count;

    int64_t tokens() const { return sizes[0] * sizes[1] * sizes[2]; }
    // Stretches of the walk, of equal length, that share no group.
    int64_t stretches() const { return group_strides[0] ? sizes[0] : 1; }
    // The token at a place of the walk, and its group.
    int64_t walked(int64_t place) const { return sum_along(place, strides); }
    int64_t group_at(int64_t place) const { return sum_along(place, group_strides); }
    int64_t sum_along(int64_t place, const int64_t *along) const {
        const int64_t line = place / sizes[2];
        return place % sizes[2] * along[2] + line % sizes[1] * along[1] + line / sizes[1] * along[0];
    }
};

// One direction of the convolution: contiguous float32 (dim, width), (dim,), (dim,); bias is 0 where there is none.
struct Taps {
    int64_t weight, bias, D;
};

struct PooledConvArgs {
    int64_t batch, dim, dtype, width, scale, threads;
    Lines lines;
    Tokens x;
    Taps forward, backward;
    // contiguous, in x's dtype: (batch, tokens, dim), (batch, lines, dim), (batch, lines, dim)
    int64_t skip, pooled_forward, pooled_backward;
};

// One direction's projections, contiguous float32: (rank + 2 * dstate, dim), (dim, rank), (dim,), (dim, dstate).
struct Projections {
    int64_t x_proj, dt_proj, dt_bias, A_log;
};

struct PooledScanArgs {
    int64_t batch, dim, lines, dtype, rank, dstate, threads;
    Projections forward, backward;
    int64_t groups_forward, groups_backward, out;  // contiguous, in one dtype: (batch, lines, dim) each
};

struct PooledGateArgs {
    int64_t batch, dim, dtype, share, eps, threads;
    Lines lines;
    Tokens z;
    int64_t weight, bias;         // contiguous float32 (dim,); weight is 0 where there is no norm
    int64_t skip, groups, out;  // contiguous, in one dtype: (batch, tokens, dim), (batch, lines, dim), (batch, tokens, dim)
};

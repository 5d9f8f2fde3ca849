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

// A grid of tokens cut into lines: token k of line g is token g * length + k or, across, token k * lines + g.
struct Lines {
    int64_t count, length, across;

    int64_t tokens() const { return count * length; }
    // The token at a place of the walk from line to line.
    int64_t walked(int64_t place) const { return across ? place % length * count + place / length : place; }
    int64_t line_of(int64_t token) const { return across ? token % count : token / length; }
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

// The C interface of the mixer over the visible tokens of lines: per function one argument, a struct of 64-bit integers
// (addresses, sizes, strides in elements; factors as the bits of a double). Python reads the structs from here
// (causal_conv1d/native.py).
#pragma once

#include <cstdint>

#include "pooled_abi.h"
#include "tokens_abi.h"

// The visible tokens of every image, walked from line to line. Both contiguous: order (batch, tokens), the token at each
// place of the walk, or 0 where tokens are walked as they stand; starts (batch, count + 1), the place at which each line
// begins, and behind the last one the number of tokens.
struct VisibleLines {
    int64_t count, tokens, order, starts;

    int64_t walked(int64_t batch, int64_t place) const {
        return order ? reinterpret_cast<const int64_t *>(order)[batch * tokens + place] : place;
    }
    const int64_t *starts_of(int64_t batch) const {
        return reinterpret_cast<const int64_t *>(starts) + batch * (count + 1);
    }
};

struct VisibleConvArgs {
    int64_t batch, dim, dtype, width, factor, threads;  // a line's pooled token is factor times the sum of its tokens
    VisibleLines lines;
    Tokens x;
    Taps forward, backward;
    // contiguous, in x's dtype: (batch, tokens, dim), (batch, count, dim), (batch, count, dim)
    int64_t skip, pooled_forward, pooled_backward;
};

// Where the gradients of one direction's Taps go: contiguous float32, of their shapes; bias is 0 where there is none.
struct TapsGradient {
    int64_t weight, bias, D;
};

struct VisibleConvBackwardArgs {
    int64_t batch, dim, dtype, width, factor, threads;
    VisibleLines lines;
    Tokens x;
    Taps forward, backward;
    // contiguous, in x's dtype, as in VisibleConvArgs
    int64_t dskip, dpooled_forward, dpooled_backward;
    Tokens dx;
    TapsGradient dforward, dbackward;
};

struct VisibleGateArgs {
    int64_t batch, dim, dtype, share, eps, threads;
    VisibleLines lines;
    Tokens z;
    int64_t weight, bias;       // contiguous float32 (dim,); weight is 0 where there is no norm
    int64_t skip, groups, out;  // contiguous, in z's dtype: (batch, tokens, dim), (batch, count, dim), (batch, tokens, dim)
};

struct VisibleGateBackwardArgs {
    int64_t batch, dim, dtype, share, eps, threads;
    VisibleLines lines;
    Tokens z;
    int64_t weight, bias;
    int64_t skip, groups, dout;   // as in VisibleGateArgs; dout as out
    int64_t dskip, dgroups;       // as skip and groups
    Tokens dz;
    int64_t dweight, dbias;       // contiguous float32 (dim,), or 0
    int64_t gated;                // what VisibleGateArgs calls out, written anew; or 0
};

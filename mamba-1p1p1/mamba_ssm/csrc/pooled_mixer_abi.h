// The C interface of the whole mixer over pooled lines, from in_proj to out_proj, float32: per function one argument, a struct
// of 64-bit integers (addresses, sizes, strides in elements; factors as the bits of a double). Python reads the structs from
// here (causal_conv1d/native.py).
#pragma once

#include <cstdint>

#include "directions_abi.h"
#include "pooled_abi.h"
#include "tokens_abi.h"
#include "visible_abi.h"

// in_proj (2 * dim, width), convolutions and means over `lines`, the scans `between` over these, sum, norm and gate, out_proj
// (width, dim).
struct PooledMixerArgs {
    DirectionsArgs between;
    int64_t width, taps, scale, share, eps;
    Lines lines;
    Tokens x;  // (batch, tokens, width)
    Linear in_proj, out_proj;
    int64_t norm_weight, norm_bias;  // (dim,); weight is 0 where there is no norm
    Taps forward, backward;
    int64_t out;  // contiguous (batch, tokens, width)
    // Written for the gradients, or 0, as what `between` writes is then, both means, to its x, among it: contiguous (batch,
    // tokens, 2 * dim), (batch, tokens, dim).
    int64_t xz, skip;
};

// What is kept is read. `of_gate` and `of_taps` are the tokens of any image, walked line by line and as the convolutions walk
// them; where these are not the same lines, every token is one of its own in the latter. What is written is contiguous; the
// norm's gradients are 0 where its parameters are.
struct PooledMixerBackwardArgs {
    DirectionsBackwardArgs between;
    EndsBackward ends;
    int64_t taps, share, eps;
    Lines lines;
    VisibleLines of_gate, of_taps;
    int64_t factor;  // a mean is so many times the sum of its tokens
    int64_t norm_weight, norm_bias;
    Taps forward, backward;
    int64_t xz, skip, scanned;
    TapsGradient dforward, dbackward;
    int64_t dnorm_weight, dnorm_bias;
};

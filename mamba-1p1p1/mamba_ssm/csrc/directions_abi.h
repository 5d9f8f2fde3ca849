// The C interface of a mixer between its projections: one argument, a struct of 64-bit integers (addresses, sizes, strides in
// elements). Python reads the structs from here (causal_conv1d/native.py).
#pragma once

#include <cstdint>

#include "tokens_abi.h"

// One direction's weights, contiguous float32; biases and D that are 0 are not there. Without convolution x is what is scanned,
// contiguous.
struct DirectionWeights {
    Tokens x;
    int64_t reverse;
    int64_t conv, conv_bias;  // (dim, width), (dim,)
    int64_t x_proj, dt_proj;  // (rank + 2 dstate, dim), (dim, rank)
    int64_t dt_bias, A, D;    // (dim,), (dim, dstate), (dim,)
    int64_t x_dbl;            // written: (batch, seqlen, rank + 2 dstate)
    int64_t states;           // written, if it is there: as ScanArgs has them
};

// out (batch, seqlen, dim) = share * sum over directions of scan(conv(x)) * silu(z), or without the gate.
struct DirectionsArgs {
    int64_t batch, dim, seqlen, dstate, rank, width, directions, threads, interval;
    int64_t log_decay;  // A holds log(-A)
    int64_t share;      // the bits of a double
    int64_t mask;   // contiguous (batch, seqlen), which tokens are multiplied with before and after the convolution; or 0
    Tokens z;
    int64_t out;  // contiguous
    DirectionWeights first, second;
};

// The whole mixer: in_proj (2 * dim, width), `between`, out_proj (width, dim). The tokens of `between` and its out are not
// given.
struct MixerArgs {
    DirectionsArgs between;
    int64_t width;
    Tokens x;  // (batch, seqlen, width)
    Linear in_proj, out_proj;
    int64_t out;  // contiguous (batch, seqlen, width)
    // Written for the gradients, or 0, as x_dbl and states are then: contiguous (batch, seqlen, 2 * dim), and (batch, seqlen,
    // dim), before it is gated; with gates (batch, directions, seqlen, dim).
    int64_t xz, y;
    int64_t gates;  // contiguous (batch, directions), which what each direction gives is multiplied with; or 0
    // Without gradients and gates: contiguous (batch, directions) of bytes, 0 for the directions that an image does without;
    // or 0. What does without all has zeros.
    int64_t runs;
};

// Gradients of one direction's weights, contiguous float32, like them; 0 where the weight is.
struct DirectionGradients {
    Tokens x;  // where both directions have one convolution's x, the second adds to it
    int64_t conv, conv_bias, x_proj, dt_proj, dt_bias, A, D;
};

// Of `forward`, whose x_dbl and states are read and whose out is 0; `A` with log_decay is the gradient of what A holds.
struct DirectionsBackwardArgs {
    DirectionsArgs forward;
    Tokens dout, dz;
    int64_t dmask;  // added to: contiguous (batch, seqlen); there where the mask is
    int64_t gates;  // as MixerArgs has them, or 0
    DirectionGradients first, second;
};

// A mixer's outer projections, backwards. What is written is contiguous, and 0 where it is not wanted.
struct EndsBackward {
    int64_t width;
    Tokens x, dout;  // (batch, tokens, width)
    int64_t in_proj, out_proj;
    int64_t dx;      // (batch, tokens, width)
    Linear din_proj, dout_proj;
};

// Of the whole mixer, whose xz and y are read: `between` is not given the tokens.
struct MixerBackwardArgs {
    DirectionsBackwardArgs between;
    EndsBackward ends;
    int64_t xz, y;
    int64_t dgates;  // contiguous (batch, directions); there where the gates are
};

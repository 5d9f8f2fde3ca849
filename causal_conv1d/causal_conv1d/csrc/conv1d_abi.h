// The C interface of the convolution: one argument, a struct of 64-bit integers (addresses, sizes, strides in elements).
// Python reads the structs from here (causal_conv1d/native.py).
#pragma once

#include <cstdint>

// (batch, dim, seqlen) with stride 1 along dim or along seqlen; data is 0 where there is none.
struct ConvSignal {
    int64_t data, dtype, batch_stride, channel_stride, step_stride;
};

struct ConvArgs {
    int64_t batch, dim, seqlen, width, silu, reverse, threads, channel_last;
    int64_t accumulate;  // add to what dx holds
    ConvSignal x, out;
    int64_t weight, bias;  // contiguous float32 (dim, width), (dim,); bias is 0 where there is none
    // backward only; out is 0 then
    ConvSignal dout, dx;
    int64_t dweight, dbias;
};

struct ConvUpdateArgs {
    int64_t batch, dim, width, silu;
    int64_t x, x_dtype, x_batch_stride, x_channel_stride;
    int64_t state, state_dtype, state_batch_stride, state_channel_stride, state_step_stride;
    int64_t out;  // contiguous (batch, dim), in x's dtype
    int64_t weight, bias;
};

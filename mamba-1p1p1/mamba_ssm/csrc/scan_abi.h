// The C interface of the scan: one argument, a struct of 64-bit integers (addresses, sizes, strides in elements).
// Python reads the structs from here (causal_conv1d/native.py).
#pragma once

#include <cstdint>
#include <cstring>

// (batch, dim, seqlen); data is 0 where there is none.
struct Signal {
    int64_t data, dtype, batch_stride, channel_stride, step_stride;
};

// (batch, groups, dstate, seqlen), or, not varying, contiguous float32 (dim, dstate).
struct Matrix {
    int64_t varies, data, dtype, batch_stride, group_stride, state_stride, step_stride;
};

struct ScanArgs {
    int64_t batch, dim, seqlen, dstate, groups, softplus, reverse, threads;
    int64_t interval;    // steps from one saved state to the next
    int64_t accumulate;  // add to what out (before its gate) or dz holds
    int64_t share;       // what out is multiplied with in the end: the bits of a double
    Signal u, delta, z, out;
    Matrix B, C;
    int64_t A, D, delta_bias;    // contiguous float32: (dim, dstate), (dim,), (dim,)
    int64_t last_state, states;  // either may be 0; contiguous float32: (batch, dim, dstate); (batch, ceil(seqlen/interval)-1, dstate, dim)
    // backward only; out and last_state are 0 then
    Signal dout, du, ddelta, dz;
    Matrix dB, dC;
    int64_t dA, dD, ddelta_bias;

    float share_value() const {
        double value;
        std::memcpy(&value, &share, sizeof value);
        return float(value);
    }
};

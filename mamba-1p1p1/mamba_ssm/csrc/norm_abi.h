// The C interface of residual addition and normalisation: one argument, a struct of 64-bit integers (addresses, sizes,
// strides in elements; eps as the bits of a double). Python reads the structs from here (causal_conv1d/native.py).
#pragma once

#include <cstdint>
#include <cstring>

// (rows, size) with stride 1 along size; data is 0 where there is none.
struct Rows {
    int64_t data, dtype, stride;
};

struct NormArgs {
    int64_t rows, size, rms, eps, threads;
    Rows x, residual, out, total;
    int64_t weight, bias, mean, scale;  // contiguous float32 (size,), (size,), (rows,), (rows,); bias may be 0
    // backward only; x, residual, out are absent then
    Rows dout, dtotal, dx, dresidual;
    int64_t dweight, dbias;  // contiguous float32 (size,)

    double eps_value() const {
        double value;
        std::memcpy(&value, &eps, sizeof value);
        return value;
    }
};

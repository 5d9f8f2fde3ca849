// The C interface of the matrix product: one argument, a struct of 64-bit integers (addresses, sizes, strides in elements).
// Python reads the structs from here (causal_conv1d/native.py).
#pragma once

#include <cstdint>

// float32; one of the strides is 1.
struct Factor {
    int64_t data, row_stride, column_stride;
};

// c = a b + bias, or, if `accumulate`, c += a b: a (rows, depth), b (depth, columns), bias (columns,) or 0, c (rows,
// columns) with stride 1 along a row.
struct GemmArgs {
    int64_t rows, columns, depth, threads, accumulate;
    Factor a, b;
    int64_t bias, c, c_stride;
};

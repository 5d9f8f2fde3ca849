// A sequence of tokens, as the C interfaces take it.
#pragma once

#include <cstdint>

// (batch, tokens, dim) with stride 1 along dim; strides in elements.
struct Tokens {
    int64_t data, batch_stride, token_stride;
};

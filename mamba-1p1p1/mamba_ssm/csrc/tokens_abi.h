// A sequence of tokens, and a linear layer of them, as the C interfaces take them.
#pragma once

#include <cstdint>

// (batch, tokens, dim) with stride 1 along dim; strides in elements.
struct Tokens {
    int64_t data, batch_stride, token_stride;
};

// Contiguous float32 (out, in) and (out,); bias is 0 where there is none.
struct Linear {
    int64_t weight, bias;
};

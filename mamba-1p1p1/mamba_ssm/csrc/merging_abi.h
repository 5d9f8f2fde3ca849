// The C interface of token merging: per function one argument, a struct of 64-bit integers (addresses, sizes, strides in
// elements). Python reads the structs from here (causal_conv1d/native.py).
#pragma once

#include <cstdint>

#include "tokens_abi.h"

// Among the tokens that are no class tokens, set a is those at even places, or at odd ones if `odd_first`; set b is the
// others. `fused` of set a become one with a token of set b each.
struct MatchArgs {
    int64_t batch, tokens, channels, dtype, threads;
    int64_t fused, classes, odd_first, raster, sorted;
    Tokens x;
    int64_t cls, cls_stride;  // int64 (batch, classes), rising
    int64_t moved;            // int64 (classes), where they go, rising; negative for its own place among the tokens left
    // contiguous: int64 (batch, tokens), bool (batch, tokens), int64 (batch, tokens - fused), int64 (batch, classes)
    int64_t slot, kept, count, places;

    int64_t patches() const { return tokens - classes; }
    int64_t in_a() const { return (patches() + 1 - odd_first) / 2; }
    int64_t in_b() const { return patches() - in_a(); }
    const int64_t *classes_of(int64_t image) const {
        return reinterpret_cast<const int64_t *>(cls) + image * cls_stride;
    }
    // The index in the sequence of patch token `patch`.
    int64_t index_of(int64_t image, int64_t patch) const {
        for (int64_t k = 0; k < classes; ++k) patch += patch >= classes_of(image)[k];
        return patch;
    }
};

struct MergeArgs {
    int64_t batch, tokens, left, channels, dtype, threads;
    Tokens x;
    int64_t slot, count, out;  // contiguous: int64 (batch, tokens), int64 (batch, left), x's dtype (batch, left, channels)
};

// The gradient of x: what its group's mean has, `dout` (batch, left, channels), over the size of the group.
struct MergeBackwardArgs {
    int64_t batch, tokens, left, channels, dtype, threads;
    Tokens dout;
    int64_t slot, count, dx;  // contiguous, as in MergeArgs; dout's dtype (batch, tokens, channels)
};

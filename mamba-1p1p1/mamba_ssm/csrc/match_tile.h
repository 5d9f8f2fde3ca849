// Which tokens of a sequence are patches, and which of those are set a and set b of a matching.
#pragma once

#include "device.h"

constexpr int THREADS = 128;

struct Patches {
    const int64 *cls;  // (batch or 1, classes), rising: where class tokens are
    int64 cls_batch;   // its stride, 0 if all images share them
    int classes, odd_first, in_a, in_b;

    DEVICE int count() const { return in_a + in_b; }
    DEVICE int of_a(int i) const { return 2 * i + odd_first; }
    DEVICE int of_b(int j) const { return 2 * j + 1 - odd_first; }
    DEVICE bool is_a(int patch) const { return patch % 2 == odd_first; }
    // The index in the sequence of a patch token.
    DEVICE int64 index_of(int64 image, int patch) const {
        const int64 *own = cls + image * cls_batch;
        int64 index = patch;
        for (int k = 0; k < classes; k++) index += index >= own[k];
        return index;
    }
};

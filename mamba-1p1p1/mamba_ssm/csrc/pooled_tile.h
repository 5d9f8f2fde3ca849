// A token grid of three axes, walked in their order, whose pooled axes become one token (mamba_ssm.kernels.arguments.Lines).
#pragma once

#include "device.h"

struct Lines {
    int size[3];          // of the axes, in the order of the walk
    int stride[3];        // how far apart in the sequence two neighbours along each are
    int group_stride[3];  // the same in the sequence of groups; 0 for a pooled axis
    int groups, tokens;

    // Where the t-th token of the walk stands in the sequence.
    DEVICE int place(int t) const {
        const int rows = t / size[2];
        return rows / size[1] * stride[0] + rows % size[1] * stride[1] + t % size[2] * stride[2];
    }
    // The group of the token that stands at `place` in the sequence.
    DEVICE int group_of(int place) const {
        int group = 0;
#pragma unroll
        for (int axis = 0; axis < 3; axis++) {
            if (size[axis] > 1) group += place / stride[axis] % size[axis] * group_stride[axis];
        }
        return group;
    }
};

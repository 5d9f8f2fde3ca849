// Second pass over a split sequence: from the state each split ends with when started from zero to the state it starts
// from, in place. One thread walks the splits of one state, so the order of the sums is always the same.
//
// KERNEL_ARGUMENTS: whether the splits are walked backwards.
#include "scan_tile.h"

struct CarryDirection {
    const float *A;        // (dim, dstate)
    float *states;         // (batch, splits, dim, dstate)
    const float *dt_sums;  // (batch, splits, dim)
};

struct CarryParams {
    CarryDirection direction[2];
    Sizes sizes;
};

template <bool BACKWARDS> DEVICE void carry_states(const CarryParams &p) {
    const Sizes &sizes = p.sizes;
    const CarryDirection &d = p.direction[blockIdx.z];
    const int states = sizes.dim * sizes.dstate;
    const int index = blockIdx.x * THREADS + threadIdx.x;
    if (index >= states) return;
    const int channel = index / sizes.dstate;
    const float A = decay_rate(d.A[index], sizes) * shared_math::LOG2_E;
    for (int b = blockIdx.y; b < sizes.batch; b += gridDim.y) {
        float carried = 0.f;
        for (int i = 0; i < sizes.splits; i++) {
            const int64 split = int64(b) * sizes.splits + (BACKWARDS ? sizes.splits - 1 - i : i);
            float *at = d.states + split * states + index;
            const float ends_with = *at;
            *at = carried;
            if (i == sizes.splits - 1) break;
            // A decay that overflows must not turn a state of zero into NaN.
            const float decayed = carried == 0.f ? 0.f : carried * fast_exp2(A * d.dt_sums[split * sizes.dim + channel]);
            carried = decayed + ends_with;
        }
    }
}

KERNEL(scan_carry, CarryParams, THREADS, 4) { carry_states<KERNEL_ARGUMENTS>(p); }

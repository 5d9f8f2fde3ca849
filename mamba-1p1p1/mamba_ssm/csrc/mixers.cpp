// Mixers for CPUs, between their projections and whole, over all tokens and over pooled lines: a C interface without torch.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <optional>

#include "conv1d_abi.h"
#include "directions_abi.h"
#include "gemm_abi.h"
#include "images.h"
#include "isa.h"
#include "memory.h"
#include "parallel.h"
#include "pooled_mixer_abi.h"
#include "scan_abi.h"

#define KERNELS "pooled_mixer_kernels.h"
#include "each_isa.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// Zero, or one where there was no memory.
EXPORT int mamba_directions(const DirectionsArgs *args) { return ISA_CALL(directions_forward, *args); }
EXPORT int mamba_mixer(const MixerArgs *args) { return ISA_CALL(mixer_forward, *args); }
EXPORT int mamba_directions_backward(const DirectionsBackwardArgs *args) {
    return ISA_CALL(directions_backward, *args);
}
EXPORT int mamba_mixer_backward(const MixerBackwardArgs *args) { return ISA_CALL(mixer_backward, *args); }
EXPORT int mamba_pooled_mixer(const PooledMixerArgs *args) { return ISA_CALL(pooled_mixer, *args); }
EXPORT int mamba_pooled_mixer_backward(const PooledMixerBackwardArgs *args) { return ISA_CALL(pooled_mixer_backward, *args); }

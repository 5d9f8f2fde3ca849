// The convolution for CPUs: a C interface without torch.
#include <cstdlib>

#include "conv1d_abi.h"
#include "isa.h"
#include "parallel.h"

#define KERNELS "conv1d_kernels.h"
#include "each_isa.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// Zero, or not zero where there was no memory.
EXPORT int causal_conv1d(const ConvArgs *args) { return ISA_CALL(convolution, *args); }
EXPORT int causal_conv1d_one_step(const ConvUpdateArgs *args) { return ISA_CALL(convolution_update, *args); }
EXPORT int kernel_isa(int level) { return isa::limit(level); }

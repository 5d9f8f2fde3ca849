// Residual addition and normalisation for CPUs: a C interface without torch.
#include <algorithm>
#include <cstdlib>

#include "isa.h"
#include "norm_abi.h"
#include "parallel.h"

#define KERNELS "norm_kernels.h"
#include "each_isa.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int mamba_norm(const NormArgs *args) { return ISA_CALL(norm, *args); }

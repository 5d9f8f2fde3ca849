// Matrix products for CPUs: a C interface without torch.
#include <cstdlib>

#include "gemm_abi.h"
#include "isa.h"
#include "memory.h"
#include "parallel.h"

#define KERNELS "gemm_kernels.h"
#include "each_isa.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int mamba_gemm(const GemmArgs *args) { return ISA_CALL(gemm, *args); }

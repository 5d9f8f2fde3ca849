// The steps of a mixer over pooled lines for CPUs: a C interface without torch.
#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "isa.h"
#include "memory.h"
#include "parallel.h"
#include "pooled_abi.h"
#include "scan_abi.h"

#define KERNELS "pooled_kernels.h"
#include "each_isa.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int mamba_pooled_conv(const PooledConvArgs *args) { return ISA_CALL(pooled_conv, *args); }
EXPORT int mamba_pooled_scan(const PooledScanArgs *args) { return ISA_CALL(pooled_scan, *args); }
EXPORT int mamba_pooled_gate(const PooledGateArgs *args) { return ISA_CALL(pooled_gate, *args); }

// The selective scan for CPUs: a C interface without torch.
#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "isa.h"
#include "memory.h"
#include "parallel.h"
#include "scan_abi.h"

#define KERNELS "scan_cpu_kernels.h"
#include "each_isa.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// Zero, or one where a thread found no memory.
EXPORT int mamba_scan_forward(const ScanArgs *args) { return ISA_CALL(scan_forward, *args); }
EXPORT int mamba_scan_backward(const ScanArgs *args) { return ISA_CALL(scan_backward, *args); }
EXPORT int mamba_scan_args_bytes() { return sizeof(ScanArgs); }
EXPORT int kernel_isa(int level) { return isa::limit(level); }

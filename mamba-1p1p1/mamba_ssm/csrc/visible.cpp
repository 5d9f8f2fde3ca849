// The mixer over the visible tokens of lines for CPUs: a C interface without torch.
#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "isa.h"
#include "parallel.h"
#include "scan_abi.h"
#include "visible_abi.h"

#define KERNELS "visible_kernels.h"
#include "each_isa.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int mamba_visible_conv(const VisibleConvArgs *args) { return ISA_CALL(visible_conv, *args); }
EXPORT int mamba_visible_conv_backward(const VisibleConvBackwardArgs *args) {
    return ISA_CALL(visible_conv_backward, *args);
}
EXPORT int mamba_visible_gate(const VisibleGateArgs *args) { return ISA_CALL(visible_gate, *args); }
EXPORT int mamba_visible_gate_backward(const VisibleGateBackwardArgs *args) {
    return ISA_CALL(visible_gate_backward, *args);
}

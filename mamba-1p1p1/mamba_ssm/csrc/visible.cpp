// The mixer over the visible tokens of lines for CPUs: a C interface without torch.
#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "isa.h"
#include "memory.h"
#include "parallel.h"
#include "scan_abi.h"
#include "visible_abi.h"

#define KERNELS "visible_kernels.h"
#include "each_isa.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Whether the lines name only places and tokens that are there.
bool within(const VisibleLines &lines, int64_t batch) {
    const int64_t *order = reinterpret_cast<const int64_t *>(lines.order);
    for (int64_t i = 0; order && i < batch * lines.tokens; ++i)
        if (order[i] < 0 || order[i] >= lines.tokens) return false;
    for (int64_t b = 0; b < batch; ++b) {
        const int64_t *starts = lines.starts_of(b);
        for (int64_t line = 0; line < lines.count; ++line)
            if (starts[line] > starts[line + 1]) return false;
        if (starts[0] != 0 || starts[lines.count] != lines.tokens) return false;
    }
    return true;
}

}  // namespace

// Zero; 1 where there was no memory, 2 where the lines name what is not there.
EXPORT int mamba_visible_conv(const VisibleConvArgs *args) {
    return within(args->lines, args->batch) ? ISA_CALL(visible_conv, *args) : 2;
}
EXPORT int mamba_visible_conv_backward(const VisibleConvBackwardArgs *args) {
    return within(args->lines, args->batch) ? ISA_CALL(visible_conv_backward, *args) : 2;
}
EXPORT int mamba_visible_gate(const VisibleGateArgs *args) {
    return within(args->lines, args->batch) ? ISA_CALL(visible_gate, *args) : 2;
}
EXPORT int mamba_visible_gate_backward(const VisibleGateBackwardArgs *args) {
    return within(args->lines, args->batch) ? ISA_CALL(visible_gate_backward, *args) : 2;
}

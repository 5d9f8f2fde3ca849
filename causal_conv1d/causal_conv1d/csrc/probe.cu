// What is launched to see whether kernels run on a device at all: writes the number that it is given.
#include "device.h"

struct ProbeParams {
    int *to;
    int value;
};

KERNEL(probe, ProbeParams, 32, 1) {
    if (threadIdx.x == 0) *p.to = p.value;
}

#include "scan_kernels.h"
#include "scan_backward_kernels.h"

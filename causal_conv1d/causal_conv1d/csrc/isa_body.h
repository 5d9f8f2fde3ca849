// The body of one instruction set's namespace: headers of functions are compiled anew in each, so that the set's target
// holds for all of them.
#undef ACTIVATIONS_H
#undef SCAN_MATH_H
#undef SCAN_KERNELS_H
#include "activations.h"
#include "vec.h"
#include KERNELS

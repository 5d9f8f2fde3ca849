// Compiles KERNELS, a header, once per instruction set, each time inside a namespace of its own (avx512, avx2, plain) and
// with vec.h before it. Include the standard headers that KERNELS needs first: nothing of them may be compiled under a
// target pragma. `isa::call(...)` then picks the best that the processor has.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define ISA_X86 1
#include <immintrin.h>
#else
#define ISA_X86 0
#endif
// What `plain` is on aarch64, where every processor has it.
#if defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
#define ISA_NEON 1
#include <arm_neon.h>
#else
#define ISA_NEON 0
#endif

#if ISA_X86

// Tests may want the code for AVX-512 on a processor without: then it is compiled for AVX2.
#if defined(AVX512_EMULATED)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#include "avx512_emulated.h"
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define ISA_NAME avx512
#define ISA_LANES 16
#define ISA_AVX512 1
#define ISA_AVX2 0
namespace avx512 {
#include "isa_body.h"
}  // namespace avx512
#undef ISA_NAME
#undef ISA_LANES
#undef ISA_AVX512
#undef ISA_AVX2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define ISA_NAME avx2
#define ISA_LANES 8
#define ISA_AVX512 0
#define ISA_AVX2 1
namespace avx2 {
#include "isa_body.h"
}  // namespace avx2
#undef ISA_NAME
#undef ISA_LANES
#undef ISA_AVX512
#undef ISA_AVX2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // ISA_X86

#define ISA_NAME plain
#define ISA_LANES 4
#define ISA_AVX512 0
#define ISA_AVX2 0
namespace plain {
#include "isa_body.h"
}  // namespace plain
#undef ISA_NAME
#undef ISA_LANES
#undef ISA_AVX512
#undef ISA_AVX2

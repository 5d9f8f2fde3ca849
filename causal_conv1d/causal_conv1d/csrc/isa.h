// Which of the compiled instruction sets runs. Tests may lower it.
#pragma once

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <cpuid.h>
#endif

namespace isa {

enum Level { PLAIN = 0, AVX2 = 1, AVX512 = 2 };

inline Level best() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    // clang before 17 and GCC before 11 do not know this one by its name
    unsigned eax, ebx, ecx = 0, edx;
    bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c) {
#if defined(AVX512_EMULATED)
        return AVX512;
#else
        bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
        return wide ? AVX512 : AVX2;
#endif
    }
#endif
    return PLAIN;
}

inline Level &current() {
    static Level level = best();
    return level;
}

// Lowers (or restores) the level; returns the one in force, at most what the processor has.
inline Level limit(int level) {
    Level most = best();
    current() = level < most ? static_cast<Level>(level < 0 ? 0 : level) : most;
    return current();
}

}  // namespace isa

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define ISA_CALL(function, ...)                                       \
    (isa::current() == isa::AVX512 ? avx512::function(__VA_ARGS__)    \
     : isa::current() == isa::AVX2 ? avx2::function(__VA_ARGS__)      \
                                   : plain::function(__VA_ARGS__))
#else
#define ISA_CALL(function, ...) plain::function(__VA_ARGS__)
#endif

// What every CUDA kernel of the two packages starts from: scalar types, conversions, vector access, block-level helpers.
//
// The sources are compiled by NVRTC without any header of CUDA's, and, for tests on machines without a GPU, by a C++
// compiler under tests/cuda_emulator.h, which stands in for the language extensions and the few functions used here.
// Each .cu file holds one KERNEL(name, Params, threads, blocks_per_multiprocessor), whose only argument is a struct.
#pragma once

#ifdef __CUDACC_RTC__
#define KERNEL(name, Params, threads, ...) \
    extern "C" __global__ void __launch_bounds__(threads, (__VA_ARGS__)) name(const __grid_constant__ Params p)
#define SHARED_ARRAY(type, name, size) __shared__ __align__(16) type name[size]
#define SHARED_BYTES(name) extern __shared__ __align__(16) unsigned char name[]
#define DEVICE __device__ __forceinline__

DEVICE float half_to_float(unsigned short bits) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(bits));
    return result;
}
DEVICE unsigned short float_to_half(float x) {
    unsigned short result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(x));
    return result;
}
DEVICE float fast_exp2(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
// x, but computed anew where this stands: the compiler keeps nothing derived from it in registers across a loop.
DEVICE int unhoisted(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
#else
#include "cuda_emulator.h"
#endif

using int64 = long long;

struct Float16 {
    unsigned short bits;
};
struct BFloat16 {
    unsigned short bits;
};

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(Float16 x) { return half_to_float(x.bits); }
DEVICE float to_float(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

template <class T> DEVICE T from_float(float x);
template <> DEVICE float from_float<float>(float x) { return x; }
template <> DEVICE Float16 from_float<Float16>(float x) { return {float_to_half(x)}; }
template <> DEVICE BFloat16 from_float<BFloat16>(float x) {
    BFloat16 result;
#if defined(__CUDACC_RTC__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
#else
    unsigned bits = __float_as_uint(x);
    bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    result.bits = nan ? 0x7fff : static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
    return result;
}

// SIZE neighbouring elements, moved by one instruction where they are aligned to their whole size.
template <class T, int SIZE> struct alignas(sizeof(T) * SIZE) Pack {
    T v[SIZE];
};

template <int SIZE> DEVICE void load_floats(const float *from, float (&to)[SIZE]) {
    constexpr int STEP = SIZE % 4 == 0 ? 4 : SIZE % 2 == 0 ? 2 : 1;
#pragma unroll
    for (int i = 0; i < SIZE; i += STEP) {
        Pack<float, STEP> pack = *reinterpret_cast<const Pack<float, STEP> *>(from + i);
#pragma unroll
        for (int j = 0; j < STEP; j++) to[i + j] = pack.v[j];
    }
}

template <int SIZE> DEVICE void store_floats(float *to, const float (&from)[SIZE]) {
    constexpr int STEP = SIZE % 4 == 0 ? 4 : SIZE % 2 == 0 ? 2 : 1;
#pragma unroll
    for (int i = 0; i < SIZE; i += STEP) {
        Pack<float, STEP> pack;
#pragma unroll
        for (int j = 0; j < STEP; j++) pack.v[j] = from[i + j];
        *reinterpret_cast<Pack<float, STEP> *>(to + i) = pack;
    }
}

template <class T, int SIZE> DEVICE void unpack(const Pack<T, SIZE> &pack, float (&to)[SIZE]) {
#pragma unroll
    for (int i = 0; i < SIZE; i++) to[i] = to_float(pack.v[i]);
}

template <class T, int SIZE> DEVICE Pack<T, SIZE> pack_as(const float (&from)[SIZE]) {
    Pack<T, SIZE> pack;
#pragma unroll
    for (int i = 0; i < SIZE; i++) pack.v[i] = from_float<T>(from[i]);
    return pack;
}

constexpr unsigned WHOLE_WARP = 0xffffffffu;

// Sums COUNT values over the WIDTH lanes of a warp whose index differs in the bits of STRIDE * (WIDTH - 1), in an order
// that depends on nothing but the lane. Afterwards, with l = (lane / STRIDE) % WIDTH: if COUNT >= WIDTH, v[i] is the sum
// of element l * (COUNT / WIDTH) + i for i < COUNT / WIDTH; else v[0] is the sum of element l / (WIDTH / COUNT).
template <int COUNT, int WIDTH, int STRIDE, int SIZE> DEVICE void sum_over_lanes(float (&v)[SIZE], int lane) {
    if constexpr (WIDTH > 1) {
        constexpr int MASK = STRIDE * (WIDTH / 2);
        if constexpr (COUNT > 1) {
            bool upper = (lane & MASK) != 0;
#pragma unroll
            for (int i = 0; i < COUNT / 2; i++) {
                float given = upper ? v[i] : v[i + COUNT / 2];
                float kept = upper ? v[i + COUNT / 2] : v[i];
                v[i] = kept + __shfl_xor_sync(WHOLE_WARP, given, MASK);
            }
            sum_over_lanes<COUNT / 2, WIDTH / 2, STRIDE>(v, lane);
        } else {
            v[0] += __shfl_xor_sync(WHOLE_WARP, v[0], MASK);
            sum_over_lanes<1, WIDTH / 2, STRIDE>(v, lane);
        }
    }
}

// The machine that activations.h and scan_math.h are given here: one float per thread.
struct Thread {
    using V = float;
    static DEVICE float set(float x) { return x; }
    static DEVICE float exp2(float x) { return fast_exp2(x); }
    // The polynomial of least relative error, 5e-9, on [0, 1], by iterated weighted least squares in float64.
    static DEVICE float log1p(float x) {
        float p = -0.0032439841888844967f;
        p = fmaf(p, x, 0.019851282238960266f);
        p = fmaf(p, x, -0.056959208101034164f);
        p = fmaf(p, x, 0.10603623092174530f);
        p = fmaf(p, x, -0.15305574238300323f);
        p = fmaf(p, x, 0.19675934314727783f);
        p = fmaf(p, x, -0.24954132735729218f);
        p = fmaf(p, x, 0.33329963684082031f);
        p = fmaf(p, x, -0.49999901652336121f);
        return fmaf(p, x, 1.f) * x;
    }
    static DEVICE float reciprocal(float x) { return 1.f / x; }
    static DEVICE float fma(float a, float b, float c) { return fmaf(a, b, c); }
    static DEVICE float max(float a, float b) { return fmaxf(a, b); }
    static DEVICE float abs(float a) { return fabsf(a); }
};

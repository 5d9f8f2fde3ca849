// Causal depthwise convolution, forward.
//
// KERNEL_ARGUMENTS: types of x and out, weight and bias; channels per thread; width; whether a mask is multiplied into x,
// and into out (false where it is not given).
#include "conv_tile.h"

struct ForwardDirection {
    Slab x, out;
    const void *weight, *bias;  // (dim, width) and (dim,), dense; bias may be null
    Mask mask;
};

struct ForwardParams {
    ForwardDirection direction[2];
    Sizes sizes;
};

template <class T, class TW, int VEC, int WIDTH, bool MASKED = false> DEVICE void convolve(const ForwardParams &p) {
    constexpr int STRIP = 16, ROUND = 8;  // steps read at once
    const Sizes &sizes = p.sizes;
    const ForwardDirection &d = p.direction[blockIdx.z];
    const int columns = sizes.dim / VEC, work = blockIdx.x * THREADS + threadIdx.x;
    if (work >= columns * sizes.strips) return;
    const int column = sizes.time_fastest ? work / sizes.strips : work % columns;
    const int strip = sizes.time_fastest ? work % sizes.strips : work / columns;
    const int begin = strip * STRIP, end = min(begin + STRIP, sizes.seqlen);
    Taps<VEC, WIDTH> taps;
    taps.read(static_cast<const TW *>(d.weight), static_cast<const TW *>(d.bias), column * VEC);

    for (int b = blockIdx.y; b < sizes.batch; b += gridDim.y) {
        const Column<T, VEC> x(d.x, b, column * VEC), out(d.out, b, column * VEC);
        float window[WIDTH][VEC];
#pragma unroll
        for (int w = 1; w < WIDTH; w++) {
            const int t = begin - WIDTH + w;
            const Pack<T, VEC> pack = t >= 0 ? x.read(t) : zeros<T, VEC>();
#pragma unroll
            for (int i = 0; i < VEC; i++) window[w][i] = to_float(pack.v[i]);
            if (MASKED && t >= 0) scale(window[w], d.mask.at(b, t));
        }
        for (int from = begin; from < end; from += ROUND) {
            Pack<T, VEC> round[ROUND];
#pragma unroll
            for (int j = 0; j < ROUND; j++) round[j] = from + j < end ? x.read(from + j) : zeros<T, VEC>();
#pragma unroll
            for (int j = 0; j < ROUND; j++) {
                float result[VEC];
                shift<VEC, WIDTH>(window);
                unpack(round[j], window[WIDTH - 1]);
                const float mask = MASKED && from + j < end ? d.mask.at(b, from + j) : 1.f;
                if (MASKED) scale(window[WIDTH - 1], mask);
#pragma unroll
                for (int i = 0; i < VEC; i++) {
                    result[i] = taps.convolve(window, i);
                    if (sizes.silu) result[i] = shared_math::silu<Thread>(result[i]);
                }
                if (MASKED) scale(result, mask);
                if (from + j < end) out.write(from + j, result);
            }
        }
    }
}

KERNEL(conv_forward, ForwardParams, THREADS, 4) { convolve<KERNEL_ARGUMENTS>(p); }

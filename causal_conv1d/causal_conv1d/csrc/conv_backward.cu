// Causal depthwise convolution, backward.
//
// A thread walks its strip and WIDTH - 1 steps more, in order: it computes the output again, from that the gradient
// before the activation, and with the last WIDTH of those one dx. The gradients of weight and bias are added up per
// thread and block; a later kernel adds up the blocks.
//
// KERNEL_ARGUMENTS: types of x and its gradients, weight and bias; channels per thread; width.
#include "conv_tile.h"

struct BackwardDirection {
    Slab x, dout, dx;
    const void *weight, *bias;
    float *sums;  // (blocks in z and y, dim, width + 1): weight, then bias
};

// Two directions are of one x and one dx, to which the second adds; it runs against the first, or along with it.
struct BackwardParams {
    BackwardDirection direction[2];
    Sizes sizes;
    int strip;  // steps per strip
    int directions, opposed;
};

// A block is COLUMNS threads wide; the others hold further strips of the same channels.
constexpr int COLUMNS = 32, STRIPS = THREADS / COLUMNS;

// In both directions a thread holds the same places of memory, so that it adds to what it wrote itself.
template <class T, class TW, int VEC, int WIDTH>
DEVICE void differentiate(const BackwardParams &p, const int which, float *s_sums) {
    constexpr int VALUES = (WIDTH + 1) * VEC;
    const Sizes &sizes = p.sizes;
    const BackwardDirection &d = p.direction[which];
    const int columns = sizes.dim / VEC;
    const int across = sizes.time_fastest ? threadIdx.x / STRIPS : threadIdx.x % COLUMNS;
    const int along = sizes.time_fastest ? threadIdx.x % STRIPS : threadIdx.x / COLUMNS;
    const int column = blockIdx.x * COLUMNS + across, strip = blockIdx.z * STRIPS + along;
    const bool works = column < columns && strip < sizes.strips;
    const int low = min(strip * p.strip, sizes.seqlen), high = min(low + p.strip, sizes.seqlen);
    const bool turned = which == 1 && p.opposed;
    const int begin = turned ? sizes.seqlen - high : low, end = turned ? sizes.seqlen - low : high;
    float sums[WIDTH + 1][VEC] = {};

    if (works) {
        Taps<VEC, WIDTH> taps;
        taps.read(static_cast<const TW *>(d.weight), static_cast<const TW *>(d.bias), column * VEC);
        for (int b = blockIdx.y; b < sizes.batch; b += gridDim.y) {
            const Column<T, VEC> x(d.x, b, column * VEC), dout(d.dout, b, column * VEC), dx(d.dx, b, column * VEC);
            float window[WIDTH][VEC], grads[WIDTH][VEC] = {};
#pragma unroll
            for (int w = 1; w < WIDTH; w++) {
                const int t = begin - WIDTH + w;
                const Pack<T, VEC> pack = t >= 0 ? x.read(t) : zeros<T, VEC>();
#pragma unroll
                for (int i = 0; i < VEC; i++) window[w][i] = to_float(pack.v[i]);
            }
#pragma unroll 4
            for (int t = begin; t < end + WIDTH - 1; t++) {
                const bool inside = t < sizes.seqlen;
                const Pack<T, VEC> input = inside ? x.read(t) : zeros<T, VEC>();
                const Pack<T, VEC> given = inside ? dout.read(t) : zeros<T, VEC>();
                float result[VEC];
                shift<VEC, WIDTH>(window);
                shift<VEC, WIDTH>(grads);
#pragma unroll
                for (int i = 0; i < VEC; i++) {
                    window[WIDTH - 1][i] = to_float(input.v[i]);
                    float grad = to_float(given.v[i]);
                    if (sizes.silu) grad *= shared_math::silu_grad<Thread>(taps.convolve(window, i));
                    grads[WIDTH - 1][i] = grad;
                    const float counted = t < end ? grad : 0.f;  // the steps past the strip are the next one's
                    sums[WIDTH][i] += counted;
                    result[i] = 0.f;
#pragma unroll
                    for (int w = 0; w < WIDTH; w++) {
                        sums[w][i] = fmaf(counted, window[w][i], sums[w][i]);
                        // grads[v] is the gradient WIDTH - 1 - v steps ago: of the dx of WIDTH - 1 steps ago, tap
                        // WIDTH - 1 - v.
                        result[i] = fmaf(taps.weight[WIDTH - 1 - w][i], grads[w][i], result[i]);
                    }
                }
                const int to = t - (WIDTH - 1);
                if (to < begin) continue;
                if (which == 1) {
                    const Pack<T, VEC> before = dx.read(to);
#pragma unroll
                    for (int i = 0; i < VEC; i++) result[i] += to_float(before.v[i]);
                }
                dx.write(to, result);
            }
        }
    }
#pragma unroll
    for (int w = 0; w <= WIDTH; w++)
#pragma unroll
        for (int i = 0; i < VEC; i++) s_sums[((w * VEC + i) * STRIPS + along) * COLUMNS + across] = sums[w][i];
    __syncthreads();
    const int64 row = int64(blockIdx.z) * gridDim.y + blockIdx.y;
    for (int at = threadIdx.x; at < COLUMNS * VALUES; at += THREADS) {
        const int value = at % VALUES, of = at / VALUES, w = value % (WIDTH + 1), i = value / (WIDTH + 1);
        if (blockIdx.x * COLUMNS + of >= columns) continue;
        float sum = 0.f;
#pragma unroll
        for (int s = 0; s < STRIPS; s++) sum += s_sums[((w * VEC + i) * STRIPS + s) * COLUMNS + of];
        const int channel = (blockIdx.x * COLUMNS + of) * VEC + i;
        d.sums[(row * sizes.dim + channel) * (WIDTH + 1) + w] = sum;
    }
}

template <class T, class TW, int VEC, int WIDTH> DEVICE void differentiate_all(const BackwardParams &p) {
    SHARED_ARRAY(float, s_sums, THREADS * (WIDTH + 1) * VEC);
#pragma unroll 1
    for (int which = 0; which < p.directions; which++) {
        __syncthreads();
        differentiate<T, TW, VEC, WIDTH>(p, which, s_sums);
    }
}

KERNEL(conv_backward, BackwardParams, THREADS, 3) { differentiate_all<KERNEL_ARGUMENTS>(p); }

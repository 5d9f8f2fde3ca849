// Causal depthwise convolution, backward.
//
// A thread walks its strip and WIDTH - 1 steps more, in order: it computes the output again, from that the gradient
// before the activation, and with the last WIDTH of those one dx. The gradients of weight and bias are added up per
// thread and block; a later kernel adds up the blocks.
//
// With a mask, the lanes of a warp have neighbouring channels, and leave the sum of its gradient over those.
//
// KERNEL_ARGUMENTS: types of x and its gradients, weight and bias; channels per thread; width; whether a mask is
// multiplied into x, and into out (false where it is not given).
#include "conv_tile.h"

struct BackwardDirection {
    Slab x, dout, dx;
    const void *weight, *bias;
    float *sums;  // (blocks in z and y, dim, width + 1): weight, then bias
    Mask mask;
    float *mask_sums;  // (blocks in x, batch, seqlen), dense but for the order of steps, which is the mask's
    int64 mask_time;   // 1, or -1 where the convolution runs against memory
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
template <class T, class TW, int VEC, int WIDTH, bool MASKED>
DEVICE void differentiate(const BackwardParams &p, const int which, float *s_sums) {
    constexpr int VALUES = (WIDTH + 1) * VEC;
    const Sizes &sizes = p.sizes;
    const BackwardDirection &d = p.direction[which];
    const int columns = sizes.dim / VEC;
    const int across = sizes.time_fastest ? threadIdx.x / STRIPS : threadIdx.x % COLUMNS;
    const int along = sizes.time_fastest ? threadIdx.x % STRIPS : threadIdx.x / COLUMNS;
    const int column = blockIdx.x * COLUMNS + across, strip = blockIdx.z * STRIPS + along;
    // of a warp that adds up over its lanes, all must take part
    const bool there = column < columns, works = (there || MASKED) && strip < sizes.strips;
    const int channel0 = (there ? column : 0) * VEC;
    const int low = min(strip * p.strip, sizes.seqlen), high = min(low + p.strip, sizes.seqlen);
    const bool turned = which == 1 && p.opposed;
    const int begin = turned ? sizes.seqlen - high : low, end = turned ? sizes.seqlen - low : high;
    float sums[WIDTH + 1][VEC] = {};

    if (works) {
        Taps<VEC, WIDTH> taps;
        taps.read(static_cast<const TW *>(d.weight), static_cast<const TW *>(d.bias), channel0);
        for (int b = blockIdx.y; b < sizes.batch; b += gridDim.y) {
            const Column<T, VEC> x(d.x, b, channel0), dout(d.dout, b, channel0), dx(d.dx, b, channel0);
            float window[WIDTH][VEC], grads[WIDTH][VEC] = {}, mask_grads[WIDTH][1] = {};
#pragma unroll
            for (int w = 1; w < WIDTH; w++) {
                const int t = begin - WIDTH + w;
                const Pack<T, VEC> pack = t >= 0 ? x.read(t) : zeros<T, VEC>();
#pragma unroll
                for (int i = 0; i < VEC; i++) window[w][i] = to_float(pack.v[i]);
                if (MASKED && t >= 0) scale(window[w], d.mask.at(b, t));
            }
#pragma unroll 4
            for (int t = begin; t < end + WIDTH - 1; t++) {
                const bool inside = t < sizes.seqlen;
                const Pack<T, VEC> input = inside ? x.read(t) : zeros<T, VEC>();
                const Pack<T, VEC> given = inside ? dout.read(t) : zeros<T, VEC>();
                const float mask = MASKED && inside ? d.mask.at(b, t) : 1.f;
                float result[VEC];
                shift<VEC, WIDTH>(window);
                shift<VEC, WIDTH>(grads);
                shift<1, WIDTH>(mask_grads);
                unpack(input, window[WIDTH - 1]);
                if (MASKED) scale(window[WIDTH - 1], mask);
                mask_grads[WIDTH - 1][0] = 0.f;
#pragma unroll
                for (int i = 0; i < VEC; i++) {
                    float grad = to_float(given.v[i]);
                    if (MASKED) {
                        const float before = taps.convolve(window, i);
                        const float out = sizes.silu ? shared_math::silu<Thread>(before) : before;
                        mask_grads[WIDTH - 1][0] = fmaf(grad, out, mask_grads[WIDTH - 1][0]);
                        grad *= mask;
                    }
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
                if (MASKED) {
                    float inputs[VEC], sum[1] = {mask_grads[0][0]};
                    unpack(x.read(to), inputs);
#pragma unroll
                    for (int i = 0; i < VEC; i++) sum[0] = fmaf(result[i], inputs[i], sum[0]);
                    if (!there) sum[0] = 0.f;
                    sum_over_lanes<1, 32, 1>(sum, threadIdx.x);
                    const int64 row = (int64(blockIdx.x) * sizes.batch + b) * sizes.seqlen;
                    if (across == 0) d.mask_sums[row + to * d.mask_time] = sum[0];
                    if (!there) continue;
                    scale(result, d.mask.at(b, to));
                }
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

template <class T, class TW, int VEC, int WIDTH, bool MASKED = false>
DEVICE void differentiate_all(const BackwardParams &p) {
    SHARED_ARRAY(float, s_sums, THREADS * (WIDTH + 1) * VEC);
#pragma unroll 1
    for (int which = 0; which < p.directions; which++) {
        __syncthreads();
        differentiate<T, TW, VEC, WIDTH, MASKED>(p, which, s_sums);
    }
}

KERNEL(conv_backward, BackwardParams, THREADS, 3) { differentiate_all<KERNEL_ARGUMENTS>(p); }

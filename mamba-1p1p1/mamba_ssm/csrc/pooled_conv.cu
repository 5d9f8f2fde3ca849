// Both directions' causal convolutions with silu along the walk of a grid, u and u_b: D * u + D_b * u_b of every token, and
// the pooled tokens of u and u_b (FastVim). One thread has VEC channels of one group; a window slides along its tokens.
//
// KERNEL_ARGUMENTS: type of x and all results; type of the parameters; channels per thread; width.
#include "activations.h"
#include "pooled_tile.h"

constexpr int THREADS = 128;

struct Taps {
    const void *weight, *bias, *D;  // (dim, width), (dim,), (dim,), dense; bias may be null
};

struct PooledConvParams {
    const void *x;              // (batch, tokens, dim), dense along dim
    int64 x_batch, x_token;     // strides
    void *skip;                 // (batch, tokens, dim), dense
    void *pooled[2];            // (batch, groups, dim), dense: forward, backward
    Taps taps[2];
    Lines lines;
    int batch, dim;
    float factor;               // of the sums over a group
};

template <class T, class TW, int VEC, int WIDTH> struct PooledConv {
    // Inputs from WIDTH - 1 steps before a token to as many behind it.
    static constexpr int SEEN = 2 * WIDTH - 1;

    static DEVICE void read(float (&to)[VEC], const T *x, const PooledConvParams &p, int t) {
        Pack<T, VEC> pack{};
        if (t >= 0 && t < p.lines.tokens) {
            pack = *reinterpret_cast<const Pack<T, VEC> *>(x + p.lines.place(t) * p.x_token);
        }
        unpack(pack, to);
    }

    static DEVICE void write(T *to, const float (&values)[VEC]) {
        *reinterpret_cast<Pack<T, VEC> *>(to) = pack_as<T>(values);
    }

    static DEVICE void run(const PooledConvParams &p) {
        const int columns = p.dim / VEC, work = blockIdx.x * THREADS + threadIdx.x;
        if (work >= columns * p.lines.groups) return;
        const int channel = work % columns * VEC, group = work / columns;
        float weight[2][WIDTH][VEC], bias[2][VEC], D[2][VEC];
#pragma unroll
        for (int way = 0; way < 2; way++) {
            const Taps &taps = p.taps[way];
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                bias[way][i] = taps.bias == nullptr ? 0.f : to_float(static_cast<const TW *>(taps.bias)[channel + i]);
                D[way][i] = to_float(static_cast<const TW *>(taps.D)[channel + i]);
#pragma unroll
                for (int w = 0; w < WIDTH; w++) {
                    weight[way][w][i] = to_float(static_cast<const TW *>(taps.weight)[(channel + i) * WIDTH + w]);
                }
            }
        }
        // The axes that are not pooled say where the group's first token is; over the others it runs.
        const Lines &lines = p.lines;
        int first[3], count[3];
#pragma unroll
        for (int axis = 0; axis < 3; axis++) {
            const bool pooled = lines.group_stride[axis] == 0;
            first[axis] = pooled ? 0 : group / lines.group_stride[axis] % lines.size[axis];
            count[axis] = pooled ? lines.size[axis] : 1;
        }
        for (int b = blockIdx.y; b < p.batch; b += gridDim.y) {
            const T *x = static_cast<const T *>(p.x) + b * p.x_batch + channel;
            T *skip = static_cast<T *>(p.skip) + int64(b) * lines.tokens * p.dim + channel;
            float seen[SEEN][VEC] = {}, sums[2][VEC] = {};
            int last = -2;
            for (int i = 0; i < count[0]; i++)
                for (int j = 0; j < count[1]; j++)
                    for (int k = 0; k < count[2]; k++) {
                        const int t = ((first[0] + i) * lines.size[1] + first[1] + j) * lines.size[2] + first[2] + k;
                        if (t == last + 1) {
#pragma unroll
                            for (int s = 0; s < SEEN - 1; s++)
#pragma unroll
                                for (int c = 0; c < VEC; c++) seen[s][c] = seen[s + 1][c];
                            read(seen[SEEN - 1], x, p, t + WIDTH - 1);
                        } else {
#pragma unroll
                            for (int s = 0; s < SEEN; s++) read(seen[s], x, p, t - (WIDTH - 1) + s);
                        }
                        last = t;
                        float out[VEC];
#pragma unroll
                        for (int c = 0; c < VEC; c++) {
                            float u = bias[0][c], u_b = bias[1][c];
#pragma unroll
                            for (int w = 0; w < WIDTH; w++) {
                                u = fmaf(weight[0][w][c], seen[w][c], u);
                                u_b = fmaf(weight[1][w][c], seen[SEEN - 1 - w][c], u_b);
                            }
                            u = shared_math::silu<Thread>(u);
                            u_b = shared_math::silu<Thread>(u_b);
                            sums[0][c] += u;
                            sums[1][c] += u_b;
                            out[c] = fmaf(D[0][c], u, D[1][c] * u_b);
                        }
                        write(skip + int64(lines.place(t)) * p.dim, out);
                    }
#pragma unroll
            for (int way = 0; way < 2; way++) {
#pragma unroll
                for (int c = 0; c < VEC; c++) sums[way][c] *= p.factor;
                write(static_cast<T *>(p.pooled[way]) + (int64(b) * lines.groups + group) * p.dim + channel, sums[way]);
            }
        }
    }
};

KERNEL(pooled_conv, PooledConvParams, THREADS, 3) { PooledConv<KERNEL_ARGUMENTS>::run(p); }

// Token merging, forward: the mean of each group of tokens, added up in float and in the order of the sequence. A warp
// has one group; a token alone in its group keeps its value.
//
// KERNEL_ARGUMENTS: type of x and out; channels per pack.
#include "device.h"

constexpr int THREADS = 128, WARPS = THREADS / 32, ROUNDS = 2;  // packs per thread at a time

struct MergeForwardParams {
    const void *x;             // (batch, tokens, channels), dense along channels
    int64 x_batch, x_token;    // strides
    const int64 *slot, *count; // (batch, tokens), (batch, left), dense
    void *out;                 // (batch, left, channels), dense
    int batch, tokens, left, channels;
};

template <class T, int VEC> DEVICE void merge(const MergeForwardParams &p) {
    using Unit = Pack<T, VEC>;
    constexpr int WIDTH = 32 * VEC;
    const int lane = threadIdx.x % 32, group = blockIdx.x * WARPS + threadIdx.x / 32;
    if (group >= p.left) return;
    for (int image = blockIdx.y; image < p.batch; image += gridDim.y) {
        const int64 *slot = p.slot + int64(image) * p.tokens, at = int64(image) * p.left + group;
        const T *x = static_cast<const T *>(p.x) + image * p.x_batch;
        T *out = static_cast<T *>(p.out) + at * p.channels;
        const float size = float(p.count[at]);
        for (int channel0 = lane * VEC; channel0 - lane * VEC < p.channels; channel0 += ROUNDS * WIDTH) {
            float sums[ROUNDS][VEC] = {};
            for (int token0 = 0; token0 < p.tokens; token0 += 32) {
                const bool mine = token0 + lane < p.tokens && slot[token0 + lane] == group;
                for (unsigned members = __ballot_sync(WHOLE_WARP, mine); members != 0; members &= members - 1) {
                    const T *row = x + (token0 + __ffs(members) - 1) * p.x_token;
#pragma unroll
                    for (int r = 0; r < ROUNDS; r++) {
                        const int channel = channel0 + r * WIDTH;
                        if (channel >= p.channels) continue;
                        float values[VEC];
                        unpack(*reinterpret_cast<const Unit *>(row + channel), values);
#pragma unroll
                        for (int i = 0; i < VEC; i++) sums[r][i] += values[i];
                    }
                }
            }
#pragma unroll
            for (int r = 0; r < ROUNDS; r++) {
                const int channel = channel0 + r * WIDTH;
                if (channel >= p.channels) continue;
#pragma unroll
                for (int i = 0; i < VEC; i++) sums[r][i] = size == 1.f ? sums[r][i] : sums[r][i] / size;
                *reinterpret_cast<Unit *>(out + channel) = pack_as<T>(sums[r]);
            }
        }
    }
}

KERNEL(merge_forward, MergeForwardParams, THREADS, 4) { merge<KERNEL_ARGUMENTS>(p); }

// Token merging, backward: every token has the gradient of its group, shared out among as many as that holds. A thread
// has one pack of one token's channels.
//
// KERNEL_ARGUMENTS: type of dout and dx; channels per pack.
#include "device.h"

constexpr int THREADS = 128;

struct MergeBackwardParams {
    const void *dout;          // (batch, left, channels), dense
    const int64 *slot, *count; // (batch, tokens), (batch, left), dense
    void *dx;                  // (batch, tokens, channels), dense
    int64 rows;                // batch * tokens
    int tokens, left, channels;
};

template <class T, int VEC> DEVICE void share_out(const MergeBackwardParams &p) {
    using Unit = Pack<T, VEC>;
    const int columns = p.channels / VEC;
    const int64 work = int64(blockIdx.x) * THREADS + threadIdx.x, row = work / columns;
    if (row >= p.rows) return;
    const int channel = int(work % columns) * VEC;
    const int64 slot = p.slot[row], group = row / p.tokens * p.left + slot;
    float grads[VEC] = {};
    if (slot >= 0 && slot < p.left) {
        const float size = float(p.count[group]);
        unpack(*reinterpret_cast<const Unit *>(static_cast<const T *>(p.dout) + group * p.channels + channel), grads);
#pragma unroll
        for (int i = 0; i < VEC; i++) grads[i] = size == 1.f ? grads[i] : grads[i] / size;
    }
    *reinterpret_cast<Unit *>(static_cast<T *>(p.dx) + row * p.channels + channel) = pack_as<T>(grads);
}

KERNEL(merge_backward, MergeBackwardParams, THREADS, 8) { share_out<KERNEL_ARGUMENTS>(p); }

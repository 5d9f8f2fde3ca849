// First pass over a sequence that is split over blocks: the state each split ends with when it starts from zero, and the
// sum of its step sizes, from which its decay follows. Forwards that is h; backwards it is the carry a_t * dL/dh_t, walked
// from the split's end, with the gated output gradient as input and C in the place of B.
//
// KERNEL_ARGUMENTS: types of the input, delta, z, B or C; lanes per channel; whether backwards; PACK of RowMap.
#include "scan_tile.h"

struct StatesDirection {
    Slab input, delta, z;
    Matrix matrix;
    const float *A, *delta_bias;
    float *states;    // (batch, splits, dim, dstate)
    float *dt_sums;   // (batch, splits, dim)
};

struct StatesParams {
    StatesDirection direction[2];
    Sizes sizes;
};

template <class TInput, class TDelta, class TZ, class TM, int LANES, bool BACKWARDS, int PACK>
struct SplitStates {
    using Own = Team<LANES, 1>;
    static constexpr int CHANNELS = Own::CHANNELS, DSTATE = Own::DSTATE;
    static constexpr int TILE = CHANNELS >= 128 ? 8 : 16;
    using Rows = RowMap<TILE, CHANNELS, PACK>;
    using Entries = MatrixMap<TILE, DSTATE>;
    static constexpr int VEC = Rows::VEC;

    template <class Tensor> static DEVICE Tensor in_scan_order(Tensor tensor) {
        if (BACKWARDS) tensor.time = -tensor.time;
        return tensor;
    }

    static DEVICE void run(const StatesParams &p) {
        SHARED_ARRAY(float, s_dt, Rows::SIZE);
        SHARED_ARRAY(float, s_input, Rows::SIZE);
        SHARED_ARRAY(float, s_matrix, Entries::SIZE);
        SHARED_ARRAY(float, s_bias, CHANNELS);

        const Sizes &sizes = p.sizes;
        const StatesDirection &d = p.direction[blockIdx.z / sizes.splits];
        const int split = blockIdx.z % sizes.splits;
        const int group = blockIdx.x / sizes.tiles, group_size = sizes.dim / sizes.groups;
        const int channel_in_group = blockIdx.x % sizes.tiles * CHANNELS;
        const int channel0 = group * group_size + channel_in_group;
        const int limit = min(CHANNELS, group_size - channel_in_group);
        const int begin = split * sizes.split_length, end = min(begin + sizes.split_length, sizes.seqlen);
        if (split == (BACKWARDS ? 0 : sizes.splits - 1)) return;  // nothing follows it
        const Own own(channel0, limit);
        const Rows rows;
        const Entries entries(sizes.state_fastest);
        const Slab input_slab = in_scan_order(d.input), delta_slab = in_scan_order(d.delta), z_slab = in_scan_order(d.z);
        const Matrix matrix_slab = in_scan_order(d.matrix);
        const int start = BACKWARDS ? 1 - end : begin;

        for (int c = threadIdx.x; c < CHANNELS; c += THREADS) {
            s_bias[c] = d.delta_bias != nullptr && c < limit ? d.delta_bias[channel0 + c] : 0.f;
        }
        float A[1][STATES];
        own.read_decay(A, d.A, sizes);

        for (int b = blockIdx.y; b < sizes.batch; b += gridDim.y) {
            Stream<TInput, Rows> inputs(input_slab, rows, b, channel0, start);
            Stream<TDelta, Rows> deltas(delta_slab, rows, b, channel0, start);
            Stream<TZ, Rows> gates(z_slab, rows, b, channel0, start);
            Stream<TM, Entries> matrices(matrix_slab, entries, b, group, start);
            float h[1][STATES] = {}, dt_sum = 0.f;

            for (int times = end - begin; times > 0; times -= TILE) {
                Pack<TInput, VEC> input[Rows::COUNT];
                Pack<TDelta, VEC> delta[Rows::COUNT];
                Pack<TZ, VEC> z[Rows::COUNT];
                Pack<TM, 1> matrix[Entries::COUNT];
                inputs.next(input, rows, input_slab, times, limit);
                deltas.next(delta, rows, delta_slab, times, limit);
                if (d.z.data != nullptr) gates.next(z, rows, z_slab, times, limit);
                matrices.next(matrix, entries, matrix_slab, times, sizes.dstate);
                __syncthreads();
#pragma unroll
                for (int i = 0; i < Rows::COUNT; i++) {
                    if (!rows.exists(i)) continue;
                    float values[VEC], dt[VEC], shift[VEC], gate[VEC];
                    unpack(input[i], values);
                    unpack(delta[i], dt);
                    load_floats(s_bias + rows.place_of(i), shift);
                    if (d.z.data != nullptr) unpack(z[i], gate);
                    const bool inside = rows.holds(i, times, limit);
#pragma unroll
                    for (int k = 0; k < VEC; k++) {
                        dt[k] = inside ? step_size(dt[k], shift[k], sizes.softplus) : 0.f;
                        if (d.z.data != nullptr) values[k] *= shared_math::silu<Thread>(gate[k]);
                        values[k] *= BACKWARDS ? sizes.share : dt[k];
                    }
                    store_floats(s_dt + rows.index_of(i), dt);
                    store_floats(s_input + rows.index_of(i), values);
                }
#pragma unroll
                for (int i = 0; i < Entries::COUNT; i++) {
                    if (entries.exists(i)) s_matrix[entries.index_of(i)] = to_float(matrix[i].v[0]);
                }
                __syncthreads();
#pragma unroll 4
                for (int t = 0; t < TILE; t++) {
                    float M[STATES];
                    load_floats(s_matrix + t * DSTATE + own.lane * STATES, M);
                    const float dt = s_dt[t * CHANNELS + own.first], value = s_input[t * CHANNELS + own.first];
                    dt_sum += dt;
#pragma unroll
                    for (int n = 0; n < STATES; n++) {
                        const float a = shared_math::decay<Thread>(dt, A[0][n]);
                        h[0][n] = BACKWARDS ? a * fmaf(M[n], value, h[0][n])
                                            : shared_math::next_state<Thread>(a, h[0][n], value, M[n]);
                    }
                }
            }
            const int64 index = int64(b) * sizes.splits + split;
            own.write_states(h, d.states + index * sizes.dim * sizes.dstate, sizes);
            if (own.lane == 0 && own.channels > 0) d.dt_sums[index * sizes.dim + own.channel] = dt_sum;
        }
    }
};

KERNEL(scan_states, StatesParams, THREADS, 3) { SplitStates<KERNEL_ARGUMENTS>::run(p); }

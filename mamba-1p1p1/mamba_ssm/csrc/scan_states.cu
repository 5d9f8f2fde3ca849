// First pass over a sequence that is split over blocks: the state each split ends with when it starts from zero, and the
// sum of its step sizes, from which its decay follows. Forwards that is h; backwards it is the carry a_t * dL/dh_t, walked
// from the split's end, with the gated output gradient as input and C in the place of B.
//
// KERNEL_ARGUMENTS: types of the input, delta, z, B or C; lanes per channel; whether backwards.
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

template <class TInput, class TDelta, class TZ, class TM, int LANES, bool BACKWARDS> struct SplitStates {
    using Own = Team<LANES, 1>;
    static constexpr int CHANNELS = Own::CHANNELS, DSTATE = Own::DSTATE;
    static constexpr int TILE = CHANNELS >= 128 ? 8 : 16;
    using RowMap = TileMap<TILE, CHANNELS>;
    using MatrixMap = TileMap<TILE, DSTATE>;

    template <class Tensor> static DEVICE Tensor in_scan_order(Tensor tensor) {
        if (BACKWARDS) tensor.time = -tensor.time;
        return tensor;
    }

    static DEVICE void run(const StatesParams &p) {
        SHARED_ARRAY(float, s_dt, RowMap::SIZE);
        SHARED_ARRAY(float, s_input, RowMap::SIZE);
        SHARED_ARRAY(float, s_matrix, MatrixMap::SIZE);
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
        const RowMap rows(sizes.time_fastest);
        const MatrixMap entries(!sizes.state_fastest);
        const Slab input_slab = in_scan_order(d.input), delta_slab = in_scan_order(d.delta), z_slab = in_scan_order(d.z);
        const Matrix matrix_slab = in_scan_order(d.matrix);
        const int start = BACKWARDS ? 1 - end : begin;

        for (int c = threadIdx.x; c < CHANNELS; c += THREADS) {
            s_bias[c] = d.delta_bias != nullptr && c < limit ? d.delta_bias[channel0 + c] : 0.f;
        }
        float A[1][STATES];
        own.read_decay(A, d.A, sizes);

        for (int b = blockIdx.y; b < sizes.batch; b += gridDim.y) {
            Stream<TInput> inputs(input_slab, rows, b, channel0, start);
            Stream<TDelta> deltas(delta_slab, rows, b, channel0, start);
            Stream<TZ> gates(z_slab, rows, b, channel0, start);
            Stream<TM> matrices(matrix_slab, entries, b, group, start);
            float h[1][STATES] = {}, dt_sum = 0.f;

            for (int times = end - begin; times > 0; times -= TILE) {
                TInput input[RowMap::COUNT];
                TDelta delta[RowMap::COUNT];
                TZ z[RowMap::COUNT];
                TM matrix[MatrixMap::COUNT];
                inputs.next(input, rows, input_slab, times, limit);
                deltas.next(delta, rows, delta_slab, times, limit);
                if (d.z.data != nullptr) gates.next(z, rows, z_slab, times, limit);
                matrices.next(matrix, entries, matrix_slab, times, sizes.dstate);
                __syncthreads();
#pragma unroll
                for (int i = 0; i < RowMap::COUNT; i++) {
                    const float dt = step_size(to_float(delta[i]), s_bias[rows.place_of(i)], sizes.softplus);
                    const float inside = rows.holds(i, times, limit) ? dt : 0.f;
                    float value = to_float(input[i]);
                    if (d.z.data != nullptr) value *= shared_math::silu<Thread>(to_float(z[i]));
                    s_dt[rows.index_of(i)] = inside;
                    s_input[rows.index_of(i)] = BACKWARDS ? value : inside * value;
                }
#pragma unroll
                for (int i = 0; i < MatrixMap::COUNT; i++) {
                    if (entries.holds(i, TILE, DSTATE)) s_matrix[entries.index_of(i)] = to_float(matrix[i]);
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

KERNEL(scan_states, StatesParams, THREADS, 4) { SplitStates<KERNEL_ARGUMENTS>::run(p); }

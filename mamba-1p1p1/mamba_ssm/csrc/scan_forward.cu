// Selective scan, forward: one block per channel tile, batch entry, split of the sequence and direction.
//
// KERNEL_ARGUMENTS: types of u and out, delta, z, B and C; lanes per channel; channels per thread.
#include "scan_tile.h"

struct ForwardDirection {
    Slab u, delta, z, out;
    Matrix B, C;
    const float *A, *D, *delta_bias;
    const float *carry;   // (batch, splits, dim, dstate), the state each split starts from; null: zero
    float *last_state;    // (batch, dim, dstate)
    float *checkpoints;   // (batch, count, dim, dstate), the states before steps interval, 2 * interval, ..; or null
};

struct ForwardParams {
    ForwardDirection direction[2];
    Sizes sizes;
};

template <class TU, class TDelta, class TZ, class TM, int LANES, int CPT> struct ForwardScan {
    using Own = Team<LANES, CPT>;
    static constexpr int CHANNELS = Own::CHANNELS, DSTATE = Own::DSTATE;
    static constexpr int TILE = CHANNELS >= 16 ? 8 : 16;
    using RowMap = TileMap<TILE, CHANNELS>;
    using MatrixMap = TileMap<TILE, DSTATE>;
    // Resident blocks that a multiprocessor must have registers for; chosen so that none spill.
    static constexpr int BLOCKS = CPT == 4 || RowMap::COUNT >= 8 ? 3 : CPT == 1 && LANES == 4 ? 6 : 4;

    static DEVICE void run(const ForwardParams &p) {
        SHARED_ARRAY(float, s_dt, RowMap::SIZE);
        SHARED_ARRAY(float, s_input, RowMap::SIZE);
        SHARED_ARRAY(float, s_y, RowMap::SIZE);
        SHARED_ARRAY(float, s_gate, RowMap::SIZE);
        SHARED_ARRAY(float, s_B, MatrixMap::SIZE);
        SHARED_ARRAY(float, s_C, MatrixMap::SIZE);
        SHARED_ARRAY(float, s_D, CHANNELS);
        SHARED_ARRAY(float, s_bias, CHANNELS);

        const Sizes &sizes = p.sizes;
        const int direction = blockIdx.z / sizes.splits, split = blockIdx.z % sizes.splits;
        const int group = blockIdx.x / sizes.tiles, group_size = sizes.dim / sizes.groups;
        const int channel_in_group = blockIdx.x % sizes.tiles * CHANNELS;
        const int channel0 = group * group_size + channel_in_group;
        const int limit = min(CHANNELS, group_size - channel_in_group);
        const int begin = split * sizes.split_length, end = min(begin + sizes.split_length, sizes.seqlen);
        const Own own(channel0, limit);
        const RowMap rows(sizes.time_fastest);
        const MatrixMap entries(!sizes.state_fastest);

        float A[CPT][STATES];
        {
            const ForwardDirection &d = p.direction[direction];
            for (int c = threadIdx.x; c < CHANNELS; c += THREADS) {
                s_D[c] = d.D != nullptr && c < limit ? d.D[channel0 + c] : 0.f;
                s_bias[c] = d.delta_bias != nullptr && c < limit ? d.delta_bias[channel0 + c] : 0.f;
            }
            __syncthreads();
            own.read_decay(A, d.A, sizes);
        }

        for (int b = blockIdx.y; b < sizes.batch; b += gridDim.y) {
            const ForwardDirection &first = p.direction[unhoisted(direction)];
            Stream<TU> u(first.u, rows, b, channel0, begin), out(first.out, rows, b, channel0, begin);
            Stream<TDelta> delta(first.delta, rows, b, channel0, begin);
            Stream<TZ> z(first.z, rows, b, channel0, begin);
            Stream<TM> B(first.B, entries, b, group, begin), C(first.C, entries, b, group, begin);

            float h[CPT][STATES] = {};
            if (first.carry != nullptr) {
                own.read_states(h, first.carry + (int64(b) * sizes.splits + split) * states_size(sizes), sizes);
            }

            TU next_u[RowMap::COUNT];
            TDelta next_delta[RowMap::COUNT];
            TZ next_z[RowMap::COUNT];
            TM next_B[MatrixMap::COUNT], next_C[MatrixMap::COUNT];
            auto fetch = [&](const ForwardDirection &d, int times) {
                u.next(next_u, rows, d.u, times, limit);
                delta.next(next_delta, rows, d.delta, times, limit);
                if (d.z.data != nullptr) z.next(next_z, rows, d.z, times, limit);
                B.next(next_B, entries, d.B, times, sizes.dstate);
                C.next(next_C, entries, d.C, times, sizes.dstate);
            };
            fetch(first, end - begin);

            for (int step = begin; step < end; step += TILE) {
                const ForwardDirection &d = p.direction[unhoisted(direction)];
                const int times = end - step;
                const bool gated = d.z.data != nullptr;
#pragma unroll
                for (int i = 0; i < RowMap::COUNT; i++) {
                    const float u_value = to_float(next_u[i]);
                    const float dt = step_size(to_float(next_delta[i]), s_bias[rows.place_of(i)], sizes.softplus);
                    // A step outside the sequence changes nothing: its decay is exp(0), its input 0.
                    const float inside = rows.holds(i, times, limit) ? dt : 0.f;
                    s_dt[rows.index_of(i)] = inside;
                    s_input[rows.index_of(i)] = inside * u_value;
                    s_y[rows.index_of(i)] = s_D[rows.place_of(i)] * u_value;
                    if (gated) s_gate[rows.index_of(i)] = shared_math::silu<Thread>(to_float(next_z[i]));
                }
#pragma unroll
                for (int i = 0; i < MatrixMap::COUNT; i++) {
                    if (!entries.holds(i, TILE, DSTATE)) continue;
                    s_B[entries.index_of(i)] = to_float(next_B[i]);
                    s_C[entries.index_of(i)] = to_float(next_C[i]);
                }
                __syncthreads();
                if (times > TILE) fetch(d, times - TILE);

                if (d.checkpoints != nullptr && step > 0 && step % sizes.interval == 0) {
                    const int64 count = (sizes.seqlen - 1) / sizes.interval;
                    const int64 index = b * count + step / sizes.interval - 1;
                    own.write_states(h, d.checkpoints + index * states_size(sizes), sizes);
                }
                scan_tile(own, A, h, s_dt, s_input, s_B, s_C, s_y);
                __syncthreads();

                const int64 stride = out.step(d.out, rows);
                TU *to = out.at;
#pragma unroll
                for (int i = 0; i < RowMap::COUNT; i++) {
                    if (rows.holds(i, times, limit)) {
                        float y = s_y[rows.index_of(i)];
                        *to = from_float<TU>(gated ? y * s_gate[rows.index_of(i)] : y);
                    }
                    to += stride;
                }
                out.at += TILE * d.out.time;
            }
            if (split == sizes.splits - 1) {
                own.write_states(h, p.direction[unhoisted(direction)].last_state + b * states_size(sizes), sizes);
            }
        }
    }

  private:
    static DEVICE int64 states_size(const Sizes &sizes) { return int64(sizes.dim) * sizes.dstate; }

    static DEVICE void scan_tile(const Own &own, const float (&A)[CPT][STATES], float (&h)[CPT][STATES],
                                 const float *s_dt, const float *s_input, const float *s_B, const float *s_C,
                                 float *s_y) {
#pragma unroll 2
        for (int t = 0; t < TILE; t++) {
            float B[STATES], C[STATES], dt[CPT], input[CPT], y[CPT] = {};
            load_floats(s_B + t * DSTATE + own.lane * STATES, B);
            load_floats(s_C + t * DSTATE + own.lane * STATES, C);
            load_floats(s_dt + t * CHANNELS + own.first, dt);
            load_floats(s_input + t * CHANNELS + own.first, input);
#pragma unroll
            for (int c = 0; c < CPT; c++)
#pragma unroll
                for (int n = 0; n < STATES; n++) {
                    float a = shared_math::decay<Thread>(dt[c], A[c][n]);
                    h[c][n] = shared_math::next_state<Thread>(a, h[c][n], input[c], B[n]);
                    y[c] = fmaf(C[n], h[c][n], y[c]);
                }
            own.sum(y);
            if (own.writes) {
#pragma unroll
                for (int i = 0; i < Own::SUMS; i++) s_y[t * CHANNELS + own.sum_channel() + i] += y[i];
            }
        }
    }
};

KERNEL(scan_forward, ForwardParams, THREADS, ForwardScan<KERNEL_ARGUMENTS>::BLOCKS) {
    ForwardScan<KERNEL_ARGUMENTS>::run(p);
}

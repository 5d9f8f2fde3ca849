// Selective scan, forward: one block per channel tile, batch entry, split of the sequence and direction.
//
// KERNEL_ARGUMENTS: types of u and out, delta, z, B and C; lanes per channel; channels per thread; PACK of RowMap.
#include "scan_tile.h"

struct ForwardDirection {
    Slab u, delta, z, out;
    Matrix B, C;
    const float *A, *D, *delta_bias;
    const float *carry;   // (batch, splits, dim, dstate), the state each split starts from; null: zero
    float *last_state;    // (batch, dim, dstate); or null
    float *checkpoints;   // (batch, count, dim, dstate), the states before steps interval, 2 * interval, ..; or null
};

struct ForwardParams {
    ForwardDirection direction[2];
    Sizes sizes;
};

template <class TU, class TDelta, class TZ, class TM, int LANES, int CPT, int PACK> struct ForwardScan {
    using Own = Team<LANES, CPT>;
    static constexpr int CHANNELS = Own::CHANNELS, DSTATE = Own::DSTATE;
    static constexpr int TILE = CHANNELS >= 64 ? 8 : 16;
    using Rows = RowMap<TILE, CHANNELS, PACK>;
    using Entries = MatrixMap<TILE, DSTATE>;
    static constexpr int VEC = Rows::VEC;
    // Resident blocks that a multiprocessor must have registers for; chosen so that none spill.
    static constexpr int BLOCKS = LANES == 32 ? 2 : CPT == 4 || LANES == 16 || Rows::COUNT >= 8 ? 3 : CPT == 1 && LANES == 4 ? 5 : 4;

    static DEVICE void run(const ForwardParams &p) {
        SHARED_ARRAY(float, s_rows, 4 * Rows::SIZE);
        SHARED_ARRAY(float, s_entries, 2 * Entries::SIZE);
        SHARED_ARRAY(float, s_channels, 2 * CHANNELS);
        float *s_dt = s_rows, *s_input = s_dt + Rows::SIZE, *s_y = s_input + Rows::SIZE, *s_gate = s_y + Rows::SIZE;
        float *s_B = s_entries, *s_C = s_B + Entries::SIZE, *s_D = s_channels, *s_bias = s_D + CHANNELS;

        const Sizes &sizes = p.sizes;
        const int direction = blockIdx.z / sizes.splits, split = blockIdx.z % sizes.splits;
        const int group = blockIdx.x / sizes.tiles, group_size = sizes.dim / sizes.groups;
        const int channel_in_group = blockIdx.x % sizes.tiles * CHANNELS;
        const int channel0 = group * group_size + channel_in_group;
        const int limit = min(CHANNELS, group_size - channel_in_group);
        const int begin = split * sizes.split_length, end = min(begin + sizes.split_length, sizes.seqlen);
        const Own own(channel0, limit);
        const Rows rows;
        const Entries entries(sizes.state_fastest);

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
            Stream<TU, Rows> u(first.u, rows, b, channel0, begin), out(first.out, rows, b, channel0, begin);
            Stream<TDelta, Rows> delta(first.delta, rows, b, channel0, begin);
            Stream<TZ, Rows> z(first.z, rows, b, channel0, begin);
            Stream<TM, Entries> B(first.B, entries, b, group, begin), C(first.C, entries, b, group, begin);

            float h[CPT][STATES] = {};
            if (first.carry != nullptr) {
                own.read_states(h, first.carry + (int64(b) * sizes.splits + split) * states_size(sizes), sizes);
            }

            Pack<TU, VEC> next_u[Rows::COUNT];
            Pack<TDelta, VEC> next_delta[Rows::COUNT];
            Pack<TZ, VEC> next_z[Rows::COUNT];
            Pack<TM, 1> next_B[Entries::COUNT], next_C[Entries::COUNT];
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
                for (int i = 0; i < Rows::COUNT; i++) {
                    if (!rows.exists(i)) continue;
                    float u_values[VEC], dt[VEC], input[VEC], skip[VEC], shift[VEC], D[VEC];
                    unpack(next_u[i], u_values);
                    unpack(next_delta[i], dt);
                    load_floats(s_bias + rows.place_of(i), shift);
                    load_floats(s_D + rows.place_of(i), D);
                    const bool inside = rows.holds(i, times, limit);
#pragma unroll
                    for (int k = 0; k < VEC; k++) {
                        // A step outside the sequence changes nothing: its decay is exp(0), its input 0.
                        dt[k] = inside ? step_size(dt[k], shift[k], sizes.softplus) : 0.f;
                        input[k] = dt[k] * u_values[k];
                        skip[k] = D[k] * u_values[k];
                    }
                    store_floats(s_dt + rows.index_of(i), dt);
                    store_floats(s_input + rows.index_of(i), input);
                    store_floats(s_y + rows.index_of(i), skip);
                    if (gated) {
                        float gate[VEC];
                        unpack(next_z[i], gate);
#pragma unroll
                        for (int k = 0; k < VEC; k++) gate[k] = shared_math::silu<Thread>(gate[k]);
                        store_floats(s_gate + rows.index_of(i), gate);
                    }
                }
#pragma unroll
                for (int i = 0; i < Entries::COUNT; i++) {
                    if (!entries.exists(i)) continue;
                    s_B[entries.index_of(i)] = to_float(next_B[i].v[0]);
                    s_C[entries.index_of(i)] = to_float(next_C[i].v[0]);
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
#pragma unroll
                for (int i = 0; i < Rows::COUNT; i++) {
                    if (!rows.holds(i, times, limit)) continue;
                    float y[VEC];
                    load_floats(s_y + rows.index_of(i), y);
                    if (sizes.accumulate) {
                        float before[VEC];
                        unpack(out.unit(i * stride), before);
#pragma unroll
                        for (int k = 0; k < VEC; k++) y[k] += before[k];
                    }
                    if (gated) {
                        float gate[VEC];
                        load_floats(s_gate + rows.index_of(i), gate);
#pragma unroll
                        for (int k = 0; k < VEC; k++) y[k] *= gate[k];
                    }
#pragma unroll
                    for (int k = 0; k < VEC; k++) y[k] *= sizes.share;
                    out.unit(i * stride) = pack_as<TU>(y);
                }
                out.at += TILE * d.out.time;
            }
            if (split == sizes.splits - 1 && first.last_state != nullptr) {
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

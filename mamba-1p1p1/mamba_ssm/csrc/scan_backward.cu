// Selective scan, backward: one block per channel tile, batch entry, split of the sequence and direction.
//
// A block walks its tiles from the last to the first. In each it scans forwards from the checkpoint that forward left,
// keeping the state before every SUB steps in shared memory; then, SUB steps at a time, it scans those once more, with
// their states and decays in registers, and goes back over them. Sums over channels are taken within the block and
// written per block; scan parameters' sums over time and batch likewise. A later kernel adds them up, always in one order.
//
// KERNEL_ARGUMENTS: types of u, out and their gradients, delta, z, B and C; lanes per channel; channels per thread; PACK
// of RowMap.
#include "scan_tile.h"

struct BackwardDirection {
    Slab u, delta, z, dout, du, ddelta, dz;
    Matrix B, C;
    const float *A, *D, *delta_bias;
    const float *checkpoints;  // (batch, count, dim, dstate), as forward left them
    const float *carry;        // (batch, splits, dim, dstate), the gradient each split ends with; null: zero
    float *matrix_sums;        // (slots, batch, groups, seqlen, 2, LANES * STATES): dB, then dC
    int64 matrix_time;         // its stride along time, negative if the scan runs against memory
    float *A_sums;             // (blocks in y * splits, dim, dstate)
    float *D_sums, *bias_sums; // (blocks in y * splits, dim)
};

struct BackwardParams {
    BackwardDirection direction[2];
    Sizes sizes;
};

template <class TU, class TDelta, class TZ, class TM, int LANES, int CPT, int PACK> struct BackwardScan {
    using Own = Team<LANES, CPT>;
    using Sums = shared_math::BackwardSums<Thread>;
    static constexpr int CHANNELS = Own::CHANNELS, DSTATE = Own::DSTATE;
    static constexpr int TILE = 16, SUB = 4, SUBS = TILE / SUB;  // TILE is the interval of the checkpoints
    // Resident blocks that a multiprocessor must have registers for; a Turing has no shared memory for more than two, nor,
    // of many states, has an Ampere but the largest, where a third would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    static constexpr int BLOCKS = 2;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    static constexpr int BLOCKS = LANES >= 16 ? 2 : 3;
#else
    static constexpr int BLOCKS = LANES == 32 ? 2 : 3;
#endif
    static constexpr int PARTS = THREADS / CHANNELS;  // threads that add up one channel's column of a tile
    // One step's dB and dC of STATES states, added over the warp's teams: what each lane then holds of them.
    static constexpr int TEAMS = 32 / LANES, VALUES = 2 * STATES;
    static constexpr int HELD = VALUES > TEAMS ? VALUES / TEAMS : 1, COPIES = TEAMS > VALUES ? TEAMS / VALUES : 1;
    using Rows = RowMap<TILE, CHANNELS, PACK>;
    using Entries = MatrixMap<TILE, DSTATE>;
    static constexpr int VEC = Rows::VEC;
    // Units of each tensor that a thread reads at once.
    static constexpr int PART_LIMIT = VEC > 1 ? 2 : 4, PART = Rows::COUNT < PART_LIMIT ? Rows::COUNT : PART_LIMIT;
    static constexpr int ENTRIES_PART = Entries::COUNT < 4 ? Entries::COUNT : 4;

    // Shared memory; the host asks for as much.
    static constexpr int ROW_FLOATS = Rows::SIZE, MATRIX_FLOATS = Entries::SIZE;
    static constexpr int START_FLOATS = (SUBS - 1) * CPT * THREADS * STATES, SUM_FLOATS = WARPS * SUB * 2 * DSTATE;
    float *u, *dt, *dy;     // [TILE][CHANNELS]; replaced by du, ddt and y, step by step
    float *B, *C;           // [TILE][DSTATE]
    float *starts;          // [SUBS - 1][CPT][THREADS][STATES]
    float *sums;            // [2][WARPS][SUB][2 * DSTATE], used in turns
    float *D, *bias;        // [CHANNELS]

    DEVICE explicit BackwardScan(float *shared) {
        u = shared;
        dt = u + ROW_FLOATS;
        dy = dt + ROW_FLOATS;
        B = dy + ROW_FLOATS;
        C = B + MATRIX_FLOATS;
        starts = C + MATRIX_FLOATS;
        sums = starts + START_FLOATS;
        D = sums + 2 * SUM_FLOATS;
        bias = D + CHANNELS;
    }

    // What a thread carries through the whole walk.
    struct Carried {
        float A[CPT][STATES], dA[CPT][STATES], carry[CPT][STATES];
        float dD[Own::SUMS], dbias;
    };

    struct Place {
        int batch, group, channel0, limit, step, times;  // times: steps of the tile inside the sequence
    };

    DEVICE void load_tile(const BackwardDirection &d, const Sizes &sizes, const Place &at) {
        // which units are this thread's is worked out anew in every tile: kept, it would cost registers between
        const int thread = unhoisted(threadIdx.x);
        const Rows rows(thread);
        const Entries entries(sizes.state_fastest, thread);
        const Stream<TU, Rows> us(d.u, rows, at.batch, at.channel0, at.step);
        const Stream<TU, Rows> douts(d.dout, rows, at.batch, at.channel0, at.step);
        const Stream<TDelta, Rows> deltas(d.delta, rows, at.batch, at.channel0, at.step);
        const Stream<TZ, Rows> zs(d.z, rows, at.batch, at.channel0, at.step);
        const bool gated = d.z.data != nullptr;
#pragma unroll 1
        for (int first = 0; first < Rows::COUNT; first += PART) {
            Pack<TU, VEC> read_u[PART], read_dout[PART];
            Pack<TDelta, VEC> read_delta[PART];
            Pack<TZ, VEC> read_z[PART];
            us.read(read_u, first, rows, d.u, at.times, at.limit);
            deltas.read(read_delta, first, rows, d.delta, at.times, at.limit);
            douts.read(read_dout, first, rows, d.dout, at.times, at.limit);
            if (gated) zs.read(read_z, first, rows, d.z, at.times, at.limit);
#pragma unroll
            for (int i = 0; i < PART; i++) {
                if (!rows.exists(first + i)) continue;
                float values[VEC], steps[VEC], grads[VEC], shift[VEC], gate[VEC];
                unpack(read_u[i], values);
                unpack(read_delta[i], steps);
                unpack(read_dout[i], grads);
                if (gated) unpack(read_z[i], gate);
                load_floats(bias + rows.place_of(first + i), shift);
                const bool inside = rows.holds(first + i, at.times, at.limit);
#pragma unroll
                for (int k = 0; k < VEC; k++) {
                    steps[k] = inside ? step_size(steps[k], shift[k], sizes.softplus) : 0.f;
                    grads[k] *= sizes.share;
                    if (gated) grads[k] *= shared_math::silu<Thread>(gate[k]);
                }
                const int index = rows.index_of(first + i);
                store_floats(u + index, values);
                store_floats(dt + index, steps);
                store_floats(dy + index, grads);
            }
        }
        const Stream<TM, Entries> Bs(d.B, entries, at.batch, at.group, at.step);
        const Stream<TM, Entries> Cs(d.C, entries, at.batch, at.group, at.step);
#pragma unroll 1
        for (int first = 0; first < Entries::COUNT; first += ENTRIES_PART) {
            Pack<TM, 1> read_B[ENTRIES_PART], read_C[ENTRIES_PART];
            Bs.read(read_B, first, entries, d.B, at.times, sizes.dstate);
            Cs.read(read_C, first, entries, d.C, at.times, sizes.dstate);
#pragma unroll
            for (int i = 0; i < ENTRIES_PART; i++) {
                if (!entries.exists(first + i)) continue;
                B[entries.index_of(first + i)] = to_float(read_B[i].v[0]);
                C[entries.index_of(first + i)] = to_float(read_C[i].v[0]);
            }
        }
    }

    DEVICE float *start_of(int sub, int c) const { return starts + ((sub * CPT + c) * THREADS + threadIdx.x) * STATES; }

    // One step forwards, from `before` to `after`; the decays it used are left in `decays`.
    DEVICE void step(const Own &own, int t, const float (&A)[CPT][STATES], const float (&before)[CPT][STATES],
                     float (&after)[CPT][STATES], float (&decays)[CPT][STATES]) const {
        float matrix[STATES], steps[CPT], values[CPT];
        load_floats(B + t * DSTATE + own.lane * STATES, matrix);
        load_floats(dt + t * CHANNELS + own.first, steps);
        load_floats(u + t * CHANNELS + own.first, values);
#pragma unroll
        for (int c = 0; c < CPT; c++)
#pragma unroll
            for (int n = 0; n < STATES; n++) {
                decays[c][n] = shared_math::decay<Thread>(steps[c], A[c][n]);
                after[c][n] =
                    shared_math::next_state<Thread>(decays[c][n], before[c][n], steps[c] * values[c], matrix[n]);
            }
    }

    // One step backwards: leaves du, ddt and y in the places of u, dt and dy, and dB, dC added over the warp's channels.
    DEVICE void step_back(const Own &own, int t, const float (&before)[CPT][STATES], const float (&h)[CPT][STATES],
                          const float (&decays)[CPT][STATES], Carried &carried, float *warp_sums) {
        float B_t[STATES], C_t[STATES], steps[CPT], values[CPT], grads[CPT];
        load_floats(B + t * DSTATE + own.lane * STATES, B_t);
        load_floats(C + t * DSTATE + own.lane * STATES, C_t);
        load_floats(dt + t * CHANNELS + own.first, steps);
        load_floats(u + t * CHANNELS + own.first, values);
        load_floats(dy + t * CHANNELS + own.first, grads);
        float matrix_grads[VALUES] = {}, input_grads[CPT], decay_grads[CPT], outputs[CPT];
#pragma unroll
        for (int c = 0; c < CPT; c++) {
            Sums per_channel{0.f, 0.f};
            outputs[c] = 0.f;
#pragma unroll
            for (int n = 0; n < STATES; n++) {
                shared_math::backward_step<Thread>(decays[c][n], before[c][n], h[c][n], carried.A[c][n], B_t[n], C_t[n],
                                                   steps[c], steps[c] * values[c], grads[c], carried.carry[c][n],
                                                   carried.dA[c][n], matrix_grads[n], matrix_grads[STATES + n],
                                                   per_channel);
                outputs[c] = fmaf(C_t[n], h[c][n], outputs[c]);
            }
            input_grads[c] = per_channel.input_grad;
            decay_grads[c] = per_channel.decay_grad;
        }
        own.sum(input_grads);
        own.sum(decay_grads);
        own.sum(outputs);
        __syncwarp();
        if (own.writes) {
#pragma unroll
            for (int i = 0; i < Own::SUMS; i++) {
                const int channel = own.sum_channel() + i, at = t * CHANNELS + channel;
                const float u_t = u[at], dt_t = dt[at], dy_t = dy[at];
                u[at] = fmaf(dt_t, input_grads[i], D[channel] * dy_t);
                dt[at] = fmaf(u_t, input_grads[i], decay_grads[i] * shared_math::LN_2);
                dy[at] = fmaf(D[channel], u_t, outputs[i]);
                carried.dD[i] = fmaf(dy_t, u_t, carried.dD[i]);
            }
        }
        sum_over_lanes<VALUES, TEAMS, LANES>(matrix_grads, threadIdx.x);
        const int team = threadIdx.x % 32 / LANES;
        if (team % COPIES == 0) {
#pragma unroll
            for (int i = 0; i < HELD; i++) {
                const int value = team / COPIES * HELD + i;
                warp_sums[value / STATES * DSTATE + own.lane * STATES + value % STATES] = matrix_grads[i];
            }
        }
    }

    DEVICE void walk_tile(const BackwardDirection &d, const Sizes &sizes, const Own &own, const Place &at, bool add,
                          Carried &carried, int64 slot) {
        float h[CPT][STATES] = {};
        if (at.step > 0) {
            const int64 count = (sizes.seqlen - 1) / TILE, index = at.batch * count + at.step / TILE - 1;
            own.read_states(h, d.checkpoints + index * sizes.dim * sizes.dstate, sizes);
        }
        // The last tile of a sequence may be short: nothing is walked that is not there.
        const int subs = min(SUBS, (at.times + SUB - 1) / SUB);
        for (int sub = 0; sub < subs - 1; sub++) {
#pragma unroll
            for (int c = 0; c < CPT; c++) store_floats(start_of(sub, c), h[c]);
#pragma unroll
            for (int j = 0; j < SUB; j++) {
                float decays[CPT][STATES];
                step(own, sub * SUB + j, carried.A, h, h, decays);
            }
        }
        for (int sub = subs - 1; sub >= 0; sub--) {
            float states[SUB + 1][CPT][STATES], decays[SUB][CPT][STATES];
#pragma unroll
            for (int c = 0; c < CPT; c++) {
                if (sub < subs - 1) load_floats(start_of(sub, c), h[c]);
#pragma unroll
                for (int n = 0; n < STATES; n++) states[0][c][n] = h[c][n];
            }
#pragma unroll
            for (int j = 0; j < SUB; j++) step(own, sub * SUB + j, carried.A, states[j], states[j + 1], decays[j]);
            // The warps' sums of one round are read while the next are written, to the other half.
            float *round = sums + sub % 2 * SUM_FLOATS;
#pragma unroll
            for (int j = SUB - 1; j >= 0; j--) {
                float *warp_sums = round + (threadIdx.x / 32 * SUB + j) * 2 * DSTATE;
                step_back(own, sub * SUB + j, states[j], states[j + 1], decays[j], carried, warp_sums);
            }
            __syncthreads();
            const int64 sequence = (slot * sizes.batch + at.batch) * sizes.groups + at.group;
            float *first = d.matrix_sums + sequence * sizes.seqlen * (2 * DSTATE) + (at.step + sub * SUB) * d.matrix_time;
            for (int i = threadIdx.x; i < SUB * 2 * DSTATE; i += THREADS) {
                const int j = i / (2 * DSTATE);
                if (sub * SUB + j >= at.times) continue;
                float *to = first + j * d.matrix_time + i % (2 * DSTATE);
                float sum = add ? *to : 0.f;
#pragma unroll
                for (int warp = 0; warp < WARPS; warp++) sum += round[warp * SUB * 2 * DSTATE + i];
                *to = sum;
            }
        }
    }

    DEVICE void store_tile(const BackwardDirection &d, const Sizes &sizes, const Place &at, Carried &carried) {
        const Rows rows(unhoisted(threadIdx.x));
        const bool gated = d.z.data != nullptr;
        const Stream<TU, Rows> dus(d.du, rows, at.batch, at.channel0, at.step);
        const Stream<TU, Rows> douts(d.dout, rows, at.batch, at.channel0, at.step);
        const Stream<TDelta, Rows> deltas(d.delta, rows, at.batch, at.channel0, at.step);
        const Stream<TDelta, Rows> ddeltas(d.ddelta, rows, at.batch, at.channel0, at.step);
        const Stream<TZ, Rows> zs(d.z, rows, at.batch, at.channel0, at.step);
        const Stream<TZ, Rows> dzs(d.dz, rows, at.batch, at.channel0, at.step);
#pragma unroll 1
        for (int i = 0; i < Rows::COUNT; i++) {
            if (!rows.holds(i, at.times, at.limit)) continue;
            const int index = rows.index_of(i);
            float grads[VEC], raw[VEC], shift[VEC];
            load_floats(u + index, grads);
            dus.unit(i * dus.step(d.du, rows)) = pack_as<TU>(grads);
            load_floats(dt + index, grads);
            if (sizes.softplus) {
                unpack(deltas.unit(i * deltas.step(d.delta, rows)), raw);
                load_floats(bias + rows.place_of(i), shift);
#pragma unroll
                for (int k = 0; k < VEC; k++) grads[k] *= shared_math::sigmoid<Thread>(raw[k] + shift[k]);
                store_floats(dt + index, grads);
            }
            ddeltas.unit(i * ddeltas.step(d.ddelta, rows)) = pack_as<TDelta>(grads);
            if (gated) {
                float gate[VEC], y[VEC];
                unpack(douts.unit(i * douts.step(d.dout, rows)), grads);
                unpack(zs.unit(i * zs.step(d.z, rows)), gate);
                load_floats(dy + index, y);
#pragma unroll
                for (int k = 0; k < VEC; k++) {
                    grads[k] *= sizes.share * y[k] * shared_math::silu_grad<Thread>(gate[k]);
                }
                if (sizes.accumulate) {
                    unpack(dzs.unit(i * dzs.step(d.dz, rows)), y);
#pragma unroll
                    for (int k = 0; k < VEC; k++) grads[k] += y[k];
                }
                dzs.unit(i * dzs.step(d.dz, rows)) = pack_as<TZ>(grads);
            }
        }
        if (d.bias_sums == nullptr) return;
        __syncthreads();
        const int channel = threadIdx.x % CHANNELS;
        for (int t = threadIdx.x / CHANNELS; t < min(TILE, at.times); t += PARTS) {
            carried.dbias += dt[t * CHANNELS + channel];
        }
    }

    DEVICE void run(const BackwardParams &p) {
        const Sizes &sizes = p.sizes;
        const int direction = blockIdx.z / sizes.splits, split = blockIdx.z % sizes.splits;
        const int group_size = sizes.dim / sizes.groups;
        const int slot = blockIdx.x % sizes.slots;
        const int begin = split * sizes.split_length, end = min(begin + sizes.split_length, sizes.seqlen);
        Place at;
        at.group = blockIdx.x / sizes.slots;

        for (int tile = slot; tile < sizes.tiles; tile += sizes.slots) {
            const BackwardDirection &first = p.direction[unhoisted(direction)];
            at.channel0 = at.group * group_size + tile * CHANNELS;
            at.limit = min(CHANNELS, group_size - tile * CHANNELS);
            const Own own(at.channel0, at.limit);
            Carried carried{};
            own.read_decay(carried.A, first.A, sizes);
            __syncthreads();
            for (int c = threadIdx.x; c < CHANNELS; c += THREADS) {
                D[c] = first.D != nullptr && c < at.limit ? first.D[at.channel0 + c] : 0.f;
                bias[c] = first.delta_bias != nullptr && c < at.limit ? first.delta_bias[at.channel0 + c] : 0.f;
            }
            for (at.batch = blockIdx.y; at.batch < sizes.batch; at.batch += gridDim.y) {
                const int64 states = int64(sizes.dim) * sizes.dstate;
#pragma unroll
                for (int c = 0; c < CPT; c++)
#pragma unroll
                    for (int n = 0; n < STATES; n++) carried.carry[c][n] = 0.f;
                if (first.carry != nullptr) {
                    own.read_states(carried.carry, first.carry + (int64(at.batch) * sizes.splits + split) * states, sizes);
                }
                for (at.step = begin + (end - 1 - begin) / TILE * TILE; at.step >= begin; at.step -= TILE) {
                    const BackwardDirection &d = p.direction[unhoisted(direction)];
                    at.times = end - at.step;
                    __syncthreads();
                    load_tile(d, sizes, at);
                    __syncthreads();
                    walk_tile(d, sizes, own, at, tile != slot, carried, slot);
                    store_tile(d, sizes, at, carried);
                }
            }
            write_sums(p.direction[unhoisted(direction)], sizes, own, at, carried);
        }
    }

    DEVICE void write_sums(const BackwardDirection &d, const Sizes &sizes, const Own &own, const Place &at,
                           const Carried &carried) {
        const int64 row = int64(unhoisted(blockIdx.y)) * sizes.splits + blockIdx.z % sizes.splits;
        float dA[CPT][STATES];
#pragma unroll
        for (int c = 0; c < CPT; c++)
#pragma unroll
            for (int n = 0; n < STATES; n++) {
                dA[c][n] = carried.dA[c][n] * (sizes.log_decay ? carried.A[c][n] * shared_math::LN_2 : 1.f);
            }
        own.write_states(dA, d.A_sums + row * sizes.dim * sizes.dstate, sizes);
        if (d.D_sums != nullptr && own.writes) {
#pragma unroll
            for (int i = 0; i < Own::SUMS; i++) {
                const int channel = own.sum_channel() + i;
                if (channel < at.limit) d.D_sums[row * sizes.dim + at.channel0 + channel] = carried.dD[i];
            }
        }
        if (d.bias_sums == nullptr) return;
        __syncthreads();
        u[threadIdx.x] = carried.dbias;
        __syncthreads();
        const int channel = threadIdx.x;
        if (channel >= at.limit) return;
        float sum = 0.f;
#pragma unroll
        for (int part = 0; part < PARTS; part++) sum += u[part * CHANNELS + channel];
        d.bias_sums[row * sizes.dim + at.channel0 + channel] = sum;
    }
};

KERNEL(scan_backward, BackwardParams, THREADS, BackwardScan<KERNEL_ARGUMENTS>::BLOCKS) {
    SHARED_BYTES(shared);
    BackwardScan<KERNEL_ARGUMENTS>(reinterpret_cast<float *>(shared)).run(p);
}

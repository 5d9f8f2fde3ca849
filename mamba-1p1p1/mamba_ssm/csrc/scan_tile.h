// How a block of the scan kernels shares its work: which channels, states and time steps each thread holds, and how
// tiles of the tensors come into shared memory.
//
// LANES neighbouring threads share CPT channels, each thread holding STATES of their states in registers; a block has
// THREADS / LANES such teams. Sequences are walked in tiles of some steps; a tile's u, delta, z are read by all threads
// in the order of memory, not by the team that scans them, and B, C are read once for all channels.
#pragma once

#include "device.h"
#include "scan_math.h"

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / 32;
constexpr int STATES = 4;

// A (batch, channel, time) tensor of any strides, counted in elements; data is null if there is none.
struct Slab {
    void *data;
    int64 batch, channel, time;
};

// A (batch, group, time, state) tensor, likewise.
struct Matrix {
    void *data;
    int64 batch, group, time, state;
};

struct Sizes {
    int batch, dim, seqlen, dstate;
    int groups, tiles, slots;         // tiles: channel tiles of a group; slots: blocks that share them
    int splits, split_length;         // the sequence is cut into splits of split_length steps
    int directions, interval;         // interval: steps between checkpoints
    int softplus, state_fastest;
    int accumulate, log_decay;        // whether out and dz are added to; whether A holds log(-A), as does its gradient
    float share;                      // what out is multiplied with, after all else
};

// A, out of what stands for it.
DEVICE float decay_rate(float A, const Sizes &sizes) {
    return sizes.log_decay ? -fast_exp2(A * shared_math::LOG2_E) : A;
}

// How the threads of a block share a tile of TILE steps by WIDTH channels for loads and stores, in the order of memory.
// PACK 0: neighbouring threads hold neighbouring steps. Else each holds PACK neighbouring channels, which must be dense
// and aligned if PACK > 1, and neighbouring threads hold neighbouring packs. A thread has COUNT of these units.
template <int TILE, int WIDTH, int PACK> struct RowMap {
    static constexpr int TIMES = TILE, SIZE = TILE * WIDTH, VEC = PACK > 1 ? PACK : 1;
    static constexpr int UNITS = SIZE / VEC, COUNT = (UNITS + THREADS - 1) / THREADS;
    static constexpr int ACROSS = PACK == 0 ? TILE : WIDTH / VEC;
    int time, place;

    DEVICE explicit RowMap(int thread = threadIdx.x) {
        const int inner = thread % ACROSS, outer = thread / ACROSS;
        time = PACK == 0 ? inner : outer;
        place = PACK == 0 ? outer : inner * VEC;
    }
    DEVICE int time_of(int i) const { return PACK == 0 ? time : time + i * (THREADS / ACROSS); }
    DEVICE int place_of(int i) const { return PACK == 0 ? place + i * (THREADS / ACROSS) : place; }
    DEVICE int index_of(int i) const { return time_of(i) * WIDTH + place_of(i); }
    // Whether unit i is in the tile, and of so many steps and channels. A pack is inside or outside as a whole.
    DEVICE bool holds(int i, int times, int places) const {
        return time_of(i) < times && place_of(i) < places && exists(i);
    }
    DEVICE bool exists(int i) const { return UNITS % THREADS == 0 || (time_of(i) < TILE && place_of(i) < WIDTH); }
    DEVICE int64 step(int64 time_stride, int64 place_stride) const {
        return THREADS / ACROSS * (PACK == 0 ? place_stride : time_stride);
    }
};

// The same for the few states of B and C: one element at a time, in either order.
template <int TILE, int WIDTH> struct MatrixMap {
    static constexpr int TIMES = TILE, SIZE = TILE * WIDTH, VEC = 1, COUNT = (SIZE + THREADS - 1) / THREADS;
    int time, place, time_step, place_step;

    DEVICE explicit MatrixMap(bool state_fastest, int thread = threadIdx.x) {
        time = state_fastest ? thread / WIDTH : thread % TILE;
        place = state_fastest ? thread % WIDTH : thread / TILE;
        time_step = state_fastest ? THREADS / WIDTH : 0;
        place_step = state_fastest ? 0 : THREADS / TILE;
    }
    DEVICE int time_of(int i) const { return time + i * time_step; }
    DEVICE int place_of(int i) const { return place + i * place_step; }
    DEVICE int index_of(int i) const { return time_of(i) * WIDTH + place_of(i); }
    DEVICE bool holds(int i, int times, int places) const {
        return time_of(i) < times && place_of(i) < places && exists(i);
    }
    DEVICE bool exists(int i) const { return SIZE % THREADS == 0 || (time_of(i) < TILE && place_of(i) < WIDTH); }
    DEVICE int64 step(int64 time_stride, int64 place_stride) const {
        return time_step * time_stride + place_step * place_stride;
    }
};

// A thread's units of a tensor, tile after tile. Only the place is kept between tiles: strides are read again from the
// kernel's arguments, since registers are what limits how many blocks run at once.
template <class T, class Map> struct Stream {
    using Unit = Pack<T, Map::VEC>;
    T *at;

    DEVICE Stream(const Slab &slab, const Map &map, int batch, int channel, int start)
        : at(static_cast<T *>(slab.data) + batch * slab.batch + (channel + map.place) * slab.channel +
             (start + map.time) * slab.time) {}
    DEVICE Stream(const Matrix &matrix, const Map &map, int batch, int group, int start)
        : at(static_cast<T *>(matrix.data) + batch * matrix.batch + group * matrix.group + map.place * matrix.state +
             (start + map.time) * matrix.time) {}

    static DEVICE int64 step(const Slab &slab, const Map &map) { return map.step(slab.time, slab.channel); }
    static DEVICE int64 step(const Matrix &matrix, const Map &map) { return map.step(matrix.time, matrix.state); }

    DEVICE Unit &unit(int64 offset) const { return *reinterpret_cast<Unit *>(at + offset); }

    // COUNT of the thread's units of this tile, from `first` on, zero outside `times` steps and `places` channels.
    template <int COUNT, class Strides>
    DEVICE void read(Unit (&to)[COUNT], int first, const Map &map, const Strides &strides, int times, int places) const {
        const int64 stride = step(strides, map);
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            to[i] = Unit{};
            if (map.holds(first + i, times, places)) to[i] = unit((first + i) * stride);
        }
    }

    // All of the thread's units of this tile; then stands at the next.
    template <int COUNT, class Strides>
    DEVICE void next(Unit (&to)[COUNT], const Map &map, const Strides &strides, int times, int places) {
        read(to, 0, map, strides, times, places);
        at += Map::TIMES * strides.time;
    }
};

// A thread's part of the states: channels first .. first + CPT - 1 of its block, states lane * STATES onwards.
template <int LANES, int CPT> struct Team {
    static constexpr int DSTATE = LANES * STATES;
    static constexpr int CHANNELS = THREADS / LANES * CPT;
    int lane, first, channel, channels;
    bool writes;  // whether this lane keeps sums over the team's states, for channels sum_channel() onwards
    static constexpr int SUMS = CPT > LANES ? CPT / LANES : 1;

    DEVICE Team(int channel0, int limit) {
        lane = threadIdx.x % LANES;
        first = threadIdx.x / LANES * CPT;
        channel = channel0 + first;
        channels = limit - first;
        writes = CPT >= LANES || lane % (LANES > CPT ? LANES / CPT : 1) == 0;
    }
    DEVICE int sum_channel() const { return first + (CPT >= LANES ? lane * SUMS : lane / (LANES > CPT ? LANES / CPT : 1)); }
    DEVICE void sum(float (&v)[CPT]) const { sum_over_lanes<CPT, LANES, 1>(v, threadIdx.x); }

    // A * log2(e) of its channels and states; 0, which leaves a state as it is, where there is none.
    DEVICE void read_decay(float (&A)[CPT][STATES], const float *data, const Sizes &sizes) const {
#pragma unroll
        for (int c = 0; c < CPT; c++)
#pragma unroll
            for (int n = 0; n < STATES; n++) {
                int state = lane * STATES + n;
                bool there = c < channels && state < sizes.dstate;
                A[c][n] = there ? decay_rate(data[int64(channel + c) * sizes.dstate + state], sizes) * shared_math::LOG2_E : 0.f;
            }
    }
    // States of its channels in a (dim, dstate) float tensor, whose start is aligned to 16 bytes.
    DEVICE void read_states(float (&h)[CPT][STATES], const float *data, const Sizes &sizes) const {
        if (sizes.dstate % STATES == 0) {
#pragma unroll
            for (int c = 0; c < CPT; c++) {
                const bool there = c < channels && lane * STATES < sizes.dstate;
                if (there) load_floats(data + int64(channel + c) * sizes.dstate + lane * STATES, h[c]);
#pragma unroll
                for (int n = 0; n < STATES; n++) h[c][n] = there ? h[c][n] : 0.f;
            }
            return;
        }
#pragma unroll
        for (int c = 0; c < CPT; c++)
#pragma unroll
            for (int n = 0; n < STATES; n++) {
                int state = lane * STATES + n;
                bool there = c < channels && state < sizes.dstate;
                h[c][n] = there ? data[int64(channel + c) * sizes.dstate + state] : 0.f;
            }
    }
    DEVICE void write_states(const float (&h)[CPT][STATES], float *data, const Sizes &sizes) const {
        if (sizes.dstate % STATES == 0) {
#pragma unroll
            for (int c = 0; c < CPT; c++) {
                if (c >= channels || lane * STATES >= sizes.dstate) continue;
                store_floats(data + int64(channel + c) * sizes.dstate + lane * STATES, h[c]);
            }
            return;
        }
#pragma unroll
        for (int c = 0; c < CPT; c++)
#pragma unroll
            for (int n = 0; n < STATES; n++) {
                int state = lane * STATES + n;
                if (c < channels && state < sizes.dstate) data[int64(channel + c) * sizes.dstate + state] = h[c][n];
            }
    }
};

DEVICE float step_size(float delta, float bias, bool softplus) {
    float raw = delta + bias;
    return softplus ? shared_math::softplus<Thread>(raw) : raw;
}

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
    int softplus, time_fastest, state_fastest;
};

// Where a thread stands in a tile of TILE steps by WIDTH channels (or states), for loads and stores in memory order.
template <int TILE, int WIDTH> struct TileMap {
    static constexpr int TIMES = TILE, SIZE = TILE * WIDTH;
    static constexpr int COUNT = (SIZE + THREADS - 1) / THREADS;
    int time, place, time_step, place_step;

    DEVICE explicit TileMap(bool time_fastest) {
        int thread = threadIdx.x;
        time = time_fastest ? thread % TILE : thread / WIDTH;
        place = time_fastest ? thread / TILE : thread % WIDTH;
        time_step = time_fastest ? 0 : THREADS / WIDTH;
        place_step = time_fastest ? THREADS / TILE : 0;
    }
    DEVICE int time_of(int i) const { return time + i * time_step; }
    DEVICE int place_of(int i) const { return place + i * place_step; }
    DEVICE int index_of(int i) const { return time_of(i) * WIDTH + place_of(i); }
    DEVICE bool holds(int i, int times, int places) const {
        return time_of(i) < times && place_of(i) < places && (SIZE % THREADS == 0 || time_of(i) < TILE);
    }
};

// A thread's elements of a tensor, tile after tile. Only the place is kept between tiles: strides are read again from
// the kernel's arguments, since registers are what limits how many blocks run at once.
template <class T> struct Stream {
    T *at;

    template <class Map>
    DEVICE Stream(const Slab &slab, const Map &map, int batch, int channel, int start)
        : at(static_cast<T *>(slab.data) + batch * slab.batch + (channel + map.place) * slab.channel +
             (start + map.time) * slab.time) {}
    template <class Map>
    DEVICE Stream(const Matrix &matrix, const Map &map, int batch, int group, int start)
        : at(static_cast<T *>(matrix.data) + batch * matrix.batch + group * matrix.group + map.place * matrix.state +
             (start + map.time) * matrix.time) {}

    template <class Map> static DEVICE int64 step(const Slab &slab, const Map &map) {
        return map.time_step * slab.time + map.place_step * slab.channel;
    }
    template <class Map> static DEVICE int64 step(const Matrix &matrix, const Map &map) {
        return map.time_step * matrix.time + map.place_step * matrix.state;
    }

    // COUNT of the thread's elements of this tile, from `first` on, zero outside `times` steps and `places` channels or
    // states.
    template <int COUNT, class Map, class Strides>
    DEVICE void read(T (&to)[COUNT], int first, const Map &map, const Strides &strides, int times, int places) const {
        const int64 stride = step(strides, map);
        const T *here = at + first * stride;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            to[i] = T{};
            if (map.holds(first + i, times, places)) to[i] = *here;
            here += stride;
        }
    }

    // All of the thread's elements of this tile; then stands at the next.
    template <int COUNT, class Map, class Strides>
    DEVICE void next(T (&to)[COUNT], const Map &map, const Strides &strides, int times, int places) {
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
                A[c][n] = there ? data[int64(channel + c) * sizes.dstate + state] * shared_math::LOG2_E : 0.f;
            }
    }
    // States of its channels in a (dim, dstate) float tensor.
    DEVICE void read_states(float (&h)[CPT][STATES], const float *data, const Sizes &sizes) const {
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

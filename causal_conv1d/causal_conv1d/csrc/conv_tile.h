// What the forward and the backward convolution share: arguments, and which channels and steps a thread works on.
//
// A thread holds VEC neighbouring channels and walks STRIP steps of one sequence, with the last WIDTH inputs in
// registers. Threads that lie next to each other hold neighbouring channels, or, in layouts where time is the dense
// dimension, neighbouring strips.
#pragma once

#include "activations.h"
#include "device.h"

constexpr int THREADS = 128;

// A (batch, channel, time) tensor of any strides, counted in elements, in the order the convolution runs in.
struct Slab {
    void *data;
    int64 batch, channel, time;
};

// A factor of every step of every sequence, in the order the convolution runs in.
struct Mask {
    const float *data;
    int64 batch, time;  // strides

    DEVICE float at(int b, int t) const { return data[b * batch + t * time]; }
};

struct Sizes {
    int batch, dim, seqlen;
    int strips;        // pieces that a sequence is cut into
    int silu, time_fastest;
};

template <class T, int VEC> struct Column {
    T *at;
    int64 time, channel;

    DEVICE Column(const Slab &slab, int batch, int first_channel)
        : at(static_cast<T *>(slab.data) + batch * slab.batch + first_channel * slab.channel),
          time(slab.time),
          channel(slab.channel) {}

    // The VEC channels at one step; VEC > 1 wants them dense and aligned.
    DEVICE Pack<T, VEC> read(int t) const { return *reinterpret_cast<const Pack<T, VEC> *>(at + t * time); }
    DEVICE void write(int t, const float (&values)[VEC]) const {
        Pack<T, VEC> pack;
#pragma unroll
        for (int i = 0; i < VEC; i++) pack.v[i] = from_float<T>(values[i]);
        *reinterpret_cast<Pack<T, VEC> *>(at + t * time) = pack;
    }
};

template <class T, int VEC> DEVICE Pack<T, VEC> zeros() {
    Pack<T, VEC> pack;
#pragma unroll
    for (int i = 0; i < VEC; i++) pack.v[i] = from_float<T>(0.f);
    return pack;
}

// The taps and bias of a thread's channels, in float.
template <int VEC, int WIDTH> struct Taps {
    float weight[WIDTH][VEC], bias[VEC];

    template <class TW> DEVICE void read(const TW *weights, const TW *biases, int first_channel) {
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            bias[i] = biases == nullptr ? 0.f : to_float(biases[first_channel + i]);
#pragma unroll
            for (int w = 0; w < WIDTH; w++) weight[w][i] = to_float(weights[(first_channel + i) * WIDTH + w]);
        }
    }
    // window[w] is the input WIDTH - 1 - w steps ago.
    DEVICE float convolve(const float (&window)[WIDTH][VEC], int i) const {
        float sum = bias[i];
#pragma unroll
        for (int w = 0; w < WIDTH; w++) sum = fmaf(weight[w][i], window[w][i], sum);
        return sum;
    }
};

template <int VEC, int WIDTH> DEVICE void shift(float (&window)[WIDTH][VEC]) {
#pragma unroll
    for (int w = 0; w < WIDTH - 1; w++)
#pragma unroll
        for (int i = 0; i < VEC; i++) window[w][i] = window[w + 1][i];
}

template <int VEC> DEVICE void scale(float (&values)[VEC], float factor) {
#pragma unroll
    for (int i = 0; i < VEC; i++) values[i] *= factor;
}

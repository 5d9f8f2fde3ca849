// Moves between tensors of any dtype and strides and tiles: float32 rows in cache, one row a step, `pitch` floats apart,
// LANES channels to a row. Included inside an instruction set's namespace, after vec.h.

// A (channels, steps) plane of a tensor, in the order the kernel walks it: a negative step stride walks backwards.
struct Plane {
    char *data;
    int64_t dtype, channel_stride, step_stride;  // strides in elements

    Plane at(int64_t channel, int64_t step) const {
        Plane plane = *this;
        plane.data += (channel * channel_stride + step * step_stride) * (dtype == FLOAT32 ? 4 : 2);
        return plane;
    }
};

// Asks the second cache for what the tile `ahead` elements further has, where steps are neighbours: each channel is a line of
// its own there, more of them than processors follow by themselves. With AVX-512, whose rows are whole lines, it gave nothing.
template <class T> VEC void expect_channels(const T *at, int64_t channel_stride, int64_t ahead, int channels) {
    if (LANES != 8 || ahead == 0) return;
    for (int c = 0; c < channels && c < LANES; ++c) __builtin_prefetch(at + c * channel_stride + ahead, 0, 2);
}

template <class T>
VEC void load_tile(const T *from, int64_t channel_stride, int64_t step_stride, int channels, int64_t steps, float *tile,
                   int64_t pitch, int64_t ahead) {
    if (channel_stride == 1) {
        if (channels >= LANES) {
            for (int64_t t = 0; t < steps; ++t) store(tile + t * pitch, load(from + t * step_stride));
        } else {
            for (int64_t t = 0; t < steps; ++t) store(tile + t * pitch, load_some(from + t * step_stride, channels));
        }
        return;
    }
    int64_t t = 0;
    if (step_stride == 1 || step_stride == -1) {
        for (; t + LANES <= steps; t += LANES) {
            V rows[LANES];
            const T *first = step_stride == 1 ? from + t : from - t - (LANES - 1);
            expect_channels(first, channel_stride, ahead * step_stride, channels);
            for (int c = 0; c < LANES; ++c) rows[c] = c < channels ? load(first + c * channel_stride) : set(0.f);
            transpose(rows);
            float *to = tile + t * pitch;
            for (int i = 0; i < LANES; ++i) store(to + (step_stride == 1 ? i : LANES - 1 - i) * pitch, rows[i]);
        }
    }
    for (; t < steps; ++t) {
        float row[LANES] = {};
        for (int c = 0; c < channels && c < LANES; ++c) row[c] = load_one(from + c * channel_stride + t * step_stride);
        store(tile + t * pitch, load(row));
    }
}

template <class T>
VEC void store_tile(T *to, int64_t channel_stride, int64_t step_stride, int channels, int64_t steps, const float *tile,
                    int64_t pitch, int64_t ahead) {
    if (channel_stride == 1) {
        if (channels >= LANES) {
            for (int64_t t = 0; t < steps; ++t) store(to + t * step_stride, load(tile + t * pitch));
        } else {
            for (int64_t t = 0; t < steps; ++t) store_some(to + t * step_stride, load(tile + t * pitch), channels);
        }
        return;
    }
    int64_t t = 0;
    if (step_stride == 1 || step_stride == -1) {
        for (; t + LANES <= steps; t += LANES) {
            V rows[LANES];
            const float *from = tile + t * pitch;
            for (int i = 0; i < LANES; ++i) rows[i] = load(from + (step_stride == 1 ? i : LANES - 1 - i) * pitch);
            transpose(rows);
            T *first = step_stride == 1 ? to + t : to - t - (LANES - 1);
            expect_channels(first, channel_stride, ahead * step_stride, channels);
            for (int c = 0; c < channels && c < LANES; ++c) store(first + c * channel_stride, rows[c]);
        }
    }
    for (; t < steps; ++t)
        for (int c = 0; c < channels && c < LANES; ++c)
            store_one(to + c * channel_stride + t * step_stride, tile[t * pitch + c]);
}

// Tile rows from the plane's first `steps` steps; lanes from `channels` on are zero. The next tile is `ahead` steps further.
__attribute__((noinline)) inline void load_tile(const Plane &plane, int channels, int64_t steps, float *tile,
                                                int64_t pitch = LANES, int64_t ahead = 0) {
    const auto load_as = [&](const auto *data) {
        load_tile(data, plane.channel_stride, plane.step_stride, channels, steps, tile, pitch, ahead);
    };
    if (plane.dtype == FLOAT32) load_as(reinterpret_cast<const float *>(plane.data));
    if (plane.dtype == BFLOAT16) load_as(reinterpret_cast<const bfloat16 *>(plane.data));
    if (plane.dtype == FLOAT16) load_as(reinterpret_cast<const float16 *>(plane.data));
}

// The first `channels` lanes of each row, at most LANES, to the plane's first `steps` steps.
__attribute__((noinline)) inline void store_tile(const Plane &plane, int channels, int64_t steps, const float *tile,
                                                 int64_t pitch = LANES, int64_t ahead = 0) {
    const auto store_as = [&](auto *data) {
        store_tile(data, plane.channel_stride, plane.step_stride, channels, steps, tile, pitch, ahead);
    };
    if (plane.dtype == FLOAT32) store_as(reinterpret_cast<float *>(plane.data));
    if (plane.dtype == BFLOAT16) store_as(reinterpret_cast<bfloat16 *>(plane.data));
    if (plane.dtype == FLOAT16) store_as(reinterpret_cast<float16 *>(plane.data));
}

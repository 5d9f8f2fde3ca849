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

template <class T>
VEC void load_tile(const T *from, int64_t channel_stride, int64_t step_stride, int channels, int64_t steps, float *tile,
                   int64_t pitch) {
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
                    int64_t pitch) {
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
            for (int c = 0; c < channels && c < LANES; ++c) store(first + c * channel_stride, rows[c]);
        }
    }
    for (; t < steps; ++t)
        for (int c = 0; c < channels && c < LANES; ++c)
            store_one(to + c * channel_stride + t * step_stride, tile[t * pitch + c]);
}

// Tile rows from the plane's first `steps` steps; lanes from `channels` on are zero.
__attribute__((noinline)) inline void load_tile(const Plane &plane, int channels, int64_t steps, float *tile,
                                                int64_t pitch = LANES) {
    const int64_t c = plane.channel_stride, t = plane.step_stride;
    if (plane.dtype == FLOAT32) load_tile(reinterpret_cast<const float *>(plane.data), c, t, channels, steps, tile, pitch);
    if (plane.dtype == BFLOAT16) load_tile(reinterpret_cast<const bfloat16 *>(plane.data), c, t, channels, steps, tile, pitch);
    if (plane.dtype == FLOAT16) load_tile(reinterpret_cast<const float16 *>(plane.data), c, t, channels, steps, tile, pitch);
}

// The first `channels` lanes of each row, at most LANES, to the plane's first `steps` steps.
__attribute__((noinline)) inline void store_tile(const Plane &plane, int channels, int64_t steps, const float *tile,
                                                 int64_t pitch = LANES) {
    const int64_t c = plane.channel_stride, t = plane.step_stride;
    if (plane.dtype == FLOAT32) store_tile(reinterpret_cast<float *>(plane.data), c, t, channels, steps, tile, pitch);
    if (plane.dtype == BFLOAT16) store_tile(reinterpret_cast<bfloat16 *>(plane.data), c, t, channels, steps, tile, pitch);
    if (plane.dtype == FLOAT16) store_tile(reinterpret_cast<float16 *>(plane.data), c, t, channels, steps, tile, pitch);
}

// The mixer over lines of which some tokens are hidden, forward and backward, on CPU vectors, a lane a channel. As over
// full lines (pooled_kernels.h) there is one walk over the tokens before the scans and one behind them, for both directions,
// and no token is moved: the walk goes from line to line, wherever a line's visible tokens stand. Included inside an
// instruction set's namespace (see each_isa.h).

#include "pooled_kernels.h"

template <class T> VEC T *row_of(const Tokens &x, int64_t batch, int64_t token) {
    return pointer<T>(x.data) + batch * x.batch_stride + token * x.token_stride;
}
template <class T> VEC T *row_of(int64_t data, int64_t row, int64_t dim) { return pointer<T>(data) + row * dim; }

// ---- convolution ----

template <class T, int WIDTH, int COUNT>
void convolve_visible(const VisibleConvArgs &s, int64_t batch, int64_t place, const T *zeros, const float *forward,
                      const float *backward, float *sum_forward, float *sum_backward) {
    const T *x[COUNT + 2 * (WIDTH - 1)];
    T *skip[COUNT];
    for (int i = 0; i < COUNT + 2 * (WIDTH - 1); ++i) {
        const int64_t at = place + i - (WIDTH - 1);
        x[i] = at < 0 || at >= s.lines.tokens ? zeros : row_of<T>(s.x, batch, s.lines.walked(batch, at));
    }
    for (int i = 0; i < COUNT; ++i)
        skip[i] = row_of<T>(s.skip, batch * s.lines.tokens + s.lines.walked(batch, place + i), s.dim);
    for (int64_t c = 0; c < s.dim; c += LANES) {
        const int channels = int(s.dim - c < LANES ? s.dim - c : LANES);
        convolve<T, WIDTH, COUNT>(x, skip, c, channels, forward, backward, padded(s.dim),
                                  SharedSums{sum_forward, sum_backward, {}, {}});
    }
}

template <class T, int WIDTH>
void convolve_visible_line(const VisibleConvArgs &s, int64_t task, const float *parameters, const T *zeros, float *sums) {
    const int64_t batch = task / s.lines.count, line = task % s.lines.count, pitch = padded(s.dim);
    const float *forward = parameters, *backward = parameters + (WIDTH + 2) * pitch;
    const int64_t *starts = s.lines.starts_of(batch), end = starts[line + 1];
    std::memset(sums, 0, 2 * pitch * sizeof(float));
    for (int64_t place = starts[line]; place < end; place += STEPS) {
        const int64_t left = end - place;
        const auto tokens = left == 1   ? convolve_visible<T, WIDTH, 1>
                            : left == 2 ? convolve_visible<T, WIDTH, 2>
                            : left == 3 ? convolve_visible<T, WIDTH, 3>
                                        : convolve_visible<T, WIDTH, STEPS>;
        tokens(s, batch, place, zeros, forward, backward, sums, sums + pitch);
    }
    const V factor = set(float(double_of(s.factor)));
    store_mean(row_of<T>(s.pooled_forward, task, s.dim), sums, factor, s.dim);
    store_mean(row_of<T>(s.pooled_backward, task, s.dim), sums + pitch, factor, s.dim);
}

template <class T> int visible_conv_of(const VisibleConvArgs &s) {
    const int64_t tasks = s.batch * s.lines.count, pitch = padded(s.dim), parameters = 2 * (s.width + 2) * pitch;
    const int shares = parallel::shares_for(s.threads, tasks, s.batch * s.lines.tokens * pitch / LANES * STEPS_A_VECTOR);
    float *const scratch = static_cast<float *>(std::calloc(parameters + (1 + 2 * shares) * pitch, sizeof(float)));
    if (!scratch) return 1;
    load_taps(s.forward, s.dim, s.width, scratch);
    load_taps(s.backward, s.dim, s.width, scratch + parameters / 2);
    const T *zeros = reinterpret_cast<const T *>(scratch + parameters);
    const auto line = s.width == 2   ? convolve_visible_line<T, 2>
                      : s.width == 3 ? convolve_visible_line<T, 3>
                                     : convolve_visible_line<T, 4>;
    parallel::run(shares, [&](int share) {
        float *sums = scratch + parameters + (1 + 2 * share) * pitch;
        const parallel::Range range = parallel::share_of(tasks, shares, share);
        for (int64_t task = range.begin; task < range.end; ++task) line(s, task, scratch, zeros, sums);
    });
    std::free(scratch);
    return 0;
}

// Not zero where there was no memory.
inline int visible_conv(const VisibleConvArgs &s) {
    return s.dtype == FLOAT32    ? visible_conv_of<float>(s)
           : s.dtype == BFLOAT16 ? visible_conv_of<bfloat16>(s)
                                 : visible_conv_of<float16>(s);
}

// ---- its gradient ----

// One direction's taps for a vector of channels, and the sums of their gradients: the taps, then bias, then D.
template <int WIDTH> struct Direction {
    V tap[WIDTH + 2], grad[WIDTH + 2];

    VEC void load_from(const float *rows, int64_t pitch) {
#pragma GCC unroll 8
        for (int k = 0; k < WIDTH + 2; ++k) tap[k] = load(rows + k * pitch), grad[k] = set(0.f);
    }

    // What the activation is of at a place; x(k) is what tap k sees there.
    template <class Seen> VEC V convolve(Seen x) const {
        V before = tap[WIDTH];
#pragma GCC unroll 8
        for (int k = 0; k < WIDTH; ++k) before = fma(tap[k], x(k), before);
        return before;
    }
    // The gradient of that, of which `opening` is the sigmoid.
    template <class Seen> VEC V differentiate(V dskip, V dpooled, V before, V opening, Seen x) {
        const V slope = fma(tap[WIDTH + 1], dskip, dpooled) * shared_math::silu_grad<Machine>(before, opening);
#pragma GCC unroll 8
        for (int k = 0; k < WIDTH; ++k) grad[k] = fma(slope, x(k), grad[k]);
        grad[WIDTH] = grad[WIDTH] + slope;
        grad[WIDTH + 1] = fma(dskip, before * opening, grad[WIDTH + 1]);
        return slope;
    }

    void store_to(const TapsGradient &to, int64_t first, int channels) const {
        for (int c = 0; c < channels; ++c) {
            for (int k = 0; k < WIDTH; ++k) pointer<float>(to.weight)[(first + c) * WIDTH + k] = grad[k][c];
            if (to.bias) pointer<float>(to.bias)[first + c] = grad[WIDTH][c];
            pointer<float>(to.D)[first + c] = grad[WIDTH + 1][c];
        }
    }
};

// A vector of channels over all images, so that no sum crosses threads. At place t of the walk the gradients before the
// activation are known up to t, and dx is complete for t - BEFORE: the forward taps there are seen from places up to t,
// the backward ones from places up to t - BEFORE.
template <class T, int WIDTH>
void differentiate_channels(const VisibleConvBackwardArgs &s, int64_t c, const float *forward, const float *backward) {
    constexpr int BEFORE = WIDTH - 1, SEEN = 2 * BEFORE + 1;
    const int64_t pitch = padded(s.dim), tokens = s.lines.tokens;
    const int channels = int(s.dim - c < LANES ? s.dim - c : LANES);
    const V factor = set(float(double_of(s.factor))), zero = set(0.f);
    Direction<WIDTH> f, b;
    f.load_from(forward + c, pitch), b.load_from(backward + c, pitch);
    for (int64_t batch = 0; batch < s.batch; ++batch) {
        const int64_t *next = s.lines.starts_of(batch);  // where the line behind the walked one begins
        int64_t line = batch * s.lines.count - 1;
        V row[SEEN], slope_f[WIDTH], slope_b[SEEN], pooled_f = zero, pooled_b = zero;  // slope[j] is that of place t - j
        for (int i = 0; i < SEEN; ++i) row[i] = slope_b[i] = zero;
        for (int i = 0; i < WIDTH; ++i) slope_f[i] = zero;
        for (int64_t t = -BEFORE; t < tokens + BEFORE; ++t) {
#pragma GCC unroll 8
            for (int i = 0; i < SEEN - 1; ++i) row[i] = row[i + 1], slope_b[SEEN - 1 - i] = slope_b[SEEN - 2 - i];
#pragma GCC unroll 8
            for (int i = WIDTH - 1; i > 0; --i) slope_f[i] = slope_f[i - 1];
            const int64_t ahead = t + BEFORE;
            row[SEEN - 1] = ahead < tokens ? load_some(row_of<T>(s.x, batch, s.lines.walked(batch, ahead)) + c, channels) : zero;
            if (t < 0) continue;
            slope_f[0] = slope_b[0] = zero;
            if (t < tokens) {
                if (t >= *next) {
                    for (; t >= *next; ++next) ++line;
                    pooled_f = load_some(row_of<T>(s.dpooled_forward, line, s.dim) + c, channels) * factor;
                    pooled_b = load_some(row_of<T>(s.dpooled_backward, line, s.dim) + c, channels) * factor;
                }
                const int64_t at = batch * tokens + s.lines.walked(batch, t);
                const V dskip = load_some(row_of<T>(s.dskip, at, s.dim) + c, channels);
                const auto seen_f = [&](int k) { return row[k]; }, seen_b = [&](int k) { return row[SEEN - 1 - k]; };
                const Vectors<2> before = {{f.convolve(seen_f), b.convolve(seen_b)}};
                const Vectors<2> opening = shared_math::sigmoid<MachineOf<2>>(before);
                slope_f[0] = f.differentiate(dskip, pooled_f, before.of[0], opening.of[0], seen_f);
                slope_b[0] = b.differentiate(dskip, pooled_b, before.of[1], opening.of[1], seen_b);
            }
            if (t < BEFORE) continue;
            V dx = zero;
#pragma GCC unroll 8
            for (int k = 0; k < WIDTH; ++k) dx = fma(f.tap[k], slope_f[k], fma(b.tap[k], slope_b[SEEN - 1 - k], dx));
            store_some(row_of<T>(s.dx, batch, s.lines.walked(batch, t - BEFORE)) + c, dx, channels);
        }
    }
    f.store_to(s.dforward, c, channels), b.store_to(s.dbackward, c, channels);
}

template <class T> int visible_conv_backward_of(const VisibleConvBackwardArgs &s) {
    const int64_t pitch = padded(s.dim), tasks = pitch / LANES, parameters = 2 * (s.width + 2) * pitch;
    const int shares = parallel::shares_for(s.threads, tasks, s.batch * s.lines.tokens * tasks * STEPS_A_VECTOR * 2);
    float *const scratch = static_cast<float *>(std::calloc(parameters, sizeof(float)));
    if (!scratch) return 1;
    load_taps(s.forward, s.dim, s.width, scratch);
    load_taps(s.backward, s.dim, s.width, scratch + parameters / 2);
    const auto differentiate = s.width == 2   ? differentiate_channels<T, 2>
                               : s.width == 3 ? differentiate_channels<T, 3>
                                              : differentiate_channels<T, 4>;
    parallel::run(shares, [&](int share) {
        const parallel::Range range = parallel::share_of(tasks, shares, share);
        for (int64_t task = range.begin; task < range.end; ++task)
            differentiate(s, task * LANES, scratch, scratch + parameters / 2);
    });
    std::free(scratch);
    return 0;
}

// Not zero where there was no memory.
inline int visible_conv_backward(const VisibleConvBackwardArgs &s) {
    return s.dtype == FLOAT32    ? visible_conv_backward_of<float>(s)
           : s.dtype == BFLOAT16 ? visible_conv_backward_of<bfloat16>(s)
                                 : visible_conv_backward_of<float16>(s);
}

// ---- norm and gate ----

// body(task, row of scratch) for every line of every image; `rows` rows of scratch a share, zero at first, behind the norm's
// weight and bias.
template <class Args, class Body> void for_lines(const Args &s, float *scratch, int shares, int rows, Body body) {
    const int64_t tasks = s.batch * s.lines.count, pitch = padded(s.dim);
    float *const weight = scratch, *const bias = scratch + pitch;
    for (int64_t c = 0; c < s.dim; ++c) weight[c] = s.weight ? pointer<float>(s.weight)[c] : 1.f;
    if (s.bias) std::memcpy(bias, pointer<float>(s.bias), s.dim * sizeof(float));
    parallel::run(shares, [&](int share) {
        const parallel::Range range = parallel::share_of(tasks, shares, share);
        for (int64_t task = range.begin; task < range.end; ++task) body(task, scratch + (2 + rows * share) * pitch);
    });
}

template <class Args> int gate_shares(const Args &s) {
    const int64_t vectors = s.batch * s.lines.tokens * padded(s.dim) / LANES;
    return parallel::shares_for(s.threads, s.batch * s.lines.count, vectors * STEPS_A_VECTOR / 2);
}

template <class T> int visible_gate_of(const VisibleGateArgs &s) {
    const int64_t pitch = padded(s.dim);
    const int shares = gate_shares(s);
    float *const scratch = static_cast<float *>(std::calloc((2 + shares) * pitch, sizeof(float)));
    if (!scratch) return 1;
    const GateSettings settings{s.dim, s.weight != 0, float(double_of(s.share)), float(double_of(s.eps))};
    for_lines(s, scratch, shares, 1, [&](int64_t task, float *total) {
        const int64_t batch = task / s.lines.count, *starts = s.lines.starts_of(batch) + task % s.lines.count;
        const T *group = row_of<T>(s.groups, task, s.dim);
        for (int64_t place = starts[0]; place < starts[1]; ++place) {
            const int64_t token = s.lines.walked(batch, place), row = batch * s.lines.tokens + token;
            gate_row(settings, row_of<T>(s.skip, row, s.dim), group, row_of<T>(s.z, batch, token), scratch,
                     scratch + pitch, total, row_of<T>(s.out, row, s.dim));
        }
    });
    std::free(scratch);
    return 0;
}

// Not zero where there was no memory.
inline int visible_gate(const VisibleGateArgs &s) {
    return s.dtype == FLOAT32    ? visible_gate_of<float>(s)
           : s.dtype == BFLOAT16 ? visible_gate_of<bfloat16>(s)
                                 : visible_gate_of<float16>(s);
}

// One token. weight, bias: rows of parameters; normal, slope: rows to work in; the others are rows of sums.
template <class T>
VEC void differentiate_gate(const VisibleGateBackwardArgs &s, const GateSettings &settings, int64_t batch, int64_t token,
                            const T *group, const float *weight, const float *bias, float *normal, float *slope,
                            float *dweight, float *dbias, float *dgroup) {
    const int64_t dim = s.dim, row = batch * s.lines.tokens + token;
    const T *z = row_of<T>(s.z, batch, token), *dout = row_of<T>(s.dout, row, dim);
    T *dz = row_of<T>(s.dz, batch, token), *dskip = row_of<T>(s.dskip, row, dim);
    T *const gated = s.gated ? row_of<T>(s.gated, row, dim) : nullptr;
    const Moments moments = gate_moments(settings, row_of<T>(s.skip, row, dim), group, normal);
    RowSum along, whole;
    each_vector(dim, [&](auto count, int64_t c, int some) __attribute__((always_inline)) {
        constexpr int K = decltype(count)::value;
        typedef MachineOf<K> M;
        const auto load_own = [&](const float *row) { return load_some<K>(row + c, LANES); };
        const Vectors<K> gate = load_some<K>(z + c, some), opening = shared_math::sigmoid<M>(gate), open = gate * opening;
        const Vectors<K> grad = load_some<K>(dout + c, some), passed = grad * open, g = passed * load_own(weight);
        const Vectors<K> x = (load_own(normal) - M::set(moments.mean)) * M::set(moments.scale);
        const Vectors<K> y = M::fma(x, load_own(weight), load_own(bias));
        store_some(dz + c, grad * y * shared_math::silu_grad<M>(gate, opening), some);
        if (gated) store_some(gated + c, y * open, some);
        store_some(dweight + c, M::fma(passed, x, load_own(dweight)), LANES);
        store_some(dbias + c, load_own(dbias) + passed, LANES);
        store_some(normal + c, x, LANES), store_some(slope + c, g, LANES);
        along.add(g * x), whole.add(g);
    });
    const float share = settings.norm ? along.total() / float(dim) : 0.f;
    const float shift = settings.norm ? whole.total() / float(dim) : 0.f;
    each_vector(dim, [&](auto count, int64_t c, int some) __attribute__((always_inline)) {
        constexpr int K = decltype(count)::value;
        typedef MachineOf<K> M;
        const Vectors<K> off = load_some<K>(normal + c, LANES) * M::set(share) + M::set(shift);
        const Vectors<K> g = (load_some<K>(slope + c, LANES) - off) * M::set(moments.scale * settings.share);
        store_some(dskip + c, g, some);
        store_some(dgroup + c, load_some<K>(dgroup + c, LANES) + g, LANES);
    });
}

template <class T> int visible_gate_backward_of(const VisibleGateBackwardArgs &s) {
    const int64_t pitch = padded(s.dim);
    const int shares = gate_shares(s), rows = 5;
    float *const scratch = static_cast<float *>(std::calloc((2 + rows * shares) * pitch, sizeof(float)));
    if (!scratch) return 1;
    const GateSettings settings{s.dim, s.weight != 0, float(double_of(s.share)), float(double_of(s.eps))};
    for_lines(s, scratch, shares, rows, [&](int64_t task, float *own) {
        const int64_t batch = task / s.lines.count, *starts = s.lines.starts_of(batch) + task % s.lines.count;
        float *const dweight = own, *const dbias = own + pitch, *const dgroup = own + 2 * pitch;
        std::memset(dgroup, 0, pitch * sizeof(float));
        for (int64_t place = starts[0]; place < starts[1]; ++place)
            differentiate_gate(s, settings, batch, s.lines.walked(batch, place), row_of<T>(s.groups, task, s.dim), scratch,
                               scratch + pitch, own + 3 * pitch, own + 4 * pitch, dweight, dbias, dgroup);
        store_mean(row_of<T>(s.dgroups, task, s.dim), dgroup, set(1.f), s.dim);
    });
    for (int64_t c = 0; c < s.dim; ++c) {
        float dweight = 0.f, dbias = 0.f;
        for (int share = 0; share < shares; ++share) {
            const float *own = scratch + (2 + rows * share) * pitch + c;
            dweight += own[0], dbias += own[pitch];
        }
        if (s.dweight) pointer<float>(s.dweight)[c] = dweight;
        if (s.dbias) pointer<float>(s.dbias)[c] = dbias;
    }
    std::free(scratch);
    return 0;
}

// Not zero where there was no memory.
inline int visible_gate_backward(const VisibleGateBackwardArgs &s) {
    return s.dtype == FLOAT32    ? visible_gate_backward_of<float>(s)
           : s.dtype == BFLOAT16 ? visible_gate_backward_of<bfloat16>(s)
                                 : visible_gate_backward_of<float16>(s);
}

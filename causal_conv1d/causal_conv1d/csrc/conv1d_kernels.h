// Causal depthwise convolution on CPU vectors. A lane is a channel in channel-last memory, a step in memory that is
// contiguous along the sequence; neither layout is copied. Included inside an instruction set's namespace (see each_isa.h).

constexpr int64_t ROWS = 16;    // steps at a time in channel-last memory: as many rows as stay in cache over all channels
constexpr int64_t STEPS = 512;  // steps at a time along a contiguous sequence

VEC int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
VEC int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
VEC int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T> VEC T *row_of(const ConvSignal &x, int64_t batch, int64_t channel, int64_t step) {
    return reinterpret_cast<T *>(x.data) + batch * x.batch_stride + channel * x.channel_stride + step * x.step_stride;
}

// Some channels of one batch element: the unit of work. Sums over batch and steps go to `sums`, width + 1 rows (the taps,
// then the bias) of round_up(dim, LANES).
struct Part {
    int64_t batch, first, last;
};

// ---- channel-last ----

// weight (dim, width) -> width rows of channels, then the bias' row.
inline void transpose_weight(const ConvArgs &s, float *rows) {
    const float *weight = reinterpret_cast<const float *>(s.weight), *bias = reinterpret_cast<const float *>(s.bias);
    const int64_t pitch = round_up(s.dim, LANES);
    for (int64_t c = 0; c < s.dim; ++c) {
        for (int64_t k = 0; k < s.width; ++k) rows[k * pitch + c] = weight[c * s.width + k];
        rows[s.width * pitch + c] = bias ? bias[c] : 0.f;
    }
}

// COUNT steps of a vector of channels; `before` steps come before them.
template <class T, int WIDTH, int COUNT, bool SILU>
VEC void forward_rows(const T *x, int64_t x_stride, T *out, int64_t out_stride, int64_t before, int channels,
                      const float *weight, int64_t pitch) {
    V row[WIDTH - 1 + COUNT];
#pragma GCC unroll 8
    for (int i = 0; i < WIDTH - 1 + COUNT; ++i) {
        const int64_t t = i - (WIDTH - 1);
        row[i] = t < -before ? set(0.f) : load_some(x + t * x_stride, channels);
    }
    Vectors<COUNT> sums;
    const V bias = load(weight + WIDTH * pitch);
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i) sums.of[i] = bias;
#pragma GCC unroll 8
    for (int k = 0; k < WIDTH; ++k) {
        const V w = load(weight + k * pitch);
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; ++i) sums.of[i] = fma(w, row[i + k], sums.of[i]);
    }
    if (SILU) sums = shared_math::silu<MachineOf<COUNT>>(sums);
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i) store_some(out + i * out_stride, sums.of[i], channels);
}

// COUNT steps of all channels, in the order of memory.
template <class T, int WIDTH, int COUNT, bool SILU>
void forward_steps(const T *x, int64_t x_stride, T *out, int64_t out_stride, int64_t before, int64_t first, int64_t last,
                   const float *weight, int64_t pitch) {
    int64_t c = first;
    // With all WIDTH - 1 steps before, the loop has no branches.
    for (; before >= WIDTH - 1 && c + LANES <= last; c += LANES)
        forward_rows<T, WIDTH, COUNT, SILU>(x + c, x_stride, out + c, out_stride, WIDTH - 1, LANES, weight + c, pitch);
    for (; c < last; c += LANES)
        forward_rows<T, WIDTH, COUNT, SILU>(x + c, x_stride, out + c, out_stride, before, int(smaller(LANES, last - c)),
                                            weight + c, pitch);
}

template <class T, int WIDTH, bool SILU>
void forward_channels(const ConvArgs &s, const Part &part, const float *weight) {
    const int64_t pitch = round_up(s.dim, LANES), begin = s.reverse ? s.seqlen - 1 : 0, sign = s.reverse ? -1 : 1;
    const int64_t x_stride = sign * s.x.step_stride, out_stride = sign * s.out.step_stride;
    for (int64_t t = 0; t < s.seqlen;) {
        const bool four = t + 4 <= s.seqlen;
        const T *x = row_of<T>(s.x, part.batch, 0, begin) + t * x_stride;
        T *out = row_of<T>(s.out, part.batch, 0, begin) + t * out_stride;
        const auto steps = four ? forward_steps<T, WIDTH, 4, SILU> : forward_steps<T, WIDTH, 1, SILU>;
        steps(x, x_stride, out, out_stride, t, part.first, part.last, weight, pitch);
        t += four ? 4 : 1;
    }
}

// Walks the steps once. At step t the gradient before the activation is known for t, so dx is complete for t - (WIDTH - 1).
// carried: WIDTH - 1 rows of those gradients from one group of rows to the next.
template <class T, int WIDTH>
void backward_channels(const ConvArgs &s, const Part &part, const float *weight, float *sums, float *carried) {
    const int64_t pitch = round_up(s.dim, LANES), begin = s.reverse ? s.seqlen - 1 : 0, sign = s.reverse ? -1 : 1;
    const int64_t x_stride = sign * s.x.step_stride, dout_stride = sign * s.dout.step_stride;
    const int64_t dx_stride = sign * s.dx.step_stride;
    std::memset(carried, 0, (WIDTH - 1) * pitch * sizeof(float));
    for (int64_t start = 0; start < s.seqlen + WIDTH - 1; start += ROWS) {
        const int64_t end = smaller(start + ROWS, s.seqlen + WIDTH - 1);
        for (int64_t c = part.first; c < part.last; c += LANES) {
            const int channels = int(smaller(LANES, part.last - c));
            const T *x = row_of<T>(s.x, part.batch, c, begin), *dout = row_of<T>(s.dout, part.batch, c, begin);
            T *dx = row_of<T>(s.dx, part.batch, c, begin);
            const V bias = load(weight + WIDTH * pitch + c);
            V w[WIDTH], row[WIDTH], grad[WIDTH], sum[WIDTH + 1];  // grad[k] is that of step t - k
#pragma GCC unroll 8
            for (int k = 0; k <= WIDTH; ++k) sum[k] = load(sums + k * pitch + c);
#pragma GCC unroll 8
            for (int k = 0; k < WIDTH; ++k) w[k] = load(weight + k * pitch + c);
#pragma GCC unroll 8
            for (int k = 1; k < WIDTH; ++k) {
                const int64_t t = start - k;
                row[WIDTH - k] = t < 0 || t >= s.seqlen ? set(0.f) : load_some(x + t * x_stride, channels);
                grad[k - 1] = load(carried + (k - 1) * pitch + c);
            }
            for (int64_t t = start; t < end; ++t) {
#pragma GCC unroll 8
                for (int k = 0; k < WIDTH - 1; ++k) row[k] = row[k + 1], grad[WIDTH - 1 - k] = grad[WIDTH - 2 - k];
                if (t < s.seqlen) {
                    row[WIDTH - 1] = load_some(x + t * x_stride, channels);
                    V before = bias;
#pragma GCC unroll 8
                    for (int k = 0; k < WIDTH; ++k) before = fma(w[k], row[k], before);
                    grad[0] = load_some(dout + t * dout_stride, channels);
                    if (s.silu) grad[0] = grad[0] * shared_math::silu_grad<Machine>(before);
#pragma GCC unroll 8
                    for (int k = 0; k < WIDTH; ++k) sum[k] = fma(grad[0], row[k], sum[k]);
                    sum[WIDTH] = sum[WIDTH] + grad[0];
                } else {
                    row[WIDTH - 1] = grad[0] = set(0.f);
                }
                if (t >= WIDTH - 1) {
                    V total = w[0] * grad[0];
#pragma GCC unroll 8
                    for (int k = 1; k < WIDTH; ++k) total = fma(w[k], grad[k], total);
                    if (s.accumulate) total = total + load_some(dx + (t - (WIDTH - 1)) * dx_stride, channels);
                    store_some(dx + (t - (WIDTH - 1)) * dx_stride, total, channels);
                }
            }
#pragma GCC unroll 8
            for (int k = 0; k < WIDTH - 1; ++k) store(carried + k * pitch + c, grad[k]);
#pragma GCC unroll 8
            for (int k = 0; k <= WIDTH; ++k) store(sums + k * pitch + c, sum[k]);
        }
    }
}

// ---- contiguous along the sequence ----
//
// In memory order both directions are out[t] = bias + sum over j of taps[j] * x[t + j - before]: before is WIDTH - 1 for the
// causal direction, and 0, with the taps in reverse, for the other.

struct Taps {
    float tap[4], bias;
    int64_t before;

    Taps(const ConvArgs &s, int64_t channel) {
        const float *weight = reinterpret_cast<const float *>(s.weight) + channel * s.width;
        for (int64_t j = 0; j < s.width; ++j) tap[j] = weight[s.reverse ? s.width - 1 - j : j];
        bias = s.bias ? reinterpret_cast<const float *>(s.bias)[channel] : 0.f;
        before = s.reverse ? 0 : s.width - 1;
    }
};

// Steps [first, last) of a row as float32, zero outside [0, seqlen); the buffer holds a vector more.
template <class T> VEC void load_row(const T *row, int64_t seqlen, int64_t first, int64_t last, float *buffer) {
    for (int64_t t = first; t < last; t += LANES) {
        V v = set(0.f);
        if (t >= 0 && t + LANES <= seqlen) {
            v = load(row + t);
        } else {
            float part[LANES] = {};
            for (int64_t i = 0; i < LANES; ++i)
                if (t + i >= 0 && t + i < seqlen) part[i] = load_one(row + t + i);
            v = load(part);
        }
        store(buffer + (t - first), v);
    }
}

template <int WIDTH> VEC V convolve(const float *x, const Taps &taps) {
    V sum = set(taps.bias);
#pragma GCC unroll 8
    for (int j = 0; j < WIDTH; ++j) sum = fma(set(taps.tap[j]), load(x + j), sum);
    return sum;
}

template <class T, int WIDTH> void forward_sequences(const ConvArgs &s, const Part &part) {
    float buffer[STEPS + 4 * LANES];
    for (int64_t c = part.first; c < part.last; ++c) {
        const Taps taps(s, c);
        const T *x = row_of<T>(s.x, part.batch, c, 0);
        T *out = row_of<T>(s.out, part.batch, c, 0);
        for (int64_t start = 0; start < s.seqlen; start += STEPS) {
            const int64_t end = smaller(start + STEPS, s.seqlen), first = start - taps.before;
            load_row(x, s.seqlen, first, first + round_up(end - start, LANES) + WIDTH - 1, buffer);
            for (int64_t t = start; t < end; t += LANES) {
                V sum = convolve<WIDTH>(buffer + (t - start), taps);
                if (s.silu) sum = shared_math::silu<Machine>(sum);
                store_some(out + t, sum, int(smaller(LANES, end - t)));
            }
        }
    }
}

template <class T, int WIDTH> void backward_sequences(const ConvArgs &s, const Part &part, float *sums) {
    const int64_t pitch = round_up(s.dim, LANES);
    float x_buffer[STEPS + 6 * LANES], grad_buffer[STEPS + 6 * LANES];
    for (int64_t c = part.first; c < part.last; ++c) {
        const Taps taps(s, c);
        const T *x = row_of<T>(s.x, part.batch, c, 0), *dout = row_of<T>(s.dout, part.batch, c, 0);
        T *dx = row_of<T>(s.dx, part.batch, c, 0);
        V sum[WIDTH + 1];
#pragma GCC unroll 8
        for (int j = 0; j <= WIDTH; ++j) sum[j] = set(0.f);
        for (int64_t start = 0; start < s.seqlen; start += STEPS) {
            // dx at [start, end) wants the gradient before the activation at [first, last), and that wants x around it.
            const int64_t end = smaller(start + STEPS, s.seqlen);
            const int64_t first = start - (WIDTH - 1) + taps.before, last = end + taps.before;
            load_row(x, s.seqlen, first - taps.before, first + round_up(last - first, LANES) + WIDTH - 1, x_buffer);
            load_row(dout, s.seqlen, first, last, grad_buffer);
            for (int64_t t = first; t < last; t += LANES) {
                V grad = load(grad_buffer + (t - first));
                if (s.silu) grad = grad * shared_math::silu_grad<Machine>(convolve<WIDTH>(x_buffer + (t - first), taps));
                store(grad_buffer + (t - first), grad);
            }
            for (int64_t t = start; t < end; t += LANES) {
                // grad[t - j + before] for j = 0 .. WIDTH - 1
                const float *behind = grad_buffer + (t - start);
                V total = set(0.f), grad = load(grad_buffer + (t - first));
#pragma GCC unroll 8
                for (int j = 0; j < WIDTH; ++j) total = fma(set(taps.tap[j]), load(behind + WIDTH - 1 - j), total);
                if (s.accumulate) total = total + load_some(dx + t, int(smaller(LANES, end - t)));
                store_some(dx + t, total, int(smaller(LANES, end - t)));
                if (end - t < LANES) {
                    float part[LANES];
                    store(part, grad);
                    for (int64_t i = end - t; i < LANES; ++i) part[i] = 0.f;
                    grad = load(part);
                }
#pragma GCC unroll 8
                for (int j = 0; j < WIDTH; ++j) sum[j] = fma(grad, load(x_buffer + (t - first) + j), sum[j]);
                sum[WIDTH] = sum[WIDTH] + grad;
            }
        }
        for (int j = 0; j < WIDTH; ++j) sums[(s.reverse ? WIDTH - 1 - j : j) * pitch + c] += ISA_NAME::sum(sum[j]);
        sums[WIDTH * pitch + c] += ISA_NAME::sum(sum[WIDTH]);
    }
}

// ---- work and its shares ----

template <class T, int WIDTH>
void work(const ConvArgs &s, const Part &part, const float *weight, float *sums, float *carried) {
    if (s.out.data && s.channel_last && s.silu) forward_channels<T, WIDTH, true>(s, part, weight);
    if (s.out.data && s.channel_last && !s.silu) forward_channels<T, WIDTH, false>(s, part, weight);
    if (s.out.data && !s.channel_last) forward_sequences<T, WIDTH>(s, part);
    if (s.dx.data && s.channel_last) backward_channels<T, WIDTH>(s, part, weight, sums, carried);
    if (s.dx.data && !s.channel_last) backward_sequences<T, WIDTH>(s, part, sums);
}

template <class T> auto worker(const ConvArgs &s) {
    return s.width == 2 ? work<T, 2> : s.width == 3 ? work<T, 3> : work<T, 4>;
}

// Forward if s.out is there, else backward. One where there was no memory, else zero.
inline int convolution(const ConvArgs &s) {
    const int64_t pitch = round_up(s.dim, LANES), rows = (s.width + 1) * pitch;
    const int64_t blocks = s.channel_last ? pitch / LANES : s.dim;
    // Whole batch elements where there are enough of them; else their channels are divided too.
    const int64_t divisions = smaller(blocks, (s.threads + s.batch - 1) / s.batch), tasks = s.batch * divisions;
    const int shares = parallel::shares_for(s.threads, tasks, s.batch * s.dim * s.seqlen * 2 / LANES);
    float *const weight = static_cast<float *>(std::calloc((1 + 2 * shares) * rows, sizeof(float)));
    if (!weight) return 1;
    float *const sums = weight + rows, *const carried = sums + shares * rows;
    transpose_weight(s, weight);
    const auto run = s.x.dtype == FLOAT32    ? worker<float>(s)
                     : s.x.dtype == BFLOAT16 ? worker<bfloat16>(s)
                                             : worker<float16>(s);
    parallel::run(shares, [&](int share) {
        const parallel::Range range = parallel::share_of(tasks, shares, share);
        for (int64_t task = range.begin; task < range.end; ++task) {
            const parallel::Range division = parallel::share_of(blocks, int(divisions), int(task % divisions));
            const int64_t width = s.channel_last ? LANES : 1;
            const Part part{task / divisions, division.begin * width, smaller(division.end * width, s.dim)};
            run(s, part, weight, sums + share * rows, carried + share * rows);
        }
    });
    if (s.dx.data) {
        float *dweight = reinterpret_cast<float *>(s.dweight), *dbias = reinterpret_cast<float *>(s.dbias);
        for (int64_t c = 0; c < s.dim; ++c)
            for (int64_t k = 0; k <= s.width; ++k) {
                float total = 0.f;
                for (int share = 0; share < shares; ++share) total += sums[share * rows + k * pitch + c];
                if (k < s.width) dweight[c * s.width + k] = total;
                else if (dbias) dbias[c] = total;
            }
    }
    std::free(weight);
    return 0;
}

// ---- one step ----

template <class T, class S> void update(const ConvUpdateArgs &s) {
    const float *weight = reinterpret_cast<const float *>(s.weight), *bias = reinterpret_cast<const float *>(s.bias);
    for (int64_t b = 0; b < s.batch; ++b)
        for (int64_t first = 0; first < s.dim; first += LANES) {
            const int channels = int(smaller(LANES, s.dim - first));
            float sums[LANES] = {};
            for (int i = 0; i < channels; ++i) {
                const int64_t c = first + i;
                const T *x = reinterpret_cast<const T *>(s.x) + b * s.x_batch_stride + c * s.x_channel_stride;
                S *state = reinterpret_cast<S *>(s.state) + b * s.state_batch_stride + c * s.state_channel_stride;
                float sum = bias ? bias[c] : 0.f;
                for (int64_t k = 0; k < s.width; ++k) {
                    S &place = state[k * s.state_step_stride];
                    if (k + 1 < s.width) place = state[(k + 1) * s.state_step_stride];
                    else store_one(&place, load_one(x));
                    sum += weight[c * s.width + k] * load_one(&place);
                }
                sums[i] = sum;
            }
            V out = load(sums);
            if (s.silu) out = shared_math::silu<Machine>(out);
            store_some(reinterpret_cast<T *>(s.out) + b * s.dim + first, out, channels);
        }
}

template <class T> void update_state(const ConvUpdateArgs &s) {
    if (s.state_dtype == FLOAT32) update<T, float>(s);
    if (s.state_dtype == BFLOAT16) update<T, bfloat16>(s);
    if (s.state_dtype == FLOAT16) update<T, float16>(s);
}

inline int convolution_update(const ConvUpdateArgs &s) {
    if (s.x_dtype == FLOAT32) update_state<float>(s);
    if (s.x_dtype == BFLOAT16) update_state<bfloat16>(s);
    if (s.x_dtype == FLOAT16) update_state<float16>(s);
    return 0;
}

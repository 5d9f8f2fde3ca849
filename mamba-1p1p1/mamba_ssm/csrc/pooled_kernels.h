// The mixer over pooled lines on CPU vectors, a lane a channel: both convolutions and the means they are pooled to in one
// walk over the tokens, the few pooled tokens' projections and scans, and sum, LayerNorm and gate in another walk. No token
// is moved: lines across the grid are walked where they stand, and where they lie between each other's tokens, as the
// columns of (rows, columns, channels) do, each has sums of its own. Included inside an instruction set's namespace (see
// each_isa.h).

#include "scan_kernels.h"

constexpr int STEPS = 4;                // tokens convolved at a time
constexpr int64_t STEPS_A_VECTOR = 32;  // what a vector of convolved channels costs, in the steps of parallel.h

VEC int64_t padded(int64_t dim) { return (dim + LANES - 1) / LANES * LANES; }
template <class T> VEC T *pointer(int64_t address) { return reinterpret_cast<T *>(address); }

// ---- convolution ----

// A direction's parameters as rows of channels: the taps, then bias, then D.
inline void load_taps(const Taps &taps, int64_t dim, int64_t width, float *rows) {
    const int64_t pitch = padded(dim);
    const float *weight = pointer<float>(taps.weight), *bias = pointer<float>(taps.bias), *D = pointer<float>(taps.D);
    for (int64_t c = 0; c < dim; ++c) {
        for (int64_t k = 0; k < width; ++k) rows[k * pitch + c] = weight[c * width + k];
        rows[width * pitch + c] = bias ? bias[c] : 0.f;
        rows[(width + 1) * pitch + c] = D[c];
    }
}

// The totals so far, forward and behind it backward, of the one group that some tokens are of.
struct SharedSums {
    float *forward, *backward;
    V total_f, total_b;

    VEC void begin(int64_t c) { total_f = load(forward + c), total_b = load(backward + c); }
    VEC void add(int, int64_t, V f, V b) { total_f = total_f + f, total_b = total_b + b; }
    VEC void end(int64_t c) { store(forward + c, total_f), store(backward + c, total_b); }
};

// Of a group for each token, which may be the same one.
struct OwnSums {
    float *const *forward, *const *backward;

    VEC void begin(int64_t) {}
    VEC void add(int token, int64_t c, V f, V b) {
        store(forward[token] + c, load(forward[token] + c) + f);
        store(backward[token] + c, load(backward[token] + c) + b);
    }
    VEC void end(int64_t) {}
};

// COUNT tokens from one vector of channels on. x: WIDTH - 1 rows before them, theirs, WIDTH - 1 behind them.
template <class T, int WIDTH, int COUNT, class Sums>
void convolve(const T *const *x, T *const *skip, int64_t c, int channels, const float *forward, const float *backward,
              int64_t pitch, Sums sums) {
    V row[COUNT + 2 * (WIDTH - 1)], ahead[WIDTH], behind[WIDTH];
#pragma GCC unroll 16
    for (int i = 0; i < COUNT + 2 * (WIDTH - 1); ++i) row[i] = load_some(x[i] + c, channels);
#pragma GCC unroll 8
    for (int k = 0; k < WIDTH; ++k) {
        ahead[k] = load(forward + k * pitch + c);
        behind[k] = load(backward + k * pitch + c);
    }
    const V bias_f = load(forward + WIDTH * pitch + c), bias_b = load(backward + WIDTH * pitch + c);
    const V D_f = load(forward + (WIDTH + 1) * pitch + c), D_b = load(backward + (WIDTH + 1) * pitch + c);
    sums.begin(c);
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; ++i) {
        Vectors<2> both = {{bias_f, bias_b}};
#pragma GCC unroll 8
        for (int k = 0; k < WIDTH; ++k) {
            both.of[0] = fma(ahead[k], row[i + k], both.of[0]);
            both.of[1] = fma(behind[k], row[i + 2 * (WIDTH - 1) - k], both.of[1]);
        }
        both = shared_math::silu<MachineOf<2>>(both);
        const V f = both.of[0], b = both.of[1];
        sums.add(i, c, f, b);
        store_some(skip[i] + c, fma(D_f, f, D_b * b), channels);
    }
    sums.end(c);
}

// What one thread sums up at a time: some channels, from `begin` on, of a stretch of the walk. Two rows of sums a group of
// the stretch, forward and backward; the groups are numbered from `group` on.
struct Stretch {
    int64_t batch, begin, end, first_place, last_place, group;
};

template <class T, int WIDTH, int COUNT>
void convolve_tokens(const PooledConvArgs &s, const Stretch &on, int64_t place, const T *zeros, const float *forward,
                     const float *backward, float *sums) {
    const T *x[COUNT + 2 * (WIDTH - 1)];
    T *skip[COUNT];
    float *sums_f[COUNT], *sums_b[COUNT];
    const int64_t pitch = padded(s.dim);
    for (int i = 0; i < COUNT + 2 * (WIDTH - 1); ++i) {
        const int64_t at = place + i - (WIDTH - 1);
        x[i] = at < 0 || at >= s.lines.tokens() ? zeros
                                                : pointer<T>(s.x.data) + on.batch * s.x.batch_stride +
                                                      s.lines.walked(at) * s.x.token_stride;
    }
    bool is_shared = true;
    for (int i = 0; i < COUNT; ++i) {
        skip[i] = pointer<T>(s.skip) + (on.batch * s.lines.tokens() + s.lines.walked(place + i)) * s.dim;
        sums_f[i] = sums + (s.lines.group_at(place + i) - on.group) * 2 * pitch, sums_b[i] = sums_f[i] + pitch;
        is_shared = is_shared && sums_f[i] == sums_f[0];
    }
    for (int64_t c = on.begin; c < on.end; c += LANES) {
        const int channels = int(s.dim - c < LANES ? s.dim - c : LANES);
        if (is_shared)
            convolve<T, WIDTH, COUNT>(x, skip, c, channels, forward, backward, pitch, SharedSums{sums_f[0], sums_b[0], {}, {}});
        else
            convolve<T, WIDTH, COUNT>(x, skip, c, channels, forward, backward, pitch, OwnSums{sums_f, sums_b});
    }
}

template <class T> VEC void store_mean(T *to, const float *sums, V factor, int64_t dim) {
    for (int64_t c = 0; c < dim; c += LANES)
        store_some(to + c, load(sums + c) * factor, int(dim - c < LANES ? dim - c : LANES));
}

template <class T, int WIDTH>
void convolve_stretch(const PooledConvArgs &s, const Stretch &on, const float *parameters, const T *zeros, float *sums) {
    const int64_t pitch = padded(s.dim), groups = s.lines.count / s.lines.stretches();
    const float *forward = parameters, *backward = parameters + (WIDTH + 2) * pitch;
    std::memset(sums, 0, 2 * groups * pitch * sizeof(float));
    int64_t place = on.first_place;
    for (; place + STEPS <= on.last_place; place += STEPS)
        convolve_tokens<T, WIDTH, STEPS>(s, on, place, zeros, forward, backward, sums);
    for (; place < on.last_place; ++place) convolve_tokens<T, WIDTH, 1>(s, on, place, zeros, forward, backward, sums);
    const V factor = set(float(double_of(s.scale) * double(s.lines.count) / double(s.lines.tokens())));
    const int64_t dim = (on.end < s.dim ? on.end : s.dim) - on.begin;
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t row = (on.batch * s.lines.count + on.group + group) * s.dim + on.begin;
        const float *of_group = sums + 2 * group * pitch + on.begin;
        store_mean(pointer<T>(s.pooled_forward) + row, of_group, factor, dim);
        store_mean(pointer<T>(s.pooled_backward) + row, of_group + pitch, factor, dim);
    }
}

template <class T> auto stretch_of_width(const PooledConvArgs &s) {
    return s.width == 2 ? convolve_stretch<T, 2> : s.width == 3 ? convolve_stretch<T, 3> : convolve_stretch<T, 4>;
}

template <class T> int pooled_conv_of(const PooledConvArgs &s) {
    const int64_t stretches = s.lines.stretches(), length = s.lines.tokens() / stretches, pitch = padded(s.dim);
    const int64_t groups = s.lines.count / stretches, parameters = 2 * (s.width + 2) * pitch;
    // where an image is one stretch, threads share its channels
    const int64_t vectors = pitch / LANES, blocks = stretches > 1 ? 1 : s.threads < vectors ? s.threads : vectors;
    const int64_t tasks = s.batch * stretches * blocks;
    const int shares = parallel::shares_for(s.threads, tasks, s.batch * s.lines.tokens() * vectors * STEPS_A_VECTOR);
    float *const scratch =
        static_cast<float *>(std::calloc(parameters + (1 + 2 * groups * shares) * pitch, sizeof(float)));
    if (!scratch) return 1;
    load_taps(s.forward, s.dim, s.width, scratch);
    load_taps(s.backward, s.dim, s.width, scratch + parameters / 2);
    const T *zeros = reinterpret_cast<const T *>(scratch + parameters);
    const auto stretch = stretch_of_width<T>(s);
    parallel::run(shares, [&](int share) {
        float *sums = scratch + parameters + (1 + 2 * groups * share) * pitch;
        const parallel::Range range = parallel::share_of(tasks, shares, share);
        for (int64_t task = range.begin; task < range.end; ++task) {
            const int64_t block = task % blocks, number = task / blocks % stretches;
            const Stretch on{task / blocks / stretches,   block * vectors / blocks * LANES,
                             (block + 1) * vectors / blocks * LANES, number * length, (number + 1) * length,
                             number * groups};
            stretch(s, on, scratch, zeros, sums);
        }
    });
    std::free(scratch);
    return 0;
}

// Not zero where there was no memory.
inline int pooled_conv(const PooledConvArgs &s) {
    return s.dtype == FLOAT32    ? pooled_conv_of<float>(s)
           : s.dtype == BFLOAT16 ? pooled_conv_of<bfloat16>(s)
                                 : pooled_conv_of<float16>(s);
}

// ---- scans ----

// Rows of dt, B, C: COUNT tokens from `first` on times all rows of x_proj.
template <class T, int COUNT>
void project_tokens(const T *groups, const float *weight, int64_t dim, int64_t outputs, int64_t first, float *rows) {
    const T *x = groups + first * dim;
    for (int64_t o = 0; o < outputs; ++o) {
        V sums[COUNT];
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; ++i) sums[i] = set(0.f);
        for (int64_t c = 0; c < dim; c += LANES) {
            const int channels = int(dim - c < LANES ? dim - c : LANES);
            const V w = load_some(weight + o * dim + c, channels);
#pragma GCC unroll 8
            for (int i = 0; i < COUNT; ++i) sums[i] = fma(w, load_some(x + i * dim + c, channels), sums[i]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; ++i) rows[(first + i) * outputs + o] = sum(sums[i]);
    }
}

template <class T>
void project(const PooledScanArgs &s, bool backward, int64_t first, int64_t last, float *rows) {
    const T *groups = pointer<T>(backward ? s.groups_backward : s.groups_forward);
    const float *weight = pointer<float>((backward ? s.backward : s.forward).x_proj);
    const int64_t outputs = s.rank + 2 * s.dstate;
    for (; first + 8 <= last; first += 8) project_tokens<T, 8>(groups, weight, s.dim, outputs, first, rows);
    for (; first + 2 <= last; first += 2) project_tokens<T, 2>(groups, weight, s.dim, outputs, first, rows);
    for (; first < last; ++first) project_tokens<T, 1>(groups, weight, s.dim, outputs, first, rows);
}

// One direction over all lines for a vector of channels, in scan order.
struct LineScan {
    int64_t steps;
    States B, C;
    const float *dt, *input, *A_log2;
    float *state, *y;
    bool within;

    template <int N> VEC void run(int64_t n) {
        const auto walk = within ? forward_states<N, true, true, true> : forward_states<N, true, true, false>;
        walk(steps, dt, input, B.at(true, 0, n), C.at(true, 0, n), A_log2 + n * LANES, state + n * LANES, y);
    }
};

template <class T> void scan_channels(const PooledScanArgs &s, int64_t batch, int64_t first, const float *rows, float *scratch) {
    const int64_t lines = s.lines, outputs = s.rank + 2 * s.dstate, tile = lines * LANES;
    const int channels = int(s.dim - first < LANES ? s.dim - first : LANES);
    float *A_log2 = scratch, *state = A_log2 + s.dstate * LANES, *weight = state + s.dstate * LANES;
    float *dt = weight + s.rank * LANES, *input = dt + tile, *y = input + tile, *total = y + tile;
    for (int backward = 0; backward < 2; ++backward) {
        const Projections &p = backward ? s.backward : s.forward;
        const T *groups = pointer<T>(backward ? s.groups_backward : s.groups_forward) + batch * lines * s.dim + first;
        const float *own = rows + (backward * s.batch + batch) * lines * outputs;
        const int64_t step = backward ? -1 : 1, start = backward ? lines - 1 : 0;
        load_tile(pointer<float>(p.A_log) + first * s.dstate, s.dstate, 1, channels, s.dstate, A_log2, LANES, 0);
        load_tile(pointer<float>(p.dt_proj) + first * s.rank, s.rank, 1, channels, s.rank, weight, LANES, 0);
        V steepest = set(0.f), largest = set(0.f);
        for (int64_t i = 0; i < s.dstate * LANES; i += LANES) {
            const V rate = set(-shared_math::LOG2_E) * shared_math::exp<Machine>(load(A_log2 + i));
            steepest = max(abs(rate), steepest);
            store(A_log2 + i, rate);
            store(state + i, set(0.f));
        }
        const V bias = load_some(pointer<float>(p.dt_bias) + first, channels);
        for (int64_t t = 0; t < lines; ++t) {
            const int64_t line = start + t * step;
            V raw = bias;
            for (int64_t r = 0; r < s.rank; ++r) raw = fma(set(own[line * outputs + r]), load(weight + r * LANES), raw);
            const V size = shared_math::softplus<Machine>(raw);
            largest = max(size, largest);
            store(dt + t * LANES, size);
            store(input + t * LANES, size * load_some(groups + line * s.dim, channels));
            store(y + t * LANES, set(0.f));
        }
        const States B{own + start * outputs + s.rank, step * outputs}, C{B.first + s.dstate, B.pitch};
        const bool within = all_at_most(largest * steepest, EXP2_WITHIN);
        for_state_blocks<FORWARD_STATES>(s.dstate, LineScan{lines, B, C, dt, input, A_log2, state, y, within});
        for (int64_t t = 0; t < lines; ++t) {
            float *sum = total + (start + t * step) * LANES;
            store(sum, backward ? load(sum) + load(y + t * LANES) : load(y + t * LANES));
        }
    }
    T *out = pointer<T>(s.out) + batch * lines * s.dim + first;
    for (int64_t t = 0; t < lines; ++t) store_some(out + t * s.dim, load(total + t * LANES), channels);
}

template <class T> int pooled_scan_of(const PooledScanArgs &s) {
    const int64_t outputs = s.rank + 2 * s.dstate, tokens = s.batch * s.lines, blocks = padded(s.dim) / LANES;
    const int64_t own = (2 * s.dstate + s.rank + 4 * s.lines) * LANES, work = 2 * tokens * blocks * (outputs + s.dstate * 4);
    const int shares = parallel::shares_for(s.threads, blocks, work);
    const memory::Buffer buffer((2 * tokens * outputs + shares * own) * sizeof(float));
    float *const rows = static_cast<float *>(buffer.data());
    if (!rows) return 1;
    parallel::run(shares, [&](int share) {
        for (int backward = 0; backward < 2; ++backward) {
            const parallel::Range range = parallel::share_of(tokens, shares, share);
            project<T>(s, backward, range.begin, range.end, rows + backward * tokens * outputs);
        }
    });
    parallel::run(shares, [&](int share) {
        float *scratch = rows + 2 * tokens * outputs + share * own;
        const parallel::Range range = parallel::share_of(s.batch * blocks, shares, share);
        for (int64_t task = range.begin; task < range.end; ++task)
            scan_channels<T>(s, task / blocks, task % blocks * LANES, rows, scratch);
    });
    return 0;
}

// Not zero where there was no memory.
inline int pooled_scan(const PooledScanArgs &s) {
    return s.dtype == FLOAT32    ? pooled_scan_of<float>(s)
           : s.dtype == BFLOAT16 ? pooled_scan_of<bfloat16>(s)
                                 : pooled_scan_of<float16>(s);
}

// ---- norm and gate ----

struct GateSettings {
    int64_t dim;
    bool norm;
    float share, eps;
};
struct Moments {
    float mean, scale;
};

// The sum of a row's numbers, in chains of additions that do not wait for each other.
struct RowSum {
    V of[4] = {};

    template <int K> VEC void add(const Vectors<K> &x) {
#pragma GCC unroll 4
        for (int k = 0; k < K; ++k) of[k] = of[k] + x.of[k];
    }
    VEC float total() const { return sum((of[0] + of[1]) + (of[2] + of[3])); }
};

// total, a scratch row of whole vectors, becomes share * (skip + group), zero behind dim. Returns what the norm subtracts and
// multiplies by.
template <class T> VEC Moments gate_moments(const GateSettings &s, const T *skip, const T *group, float *total) {
    RowSum sums;
    each_vector(s.dim, [&](auto count, int64_t c, int some) __attribute__((always_inline)) {
        constexpr int K = decltype(count)::value;
        const Vectors<K> x = (load_some<K>(skip + c, some) + load_some<K>(group + c, some)) * MachineOf<K>::set(s.share);
        store_some(total + c, x, LANES), sums.add(x);
    });
    if (!s.norm) return {0.f, 1.f};
    const float mean = sums.total() / float(s.dim);
    RowSum squares;
    each_vector(s.dim / LANES * LANES, [&](auto count, int64_t c, int) __attribute__((always_inline)) {
        constexpr int K = decltype(count)::value;
        const Vectors<K> x = load_some<K>(total + c, LANES) - MachineOf<K>::set(mean);
        squares.add(x * x);
    });
    float square = squares.total();
    for (int64_t c = s.dim / LANES * LANES; c < s.dim; ++c) square += (total[c] - mean) * (total[c] - mean);
    return {mean, 1.f / std::sqrt(square / float(s.dim) + s.eps)};
}

template <class T>
VEC void gate_row(const GateSettings &s, const T *skip, const T *group, const T *z, const float *weight, const float *bias,
                  float *total, T *out) {
    const Moments moments = gate_moments(s, skip, group, total);
    each_vector(s.dim, [&](auto count, int64_t c, int some) __attribute__((always_inline)) {
        constexpr int K = decltype(count)::value;
        typedef MachineOf<K> M;
        const Vectors<K> x = (load_some<K>(total + c, LANES) - M::set(moments.mean)) * M::set(moments.scale);
        const Vectors<K> y = M::fma(x, load_some<K>(weight + c, LANES), load_some<K>(bias + c, LANES));
        store_some(out + c, y * shared_math::silu<M>(load_some<K>(z + c, some)), some);
    });
}

template <class T>
VEC void gate_token(const PooledGateArgs &s, const GateSettings &settings, int64_t batch, int64_t token, int64_t group_of,
                    const float *weight, const float *bias, float *total) {
    const int64_t dim = s.dim, row = batch * s.lines.tokens() + token;
    const T *skip = pointer<T>(s.skip) + row * dim;
    const T *group = pointer<T>(s.groups) + (batch * s.lines.count + group_of) * dim;
    const T *z = pointer<T>(s.z.data) + batch * s.z.batch_stride + token * s.z.token_stride;
    gate_row(settings, skip, group, z, weight, bias, total, pointer<T>(s.out) + row * dim);
}

template <class T> int pooled_gate_of(const PooledGateArgs &s) {
    const int64_t tokens = s.lines.tokens(), tasks = s.batch * tokens, pitch = padded(s.dim);
    const int shares = parallel::shares_for(s.threads, tasks, tasks * pitch / LANES * STEPS_A_VECTOR / 2);
    const memory::Buffer buffer(tokens * sizeof(int64_t));
    int64_t *const groups = static_cast<int64_t *>(buffer.data());
    float *const scratch = static_cast<float *>(std::calloc((2 + shares) * pitch, sizeof(float)));
    if (!groups || !scratch) return std::free(scratch), 1;
    // tokens in memory's order, not the walk's: no row needs another one, and lines across the grid are far strides
    for (int64_t place = 0; place < tokens; ++place) groups[s.lines.walked(place)] = s.lines.group_at(place);
    float *const weight = scratch, *const bias = scratch + pitch;
    for (int64_t c = 0; c < s.dim; ++c) weight[c] = s.weight ? pointer<float>(s.weight)[c] : 1.f;
    if (s.bias) std::memcpy(bias, pointer<float>(s.bias), s.dim * sizeof(float));
    const GateSettings settings{s.dim, s.weight != 0, float(double_of(s.share)), float(double_of(s.eps))};
    parallel::run(shares, [&](int share) {
        float *total = scratch + (2 + share) * pitch;
        const parallel::Range range = parallel::share_of(tasks, shares, share);
        for (int64_t task = range.begin; task < range.end; ++task)
            gate_token<T>(s, settings, task / tokens, task % tokens, groups[task % tokens], weight, bias, total);
    });
    std::free(scratch);
    return 0;
}

// Not zero where there was no memory.
inline int pooled_gate(const PooledGateArgs &s) {
    return s.dtype == FLOAT32    ? pooled_gate_of<float>(s)
           : s.dtype == BFLOAT16 ? pooled_gate_of<bfloat16>(s)
                                 : pooled_gate_of<float16>(s);
}

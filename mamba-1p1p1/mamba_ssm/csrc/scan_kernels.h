// The selective scan on CPU vectors: a lane is a channel, a vector's states stay in registers while it walks the sequence.
// Included inside an instruction set's namespace (see each_isa.h).
#undef SCAN_MATH_H
#include "scan_math.h"
#include "tile.h"

// States that fit in registers at once, forward and backward.
constexpr int64_t FORWARD_STATES = ISA_AVX512 ? 16 : 8;
constexpr int64_t BACKWARD_STATES = ISA_AVX512 ? 8 : 4;
constexpr int64_t FORWARD_STEPS = 64;

VEC int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Scratch memory of one share of the work, handed out in cache-line-aligned pieces.
class Scratch {
  public:
    explicit Scratch(int64_t floats) : memory_(static_cast<float *>(std::malloc((floats + 64) * sizeof(float)))) {
        next_ = memory_ + (64 - reinterpret_cast<uintptr_t>(memory_) % 64) / sizeof(float) % 16;
    }
    ~Scratch() { std::free(memory_); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    bool ok() const { return memory_ != nullptr; }
    float *take(int64_t floats) {
        float *piece = next_;
        next_ += round_up(floats, 16);
        return piece;
    }

  private:
    float *memory_, *next_;
};

// A scan's tensors seen from one (batch, block of channels), in scan order.
struct Block {
    int64_t batch, first, group, group_block;
    int channels;
};

struct Scan {
    const ScanArgs &s;
    int64_t blocks_per_group, blocks, pitch;

    explicit Scan(const ScanArgs &args)
        : s(args),
          blocks_per_group(round_up(args.dim / args.groups, LANES) / LANES),
          blocks(blocks_per_group * args.groups),
          pitch(round_up(args.dstate, LANES)) {}

    Block block(int64_t task) const {
        int64_t index = task % blocks, group = index / blocks_per_group, inside = index % blocks_per_group;
        int64_t group_dim = s.dim / s.groups, left = group_dim - inside * LANES;
        return {task / blocks, group * group_dim + inside * LANES, group, inside, int(left < LANES ? left : LANES)};
    }
    Plane plane(const Signal &x, const Block &b) const {
        Plane plane{reinterpret_cast<char *>(x.data), x.dtype, x.channel_stride, x.step_stride};
        plane = plane.at(0, 0);
        plane.data += (b.batch * x.batch_stride + b.first * x.channel_stride) * (x.dtype == FLOAT32 ? 4 : 2);
        return in_scan_order(plane);
    }
    Plane plane(const Matrix &x, const Block &b) const {
        Plane plane{reinterpret_cast<char *>(x.data), x.dtype, x.state_stride, x.step_stride};
        plane.data += (b.batch * x.batch_stride + b.group * x.group_stride) * (x.dtype == FLOAT32 ? 4 : 2);
        return in_scan_order(plane);
    }
    Plane in_scan_order(Plane plane) const {
        if (!s.reverse) return plane;
        plane = plane.at(0, s.seqlen - 1);
        plane.step_stride = -plane.step_stride;
        return plane;
    }
    // Rows of a (dim, columns) float32 tensor as a plane whose steps are its columns.
    Plane columns(int64_t data, int64_t columns, const Block &b) const {
        return Plane{reinterpret_cast<char *>(data), FLOAT32, columns, 1}.at(b.first, 0);
    }
    V parameter(int64_t data, const Block &b) const {
        return data ? load_some(reinterpret_cast<const float *>(data) + b.first, b.channels) : set(0.f);
    }
    float *saved(const Block &b, int64_t chunk, int64_t chunks) const {
        return reinterpret_cast<float *>(s.states) + ((b.batch * (chunks - 1) + chunk) * s.dstate) * s.dim + b.first;
    }
};

// dstate columns of B or C for some steps, as rows of `pitch`; or, where they do not vary, as rows of LANES channels.
inline void load_matrix(const Scan &scan, const Matrix &matrix, const Plane &plane, int64_t step, int64_t steps,
                        float *tile) {
    if (!matrix.varies) return;
    for (int64_t n = 0; n < scan.s.dstate; n += LANES) {
        int64_t states = scan.s.dstate - n < LANES ? scan.s.dstate - n : LANES;
        load_tile(plane.at(n, step), int(states), steps, tile + n, scan.pitch);
    }
}

// What the channels of one step have in common: raw delta -> dt, and dt * u.
VEC void step_sizes(const Scan &scan, int64_t steps, V bias, float *dt, const float *u, float *input, float *slope) {
    for (int64_t i = 0; i < steps * LANES; i += LANES) {
        V raw = load(dt + i) + bias;
        V step = scan.s.softplus ? shared_math::softplus<Machine>(raw) : raw;
        if (slope) store(slope + i, scan.s.softplus ? shared_math::sigmoid<Machine>(raw) : set(1.f));
        store(dt + i, step);
        store(input + i, step * load(u + i));
    }
}

template <int N, bool VARIES_B, bool VARIES_C>
void forward_states(int64_t steps, const float *dt, const float *input, const float *B, const float *C, int64_t pitch,
                    const float *A_log2, float *state, float *y) {
    V h[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) h[n] = load(state + n * LANES);
    for (int64_t t = 0; t < steps; ++t) {
        V step = load(dt + t * LANES), in = load(input + t * LANES), even = load(y + t * LANES), odd = set(0.f);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            V b = VARIES_B ? set(B[t * pitch + n]) : load(B + n * LANES);
            V c = VARIES_C ? set(C[t * pitch + n]) : load(C + n * LANES);
            h[n] = shared_math::next_state<Machine>(shared_math::decay<Machine>(step, load(A_log2 + n * LANES)), h[n], in, b);
            (n % 2 ? odd : even) = fma(c, h[n], n % 2 ? odd : even);
        }
        store(y + t * LANES, even + odd);
    }
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) store(state + n * LANES, h[n]);
}

// The same, leaving decays[t][n] and states[t + 1][n] in memory (states[0] is the state before), y only if wanted.
template <int N, bool VARIES_B, bool VARIES_C>
void recompute_states(int64_t steps, const float *dt, const float *input, const float *B, const float *C, int64_t pitch,
                      const float *A_log2, float *decays, float *states, float *y) {
    V h[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) h[n] = load(states + n * LANES);
    for (int64_t t = 0; t < steps; ++t) {
        V step = load(dt + t * LANES), in = load(input + t * LANES);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            V b = VARIES_B ? set(B[t * pitch + n]) : load(B + n * LANES);
            V a = shared_math::decay<Machine>(step, load(A_log2 + n * LANES));
            h[n] = shared_math::next_state<Machine>(a, h[n], in, b);
            store(decays + (t * N + n) * LANES, a);
            store(states + ((t + 1) * N + n) * LANES, h[n]);
        }
        if (y) {
            V sum = load(y + t * LANES);
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) sum = fma(VARIES_C ? set(C[t * pitch + n]) : load(C + n * LANES), h[n], sum);
            store(y + t * LANES, sum);
        }
    }
}

template <int N> VEC void add_row(float *row, V *sums) {
    if constexpr (N >= LANES) {
        for (int n = 0; n < N; n += LANES) store(row + n, load(row + n) + sum_lanes<LANES>(sums + n));
    } else {
        V total = sum_lanes<N>(sums);
        for (int n = 0; n < N; ++n) row[n] += total[n];
    }
}

// Sums over states go to input_grad and decay_grad (see scan_math.h), sums over channels to rows of dB and dC, `row` floats
// a step (or, where the matrix does not vary, sums over steps to its LANES channels), sums over steps to dA.
template <int N, bool VARIES_B, bool VARIES_C>
void backward_states(int64_t steps, const float *dt, const float *input, const float *dy, const float *B, const float *C,
                     int64_t pitch, const float *A, const float *decays, const float *states, float *carries, float *dA,
                     float *dB, float *dC, int64_t row, float *input_grad, float *decay_grad) {
    V carry[N], after[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
        carry[n] = load(carries + n * LANES);
        after[n] = load(states + (steps * N + n) * LANES);
    }
    for (int64_t t = steps - 1; t >= 0; --t) {
        V step = load(dt + t * LANES), in = load(input + t * LANES), grad = load(dy + t * LANES);
        shared_math::BackwardSums<Machine> sums{load(input_grad + t * LANES), load(decay_grad + t * LANES)};
        V sum_B[N], sum_C[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            V b = VARIES_B ? set(B[t * pitch + n]) : load(B + n * LANES);
            V c = VARIES_C ? set(C[t * pitch + n]) : load(C + n * LANES);
            V before = load(states + (t * N + n) * LANES), sum_A = load(dA + n * LANES);
            sum_B[n] = sum_C[n] = set(0.f);
            shared_math::backward_step<Machine>(load(decays + (t * N + n) * LANES), before, after[n], load(A + n * LANES), b,
                                                c, step, in, grad, carry[n], sum_A, sum_B[n], sum_C[n], sums);
            after[n] = before;
            store(dA + n * LANES, sum_A);
            if (!VARIES_B) store(dB + n * LANES, load(dB + n * LANES) + sum_B[n]);
            if (!VARIES_C) store(dC + n * LANES, load(dC + n * LANES) + sum_C[n]);
        }
        if (VARIES_B) add_row<N>(dB + t * row, sum_B);
        if (VARIES_C) add_row<N>(dC + t * row, sum_C);
        store(input_grad + t * LANES, sums.input_grad);
        store(decay_grad + t * LANES, sums.decay_grad);
    }
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) store(carries + n * LANES, carry[n]);
}

// Calls body with the number of states as a compile-time constant: as many as fit in `most` at a time, then the rest.
template <int64_t MOST, class Body> VEC void for_state_blocks(int64_t dstate, Body body) {
    int64_t n = 0;
    if constexpr (MOST >= 16)
        for (; n + 16 <= dstate; n += 16) body.template run<16>(n);
    if constexpr (MOST >= 8)
        for (; n + 8 <= dstate; n += 8) body.template run<8>(n);
    for (; n + 4 <= dstate; n += 4) body.template run<4>(n);
    for (; n < dstate; ++n) body.template run<1>(n);
}

// Everything the two directions of one block share: scratch tiles and the block's parameters.
struct Tiles {
    float *A, *A_log2, *B, *C, *u, *dt, *input, *y, *z, *state;

    Tiles(const Scan &scan, Scratch &scratch, int64_t steps) {
        const int64_t states = scan.s.dstate * LANES, tile = steps * LANES;
        // Matrices that do not vary take dstate rows of LANES, the others `steps` rows of `pitch`.
        const int64_t matrix = std::max(states, steps * scan.pitch);
        A = scratch.take(states), A_log2 = scratch.take(states), state = scratch.take(states);
        B = scratch.take(matrix), C = scratch.take(matrix);
        u = scratch.take(tile), dt = scratch.take(tile), input = scratch.take(tile), y = scratch.take(tile);
        z = scratch.take(tile);
    }
    static int64_t floats(const Scan &scan, int64_t steps) {
        return 3 * scan.s.dstate * LANES + 2 * std::max(scan.s.dstate * LANES, steps * scan.pitch) + 5 * steps * LANES + 160;
    }
    void begin(const Scan &scan, const Block &b) {
        const ScanArgs &s = scan.s;
        load_tile(scan.columns(s.A, s.dstate, b), b.channels, s.dstate, A);
        for (int64_t i = 0; i < s.dstate * LANES; i += LANES)
            store(A_log2 + i, load(A + i) * set(shared_math::LOG2_E)), store(state + i, set(0.f));
        if (!s.B.varies) load_tile(scan.columns(s.B.data, s.dstate, b), b.channels, s.dstate, B);
        if (!s.C.varies) load_tile(scan.columns(s.C.data, s.dstate, b), b.channels, s.dstate, C);
    }
};

// Where state n of a matrix' tile begins.
VEC const float *at_state(const Matrix &matrix, const float *tile, int64_t n) { return tile + (matrix.varies ? n : n * LANES); }

struct ForwardStates {
    const Scan &scan;
    Tiles &tiles;
    int64_t first, steps;

    template <int N> VEC void run(int64_t n) {
        const ScanArgs &s = scan.s;
        const int64_t tile = first * LANES, row = first * scan.pitch;
        const float *B = at_state(s.B, tiles.B, n) + (s.B.varies ? row : 0);
        const float *C = at_state(s.C, tiles.C, n) + (s.C.varies ? row : 0);
        auto go = [&](auto kernel) {
            kernel(steps, tiles.dt + tile, tiles.input + tile, B, C, scan.pitch, tiles.A_log2 + n * LANES,
                   tiles.state + n * LANES, tiles.y + tile);
        };
        if (s.B.varies && s.C.varies) go(forward_states<N, true, true>);
        else if (s.B.varies) go(forward_states<N, true, false>);
        else if (s.C.varies) go(forward_states<N, false, true>);
        else go(forward_states<N, false, false>);
    }
};

// Adds what is there already, applies the gate and the share.
VEC void finish(const ScanArgs &s, const Plane &z, const Plane &out, int channels, int64_t steps, Tiles &tiles) {
    const V share = set(s.share_value());
    if (s.accumulate) {
        load_tile(out, channels, steps, tiles.z);
        for (int64_t i = 0; i < steps * LANES; i += LANES) store(tiles.y + i, load(tiles.y + i) + load(tiles.z + i));
    }
    if (s.z.data) {
        load_tile(z, channels, steps, tiles.z);
        for (int64_t i = 0; i < steps * LANES; i += LANES)
            store(tiles.y + i, load(tiles.y + i) * share * shared_math::silu<Machine>(load(tiles.z + i)));
    } else if (s.share_value() != 1.f) {
        for (int64_t i = 0; i < steps * LANES; i += LANES) store(tiles.y + i, load(tiles.y + i) * share);
    }
}

inline void forward_block(const Scan &scan, const Block &b, Tiles &tiles, int64_t tile_steps) {
    const ScanArgs &s = scan.s;
    const int64_t chunks = (s.seqlen + s.interval - 1) / s.interval;
    const Plane u = scan.plane(s.u, b), delta = scan.plane(s.delta, b), z = scan.plane(s.z, b), out = scan.plane(s.out, b);
    const Plane B = scan.plane(s.B, b), C = scan.plane(s.C, b);
    const V bias = scan.parameter(s.delta_bias, b), D = scan.parameter(s.D, b);
    tiles.begin(scan, b);
    for (int64_t start = 0; start < s.seqlen; start += tile_steps) {
        const int64_t steps = std::min(tile_steps, s.seqlen - start);
        load_tile(u.at(0, start), b.channels, steps, tiles.u);
        load_tile(delta.at(0, start), b.channels, steps, tiles.dt);
        load_matrix(scan, s.B, B, start, steps, tiles.B);
        load_matrix(scan, s.C, C, start, steps, tiles.C);
        const int64_t next = start + steps, ahead = std::min(tile_steps, s.seqlen - next);
        if (s.z.data) prefetch(z.at(0, start), steps);
        prefetch(u.at(0, next), ahead), prefetch(delta.at(0, next), ahead);
        step_sizes(scan, steps, bias, tiles.dt, tiles.u, tiles.input, nullptr);
        for (int64_t i = 0; i < steps * LANES; i += LANES) store(tiles.y + i, D * load(tiles.u + i));
        const int64_t stride = s.states ? s.interval : steps;
        for (int64_t first = 0; first < steps; first += stride) {
            const int64_t chunk = (start + first) / s.interval;
            for_state_blocks<FORWARD_STATES>(s.dstate, ForwardStates{scan, tiles, first, std::min(stride, steps - first)});
            if (s.states && chunk + 1 < chunks)
                for (int64_t n = 0; n < s.dstate; ++n)
                    store_some(scan.saved(b, chunk, chunks) + n * s.dim, load(tiles.state + n * LANES), b.channels);
        }
        finish(s, z.at(0, start), out.at(0, start), b.channels, steps, tiles);
        store_tile(out.at(0, start), b.channels, steps, tiles.y);
    }
    if (s.last_state)
        store_tile(scan.columns(s.last_state + b.batch * s.dim * s.dstate * 4, s.dstate, b), b.channels, s.dstate, tiles.state);
}

inline int scan_forward(const ScanArgs &s) {
    const Scan scan(s);
    const int64_t tasks = s.batch * scan.blocks;
    const int64_t tile_steps = s.states ? round_up(FORWARD_STEPS, s.interval) : FORWARD_STEPS;
    const int shares = parallel::shares_for(s.threads, tasks, s.batch * s.dim * s.seqlen * s.dstate / LANES);
    std::atomic<int> failures{0};
    parallel::run(shares, [&](int share) {
        Scratch scratch(Tiles::floats(scan, tile_steps));
        if (!scratch.ok()) return void(++failures);
        Tiles tiles(scan, scratch, tile_steps);
        const parallel::Range range = parallel::share_of(tasks, shares, share);
        for (int64_t task = range.begin; task < range.end; ++task) forward_block(scan, scan.block(task), tiles, tile_steps);
    });
    return failures;
}

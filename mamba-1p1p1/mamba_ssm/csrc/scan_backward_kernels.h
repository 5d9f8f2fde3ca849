// The gradient of the scan on CPU vectors. Included after scan_kernels.h.
//
// A share of the work is a run of (batch, block) tasks in order. Sums over channels (dB, dC) go to a float32 buffer of the
// whole batch: the share that begins a (batch, group) writes there, one that continues it writes to a buffer of its own,
// added afterwards in the order of the shares. Sums over batch and steps (dA, dD, ...) go to one buffer a share, added
// likewise. So a fixed number of threads always adds in the same order.

// Per channel block: dA, dB and dC where those do not vary, then dD and ddelta_bias, as rows of LANES.
struct ParameterSums {
    int64_t dA, dB, dC, dD, ddelta_bias, rows;

    explicit ParameterSums(const ScanArgs &s) {
        dA = 0, dB = s.dstate, dC = dB + (s.B.varies ? 0 : s.dstate), dD = dC + (s.C.varies ? 0 : s.dstate);
        ddelta_bias = dD + 1, rows = dD + 2;
    }
};

// One walk's decays and states, N to a step, and what it adds to dB and dC, still in LANES channels.
struct Walk {
    float *decays, *states, *dB, *dC;

    static int64_t floats(int64_t steps) { return (4 * steps + 1) * LANES * BACKWARD_STATES + 64; }
    Walk(Scratch &scratch, int64_t steps) {
        const int64_t walk = steps * LANES * BACKWARD_STATES;
        decays = scratch.take(walk), states = scratch.take(walk + LANES * BACKWARD_STATES);
        dB = scratch.take(walk), dC = scratch.take(walk);
    }
};

// What a block has of a step while its states are walked: a row each, one after the other, since all are wanted together.
enum StepRow { DT, INPUT, SLOPE, Y, GATE, DY, INPUT_GRAD, DECAY_GRAD, STEP_ROWS };
struct StepRows {
    float *first;
    int64_t block_stride;

    // As with tiles, a line more for each block.
    static int64_t floats(int64_t steps) { return round_up(steps * STEP_ROWS * LANES, 16) + 16; }
    VEC float *at(int block, int64_t t) const { return first + block * block_stride + t * STEP_ROWS * LANES; }
};
VEC V get(const float *step, StepRow row) { return load(step + row * LANES); }
VEC void put(float *step, StepRow row, V x) { store(step + row * LANES, x); }

// What the blocks of a band need of a chunk of steps; and tiles for those signals that have no rows in memory. Gradients
// take the tile of what they are the gradient of.
struct Chunk {
    Rows u, dout, z;
    StepRows own;
};
struct BackwardTiles {
    float *u, *delta, *z, *dout, *before, *own;

    static int64_t floats(int64_t steps, int blocks) {
        return blocks * (5 * tile_floats(steps) + StepRows::floats(steps)) + 6 * 16;
    }
    BackwardTiles(Scratch &scratch, int64_t steps, int blocks) {
        for (float **tile : {&u, &delta, &z, &dout, &before}) *tile = scratch.take(blocks * tile_floats(steps));
        own = scratch.take(blocks * StepRows::floats(steps));
    }
};

// forward_states that leaves decays[t][n] and states[t + 1][n] in memory (states[0] is the state before), y only if wanted.
template <int N, bool VARIES_B, bool VARIES_C, bool WITHIN>
void recompute_states(int64_t steps, float *own, States B, States C, const float *A_log2, float *decays, float *states,
                      bool y) {
    constexpr int K = TOGETHER<N>;
    V h[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) h[n] = load(states + n * LANES);
    for (int64_t t = 0; t < steps; ++t, own += STEP_ROWS * LANES) {
        V step = get(own, DT), in = get(own, INPUT);
#pragma GCC unroll 16
        for (int n = 0; n < N; n += K) {
            V a[K];
            find_decays<WITHIN>(step, A_log2 + n * LANES, a);
#pragma GCC unroll 16
            for (int k = n; k < n + K; ++k) {
                h[k] = shared_math::next_state<Machine>(a[k - n], h[k], in, B.get<VARIES_B>(t, k));
                store(decays + (t * N + k) * LANES, a[k - n]);
                store(states + ((t + 1) * N + k) * LANES, h[k]);
            }
        }
        if (y) {
            V sum = get(own, Y);
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) sum = fma(C.get<VARIES_C>(t, n), h[n], sum);
            put(own, Y, sum);
        }
    }
}

// Sums over states go to INPUT_GRAD and DECAY_GRAD (see scan_math.h; `first`: they hold nothing yet), sums over steps to dA,
// and to dB and dC the terms of each step (FRESH: they hold nothing yet) or, where the matrix does not vary, sums over steps.
template <int N, bool VARIES_B, bool VARIES_C, bool FRESH>
void backward_states(int64_t steps, float *own, bool first, States B, States C, const float *A, const float *decays,
                     const float *states, float *carries, float *dA, float *dB, float *dC) {
    V carry[N], sum_A[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) carry[n] = load(carries + n * LANES), sum_A[n] = load(dA + n * LANES);
    own += (steps - 1) * STEP_ROWS * LANES;
    for (int64_t t = steps - 1; t >= 0; --t, own -= STEP_ROWS * LANES) {
        V step = get(own, DT), in = get(own, INPUT), grad = get(own, DY);
        shared_math::BackwardSums<Machine> sums{set(0.f), set(0.f)};
        if (!first) sums = {get(own, INPUT_GRAD), get(own, DECAY_GRAD)};
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            float *const to_B = dB + (VARIES_B ? t * N + n : n) * LANES, *const to_C = dC + (VARIES_C ? t * N + n : n) * LANES;
            V sum_B = FRESH && VARIES_B ? set(0.f) : load(to_B), sum_C = FRESH && VARIES_C ? set(0.f) : load(to_C);
            shared_math::backward_step<Machine>(load(decays + (t * N + n) * LANES), load(states + (t * N + n) * LANES),
                                                load(states + ((t + 1) * N + n) * LANES), load(A + n * LANES),
                                                B.get<VARIES_B>(t, n), C.get<VARIES_C>(t, n), step, in, grad, carry[n],
                                                sum_A[n], sum_B, sum_C, sums);
            store(to_B, sum_B), store(to_C, sum_C);
        }
        put(own, INPUT_GRAD, sums.input_grad), put(own, DECAY_GRAD, sums.decay_grad);
    }
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) store(carries + n * LANES, carry[n]), store(dA + n * LANES, sum_A[n]);
}

// Adds the sums over channels of N vectors a step to N numbers a step, `row` floats apart.
template <int N> void add_rows(int64_t steps, const float *terms, float *rows, int64_t row) {
    typedef float Numbers __attribute__((vector_size(4 * N)));
    static_assert(N <= LANES, "one vector holds the sums");
    for (int64_t t = 0; t < steps; ++t) {
        V of_step[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) of_step[n] = load(terms + (t * N + n) * LANES);
        const V total = sum_lanes<N>(of_step);
        Numbers some, sum;
        __builtin_memcpy(&some, &total, sizeof some);
        __builtin_memcpy(&sum, rows + t * row, sizeof sum);
        sum += some;
        __builtin_memcpy(rows + t * row, &sum, sizeof sum);
    }
}

// A band, where each of its blocks adds up the gradients of its parameters.
struct BackwardBand : Band {
    float *sums[BAND];  // of ParameterSums
    bool within[BAND];
    BackwardTiles tiles;
    Walk walk;

    static int64_t floats(const Scan &scan, int64_t steps, int most) {
        return Band::floats(scan, steps) + BackwardTiles::floats(steps, most) + Walk::floats(steps);
    }
    BackwardBand(const Scan &scan, Scratch &scratch, int64_t steps, int most)
        : Band(scan, scratch, steps, most, -steps), tiles(scratch, steps, most), walk(scratch, steps) {}
};

// A chunk of steps of a team, the blocks of a band from `first` on, its states N at a time: of one kind for all blocks of
// the team, so that what they add to dB and dC is summed over their channels together.
struct BackwardStates {
    const Scan &scan;
    const BackwardBand &band;
    const Chunk &of;
    const ParameterSums &rows;
    int first, count;
    States B, C;
    int64_t steps, chunk, chunks, row;
    float *dB, *dC;  // the rows of this chunk's first step

    template <int N> VEC void run(int64_t n) {
        const ScanArgs &s = scan.s;
        const Walk &walk = band.walk;
        if (!(s.B.varies && s.C.varies)) {  // there is no kernel of those that finds one of them fresh
            std::memset(walk.dB, 0, steps * N * LANES * sizeof(float));
            std::memset(walk.dC, 0, steps * N * LANES * sizeof(float));
        }
        for (int index = first; index < first + count; ++index) {
            const Channels &block = band.channels[index];
            const bool within = band.within[index];
            float *const own = of.own.at(index, 0), *const sums = band.sums[index];
            const States B_here = block.B_at(scan, B, 0, n), C_here = block.C_at(scan, C, 0, n);
            for (int i = 0; i < N; ++i) {
                const float *saved = chunk ? scan.saved(block.b, chunk - 1, chunks) + (n + i) * s.dim : nullptr;
                store(walk.states + i * LANES, saved ? load_some(saved, block.b.channels) : set(0.f));
            }
            SCAN_KERNEL(recompute_states, N, scan, within)
            (steps, own, B_here, C_here, block.A_log2 + n * LANES, walk.decays, walk.states, s.z.data != 0);
            SCAN_KERNEL(backward_states, N, scan, index == first)
            (steps, own, n == 0, B_here, C_here, block.A + n * LANES, walk.decays, walk.states, block.state + n * LANES,
             sums + (rows.dA + n) * LANES, s.B.varies ? walk.dB : sums + (rows.dB + n) * LANES,
             s.C.varies ? walk.dC : sums + (rows.dC + n) * LANES);
        }
        if (s.B.varies) add_rows<N>(steps, walk.dB, dB + n, row);
        if (s.C.varies) add_rows<N>(steps, walk.dC, dC + n, row);
    }
};

// Before the states of a chunk are walked: everything that the steps of a channel have in common; and the largest |dt|.
template <bool SOFTPLUS, bool GATED>
void begin_steps(const Band &band, Rows delta, Rows u, Rows dout, Rows z, V share, int64_t steps, StepRows own, V *largest) {
    for (int i = 0; i < band.count; ++i) largest[i] = set(0.f);
    each_row(band.count, steps, [&](int i, int64_t t) {
        delta.expect(i, t), u.expect(i, t), dout.expect(i, t);
        float *const to = own.at(i, t);
        const V raw = delta.get(i, t) + band.channels[i].bias, x = u.get(i, t);
        V step = raw, grad = dout.get(i, t) * share;
        if (SOFTPLUS) {
            const auto both = shared_math::softplus_and_slope<Machine>(raw);
            step = both.value, put(to, SLOPE, both.slope);
        }
        if (GATED) {
            z.expect(i, t);
            const V gate = shared_math::sigmoid<Machine>(z.get(i, t));
            grad = grad * z.get(i, t) * gate;
            put(to, GATE, gate), put(to, Y, band.channels[i].D * x);
        }
        largest[i] = max(abs(step), largest[i]);
        put(to, DT, step), put(to, INPUT, step * x), put(to, DY, grad);
    });
}

// The same chunk after all its states. before: what is there of dz.
template <bool SOFTPLUS, bool GATED>
void end_steps(const BackwardBand &band, const ParameterSums &rows, Rows u, Rows dout, Rows z, V share, int64_t steps,
               StepRows own, Rows du, Rows ddelta, Rows dz, Rows before, bool add) {
    V dD[BAND], ddelta_bias[BAND];
    for (int i = 0; i < band.count; ++i) {
        dD[i] = load(band.sums[i] + rows.dD * LANES);
        ddelta_bias[i] = load(band.sums[i] + rows.ddelta_bias * LANES);
    }
    each_row(band.count, steps, [&](int i, int64_t t) {
        du.expect(i, t), ddelta.expect(i, t);
        const float *const of = own.at(i, t);
        const V grad = get(of, DY), x = u.get(i, t), in = get(of, INPUT_GRAD);
        V grad_raw = fma(x, in, get(of, DECAY_GRAD));
        if (SOFTPLUS) grad_raw = grad_raw * get(of, SLOPE);
        dD[i] = fma(grad, x, dD[i]), ddelta_bias[i] = ddelta_bias[i] + grad_raw;
        du.put(i, t, fma(band.channels[i].D, grad, get(of, DT) * in));
        ddelta.put(i, t, grad_raw);
        if (GATED) {
            dz.expect(i, t);
            V grad_z = dout.get(i, t) * share * get(of, Y) * shared_math::silu_grad<Machine>(z.get(i, t), get(of, GATE));
            if (add) grad_z = grad_z + before.get(i, t);
            dz.put(i, t, grad_z);
        }
    });
    for (int i = 0; i < band.count; ++i) {
        store(band.sums[i] + rows.dD * LANES, dD[i]);
        store(band.sums[i] + rows.ddelta_bias * LANES, ddelta_bias[i]);
    }
}

inline Chunk begin_chunk(const Scan &scan, BackwardBand &band, int64_t start, int64_t steps) {
    const ScanArgs &s = scan.s;
    const BackwardTiles &tiles = band.tiles;
    const StepRows own{tiles.own, StepRows::floats(steps)};
    const Rows u = band.read(scan, s.u, start, steps, tiles.u), delta = band.read(scan, s.delta, start, steps, tiles.delta);
    const Rows dout = band.read(scan, s.dout, start, steps, tiles.dout);
    const Rows z = s.z.data ? band.read(scan, s.z, start, steps, tiles.z) : u;
    const auto begin = s.softplus ? s.z.data ? begin_steps<true, true> : begin_steps<true, false>
                       : s.z.data ? begin_steps<false, true>
                                  : begin_steps<false, false>;
    V largest[BAND];
    begin(band, delta, u, dout, z, set(s.share_value()), steps, own, largest);
    for (int i = 0; i < band.count; ++i) band.within[i] = band.channels[i].within(largest[i]);
    return {u, dout, z, own};
}

inline void end_chunk(const Scan &scan, const BackwardBand &band, const ParameterSums &rows, const Chunk &chunk, int64_t start,
                      int64_t steps) {
    const ScanArgs &s = scan.s;
    const BackwardTiles &tiles = band.tiles;
    const bool add = s.z.data && s.accumulate;
    const Rows du = band.rows(scan, s.du, start, steps, tiles.u);
    const Rows ddelta = band.rows(scan, s.ddelta, start, steps, tiles.delta);
    const Rows dz = s.z.data ? band.rows(scan, s.dz, start, steps, tiles.z) : du;
    const Rows before = add ? band.read(scan, s.dz, start, steps, tiles.before) : du;
    const auto end = s.softplus ? s.z.data ? end_steps<true, true> : end_steps<true, false>
                     : s.z.data ? end_steps<false, true>
                                : end_steps<false, false>;
    end(band, rows, chunk.u, chunk.dout, chunk.z, set(s.share_value()), steps, chunk.own, du, ddelta, dz, before, add);
    band.write(scan, s.du, start, steps, du, tiles.u);
    band.write(scan, s.ddelta, start, steps, ddelta, tiles.delta);
    if (s.z.data) band.write(scan, s.dz, start, steps, dz, tiles.z);
}

// dB, dC: (seqlen, pitch) rows of the band's (batch, group), in memory order.
inline void backward_band(const Scan &scan, BackwardBand &band, float *dB, float *dC) {
    const ScanArgs &s = scan.s;
    const ParameterSums rows(s);
    const int64_t chunks = (s.seqlen + s.interval - 1) / s.interval, row = s.reverse ? -scan.pitch : scan.pitch;
    const Plane B = scan.plane(s.B, band.block()), C = scan.plane(s.C, band.block());
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {  // channels' states carry dL/dh
        const int64_t start = chunk * s.interval, steps = std::min(s.interval, s.seqlen - start);
        const int64_t first_row = (s.reverse ? s.seqlen - 1 - start : start) * scan.pitch;
        const States B_rows = read_states(scan, s.B, B.at(0, start), steps, band.B);
        const States C_rows = read_states(scan, s.C, C.at(0, start), steps, band.C);
        const Chunk of = begin_chunk(scan, band, start, steps);
        const int64_t channels = band.count * LANES;
        for (int64_t n = 0; chunk && n < s.dstate; ++n)
            for (int64_t c = 0; c < channels; c += 16)
                __builtin_prefetch(scan.saved(band.block(), chunk - 1, chunks) + n * s.dim + c);
        for (int first = 0; first < band.count; first += TEAM)
            for_state_blocks<BACKWARD_STATES>(
                s.dstate, BackwardStates{scan, band, of, rows, first, std::min(TEAM, band.count - first), B_rows, C_rows, steps,
                                         chunk, chunks, row, dB + first_row, dC + first_row});
        end_chunk(scan, band, rows, of, start, steps);
    }
}

// (seqlen, pitch) rows of one (batch, group) -> dB or dC.
inline void store_matrix(const Scan &scan, const Matrix &matrix, const Block &b, const float *rows) {
    if (!matrix.varies) return;
    Plane plane{reinterpret_cast<char *>(matrix.data), matrix.dtype, matrix.state_stride, matrix.step_stride};
    plane.data += (b.batch * matrix.batch_stride + b.group * matrix.group_stride) * (matrix.dtype == FLOAT32 ? 4 : 2);
    for (int64_t n = 0; n < scan.s.dstate; n += LANES) {
        int64_t states = scan.s.dstate - n < LANES ? scan.s.dstate - n : LANES;
        store_tile(plane.at(n, 0), int(states), scan.s.seqlen, rows + n, scan.pitch);
    }
}

inline int scan_backward(const ScanArgs &s) {
    const Scan scan(s);
    const ParameterSums rows(s);
    const int64_t tasks = s.batch * scan.blocks, matrix = s.seqlen * scan.pitch;
    const int64_t sums_of_share = scan.blocks * rows.rows * LANES;
    const int shares = parallel::shares_for(s.threads, tasks, s.batch * s.dim * s.seqlen * s.dstate / LANES * 3);
    const int most = scan.band(BAND * FORWARD_STEPS / s.interval);
    // dB then dC of every (batch, group), then of every share that may continue one.
    Scratch matrices((s.batch * s.groups + shares) * 2 * matrix), parameters(shares * sums_of_share);
    if (!matrices.ok() || !parameters.ok()) return 1;
    float *const whole = matrices.take((s.batch * s.groups + shares) * 2 * matrix);
    float *const continued = whole + s.batch * s.groups * 2 * matrix, *const sums = parameters.take(shares * sums_of_share);
    std::atomic<int> failures{0};
    parallel::run(shares, [&](int share) {
        Scratch scratch(BackwardBand::floats(scan, s.interval, most));
        if (!scratch.ok()) return void(++failures);
        BackwardBand band(scan, scratch, s.interval, most);
        float *own = sums + share * sums_of_share, *pair = nullptr;
        std::memset(own, 0, sums_of_share * sizeof(float));
        const parallel::Range range = parallel::share_of(tasks, shares, share);
        for (int64_t task = range.begin; task < range.end; task += band.count) {
            band.begin(scan, task, range.end);
            for (int i = 0; i < band.count; ++i) band.sums[i] = own + (task + i) % scan.blocks * rows.rows * LANES;
            const Block &b = band.block();
            if (task == range.begin || b.group_block == 0) {
                pair = b.group_block ? continued + share * 2 * matrix : whole + (b.batch * s.groups + b.group) * 2 * matrix;
                std::memset(pair, 0, 2 * matrix * sizeof(float));
            }
            backward_band(scan, band, pair, pair + matrix);
        }
    });
    if (failures) return 1;
    for (int share = 1; share < shares; ++share) {
        const Block b = scan.block(parallel::share_of(tasks, shares, share).begin);
        if (b.group_block == 0) continue;
        float *to = whole + (b.batch * s.groups + b.group) * 2 * matrix, *from = continued + share * 2 * matrix;
        for (int64_t i = 0; i < 2 * matrix; i += LANES) store(to + i, load(to + i) + load(from + i));
    }
    parallel::run(shares, [&](int share) {
        const parallel::Range pairs = parallel::share_of(s.batch * s.groups, shares, share);
        for (int64_t pair = pairs.begin; pair < pairs.end; ++pair) {
            const Block b{pair / s.groups, 0, pair % s.groups, 0, 0};
            store_matrix(scan, s.dB, b, whole + pair * 2 * matrix);
            store_matrix(scan, s.dC, b, whole + pair * 2 * matrix + matrix);
        }
        const parallel::Range blocks = parallel::share_of(scan.blocks, shares, share);
        for (int64_t index = blocks.begin; index < blocks.end; ++index) {
            float *total = sums + index * rows.rows * LANES;
            for (int other = 1; other < shares; ++other)
                for (int64_t i = 0; i < rows.rows * LANES; i += LANES)
                    store(total + i, load(total + i) + load(total + other * sums_of_share + i));
            const Block b = scan.block(index);
            store_tile(scan.columns(s.dA, s.dstate, b), b.channels, s.dstate, total);
            if (!s.B.varies) store_tile(scan.columns(s.dB.data, s.dstate, b), b.channels, s.dstate, total + rows.dB * LANES);
            if (!s.C.varies) store_tile(scan.columns(s.dC.data, s.dstate, b), b.channels, s.dstate, total + rows.dC * LANES);
            if (s.D) store_tile(scan.columns(s.dD, 1, b), b.channels, 1, total + rows.dD * LANES);
            if (s.delta_bias) store_tile(scan.columns(s.ddelta_bias, 1, b), b.channels, 1, total + rows.ddelta_bias * LANES);
        }
    });
    return 0;
}

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

struct BackwardTiles : Tiles {
    float *decays, *states, *slope, *dy, *dout, *input_grad, *decay_grad;

    BackwardTiles(const Scan &scan, Scratch &scratch, int64_t steps) : Tiles(scan, scratch, steps) {
        const int64_t tile = steps * LANES;
        decays = scratch.take(tile * BACKWARD_STATES), states = scratch.take((tile + LANES) * BACKWARD_STATES);
        slope = scratch.take(tile), dy = scratch.take(tile), dout = scratch.take(tile);
        input_grad = scratch.take(tile), decay_grad = scratch.take(tile);
    }
    static int64_t floats(const Scan &scan, int64_t steps) {
        return Tiles::floats(scan, steps) + (2 * steps + 1) * LANES * BACKWARD_STATES + 5 * steps * LANES + 112;
    }
};

struct BackwardStates {
    const Scan &scan;
    const Block &b;
    BackwardTiles &tiles;
    const ParameterSums &rows;
    int64_t steps, chunk, chunks, row;
    float *sums, *dB, *dC;  // dB, dC: the rows of this chunk's first step

    template <int N, bool VARIES_B, bool VARIES_C> VEC void go(int64_t n) {
        const ScanArgs &s = scan.s;
        const float *B = at_state(s.B, tiles.B, n), *C = at_state(s.C, tiles.C, n);
        for (int i = 0; i < N; ++i) {
            const float *saved = chunk ? scan.saved(b, chunk - 1, chunks) + (n + i) * s.dim : nullptr;
            store(tiles.states + i * LANES, saved ? load_some(saved, b.channels) : set(0.f));
        }
        recompute_states<N, VARIES_B, VARIES_C>(steps, tiles.dt, tiles.input, B, C, scan.pitch, tiles.A_log2 + n * LANES,
                                                tiles.decays, tiles.states, s.z.data ? tiles.y : nullptr);
        backward_states<N, VARIES_B, VARIES_C>(steps, tiles.dt, tiles.input, tiles.dy, B, C, scan.pitch, tiles.A + n * LANES,
                                               tiles.decays, tiles.states, tiles.state + n * LANES,
                                               sums + (rows.dA + n) * LANES,
                                               VARIES_B ? dB + n : sums + (rows.dB + n) * LANES,
                                               VARIES_C ? dC + n : sums + (rows.dC + n) * LANES, row, tiles.input_grad,
                                               tiles.decay_grad);
    }
    template <int N> VEC void run(int64_t n) {
        if (scan.s.B.varies && scan.s.C.varies) go<N, true, true>(n);
        else if (scan.s.B.varies) go<N, true, false>(n);
        else if (scan.s.C.varies) go<N, false, true>(n);
        else go<N, false, false>(n);
    }
};

// dB, dC: (seqlen, pitch) rows of this block's (batch, group), in memory order; sums: this block's ParameterSums.
inline void backward_block(const Scan &scan, const Block &b, BackwardTiles &tiles, float *sums, float *dB, float *dC) {
    const ScanArgs &s = scan.s;
    const ParameterSums rows(s);
    const int64_t chunks = (s.seqlen + s.interval - 1) / s.interval, row = s.reverse ? -scan.pitch : scan.pitch;
    const Plane u = scan.plane(s.u, b), delta = scan.plane(s.delta, b), z = scan.plane(s.z, b);
    const Plane dout = scan.plane(s.dout, b), du = scan.plane(s.du, b), ddelta = scan.plane(s.ddelta, b);
    const Plane dz = scan.plane(s.dz, b), B = scan.plane(s.B, b), C = scan.plane(s.C, b);
    const V bias = scan.parameter(s.delta_bias, b), D = scan.parameter(s.D, b);
    V dD = load(sums + rows.dD * LANES), ddelta_bias = load(sums + rows.ddelta_bias * LANES);
    const V share = set(s.share_value());
    tiles.begin(scan, b);  // tiles.state carries dL/dh from here on
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
        const int64_t start = chunk * s.interval, steps = std::min(s.interval, s.seqlen - start), end = steps * LANES;
        const int64_t first_row = (s.reverse ? s.seqlen - 1 - start : start) * scan.pitch;
        load_tile(u.at(0, start), b.channels, steps, tiles.u);
        load_tile(delta.at(0, start), b.channels, steps, tiles.dt);
        load_tile(dout.at(0, start), b.channels, steps, tiles.dout);
        load_matrix(scan, s.B, B, start, steps, tiles.B);
        load_matrix(scan, s.C, C, start, steps, tiles.C);
        if (chunk) {
            const int64_t next = start - s.interval;
            prefetch(u.at(0, next), s.interval), prefetch(delta.at(0, next), s.interval);
            prefetch(dout.at(0, next), s.interval);
            if (s.z.data) prefetch(z.at(0, next), s.interval);
        }
        step_sizes(scan, steps, bias, tiles.dt, tiles.u, tiles.input, tiles.slope);
        if (s.z.data) load_tile(z.at(0, start), b.channels, steps, tiles.z);
        for (int64_t i = 0; i < end; i += LANES) {
            V grad = load(tiles.dout + i) * share;
            store(tiles.dout + i, grad);
            if (s.z.data) grad = grad * shared_math::silu<Machine>(load(tiles.z + i));
            store(tiles.dy + i, grad);
            store(tiles.y + i, D * load(tiles.u + i));
            store(tiles.input_grad + i, set(0.f)), store(tiles.decay_grad + i, set(0.f));
        }
        for_state_blocks<BACKWARD_STATES>(
            s.dstate,
            BackwardStates{scan, b, tiles, rows, steps, chunk, chunks, row, sums, dB + first_row, dC + first_row});
        for (int64_t i = 0; i < end; i += LANES) {
            V grad = load(tiles.dy + i), uu = load(tiles.u + i), in = load(tiles.input_grad + i);
            V grad_raw = fma(uu, in, load(tiles.decay_grad + i)) * load(tiles.slope + i);
            store(tiles.input_grad + i, fma(D, grad, load(tiles.dt + i) * in));
            store(tiles.decay_grad + i, grad_raw);
            dD = fma(grad, uu, dD), ddelta_bias = ddelta_bias + grad_raw;
            if (s.z.data)
                store(tiles.z + i, load(tiles.dout + i) * load(tiles.y + i) * shared_math::silu_grad<Machine>(load(tiles.z + i)));
        }
        if (s.z.data && s.accumulate) {
            load_tile(dz.at(0, start), b.channels, steps, tiles.y);
            for (int64_t i = 0; i < end; i += LANES) store(tiles.z + i, load(tiles.z + i) + load(tiles.y + i));
        }
        store_tile(du.at(0, start), b.channels, steps, tiles.input_grad);
        store_tile(ddelta.at(0, start), b.channels, steps, tiles.decay_grad);
        if (s.z.data) store_tile(dz.at(0, start), b.channels, steps, tiles.z);
    }
    store(sums + rows.dD * LANES, dD), store(sums + rows.ddelta_bias * LANES, ddelta_bias);
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
    // dB then dC of every (batch, group), then of every share that may continue one.
    Scratch matrices((s.batch * s.groups + shares) * 2 * matrix), parameters(shares * sums_of_share);
    if (!matrices.ok() || !parameters.ok()) return 1;
    float *const whole = matrices.take((s.batch * s.groups + shares) * 2 * matrix);
    float *const continued = whole + s.batch * s.groups * 2 * matrix, *const sums = parameters.take(shares * sums_of_share);
    std::atomic<int> failures{0};
    parallel::run(shares, [&](int share) {
        Scratch scratch(BackwardTiles::floats(scan, s.interval));
        if (!scratch.ok()) return void(++failures);
        BackwardTiles tiles(scan, scratch, s.interval);
        float *own = sums + share * sums_of_share, *pair = nullptr;
        std::memset(own, 0, sums_of_share * sizeof(float));
        const parallel::Range range = parallel::share_of(tasks, shares, share);
        for (int64_t task = range.begin; task < range.end; ++task) {
            const Block b = scan.block(task);
            if (task == range.begin || b.group_block == 0) {
                pair = b.group_block ? continued + share * 2 * matrix : whole + (b.batch * s.groups + b.group) * 2 * matrix;
                std::memset(pair, 0, 2 * matrix * sizeof(float));
            }
            backward_block(scan, b, tiles, own + task % scan.blocks * rows.rows * LANES, pair, pair + matrix);
        }
    });
    if (failures) return failures;
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

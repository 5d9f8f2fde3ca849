// The selective scan on CPU vectors: a lane is a channel, a vector's states stay in registers while it walks the sequence.
// Included inside an instruction set's namespace (see each_isa.h).
#undef SCAN_MATH_H
#include "scan_math.h"
#include "tile.h"

// States that one walk over the steps holds, forward and backward.
constexpr int64_t FORWARD_STATES = ISA_AVX512 ? 16 : 8;
constexpr int64_t BACKWARD_STATES = 4;
// Steps of a tile, of all blocks of a band: so few that what they read and write stays in the second cache.
constexpr int64_t FORWARD_STEPS = 32;
// Neighbouring blocks of channels that take a tile of steps in turns, so that memory is read and written in its own order:
// one tile of 384 channels is a few whole pages where rows are no longer than that.
constexpr int BAND = 384 / LANES;
// Those of a band whose sums over channels leave the vectors once for all.
constexpr int TEAM = 4;

VEC int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Scratch memory of one share of the work, handed out in cache-line-aligned pieces.
class Scratch {
  public:
    explicit Scratch(int64_t floats) : memory_((floats + 64) * sizeof(float)), next_(static_cast<float *>(memory_.data())) {
        next_ += (64 - reinterpret_cast<uintptr_t>(next_) % 64) / sizeof(float) % 16;
    }
    bool ok() const { return memory_.data() != nullptr; }
    float *take(int64_t floats) {
        float *piece = next_;
        next_ += round_up(floats, 16);
        return piece;
    }

  private:
    memory::Buffer memory_;
    float *next_;
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

// Some steps of a block: rows of LANES channels, `stride` floats apart.
struct Steps {
    float *first;
    int64_t stride;

    VEC V operator[](int64_t t) const { return load(first + t * stride); }
    VEC void put(int64_t t, V x) const { store(first + t * stride, x); }
    VEC void add(int64_t t, V x) const { put(t, (*this)[t] + x); }
};
VEC bool has_rows(const Plane &plane, int channels) {
    return plane.dtype == FLOAT32 && plane.channel_stride == 1 && channels >= LANES;
}
// The plane's first steps where they lie in memory, if that has such rows, else their place in `tile`.
VEC Steps steps_in(const Plane &plane, int channels, float *tile) {
    if (has_rows(plane, channels)) return {reinterpret_cast<float *>(plane.data), plane.step_stride};
    return {tile, LANES};
}
VEC Steps read_steps(const Plane &plane, int channels, int64_t steps, float *tile) {
    if (!has_rows(plane, channels)) load_tile(plane, channels, steps, tile);
    return steps_in(plane, channels, tile);
}
VEC void write_steps(const Plane &plane, int channels, int64_t steps, const float *tile) {
    if (!has_rows(plane, channels)) store_tile(plane, channels, steps, tile);
}

// B or C: state n of step t is at first[t * pitch + n]; or, where it does not vary, first[n * LANES + channel].
struct States {
    const float *first;
    int64_t pitch;

    template <bool VARIES> VEC V get(int64_t t, int64_t n) const {
        return VARIES ? set(first[t * pitch + n]) : load(first + n * LANES);
    }
    VEC States at(bool varies, int64_t t, int64_t n) const { return {first + (varies ? t * pitch + n : n * LANES), pitch}; }
};
// Those of a matrix that varies, for the plane's first steps: in memory if they are neighbours there, else in `tile`.
inline States read_states(const Scan &scan, const Matrix &matrix, const Plane &plane, int64_t steps, float *tile) {
    if (!matrix.varies) return {nullptr, 0};
    if (plane.dtype == FLOAT32 && plane.channel_stride == 1)
        return {reinterpret_cast<const float *>(plane.data), plane.step_stride};
    for (int64_t n = 0; n < scan.s.dstate; n += LANES) {
        int64_t states = scan.s.dstate - n < LANES ? scan.s.dstate - n : LANES;
        load_tile(plane.at(n, 0), int(states), steps, tile + n, scan.pitch);
    }
    return {tile, scan.pitch};
}

// WITHIN: |dt * A_log2| is known to be at most EXP2_WITHIN.
template <bool WITHIN> VEC V decay(V dt, V A_log2) {
    return WITHIN ? shared_math::decay_within<Machine>(dt, A_log2) : shared_math::decay<Machine>(dt, A_log2);
}

// dt, input (dt * u), y: rows of LANES channels, one after the other. Adds to y.
template <int N, bool VARIES_B, bool VARIES_C, bool WITHIN>
void forward_states(int64_t steps, const float *dt, const float *input, States B, States C, const float *A_log2,
                    float *state, float *y) {
    V h[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) h[n] = load(state + n * LANES);
    for (int64_t t = 0; t < steps; ++t) {
        V step = load(dt + t * LANES), in = load(input + t * LANES), even = load(y + t * LANES), odd = set(0.f);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            const V a = decay<WITHIN>(step, load(A_log2 + n * LANES));
            h[n] = shared_math::next_state<Machine>(a, h[n], in, B.get<VARIES_B>(t, n));
            (n % 2 ? odd : even) = fma(C.get<VARIES_C>(t, n), h[n], n % 2 ? odd : even);
        }
        store(y + t * LANES, even + odd);
    }
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) store(state + n * LANES, h[n]);
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

// What a block's channels have of their own: parameters, decay rates, states, and B and C where those do not vary.
struct Channels {
    Block b;
    float *A, *A_log2, *state, *B, *C;  // dstate rows of LANES
    V steepest, bias, D;                // steepest: the largest |A_log2|

    static int64_t floats(const Scan &scan) { return 5 * (scan.s.dstate * LANES + 16); }
    void take(const Scan &scan, Scratch &scratch) {
        const int64_t states = scan.s.dstate * LANES;
        A = scratch.take(states), A_log2 = scratch.take(states), state = scratch.take(states);
        B = scratch.take(states), C = scratch.take(states);
    }
    void begin(const Scan &scan, const Block &block) {
        const ScanArgs &s = scan.s;
        b = block, bias = scan.parameter(s.delta_bias, b), D = scan.parameter(s.D, b), steepest = set(0.f);
        load_tile(scan.columns(s.A, s.dstate, b), b.channels, s.dstate, A);
        for (int64_t i = 0; i < s.dstate * LANES; i += LANES) {
            const V rate = load(A + i) * set(shared_math::LOG2_E);
            store(A_log2 + i, rate), store(state + i, set(0.f));
            steepest = max(abs(rate), steepest);
        }
        if (!s.B.varies) load_tile(scan.columns(s.B.data, s.dstate, b), b.channels, s.dstate, B);
        if (!s.C.varies) load_tile(scan.columns(s.C.data, s.dstate, b), b.channels, s.dstate, C);
    }
    // Whether no step of at most `largest` leaves the range of decay_within.
    bool within(V largest) const { return all_at_most(largest * steepest, EXP2_WITHIN); }
    // B and C of states [n, ...) from a tile's step on, given what the band has of them.
    States B_at(const Scan &scan, const States &B_of_band, int64_t step, int64_t n) const {
        return (scan.s.B.varies ? B_of_band : States{B, 0}).at(scan.s.B.varies, step, n);
    }
    States C_at(const Scan &scan, const States &C_of_band, int64_t step, int64_t n) const {
        return (scan.s.C.varies ? C_of_band : States{C, 0}).at(scan.s.C.varies, step, n);
    }
};

// The blocks that take tiles in turns, and the tiles of B and C for those that cannot be read where they lie.
struct Band {
    Channels channels[BAND];
    float *B, *C;
    int count;

    static int64_t floats(const Scan &scan, int64_t steps) {
        return BAND * Channels::floats(scan) + 2 * (steps * scan.pitch + 16);
    }
    Band(const Scan &scan, Scratch &scratch, int64_t steps) : count(0) {
        for (Channels &each : channels) each.take(scan, scratch);
        B = scratch.take(steps * scan.pitch), C = scratch.take(steps * scan.pitch);
    }
    // The blocks of as many tasks from `task` on as fit and have one (batch, group).
    void begin(const Scan &scan, int64_t task, int64_t end) {
        const int64_t left = scan.blocks_per_group - scan.block(task).group_block;
        count = int(std::min(std::min(end - task, left), int64_t(BAND)));
        for (int i = 0; i < count; ++i) channels[i].begin(scan, scan.block(task + i));
    }
    const Block &block() const { return channels[0].b; }
};

// body(kernel<N, whether B varies, whether C varies, within>) where there is a kernel for it: bounds are for the usual case.
#define SCAN_KERNEL(name, N, scan, within)                                                     \
    ((scan).s.B.varies && (scan).s.C.varies ? ((within) ? name<N, true, true, true> : name<N, true, true, false>) \
     : (scan).s.B.varies                    ? name<N, true, false, false>                      \
     : (scan).s.C.varies                    ? name<N, false, true, false>                      \
                                            : name<N, false, false, false>)

struct ForwardTiles {
    float *u, *dt, *input, *y, *z;

    ForwardTiles(Scratch &scratch, int64_t steps)
        : u(scratch.take(steps * LANES)),
          dt(scratch.take(steps * LANES)),
          input(scratch.take(steps * LANES)),
          y(scratch.take(steps * LANES)),
          z(scratch.take(steps * LANES)) {}
    static int64_t floats(int64_t steps) { return 5 * (steps * LANES + 16); }
};

struct ForwardStates {
    const Scan &scan;
    const Channels &channels;
    const ForwardTiles &tiles;
    States B, C;
    int64_t first, steps;  // of the tile
    bool within;

    template <int N> VEC void run(int64_t n) {
        const int64_t tile = first * LANES;
        SCAN_KERNEL(forward_states, N, scan, within)
        (steps, tiles.dt + tile, tiles.input + tile, channels.B_at(scan, B, first, n), channels.C_at(scan, C, first, n),
         channels.A_log2 + n * LANES, channels.state + n * LANES, tiles.y + tile);
    }
};

// Raw delta -> dt, dt * u, and D * u, to which y is added. Returns the largest |dt| of each channel.
template <bool SOFTPLUS>
VEC V step_sizes(const Channels &channels, const Steps &delta, const Steps &u, int64_t steps, const ForwardTiles &tiles) {
    const V bias = channels.bias, D = channels.D;
    V largest = set(0.f);
    for (int64_t t = 0; t < steps; ++t) {
        const V raw = delta[t] + bias, x = u[t], step = SOFTPLUS ? shared_math::softplus<Machine>(raw) : raw;
        largest = max(abs(step), largest);
        store(tiles.dt + t * LANES, step);
        store(tiles.input + t * LANES, step * x);
        store(tiles.y + t * LANES, D * x);
    }
    return largest;
}

// One block's tile of steps.
inline void forward_tile(const Scan &scan, const Channels &channels, const States &B, const States &C, int64_t start,
                         int64_t steps, const ForwardTiles &tiles) {
    const ScanArgs &s = scan.s;
    const Block &b = channels.b;
    const int64_t chunks = (s.seqlen + s.interval - 1) / s.interval, stride = s.states ? s.interval : steps;
    const Plane u_plane = scan.plane(s.u, b).at(0, start), delta_plane = scan.plane(s.delta, b).at(0, start);
    const Plane out_plane = scan.plane(s.out, b).at(0, start), z_plane = scan.plane(s.z, b).at(0, start);
    const Steps u = read_steps(u_plane, b.channels, steps, tiles.u);
    const Steps delta = read_steps(delta_plane, b.channels, steps, tiles.dt);
    const int64_t ahead = std::min(steps, s.seqlen - start - steps);
    prefetch(u_plane.at(0, steps), ahead), prefetch(delta_plane.at(0, steps), ahead), prefetch(out_plane.at(0, steps), ahead);
    if (s.z.data) prefetch(z_plane.at(0, steps), ahead);
    const bool within = channels.within(s.softplus ? step_sizes<true>(channels, delta, u, steps, tiles)
                                                   : step_sizes<false>(channels, delta, u, steps, tiles));
    for (int64_t first = 0; first < steps; first += stride) {
        const int64_t chunk = (start + first) / s.interval;
        for_state_blocks<FORWARD_STATES>(
            s.dstate, ForwardStates{scan, channels, tiles, B, C, first, std::min(stride, steps - first), within});
        if (s.states && chunk + 1 < chunks)
            for (int64_t n = 0; n < s.dstate; ++n)
                store_some(scan.saved(b, chunk, chunks) + n * s.dim, load(channels.state + n * LANES), b.channels);
    }
    // Adds what is there already, applies the gate and the share.
    const V share = set(s.share_value());
    const Steps z = s.z.data ? read_steps(z_plane, b.channels, steps, tiles.z) : Steps{tiles.z, LANES};
    const Steps before = s.accumulate ? read_steps(out_plane, b.channels, steps, tiles.u) : Steps{tiles.u, LANES};
    const Steps out = steps_in(out_plane, b.channels, tiles.y);
    for (int64_t t = 0; t < steps; ++t) {
        V y = load(tiles.y + t * LANES);
        if (s.accumulate) y = y + before[t];
        y = y * share;
        out.put(t, s.z.data ? y * shared_math::silu<Machine>(z[t]) : y);
    }
    write_steps(out_plane, b.channels, steps, tiles.y);
}

inline int scan_forward(const ScanArgs &s) {
    const Scan scan(s);
    const int64_t tasks = s.batch * scan.blocks;
    const int64_t tile_steps = s.states ? round_up(FORWARD_STEPS, s.interval) : FORWARD_STEPS;
    const int shares = parallel::shares_for(s.threads, tasks, s.batch * s.dim * s.seqlen * s.dstate / LANES);
    std::atomic<int> failures{0};
    parallel::run(shares, [&](int share) {
        Scratch scratch(Band::floats(scan, tile_steps) + ForwardTiles::floats(tile_steps));
        if (!scratch.ok()) return void(++failures);
        Band band(scan, scratch, tile_steps);
        const ForwardTiles tiles(scratch, tile_steps);
        const parallel::Range range = parallel::share_of(tasks, shares, share);
        for (int64_t task = range.begin; task < range.end; task += band.count) {
            band.begin(scan, task, range.end);
            const Plane B = scan.plane(s.B, band.block()), C = scan.plane(s.C, band.block());
            for (int64_t start = 0; start < s.seqlen; start += tile_steps) {
                const int64_t steps = std::min(tile_steps, s.seqlen - start);
                const States B_rows = read_states(scan, s.B, B.at(0, start), steps, band.B);
                const States C_rows = read_states(scan, s.C, C.at(0, start), steps, band.C);
                for (int i = 0; i < band.count; ++i)
                    forward_tile(scan, band.channels[i], B_rows, C_rows, start, steps, tiles);
            }
            for (int i = 0; s.last_state && i < band.count; ++i) {
                const Channels &each = band.channels[i];
                const int64_t last = s.last_state + each.b.batch * s.dim * s.dstate * 4;
                store_tile(scan.columns(last, s.dstate, each.b), each.b.channels, s.dstate, each.state);
            }
        }
    });
    return failures;
}

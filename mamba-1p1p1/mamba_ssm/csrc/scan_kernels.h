// The selective scan on CPU vectors: a lane is a channel, a vector's states stay in registers while it walks the sequence.
// Included inside an instruction set's namespace (see each_isa.h).
#ifndef SCAN_KERNELS_H
#define SCAN_KERNELS_H

#include "scan_math.h"
#include "tile.h"

// States that one walk over the steps holds, forward and backward.
constexpr int64_t FORWARD_STATES = 16;
constexpr int64_t BACKWARD_STATES = 4;
// Steps of a tile, of all blocks of a band: so few that a band's tiles stay in the second cache.
constexpr int64_t FORWARD_STEPS = 32;
// Neighbouring blocks of channels whose tiles of steps are read and written together, row by row, since memory that is
// walked in its own order is there when it is wanted. Where no row is, each channel has a line of its own and few are
// enough: what they share is B and C.
constexpr int BAND = 384 / LANES;
constexpr int BAND_WITHOUT_ROWS = 8;
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

VEC bool has_rows(const Signal &signal) { return !signal.data || (signal.dtype == FLOAT32 && signal.channel_stride == 1); }

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
    // Blocks to a band: `most` if all signals have rows.
    int band(int64_t most) const {
        bool rows = true;
        for (const Signal *signal : {&s.u, &s.delta, &s.z, &s.out, &s.dout, &s.du, &s.ddelta, &s.dz})
            rows &= has_rows(*signal);
        return int(std::max(std::min(most, rows ? int64_t(BAND) : int64_t(BAND_WITHOUT_ROWS)), int64_t(1)));
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

// A signal of some blocks over some steps, in memory or in a tile: a row of LANES channels for each block and step.
struct Rows {
    float *first;
    int64_t block_stride, step_stride;  // in floats

    VEC float *at(int block, int64_t t) const { return first + block * block_stride + t * step_stride; }
    VEC V get(int block, int64_t t) const { return load(at(block, t)); }
    VEC void put(int block, int64_t t, V x) const { store(at(block, t), x); }
    // Asks for what comes some rows later: processors look ahead by themselves, but not beyond a page.
    VEC void expect(int block, int64_t t) const { __builtin_prefetch(at(block, t + 4)); }
};
// A tile of scratch: its blocks' rows lie one after the other, and a cache line more keeps the blocks' beginnings from all
// falling to the same few places of the first cache.
VEC int64_t tile_floats(int64_t steps) { return round_up(steps * LANES, 16) + 16; }
VEC Rows tile_rows(float *tile, int64_t steps) { return {tile, tile_floats(steps), LANES}; }

// body(block, step) for all rows, in the order of memory.
template <class Body> VEC void each_row(int blocks, int64_t steps, Body body) {
    for (int64_t t = 0; t < steps; ++t)
        for (int i = 0; i < blocks; ++i) body(i, t);
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

// The decays of K states from A_log2 on. WITHIN: |dt * A_log2| is known to be at most EXP2_WITHIN.
template <bool WITHIN, int K> VEC void find_decays(V dt, const float *A_log2, V (&a)[K]) {
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) a[k] = dt * load(A_log2 + k * LANES);
    if constexpr (WITHIN) {
        exp2_within(a);
    } else {
#pragma GCC unroll 16
        for (int k = 0; k < K; ++k) a[k] = exp2(a[k]);
    }
}
// States whose decays are found together: more would not fit in the registers.
template <int N> constexpr int TOGETHER = N % 2 ? 1 : 2;

// dt, input (dt * u), y: rows of LANES channels, one after the other. Adds to y.
template <int N, bool VARIES_B, bool VARIES_C, bool WITHIN>
void forward_states(int64_t steps, const float *dt, const float *input, States B, States C, const float *A_log2,
                    float *state, float *y) {
    constexpr int K = TOGETHER<N>;
    V h[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) h[n] = load(state + n * LANES);
    for (int64_t t = 0; t < steps; ++t) {
        V step = load(dt + t * LANES), in = load(input + t * LANES), sum = load(y + t * LANES);
#pragma GCC unroll 16
        for (int n = 0; n < N; n += K) {
            V a[K];
            find_decays<WITHIN>(step, A_log2 + n * LANES, a);
#pragma GCC unroll 16
            for (int k = n; k < n + K; ++k) {
                h[k] = shared_math::next_state<Machine>(a[k - n], h[k], in, B.get<VARIES_B>(t, k));
                sum = fma(C.get<VARIES_C>(t, k), h[k], sum);
            }
        }
        store(y + t * LANES, sum);
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
    int most, count;
    int64_t ahead;  // steps from a tile to the next one: less than zero where they are walked backwards

    static int64_t floats(const Scan &scan, int64_t steps) {
        return BAND * Channels::floats(scan) + 2 * (steps * scan.pitch + 16);
    }
    // At most `most` blocks at a time.
    Band(const Scan &scan, Scratch &scratch, int64_t steps, int most, int64_t ahead) : most(most), count(0), ahead(ahead) {
        for (int i = 0; i < most; ++i) channels[i].take(scan, scratch);
        B = scratch.take(steps * scan.pitch), C = scratch.take(steps * scan.pitch);
    }
    // The blocks of as many tasks from `task` on as fit and have one (batch, group).
    void begin(const Scan &scan, int64_t task, int64_t end) {
        const int64_t left = scan.blocks_per_group - scan.block(task).group_block;
        count = int(std::min(std::min(end - task, left), int64_t(most)));
        for (int i = 0; i < count; ++i) channels[i].begin(scan, scan.block(task + i));
    }
    const Block &block() const { return channels[0].b; }

    // The signal's `steps` steps from `start` on where they lie in memory, if they have rows there, else in `tile`, which
    // is for read() to fill or for write() to empty.
    Rows rows(const Scan &scan, const Signal &signal, int64_t start, int64_t steps, float *tile) const {
        const Plane plane = scan.plane(signal, block()).at(0, start);
        if (!has_rows(signal) || channels[count - 1].b.channels < LANES) return tile_rows(tile, steps);
        return {reinterpret_cast<float *>(plane.data), LANES, plane.step_stride};
    }
    Rows read(const Scan &scan, const Signal &signal, int64_t start, int64_t steps, float *tile) const {
        const Rows rows = this->rows(scan, signal, start, steps, tile);
        for (int i = 0; rows.first == tile && i < count; ++i)
            load_tile(scan.plane(signal, channels[i].b).at(0, start), channels[i].b.channels, steps, rows.at(i, 0), LANES,
                      ahead);
        return rows;
    }
    void write(const Scan &scan, const Signal &signal, int64_t start, int64_t steps, const Rows &rows, float *tile) const {
        for (int i = 0; rows.first == tile && i < count; ++i)
            store_tile(scan.plane(signal, channels[i].b).at(0, start), channels[i].b.channels, steps, rows.at(i, 0), LANES,
                       ahead);
    }
};

// body(kernel<N, whether B varies, whether C varies, within>) where there is a kernel for it: bounds are for the usual case.
#define SCAN_KERNEL(name, N, scan, within)                                                     \
    ((scan).s.B.varies && (scan).s.C.varies ? ((within) ? name<N, true, true, true> : name<N, true, true, false>) \
     : (scan).s.B.varies                    ? name<N, true, false, false>                      \
     : (scan).s.C.varies                    ? name<N, false, true, false>                      \
                                            : name<N, false, false, false>)

struct ForwardTiles {
    float *u, *dt, *input, *y, *z;

    ForwardTiles(Scratch &scratch, int64_t steps, int blocks) {
        for (float **tile : {&u, &dt, &input, &y, &z}) *tile = scratch.take(blocks * tile_floats(steps));
    }
    static int64_t floats(int64_t steps, int blocks) { return 5 * (blocks * tile_floats(steps) + 16); }
};

struct ForwardStates {
    const Scan &scan;
    const Channels &channels;
    States B, C;
    int64_t first, steps;  // of the tile
    const float *dt, *input;
    float *y;
    bool within;

    template <int N> VEC void run(int64_t n) {
        SCAN_KERNEL(forward_states, N, scan, within)
        (steps, dt, input, channels.B_at(scan, B, first, n), channels.C_at(scan, C, first, n), channels.A_log2 + n * LANES,
         channels.state + n * LANES, y);
    }
};

// Raw delta -> dt, dt * u, and D * u, to which y is added; and the largest |dt| of each channel.
template <bool SOFTPLUS>
void step_sizes(const Band &band, Rows delta, Rows u, int64_t steps, Rows dt, Rows input, Rows y, V *largest) {
    for (int i = 0; i < band.count; ++i) largest[i] = set(0.f);
    each_row(band.count, steps, [&](int i, int64_t t) {
        const Channels &own = band.channels[i];
        delta.expect(i, t), u.expect(i, t);
        const V raw = delta.get(i, t) + own.bias, x = u.get(i, t);
        const V step = SOFTPLUS ? shared_math::softplus<Machine>(raw) : raw;
        largest[i] = max(abs(step), largest[i]);
        dt.put(i, t, step), input.put(i, t, step * x), y.put(i, t, own.D * x);
    });
}

// Adds what is there already, applies the gate and the share.
template <bool GATED>
void finish(int count, Rows y, Rows z, Rows before, bool add, V share, int64_t steps, Rows out) {
    each_row(count, steps, [&](int i, int64_t t) {
        out.expect(i, t);
        if (GATED) z.expect(i, t);
        V sum = y.get(i, t);
        if (add) sum = sum + before.get(i, t);
        sum = sum * share;
        out.put(i, t, GATED ? sum * shared_math::silu<Machine>(z.get(i, t)) : sum);
    });
}

// One tile of steps of a band.
inline void forward_tile(const Scan &scan, const Band &band, const States &B, const States &C, int64_t start, int64_t steps,
                         const ForwardTiles &tiles) {
    const ScanArgs &s = scan.s;
    const int64_t chunks = (s.seqlen + s.interval - 1) / s.interval, stride = s.states ? s.interval : steps;
    const Rows dt = tile_rows(tiles.dt, steps), input = tile_rows(tiles.input, steps), y = tile_rows(tiles.y, steps);
    const Rows u = band.read(scan, s.u, start, steps, tiles.u), delta = band.read(scan, s.delta, start, steps, tiles.dt);
    V largest[BAND];
    (s.softplus ? step_sizes<true> : step_sizes<false>)(band, delta, u, steps, dt, input, y, largest);
    for (int64_t first = 0; first < steps; first += stride) {
        const int64_t chunk = (start + first) / s.interval;
        for (int i = 0; i < band.count; ++i) {
            const Channels &own = band.channels[i];
            for_state_blocks<FORWARD_STATES>(s.dstate, ForwardStates{scan, own, B, C, first, std::min(stride, steps - first),
                                                                     dt.at(i, first), input.at(i, first), y.at(i, first),
                                                                     own.within(largest[i])});
        }
        for (int64_t n = 0; s.states && chunk + 1 < chunks && n < s.dstate; ++n)
            for (int i = 0; i < band.count; ++i) {
                const Channels &own = band.channels[i];
                store_some(scan.saved(own.b, chunk, chunks) + n * s.dim, load(own.state + n * LANES), own.b.channels);
            }
    }
    const Rows z = s.z.data ? band.read(scan, s.z, start, steps, tiles.z) : y;
    const Rows before = s.accumulate ? band.read(scan, s.out, start, steps, tiles.u) : y;
    const Rows out = band.rows(scan, s.out, start, steps, tiles.y);
    (s.z.data ? finish<true> : finish<false>)(band.count, y, z, before, s.accumulate, set(s.share_value()), steps, out);
    band.write(scan, s.out, start, steps, out, tiles.y);
}

inline int scan_forward(const ScanArgs &s) {
    const Scan scan(s);
    const int64_t tasks = s.batch * scan.blocks;
    const int64_t tile_steps = s.states ? round_up(FORWARD_STEPS, s.interval) : FORWARD_STEPS;
    const int most = scan.band(BAND * FORWARD_STEPS / tile_steps);
    const int shares = parallel::shares_for(s.threads, tasks, s.batch * s.dim * s.seqlen * s.dstate / LANES);
    std::atomic<int> failures{0};
    parallel::run(shares, [&](int share) {
        Scratch scratch(Band::floats(scan, tile_steps) + ForwardTiles::floats(tile_steps, most));
        if (!scratch.ok()) return void(++failures);
        Band band(scan, scratch, tile_steps, most, tile_steps);
        const ForwardTiles tiles(scratch, tile_steps, most);
        const parallel::Range range = parallel::share_of(tasks, shares, share);
        for (int64_t task = range.begin; task < range.end; task += band.count) {
            band.begin(scan, task, range.end);
            const Plane B = scan.plane(s.B, band.block()), C = scan.plane(s.C, band.block());
            for (int64_t start = 0; start < s.seqlen; start += tile_steps) {
                const int64_t steps = std::min(tile_steps, s.seqlen - start);
                const States B_rows = read_states(scan, s.B, B.at(0, start), steps, band.B);
                const States C_rows = read_states(scan, s.C, C.at(0, start), steps, band.C);
                forward_tile(scan, band, B_rows, C_rows, start, steps, tiles);
            }
            for (int i = 0; s.last_state && i < band.count; ++i) {
                const Channels &each = band.channels[i];
                const int64_t last = s.last_state + each.b.batch * s.dim * s.dstate * 4;
                store_tile(scan.columns(last, s.dstate, each.b), each.b.channels, s.dstate, each.state);
            }
        }
    });
    return failures ? 1 : 0;
}

#endif  // SCAN_KERNELS_H

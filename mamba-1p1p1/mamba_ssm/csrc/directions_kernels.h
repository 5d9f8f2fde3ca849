// A mixer between its projections on CPU vectors: convolution, x_proj, dt_proj and scan of one image after the other, so
// that what one of them writes is still in the cache when the next one reads it; and their gradients likewise. Included
// inside an instruction set's namespace (see each_isa.h).
#include "scan_cpu_kernels.h"
#include "gemm_kernels.h"
namespace conv {
#include "conv1d_kernels.h"
}  // namespace conv

inline int64_t at(const void *data) { return reinterpret_cast<int64_t>(data); }
inline float *floats(int64_t data) { return reinterpret_cast<float *>(data); }
inline int64_t bytes(int64_t count) { return count * int64_t(sizeof(float)); }

// log(-A) -> A.
inline void rates(const float *logs, int64_t count, float *A) {
    for (int64_t i = 0; i < count; i += LANES) {
        const int some = int(std::min<int64_t>(LANES, count - i));
        store_some(A + i, set(0.f) - shared_math::exp<Machine>(load_some(logs + i, some)), some);
    }
}

// to (rows, columns) (+)= a (rows, depth) times b (depth, columns).
inline int multiply(int64_t rows, int64_t columns, int64_t depth, int64_t threads, Factor a, Factor b, float *to,
                    int64_t to_stride, bool accumulate) {
    GemmArgs args{};
    args.rows = rows, args.columns = columns, args.depth = depth, args.threads = threads, args.accumulate = accumulate;
    args.a = a, args.b = b, args.c = at(to), args.c_stride = to_stride;
    return gemm(args);
}

// Each token of (seqlen, dim) times its number.
inline void multiply_tokens(int64_t seqlen, int64_t dim, const float *from, int64_t stride, const float *mask, float *to) {
    for (int64_t t = 0; t < seqlen; ++t)
        for (int64_t c = 0; c < dim; c += LANES) {
            const int some = int(std::min<int64_t>(LANES, dim - c));
            store_some(to + t * dim + c, load_some(from + t * stride + c, some) * set(mask[t]), some);
        }
}

// One direction of one image: where its parts lie, and what the kernels are told of them.
struct DirectionOfImage {
    const DirectionsArgs &s;
    const DirectionWeights &own;
    bool first, last;
    int64_t image, threads, narrow;
    float *x_dbl;
    const float *A;

    // `A` holds the rates of all directions where the weights hold their logarithms.
    DirectionOfImage(const DirectionsArgs &s, int64_t number, int64_t image, int64_t threads, const float *A)
        : s(s), own(number ? s.second : s.first), first(number == 0), last(number + 1 == s.directions), image(image),
          threads(threads), narrow(s.rank + 2 * s.dstate),
          x_dbl(floats(own.x_dbl) + image * s.seqlen * narrow),
          A(s.log_decay ? A + number * s.dim * s.dstate : floats(own.A)) {}

    // This image's (seqlen, dim), or one that is contiguous; as both packages' structs have it.
    template <class Struct> Struct rows(const Tokens &of) const {
        return {of.data ? of.data + bytes(image * of.batch_stride) : 0, FLOAT32, 0, 1, of.token_stride};
    }
    template <class Struct> Struct rows(const float *data) const { return {at(data), FLOAT32, 0, 1, s.dim}; }
    Matrix columns(float *rows, int64_t skipped) const { return {1, at(rows + skipped), FLOAT32, 0, 0, 1, narrow}; }

    ConvArgs conv_args() const {
        ConvArgs args{};
        args.batch = 1, args.dim = s.dim, args.seqlen = s.seqlen, args.width = s.width, args.silu = 1;
        args.reverse = own.reverse, args.threads = threads, args.channel_last = 1;
        args.x = rows<ConvSignal>(own.x), args.weight = own.conv, args.bias = own.conv_bias;
        return args;
    }
    ScanArgs scan_args(const float *u, const float *delta) const {
        const int64_t chunks = (s.seqlen + s.interval - 1) / s.interval - 1;
        ScanArgs args{};
        args.batch = 1, args.dim = s.dim, args.seqlen = s.seqlen, args.dstate = s.dstate, args.groups = 1;
        args.softplus = 1, args.reverse = own.reverse, args.threads = threads, args.interval = s.interval;
        args.accumulate = !first, args.share = s.share;
        args.u = rows<Signal>(u), args.delta = rows<Signal>(delta), args.z = rows<Signal>(s.z);
        args.B = columns(x_dbl, s.rank), args.C = columns(x_dbl, s.rank + s.dstate);
        args.A = at(A), args.D = own.D, args.delta_bias = own.dt_bias;
        if (own.states) args.states = own.states + bytes(image * chunks * s.dstate * s.dim);
        return args;
    }
    const float *mask() const { return floats(s.mask) + image * s.seqlen; }
    // What is convolved: x, or with a mask `masked`, to which it is written.
    ConvSignal find_x(float *masked) const {
        const ConvSignal x = rows<ConvSignal>(own.x);
        if (!s.mask) return x;
        multiply_tokens(s.seqlen, s.dim, floats(x.data), x.step_stride, mask(), masked);
        return rows<ConvSignal>(masked);
    }
    // What backward computes anew, too: what is scanned, in `memory` if it is not there already; with a mask, also what is
    // convolved, in `masked`, and what comes of it, in `raw`, which may be `memory`. Null where there was no memory.
    const float *find_u(float *memory, float *raw, float *masked) const {
        if (!own.conv) return floats(rows<Signal>(own.x).data);
        ConvArgs args = conv_args();
        args.x = find_x(masked), args.out = rows<ConvSignal>(s.mask ? raw : memory);
        if (conv::convolution(args)) return nullptr;
        if (s.mask) multiply_tokens(s.seqlen, s.dim, raw, s.dim, mask(), memory);
        return memory;
    }
};

inline int shares_of_images(const DirectionsArgs &s) {
    return images::shares_for(s.batch, s.threads, s.batch * s.seqlen * s.dim * s.dstate / LANES);
}

// The rates of all directions where the weights hold their logarithms.
struct Rates {
    const memory::Buffer buffer;
    float *const A;

    explicit Rates(const DirectionsArgs &s)
        : buffer(s.log_decay ? bytes(s.directions * s.dim * s.dstate) : 1), A(static_cast<float *>(buffer.data())) {
        for (int64_t number = 0; A && s.log_decay && number < s.directions; ++number)
            rates(floats(number ? s.second.A : s.first.A), s.dim * s.dstate, A + number * s.dim * s.dstate);
    }
};

// One direction's projections, packed for all images.
struct PackedDirection {
    PackedWeight x_proj, dt_proj;

    PackedDirection(const DirectionsArgs &s, int64_t number) : PackedDirection(s, number ? s.second : s.first) {}
    bool ok() const { return x_proj.ok() && dt_proj.ok(); }

  private:
    PackedDirection(const DirectionsArgs &s, const DirectionWeights &own)
        : x_proj(own.x_proj, 0, s.rank + 2 * s.dstate, s.dim, s.threads), dt_proj(own.dt_proj, 0, s.dim, s.rank, s.threads) {}
};

// One direction of one image, into (or added to) its out (seqlen, dim); `memory` is for twice as much.
inline int direction_forward(const DirectionOfImage &here, const PackedDirection &packed, float *memory, float *out) {
    const DirectionsArgs &s = here.s;
    float *const delta = memory + s.seqlen * s.dim;
    const float *const u = here.find_u(memory, memory, delta);  // delta's place is free until then
    if (!u) return 1;
    packed.x_proj.multiply(s.seqlen, here.threads, u, s.dim, here.x_dbl, here.narrow);
    packed.dt_proj.multiply(s.seqlen, here.threads, here.x_dbl, here.narrow, delta, s.dim);
    ScanArgs scan = here.scan_args(u, delta);
    if (!here.last) {  // the last one's gate and share are those of the sum
        const double one = 1;
        std::memcpy(&scan.share, &one, sizeof one);
        scan.z = Signal{};
    }
    scan.out = here.rows<Signal>(out);
    return scan_forward(scan);
}

// One where there was no memory, else zero.
inline int directions_forward(const DirectionsArgs &s) {
    const Rates rates(s);
    const PackedDirection packed[] = {{s, 0}, {s, s.directions - 1}};
    if (!rates.A || !packed[0].ok() || !packed[1].ok()) return 1;
    const int64_t size = s.seqlen * s.dim;
    return images::each(s.batch, s.threads, shares_of_images(s), [&](int64_t begin, int64_t end, int64_t threads, int) {
        const memory::Buffer buffer(bytes(2 * size));
        float *const memory = static_cast<float *>(buffer.data());
        if (!memory) return 1;
        for (int64_t image = begin; image < end; ++image)
            for (int64_t number = 0; number < s.directions; ++number) {
                const DirectionOfImage here(s, number, image, threads, rates.A);
                if (direction_forward(here, packed[number], memory, floats(s.out) + image * size)) return 1;
            }
        return 0;
    });
}

// body(how many vectors together, where they begin, how many lanes of each) for a row of `dim` numbers.
template <class Body> VEC void each_vector(int64_t dim, Body body) {
    int64_t c = 0;
    for (; c + 4 * LANES <= dim; c += 4 * LANES) body(std::integral_constant<int, 4>(), c, LANES);
    for (; c < dim; c += LANES) body(std::integral_constant<int, 1>(), c, int(std::min<int64_t>(LANES, dim - c)));
}

// One image's y (seqlen, dim) times silu(z), contiguous.
inline void gate(int64_t seqlen, int64_t dim, const float *y, const float *z, int64_t z_stride, float *gated) {
    for (int64_t t = 0; t < seqlen; ++t, y += dim, z += z_stride, gated += dim)
        each_vector(dim, [&](auto count, int64_t c, int some) __attribute__((always_inline)) {
            constexpr int K = decltype(count)::value;
            const Vectors<K> open = shared_math::silu<MachineOf<K>>(load_some<K>(z + c, some));
            store_some(gated + c, load_some<K>(y + c, some) * open, some);
        });
}

// And backwards: `grad`, of the gated, becomes that of y. Beside dz, the gated is written anew.
inline void gate_backward(int64_t seqlen, int64_t dim, const float *y, const float *z, int64_t z_stride, float *grad, float *dz,
                          int64_t dz_stride, float *gated) {
    for (int64_t t = 0; t < seqlen; ++t, y += dim, z += z_stride, grad += dim, dz += dz_stride, gated += dim)
        each_vector(dim, [&](auto count, int64_t c, int some) __attribute__((always_inline)) {
            constexpr int K = decltype(count)::value;
            // both were kept since the forward, in main memory, which wants to be asked early
            for (int64_t i = c; i < c + K * LANES; i += 16)
                __builtin_prefetch(y + 8 * dim + i), __builtin_prefetch(z + 8 * z_stride + i);
            const Vectors<K> of_z = load_some<K>(z + c, some), of_y = load_some<K>(y + c, some);
            const Vectors<K> of_grad = load_some<K>(grad + c, some), opening = shared_math::sigmoid<MachineOf<K>>(of_z);
            const Vectors<K> open = of_z * opening;
            store_some(gated + c, of_y * open, some), store_some(grad + c, of_grad * open, some);
            store_some(dz + c, of_grad * of_y * shared_math::silu_grad<MachineOf<K>>(of_z, opening), some);
        });
}

// The whole mixer, one image after the other, likewise. y is kept as it is before its gate: with it the gate's gradients are
// found once, not by the scan of each direction, which would have to find its own part of y anew.
inline int mixer_forward(const MixerArgs &s) {
    const DirectionsArgs &all = s.between;
    const Rates rates(all);
    const PackedWeight in_proj(s.in_proj.weight, s.in_proj.bias, 2 * all.dim, s.width, all.threads);
    const PackedWeight out_proj(s.out_proj.weight, s.out_proj.bias, s.width, all.dim, all.threads);
    const PackedDirection packed[] = {{all, 0}, {all, all.directions - 1}};
    if (!rates.A || !in_proj.ok() || !out_proj.ok() || !packed[0].ok() || !packed[1].ok()) return 1;
    const int64_t tokens = all.seqlen, size = tokens * all.dim;
    return images::each(all.batch, all.threads, shares_of_images(all), [&](int64_t begin, int64_t end, int64_t threads, int) {
        const bool kept = s.xz != 0;
        const memory::Buffer buffer(bytes(kept ? 2 * size : 5 * size + tokens * (all.rank + 2 * all.dstate)));
        if (!buffer.data()) return 1;
        float *const memory = static_cast<float *>(buffer.data()), *const free = memory + 2 * size;
        DirectionsArgs one = all;
        if (!kept) one.first.x_dbl = one.second.x_dbl = at(free + 3 * size);
        for (int64_t image = begin; image < end; ++image) {
            const float *const x = floats(s.x.data) + image * s.x.batch_stride;
            float *const xz = kept ? floats(s.xz) + image * 2 * size : free;
            float *const y = kept ? floats(s.y) + image * size : free + 2 * size;
            in_proj.multiply(tokens, threads, x, s.x.token_stride, xz, 2 * all.dim);
            one.first.x = one.second.x = {at(xz), 0, 2 * all.dim};
            if (!kept) one.z = {at(xz + all.dim), 0, 2 * all.dim};
            for (int64_t number = 0; number < one.directions; ++number) {
                const DirectionOfImage here(one, number, kept ? image : 0, threads, rates.A);
                if (direction_forward(here, packed[number], memory, y)) return 1;
            }
            if (kept) gate(tokens, all.dim, y, xz + all.dim, 2 * all.dim, memory);
            const float *const gated = kept ? memory : y;
            out_proj.multiply(tokens, threads, gated, all.dim, floats(s.out) + image * tokens * s.width, s.width);
        }
        return 0;
    });
}

// A direction's gradients, one after the other.
struct GradientSums {
    float *conv, *conv_bias, *x_proj, *dt_proj, *dt_bias, *A, *D;

    GradientSums(const DirectionsArgs &s, float *memory)
        : conv(memory), conv_bias(conv + s.dim * s.width), x_proj(conv_bias + s.dim),
          dt_proj(x_proj + (s.rank + 2 * s.dstate) * s.dim), dt_bias(dt_proj + s.rank * s.dim), A(dt_bias + s.dim),
          D(A + s.dim * s.dstate) {}
    static int64_t size(const DirectionsArgs &s) {
        return s.dim * (s.width + 1 + (s.rank + 2 * s.dstate) + s.rank + 1 + s.dstate + 1);
    }
};

inline void add(const float *from, int64_t count, float *to) {
    for (int64_t i = 0; i < count; i += LANES) {
        const int some = int(std::min<int64_t>(LANES, count - i));
        store_some(to + i, load_some(to + i, some) + load_some(from + i, some), some);
    }
}

// What the gradients of one direction of one image need: (seqlen, dim) each, then (seqlen, narrow). Those behind that are for
// masks: x times the mask, u before it is multiplied, and the gradient of the former.
struct GradientRows {
    float *u, *delta, *du, *ddelta, *dx_dbl, *masked, *raw, *dx;

    GradientRows(const DirectionsArgs &s, float *memory)
        : u(memory), delta(u + s.seqlen * s.dim), du(delta + s.seqlen * s.dim), ddelta(du + s.seqlen * s.dim),
          dx_dbl(ddelta + s.seqlen * s.dim), masked(dx_dbl + s.seqlen * (s.rank + 2 * s.dstate)),
          raw(masked + s.seqlen * s.dim), dx(raw + s.seqlen * s.dim) {}
    static int64_t size(const DirectionsArgs &s) {
        return s.seqlen * ((s.mask ? 7 : 4) * s.dim + s.rank + 2 * s.dstate);
    }
};

// Backwards through x * mask, of one image (seqlen, dim): adds each token's sum of `grad` * x to dmask (seqlen,), and writes
// `grad` * mask to dx, or adds it there.
inline void unmask(const DirectionOfImage &here, const float *grad, const float *x, int64_t stride, float *dmask, float *dx,
                   int64_t dx_stride, bool accumulate) {
    const DirectionsArgs &s = here.s;
    for (int64_t t = 0; t < s.seqlen; ++t) {
        V along = set(0.f);
        for (int64_t c = 0; c < s.dim; c += LANES) {
            const int some = int(std::min<int64_t>(LANES, s.dim - c));
            const V of = load_some(grad + t * s.dim + c, some);
            along = fma(of, load_some(x + t * stride + c, some), along);
            float *const to = dx + t * dx_stride + c;
            store_some(to, fma(of, set(here.mask()[t]), accumulate ? load_some(to, some) : set(0.f)), some);
        }
        dmask[t] += sum(along);
    }
}

// One direction's projections, packed for the gradients of all images: forwards, and across, for what goes into them.
struct BackwardFactors {
    PackedWeight dt_proj;
    PackedFactor dt_proj_across, x_proj_across;

    BackwardFactors(const DirectionsArgs &s, int64_t number) : BackwardFactors(s, number ? s.second : s.first) {}
    bool ok() const { return dt_proj.ok() && dt_proj_across.ok() && x_proj_across.ok(); }

  private:
    BackwardFactors(const DirectionsArgs &s, const DirectionWeights &own)
        : dt_proj(own.dt_proj, 0, s.dim, s.rank, s.threads),
          dt_proj_across({own.dt_proj, s.rank, 1}, 0, s.rank, s.dim, s.threads),
          x_proj_across({own.x_proj, s.dim, 1}, 0, s.dim, s.rank + 2 * s.dstate, s.threads) {}
};

// Adds to `sums`; `found` is for what the kernels do not add to what is there.
inline int direction_backward(const DirectionsBackwardArgs &args, const DirectionOfImage &here, const BackwardFactors &packed,
                              const DirectionGradients &to, const GradientRows &rows, const GradientSums &sums,
                              const GradientSums &found) {
    const DirectionsArgs &s = args.forward;
    const int64_t narrow = here.narrow, threads = here.threads;
    const float *const u = here.find_u(rows.u, rows.raw, rows.masked);
    if (!u) return 1;
    packed.dt_proj.multiply(s.seqlen, threads, here.x_dbl, narrow, rows.delta, s.dim);
    // without a convolution this is the gradient of x
    float *const du = here.own.conv ? rows.du : floats(here.rows<Signal>(to.x).data);

    ScanArgs scan = here.scan_args(u, rows.delta);
    scan.dout = here.rows<Signal>(args.dout), scan.dz = here.rows<Signal>(args.dz);
    scan.du = here.rows<Signal>(du), scan.ddelta = here.rows<Signal>(rows.ddelta);
    scan.dB = here.columns(rows.dx_dbl, s.rank), scan.dC = here.columns(rows.dx_dbl, s.rank + s.dstate);
    scan.dA = at(found.A), scan.dD = at(found.D), scan.ddelta_bias = at(found.dt_bias);
    if (scan_backward(scan)) return 1;
    add(found.A, s.dim * s.dstate, sums.A);
    if (here.own.D) add(found.D, s.dim, sums.D);
    if (here.own.dt_bias) add(found.dt_bias, s.dim, sums.dt_bias);

    const Factor dt_across{at(here.x_dbl), 1, narrow}, narrow_across{at(rows.dx_dbl), 1, narrow};
    packed.dt_proj_across.multiply(s.seqlen, threads, rows.ddelta, s.dim, rows.dx_dbl, narrow);
    if (multiply(s.rank, s.dim, s.seqlen, threads, dt_across, {at(rows.ddelta), s.dim, 1}, sums.dt_proj, s.dim, true))
        return 1;
    if (multiply(narrow, s.dim, s.seqlen, threads, narrow_across, {at(u), s.dim, 1}, sums.x_proj, s.dim, true))
        return 1;
    packed.x_proj_across.multiply(s.seqlen, threads, rows.dx_dbl, narrow, du, s.dim, true);
    if (!here.own.conv) return 0;

    float *const dmask = s.mask ? floats(args.dmask) + here.image * s.seqlen : nullptr;
    if (dmask) unmask(here, du, rows.raw, s.dim, dmask, du, s.dim, false);
    ConvArgs convolved = here.conv_args();
    convolved.accumulate = !here.first && !dmask;
    if (dmask) convolved.x = here.rows<ConvSignal>(rows.masked);
    const ConvSignal x = here.rows<ConvSignal>(here.own.x), dx = here.rows<ConvSignal>(to.x);
    convolved.dout = here.rows<ConvSignal>(du), convolved.dx = dmask ? here.rows<ConvSignal>(rows.dx) : dx;
    convolved.dweight = at(found.conv), convolved.dbias = here.own.conv_bias ? at(found.conv_bias) : 0;
    if (conv::convolution(convolved)) return 1;
    add(found.conv, s.dim * s.width, sums.conv);
    if (here.own.conv_bias) add(found.conv_bias, s.dim, sums.conv_bias);
    if (dmask) unmask(here, rows.dx, floats(x.data), x.step_stride, dmask, floats(dx.data), dx.step_stride, !here.first);
    return 0;
}

// The sums of all shares, in their order, to where they are wanted.
inline void write_gradients(const DirectionsArgs &s, const DirectionGradients &to, const float *A, const GradientSums &sums) {
    const auto write = [](int64_t where, const float *from, int64_t count) {
        if (where) std::memcpy(floats(where), from, size_t(bytes(count)));
    };
    write(to.conv, sums.conv, s.dim * s.width), write(to.conv_bias, sums.conv_bias, s.dim);
    write(to.x_proj, sums.x_proj, (s.rank + 2 * s.dstate) * s.dim), write(to.dt_proj, sums.dt_proj, s.rank * s.dim);
    write(to.dt_bias, sums.dt_bias, s.dim), write(to.D, sums.D, s.dim);
    for (int64_t i = 0; i < s.dim * s.dstate; ++i) floats(to.A)[i] = s.log_decay ? sums.A[i] * A[i] : sums.A[i];
}

// The gradients of a mixer's outer projections, as one share of the images adds them up; 0 where they are not wanted.
struct EndSums {
    Linear in_proj, out_proj;
    bool fresh;  // nothing is there yet

    static int64_t size(const MixerBackwardArgs &m) { return (m.width + 1) * 3 * m.between.forward.dim + m.width; }
    // Those of a share that are not where they are wanted.
    EndSums(const MixerBackwardArgs &m, float *memory) : in_proj(), out_proj(), fresh(true) {
        const int64_t dim = m.between.forward.dim;
        if (m.din_proj.weight) in_proj.weight = at(memory);
        if (m.dout_proj.weight) out_proj.weight = at(memory + 2 * dim * m.width);
        if (m.din_proj.bias) in_proj.bias = at(memory + 3 * dim * m.width);
        if (m.dout_proj.bias) out_proj.bias = at(memory + 3 * dim * m.width + 2 * dim);
    }
    EndSums(const MixerBackwardArgs &m, bool fresh) : in_proj(m.din_proj), out_proj(m.dout_proj), fresh(fresh) {}

    // Of one image: y (tokens, columns) = x (tokens, depth) times the weight has the gradient `dy`.
    int add_to(const Linear &to, int64_t tokens, int64_t threads, const float *dy, int64_t dy_stride, int64_t columns,
               const float *x, int64_t x_stride, int64_t depth) const {
        if (to.bias && fresh) std::memset(floats(to.bias), 0, size_t(bytes(columns)));
        for (int64_t t = 0; to.bias && t < tokens; ++t) add(dy + t * dy_stride, columns, floats(to.bias));
        return to.weight && multiply(columns, depth, tokens, threads, {at(dy), 1, dy_stride}, {at(x), x_stride, 1},
                                     floats(to.weight), depth, !fresh);
    }
    // These, added to where they are wanted.
    void add_all(const MixerBackwardArgs &m) const {
        const int64_t dim = m.between.forward.dim;
        const auto add_one = [](int64_t from, int64_t count, int64_t to) {
            if (to) add(floats(from), count, floats(to));
        };
        add_one(in_proj.weight, 2 * dim * m.width, m.din_proj.weight), add_one(in_proj.bias, 2 * dim, m.din_proj.bias);
        add_one(out_proj.weight, dim * m.width, m.dout_proj.weight), add_one(out_proj.bias, m.width, m.dout_proj.bias);
    }
};

// A mixer's outer projections, packed for the gradients of what goes into them, and the images on their ways through.
struct Ends {
    const MixerBackwardArgs &m;
    const int64_t dim, tokens, size;
    PackedFactor in_proj, out_proj;

    explicit Ends(const MixerBackwardArgs &m)
        : m(m), dim(m.between.forward.dim), tokens(m.between.forward.seqlen), size(tokens * dim),
          in_proj({m.in_proj, m.width, 1}, 0, m.width, 2 * dim, m.between.forward.threads),
          out_proj({m.out_proj, dim, 1}, 0, dim, m.width, m.between.forward.threads) {}
    bool ok() const { return in_proj.ok() && out_proj.ok(); }
    static int64_t floats_of_image(const MixerBackwardArgs &m) {
        return m.width ? 4 * m.between.forward.seqlen * m.between.forward.dim : 0;
    }

    // Backwards through out_proj and the gate, and where `one` finds and writes its tokens: in `memory`.
    int begin(int64_t image, int64_t threads, float *memory, const EndSums &sums, DirectionsBackwardArgs &one) const {
        const float *const dout = floats(m.dout.data) + image * m.dout.batch_stride, *const y = floats(m.y) + image * size;
        const float *const xz = floats(m.xz) + image * 2 * size;
        float *const dxz = memory, *const dy = dxz + 2 * size, *const gated = dy + size;
        out_proj.multiply(tokens, threads, dout, m.dout.token_stride, dy, dim);
        gate_backward(tokens, dim, y, xz + dim, 2 * dim, dy, dxz + dim, 2 * dim, gated);
        one.forward.first.x = one.forward.second.x = {at(xz), 0, 2 * dim};
        one.first.x = one.second.x = {at(dxz), 0, 2 * dim}, one.dout = {at(dy), 0, dim};
        return sums.add_to(sums.out_proj, tokens, threads, dout, m.dout.token_stride, m.width, gated, dim, dim);
    }
    // Backwards through in_proj.
    int end(int64_t image, int64_t threads, const float *memory, const EndSums &sums) const {
        const float *const x = floats(m.x.data) + image * m.x.batch_stride, *const dxz = memory;
        if (m.dx) in_proj.multiply(tokens, threads, dxz, 2 * dim, floats(m.dx) + image * tokens * m.width, m.width);
        return sums.add_to(sums.in_proj, tokens, threads, dxz, 2 * dim, 2 * dim, x, m.x.token_stride, m.width);
    }
};

// One where there was no memory, else zero.
inline int mixer_backward(const MixerBackwardArgs &m) {
    const DirectionsArgs &s = m.between.forward;
    const Rates rates(s);
    const BackwardFactors packed[] = {{s, 0}, {s, s.directions - 1}};
    std::optional<Ends> ends;
    if (m.width) ends.emplace(m);
    const int shares = shares_of_images(s);
    const int64_t sums = GradientSums::size(s), of_share = (s.directions + 1) * sums;
    const int64_t of_ends = m.width ? EndSums::size(m) : 0;
    const memory::Buffer others(bytes((shares - 1) * of_ends + 1));  // share 0 writes where its sums are wanted
    const auto of_other = [&](int share) { return static_cast<float *>(others.data()) + (share - 1) * of_ends; };
    float *const all = static_cast<float *>(std::calloc(size_t(shares * of_share), sizeof(float)));
    if (!all || !rates.A || !others.data() || !packed[0].ok() || !packed[1].ok() || (ends && !ends->ok()))
        return std::free(all), 1;
    const int failed = images::each(s.batch, s.threads, shares, [&](int64_t begin, int64_t end, int64_t threads, int share) {
        const memory::Buffer buffer(bytes(GradientRows::size(s) + Ends::floats_of_image(m)));
        if (!buffer.data()) return 1;
        float *const memory = static_cast<float *>(buffer.data());
        const GradientRows rows(s, memory + Ends::floats_of_image(m));
        float *const own = all + share * of_share;
        const GradientSums found(s, own + s.directions * sums);
        EndSums of_this = share ? EndSums(m, of_other(share)) : EndSums(m, begin == 0);
        DirectionsBackwardArgs one = m.between;
        for (int64_t image = begin; image < end; ++image, of_this.fresh = false) {
            if (ends && ends->begin(image, threads, memory, of_this, one)) return 1;
            for (int64_t number = 0; number < s.directions; ++number) {
                const DirectionOfImage here(one.forward, number, image, threads, rates.A);
                const DirectionGradients &to = number ? one.second : one.first;
                if (direction_backward(one, here, packed[number], to, rows, GradientSums(s, own + number * sums), found))
                    return 1;
            }
            if (ends && ends->end(image, threads, memory, of_this)) return 1;
        }
        return 0;
    });
    for (int share = 1; share < shares; ++share) {
        add(all + share * of_share, s.directions * sums, all);
        if (ends) EndSums(m, of_other(share)).add_all(m);
    }
    for (int64_t number = 0; number < s.directions; ++number)
        write_gradients(s, number ? m.between.second : m.between.first,
                        rates.A + (s.log_decay ? number * s.dim * s.dstate : 0), GradientSums(s, all + number * sums));
    std::free(all);
    return failed;
}

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
    double gate = 1;  // what the share is multiplied with, besides

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
        args.accumulate = !first;
        double share;
        std::memcpy(&share, &s.share, sizeof share);
        share *= gate;
        std::memcpy(&args.share, &share, sizeof share);
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
    write(to.x_proj, sums.x_proj, (s.rank + 2 * s.dstate) * s.dim);
    for (int64_t i = 0; i < s.dim * s.rank; ++i) floats(to.dt_proj)[i] = sums.dt_proj[i % s.rank * s.dim + i / s.rank];
    write(to.dt_bias, sums.dt_bias, s.dim), write(to.D, sums.D, s.dim);
    for (int64_t i = 0; i < s.dim * s.dstate; ++i) floats(to.A)[i] = s.log_decay ? sums.A[i] * A[i] : sums.A[i];
}

// What there is around the directions of each image, outside of `backward_of_images`: nothing.
struct NoOutside {
    struct Share {
        Share(const NoOutside &, float *, float *, bool) {}
        bool fresh;
    };
    int64_t image_floats() const { return 0; }
    int64_t share_floats() const { return 0; }
    int64_t other_floats() const { return 0; }
    bool ok() const { return true; }
    int begin(int64_t, int64_t, float *, Share &, DirectionsBackwardArgs &) const { return 0; }
    int end(int64_t, int64_t, float *, Share &) const { return 0; }
    void add_to_first(const Share &, const Share &) const {}
    void write(const Share &) const {}
};

// The gradients of the directions of one image after the other, and of what is outside of them, in between `begin` and `end`:
// that has `image_floats` to work in, and as many others as `share_floats`, zeros, for sums over the images of a share. A
// share is given `other_floats` more, not zeros, but not the first one, which writes where its sums are wanted. One where
// there was no memory, else zero.
template <class Outside> int backward_of_images(const DirectionsBackwardArgs &args, int shares, const Outside &outside) {
    const DirectionsArgs &s = args.forward;
    const Rates rates(s);
    const BackwardFactors packed[] = {{s, 0}, {s, s.directions - 1}};
    const int64_t sums = GradientSums::size(s), of_directions = (s.directions + 1) * sums;
    const int64_t of_share = of_directions + outside.share_floats(), others = outside.other_floats();
    const memory::Buffer buffer_of_others(bytes((shares - 1) * others + 1));
    float *const all = static_cast<float *>(std::calloc(size_t(shares * of_share), sizeof(float)));
    if (!all || !rates.A || !buffer_of_others.data() || !packed[0].ok() || !packed[1].ok() || !outside.ok())
        return std::free(all), 1;
    const auto share_of = [&](int share, bool fresh) {
        float *const other = share ? static_cast<float *>(buffer_of_others.data()) + (share - 1) * others : nullptr;
        return typename Outside::Share(outside, all + share * of_share + of_directions, other, fresh);
    };
    const int failed = images::each(s.batch, s.threads, shares, [&](int64_t begin, int64_t end, int64_t threads, int share) {
        const memory::Buffer buffer(bytes(GradientRows::size(s) + outside.image_floats()));
        if (!buffer.data()) return 1;
        float *const memory = static_cast<float *>(buffer.data()), *const own = all + share * of_share;
        const GradientRows rows(s, memory + outside.image_floats());
        const GradientSums found(s, own + s.directions * sums);
        typename Outside::Share of_this = share_of(share, share || begin == 0);
        DirectionsBackwardArgs one = args;
        for (int64_t image = begin; image < end; ++image, of_this.fresh = false) {
            if (outside.begin(image, threads, memory, of_this, one)) return 1;
            for (int64_t number = 0; number < s.directions; ++number) {
                DirectionOfImage here(one.forward, number, image, threads, rates.A);
                if (args.gates) here.gate = floats(args.gates)[image * s.directions + number];
                const DirectionGradients &to = number ? one.second : one.first;
                if (direction_backward(one, here, packed[number], to, rows, GradientSums(s, own + number * sums), found))
                    return 1;
            }
            if (outside.end(image, threads, memory, of_this)) return 1;
        }
        return 0;
    });
    for (int share = 1; share < shares; ++share) {
        add(all + share * of_share, s.directions * sums, all);
        outside.add_to_first(share_of(0, false), share_of(share, false));
    }
    for (int64_t number = 0; number < s.directions; ++number)
        write_gradients(s, number ? args.second : args.first, rates.A + (s.log_decay ? number * s.dim * s.dstate : 0),
                        GradientSums(s, all + number * sums));
    outside.write(share_of(0, false));
    std::free(all);
    return failed;
}

inline int directions_backward(const DirectionsBackwardArgs &args) {
    return backward_of_images(args, shares_of_images(args.forward), NoOutside());
}

// The whole mixer on CPU vectors, from in_proj to out_proj, and its gradients likewise: directions_kernels.h between the outer
// projections. Included inside an instruction set's namespace (see each_isa.h).
#include "directions_kernels.h"

// One image's y (seqlen, dim) before silu(z): as it is, or where each direction has a gate, the sum of `directions` parts
// times these.
struct Ungated {
    const float *y, *gates;
    int64_t directions, size;

    Ungated(const DirectionsArgs &s, int64_t gates, const float *y, int64_t image)
        : y(y), gates(gates ? floats(gates) + image * s.directions : nullptr), directions(s.directions),
          size(s.seqlen * s.dim) {}
    const float *part(int64_t number) const { return y + (gates ? number * size : 0); }
    template <int K> VEC Vectors<K> get(int64_t at, int some) const {
        Vectors<K> sum = load_some<K>(y + at, some);
        if (!gates) return sum;
        sum = sum * MachineOf<K>::set(gates[0]);
        for (int64_t number = 1; number < directions; ++number)
            sum = MachineOf<K>::fma(MachineOf<K>::set(gates[number]), load_some<K>(part(number) + at, some), sum);
        return sum;
    }
};
// How many y of an image are kept.
inline int64_t parts_of_image(const DirectionsArgs &s, int64_t gates) { return gates ? s.directions : 1; }

// One image's y (seqlen, dim) times silu(z), contiguous.
inline void gate(int64_t seqlen, int64_t dim, const Ungated &y, const float *z, int64_t z_stride, float *gated) {
    for (int64_t t = 0, row = 0; t < seqlen; ++t, row += dim, z += z_stride)
        each_vector(dim, [&](auto count, int64_t c, int some) __attribute__((always_inline)) {
            constexpr int K = decltype(count)::value;
            const Vectors<K> open = shared_math::silu<MachineOf<K>>(load_some<K>(z + c, some));
            store_some(gated + row + c, y.template get<K>(row + c, some) * open, some);
        });
}

// And backwards: `grad`, of the gated, becomes that of y. Beside dz, the gated is written anew.
inline void gate_backward(int64_t seqlen, int64_t dim, const Ungated &y, const float *z, int64_t z_stride, float *grad,
                          float *dz, int64_t dz_stride, float *gated) {
    for (int64_t t = 0, row = 0; t < seqlen; ++t, row += dim, z += z_stride, grad += dim, dz += dz_stride, gated += dim)
        each_vector(dim, [&](auto count, int64_t c, int some) __attribute__((always_inline)) {
            constexpr int K = decltype(count)::value;
            // both were kept since the forward, in main memory, which wants to be asked early
            for (int64_t i = c; i < c + K * LANES; i += 16)
                __builtin_prefetch(y.y + row + 8 * dim + i), __builtin_prefetch(z + 8 * z_stride + i);
            const Vectors<K> of_z = load_some<K>(z + c, some), of_y = y.template get<K>(row + c, some);
            const Vectors<K> of_grad = load_some<K>(grad + c, some), opening = shared_math::sigmoid<MachineOf<K>>(of_z);
            const Vectors<K> open = of_z * opening;
            store_some(gated + c, of_y * open, some), store_some(grad + c, of_grad * open, some);
            store_some(dz + c, of_grad * of_y * shared_math::silu_grad<MachineOf<K>>(of_z, opening), some);
        });
}

// The sum of a * b over `count` numbers.
inline float dot(const float *a, const float *b, int64_t count) {
    V sums[4] = {set(0.f), set(0.f), set(0.f), set(0.f)};
    each_vector(count, [&](auto parts, int64_t i, int some) __attribute__((always_inline)) {
        constexpr int K = decltype(parts)::value;
        const Vectors<K> of_a = load_some<K>(a + i, some), of_b = load_some<K>(b + i, some);
#pragma GCC unroll 16
        for (int k = 0; k < K; ++k) sums[k] = fma(of_a.of[k], of_b.of[k], sums[k]);
    });
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
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
        const bool kept = s.xz != 0, outside = kept || s.gates;  // where silu(z) is multiplied with
        const int64_t parts = parts_of_image(all, s.gates), narrow = all.rank + 2 * all.dstate;
        const memory::Buffer buffer(bytes(kept ? 2 * size : (4 + parts) * size + tokens * narrow));
        if (!buffer.data()) return 1;
        float *const memory = static_cast<float *>(buffer.data()), *const free = memory + 2 * size;
        DirectionsArgs one = all;
        if (!kept) one.first.x_dbl = one.second.x_dbl = at(free + (2 + parts) * size);
        for (int64_t image = begin; image < end; ++image) {
            float *const out = floats(s.out) + image * tokens * s.width;
            int64_t first = 0, last = one.directions - 1;  // that run: of two, what is between them does, too
            const uint8_t *const runs = s.runs ? reinterpret_cast<uint8_t *>(s.runs) + image * one.directions : nullptr;
            while (runs && first <= last && !runs[first]) ++first;
            while (runs && first <= last && !runs[last]) --last;
            if (first > last) {
                std::memset(out, 0, size_t(bytes(tokens * s.width)));
                continue;
            }
            const float *const x = floats(s.x.data) + image * s.x.batch_stride;
            float *const xz = kept ? floats(s.xz) + image * 2 * size : free;
            float *const y = kept ? floats(s.y) + image * parts * size : free + 2 * size;
            const Ungated ungated(all, s.gates, y, image);
            in_proj.multiply(tokens, threads, x, s.x.token_stride, xz, 2 * all.dim);
            one.first.x = one.second.x = {at(xz), 0, 2 * all.dim};
            if (!outside) one.z = {at(xz + all.dim), 0, 2 * all.dim};
            if (!kept && all.mask) one.mask = all.mask + bytes(image * tokens);
            for (int64_t number = first; number <= last; ++number) {
                DirectionOfImage here(one, number, kept ? image : 0, threads, rates.A);
                here.first = s.gates || number == first, here.last = s.gates || number == last;
                float *const to = y + (s.gates ? number * size : 0);
                if (direction_forward(here, packed[number], memory, to)) return 1;
            }
            if (outside) gate(tokens, all.dim, ungated, xz + all.dim, 2 * all.dim, memory);
            const float *const gated = outside ? memory : y;
            out_proj.multiply(tokens, threads, gated, all.dim, out, s.width);
        }
        return 0;
    });
}

// The gradients of a mixer's outer projections, as one share of the images adds them up; 0 where they are not wanted.
struct EndSums {
    Linear in_proj, out_proj;
    bool fresh;  // nothing is there yet

    static int64_t floats_of(const EndsBackward &m, int64_t dim) { return (m.width + 1) * 3 * dim + m.width; }
    // In `memory`, or where they are wanted.
    EndSums(const EndsBackward &m, int64_t dim, float *memory, bool fresh)
        : in_proj(m.din_proj), out_proj(m.dout_proj), fresh(fresh) {
        if (!memory) return;
        const auto place = [&](int64_t &to, int64_t from) { to = to ? at(memory + from) : 0; };
        place(in_proj.weight, 0), place(out_proj.weight, 2 * dim * m.width);
        place(in_proj.bias, 3 * dim * m.width), place(out_proj.bias, 3 * dim * m.width + 2 * dim);
    }

    // Of one image: y (tokens, columns) = x (tokens, depth) times the weight has the gradient `dy`.
    int add_to(const Linear &to, int64_t tokens, int64_t threads, const float *dy, int64_t dy_stride, int64_t columns,
               const float *x, int64_t x_stride, int64_t depth) const {
        if (to.bias && fresh) std::memset(floats(to.bias), 0, size_t(bytes(columns)));
        for (int64_t t = 0; to.bias && t < tokens; ++t) add(dy + t * dy_stride, columns, floats(to.bias));
        return to.weight && multiply(columns, depth, tokens, threads, {at(dy), 1, dy_stride}, {at(x), x_stride, 1},
                                     floats(to.weight), depth, !fresh);
    }
    // These, added to where they are wanted.
    void add_all(const EndsBackward &m, int64_t dim) const {
        const auto add_one = [](int64_t from, int64_t count, int64_t to) {
            if (to) add(floats(from), count, floats(to));
        };
        add_one(in_proj.weight, 2 * dim * m.width, m.din_proj.weight), add_one(in_proj.bias, 2 * dim, m.din_proj.bias);
        add_one(out_proj.weight, dim * m.width, m.dout_proj.weight), add_one(out_proj.bias, m.width, m.dout_proj.bias);
    }
};

// A mixer's outer projections, packed for the gradients of what goes into them.
struct Ends {
    const EndsBackward &m;
    const int64_t dim, tokens;
    PackedFactor in_proj, out_proj;

    Ends(const EndsBackward &m, int64_t dim, int64_t tokens, int64_t threads)
        : m(m), dim(dim), tokens(tokens), in_proj({m.in_proj, m.width, 1}, 0, m.width, 2 * dim, threads),
          out_proj({m.out_proj, dim, 1}, 0, dim, m.width, threads) {}
    bool ok() const { return in_proj.ok() && out_proj.ok(); }
    const float *dout(int64_t image) const { return floats(m.dout.data) + image * m.dout.batch_stride; }

    // dy (tokens, dim) of one image.
    void find_dy(int64_t image, int64_t threads, float *dy) const {
        out_proj.multiply(tokens, threads, dout(image), m.dout.token_stride, dy, dim);
    }
    int add_out_proj(int64_t image, int64_t threads, const float *y, const EndSums &sums) const {
        return sums.add_to(sums.out_proj, tokens, threads, dout(image), m.dout.token_stride, m.width, y, dim, dim);
    }
    // Backwards through in_proj.
    int end(int64_t image, int64_t threads, const float *dxz, const EndSums &sums) const {
        const float *const x = floats(m.x.data) + image * m.x.batch_stride;
        if (m.dx) in_proj.multiply(tokens, threads, dxz, 2 * dim, floats(m.dx) + image * tokens * m.width, m.width);
        return sums.add_to(sums.in_proj, tokens, threads, dxz, 2 * dim, 2 * dim, x, m.x.token_stride, m.width);
    }
};

// What is outside of the directions of a whole mixer: its projections and the gate.
struct GatedOutside {
    struct Share : EndSums {
        Share(const GatedOutside &all, float *, float *other, bool fresh) : EndSums(all.ends.m, all.ends.dim, other, fresh) {}
    };
    const MixerBackwardArgs &m;
    const int64_t size;
    Ends ends;

    explicit GatedOutside(const MixerBackwardArgs &m)
        : m(m), size(m.between.forward.seqlen * m.between.forward.dim),
          ends(m.ends, m.between.forward.dim, m.between.forward.seqlen, m.between.forward.threads) {}
    bool ok() const { return ends.ok(); }
    int64_t image_floats() const { return 4 * size; }
    int64_t share_floats() const { return 0; }
    int64_t other_floats() const { return EndSums::floats_of(m.ends, ends.dim); }
    void add_to_first(const Share &, const Share &share) const { share.add_all(m.ends, ends.dim); }
    void write(const Share &) const {}

    // Backwards through out_proj and the gate, and where `one` finds and writes its tokens: in `memory`.
    int begin(int64_t image, int64_t threads, float *memory, Share &share, DirectionsBackwardArgs &one) const {
        const int64_t dim = ends.dim, parts = parts_of_image(m.between.forward, m.between.gates);
        const float *const xz = floats(m.xz) + image * 2 * size;
        const Ungated y(m.between.forward, m.between.gates, floats(m.y) + image * parts * size, image);
        float *const dxz = memory, *const dy = dxz + 2 * size, *const gated = dy + size;
        ends.find_dy(image, threads, dy);
        gate_backward(ends.tokens, dim, y, xz + dim, 2 * dim, dy, dxz + dim, 2 * dim, gated);
        for (int64_t number = 0; y.gates && number < parts; ++number)
            floats(m.dgates)[image * parts + number] = dot(dy, y.part(number), size);
        one.forward.first.x = one.forward.second.x = {at(xz), 0, 2 * dim};
        one.first.x = one.second.x = {at(dxz), 0, 2 * dim}, one.dout = {at(dy), 0, dim};
        return ends.add_out_proj(image, threads, gated, share);
    }
    int end(int64_t image, int64_t threads, float *memory, Share &share) const {
        return ends.end(image, threads, memory, share);
    }
};

inline int mixer_backward(const MixerBackwardArgs &m) {
    return backward_of_images(m.between, shares_of_images(m.between.forward), GatedOutside(m));
}

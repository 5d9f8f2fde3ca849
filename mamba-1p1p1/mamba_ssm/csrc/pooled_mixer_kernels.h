// The whole mixer over pooled lines on CPU vectors, from in_proj to out_proj, and its gradients likewise: image by image, so
// that what one step writes is still in the cache when the next one reads it. Included inside an instruction set's namespace
// (see each_isa.h).
#include "mixer_kernels.h"
#include "visible_kernels.h"

// What the three steps of pooled_kernels.h are told of one image: xz (tokens, 2 * dim) goes in, gated (tokens, dim) comes out.
struct PooledImage {
    float *xz, *skip, *groups_forward, *groups_backward, *scanned, *gated;

    static int64_t size(const PooledMixerArgs &s) { return 3 * s.between.dim * (s.lines.tokens() + s.lines.count); }
    // In `memory`, where the gated takes the place of the skip, row by row.
    PooledImage(const PooledMixerArgs &s, float *memory)
        : xz(memory), skip(xz + 2 * s.between.dim * s.lines.tokens()), groups_forward(skip + s.between.dim * s.lines.tokens()),
          groups_backward(groups_forward + s.between.dim * s.lines.count),
          scanned(groups_backward + s.between.dim * s.lines.count), gated(skip) {}
    // Where it is kept.
    PooledImage(const PooledMixerArgs &s, int64_t image, float *gated)
        : xz(pointer<float>(s.xz) + image * 2 * s.between.dim * s.lines.tokens()),
          skip(pointer<float>(s.skip) + image * s.between.dim * s.lines.tokens()),
          groups_forward(of_lines(s, s.between.first.x.data, image)), groups_backward(of_lines(s, s.between.second.x.data, image)),
          scanned(of_lines(s, s.between.out, image)), gated(gated) {}
    static float *of_lines(const PooledMixerArgs &s, int64_t data, int64_t image) {
        return pointer<float>(data) + image * s.between.dim * s.lines.count;
    }

    PooledConvArgs conv(const PooledMixerArgs &s, int64_t threads) const {
        const int64_t dim = s.between.dim;
        return {1, dim, FLOAT32, s.taps, s.scale, threads, s.lines, {at(xz), 0, 2 * dim}, s.forward, s.backward,
                at(skip), at(groups_forward), at(groups_backward)};
    }
    PooledScanArgs scan(const PooledMixerArgs &s, int64_t threads) const {
        const DirectionsArgs &of = s.between;
        const auto projections = [](const DirectionWeights &own) {
            return Projections{own.x_proj, own.dt_proj, own.dt_bias, own.A};
        };
        return {1, of.dim, s.lines.count, FLOAT32, of.rank, of.dstate, threads, projections(of.first), projections(of.second),
                at(groups_forward), at(groups_backward), at(scanned)};
    }
    PooledGateArgs gate(const PooledMixerArgs &s, int64_t threads) const {
        const int64_t dim = s.between.dim;
        return {1, dim, FLOAT32, s.share, s.eps, threads, s.lines, {at(xz + dim), 0, 2 * dim}, s.norm_weight, s.norm_bias,
                at(skip), at(scanned), at(gated)};
    }
};

// The scans that keep what their gradients start from.
struct KeptScans {
    const DirectionsArgs &s;
    const Rates rates;
    const PackedDirection packed[2];

    explicit KeptScans(const DirectionsArgs &s) : s(s), rates(s), packed{{s, 0}, {s, 1}} {}
    bool ok() const { return rates.A && packed[0].ok() && packed[1].ok(); }
    static int64_t floats_of_image(const DirectionsArgs &s) { return 2 * s.seqlen * s.dim; }
    int run(int64_t image, int64_t threads, float *memory, float *scanned) const {
        int failed = 0;
        for (int64_t number = 0; !failed && number < 2; ++number)
            failed = direction_forward(DirectionOfImage(s, number, image, threads, rates.A), packed[number], memory, scanned);
        return failed;
    }
};

// One where there was no memory, else zero.
inline int pooled_mixer(const PooledMixerArgs &s) {
    const DirectionsArgs &of = s.between;
    const int64_t tokens = s.lines.tokens(), size = tokens * of.dim;
    const bool kept = s.xz != 0;
    const PackedWeight in_proj(s.in_proj.weight, s.in_proj.bias, 2 * of.dim, s.width, of.threads);
    const PackedWeight out_proj(s.out_proj.weight, s.out_proj.bias, s.width, of.dim, of.threads);
    std::optional<KeptScans> scans;
    if (kept) scans.emplace(of);
    if (!in_proj.ok() || !out_proj.ok() || (kept && !scans->ok())) return 1;
    const int shares = images::shares_for(of.batch, of.threads, of.batch * size * s.width / LANES);
    return images::each(of.batch, of.threads, shares, [&](int64_t begin, int64_t end, int64_t threads, int) {
        const memory::Buffer buffer(bytes(kept ? size + KeptScans::floats_of_image(of) : PooledImage::size(s)));
        float *const memory = static_cast<float *>(buffer.data());
        if (!memory) return 1;
        for (int64_t image = begin; image < end; ++image) {
            const PooledImage here = kept ? PooledImage(s, image, memory) : PooledImage(s, memory);
            in_proj.multiply(tokens, threads, floats(s.x.data) + image * s.x.batch_stride, s.x.token_stride, here.xz, 2 * of.dim);
            if (pooled_conv(here.conv(s, threads))) return 1;
            if (kept ? scans->run(image, threads, memory + size, here.scanned) : pooled_scan(here.scan(s, threads))) return 1;
            if (pooled_gate(here.gate(s, threads))) return 1;
            out_proj.multiply(tokens, threads, here.gated, of.dim, floats(s.out) + image * tokens * s.width, s.width);
        }
        return 0;
    });
}

// The gradients of taps and norm, one after the other.
struct PooledSums {
    float *forward, *backward, *norm_weight, *norm_bias;

    static int64_t of_taps(const PooledMixerBackwardArgs &m) { return m.between.forward.dim * (m.taps + 2); }
    static int64_t size(const PooledMixerBackwardArgs &m) { return 2 * of_taps(m) + 2 * m.between.forward.dim; }
    PooledSums(const PooledMixerBackwardArgs &m, float *memory)
        : forward(memory), backward(forward + of_taps(m)), norm_weight(backward + of_taps(m)),
          norm_bias(norm_weight + m.between.forward.dim) {}
    static TapsGradient taps(const PooledMixerBackwardArgs &m, float *own) {
        const int64_t dim = m.between.forward.dim;
        return {at(own), at(own + m.taps * dim), at(own + (m.taps + 1) * dim)};
    }
};

// What is outside of the scans: the projections, the gate behind its norm, and the convolutions with their means.
struct PooledOutside {
    struct Share : EndSums {
        float *sums, *found;
        Share(const PooledOutside &all, float *own, float *other, bool fresh)
            : EndSums(all.m.ends, all.ends.dim, other, fresh), sums(own), found(own + PooledSums::size(all.m)) {}
    };
    const PooledMixerBackwardArgs &m;
    const int64_t size, of_lines;
    const bool spreads;
    Ends ends;

    explicit PooledOutside(const PooledMixerBackwardArgs &m)
        : m(m), size(m.lines.tokens() * m.between.forward.dim), of_lines(m.lines.count * m.between.forward.dim),
          spreads(m.of_taps.count != m.lines.count),
          ends(m.ends, m.between.forward.dim, m.lines.tokens(), m.between.forward.threads) {}
    bool ok() const { return ends.ok(); }
    int64_t image_floats() const { return (spreads ? 7 : 5) * size + 3 * of_lines; }
    int64_t share_floats() const { return 2 * PooledSums::size(m); }
    int64_t other_floats() const { return EndSums::floats_of(m.ends, ends.dim); }

    // What is between the steps of one image.
    struct Rows {
        float *dxz, *dskip, *dy, *gated, *dscanned, *dgroups_forward, *dgroups_backward, *spread_forward, *spread_backward;
        Rows(const PooledOutside &all, float *memory)
            : dxz(memory), dskip(dxz + 2 * all.size), dy(dskip + all.size), gated(dy + all.size), dscanned(gated + all.size),
              dgroups_forward(dscanned + all.of_lines), dgroups_backward(dgroups_forward + all.of_lines),
              spread_forward(dgroups_backward + all.of_lines), spread_backward(spread_forward + all.size) {}
    };

    // Backwards through out_proj, the gate and its norm, and where `one` finds and writes its groups.
    int begin(int64_t image, int64_t threads, float *memory, Share &share, DirectionsBackwardArgs &one) const {
        const int64_t dim = ends.dim;
        const Rows rows(*this, memory);
        const PooledSums sums(m, share.sums), found(m, share.found);
        const float *const xz = floats(m.xz) + image * 2 * size;
        ends.find_dy(image, threads, rows.dy);
        VisibleGateBackwardArgs gate{};
        gate.batch = 1, gate.dim = dim, gate.dtype = FLOAT32, gate.share = m.share, gate.eps = m.eps, gate.threads = threads;
        gate.lines = m.of_gate, gate.z = {at(xz + dim), 0, 2 * dim}, gate.weight = m.norm_weight, gate.bias = m.norm_bias;
        gate.skip = m.skip + bytes(image * size), gate.groups = m.scanned + bytes(image * of_lines), gate.dout = at(rows.dy);
        gate.dskip = at(rows.dskip), gate.dgroups = at(rows.dscanned), gate.dz = {at(rows.dxz + dim), 0, 2 * dim};
        gate.dweight = at(found.norm_weight), gate.dbias = at(found.norm_bias), gate.gated = at(rows.gated);
        if (visible_gate_backward(gate)) return 1;
        add(found.norm_weight, 2 * dim, sums.norm_weight);
        const auto groups = [&](const DirectionWeights &of) { return Tokens{of.x.data + bytes(image * of_lines), 0, dim}; };
        one.forward.first.x = groups(m.between.forward.first), one.forward.second.x = groups(m.between.forward.second);
        one.first.x = {at(rows.dgroups_forward), 0, dim}, one.second.x = {at(rows.dgroups_backward), 0, dim};
        one.dout = {at(rows.dscanned), 0, dim};
        return ends.add_out_proj(image, threads, rows.gated, share);
    }
    // Backwards through the convolutions and in_proj.
    int end(int64_t image, int64_t threads, float *memory, Share &share) const {
        const int64_t dim = ends.dim;
        const Rows rows(*this, memory);
        const PooledSums sums(m, share.sums), found(m, share.found);
        for (int64_t place = 0; spreads && place < ends.tokens; ++place) {
            const int64_t group = m.lines.group_at(place) * dim;
            std::memcpy(rows.spread_forward + place * dim, rows.dgroups_forward + group, size_t(bytes(dim)));
            std::memcpy(rows.spread_backward + place * dim, rows.dgroups_backward + group, size_t(bytes(dim)));
        }
        VisibleConvBackwardArgs conv{};
        conv.batch = 1, conv.dim = dim, conv.dtype = FLOAT32, conv.width = m.taps, conv.factor = m.factor;
        conv.threads = threads, conv.lines = m.of_taps, conv.x = {m.xz + bytes(image * 2 * size), 0, 2 * dim};
        conv.forward = m.forward, conv.backward = m.backward, conv.dskip = at(rows.dskip);
        conv.dpooled_forward = at(spreads ? rows.spread_forward : rows.dgroups_forward);
        conv.dpooled_backward = at(spreads ? rows.spread_backward : rows.dgroups_backward);
        conv.dx = {at(rows.dxz), 0, 2 * dim};
        conv.dforward = PooledSums::taps(m, found.forward), conv.dbackward = PooledSums::taps(m, found.backward);
        if (visible_conv_backward(conv)) return 1;
        add(found.forward, 2 * PooledSums::of_taps(m), sums.forward);
        return ends.end(image, threads, rows.dxz, share);
    }

    void add_to_first(const Share &first, const Share &share) const {
        share.add_all(m.ends, ends.dim);
        add(share.sums, PooledSums::size(m), first.sums);
    }
    void write(const Share &share) const {
        const int64_t dim = ends.dim;
        const PooledSums sums(m, share.sums);
        const auto copy = [](int64_t to, const float *from, int64_t count) {
            if (to) std::memcpy(floats(to), from, size_t(bytes(count)));
        };
        const auto copy_taps = [&](const TapsGradient &to, const float *from) {
            copy(to.weight, from, m.taps * dim), copy(to.bias, from + m.taps * dim, dim), copy(to.D, from + (m.taps + 1) * dim, dim);
        };
        copy_taps(m.dforward, sums.forward), copy_taps(m.dbackward, sums.backward);
        copy(m.dnorm_weight, sums.norm_weight, dim), copy(m.dnorm_bias, sums.norm_bias, dim);
    }
};

// One where there was no memory, else zero.
inline int pooled_mixer_backward(const PooledMixerBackwardArgs &m) {
    const DirectionsArgs &of = m.between.forward;
    const int shares = images::shares_for(of.batch, of.threads, of.batch * m.lines.tokens() * of.dim * m.ends.width / LANES);
    return backward_of_images(m.between, shares, PooledOutside(m));
}

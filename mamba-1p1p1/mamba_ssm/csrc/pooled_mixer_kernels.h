// The whole mixer over pooled lines on CPU vectors, from in_proj to out_proj. Included inside an instruction set's namespace
// (see each_isa.h).
#include "gemm_kernels.h"
#include "pooled_kernels.h"

// What the three steps of pooled_kernels.h are told of one image: xz (tokens, 2 * dim) goes in, skip (tokens, dim) comes out.
struct PooledImage {
    float *xz, *skip, *groups_forward, *groups_backward, *scanned;

    static int64_t floats(const PooledMixerArgs &s) { return 3 * s.dim * (s.lines.tokens() + s.lines.count); }
    PooledImage(const PooledMixerArgs &s, float *memory)
        : xz(memory), skip(xz + 2 * s.dim * s.lines.tokens()), groups_forward(skip + s.dim * s.lines.tokens()),
          groups_backward(groups_forward + s.dim * s.lines.count), scanned(groups_backward + s.dim * s.lines.count) {}

    static int64_t at(const float *data) { return reinterpret_cast<int64_t>(data); }
    PooledConvArgs conv(const PooledMixerArgs &s, int64_t threads) const {
        return {1, s.dim, FLOAT32, s.taps, s.scale, threads, s.lines, {at(xz), 0, 2 * s.dim}, s.forward, s.backward,
                at(skip), at(groups_forward), at(groups_backward)};
    }
    PooledScanArgs scan(const PooledMixerArgs &s, int64_t threads) const {
        return {1, s.dim, s.lines.count, FLOAT32, s.rank, s.dstate, threads, s.forward_scan, s.backward_scan,
                at(groups_forward), at(groups_backward), at(scanned)};
    }
    // to where the skip was, row by row
    PooledGateArgs gate(const PooledMixerArgs &s, int64_t threads) const {
        return {1, s.dim, FLOAT32, s.share, s.eps, threads, s.lines, {at(xz + s.dim), 0, 2 * s.dim}, s.norm_weight,
                s.norm_bias, at(skip), at(scanned), at(skip)};
    }
};

// Image by image, so that what one step writes is still in the cache when the next one reads it. One where there was no
// memory, else zero.
inline int pooled_mixer(const PooledMixerArgs &s) {
    const int64_t tokens = s.lines.tokens();
    const PackedWeight in_proj(s.in_proj.weight, s.in_proj.bias, 2 * s.dim, s.width, s.threads);
    const PackedWeight out_proj(s.out_proj.weight, s.out_proj.bias, s.width, s.dim, s.threads);
    if (!in_proj.ok() || !out_proj.ok()) return 1;
    const int shares = images::shares_for(s.batch, s.threads, s.batch * tokens * s.dim * s.width / LANES);
    return images::each(s.batch, s.threads, shares, [&](int64_t begin, int64_t end, int64_t threads, int) {
        const memory::Buffer buffer(PooledImage::floats(s) * sizeof(float));
        if (!buffer.data()) return 1;
        const PooledImage here(s, static_cast<float *>(buffer.data()));
        for (int64_t image = begin; image < end; ++image) {
            const float *const x = pointer<float>(s.x.data) + image * s.x.batch_stride;
            in_proj.multiply(tokens, threads, x, s.x.token_stride, here.xz, 2 * s.dim);
            if (pooled_conv(here.conv(s, threads)) || pooled_scan(here.scan(s, threads)) || pooled_gate(here.gate(s, threads)))
                return 1;
            out_proj.multiply(tokens, threads, here.skip, s.dim, pointer<float>(s.out) + image * tokens * s.width, s.width);
        }
        return 0;
    });
}

// A mixer between its projections on CPU vectors: convolution, x_proj, dt_proj and scan of one image after the other, so
// that what one of them writes is still in the cache when the next one reads it. Included inside an instruction set's
// namespace (see each_isa.h).
#include "gemm_kernels.h"
#include "scan_kernels.h"
namespace conv {
#include "conv1d_kernels.h"
}  // namespace conv

// rows of `from` times the transpose of weight (columns, depth); all are contiguous but `from`.
inline int project(int64_t rows, int64_t columns, int64_t depth, int64_t threads, const float *from, int64_t stride,
                   int64_t weight, float *to) {
    GemmArgs args{};
    args.rows = rows, args.columns = columns, args.depth = depth, args.threads = threads;
    args.a = {reinterpret_cast<int64_t>(from), stride, 1}, args.b = {weight, 1, depth};
    args.c = reinterpret_cast<int64_t>(to), args.c_stride = columns;
    return gemm(args);
}

// log(-A) -> A.
inline void rates(const float *logs, int64_t count, float *A) {
    for (int64_t i = 0; i < count; i += LANES) {
        const int some = int(std::min<int64_t>(LANES, count - i));
        store_some(A + i, set(0.f) - shared_math::exp<Machine>(load_some(logs + i, some)), some);
    }
}

// One direction of one image; u and delta (seqlen, dim) are for what stands between the steps.
inline int mix_direction(const DirectionsArgs &s, int64_t image, bool first, bool last, int64_t threads, const float *A,
                         float *u, float *delta) {
    const DirectionWeights &own = first ? s.first : s.second;
    const int64_t narrow = s.rank + 2 * s.dstate, none = 0;
    const int64_t x = s.xz + image * s.xz_batch_stride * int64_t(sizeof(float));
    float *const x_dbl = reinterpret_cast<float *>(own.x_dbl) + image * s.seqlen * narrow;
    const int64_t u_at = reinterpret_cast<int64_t>(u), delta_at = reinterpret_cast<int64_t>(delta);

    ConvArgs convolved{};
    convolved.batch = 1, convolved.dim = s.dim, convolved.seqlen = s.seqlen, convolved.width = s.width;
    convolved.silu = 1, convolved.reverse = own.reverse, convolved.threads = threads, convolved.channel_last = 1;
    convolved.x = {x, FLOAT32, none, 1, s.xz_step_stride}, convolved.out = {u_at, FLOAT32, none, 1, s.dim};
    convolved.weight = own.conv, convolved.bias = own.conv_bias;
    if (conv::convolution(convolved)) return 1;
    if (project(s.seqlen, narrow, s.dim, threads, u, s.dim, own.x_proj, x_dbl)) return 1;
    if (project(s.seqlen, s.dim, s.rank, threads, x_dbl, narrow, own.dt_proj, delta)) return 1;

    const int64_t chunks = (s.seqlen + s.interval - 1) / s.interval - 1;
    const auto part = [&](int64_t skipped) {
        return Matrix{1, reinterpret_cast<int64_t>(x_dbl + skipped), FLOAT32, none, none, 1, narrow};
    };
    ScanArgs scan{};
    scan.batch = 1, scan.dim = s.dim, scan.seqlen = s.seqlen, scan.dstate = s.dstate, scan.groups = 1;
    scan.softplus = 1, scan.reverse = own.reverse, scan.threads = threads, scan.interval = s.interval;
    const double whole = 1;
    scan.accumulate = !first, scan.share = s.share;
    if (!last) std::memcpy(&scan.share, &whole, sizeof whole);
    scan.u = {u_at, FLOAT32, none, 1, s.dim}, scan.delta = {delta_at, FLOAT32, none, 1, s.dim};
    if (last) scan.z = {x + s.dim * int64_t(sizeof(float)), FLOAT32, none, 1, s.xz_step_stride};
    scan.out = {s.out + image * s.seqlen * s.dim * int64_t(sizeof(float)), FLOAT32, none, 1, s.dim};
    scan.B = part(s.rank), scan.C = part(s.rank + s.dstate);
    scan.A = A ? reinterpret_cast<int64_t>(A) : own.A, scan.D = own.D, scan.delta_bias = own.dt_bias;
    if (own.states) scan.states = own.states + image * chunks * s.dstate * s.dim * int64_t(sizeof(float));
    return scan_forward(scan);
}

// One where there was no memory, else zero.
inline int directions_forward(const DirectionsArgs &s) {
    const int64_t decays = s.dim * s.dstate;
    const memory::Buffer own_rates(s.log_decay ? s.directions * decays * sizeof(float) : sizeof(float));
    float *const A = static_cast<float *>(own_rates.data());
    if (!A) return 1;
    for (int64_t number = 0; s.log_decay && number < s.directions; ++number)
        rates(reinterpret_cast<const float *>(number ? s.second.A : s.first.A), decays, A + number * decays);
    const auto mix = [&](int64_t begin, int64_t end, int64_t threads) {
        const int64_t size = s.seqlen * s.dim;
        const memory::Buffer buffer(2 * size * sizeof(float));
        float *const u = static_cast<float *>(buffer.data());
        if (!u) return 1;
        for (int64_t image = begin; image < end; ++image)
            for (int64_t number = 0; number < s.directions; ++number)
                if (mix_direction(s, image, number == 0, number + 1 == s.directions, threads,
                                  s.log_decay ? A + number * decays : nullptr, u, u + size))
                    return 1;
        return 0;
    };
    // Every thread takes as many whole images as the others; the threads share those that are left.
    const int64_t work = s.batch * s.seqlen * s.dim * s.dstate / LANES;
    const int shares = s.batch < s.threads ? 1 : parallel::shares_for(s.threads, s.batch, work);
    const int64_t whole = shares > 1 ? s.batch / shares : 0;
    std::atomic<int> failures{0};
    if (whole)
        parallel::run(shares, [&](int share) { failures += mix(share * whole, (share + 1) * whole, 1); });
    if (shares * whole < s.batch) failures += mix(shares * whole, s.batch, s.threads);
    return failures ? 1 : 0;
}

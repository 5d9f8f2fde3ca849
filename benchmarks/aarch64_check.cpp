// The kernels of both packages, through their C interfaces, against loops in double precision. Linked with the packages' own
// sources by benchmarks/aarch64.py, for processors on which no torch is at hand. One line a check; the exit code is the
// number of those that failed.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "conv1d_abi.h"
#include "directions_abi.h"
#include "gemm_abi.h"
#include "merging_abi.h"
#include "norm_abi.h"
#include "scan_abi.h"
#include "visible_abi.h"

extern "C" {
int mamba_scan_forward(const ScanArgs *);
int mamba_scan_backward(const ScanArgs *);
int mamba_directions(const DirectionsArgs *);
int mamba_directions_backward(const DirectionsBackwardArgs *);
int mamba_gemm(const GemmArgs *);
int mamba_norm(const NormArgs *);
int mamba_match_tokens(const MatchArgs *);
int mamba_merge_tokens(const MergeArgs *);
int mamba_merge_tokens_backward(const MergeBackwardArgs *);
int mamba_visible_gate(const VisibleGateArgs *);
int mamba_visible_gate_backward(const VisibleGateBackwardArgs *);
int causal_conv1d(const ConvArgs *);
}

namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;
int failures = 0;

// Numbers in [low, high), always the same ones.
Floats numbers(size_t count, float low, float high) {
    static uint64_t state = 1;
    Floats found(count);
    for (float &x : found) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        x = low + (high - low) * float(state >> 40) / float(1 << 24);
    }
    return found;
}
template <class T> int64_t address(const std::vector<T> &x) { return reinterpret_cast<int64_t>(x.data()); }
int64_t bits(double x) {
    int64_t found;
    std::memcpy(&found, &x, sizeof found);
    return found;
}

// Differences are counted in units of the largest number that was wanted; NaN fails.
void compare(const char *what, const Floats &found, const Doubles &wanted, double bound) {
    double largest = 0, worst = 0;
    bool all = true;
    for (size_t i = 0; i < wanted.size(); ++i) {
        largest = std::fmax(largest, std::fabs(wanted[i]));
        const double difference = std::fabs(double(found[i]) - wanted[i]);
        all = all && difference == difference;
        worst = std::fmax(worst, difference);
    }
    const bool passes = all && worst <= bound * largest;
    failures += !passes;
    std::printf("%-4s %-44s %.1e of the largest, at most %.1e\n", passes ? "ok" : "FAIL", what, worst / largest, bound);
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// ---- scan ----

constexpr int64_t BATCH = 2, DIM = 13, SEQLEN = 71, DSTATE = 16, INTERVAL = 32, CHUNKS = (SEQLEN + INTERVAL - 1) / INTERVAL;

// Channel-last (batch, seqlen, dim) or contiguous (batch, dim, seqlen).
Signal signal(const Floats &x, bool last) {
    return {address(x), 0, DIM * SEQLEN, last ? 1 : SEQLEN, last ? DIM : 1};
}
Matrix matrix(const Floats &x) { return {1, address(x), 0, SEQLEN * DSTATE, SEQLEN * DSTATE, 1, DSTATE}; }

struct ScanCase {
    Floats u, delta, z, A, B, C, D, bias, dout;
    Doubles out, du, ddelta, dz, dA, dB, dC, dD, dbias;
    bool last, reverse;

    ScanCase(bool last, bool reverse) : last(last), reverse(reverse) {
        const int64_t count = BATCH * DIM * SEQLEN;
        u = numbers(count, -1, 1), delta = numbers(count, -3, 3), z = numbers(count, -4, 4), dout = numbers(count, -1, 1);
        A = numbers(DIM * DSTATE, -8, -.1f), B = numbers(BATCH * SEQLEN * DSTATE, -1, 1);
        C = numbers(BATCH * SEQLEN * DSTATE, -1, 1), D = numbers(DIM, -1, 1), bias = numbers(DIM, -2, 0);
        for (Doubles *x : {&out, &du, &ddelta, &dz}) x->assign(count, 0);
        dA.assign(A.size(), 0), dB.assign(B.size(), 0), dC.assign(C.size(), 0), dD.assign(DIM, 0), dbias.assign(DIM, 0);
        for (int64_t b = 0; b < BATCH; ++b)
            for (int64_t c = 0; c < DIM; ++c) channel(b, c);
    }
    int64_t at(int64_t b, int64_t c, int64_t t) const {
        const int64_t place = reverse ? SEQLEN - 1 - t : t;
        return b * DIM * SEQLEN + (last ? place * DIM + c : c * SEQLEN + place);
    }
    int64_t row(int64_t b, int64_t t) const { return (b * SEQLEN + (reverse ? SEQLEN - 1 - t : t)) * DSTATE; }

    void channel(int64_t b, int64_t c) {
        Doubles h((SEQLEN + 1) * DSTATE), y(SEQLEN), carry(DSTATE);
        const auto raw = [&](int64_t t) { return double(delta[at(b, c, t)]) + bias[c]; };
        const auto dt = [&](int64_t t) { return std::log1p(std::exp(raw(t))); };
        for (int64_t t = 0; t < SEQLEN; ++t) {
            y[t] = D[c] * double(u[at(b, c, t)]);
            for (int64_t n = 0; n < DSTATE; ++n) {
                const double a = std::exp(dt(t) * A[c * DSTATE + n]);
                double &next = h[(t + 1) * DSTATE + n];
                next = a * h[t * DSTATE + n] + dt(t) * u[at(b, c, t)] * B[row(b, t) + n];
                y[t] += next * C[row(b, t) + n];
            }
            out[at(b, c, t)] = y[t] * z[at(b, c, t)] * sigmoid(z[at(b, c, t)]);
        }
        for (int64_t t = SEQLEN - 1; t >= 0; --t) {
            const int64_t i = at(b, c, t);
            const double s = sigmoid(z[i]), dy = dout[i] * z[i] * s;
            dz[i] = dout[i] * y[t] * s * (1 + z[i] * (1 - s));
            du[i] = D[c] * dy, dD[c] += dy * u[i];
            double d_dt = 0;
            for (int64_t n = 0; n < DSTATE; ++n) {
                const double rate = A[c * DSTATE + n], a = std::exp(dt(t) * rate), before = h[t * DSTATE + n];
                const double dh = carry[n] + dy * C[row(b, t) + n];
                dC[row(b, t) + n] += dy * h[(t + 1) * DSTATE + n];
                dB[row(b, t) + n] += dh * dt(t) * u[i];
                du[i] += dh * dt(t) * B[row(b, t) + n];
                d_dt += dh * (u[i] * B[row(b, t) + n] + a * rate * before);
                dA[c * DSTATE + n] += dh * a * before * dt(t);
                carry[n] = dh * a;
            }
            ddelta[i] = d_dt * sigmoid(raw(t)), dbias[c] += ddelta[i];
        }
    }

    void check() const {
        const char *layout = last ? "channel-last" : "contiguous", *way = reverse ? ", reversed" : "";
        char name[64];
        const auto named = [&](const char *what) {
            std::snprintf(name, sizeof name, "scan, %s%s: %s", layout, way, what);
            return name;
        };
        Floats states(BATCH * (CHUNKS - 1) * DSTATE * DIM), result(u.size());
        ScanArgs args{};
        const double share = 1;
        args.batch = BATCH, args.dim = DIM, args.seqlen = SEQLEN, args.dstate = DSTATE, args.groups = 1;
        args.softplus = 1, args.reverse = reverse, args.threads = 1, args.interval = INTERVAL;
        std::memcpy(&args.share, &share, sizeof share);
        args.u = signal(u, last), args.delta = signal(delta, last), args.z = signal(z, last);
        args.B = matrix(B), args.C = matrix(C), args.A = address(A), args.D = address(D), args.delta_bias = address(bias);
        args.states = address(states), args.out = signal(result, last);
        failures += mamba_scan_forward(&args);
        compare(named("forward"), result, out, 2e-6);
        Floats gu(u.size()), gdelta(u.size()), gz(u.size()), gA(A.size()), gB(B.size()), gC(C.size()), gD(DIM), gbias(DIM);
        args.out = Signal{}, args.dout = signal(dout, last), args.du = signal(gu, last), args.ddelta = signal(gdelta, last);
        args.dz = signal(gz, last), args.dB = matrix(gB), args.dC = matrix(gC);
        args.dA = address(gA), args.dD = address(gD), args.ddelta_bias = address(gbias);
        failures += mamba_scan_backward(&args);
        compare(named("du"), gu, du, 3e-6), compare(named("ddelta"), gdelta, ddelta, 3e-6);
        compare(named("dz"), gz, dz, 3e-6), compare(named("dA"), gA, dA, 3e-6), compare(named("dB"), gB, dB, 3e-6);
        compare(named("dC"), gC, dC, 3e-6), compare(named("dD"), gD, dD, 3e-6), compare(named("dbias"), gbias, dbias, 3e-6);
    }
};

// ---- a mixer between its projections: both directions in one call ----

constexpr int64_t RANK = 5, WIDTH = 4, NARROW = RANK + 2 * DSTATE;
constexpr double SHARE = .5;

// x and z, then the weights of either direction, in the order of DirectionWeights.
enum { X, Z, FIRST };
enum { CONV, CONV_BIAS, X_PROJ, DT_PROJ, DT_BIAS, LOG_A, SKIP, WEIGHTS };
constexpr const char *WEIGHT_NAMES[] = {"convolution", "convolution's bias", "x_proj", "dt_proj", "dt_proj's bias", "log(-A)", "D"};
constexpr int PARTS = FIRST + 2 * WEIGHTS;

void add_direction(const std::vector<Doubles> &parts, int number, int64_t image, Doubles &out) {
    const Doubles *const w = &parts[FIRST + number * WEIGHTS];
    const auto at = [&](int64_t t, int64_t c) { return (image * SEQLEN + (number ? SEQLEN - 1 - t : t)) * DIM + c; };
    Doubles h(DIM * DSTATE), u(DIM), x_dbl(NARROW);
    for (int64_t t = 0; t < SEQLEN; ++t) {
        for (int64_t c = 0; c < DIM; ++c) {
            double sum = w[CONV_BIAS][c];
            for (int64_t k = 0; k < WIDTH; ++k)
                if (t + k >= WIDTH - 1) sum += w[CONV][c * WIDTH + k] * parts[X][at(t + k - (WIDTH - 1), c)];
            u[c] = sum * sigmoid(sum);
        }
        for (int64_t j = 0; j < NARROW; ++j) {
            x_dbl[j] = 0;
            for (int64_t c = 0; c < DIM; ++c) x_dbl[j] += w[X_PROJ][j * DIM + c] * u[c];
        }
        for (int64_t c = 0; c < DIM; ++c) {
            double raw = w[DT_BIAS][c], y = w[SKIP][c] * u[c];
            for (int64_t r = 0; r < RANK; ++r) raw += w[DT_PROJ][c * RANK + r] * x_dbl[r];
            const double dt = std::log1p(std::exp(raw));
            for (int64_t n = 0; n < DSTATE; ++n) {
                double &state = h[c * DSTATE + n];
                state = std::exp(-dt * std::exp(w[LOG_A][c * DSTATE + n])) * state + dt * u[c] * x_dbl[RANK + n];
                y += state * x_dbl[RANK + DSTATE + n];
            }
            const double z = parts[Z][at(t, c)];
            out[at(t, c)] += SHARE * y * z * sigmoid(z);
        }
    }
}

Doubles both_directions(const std::vector<Doubles> &parts) {
    Doubles out(BATCH * SEQLEN * DIM);
    for (int number : {0, 1})
        for (int64_t image = 0; image < BATCH; ++image) add_direction(parts, number, image, out);
    return out;
}

void check_directions() {
    const int64_t count = BATCH * SEQLEN * DIM;
    const Floats dout = numbers(count, -1, 1);
    std::vector<Floats> parts{numbers(count, -2, 2), numbers(count, -2, 2)}, grads, x_dbl, states;
    while (parts.size() < size_t(PARTS)) {
        for (int64_t size : {DIM * WIDTH, DIM, NARROW * DIM, DIM * RANK, DIM}) parts.push_back(numbers(size, -1, 1));
        parts.push_back(numbers(DIM * DSTATE, -2, 2)), parts.push_back(numbers(DIM, -1, 1));
        x_dbl.emplace_back(BATCH * SEQLEN * NARROW), states.emplace_back(BATCH * (CHUNKS - 1) * DSTATE * DIM);
    }
    std::vector<Doubles> exact;
    for (const Floats &part : parts) exact.emplace_back(part.begin(), part.end()), grads.emplace_back(part.size());

    const auto tokens = [](const Floats &of) { return Tokens{address(of), SEQLEN * DIM, DIM}; };
    const auto weights = [&](int number) {
        const Floats *const w = &parts[FIRST + number * WEIGHTS];
        return DirectionWeights{tokens(parts[X]),      number,             address(w[CONV]),    address(w[CONV_BIAS]),
                                address(w[X_PROJ]),    address(w[DT_PROJ]), address(w[DT_BIAS]), address(w[LOG_A]),
                                address(w[SKIP]),      address(x_dbl[number]), address(states[number])};
    };
    const auto gradients = [&](int number) {
        const Floats *const w = &grads[FIRST + number * WEIGHTS];
        return DirectionGradients{tokens(grads[X]),    address(w[CONV]),    address(w[CONV_BIAS]), address(w[X_PROJ]),
                                  address(w[DT_PROJ]), address(w[DT_BIAS]), address(w[LOG_A]),     address(w[SKIP])};
    };
    Floats out(count);
    DirectionsBackwardArgs args{};
    DirectionsArgs &forward = args.forward;
    forward.batch = BATCH, forward.dim = DIM, forward.seqlen = SEQLEN, forward.dstate = DSTATE, forward.rank = RANK;
    forward.width = WIDTH, forward.directions = 2, forward.threads = 1, forward.interval = INTERVAL, forward.log_decay = 1;
    std::memcpy(&forward.share, &SHARE, sizeof SHARE);
    forward.z = tokens(parts[Z]), forward.out = address(out), forward.first = weights(0), forward.second = weights(1);
    failures += mamba_directions(&forward);
    compare("both directions: forward", out, both_directions(exact), 2e-6);

    forward.out = 0, args.dout = tokens(dout), args.dz = tokens(grads[Z]);
    args.first = gradients(0), args.second = gradients(1);
    failures += mamba_directions_backward(&args);
    for (int part = 0; part < PARTS; ++part) {
        // along a random way: what the gradients say, and what a step to either side finds
        const Floats way = numbers(parts[part].size(), -1, 1);
        const double step = 1e-5;
        double found = 0, sizes = 0, wanted = 0;
        for (size_t i = 0; i < way.size(); ++i) {
            const double product = double(way[i]) * grads[part][i];
            found += product, sizes += std::fabs(product);
        }
        for (double side : {1., -1.}) {
            std::vector<Doubles> moved = exact;
            for (size_t i = 0; i < way.size(); ++i) moved[part][i] += side * step * way[i];
            const Doubles there = both_directions(moved);
            for (int64_t i = 0; i < count; ++i) wanted += side * dout[i] * there[i] / (2 * step);
        }
        char name[64];
        const char *const what = part == X ? "x" : part == Z ? "z" : WEIGHT_NAMES[(part - FIRST) % WEIGHTS];
        std::snprintf(name, sizeof name, "both directions: gradient of %s", what);
        compare(name, {float(found), float(sizes)}, {wanted, sizes}, 3e-6);
    }
}

// ---- convolution ----

void check_convolution(bool last) {
    const int64_t width = 4, count = BATCH * DIM * SEQLEN;
    const Floats x = numbers(count, -2, 2), weight = numbers(DIM * width, -1, 1), bias = numbers(DIM, -1, 1);
    const Floats dout = numbers(count, -1, 1);
    const auto at = [&](int64_t b, int64_t c, int64_t t) {
        return b * DIM * SEQLEN + (last ? t * DIM + c : c * SEQLEN + t);
    };
    Doubles out(count), dx(count), dweight(DIM * width), dbias(DIM);
    for (int64_t b = 0; b < BATCH; ++b)
        for (int64_t c = 0; c < DIM; ++c)
            for (int64_t t = 0; t < SEQLEN; ++t) {
                double sum = bias[c];
                for (int64_t k = 0; k < width; ++k)
                    if (t + k >= width - 1) sum += double(weight[c * width + k]) * x[at(b, c, t + k - (width - 1))];
                const double s = sigmoid(sum), grad = dout[at(b, c, t)] * s * (1 + sum * (1 - s));
                out[at(b, c, t)] = sum * s, dbias[c] += grad;
                for (int64_t k = 0; k < width; ++k)
                    if (t + k >= width - 1) {
                        dx[at(b, c, t + k - (width - 1))] += grad * weight[c * width + k];
                        dweight[c * width + k] += grad * x[at(b, c, t + k - (width - 1))];
                    }
            }
    const auto described = [&](const Floats &of) {
        return ConvSignal{address(of), 0, DIM * SEQLEN, last ? 1 : SEQLEN, last ? DIM : 1};
    };
    Floats result(count), gx(count), gweight(DIM * width), gbias(DIM);
    ConvArgs args{};
    args.batch = BATCH, args.dim = DIM, args.seqlen = SEQLEN, args.width = width, args.silu = 1, args.threads = 1;
    args.channel_last = last, args.x = described(x), args.out = described(result);
    args.weight = address(weight), args.bias = address(bias);
    failures += causal_conv1d(&args);
    compare(last ? "convolution, channel-last: forward" : "convolution, contiguous: forward", result, out, 1e-6);
    args.out = ConvSignal{}, args.dout = described(dout), args.dx = described(gx);
    args.dweight = address(gweight), args.dbias = address(gbias);
    failures += causal_conv1d(&args);
    compare(last ? "convolution, channel-last: dx" : "convolution, contiguous: dx", gx, dx, 2e-6);
    compare("convolution: dweight", gweight, dweight, 2e-6), compare("convolution: dbias", gbias, dbias, 2e-6);
}

// ---- halves: through a convolution that leaves its input as it is ----

double value_of(uint16_t half, bool brain) {
    if (brain) {
        const uint32_t bits = uint32_t(half) << 16;
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    const double sign = half >> 15 ? -1 : 1;
    if (exponent == 31) return mantissa ? std::nan("") : sign * HUGE_VAL;
    return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(double(mantissa), -24));
}

void check_halves(bool brain) {
    const int64_t dim = 1 << 16;
    std::vector<uint16_t> x(dim), out(dim);
    for (int64_t i = 0; i < dim; ++i) x[i] = uint16_t(i);
    Floats weight(2 * dim);
    for (int64_t i = 0; i < dim; ++i) weight[2 * i + 1] = 1;  // width 2: nothing of the step before
    ConvArgs args{};
    args.batch = 1, args.dim = dim, args.seqlen = 1, args.width = 2, args.threads = 1, args.channel_last = 1;
    args.x = {reinterpret_cast<int64_t>(x.data()), brain ? 1 : 2, dim, 1, dim};
    args.out = {reinterpret_cast<int64_t>(out.data()), brain ? 1 : 2, dim, 1, dim};
    args.weight = address(weight);
    failures += causal_conv1d(&args);
    int64_t wrong = 0;
    for (int64_t i = 0; i < dim; ++i) {
        const double from = value_of(x[i], brain), to = value_of(out[i], brain);
        wrong += !(from == to || (std::isnan(from) && std::isnan(to)));
    }
    failures += wrong != 0;
    std::printf("%-4s all 65,536 of %s, there and back: %ld wrong\n", wrong ? "FAIL" : "ok", brain ? "bfloat16" : "float16",
                long(wrong));
}

// ---- product and norm ----

void check_product(bool transposed) {
    const int64_t rows = 29, depth = 37, columns = 43;
    const Floats a = numbers(rows * depth, -1, 1), b = numbers(depth * columns, -1, 1), bias = numbers(columns, -1, 1);
    Floats c(rows * columns);
    Doubles wanted(rows * columns);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) {
            wanted[i * columns + j] = bias[j];
            for (int64_t k = 0; k < depth; ++k)
                wanted[i * columns + j] += double(a[i * depth + k]) * b[transposed ? j * depth + k : k * columns + j];
        }
    GemmArgs args{};
    args.rows = rows, args.columns = columns, args.depth = depth, args.threads = 1;
    args.a = {address(a), depth, 1}, args.b = {address(b), transposed ? 1 : columns, transposed ? depth : 1};
    args.bias = address(bias), args.c = address(c), args.c_stride = columns;
    failures += mamba_gemm(&args);
    compare(transposed ? "product, second factor transposed" : "product", c, wanted, 1e-6);
}

void check_norm(bool rms) {
    const int64_t rows = 7, size = 45;
    const Floats x = numbers(rows * size, -2, 2), weight = numbers(size, -1, 1), bias = numbers(size, -1, 1);
    Floats out(rows * size), mean(rows), scale(rows), total(rows * size);
    Doubles wanted(rows * size);
    const double eps = 1e-5;
    for (int64_t r = 0; r < rows; ++r) {
        double middle = 0, square = 0;
        for (int64_t i = 0; i < size && !rms; ++i) middle += x[r * size + i] / double(size);
        for (int64_t i = 0; i < size; ++i) square += std::pow(x[r * size + i] - middle, 2) / double(size);
        for (int64_t i = 0; i < size; ++i)
            wanted[r * size + i] = (x[r * size + i] - middle) / std::sqrt(square + eps) * weight[i] + bias[i];
    }
    NormArgs args{};
    args.rows = rows, args.size = size, args.rms = rms, args.threads = 1, args.eps = bits(eps);
    args.x = {address(x), 0, size}, args.out = {address(out), 0, size}, args.total = {address(total), 0, size};
    args.weight = address(weight), args.bias = address(bias), args.mean = address(mean), args.scale = address(scale);
    failures += mamba_norm(&args);
    compare(rms ? "RMS norm" : "layer norm", out, wanted, 1e-6);
}

// ---- norm and gate behind pooled lines ----

void check_gate() {
    const int64_t tokens = 6, lines = 2, dim = 37;
    const std::vector<int64_t> order{3, 0, 5, 1, 4, 2}, starts{0, 2, 6};
    const Floats skip = numbers(tokens * dim, -1, 1), groups = numbers(lines * dim, -1, 1), z = numbers(tokens * dim, -4, 4);
    const Floats weight = numbers(dim, -1, 1), bias = numbers(dim, -1, 1), dout = numbers(tokens * dim, -1, 1);
    const double share = 0.5, eps = 1e-5;
    Doubles out(tokens * dim), dskip(tokens * dim), dgroups(lines * dim), dz(tokens * dim), dweight(dim), dbias(dim);
    for (int64_t place = 0; place < tokens; ++place) {
        const int64_t row = order[place] * dim, group = (place >= starts[1]) * dim;
        Doubles x(dim), g(dim);
        double mean = 0, square = 0, along = 0, whole = 0;
        for (int64_t c = 0; c < dim; ++c) x[c] = share * (double(skip[row + c]) + groups[group + c]), mean += x[c] / dim;
        for (int64_t c = 0; c < dim; ++c) square += std::pow(x[c] - mean, 2) / dim;
        const double scale = 1 / std::sqrt(square + eps);
        for (int64_t c = 0; c < dim; ++c) {
            const double s = sigmoid(z[row + c]), grad = dout[row + c] * z[row + c] * s;
            x[c] = (x[c] - mean) * scale, g[c] = grad * weight[c];
            const double y = x[c] * weight[c] + bias[c];
            out[row + c] = y * z[row + c] * s, dz[row + c] = dout[row + c] * y * s * (1 + z[row + c] * (1 - s));
            dweight[c] += grad * x[c], dbias[c] += grad, along += g[c] * x[c] / dim, whole += g[c] / dim;
        }
        for (int64_t c = 0; c < dim; ++c) {
            dskip[row + c] = (g[c] - x[c] * along - whole) * scale * share;
            dgroups[group + c] += dskip[row + c];
        }
    }
    Floats found(out.size()), of_skip(out.size()), of_groups(dgroups.size()), of_z(out.size()), of_weight(dim), of_bias(dim);
    const VisibleLines of{lines, tokens, address(order), address(starts)};
    VisibleGateArgs args{};
    args.batch = 1, args.dim = dim, args.share = bits(share), args.eps = bits(eps), args.threads = 1, args.lines = of;
    args.z = {address(z), 0, dim}, args.weight = address(weight), args.bias = address(bias);
    args.skip = address(skip), args.groups = address(groups), args.out = address(found);
    failures += mamba_visible_gate(&args);
    compare("norm and gate", found, out, 2e-6);
    VisibleGateBackwardArgs back{};
    back.batch = 1, back.dim = dim, back.share = args.share, back.eps = args.eps, back.threads = 1, back.lines = of;
    back.z = args.z, back.weight = args.weight, back.bias = args.bias, back.skip = args.skip, back.groups = args.groups;
    back.dout = address(dout), back.dskip = address(of_skip), back.dgroups = address(of_groups);
    back.dz = {address(of_z), 0, dim}, back.dweight = address(of_weight), back.dbias = address(of_bias);
    back.gated = address(found);
    std::fill(found.begin(), found.end(), 0.f);
    failures += mamba_visible_gate_backward(&back);
    compare("norm and gate: written anew", found, out, 2e-6);
    compare("norm and gate: dskip", of_skip, dskip, 3e-6), compare("norm and gate: dgroups", of_groups, dgroups, 3e-6);
    compare("norm and gate: dz", of_z, dz, 3e-6);
    compare("norm and gate: dweight", of_weight, dweight, 3e-6), compare("norm and gate: dbias", of_bias, dbias, 3e-6);
}

// ---- merging ----

Floats as_floats(const std::vector<int64_t> &x) { return Floats(x.begin(), x.end()); }

void check_merging() {
    const int64_t batch = 2, tokens = 23, channels = 19, fused = 4, left = tokens - fused, at = 11, moves_to = 9;
    const Floats x = numbers(batch * tokens * channels, -1, 1), dout = numbers(batch * left * channels, -1, 1);
    Doubles slots(batch * tokens), counts(batch * left), means(batch * left * channels), dx(batch * tokens * channels);
    for (int64_t image = 0; image < batch; ++image) {
        const auto number = [&](int64_t token, int64_t c) { return double(x[(image * tokens + token) * channels + c]); };
        const auto similarity = [&](int64_t a, int64_t b) {
            double both = 0, of_a = 0, of_b = 0;
            for (int64_t c = 0; c < channels; ++c)
                both += number(a, c) * number(b, c), of_a += std::pow(number(a, c), 2), of_b += std::pow(number(b, c), 2);
            return both / std::sqrt(of_a * of_b);
        };
        std::vector<int64_t> set_a, set_b, partner(tokens, -1);
        Doubles best(tokens, -2);
        for (int64_t token = 0, patch = 0; token < tokens; ++token)
            if (token != at) (patch++ % 2 ? set_b : set_a).push_back(token);
        for (int64_t a : set_a)
            for (int64_t b : set_b)
                if (similarity(a, b) > best[a]) best[a] = similarity(a, b), partner[a] = b;
        std::vector<int64_t> ranking = set_a, order;
        std::sort(ranking.begin(), ranking.end(), [&](int64_t a, int64_t b) { return best[a] > best[b]; });
        const auto is_fused = [&](int64_t a) { return std::find(ranking.begin(), ranking.end(), a) - ranking.begin() < fused; };
        for (int64_t a : set_a)
            if (!is_fused(a)) order.push_back(a);
        order.insert(order.end(), set_b.begin(), set_b.end());
        order.insert(order.begin() + moves_to, at);
        for (int64_t token = 0; token < tokens; ++token) {
            const bool fuses = partner[token] >= 0 && is_fused(token);
            const int64_t slot = std::find(order.begin(), order.end(), fuses ? partner[token] : token) - order.begin();
            slots[image * tokens + token] = slot, ++counts[image * left + slot];
        }
        for (int64_t token = 0; token < tokens; ++token) {
            const int64_t row = image * left + int64_t(slots[image * tokens + token]);
            for (int64_t c = 0; c < channels; ++c) {
                means[row * channels + c] += number(token, c) / counts[row];
                dx[(image * tokens + token) * channels + c] = dout[row * channels + c] / counts[row];
            }
        }
    }
    std::vector<int64_t> cls{at}, moved{moves_to}, slot(batch * tokens), count(batch * left), places(batch);
    std::vector<uint8_t> kept(batch * tokens);
    MatchArgs match{};
    match.batch = batch, match.tokens = tokens, match.channels = channels, match.threads = 1, match.fused = fused;
    match.classes = 1, match.sorted = 1, match.x = {address(x), tokens * channels, channels};
    match.cls = address(cls), match.moved = address(moved), match.slot = address(slot), match.kept = address(kept);
    match.count = address(count), match.places = address(places);
    failures += mamba_match_tokens(&match);
    compare("merging: slots", as_floats(slot), slots, 0), compare("merging: sizes", as_floats(count), counts, 0);
    Floats out(means.size()), of_x(dx.size());
    MergeArgs merge{};
    merge.batch = batch, merge.tokens = tokens, merge.left = left, merge.channels = channels, merge.threads = 1;
    merge.x = match.x, merge.slot = match.slot, merge.count = match.count, merge.out = address(out);
    failures += mamba_merge_tokens(&merge);
    compare("merging: means", out, means, 1e-6);
    MergeBackwardArgs back{};
    back.batch = batch, back.tokens = tokens, back.left = left, back.channels = channels, back.threads = 1;
    back.dout = {address(dout), left * channels, channels}, back.slot = match.slot, back.count = match.count;
    back.dx = address(of_x);
    failures += mamba_merge_tokens_backward(&back);
    compare("merging: gradient", of_x, dx, 1e-6);
}

}  // namespace

int main() {
    for (bool last : {true, false}) {
        for (bool reverse : {false, true}) ScanCase(last, reverse).check();
        check_convolution(last);
    }
    check_directions();
    check_halves(true), check_halves(false);
    check_product(false), check_product(true);
    check_norm(false), check_norm(true);
    check_gate();
    check_merging();
    std::printf("%d failed\n", failures);
    return failures;
}

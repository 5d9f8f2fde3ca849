// Vectors of float, and 16-bit floats in memory, for one instruction set. No include guard: each_isa.h includes it once per
// set, inside that set's namespace ISA_NAME, with ISA_LANES, ISA_AVX512 and ISA_AVX2 defined.

constexpr int LANES = ISA_LANES;
constexpr int64_t VECTOR_BYTES = 4 * LANES;

typedef float V __attribute__((vector_size(4 * ISA_LANES)));
typedef int32_t IntV __attribute__((vector_size(4 * ISA_LANES)));
typedef uint32_t BitsV __attribute__((vector_size(4 * ISA_LANES)));
typedef uint16_t HalfBitsV __attribute__((vector_size(2 * ISA_LANES)));

#undef VEC
#define VEC inline __attribute__((always_inline))

// What a tensor holds in memory; the numbers are the C interface's.
enum DType { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

VEC V set(float x) { return x - V{}; }
VEC V load(const float *p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
VEC void store(float *p, V v) { __builtin_memcpy(p, &v, sizeof v); }

VEC V fma(V a, V b, V c) {
#if ISA_AVX512
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif ISA_AVX2
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif ISA_NEON
    return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}
// Both return the second argument if either is NaN, but on NEON NaN. One instruction each there and on x86, which compilers
// do not make of a > b ? a : b.
VEC V max(V a, V b) {
#if ISA_AVX512
    return (V)_mm512_max_ps((__m512)a, (__m512)b);
#elif ISA_AVX2
    return (V)_mm256_max_ps((__m256)a, (__m256)b);
#elif ISA_NEON
    return (V)vmaxq_f32((float32x4_t)a, (float32x4_t)b);
#else
    return a > b ? a : b;
#endif
}
VEC V min(V a, V b) {
#if ISA_AVX512
    return (V)_mm512_min_ps((__m512)a, (__m512)b);
#elif ISA_AVX2
    return (V)_mm256_min_ps((__m256)a, (__m256)b);
#elif ISA_NEON
    return (V)vminq_f32((float32x4_t)a, (float32x4_t)b);
#else
    return a < b ? a : b;
#endif
}
VEC V abs(V x) { return (V)((BitsV)x & 0x7fffffffu); }

// Whether every lane is at most `bound`; false if one is NaN.
VEC bool all_at_most(V x, float bound) {
#if ISA_AVX2
    return _mm256_movemask_ps((__m256)(x <= set(bound))) == 0xff;
#elif ISA_NEON
    return vminvq_u32((uint32x4_t)(x <= set(bound))) != 0;
#else
    bool all = true;
    for (int i = 0; i < LANES; ++i) all &= x[i] <= bound;
    return all;
#endif
}

// 2^x to 1.6e-7 relative, and exactly 1 at 0, so that decays near 1 keep their precision over long sequences. `exp2` is 0 far
// below, infinity far above, NaN for NaN; `exp2_within` is the same for |x| <= EXP2_WITHIN (or NaN), and nothing beyond.
constexpr float EXP2_WITHIN = 125.f;

#if ISA_AVX2
// 2^x = 2^(i / 8) * 2^r: the whole part of i / 8 goes to the exponent, the rest is one of eight numbers in a register, and r
// is in [-1/16, 1/16], where three multiplications do. This is two less than below, on the ports that a scan keeps busy.
// Several at once go stage by stage: one alone is a chain of ten instructions, most of which would wait for the one before.
template <int K> struct Exp2Parts {
    V scale[K], r[K];
};
template <int K> VEC Exp2Parts<K> exp2_parts(V (&x)[K]) {
    // The bits of 2^(i / 8), less what i adds to them when it is shifted to where its whole part meets the exponent.
    const BitsV table = {0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7};
    const V magic = set(1572864.f);  // 1.5 * 2^20: adding it leaves round(8 * x) in the lowest bits
    V shifted[K];
    Exp2Parts<K> parts;
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) {
        asm("" : "+x"(x[k]));  // else a product is multiplied anew for each of its two uses here, to fuse it with them
        shifted[k] = x[k] + magic;
    }
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) {
        const BitsV entry = (BitsV)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)(BitsV)shifted[k]);
        parts.scale[k] = (V)(entry + ((BitsV)shifted[k] << 20));
    }
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) parts.r[k] = x[k] - (shifted[k] - magic);
    return parts;
}
// (2^r - 1) / r, minimax.
VEC V exp2_slope(V r) { return fma(fma(set(0.05549622f), r, set(0.24025763f)), r, set(0.69314721f)); }
template <int K> VEC void exp2_within(V (&x)[K]) {
    const Exp2Parts<K> parts = exp2_parts(x);
    V slope[K];
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) slope[k] = exp2_slope(parts.r[k]);
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) x[k] = fma(parts.scale[k] * parts.r[k], slope[k], parts.scale[k]);
}
template <int K> VEC void exp2_all(V (&x)[K]) {
    V slope[K];
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) x[k] = min(set(128.f), max(set(-127.f), x[k]));
    const Exp2Parts<K> parts = exp2_parts(x);
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) slope[k] = exp2_slope(parts.r[k]);
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) x[k] = parts.scale[k] * fma(slope[k], parts.r[k], set(1.f));
}
VEC V exp2(V x) {
    V one[1] = {x};
    exp2_all(one);
    return one[0];
}
#else
// The polynomial is minimax on [-1/2, 1/2] among those that are exactly 1 at 0.
VEC V exp2_fraction(V r) {
    V p = fma(set(0.0013274633092805743f), r, set(0.009671961888670921f));
    p = fma(p, r, set(0.055506784468889236f));
    p = fma(p, r, set(0.24022234976291656f));
    p = fma(p, r, set(0.6931470632553101f));
    return fma(p, r, set(1.f));
}
#if ISA_AVX512
VEC V exp2(V x) {
    __m512 n = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return (V)_mm512_scalef_ps((__m512)exp2_fraction(x - (V)n), n);
}
VEC V exp2_within(V x) { return exp2(x); }
#else
VEC V exp2(V x) {
    // 1.5 * 2^23 + 127: adding it leaves round(x) + 127, the biased exponent of 2^round(x), in the lowest bits.
    const V magic = set(12582912.f + 127.f);
    x = min(set(128.f), max(set(-127.f), x));
    V shifted = x + magic;
    return exp2_fraction(x - (shifted - magic)) * (V)((BitsV)shifted << 23);
}
VEC V exp2_within(V x) {
    const V magic = set(12582912.f);
    V shifted = x + magic;
    return (V)((BitsV)exp2_fraction(x - (shifted - magic)) + ((BitsV)shifted << 23));
}
#endif
template <int K> VEC void exp2_within(V (&x)[K]) {
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) x[k] = exp2_within(x[k]);
}
#endif

// 1 / x for x >= 1, to a unit in the last place; 0 beyond 2^125, NaN for NaN.
#if ISA_AVX2
template <int K> VEC void reciprocal_all(V (&x)[K]) {
    V r[K], rest[K];
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) r[k] = (V)_mm256_rcp_ps((__m256)x[k]), rest[k] = fma(set(0.f) - x[k], r[k], set(1.f));
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) r[k] = fma(r[k], fma(rest[k], rest[k], rest[k]), r[k]);  // twelve bits, three times as many
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) x[k] = x[k] > set(0x1p125f) ? set(0.f) : r[k];
}
VEC V reciprocal(V x) {
    V one[1] = {x};
    reciprocal_all(one);
    return one[0];
}
#else
VEC V reciprocal(V x) {
#if ISA_AVX512
    V r = (V)_mm512_rcp14_ps((__m512)x);
    r = fma(r, fma(set(0.f) - x, r, set(1.f)), r);
    return x > set(0x1p125f) ? set(0.f) : r;
#elif ISA_NEON
    V r = (V)vrecpeq_f32((float32x4_t)x);
    r = r * (V)vrecpsq_f32((float32x4_t)x, (float32x4_t)r);
    const V rest = fma(set(0.f) - x, r, set(1.f));
    r = fma(r, fma(rest, rest, rest), r);  // sixteen bits, three times as many
    return x > set(0x1p125f) ? set(0.f) : r;
#else
    return set(1.f) / x;
#endif
}
#endif
// log(1 + x) for x in [0, 1], to 2.4e-7 relative (3e-7 without fma): a polynomial, in two
// halves that do not wait for each other.
VEC V log1p(V x) {
    const V q = x * x;
    V even = fma(set(0.00536482f), q, set(0.07920451f));
    V odd = fma(set(-0.03006577f), q, set(-0.137538f));
    even = fma(even, q, set(0.19153654f)), odd = fma(odd, q, set(-0.24857163f));
    even = fma(even, q, set(0.33321323f)), odd = fma(odd, q, set(-0.49999648f));
    return x * fma(fma(even, x, odd), x, set(1.f));
}

VEC V from_half_bits(BitsV h) {
    V magnitude = (V)((h & 0x7fffu) << 13) * set(0x1p112f);
    BitsV special = (BitsV)((h & 0x7fffu) >= 0x7c00u) & 0x7f800000u;
    return (V)((BitsV)magnitude | special | ((h & 0x8000u) << 16));
}
VEC BitsV to_half_bits(V x) {
    BitsV u = (BitsV)x & 0x7fffffffu, sign = ((BitsV)x >> 16) & 0x8000u;
    BitsV normal = (u - (112u << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
    BitsV tiny = (BitsV)((V)u + set(0.5f)) - 0x3f000000u;
    BitsV half = u < (113u << 23) ? tiny : normal;
    half = u >= 0x477ff000u ? BitsV{} + 0x7c00u : half;
    half = u > 0x7f800000u ? BitsV{} + 0x7e00u : half;
    return half | sign;
}

VEC BitsV load_bits(const uint16_t *p) {
    HalfBitsV h;
    __builtin_memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, BitsV);
}
VEC void store_bits(uint16_t *p, BitsV bits) {
    HalfBitsV h = __builtin_convertvector(bits, HalfBitsV);
    __builtin_memcpy(p, &h, sizeof h);
}
VEC V load(const bfloat16 *p) { return (V)(load_bits(&p->bits) << 16); }
VEC void store(bfloat16 *p, V x) {
    BitsV u = (BitsV)x;
    BitsV rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    store_bits(&p->bits, (u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
}
VEC V load(const float16 *p) {
#if ISA_AVX512
    __m256i h;
    __builtin_memcpy(&h, p, sizeof h);
    return (V)_mm512_cvtph_ps(h);
#elif ISA_AVX2
    __m128i h;
    __builtin_memcpy(&h, p, sizeof h);
    return (V)_mm256_cvtph_ps(h);
#elif ISA_NEON
    float16x4_t h;
    __builtin_memcpy(&h, p, sizeof h);
    return (V)vcvt_f32_f16(h);
#else
    return from_half_bits(load_bits(&p->bits));
#endif
}
VEC void store(float16 *p, V x) {
#if ISA_AVX512
    __m256i h = _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __builtin_memcpy(p, &h, sizeof h);
#elif ISA_AVX2
    __m128i h = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __builtin_memcpy(p, &h, sizeof h);
#elif ISA_NEON
    const float16x4_t h = vcvt_f16_f32((float32x4_t)x);
    __builtin_memcpy(p, &h, sizeof h);
#else
    store_bits(&p->bits, to_half_bits(x));
#endif
}

// The first `count` elements at p, zeros behind them; nothing beyond is touched. Out of line: it is rare, and long.
template <class T> __attribute__((noinline)) V load_partial(const T *p, int count) {
    T part[LANES] = {};
    for (int i = 0; i < count; ++i) part[i] = p[i];
    return load(part);
}
template <class T> __attribute__((noinline)) void store_partial(T *p, V v, int count) {
    T part[LANES];
    store(part, v);
    for (int i = 0; i < count; ++i) p[i] = part[i];
}
template <class T> VEC V load_some(const T *p, int count) { return count >= LANES ? load(p) : load_partial(p, count); }
template <class T> VEC void store_some(T *p, V v, int count) {
    if (count >= LANES) store(p, v);
    else store_partial(p, v, count);
}
// One element, through the same conversions.
VEC float load_one(const float *p) { return *p; }
VEC void store_one(float *p, float x) { *p = x; }
template <class T> VEC float load_one(const T *p) { return load_partial(p, 1)[0]; }
template <class T> VEC void store_one(T *p, float x) { store_partial(p, set(x), 1); }

// Butterflies on pairs of vectors whose numbers differ in bit S: lanes whose own bit S is clear come from a, the others from
// b; `low` takes what has bit S clear, `high` what has it set. log2(LANES) rounds of both transpose LANES vectors.
template <int... I> struct Indices {};
template <int N, int... I> struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I> struct MakeIndices<0, I...> {
    using type = Indices<I...>;
};
using AllLanes = typename MakeIndices<LANES>::type;

#if defined(__clang__)
#define ISA_SHUFFLE(a, b, index) __builtin_shufflevector(a, b, (index)...)
#else
#define ISA_SHUFFLE(a, b, index) __builtin_shuffle(a, b, IntV{(index)...})
#endif
template <int S, int... I> VEC V butterfly_low(V a, V b, Indices<I...>) {
    return ISA_SHUFFLE(a, b, (I & S ? LANES + I - S : I));
}
template <int S, int... I> VEC V butterfly_high(V a, V b, Indices<I...>) {
    return ISA_SHUFFLE(a, b, (I & S ? LANES + I : I + S));
}
template <int S, int... I> VEC V rotate(V a, Indices<I...>) { return ISA_SHUFFLE(a, a, (I + S) % LANES); }
#undef ISA_SHUFFLE

template <int S = 1> VEC void transpose(V *rows) {
    if constexpr (S < LANES) {
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) {
            if (i & S) continue;
            V low = butterfly_low<S>(rows[i], rows[i + S], AllLanes());
            rows[i + S] = butterfly_high<S>(rows[i], rows[i + S], AllLanes());
            rows[i] = low;
        }
        transpose<2 * S>(rows);
    }
}

// Lane i of the result is the sum over all lanes of v[i], for i < N; N is a power of two up to LANES. Overwrites v.
template <int N, int S = 1> VEC V sum_lanes(V *v) {
    if constexpr (S < N) {
#pragma GCC unroll 16
        for (int i = 0; i < N / S / 2; ++i) {
            V low = butterfly_low<S>(v[2 * i], v[2 * i + 1], AllLanes());
            v[i] = low + butterfly_high<S>(v[2 * i], v[2 * i + 1], AllLanes());
        }
        return sum_lanes<N, 2 * S>(v);
    } else if constexpr (S < LANES) {
        v[0] = v[0] + rotate<S>(v[0], AllLanes());
        return sum_lanes<N, 2 * S>(v);
    } else {
        return v[0];
    }
}
VEC float sum(V v) { return sum_lanes<1>(&v)[0]; }

// The machine of activations.h.
typedef V Vector;
struct Machine {
    typedef Vector V;
    static VEC Vector set(float x) { return ISA_NAME::set(x); }
    static VEC Vector exp2(Vector x) { return ISA_NAME::exp2(x); }
    static VEC Vector log1p(Vector x) { return ISA_NAME::log1p(x); }
    static VEC Vector reciprocal(Vector x) { return ISA_NAME::reciprocal(x); }
    static VEC Vector fma(Vector a, Vector b, Vector c) { return ISA_NAME::fma(a, b, c); }
    static VEC Vector max(Vector a, Vector b) { return ISA_NAME::max(a, b); }
    static VEC Vector abs(Vector a) { return ISA_NAME::abs(a); }
};

// K vectors that take every step together, and their machine: for what is one long chain of steps, each of which waits for the
// one before, as sigmoid and what comes of it are. (Softplus wants more of a machine.)
template <int K> struct Vectors {
    Vector of[K];
};
template <int K, class T> VEC Vectors<K> load_some(const T *from, int some) {
    Vectors<K> x;
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) x.of[k] = load_some(from + k * LANES, some);
    return x;
}
template <class T, int K> VEC void store_some(T *to, const Vectors<K> &x, int some) {
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) store_some(to + k * LANES, x.of[k], some);
}

#define ISA_EACH(expression)                                                     \
    Vectors<K> all;                                                              \
    _Pragma("GCC unroll 16") for (int k = 0; k < K; ++k) all.of[k] = expression; \
    return all
template <int K> VEC Vectors<K> operator+(Vectors<K> a, Vectors<K> b) { ISA_EACH(a.of[k] + b.of[k]); }
template <int K> VEC Vectors<K> operator-(Vectors<K> a, Vectors<K> b) { ISA_EACH(a.of[k] - b.of[k]); }
template <int K> VEC Vectors<K> operator*(Vectors<K> a, Vectors<K> b) { ISA_EACH(a.of[k] * b.of[k]); }
template <int K> struct MachineOf {
    typedef Vectors<K> V;
    static VEC V set(float x) { ISA_EACH(ISA_NAME::set(x)); }
#if ISA_AVX2
    static VEC V exp2(V x) { return exp2_all(x.of), x; }
    static VEC V reciprocal(V x) { return reciprocal_all(x.of), x; }
#else
    static VEC V exp2(V x) { ISA_EACH(ISA_NAME::exp2(x.of[k])); }
    static VEC V reciprocal(V x) { ISA_EACH(ISA_NAME::reciprocal(x.of[k])); }
#endif
    static VEC V fma(V a, V b, V c) { ISA_EACH(ISA_NAME::fma(a.of[k], b.of[k], c.of[k])); }
};
#undef ISA_EACH

// body(how many vectors together, where they begin, how many lanes of each) for a row of `dim` numbers.
template <class Body> VEC void each_vector(int64_t dim, Body body) {
    int64_t c = 0;
    for (; c + 4 * LANES <= dim; c += 4 * LANES) body(std::integral_constant<int, 4>(), c, LANES);
    for (; c < dim; c += LANES) body(std::integral_constant<int, 1>(), c, int(dim - c < LANES ? dim - c : LANES));
}

// What vec.h takes of AVX-512, made of AVX2, so that the code for sixteen lanes can be tested where no processor has it
// (scripts/avx512.sh). Results are the same to the bit, but for the reciprocal's, which are cut off after as many bits as
// the processor promises. Included after immintrin.h, under AVX2's target; nothing of it is meant to be fast.
#pragma once

namespace emulated {

union Lanes {
    __m512 all;
    __m256 half[2];
    float lane[16];
};
union HalfLanes {
    __m256i all;
    __m128i half[2];
};

// body(which) -> that half.
template <class Body> inline __m512 by_halves(Body body) {
    Lanes result;
    for (int i : {0, 1}) result.half[i] = body(i);
    return result.all;
}
inline __m512 fmadd(const __m512 &a, const __m512 &b, const __m512 &c) {
    const Lanes x{a}, y{b}, z{c};
    return by_halves([&](int i) { return _mm256_fmadd_ps(x.half[i], y.half[i], z.half[i]); });
}
inline __m512 larger(const __m512 &a, const __m512 &b) {
    const Lanes x{a}, y{b};
    return by_halves([&](int i) { return _mm256_max_ps(x.half[i], y.half[i]); });
}
inline __m512 smaller(const __m512 &a, const __m512 &b) {
    const Lanes x{a}, y{b};
    return by_halves([&](int i) { return _mm256_min_ps(x.half[i], y.half[i]); });
}
inline __m512 nearest(const __m512 &a) {
    const Lanes x{a};
    return by_halves([&](int i) { return _mm256_round_ps(x.half[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); });
}
// a * 2^floor(b); 0 for a b of minus infinity, infinity for one of plus infinity, even if a is NaN, as a is there.
inline __m512 scale(const __m512 &a, const __m512 &b) {
    const Lanes x{a}, power{b};
    Lanes result;
    for (int i = 0; i < 16; ++i) {
        const float by = power.lane[i];
        const int whole = by >= 300 ? 300 : by <= -300 ? -300 : by == by ? int(std::floor(by)) : 0;
        result.lane[i] = by != by           ? by
                         : by == HUGE_VALF  ? HUGE_VALF
                         : by == -HUGE_VALF ? 0.f
                                            : std::ldexp(x.lane[i], whole);
    }
    return result.all;
}
// 1 / a within 2^-14 of it.
inline __m512 reciprocal(const __m512 &a) {
    const Lanes x{a};
    Lanes result;
    for (int i = 0; i < 16; ++i) {
        const float exact = 1 / x.lane[i];
        uint32_t bits;
        std::memcpy(&bits, &exact, sizeof bits);
        bits &= ~0x1ffu;
        std::memcpy(&result.lane[i], &bits, sizeof bits);
    }
    return result.all;
}
inline __m512 from_halves(const __m256i &h) {
    const HalfLanes x{h};
    return by_halves([&](int i) { return _mm256_cvtph_ps(x.half[i]); });
}
inline __m256i to_halves(const __m512 &a) {
    const Lanes x{a};
    HalfLanes result;
    for (int i : {0, 1}) result.half[i] = _mm256_cvtps_ph(x.half[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return result.all;
}

}  // namespace emulated

#define _mm512_fmadd_ps(a, b, c) emulated::fmadd(a, b, c)
#define _mm512_max_ps(a, b) emulated::larger(a, b)
#define _mm512_min_ps(a, b) emulated::smaller(a, b)
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps(a, how) emulated::nearest(a)
#define _mm512_scalef_ps(a, b) emulated::scale(a, b)
#define _mm512_rcp14_ps(a) emulated::reciprocal(a)
#define _mm512_cvtph_ps(h) emulated::from_halves(h)
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph(a, how) emulated::to_halves(a)

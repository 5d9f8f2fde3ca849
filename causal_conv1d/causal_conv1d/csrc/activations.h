// Arithmetic that CPU vectors and CUDA threads share: exponential, softplus, silu and their derivatives.
//
// M is the machine: a struct with
//   M::V                   a float, or a vector of floats with + - * /
//   M::set(float)          that float in every element
//   M::exp2, M::log1p      2^x and log(1 + x); log1p is only asked for x in [0, 1]
//   M::reciprocal          1 / x; only asked for x >= 1
//   M::fma(a, b, c)        a * b + c
//   M::max, M::abs         NaN in either argument may be lost by max, not by abs
// Every function is a pure map between values of M::V: no memory, no branches.
#ifndef ACTIVATIONS_H
#define ACTIVATIONS_H

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define SHARED_MATH __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define SHARED_MATH inline __attribute__((always_inline))
#else
#define SHARED_MATH inline
#endif

namespace shared_math {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

template <class M> SHARED_MATH typename M::V exp(typename M::V x) { return M::exp2(x * M::set(LOG2_E)); }

// log(1 + e^x), without overflow; x itself, to the last bit, above 20.
template <class M> SHARED_MATH typename M::V softplus(typename M::V x) {
    return M::max(x, M::set(0.f)) + M::log1p(exp<M>(M::set(0.f) - M::abs(x)));
}

// softplus and its derivative, of one exponential.
template <class M> struct Softplus {
    typename M::V value, slope;
};
template <class M> SHARED_MATH Softplus<M> softplus_and_slope(typename M::V x) {
    const typename M::V zero = M::set(0.f), e = exp<M>(zero - M::abs(x)), above = M::reciprocal(M::set(1.f) + e);
    return {M::max(x, zero) + M::log1p(e), x < zero ? e * above : above};
}

// The derivative of softplus.
template <class M> SHARED_MATH typename M::V sigmoid(typename M::V x) {
    return M::reciprocal(M::set(1.f) + exp<M>(M::set(0.f) - x));
}

template <class M> SHARED_MATH typename M::V silu(typename M::V x) { return x * sigmoid<M>(x); }

// The derivative of silu, of x and its sigmoid, and of x alone.
template <class M> SHARED_MATH typename M::V silu_grad(typename M::V x, typename M::V s) {
    return s * M::fma(x, M::set(1.f) - s, M::set(1.f));
}
template <class M> SHARED_MATH typename M::V silu_grad(typename M::V x) { return silu_grad<M>(x, sigmoid<M>(x)); }

}  // namespace shared_math

#endif  // ACTIVATIONS_H

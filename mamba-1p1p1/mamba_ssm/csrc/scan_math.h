// Arithmetic of the selective scan, written once for CPU vectors and CUDA threads.
//
// M is the machine: a struct with
//   M::V                   a float, or a vector of floats with + - * /
//   M::set(float)          that float in every element
//   M::exp2, M::log1p      2^x and log(1 + x); log1p is only asked for x in [0, 1]
//   M::fma(a, b, c)        a * b + c
//   M::max, M::abs         NaN in either argument may be lost by max, not by abs
// Every function is a pure map between values of M::V: no memory, no branches.
//
// The recurrence (Gu and Dao 2023, arXiv:2312.00752, section 3.2), for one channel and one of its states:
//   a_t = exp(dt_t * A),  h_t = a_t * h_{t-1} + dt_t * u_t * B_t,  y_t = sum over states of C_t * h_t.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define SCAN_MATH __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define SCAN_MATH inline __attribute__((always_inline))
#else
#define SCAN_MATH inline
#endif

namespace scan_math {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

template <class M> SCAN_MATH typename M::V exp(typename M::V x) { return M::exp2(x * M::set(LOG2_E)); }

// log(1 + e^x), without overflow; x itself, to the last bit, above 20.
template <class M> SCAN_MATH typename M::V softplus(typename M::V x) {
    return M::max(x, M::set(0.f)) + M::log1p(exp<M>(M::set(0.f) - M::abs(x)));
}

// The derivative of softplus.
template <class M> SCAN_MATH typename M::V sigmoid(typename M::V x) {
    return M::set(1.f) / (M::set(1.f) + exp<M>(M::set(0.f) - x));
}

template <class M> SCAN_MATH typename M::V silu(typename M::V x) { return x * sigmoid<M>(x); }

// The derivative of silu.
template <class M> SCAN_MATH typename M::V silu_grad(typename M::V x) {
    typename M::V s = sigmoid<M>(x);
    return s * M::fma(x, M::set(1.f) - s, M::set(1.f));
}

// a_t, with A given as A * log2(e) so that every step is one multiplication and one exp2.
template <class M> SCAN_MATH typename M::V decay(typename M::V dt, typename M::V A_log2) { return M::exp2(dt * A_log2); }

// h_t. input = dt_t * u_t.
template <class M>
SCAN_MATH typename M::V next_state(typename M::V a, typename M::V h, typename M::V input, typename M::V B) {
    return M::fma(a, h, input * B);
}

// What one state's step adds up backwards. carry is a_{t+1} * dL/dh_{t+1} on entry and a_t * dL/dh_t on exit.
// Sums over states, per channel: input_grad, of dL/dh * B, and decay_grad, of dL/da * a * A (A in its own unit).
// Sums over channels, per state: dB and dC. Sum over time: dA. From them, for the channel:
//   du_t = dt_t * input_grad,  ddt_t = u_t * input_grad + decay_grad.
// The decay's gradient is carry * h_{t-1}, not a difference of states: h_t - input * B_t has lost it where a is tiny.
template <class M> struct BackwardSums {
    typename M::V input_grad, decay_grad;
};

template <class M>
SCAN_MATH void backward_step(typename M::V a, typename M::V h_before, typename M::V h, typename M::V A, typename M::V B,
                             typename M::V C, typename M::V dt, typename M::V input, typename M::V dy,
                             typename M::V &carry, typename M::V &dA, typename M::V &dB, typename M::V &dC,
                             BackwardSums<M> &sums) {
    typename M::V dh = M::fma(C, dy, carry);
    dB = M::fma(dh, input, dB);
    dC = M::fma(dy, h, dC);
    sums.input_grad = M::fma(dh, B, sums.input_grad);
    carry = a * dh;
    typename M::V da = carry * h_before;
    dA = M::fma(da, dt, dA);
    sums.decay_grad = M::fma(da, A, sums.decay_grad);
}

}  // namespace scan_math

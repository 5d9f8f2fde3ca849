// Arithmetic of the selective scan, written once for CPU vectors and CUDA threads. M is the machine of activations.h.
//
// The recurrence (Gu and Dao 2023, arXiv:2312.00752, section 3.2), for one channel and one of its states:
//   a_t = exp(dt_t * A),  h_t = a_t * h_{t-1} + dt_t * u_t * B_t,  y_t = sum over states of C_t * h_t.
#ifndef SCAN_MATH_H
#define SCAN_MATH_H

#include "activations.h"

namespace shared_math {

// a_t, with A given as A * log2(e) so that every step is one multiplication and one exp2.
template <class M> SHARED_MATH typename M::V decay(typename M::V dt, typename M::V A_log2) { return M::exp2(dt * A_log2); }

// h_t. input = dt_t * u_t.
template <class M>
SHARED_MATH typename M::V next_state(typename M::V a, typename M::V h, typename M::V input, typename M::V B) {
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
SHARED_MATH void backward_step(typename M::V a, typename M::V h_before, typename M::V h, typename M::V A, typename M::V B,
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

}  // namespace shared_math

#endif  // SCAN_MATH_H

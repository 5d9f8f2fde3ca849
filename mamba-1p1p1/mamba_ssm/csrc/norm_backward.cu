// Residual addition and LayerNorm or RMSNorm, backward. A team of threads walks many rows and keeps its sums for weight and
// bias; a block adds up its teams', and a later kernel the blocks'.
//
// KERNEL_ARGUMENTS: types of dout and dx, dresidual, total, weight and bias; elements per pack; packs per
// thread; threads per row.
#include "norm_tile.h"

struct BackwardParams {
    const void *dout, *dtotal, *total, *weight;  // dtotal, the gradient of total as an output, may be null
    const float *mean, *scale;                   // of forward
    void *dx, *dresidual;                        // dense rows; either may be null
    float *sums;                                 // (blocks, 2, size): weight, then bias
    int64 dout_row, dtotal_row, total_row;       // strides of the rows
    int64 rows;
    int size, rms;
};

template <class TX, class TR, class TT, class TW, int VEC, int ROUNDS, int TEAM>
DEVICE void differentiate(const BackwardParams &p) {
    using Part = RowPart<VEC, ROUNDS, TEAM>;
    SHARED_ARRAY(float, s_sums, THREADS * VEC);
    SHARED_ARRAY(float, s_parts, WARPS);
    const RowTeam<TEAM> team{s_parts};
    Part weight, weight_sums{}, bias_sums{};
    weight.read(static_cast<const TW *>(p.weight), p.size);

    for (int64 row = team.first_row(); row < p.rows; row += team.row_step()) {
        const float mean = p.mean[row], scale = p.scale[row];
        Part grad, normal;
        grad.read(static_cast<const TX *>(p.dout) + row * p.dout_row, p.size);
        normal.read(static_cast<const TT *>(p.total) + row * p.total_row, p.size);
        float along = 0.f, sum = 0.f;
        normal.each(p.size, [&](float &value, int r, int i) {
            value = (value - mean) * scale;
            weight_sums.v[r][i] = fmaf(grad.v[r][i], value, weight_sums.v[r][i]);
            bias_sums.v[r][i] += grad.v[r][i];
            grad.v[r][i] *= weight.v[r][i];
            along = fmaf(grad.v[r][i], value, along);
            sum += grad.v[r][i];
        });
        along = team.sum(along) / p.size;
        sum = p.rms ? 0.f : team.sum(sum) / p.size;
        grad.each(p.size, [&](float &value, int r, int i) { value = (value - sum - normal.v[r][i] * along) * scale; });
        if (p.dtotal != nullptr) {
            normal.read(static_cast<const TT *>(p.dtotal) + row * p.dtotal_row, p.size);
            grad.each(p.size, [&](float &value, int r, int i) { value += normal.v[r][i]; });
        }
        if (p.dx != nullptr) grad.write(static_cast<TX *>(p.dx) + row * p.size, p.size);
        if (p.dresidual != nullptr) grad.write(static_cast<TR *>(p.dresidual) + row * p.size, p.size);
    }

    for (int which = 0; which < 2; which++) {
        float *to = p.sums + (int64(blockIdx.x) * 2 + which) * p.size;
#pragma unroll
        for (int r = 0; r < ROUNDS; r++) {
            __syncthreads();
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                s_sums[threadIdx.x * VEC + i] = which == 0 ? weight_sums.v[r][i] : bias_sums.v[r][i];
            }
            __syncthreads();
            for (int i = threadIdx.x; i < TEAM * VEC && r * TEAM * VEC + i < p.size; i += THREADS) {
                float total = 0.f;
#pragma unroll
                for (int row = 0; row < team.ROWS; row++) total += s_sums[row * TEAM * VEC + i];
                to[r * TEAM * VEC + i] = total;
            }
        }
    }
}

KERNEL(norm_backward, BackwardParams, THREADS, 2) { differentiate<KERNEL_ARGUMENTS>(p); }

// Residual addition and LayerNorm (Ba et al. 2016, arXiv:1607.06450) or RMSNorm (Zhang and Sennrich 2019,
// arXiv:1910.07467), forward: total = x + residual, out = (total - mean) / deviation * weight + bias, in float.
//
// KERNEL_ARGUMENTS: types of x and out, residual, total, weight and bias; elements per pack; packs
// per thread; threads per row.
#include "norm_tile.h"

struct ForwardParams {
    const void *x, *residual, *weight, *bias;  // residual and bias may be null
    void *out, *total;                         // dense rows; total may be null
    float *mean, *scale;                       // per row: what was taken off and multiplied by, for backward; or null
    int64 x_row, residual_row;                 // strides of the rows
    int64 rows;
    int size, rms;
    float eps;
};

template <class TX, class TR, class TT, class TW, int VEC, int ROUNDS, int TEAM>
DEVICE void normalise(const ForwardParams &p) {
    using Part = RowPart<VEC, ROUNDS, TEAM>;
    SHARED_ARRAY(float, s_parts, WARPS);
    const RowTeam<TEAM> team{s_parts};
    for (int64 row = team.first_row(); row < p.rows; row += team.row_step()) {
        Part total, other;
        total.read(static_cast<const TX *>(p.x) + row * p.x_row, p.size);
        if (p.residual != nullptr) {
            other.read(static_cast<const TR *>(p.residual) + row * p.residual_row, p.size);
            total.each(p.size, [&](float &value, int r, int i) { value += other.v[r][i]; });
        }
        if (p.total != nullptr) total.write(static_cast<TT *>(p.total) + row * p.size, p.size);
        float sum = 0.f, squares = 0.f, mean = 0.f;
        if (!p.rms) {
            total.each(p.size, [&](float &value, int, int) { sum += value; });
            mean = team.sum(sum) / p.size;
        }
        total.each(p.size, [&](float &value, int, int) {
            value -= mean;
            squares = fmaf(value, value, squares);
        });
        const float scale = rsqrtf(team.sum(squares) / p.size + p.eps);
        if (p.scale != nullptr && threadIdx.x % TEAM == 0) {
            p.mean[row] = mean;
            p.scale[row] = scale;
        }
        other.read(static_cast<const TW *>(p.weight), p.size);
        total.each(p.size, [&](float &value, int r, int i) { value *= scale * other.v[r][i]; });
        if (p.bias != nullptr) {
            other.read(static_cast<const TW *>(p.bias), p.size);
            total.each(p.size, [&](float &value, int r, int i) { value += other.v[r][i]; });
        }
        total.write(static_cast<TX *>(p.out) + row * p.size, p.size);
    }
}

KERNEL(norm_forward, ForwardParams, THREADS, 4) { normalise<KERNEL_ARGUMENTS>(p); }

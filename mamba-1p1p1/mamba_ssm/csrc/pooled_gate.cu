// norm(share * (skip + the token's group)) * silu(z), with or without the LayerNorm (FastVim).
//
// KERNEL_ARGUMENTS: type of skip, groups, z and out; type of weight and bias; elements per pack; packs per thread;
// threads per token.
#include "activations.h"
#include "norm_tile.h"
#include "pooled_tile.h"

struct PooledGateParams {
    const void *skip, *groups, *z;  // (batch, tokens, dim) dense, (batch, groups, dim) dense, (batch, tokens, dim)
    const void *weight, *bias;      // (dim,); no norm if weight is null, bias may be
    void *out;                      // (batch, tokens, dim), dense
    int64 z_batch, z_token;         // strides
    Lines lines;
    int64 rows;                     // batch * tokens
    int size;
    float eps, share;
};

template <class T, class TW, int VEC, int ROUNDS, int TEAM> DEVICE void gate(const PooledGateParams &p) {
    using Part = RowPart<VEC, ROUNDS, TEAM>;
    SHARED_ARRAY(float, s_parts, WARPS);
    const RowTeam<TEAM> team{s_parts};
    for (int64 row = team.first_row(); row < p.rows; row += team.row_step()) {
        const int64 image = row / p.lines.tokens;
        const int token = int(row % p.lines.tokens);
        Part total, other;
        total.read(static_cast<const T *>(p.skip) + row * p.size, p.size);
        const int64 group = image * p.lines.groups + p.lines.group_of(token);
        other.read(static_cast<const T *>(p.groups) + group * p.size, p.size);
        total.each(p.size, [&](float &value, int r, int i) { value = (value + other.v[r][i]) * p.share; });
        if (p.weight != nullptr) {
            float sum = 0.f, squares = 0.f;
            total.each(p.size, [&](float &value, int, int) { sum += value; });
            const float mean = team.sum(sum) / p.size;
            total.each(p.size, [&](float &value, int, int) {
                value -= mean;
                squares = fmaf(value, value, squares);
            });
            const float scale = rsqrtf(team.sum(squares) / p.size + p.eps);
            other.read(static_cast<const TW *>(p.weight), p.size);
            total.each(p.size, [&](float &value, int r, int i) { value *= scale * other.v[r][i]; });
            if (p.bias != nullptr) {
                other.read(static_cast<const TW *>(p.bias), p.size);
                total.each(p.size, [&](float &value, int r, int i) { value += other.v[r][i]; });
            }
        }
        other.read(static_cast<const T *>(p.z) + image * p.z_batch + token * p.z_token, p.size);
        total.each(p.size, [&](float &value, int r, int i) { value *= shared_math::silu<Thread>(other.v[r][i]); });
        total.write(static_cast<T *>(p.out) + row * p.size, p.size);
    }
}

KERNEL(pooled_gate, PooledGateParams, THREADS, 2) { gate<KERNEL_ARGUMENTS>(p); }

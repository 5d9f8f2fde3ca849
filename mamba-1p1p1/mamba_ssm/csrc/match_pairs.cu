// Token matching, first half: the highest cosine similarity of each token of set a, and which of set b has it (Bolya et
// al. 2023, arXiv:2210.09461, section 3). A block has ROWS tokens of set a of one image, and goes through set b, COLUMNS
// tokens at a time.
//
// KERNEL_ARGUMENTS: type of x.
#include "match_tile.h"

constexpr int ROWS = 32, COLUMNS = 32, DEPTH = 32;  // of a tile: tokens of a, of b, channels
constexpr int PITCH = DEPTH + 1;
// A thread has MINE_A x MINE_B similarities of a tile.
constexpr int ACROSS = 8, MINE_A = ROWS * ACROSS / THREADS, MINE_B = COLUMNS / ACROSS;
constexpr float LEAST_SQUARE = 1e-24f;  // of a norm, as in torch.nn.functional.normalize

struct MatchPairsParams {
    const void *x;            // (batch, tokens, channels), dense along channels
    int64 x_batch, x_token;   // strides
    Patches patches;
    float *best;              // (batch, in_a)
    int *partner;             // (batch, in_a)
    int batch, channels;
};

template <class T> DEVICE void match_pairs(const MatchPairsParams &p) {
    SHARED_ARRAY(float, a, ROWS * PITCH);
    SHARED_ARRAY(float, b, COLUMNS * PITCH);
    SHARED_ARRAY(float, scales, ROWS + COLUMNS);
    const Patches &patches = p.patches;
    const int across = threadIdx.x % ACROSS, down = threadIdx.x / ACROSS * MINE_A;
    const int row0 = blockIdx.x * ROWS;

    for (int image = blockIdx.y; image < p.batch; image += gridDim.y) {
        const T *x = static_cast<const T *>(p.x) + image * p.x_batch;
        // Neighbouring threads read neighbouring channels of a token; zeros where there is none.
        const auto load = [&](float *to, int first, int count, int channel0, bool of_a) {
            for (int row = threadIdx.x / DEPTH; row < ROWS; row += THREADS / DEPTH) {
                const int i = first + row, channel = channel0 + threadIdx.x % DEPTH;
                float value = 0.f;
                if (i < count && channel < p.channels) {
                    const int patch = of_a ? patches.of_a(i) : patches.of_b(i);
                    value = to_float(x[patches.index_of(image, patch) * p.x_token + channel]);
                }
                to[row * PITCH + threadIdx.x % DEPTH] = value;
            }
        };
        float highest[MINE_A], where[MINE_A];  // indices as floats, which hold them exactly
#pragma unroll
        for (int i = 0; i < MINE_A; i++) {
            highest[i] = __uint_as_float(0xff800000u);  // minus infinity
            where[i] = 0.f;
        }
        for (int column0 = 0; column0 < patches.in_b; column0 += COLUMNS) {
            float sums[MINE_A][MINE_B] = {}, squares = 0.f;
            for (int channel0 = 0; channel0 < p.channels; channel0 += DEPTH) {
                __syncthreads();
                load(a, row0, patches.in_a, channel0, true);
                load(b, column0, patches.in_b, channel0, false);
                __syncthreads();
                if (threadIdx.x < ROWS + COLUMNS) {
                    const float *own = threadIdx.x < ROWS ? a + threadIdx.x * PITCH : b + (threadIdx.x - ROWS) * PITCH;
#pragma unroll
                    for (int k = 0; k < DEPTH; k++) squares = fmaf(own[k], own[k], squares);
                }
#pragma unroll 8
                for (int k = 0; k < DEPTH; k++) {
                    float left[MINE_A], right[MINE_B];
#pragma unroll
                    for (int i = 0; i < MINE_A; i++) left[i] = a[(down + i) * PITCH + k];
#pragma unroll
                    for (int j = 0; j < MINE_B; j++) right[j] = b[(across + j * ACROSS) * PITCH + k];
#pragma unroll
                    for (int i = 0; i < MINE_A; i++)
#pragma unroll
                        for (int j = 0; j < MINE_B; j++) sums[i][j] = fmaf(left[i], right[j], sums[i][j]);
                }
            }
            if (threadIdx.x < ROWS + COLUMNS) scales[threadIdx.x] = rsqrtf(fmaxf(squares, LEAST_SQUARE));
            __syncthreads();
#pragma unroll
            for (int i = 0; i < MINE_A; i++)
#pragma unroll
                for (int j = 0; j < MINE_B; j++) {
                    const int column = column0 + across + j * ACROSS;
                    const float similarity = sums[i][j] * scales[down + i] * scales[ROWS + across + j * ACROSS];
                    // the lower index wins a tie; what is no number wins nothing
                    if (column < patches.in_b && similarity > highest[i]) {
                        highest[i] = similarity;
                        where[i] = float(column);
                    }
                }
        }
#pragma unroll
        for (int i = 0; i < MINE_A; i++) {
#pragma unroll
            for (int mask = 1; mask < ACROSS; mask *= 2) {
                const float other = __shfl_xor_sync(WHOLE_WARP, highest[i], mask);
                const float there = __shfl_xor_sync(WHOLE_WARP, where[i], mask);
                if (other > highest[i] || (other == highest[i] && there < where[i])) {
                    highest[i] = other;
                    where[i] = there;
                }
            }
            if (across == 0 && row0 + down + i < patches.in_a) {
                const int64 at = int64(image) * patches.in_a + row0 + down + i;
                p.best[at] = highest[i];
                p.partner[at] = int(where[i]);
            }
        }
    }
}

KERNEL(match_pairs, MatchPairsParams, THREADS, 4) { match_pairs<KERNEL_ARGUMENTS>(p); }

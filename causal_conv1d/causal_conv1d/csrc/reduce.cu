// Adds up what the blocks of another kernel left: several sums in one launch, each over the rows of a float matrix, always
// in the same order. Columns are read as a (size[0], size[1], size[2]) tensor and written in any layout and dtype.
//
// KERNEL_ARGUMENTS: how many sums the launch may hold.
#include "device.h"

constexpr int REDUCE_THREADS = 256;
// With many rows, so many threads share one column.
constexpr int MANY_ROWS = 16, SHARERS = 8;

enum OutputType { FLOAT32, FLOAT16, BFLOAT16 };

struct Sum {
    const float *from;
    void *to;
    int64 rows, row_stride;
    int64 from_stride[3], to_stride[3];
    int size[3];
    int type;
};

template <int COUNT> struct ReduceParams {
    Sum sum[COUNT];
};

DEVICE void add_rows(const Sum &sum) {
    SHARED_ARRAY(float, partial, REDUCE_THREADS);
    const int sharers = sum.rows > MANY_ROWS ? SHARERS : 1, columns = REDUCE_THREADS / sharers;
    const int sharer = threadIdx.x / columns;
    const int64 column = int64(blockIdx.x) * columns + threadIdx.x % columns;
    const int64 all = int64(sum.size[0]) * sum.size[1] * sum.size[2];
    if (int64(blockIdx.x) * columns >= all) return;
    const int64 outer = column / sum.size[2];
    const int place[3] = {int(outer / sum.size[1]), int(outer % sum.size[1]), int(column % sum.size[2])};
    float total = 0.f;
    if (column < all) {
        const float *from = sum.from + place[0] * sum.from_stride[0] + place[1] * sum.from_stride[1] +
                            place[2] * sum.from_stride[2];
#pragma unroll 8
        for (int64 row = sharer; row < sum.rows; row += sharers) total += from[row * sum.row_stride];
    }
    if (sharers > 1) {
        partial[threadIdx.x] = total;
        __syncthreads();
        for (int i = 1; i < sharers && sharer == 0; i++) total += partial[i * columns + threadIdx.x];
    }
    if (sharer != 0 || column >= all) return;
    const int64 at = place[0] * sum.to_stride[0] + place[1] * sum.to_stride[1] + place[2] * sum.to_stride[2];
    if (sum.type == FLOAT32) static_cast<float *>(sum.to)[at] = total;
    if (sum.type == FLOAT16) static_cast<Float16 *>(sum.to)[at] = from_float<Float16>(total);
    if (sum.type == BFLOAT16) static_cast<BFloat16 *>(sum.to)[at] = from_float<BFloat16>(total);
}

KERNEL(reduce, ReduceParams<KERNEL_ARGUMENTS>, REDUCE_THREADS, 4) { add_rows(p.sum[blockIdx.y]); }

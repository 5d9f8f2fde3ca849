// Token matching, second half: the tokens of set a with the highest similarities are fused into their partners, and every
// token is given its place in the shorter sequence. One block per image.
#include "match_tile.h"

constexpr int WARPS = THREADS / 32, MOST_CLASSES = 128;

struct MatchArrangeParams {
    Patches patches;
    const float *best;       // (batch, in_a), no NaN
    const int *partner;      // (batch, in_a)
    int *rank, *place;       // scratch: (batch, in_a), (batch, patches)
    int64 *slot;             // (batch, tokens)
    unsigned char *kept;     // (batch, tokens)
    int64 *count, *places;   // (batch, tokens - fused), (batch, classes)
    int fused, raster, sorted;
    int moved[MOST_CLASSES]; // where class tokens go; below 0 between the patch tokens that they are between now
};

struct Arrangement {
    const MatchArrangeParams &p;
    const Patches &patches;
    int64 image;
    const float *best;
    const int *partner;
    int *rank, *place;

    DEVICE explicit Arrangement(const MatchArrangeParams &p) : p(p), patches(p.patches), image(blockIdx.x) {
        best = p.best + image * patches.in_a;
        partner = p.partner + image * patches.in_a;
        rank = p.rank + image * patches.in_a;
        place = p.place + image * patches.count();
    }

    DEVICE bool is_fused(int patch) const { return patches.is_a(patch) && rank[patch / 2] < p.fused; }

    // The highest first, the lower index before its equals.
    DEVICE void take_ranks() const {
        for (int i = threadIdx.x; i < patches.in_a; i += THREADS) {
            const float own = best[i];
            int before = 0;
            for (int j = 0; j < patches.in_a; j++) before += best[j] > own || (best[j] == own && j < i);
            rank[i] = before;
        }
    }

    // Where class tokens go: a warp has one at a time.
    DEVICE void move_classes(int *moved) const {
        const int lane = threadIdx.x % 32;
        for (int k = threadIdx.x / 32; k < patches.classes; k += WARPS) {
            int to = p.moved[k];
            if (to < 0) {
                const int64 before = patches.cls[image * patches.cls_batch + k] - k;
                float left[1] = {0.f};
                for (int patch = lane; patch < min(before, int64(patches.count())); patch += 32) left[0] += !is_fused(patch);
                sum_over_lanes<1, 32, 1>(left, threadIdx.x);
                to = k + int(left[0]);
            }
            if (lane == 0) {
                moved[k] = to;
                p.places[image * patches.classes + k] = to;
            }
        }
    }

    // The places of the tokens left, class tokens apart. Each thread numbers a piece of the patch tokens, or of set a,
    // from what the threads before it have counted.
    DEVICE void number(int *counts) const {
        const int all = p.raster ? patches.count() : patches.in_a, piece = (all + THREADS - 1) / THREADS;
        const int begin = min(int(threadIdx.x) * piece, all), end = min(begin + piece, all);
        int next = 0;
        for (int i = begin; i < end; i++) next += !is_fused(p.raster ? i : patches.of_a(i));
        counts[threadIdx.x] = next;
        __syncthreads();
        next = 0;
        for (int thread = 0; thread < int(threadIdx.x); thread++) next += counts[thread];
        for (int i = begin; i < end; i++) {
            const int patch = p.raster ? i : patches.of_a(i);
            if (is_fused(patch)) continue;
            place[patch] = p.raster || p.sorted ? next : rank[i] - p.fused;
            next++;
        }
        if (p.raster) return;
        for (int j = threadIdx.x; j < patches.in_b; j += THREADS) place[patches.of_b(j)] = patches.in_a - p.fused + j;
    }

    DEVICE void write(const int *moved) const {
        const int tokens = patches.count() + patches.classes;
        int64 *slot = p.slot + image * tokens, *count = p.count + image * (tokens - p.fused);
        unsigned char *kept = p.kept + image * tokens;
        for (int patch = threadIdx.x; patch < patches.count(); patch += THREADS) {
            const bool fused = is_fused(patch);
            int to = place[fused ? patches.of_b(partner[patch / 2]) : patch];
            for (int k = 0; k < patches.classes; k++) to += to >= moved[k];
            const int64 index = patches.index_of(image, patch);
            slot[index] = to;
            kept[index] = !fused;
            if (fused) atomicAdd(reinterpret_cast<unsigned long long *>(count + to), 1ull);
        }
        for (int k = threadIdx.x; k < patches.classes; k += THREADS) {
            const int64 index = patches.cls[image * patches.cls_batch + k];
            if (index < 0 || index >= tokens) continue;
            slot[index] = moved[k];
            kept[index] = 1;
        }
    }

    DEVICE void run(int *counts, int *moved) const {
        const int left = patches.count() + patches.classes - p.fused;
        for (int i = threadIdx.x; i < left; i += THREADS) p.count[image * left + i] = 1;
        take_ranks();
        __syncthreads();
        move_classes(moved);
        number(counts);
        __syncthreads();
        write(moved);
    }
};

KERNEL(match_arrange, MatchArrangeParams, THREADS, 4) {
    SHARED_ARRAY(int, counts, THREADS);
    SHARED_ARRAY(int, moved, MOST_CLASSES);
    Arrangement(p).run(counts, moved);
}

// Token merging for CPUs: a C interface without torch. What is indices, not numbers, is here and not in the kernels.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "isa.h"
#include "merging_abi.h"
#include "parallel.h"

#define KERNELS "merging_kernels.h"
#include "each_isa.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t MOST_LANES = 16;

// Slots, groups and class tokens of one image; `ranking` (in_a) and `place` (patches) are scratch.
void arrange(const MatchArgs &s, int64_t image, const float *best, const int64_t *partner, int64_t *ranking, int64_t *place) {
    const int64_t patches = s.patches(), in_a = s.in_a(), left = patches - s.fused;
    int64_t *slot = reinterpret_cast<int64_t *>(s.slot) + image * s.tokens;
    int64_t *count = reinterpret_cast<int64_t *>(s.count) + image * (s.tokens - s.fused);
    int64_t *moved = reinterpret_cast<int64_t *>(s.places) + image * s.classes;
    uint8_t *kept = reinterpret_cast<uint8_t *>(s.kept) + image * s.tokens;
    const auto patch_of_a = [&](int64_t i) { return 2 * i + s.odd_first; };
    const auto patch_of_b = [&](int64_t j) { return 2 * j + 1 - s.odd_first; };

    for (int64_t i = 0; i < in_a; ++i) ranking[i] = i;
    std::sort(ranking, ranking + in_a,
              [&](int64_t i, int64_t j) { return best[i] != best[j] ? best[i] > best[j] : i < j; });
    std::memset(kept, 1, s.tokens);
    for (int64_t i = 0; i < s.fused; ++i) kept[s.index_of(image, patch_of_a(ranking[i]))] = 0;

    // a token's place among the patch tokens left; a fused one has its partner's
    const auto is_kept = [&](int64_t patch) { return kept[s.index_of(image, patch)] != 0; };
    int64_t next = 0;
    if (s.raster) {
        for (int64_t patch = 0; patch < patches; ++patch)
            if (is_kept(patch)) place[patch] = next++;
    } else {
        for (int64_t i = 0; i < in_a; ++i) {
            const int64_t patch = patch_of_a(s.sorted ? i : ranking[i]);
            if (is_kept(patch)) place[patch] = next++;
        }
        for (int64_t j = 0; j < s.in_b(); ++j) place[patch_of_b(j)] = next++;
    }
    for (int64_t i = 0; i < s.fused; ++i) place[patch_of_a(ranking[i])] = place[patch_of_b(partner[ranking[i]])];

    for (int64_t k = 0; k < s.classes; ++k) {
        moved[k] = reinterpret_cast<const int64_t *>(s.moved)[k];
        if (moved[k] >= 0) continue;
        moved[k] = k;
        for (int64_t patch = 0; patch < s.classes_of(image)[k] - k; ++patch) moved[k] += is_kept(patch);
    }
    std::memset(count, 0, (left + s.classes) * sizeof(int64_t));
    for (int64_t patch = 0; patch < patches; ++patch) {
        int64_t to = place[patch];
        for (int64_t k = 0; k < s.classes; ++k) to += to >= moved[k];
        slot[s.index_of(image, patch)] = to;
        ++count[to];
    }
    for (int64_t k = 0; k < s.classes; ++k) slot[s.classes_of(image)[k]] = moved[k], count[moved[k]] = 1;
}

// 1 where there was no memory, 2 where class tokens are outside the sequence or do not rise.
int match_tokens(const MatchArgs &s) {
    for (int64_t image = 0; image < s.batch; ++image)
        for (int64_t k = 0, least = 0; k < s.classes; least = s.classes_of(image)[k++] + 1)
            if (s.classes_of(image)[k] < least || s.classes_of(image)[k] >= s.tokens) return 2;
    const int64_t patches = s.patches(), in_a = s.in_a();
    const int64_t width = (s.channels + MOST_LANES - 1) / MOST_LANES * MOST_LANES;
    const int64_t indices = s.batch * (2 * in_a + patches) * sizeof(int64_t);
    const int64_t numbers = s.batch * (in_a + patches * width) * sizeof(float);
    char *const scratch = static_cast<char *>(std::malloc(indices + numbers));
    if (!scratch) return 1;
    int64_t *const partner = reinterpret_cast<int64_t *>(scratch), *const ranking = partner + s.batch * in_a;
    int64_t *const place = ranking + s.batch * in_a;
    float *const best = reinterpret_cast<float *>(scratch + indices), *const units = best + s.batch * in_a;
    ISA_CALL(best_pairs, s, units, best, partner);
    const int shares = parallel::shares_for(s.threads, s.batch, s.batch * patches * 32);
    parallel::run(shares, [&](int share) {
        const parallel::Range range = parallel::share_of(s.batch, shares, share);
        for (int64_t image = range.begin; image < range.end; ++image)
            arrange(s, image, best + image * in_a, partner + image * in_a, ranking + image * in_a, place + image * patches);
    });
    std::free(scratch);
    return 0;
}

}  // namespace

EXPORT int mamba_match_tokens(const MatchArgs *args) { return match_tokens(*args); }
EXPORT int mamba_merge_tokens(const MergeArgs *args) { return ISA_CALL(merge_tokens, *args); }
EXPORT int mamba_merge_tokens_backward(const MergeBackwardArgs *args) { return ISA_CALL(merge_tokens_backward, *args); }

// Similarities of tokens and means of groups on CPU vectors, in float32. Included inside an instruction set's namespace
// (see each_isa.h).

// Rows of set a that meet rows of set b at a time: as many sums as leave registers for what is summed.
constexpr int PAIR_ROWS = 4, PAIR_COLUMNS = ISA_AVX512 ? 4 : 2;
// Channels whose sums are held at a time.
constexpr int64_t CHUNK = 4 * LANES;

template <class T> void normalize_token(const T *x, int64_t channels, float *unit) {
    V squares = set(0.f);
    for (int64_t c = 0; c < channels; c += LANES) {
        const V part = load_some(x + c, int(channels - c < LANES ? channels - c : LANES));
        store(unit + c, part);
        squares = fma(part, part, squares);
    }
    const float norm = std::sqrt(sum(squares));
    const V divisor = set(norm > 1e-12f ? norm : 1e-12f);
    for (int64_t c = 0; c < channels; c += LANES) store(unit + c, load(unit + c) / divisor);
}

// The most similar rows of b, the first among equals, to PAIR_ROWS rows of a from `row` on.
inline void best_of(const float *a, int64_t rows, const float *b, int64_t columns, int64_t width, int64_t row, float *best,
                    int64_t *partner) {
    const float *of_a[PAIR_ROWS], *of_b[PAIR_COLUMNS];
    for (int i = 0; i < PAIR_ROWS; ++i) of_a[i] = a + (row + i < rows ? row + i : rows - 1) * width;
    float highest[PAIR_ROWS];
    int64_t where[PAIR_ROWS] = {};
    for (int i = 0; i < PAIR_ROWS; ++i) highest[i] = -INFINITY;
    for (int64_t column = 0; column < columns; column += PAIR_COLUMNS) {
        for (int j = 0; j < PAIR_COLUMNS; ++j) of_b[j] = b + (column + j < columns ? column + j : columns - 1) * width;
        V sums[PAIR_ROWS][PAIR_COLUMNS];
#pragma GCC unroll 4
        for (int i = 0; i < PAIR_ROWS; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < PAIR_COLUMNS; ++j) sums[i][j] = set(0.f);
        for (int64_t c = 0; c < width; c += LANES) {
            V right[PAIR_COLUMNS];
#pragma GCC unroll 4
            for (int j = 0; j < PAIR_COLUMNS; ++j) right[j] = load(of_b[j] + c);
#pragma GCC unroll 4
            for (int i = 0; i < PAIR_ROWS; ++i) {
                const V left = load(of_a[i] + c);
#pragma GCC unroll 4
                for (int j = 0; j < PAIR_COLUMNS; ++j) sums[i][j] = fma(left, right[j], sums[i][j]);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < PAIR_ROWS; ++i) {
            const V totals = sum_lanes<PAIR_COLUMNS>(sums[i]);
            for (int j = 0; j < PAIR_COLUMNS; ++j)
                if (totals[j] > highest[i]) highest[i] = totals[j], where[i] = column + j;
        }
    }
    for (int i = 0; i < PAIR_ROWS && row + i < rows; ++i) {
        // the last row stands for those behind it
        best[row + i] = highest[i], partner[row + i] = where[i] < columns ? where[i] : columns - 1;
    }
}

// The highest cosine similarity of each token of set a, (batch, in_a), and which of set b has it. `units` has room for
// every patch token, a multiple of LANES long.
inline void best_pairs(const MatchArgs &s, float *units, float *best, int64_t *partner) {
    const int64_t patches = s.patches(), in_a = s.in_a(), width = (s.channels + LANES - 1) / LANES * LANES;
    const int64_t tiles = (in_a + PAIR_ROWS - 1) / PAIR_ROWS;
    const int readers = parallel::shares_for(s.threads, s.batch * patches, s.batch * patches * width / LANES * 4);
    parallel::run(readers, [&](int share) {
        const parallel::Range range = parallel::share_of(s.batch * patches, readers, share);
        for (int64_t task = range.begin; task < range.end; ++task) {
            const int64_t image = task / patches, patch = task % patches;
            const int64_t from = image * s.x.batch_stride + s.index_of(image, patch) * s.x.token_stride;
            const int64_t row = patch % 2 == s.odd_first ? patch / 2 : in_a + patch / 2;
            float *unit = units + (image * patches + row) * width;
            if (s.dtype == FLOAT32) normalize_token(reinterpret_cast<const float *>(s.x.data) + from, s.channels, unit);
            if (s.dtype == BFLOAT16) normalize_token(reinterpret_cast<const bfloat16 *>(s.x.data) + from, s.channels, unit);
            if (s.dtype == FLOAT16) normalize_token(reinterpret_cast<const float16 *>(s.x.data) + from, s.channels, unit);
        }
    });
    const int shares = parallel::shares_for(s.threads, s.batch * tiles, s.batch * in_a * s.in_b() * (width / LANES));
    parallel::run(shares, [&](int share) {
        const parallel::Range range = parallel::share_of(s.batch * tiles, shares, share);
        for (int64_t task = range.begin; task < range.end; ++task) {
            const int64_t image = task / tiles;
            const float *a = units + image * patches * width;
            best_of(a, in_a, a + in_a * width, s.in_b(), width, task % tiles * PAIR_ROWS, best + image * in_a,
                    partner + image * in_a);
        }
    });
}

// CHUNK channels from `first` on of one image's group means; `sums` has room for CHUNK numbers a group.
template <class T> void mean_chunk(const MergeArgs &s, int64_t image, int64_t first, float *sums) {
    const int channels = int(s.channels - first < CHUNK ? s.channels - first : CHUNK);
    const T *x = reinterpret_cast<const T *>(s.x.data) + image * s.x.batch_stride + first;
    const int64_t *slot = reinterpret_cast<const int64_t *>(s.slot) + image * s.tokens;
    const int64_t *count = reinterpret_cast<const int64_t *>(s.count) + image * s.left;
    T *out = reinterpret_cast<T *>(s.out) + image * s.left * s.channels + first;
    for (int64_t i = 0; i < s.left * CHUNK; i += LANES) store(sums + i, set(0.f));
    for (int64_t token = 0; token < s.tokens; ++token) {
        float *sum = sums + slot[token] * CHUNK;
        for (int c = 0; c < channels; c += LANES)
            store(sum + c, load(sum + c) + load_some(x + token * s.x.token_stride + c, channels - c));
    }
    for (int64_t group = 0; group < s.left; ++group) {
        const V size = set(float(count[group]));
        for (int c = 0; c < channels; c += LANES) {
            const V sum = load(sums + group * CHUNK + c);
            store_some(out + group * s.channels + c, count[group] == 1 ? sum : sum / size, channels - c);
        }
    }
}

// Whether every slot is a group's, and every group has a size.
template <class Args> bool are_groups(const Args &s) {
    const int64_t *slot = reinterpret_cast<const int64_t *>(s.slot), *count = reinterpret_cast<const int64_t *>(s.count);
    for (int64_t i = 0; i < s.batch * s.tokens; ++i)
        if (slot[i] < 0 || slot[i] >= s.left) return false;
    for (int64_t i = 0; i < s.batch * s.left; ++i)
        if (count[i] < 1) return false;
    return true;
}

// 1 where there was no memory, 2 where a slot is none or a group has no size.
inline int merge_tokens(const MergeArgs &s) {
    if (!are_groups(s)) return 2;
    const int64_t chunks = (s.channels + CHUNK - 1) / CHUNK, tasks = s.batch * chunks;
    const int shares = parallel::shares_for(s.threads, tasks, tasks * (s.tokens + s.left) * (CHUNK / LANES));
    float *const scratch = static_cast<float *>(std::malloc(shares * s.left * CHUNK * sizeof(float)));
    if (!scratch) return 1;
    parallel::run(shares, [&](int share) {
        float *sums = scratch + share * s.left * CHUNK;
        const parallel::Range range = parallel::share_of(tasks, shares, share);
        for (int64_t task = range.begin; task < range.end; ++task) {
            const int64_t image = task / chunks, first = task % chunks * CHUNK;
            if (s.dtype == FLOAT32) mean_chunk<float>(s, image, first, sums);
            if (s.dtype == BFLOAT16) mean_chunk<bfloat16>(s, image, first, sums);
            if (s.dtype == FLOAT16) mean_chunk<float16>(s, image, first, sums);
        }
    });
    std::free(scratch);
    return 0;
}

// One token of all, counted through the images.
template <class T> void spread_token(const MergeBackwardArgs &s, int64_t token) {
    const int64_t image = token / s.tokens, group = reinterpret_cast<const int64_t *>(s.slot)[token];
    const int64_t count = reinterpret_cast<const int64_t *>(s.count)[image * s.left + group];
    const T *dout = reinterpret_cast<const T *>(s.dout.data) + image * s.dout.batch_stride + group * s.dout.token_stride;
    T *dx = reinterpret_cast<T *>(s.dx) + token * s.channels;
    const V size = set(float(count));
    for (int64_t c = 0; c < s.channels; c += LANES) {
        const int some = int(s.channels - c < LANES ? s.channels - c : LANES);
        const V grad = load_some(dout + c, some);
        store_some(dx + c, count == 1 ? grad : grad / size, some);
    }
}

// 2 where a slot is none or a group has no size.
inline int merge_tokens_backward(const MergeBackwardArgs &s) {
    if (!are_groups(s)) return 2;
    const int64_t tasks = s.batch * s.tokens;
    const int shares = parallel::shares_for(s.threads, tasks, tasks * s.channels / LANES);
    parallel::run(shares, [&](int share) {
        const parallel::Range range = parallel::share_of(tasks, shares, share);
        for (int64_t token = range.begin; token < range.end; ++token) {
            if (s.dtype == FLOAT32) spread_token<float>(s, token);
            if (s.dtype == BFLOAT16) spread_token<bfloat16>(s, token);
            if (s.dtype == FLOAT16) spread_token<float16>(s, token);
        }
    });
    return 0;
}

// The product of two float32 matrices on CPU vectors. b is packed once, into panels of a few vectors' width, unless its rows
// can be read where they are and few rows of a meet them; a tile of TILE_ROWS rows times one panel is summed in registers.
// Included inside an instruction set's namespace (see each_isa.h).
//
// The order of every sum depends on the sizes alone, not on the threads.

// As many accumulators as leave registers for a row of the panel and one element of a.
constexpr int TILE_ROWS = 6;
constexpr int TILE_VECTORS = ISA_AVX512 ? 4 : 2;
constexpr int64_t PANEL = TILE_VECTORS * LANES;
// A block of a, and the part of a panel that meets it, stay in the second-level cache together.
constexpr int64_t BLOCK_TILES = 16;
constexpr int64_t BLOCK_ROWS = BLOCK_TILES * TILE_ROWS;
constexpr int64_t BLOCK_DEPTH = 512;
// So few rows of a that packing b would cost as much as multiplying it.
constexpr int64_t FEW_ROWS = 8 * TILE_ROWS;

// c (ROWS, columns) (+)= a (ROWS, depth) times a panel (depth, `pitch` apart), of which the first VECTORS vectors count.
template <int ROWS, int VECTORS>
inline void multiply_tile(const float *a, int64_t row_stride, int64_t step, const float *panel, int64_t pitch, int64_t depth,
                          float *c, int64_t c_stride, int64_t columns, bool fresh, const float *bias) {
    V sums[ROWS][VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
        const int count = int(columns - v * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
            if (!fresh) sums[r][v] = load_some(c + r * c_stride + v * LANES, count);
            else sums[r][v] = bias ? load_some(bias + v * LANES, count) : set(0.f);
        }
    }
    for (int64_t k = 0; k < depth; ++k, a += step, panel += pitch) {
        V row[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) row[v] = load(panel + v * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
            const V x = set(a[r * row_stride]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = fma(x, row[v], sums[r][v]);
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v)
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) store_some(c + r * c_stride + v * LANES, sums[r][v], int(columns - v * LANES));
}

using MultiplyTile = void (*)(const float *, int64_t, int64_t, const float *, int64_t, int64_t, float *, int64_t, int64_t,
                              bool, const float *);

template <int ROWS> inline MultiplyTile tile_of_vectors(int64_t vectors) {
    if constexpr (TILE_VECTORS > 2) {
        if (vectors == 4) return multiply_tile<ROWS, 4>;
        if (vectors == 3) return multiply_tile<ROWS, 3>;
    }
    return vectors == 2 ? multiply_tile<ROWS, 2> : multiply_tile<ROWS, 1>;
}
inline MultiplyTile tile_of(int64_t rows, int64_t vectors) {
    switch (rows) {
        case 1: return tile_of_vectors<1>(vectors);
        case 2: return tile_of_vectors<2>(vectors);
        case 3: return tile_of_vectors<3>(vectors);
        case 4: return tile_of_vectors<4>(vectors);
        case 5: return tile_of_vectors<5>(vectors);
        default: return tile_of_vectors<TILE_ROWS>(vectors);
    }
}

// LANES columns of b from `column` on, steps [begin, end), to rows of a panel; zeros behind the last column.
inline void pack_columns(const GemmArgs &s, int64_t column, int64_t begin, int64_t end, float *to) {
    const float *b = reinterpret_cast<const float *>(s.b.data) + column * s.b.column_stride;
    const int columns = int(s.columns - column < LANES ? s.columns - column : LANES);
    int64_t k = begin;
    if (s.b.column_stride == 1) {
        for (; k < end; ++k, to += PANEL) store(to, load_some(b + k * s.b.row_stride, columns));
        return;
    }
    for (; k + LANES <= end; k += LANES) {
        V block[LANES];
        for (int i = 0; i < LANES; ++i) block[i] = i < columns ? load(b + i * s.b.column_stride + k) : set(0.f);
        transpose(block);
        for (int i = 0; i < LANES; ++i, to += PANEL) store(to, block[i]);
    }
    for (; k < end; ++k, to += PANEL)
        for (int i = 0; i < LANES; ++i) to[i] = i < columns ? b[i * s.b.column_stride + k] : 0.f;
}

// `rows` rows of a from `row` on, steps [begin, end), as tiles: TILE_ROWS neighbours of one step side by side. For a whose
// rows are at stride 1.
inline void pack_rows(const GemmArgs &s, int64_t row, int64_t rows, int64_t begin, int64_t end, float *to) {
    const float *a = reinterpret_cast<const float *>(s.a.data) + row;
    for (int64_t k = begin; k < end; ++k, to += TILE_ROWS) {
        const float *from = a + k * s.a.column_stride;
        float *step = to;
        int64_t r = 0;
        for (; r + TILE_ROWS <= rows; r += TILE_ROWS, step += (end - begin) * TILE_ROWS)
            __builtin_memcpy(step, from + r, TILE_ROWS * sizeof(float));
        for (int64_t i = 0; r + i < rows; ++i) step[i] = from[r + i];
    }
}

// Where a pass finds b: its panels lie `panel_stride` apart, the rows of each `pitch`.
struct Stored {
    const float *b;
    int64_t pitch, panel_stride;
};

// Tiles [first, last) of the block of rows from `row` on, for steps [begin, end). Tiles are counted panel by panel.
inline void multiply_block(const GemmArgs &s, int64_t row, int64_t first, int64_t last, int64_t begin, int64_t end,
                           const Stored &stored, float *packed) {
    const int64_t rows = s.rows - row < BLOCK_ROWS ? s.rows - row : BLOCK_ROWS, depth = end - begin;
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    const bool along_rows = s.a.column_stride == 1;
    const bool fresh = begin == 0 && !s.accumulate;
    const float *a = reinterpret_cast<const float *>(s.a.data) + row * s.a.row_stride + begin;
    if (!along_rows) pack_rows(s, row, rows, begin, end, packed);
    for (int64_t p = first / tiles; p * tiles < last; ++p) {
        const int64_t from = first - p * tiles > 0 ? first - p * tiles : 0;
        const int64_t to = last - p * tiles < tiles ? (last - p * tiles) * TILE_ROWS : rows;
        const int64_t columns = s.columns - p * PANEL < PANEL ? s.columns - p * PANEL : PANEL;
        const int64_t vectors = (columns + LANES - 1) / LANES;
        const float *panel = stored.b + p * stored.panel_stride;
        const float *bias = s.bias ? reinterpret_cast<const float *>(s.bias) + p * PANEL : nullptr;
        for (int64_t r = from * TILE_ROWS; r < to; r += TILE_ROWS) {
            float *c = reinterpret_cast<float *>(s.c) + (row + r) * s.c_stride + p * PANEL;
            const MultiplyTile multiply = tile_of(rows - r, vectors);
            if (along_rows)
                multiply(a + r * s.a.row_stride, s.a.row_stride, 1, panel, stored.pitch, depth, c, s.c_stride, columns, fresh,
                         bias);
            else
                multiply(packed + r * depth, 1, TILE_ROWS, panel, stored.pitch, depth, c, s.c_stride, columns, fresh, bias);
        }
    }
}

// How b is cut: into panels of columns, and where it is deep into passes, which are packed one after the other.
struct Panels {
    int64_t depth, vectors, count, passes;

    explicit Panels(const GemmArgs &s)
        : depth(s.depth),
          vectors((s.columns + LANES - 1) / LANES),
          count((s.columns + PANEL - 1) / PANEL),
          passes(depth > BLOCK_DEPTH ? (depth + BLOCK_DEPTH - 1) / BLOCK_DEPTH : 1) {}
    int64_t begin(int64_t pass) const { return depth * pass / passes; }
    int64_t deepest() const { return (depth + passes - 1) / passes; }
    int64_t floats(int64_t steps) const { return count * PANEL * steps; }
    Stored packed(const float *b, int64_t pass) const { return {b, PANEL, PANEL * (begin(pass + 1) - begin(pass))}; }
};

// Some of the vectors of columns of one pass, to that pass's panels.
inline void pack(const GemmArgs &s, const Panels &panels, int64_t pass, parallel::Range some, float *to) {
    const int64_t begin = panels.begin(pass), end = panels.begin(pass + 1);
    for (int64_t v = some.begin; v < some.end; ++v)
        pack_columns(s, v * LANES, begin, end, to + v / TILE_VECTORS * PANEL * (end - begin) + v % TILE_VECTORS * LANES);
}

inline int shares_of_product(const GemmArgs &s, const Panels &panels) {
    const int64_t tiles = panels.count * ((s.rows + TILE_ROWS - 1) / TILE_ROWS);
    return parallel::shares_for(s.threads, tiles, s.rows * s.columns * (s.depth / LANES + 1));
}

// One pass; `packed_a` has BLOCK_ROWS rows for each share, and is not used where a's rows are in order.
inline void multiply_pass(const GemmArgs &s, const Panels &panels, int64_t pass, int shares, const Stored &stored,
                          float *packed_a) {
    const int64_t tiles = panels.count * ((s.rows + TILE_ROWS - 1) / TILE_ROWS), block = panels.count * BLOCK_TILES;
    parallel::run(shares, [&](int share) {
        // the last block has fewer tiles than the others, so shares are counted in tiles
        const parallel::Range range = parallel::share_of(tiles, shares, share);
        for (int64_t start = range.begin / block * block; start < range.end; start += block) {
            const int64_t first = range.begin > start ? range.begin - start : 0;
            const int64_t last = range.end - start < block ? range.end - start : block;
            multiply_block(s, start / panels.count * TILE_ROWS, first, last, panels.begin(pass), panels.begin(pass + 1),
                           stored, packed_a ? packed_a + share * BLOCK_ROWS * panels.deepest() : nullptr);
        }
    });
}

// `data` from the next cache line on, where panels start.
constexpr int64_t LINE = 64 / sizeof(float);
inline float *line_from(void *data) {
    float *const from = static_cast<float *>(data);
    return from + (LINE - reinterpret_cast<uintptr_t>(from) / sizeof(float) % LINE) % LINE;
}

// Not zero where there was no memory.
inline int gemm(const GemmArgs &s) {
    if (s.rows == 0 || s.columns == 0) return 0;  // of nothing there are no shares
    const Panels panels(s);
    const int shares = shares_of_product(s, panels);
    const bool in_place = s.rows <= FEW_ROWS && s.b.column_stride == 1 && s.columns % LANES == 0;
    const int64_t packed = in_place ? 0 : panels.floats(panels.deepest());
    const memory::Buffer buffer((packed + shares * BLOCK_ROWS * panels.deepest() + LINE) * sizeof(float));
    if (!buffer.data()) return 1;
    float *const packed_b = line_from(buffer.data());
    for (int64_t pass = 0; pass < panels.passes; ++pass) {
        Stored stored = panels.packed(packed_b, pass);
        if (in_place) {
            const float *const b = reinterpret_cast<const float *>(s.b.data);
            stored = {b + panels.begin(pass) * s.b.row_stride, s.b.row_stride, PANEL};
        } else {
            parallel::run(shares, [&](int share) {
                pack(s, panels, pass, parallel::share_of(panels.vectors, shares, share), packed_b);
            });
        }
        multiply_pass(s, panels, pass, shares, stored, packed_b + packed);
    }
    return 0;
}

// A factor b (depth, columns) that is packed once for the products of many matrices, one after the other.
struct PackedFactor {
    int64_t columns, depth, bias;
    Panels panels;
    const memory::Buffer buffer;

    PackedFactor(Factor b, int64_t bias, int64_t columns, int64_t depth, int64_t threads)
        : columns(columns), depth(depth), bias(bias), panels(args(1, 1)),
          buffer((panels.floats(depth) + LINE) * sizeof(float)) {
        GemmArgs s = args(1, threads);
        s.b = b;
        if (!ok() || columns == 0) return;
        const int shares = parallel::shares_for(threads, panels.vectors, columns * depth);
        parallel::run(shares, [&](int share) {
            for (int64_t pass = 0; pass < panels.passes; ++pass)
                pack(s, panels, pass, parallel::share_of(panels.vectors, shares, share), packed(pass));
        });
    }
    bool ok() const { return buffer.data() != nullptr; }
    // c (rows, columns) = a (rows, depth) times b, plus the bias, or added to c; both with stride 1 along a row.
    void multiply(int64_t rows, int64_t threads, const float *a, int64_t a_stride, float *c, int64_t c_stride,
                  bool accumulate = false) const {
        GemmArgs s = args(rows, threads);
        s.accumulate = accumulate, s.a = {reinterpret_cast<int64_t>(a), a_stride, 1}, s.bias = bias;
        s.c = reinterpret_cast<int64_t>(c), s.c_stride = c_stride;
        for (int64_t pass = 0; rows && columns && pass < panels.passes; ++pass)
            multiply_pass(s, panels, pass, shares_of_product(s, panels), panels.packed(packed(pass), pass), nullptr);
    }

  private:
    GemmArgs args(int64_t rows, int64_t threads) const {
        GemmArgs s{};
        s.rows = rows, s.columns = columns, s.depth = depth, s.threads = threads;
        return s;
    }
    float *packed(int64_t pass) const { return line_from(buffer.data()) + panels.floats(panels.begin(pass)); }
};

// A contiguous weight (columns, depth), transposed.
struct PackedWeight : PackedFactor {
    PackedWeight(int64_t weight, int64_t bias, int64_t columns, int64_t depth, int64_t threads)
        : PackedFactor({weight, 1, depth}, bias, columns, depth, threads) {}
};

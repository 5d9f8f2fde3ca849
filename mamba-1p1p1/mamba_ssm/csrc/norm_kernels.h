// Residual addition and normalisation on CPU vectors, a row at a time, in float32. Included inside an instruction set's
// namespace (see each_isa.h).

template <class T, class Use> VEC void for_row(const T *row, int64_t size, Use use) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) use(i, load(row + i));
    if (i < size) use(i, load_partial(row + i, int(size - i)));
}

// use(index, vector) for each vector of a row of any dtype, zero behind its end.
template <class Use> VEC void for_row(const Rows &rows, int64_t row, int64_t size, Use use) {
    const int64_t first = row * rows.stride;
    if (rows.dtype == FLOAT32) for_row(reinterpret_cast<const float *>(rows.data) + first, size, use);
    if (rows.dtype == BFLOAT16) for_row(reinterpret_cast<const bfloat16 *>(rows.data) + first, size, use);
    if (rows.dtype == FLOAT16) for_row(reinterpret_cast<const float16 *>(rows.data) + first, size, use);
}

template <class T> VEC void store_row(T *to, int64_t size, const float *row) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(to + i, load(row + i));
    if (i < size) store_partial(to + i, load(row + i), int(size - i));
}
inline void store_row(const Rows &rows, int64_t row, int64_t size, const float *values) {
    const int64_t first = row * rows.stride;
    if (!rows.data) return;
    if (rows.dtype == FLOAT32) store_row(reinterpret_cast<float *>(rows.data) + first, size, values);
    if (rows.dtype == BFLOAT16) store_row(reinterpret_cast<bfloat16 *>(rows.data) + first, size, values);
    if (rows.dtype == FLOAT16) store_row(reinterpret_cast<float16 *>(rows.data) + first, size, values);
}

VEC int64_t padded(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

// weight and bias, zero behind the end of the row, so that whole vectors of them can be read.
inline void load_parameters(const NormArgs &s, float *weight, float *bias) {
    std::memset(weight, 0, padded(s.size) * sizeof(float)), std::memset(bias, 0, padded(s.size) * sizeof(float));
    std::memcpy(weight, reinterpret_cast<const float *>(s.weight), s.size * sizeof(float));
    if (s.bias) std::memcpy(bias, reinterpret_cast<const float *>(s.bias), s.size * sizeof(float));
}

// A vector of a row of any dtype, zero behind its end.
VEC V vector_of(const Rows &rows, int64_t row, int64_t i, int64_t size) {
    const int64_t at = row * rows.stride + i;
    const int count = int(std::min<int64_t>(LANES, size - i));
    if (rows.dtype == FLOAT32) return load_some(reinterpret_cast<const float *>(rows.data) + at, count);
    if (rows.dtype == BFLOAT16) return load_some(reinterpret_cast<const bfloat16 *>(rows.data) + at, count);
    return load_some(reinterpret_cast<const float16 *>(rows.data) + at, count);
}
// The row itself if whole vectors of float32 can be written to it, else `scratch`, from where store_row takes them.
VEC float *row_or(const Rows &rows, int64_t row, int64_t size, float *scratch) {
    const bool whole = rows.data && rows.dtype == FLOAT32 && size % LANES == 0;
    return whole ? reinterpret_cast<float *>(rows.data) + row * rows.stride : scratch;
}

// `scratch` is for two rows, whole vectors long.
inline void forward_row(const NormArgs &s, int64_t row, const float *weight, const float *bias, float *scratch) {
    const int64_t size = s.size, vectors = padded(size);
    float *const total = row_or(s.total, row, size, scratch), *const out = row_or(s.out, row, size, scratch + vectors);
    V sums = set(0.f);
    for (int64_t i = 0; i < vectors; i += LANES) {
        V x = vector_of(s.x, row, i, size);
        if (s.residual.data) x = x + vector_of(s.residual, row, i, size);
        store(total + i, x);
        sums = sums + x;
    }
    const float mean = s.rms ? 0.f : sum(sums) / float(size);
    V squares = set(0.f);
    const V center = set(mean);
    for (int64_t i = 0; i + LANES <= size; i += LANES) {
        V x = load(total + i) - center;
        squares = fma(x, x, squares);
    }
    float square = sum(squares);
    for (int64_t i = size / LANES * LANES; i < size; ++i) square += (total[i] - mean) * (total[i] - mean);
    const float scale = 1.f / std::sqrt(square / float(size) + float(s.eps_value()));
    const V factor = set(scale);
    for (int64_t i = 0; i < vectors; i += LANES)
        store(out + i, fma((load(total + i) - center) * factor, load(weight + i), load(bias + i)));
    if (total == scratch) store_row(s.total, row, size, total);
    if (out == scratch + vectors) store_row(s.out, row, size, out);
    reinterpret_cast<float *>(s.mean)[row] = mean;
    reinterpret_cast<float *>(s.scale)[row] = scale;
}

// normal and grad are scratch rows; dweight and dbias the share's sums.
inline void backward_row(const NormArgs &s, int64_t row, const float *weight, float *normal, float *grad, float *dweight,
                         float *dbias) {
    const int64_t size = s.size, vectors = padded(size);
    const V mean = set(reinterpret_cast<const float *>(s.mean)[row]);
    const V scale = set(reinterpret_cast<const float *>(s.scale)[row]);
    for_row(s.total, row, size, [&](int64_t i, V x) { store(normal + i, (x - mean) * scale); });
    V along = set(0.f), whole = set(0.f);
    for_row(s.dout, row, size, [&](int64_t i, V dout) {  // dout is zero behind the end of the row
        V x = load(normal + i), g = dout * load(weight + i);
        store(grad + i, g);
        store(dweight + i, fma(dout, x, load(dweight + i)));
        store(dbias + i, load(dbias + i) + dout);
        along = fma(g, x, along), whole = whole + g;
    });
    const V share = set(sum(along) / float(size)), shift = s.rms ? set(0.f) : set(sum(whole) / float(size));
    for (int64_t i = 0; i < vectors; i += LANES)
        store(grad + i, (load(grad + i) - load(normal + i) * share - shift) * scale);
    if (s.dtotal.data) for_row(s.dtotal, row, size, [&](int64_t i, V x) { store(grad + i, load(grad + i) + x); });
    store_row(s.dx, row, size, grad);
    store_row(s.dresidual, row, size, grad);
}

// Forward if s.out is there, else backward. Not zero where there was no memory.
inline int norm(const NormArgs &s) {
    const int64_t row = padded(s.size);
    // what a row costs, in the steps of parallel.h; backward the sums over rows depend on the shares
    const int64_t steps_a_vector = s.out.data ? 16 : 2;
    const int shares = parallel::shares_for(s.threads, s.rows, s.rows * s.size / LANES * steps_a_vector);
    float *const scratch = static_cast<float *>(std::calloc((2 + 4 * shares) * row, sizeof(float)));
    if (!scratch) return 1;
    float *const weight = scratch, *const bias = scratch + row, *const own = scratch + 2 * row;
    load_parameters(s, weight, bias);
    parallel::run(shares, [&](int share) {
        float *rows = own + share * 4 * row;
        const parallel::Range range = parallel::share_of(s.rows, shares, share);
        for (int64_t i = range.begin; i < range.end; ++i) {
            if (s.out.data) forward_row(s, i, weight, bias, rows);
            else backward_row(s, i, weight, rows, rows + row, rows + 2 * row, rows + 3 * row);
        }
    });
    for (int64_t i = 0; s.dx.data && i < s.size; ++i) {
        float dweight = 0.f, dbias = 0.f;
        for (int share = 0; share < shares; ++share)
            dweight += own[(share * 4 + 2) * row + i], dbias += own[(share * 4 + 3) * row + i];
        reinterpret_cast<float *>(s.dweight)[i] = dweight;
        if (s.dbias) reinterpret_cast<float *>(s.dbias)[i] = dbias;
    }
    std::free(scratch);
    return 0;
}

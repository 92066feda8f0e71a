/* Products of activations with weights of type T: included once per type, with T and NAME(x) defined.
 *
 * `product` is x W^T for weights whose inputs lie side by side (linear layers, queries with keys); `combine` is x W for
 * weights whose outputs do (the convolution, probabilities with values). Both sum in fp32.
 */

#define WEIGHTS 64 /* rows of a weight that one item of work covers */
#define AHEAD 4096 /* bytes that the weights of a convolution are fetched ahead */
#define TOKENS 96  /* tokens whose activations are gone through together: they stay in the second-level cache */

#if T_IS_BF16 && defined(__AVX512BF16__)
#define STEP 32
INLINE vf NAME(dot)(vf sum_, const T* a, const T* b) {
    __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
    return (vf)_mm512_dpbf16_ps((__m512)sum_, (__m512bh)x, (__m512bh)y);
}
#else
#define STEP LANES
INLINE vf NAME(dot)(vf sum_, const T* a, const T* b) { return sum_ + NAME(load)(a) * NAME(load)(b); }
#endif

/* The values of `count` lanes; the others are zero. */
INLINE vf NAME(load_part)(const T* p, long count) {
    T held[LANES] = {0};
    memcpy(held, p, count * sizeof(T));
    return NAME(load)(held);
}
INLINE void NAME(store_part)(T* p, vf v, long count) {
    T held[LANES];
    NAME(store)(held, v);
    memcpy(p, held, count * sizeof(T));
}
/* Up to LANES values from x, as far as `left` goes: odd widths end in a part. */
INLINE vf NAME(get)(const T* p, long left) { return left >= LANES ? NAME(load)(p) : NAME(load_part)(p, left); }
INLINE void NAME(put)(T* p, vf v, long left) {
    if (left >= LANES) NAME(store)(p, v);
    else NAME(store_part)(p, v, left);
}
INLINE vf NAME(round)(vf v) {
#if T_IS_BF16
    return (vf)(rounded_bf16(v) << 16);
#else
    return v;
#endif
}

/* The sum of products from `i` on. */
static float NAME(rest)(const T* a, const T* b, long i, long k) {
    vf sums = splat(0);
    for (; i + STEP <= k; i += STEP) sums = NAME(dot)(sums, a + i, b + i);
    float total = sum(sums);
    for (; i < k; i++) total += NAME(to)(a[i]) * NAME(to)(b[i]);
    return total;
}

/* Four weight rows for m <= TILE tokens: the fewest loads per product. ahead: what to fetch meanwhile, or NULL. */
INLINE void NAME(tile)(
    const T* const* x, int m, const T* w, long ldw, long k, float* out, long ldo, const T* ahead
) {
    vf sums[TILE][4];
    UNROLL for (int t = 0; t < m; t++)
        UNROLL for (int r = 0; r < 4; r++) sums[t][r] = splat(0);
    long i = 0;
    for (; i + STEP <= k; i += STEP) {
        if (ahead)
            UNROLL for (int r = 0; r < 4; r++)
                __builtin_prefetch(ldw == k ? ahead + 4 * i + r * STEP : ahead + r * ldw + i, 0, 2);
        UNROLL for (int t = 0; t < m; t++)
            UNROLL for (int r = 0; r < 4; r++) sums[t][r] = NAME(dot)(sums[t][r], x[t] + i, w + r * ldw + i);
    }
    UNROLL for (int t = 0; t < m; t++) {
        f4 totals = sum4(sums[t][0], sums[t][1], sums[t][2], sums[t][3]);
        if (i < k)
            for (int r = 0; r < 4; r++) totals[r] += NAME(rest)(x[t], w + r * ldw, i, k);
        memcpy(out + t * ldo, &totals, sizeof totals);
    }
}

static void NAME(tiles)(
    const T* const* x, long m, const T* w, long ldw, long k, float* out, long ldo, const T* ahead
) {
    switch (m) {
#define CASE(M) case M: NAME(tile)(x, M, w, ldw, k, out, ldo, ahead); break;
        CASE(1) CASE(2) CASE(3)
#if TILE > 3
        CASE(4) CASE(5) CASE(6)
#endif
#undef CASE
    }
}

/* out[t * ldo + r] = x[t] . w[r]: m tokens, n weight rows of k values. */
static void NAME(product)(
    const T* const* x, long m, const T* w, long ldw, long n, long k, float* out, long ldo
) {
    long r = 0;
    for (; r + 4 <= n; r += 4)
        for (long t = 0; t < m; t += TILE) {
            const T* ahead = t ? NULL : w + (r + 4) * ldw; /* main memory answers after about 100 ns */
            NAME(tiles)(x + t, least(TILE, m - t), w + r * ldw, ldw, k, out + t * ldo + r, ldo, ahead);
        }
    for (; r < n; r++)
        for (long t = 0; t < m; t++) out[t * ldo + r] = NAME(rest)(x[t], w + r * ldw, 0, k);
}

/* `vectors` of outputs for m <= TILE tokens. */
INLINE void NAME(columns)(
    const float* x, long ldx, int m, const T* w, long ldw, int vectors, long k, float* out, long ldo, int add
) {
    vf sums[TILE][8];
    UNROLL for (int t = 0; t < m; t++)
        UNROLL for (int c = 0; c < vectors; c++) sums[t][c] = add ? load_f32(out + t * ldo + c * LANES) : splat(0);
    for (long i = 0; i < k; i++) {
        UNROLL for (int c = 0; c < vectors; c++) {
            const T* p = w + i * ldw + c * LANES;
            __builtin_prefetch((const char*)p + AHEAD, 0, 3);
            vf weight = NAME(load)(p);
            UNROLL for (int t = 0; t < m; t++) sums[t][c] += weight * x[t * ldx + i];
        }
    }
    UNROLL for (int t = 0; t < m; t++)
        UNROLL for (int c = 0; c < vectors; c++) store_f32(out + t * ldo + c * LANES, sums[t][c]);
}
/* Fewer outputs than a vector has lanes. */
static void NAME(few_columns)(
    const float* x, long ldx, long m, const T* w, long ldw, long k, long n, float* out, long ldo, int add
) {
    for (long t = 0; t < m; t++) {
        vf total = splat(0);
        for (long i = 0; i < k; i++) total += NAME(load_part)(w + i * ldw, n) * x[t * ldx + i];
        for (long c = 0; c < n; c++) out[t * ldo + c] = total[c] + (add ? out[t * ldo + c] : 0);
    }
}

/* out[t * ldo + c] (+)= sum_i x[t * ldx + i] w[i * ldw + c]: m <= TILE tokens, k inputs, n outputs. */
static void NAME(combine)(
    const float* x, long ldx, long m, const T* w, long ldw, long k, long n, float* out, long ldo, int add
) {
    long c = 0;
    while (n - c >= LANES) {
        const long left = (n - c) / LANES; /* few tokens leave registers to read longer pieces of each row */
        const int vectors = left >= 8 && m <= TILE / 2 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        switch (m * 16 + vectors) {
#define CASE(M, V) case M * 16 + V: NAME(columns)(x, ldx, M, w + c, ldw, V, k, out + c, ldo, add); break;
#define CASES(M) CASE(M, 1) CASE(M, 2) CASE(M, 4)
            CASES(1) CASES(2) CASES(3) CASE(1, 8)
#if TILE > 3
            CASES(4) CASES(5) CASES(6) CASE(2, 8) CASE(3, 8)
#endif
#undef CASES
#undef CASE
        }
        c += vectors * LANES;
    }
    if (c < n) NAME(few_columns)(x, ldx, m, w + c, ldw, k, n - c, out + c, ldo, add);
}

/* y [M, N] = x [M, K] w [N, K]^T + bias, of any strides, shared by the team. No barrier. */
static void NAME(linear)(
    Team* team, const T* x, long ldx, long m, const T* w, const T* bias, long n, long k, T* y, long ldy, int activation
) {
    long chunk = least(WEIGHTS, most(4, parts(n, 4 * team->threads) * 4));
    float sums[TOKENS * WEIGHTS];
    const T* rows[TOKENS];
    ITEMS(team, item, parts(n, chunk)) {
        long first = item * chunk, count = least(chunk, n - first);
        for (long begin = 0; begin < m; begin += TOKENS) {
            long tokens = least(TOKENS, m - begin);
            for (long t = 0; t < tokens; t++) rows[t] = x + (begin + t) * ldx;
            NAME(product)(rows, tokens, w + first * k, k, count, k, sums, WEIGHTS);
            for (long t = 0; t < tokens; t++)
                for (long r = 0; r < count; r += LANES) {
                    vf v = load_f32(sums + t * WEIGHTS + r);
                    if (bias) v += NAME(get)(bias + first + r, count - r);
                    if (activation) v = gelu_f(NAME(round)(v));
                    NAME(put)(y + (begin + t) * ldy + first + r, v, count - r);
                }
        }
    }
}
#undef STEP

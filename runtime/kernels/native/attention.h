/* Attention of the slots over the cached keys and over each other; included once per type. */

#define ROWS 24 /* query rows of one KV head that share a pass over its keys */
#define KEYS 64 /* keys of one block */

/* Whether row `slot` sees key `j`: a cached row below the length, or a slot behind it. */
INLINE int NAME(sees)(const Step* step, long window, long length, long slot, long j) {
    long other = j - length, position = j;
    if (other >= 0) {
        if (step->visible ? !step->visible[slot * step->slots + other] : other > slot) return 0;
        position = length + step->offsets[other];
    }
    return !window || length + step->offsets[slot] - position < window;
}

/* `count` rows (slot first / repeat and following, heads of a KV head side by side) over keys `from` to `to`. */
static void NAME(attend_block)(
    const Step* step, long window, long b, long first, long count, long repeat, const T* const* queries, const T* keys,
    const T* values, long ld, long width, long from, long to, float* highest, float* total, float* out
) {
    float scores[ROWS * KEYS];
    long length = step->lengths[b], n = to - from;
    float scale = 1 / sqrtf(width);
    NAME(product)(queries, count, keys + from * ld, ld, n, width, scores, KEYS);
    for (long i = 0; i < count; i++) {
        float *row = scores + i * KEYS, top = highest[i];
        long slot = (first + i) / repeat;
        if (window || to > length)
            for (long j = 0; j < n; j++)
                if (!NAME(sees)(step, window, length, slot, from + j)) row[j] = -INFINITY;
        for (long j = n; j < parts(n, LANES) * LANES; j++) row[j] = -INFINITY;
        vf tops = splat(-INFINITY);
        for (long j = 0; j < n; j += LANES) {
            vf v = load_f32(row + j);
            tops = select_f(v > tops, v, tops);
        }
        for (int lane = 0; lane < LANES; lane++) top = fmaxf(top, tops[lane] * scale);
        vf sum_ = splat(0);
        for (long j = 0; j < n; j += LANES) {
            vf p = exp_f(load_f32(row + j) * scale - top);
            store_f32(row + j, p);
            sum_ += p;
        }
        if (top > highest[i]) {
            float shrink = expf(highest[i] - top);
            total[i] *= shrink;
            for (long d = 0; d < width && shrink; d++) out[i * width + d] *= shrink;
            highest[i] = top;
        }
        total[i] += sum(sum_);
    }
    for (long i = 0; i < count; i += TILE)
        NAME(combine)(
            scores + i * KEYS, KEYS, least(TILE, count - i), values + from * ld, ld, n, width, out + i * width, width, 1
        );
}

/* query [N, Hq, D] -> out [N, Hq * D]. window 0: none. */
static void NAME(attention)(
    Team* team, const Step* step, const Sizes* sizes, const T* query, const T* keys, const T* values, long window, T* out
) {
    long width = sizes->head_dim, groups = sizes->kv_heads, heads = sizes->query_heads, repeat = heads / groups;
    long all = step->slots * repeat, tiles = parts(all, ROWS), ld = groups * width;
    float sums[ROWS * width], highest[ROWS], total[ROWS];
    const T* queries[ROWS];
    ITEMS(team, item, step->batch * groups * tiles) {
        long b = item / (groups * tiles), g = item / tiles % groups, first = item % tiles * ROWS;
        long count = least(ROWS, all - first), length = step->lengths[b];
        long low = first / repeat, high = (first + count - 1) / repeat; /* the slots of these rows */
        const T* key = keys + (b * step->capacity * groups + g) * width;
        const T* value = values + (b * step->capacity * groups + g) * width;
        long earliest = window ? length : 0;
        for (long i = 0; i < count; i++) {
            long slot = (first + i) / repeat;
            queries[i] = query + ((b * step->slots + slot) * heads + g * repeat + (first + i) % repeat) * width;
            highest[i] = -1e30f, total[i] = 0;
            if (window) earliest = least(earliest, most(0, length + step->offsets[slot] - window + 1));
        }
        memset(sums, 0, sizeof sums);
        for (long from = earliest; from < length; from += KEYS)
            NAME(attend_block)(
                step, window, b, first, count, repeat, queries, key, value, ld, width, from, least(length, from + KEYS),
                highest, total, sums
            );
        long end = step->visible ? step->slots : high + 1, block = step->visible ? LANES : KEYS;
        for (long from = 0; from < end; from += block) {
            long to = least(end, from + block), seen = !step->visible;
            for (long slot = low; slot <= high && !seen; slot++)
                for (long other = from; other < to; other++) seen |= step->visible[slot * step->slots + other];
            if (seen)
                NAME(attend_block)(
                    step, window, b, first, count, repeat, queries, key, value, ld, width, length + from, length + to,
                    highest, total, sums
                );
        }
        for (long i = 0; i < count; i++) {
            long at = queries[i] - query; /* queries and outputs lie alike */
            for (long d = 0; d < width; d += LANES)
                NAME(put)(out + at + d, get_f32(sums + i * width + d, width - d) / total[i], width - d);
        }
    }
}

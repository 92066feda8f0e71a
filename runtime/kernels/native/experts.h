/* The experts over tokens sorted by `sort_tokens`; included once per type. */

/* inner [N, I] = silu(gate) * up of each token's expert. */
static void NAME(gate_up)(
    Team* team, const Sizes* sizes, const T* x, const Buffers* at, const T* weights, T* inner
) {
    const int32_t *order = at->order, *first = at->first, *hit = at->hit;
    long hits = count_hit(at, sizes->experts), hidden = sizes->hidden, width = sizes->width, chunk = WEIGHTS / 2, each = parts(width, chunk);
    float gate[TOKENS * WEIGHTS], up[TOKENS * WEIGHTS];
    const T* rows[TOKENS];
    ITEMS(team, item, hits * each) {
        long expert = hit[item / each], from = item % each * chunk, count = least(chunk, width - from);
        const T* w = weights + (expert * 2 * width + from) * hidden;
        for (long begin = first[expert]; begin < first[expert + 1]; begin += TOKENS) {
            long tokens = least(TOKENS, first[expert + 1] - begin);
            for (long t = 0; t < tokens; t++) rows[t] = x + order[begin + t] * hidden;
            NAME(product)(rows, tokens, w, hidden, count, hidden, gate, WEIGHTS);
            NAME(product)(rows, tokens, w + width * hidden, hidden, count, hidden, up, WEIGHTS);
            for (long t = 0; t < tokens; t++)
                for (long r = 0; r < count; r += LANES) {
                    vf v = NAME(round)(silu_f(NAME(round)(load_f32(gate + t * WEIGHTS + r))));
                    v *= NAME(round)(load_f32(up + t * WEIGHTS + r));
                    NAME(put)(inner + order[begin + t] * width + from + r, v, count - r);
                }
        }
    }
}

/* out [N, H] = inner W_down * probability; rows of the skip expert are zero. */
static void NAME(down)(
    Team* team, const Sizes* sizes, const T* inner, const Buffers* at, const T* weights, const T* probability, T* out
) {
    const int32_t *order = at->order, *first = at->first, *hit = at->hit;
    long hits = count_hit(at, sizes->experts), hidden = sizes->hidden, width = sizes->width, each = parts(hidden, WEIGHTS);
    float sums[TOKENS * WEIGHTS];
    const T* rows[TOKENS];
    ITEMS(team, item, hits * each + 1) {
        if (item == hits * each) {
            for (long i = first[sizes->experts]; i < first[sizes->experts + 1]; i++)
                memset(out + order[i] * hidden, 0, hidden * sizeof(T));
            continue;
        }
        long expert = hit[item / each], from = item % each * WEIGHTS, count = least(WEIGHTS, hidden - from);
        for (long begin = first[expert]; begin < first[expert + 1]; begin += TOKENS) {
            long tokens = least(TOKENS, first[expert + 1] - begin);
            for (long t = 0; t < tokens; t++) rows[t] = inner + order[begin + t] * width;
            NAME(product)(
                rows, tokens, weights + (expert * hidden + from) * width, width, count, width, sums, WEIGHTS
            );
            for (long t = 0; t < tokens; t++)
                for (long r = 0; r < count; r += LANES) {
                    vf v = NAME(round)(load_f32(sums + t * WEIGHTS + r)) * NAME(to)(probability[order[begin + t]]);
                    NAME(put)(out + order[begin + t] * hidden + from + r, v, count - r);
                }
        }
    }
}

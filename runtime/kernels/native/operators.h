/* The operators of one layer for weights and activations of type T, each called by all threads of a team.
 *
 * What a reference rounds to T between two torch operators is rounded here, so that both choose the same experts.
 * None of them ends with a barrier.
 */

/* residual [N, H] = (table[token] + bias) * scale */
static void NAME(embed)(
    Team* team, const int64_t* tokens, long n, long hidden, const T* table, const T* bias, const T* scale, float* residual
) {
    ITEMS(team, t, n) {
        const T* row = table + tokens[t] * hidden;
        for (long i = 0; i < hidden; i += LANES) {
            vf v = NAME(round)(NAME(get)(row + i, hidden - i) + NAME(get)(bias + i, hidden - i));
            v = NAME(round)(v * NAME(get)(scale + i, hidden - i));
            put_f32(residual + t * hidden + i, v, hidden - i);
        }
    }
}

/* x / sqrt(mean(x^2) + eps), rounded, for one row. The output may be the input. */
static void NAME(norm_row)(const T* x, long n, float eps, const T* weight, T* out) {
    vf squares = splat(0);
    for (long i = 0; i < n; i += LANES) {
        vf v = NAME(get)(x + i, n - i);
        squares += v * v;
    }
    float inverse = 1 / sqrtf(sum(squares) / n + eps);
    for (long i = 0; i < n; i += LANES) {
        vf v = NAME(round)(NAME(get)(x + i, n - i) * inverse);
        NAME(put)(out + i, v * NAME(get)(weight + i, n - i), n - i);
    }
}

/* residual = (constant + branch * branch_scale) + residual * residual_scale, in place; normed = its norm. */
static void NAME(residual_norm)(
    Team* team, const T* branch, float* residual, const float* const* scaling, const T* weight, float eps, long n,
    long hidden, T* normed
) {
    ITEMS(team, t, n) {
        float* row = residual + t * hidden;
        T* out = normed + t * hidden;
        for (long i = 0; i < hidden; i += LANES) {
            long left = hidden - i;
            vf v = get_f32(row + i, left);
            if (branch) {
                vf sum_ = get_f32(scaling[0] + i, left);
                sum_ += NAME(get)(branch + t * hidden + i, left) * get_f32(scaling[1] + i, left);
                v = sum_ + v * get_f32(scaling[2] + i, left);
                put_f32(row + i, v, left);
            }
            NAME(put)(out + i, v, left);
        }
        NAME(norm_row)(out, hidden, eps, weight, out);
    }
}

/* The column before the convolution of slot s, tap j: a cached one, or that of a slot of this forward. */
static const T* NAME(tap)(
    const Step* step, const Sizes* sizes, const T* projected, long width, const T* columns, long column, long b, long s,
    long j
) {
    long from = step->taps[s * (sizes->history + 1) + j];
    if (from >= sizes->history) return projected + (b * step->slots + from - sizes->history) * width;
    long entry = (step->lengths[b] - sizes->history + from) % step->ring;
    if (entry < 0) entry += step->ring;
    return columns + (b * (step->ring + 1) + entry) * column;
}

/* A convolved head [D], its mean residual, norm, temperature and rotation -> out [D] */
static void NAME(cca_head)(
    const Sizes* sizes, const float* convolved, const T* bias, const T* own, long head, const float* temperature,
    const T* cos_, const T* sin_, const int64_t* swap, T* out
) {
    long width = sizes->head_dim, queries = sizes->query_heads, repeat = queries / sizes->kv_heads;
    int is_key = head >= queries;
    long group = is_key ? head - queries : head / repeat;
    const T* key = own + (queries + group) * width;
    const T* first = own + (is_key ? group * repeat : head) * width;
    long count = is_key ? repeat : 1;
    T held[width + LANES];
    vf squares = splat(0);
    for (long d = 0; d < width; d += LANES) {
        long left = width - d;
        vf mean = splat(0);
        for (long h = 0; h < count; h++) mean += NAME(get)(first + h * width + d, left);
        mean = NAME(round)((mean * (1.0f / count) + NAME(get)(key + d, left)) * 0.5f);
        vf v = NAME(round)(get_f32(convolved + d, left) + NAME(get)(bias + d, left));
        v = NAME(round)(v + mean);
        NAME(put)(held + d, v, left);
        v = NAME(get)(held + d, left);
        squares += v * v;
    }
    float inverse = 1 / sqrtf(sum(squares) / width + 1e-14f);
    for (long d = 0; d < width; d += LANES) {
        vf v = NAME(round)(NAME(get)(held + d, width - d) * inverse);
        NAME(put)(held + d, is_key ? v * temperature[group] : v, width - d);
    }
    for (long d = 0; d < width; d++) {
        float turned = NAME(to)(NAME(from)(NAME(to)(held[d]) * NAME(to)(cos_[d])));
        out[d] = NAME(from)(turned + NAME(to)(held[swap[d]]) * NAME(to)(sin_[d]));
    }
}

/* Queries [N, Hq, D]; keys and values of the slots go into the cache. Reads the ring, does not write it. */
static void NAME(cca)(
    Team* team, const Step* step, const Sizes* sizes, const T* projected, const T* convolution, const T* bias,
    const float* temperature, T* keys, T* values, const T* columns, const T* cos_, const T* sin_, const int64_t* swap,
    T* query
) {
    long width = sizes->head_dim, queries = sizes->query_heads, groups = sizes->kv_heads, heads = queries + groups;
    long channels = heads * width, half = groups * width / 2, row = channels + 2 * half;
    long taps = sizes->history + 1, inputs = taps * width, n = step->batch * step->slots;
    float gathered[TILE * inputs + LANES], convolved[TILE * width + LANES];
    ITEMS(team, item, (heads + 1) * parts(n, TILE)) {
        long head = item % (heads + 1), begin = item / (heads + 1) * TILE, count = least(TILE, n - begin);
        for (long t = 0; t < count && head < heads; t++)
            for (long j = 0; j < taps; j++) {
                long b = (begin + t) / step->slots, s = (begin + t) % step->slots;
                const T* from = NAME(tap)(step, sizes, projected, row, columns, row - half, b, s, j) + head * width;
                float* to = gathered + t * inputs + j * width;
                for (long d = 0; d < width; d += LANES) put_f32(to + d, NAME(get)(from + d, width - d), width - d);
            }
        if (head < heads)
            NAME(combine)(
                gathered, inputs, count, convolution + head * inputs * width, width, inputs, width, convolved, width, 0
            );
        for (long t = 0; t < count; t++) {
            long b = (begin + t) / step->slots, s = (begin + t) % step->slots;
            const T* own = projected + (begin + t) * row;
            long place = (b * step->capacity + step->lengths[b] + s) * groups * width;
            if (head == heads) { /* the value: half of it of this token, half of the one before */
                memcpy(values + place, own + channels + half, half * sizeof(T));
                const T* before = NAME(tap)(step, sizes, projected, row, columns, row - half, b, s, taps - 2);
                memcpy(values + place + half, before + channels, half * sizeof(T));
                continue;
            }
            long position = step->lengths[b] + step->offsets[s];
            T* out = head < queries ? query + ((begin + t) * queries + head) * width
                                    : keys + place + (head - queries) * width;
            NAME(cca_head)(
                sizes, convolved + t * width, bias + head * width, own, head, temperature, cos_ + position * width,
                sin_ + position * width, swap, out
            );
        }
    }
}

/* The committed columns into the ring, the last ones where it cannot hold all: after all of `cca` has read it. */
static void NAME(keep)(
    Team* team, const Step* step, const T* projected, long width, long column, T* columns
) {
    long first = most(0, step->committed - step->ring), count = step->committed - first;
    ITEMS(team, item, step->batch * count) {
        long b = item / count, s = first + item % count, entry = (step->lengths[b] + s) % step->ring;
        const T* from = projected + (b * step->slots + s) * width;
        memcpy(columns + (b * (step->ring + 1) + entry) * column, from, column * sizeof(T));
    }
}

/* The router behind its down-projection `own` [N, R]: state, norm, two layers and the choice. state may be `before`. */
static void NAME(route)(
    Team* team, long n, const Sizes* sizes, T* state, const T* before, const T* scale, const T* norm, float eps,
    const T* fc1, const T* fc1_bias, const T* fc2, const T* fc2_bias, const T* out, const float* balancing,
    const int32_t* active, int32_t* chosen, T* probability
) {
    long width = sizes->router, classes = sizes->experts + 1;
    T first[TILE * width + LANES], second[TILE * width + LANES], logits[TILE * classes + LANES];
    float scores[classes + LANES];
    ITEMS(team, item, parts(n, TILE)) {
        long begin = item * TILE, count = least(TILE, n - begin);
        for (long t = 0; t < count; t++) {
            T* own = state + (begin + t) * width;
            if (before)
                for (long i = 0; i < width; i += LANES) {
                    vf past = NAME(get)(before + (begin + t) * width + i, width - i);
                    vf v = NAME(get)(own + i, width - i) + past * NAME(get)(scale + i, width - i);
                    NAME(put)(own + i, v, width - i);
                }
            NAME(norm_row)(own, width, eps, norm, first + t * width);
        }
        Shared shared = {0};
        Team alone = {&shared, 0, 1, 0};
        NAME(linear)(&alone, first, width, count, fc1, fc1_bias, width, width, second, width, 1);
        end_phase(&alone);
        NAME(linear)(&alone, second, width, count, fc2, fc2_bias, width, width, first, width, 1);
        end_phase(&alone);
        NAME(linear)(&alone, first, width, count, out, NULL, classes, width, logits, classes, 0);
        for (long t = 0; t < count; t++) {
            float highest = -INFINITY, total = 0, best = -INFINITY;
            for (long c = 0; c < classes; c++) highest = fmaxf(highest, NAME(to)(logits[t * classes + c]));
            for (long c = 0; c < classes; c++) total += scores[c] = expf(NAME(to)(logits[t * classes + c]) - highest);
            long found = 0;
            for (long c = 0; c < classes; c++) {
                scores[c] = NAME(to)(NAME(from)(scores[c] / total));
                if (scores[c] + balancing[c] > best) best = scores[c] + balancing[c], found = c;
            }
            probability[begin + t] = NAME(from)(scores[found]);
            chosen[begin + t] = active && begin + t >= *active ? classes - 1 : found;
        }
    }
}

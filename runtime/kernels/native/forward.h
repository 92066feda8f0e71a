/* What Python calls, once per type: each operator alone, and a whole forward in one call. */

void NAME(run_embed)(
    int threads, const int64_t* tokens, long n, long hidden, const T* table, const T* bias, const T* scale, float* residual
) {
    WITH_TEAM(threads, NAME(embed)(team, tokens, n, hidden, table, bias, scale, residual));
}

void NAME(run_residual_norm)(
    int threads, const T* branch, float* residual, const float* constant, const float* branch_scale,
    const float* residual_scale, const T* weight, float eps, long n, long hidden, T* normed
) {
    const float* scaling[] = {constant, branch_scale, residual_scale};
    WITH_TEAM(threads, NAME(residual_norm)(team, branch, residual, scaling, weight, eps, n, hidden, normed));
}

void NAME(run_linear)(int threads, const T* x, long m, const T* w, const T* bias, long n, long k, T* y) {
    WITH_TEAM(threads, NAME(linear)(team, x, k, m, w, bias, n, k, y, n, 0));
}

/* Multiplications below which starting and joining threads costs more than they save. */
#define WORTH_THREADS 2000000

static void NAME(one_cca)(Team* team, const Step* step, const Sizes* sizes, const Layer* w, const T* projected, T* query) {
    long width = sizes->head_dim, group = sizes->kv_heads * width, channels = sizes->query_heads * width + group;
    long column = channels + group / 2, place = step->row * step->capacity * group;
    T* columns = (T*)w->columns + step->row * (step->ring + 1) * column;
    NAME(cca)(
        team, step, sizes, projected, w->convolution, w->convolution_bias, w->temperature, (T*)w->keys + place,
        (T*)w->values + place, columns, w->cos_, w->sin_, w->swap, query
    );
    end_phase(team);
    NAME(keep)(team, step, projected, column + group / 2, column, columns);
}
void NAME(run_cca)(int threads, const Step* step, const Sizes* sizes, const Layer* w, const T* projected, T* query) {
    WITH_TEAM(threads, NAME(one_cca)(team, step, sizes, w, projected, query));
}

static void NAME(one_attention)(Team* team, const Step* step, const Sizes* sizes, const Layer* w, const T* query, T* out) {
    long place = step->row * step->capacity * sizes->kv_heads * sizes->head_dim;
    NAME(attention)(team, step, sizes, query, (const T*)w->keys + place, (const T*)w->values + place, w->window, out);
}
void NAME(run_attention)(int threads, const Step* step, const Sizes* sizes, const Layer* w, const T* query, T* out) {
    WITH_TEAM(threads, NAME(one_attention)(team, step, sizes, w, query, out));
}

static void NAME(one_router)(
    Team* team, const Sizes* sizes, const Layer* w, float eps, long n, const T* x, const T* before, T* state,
    const int32_t* active, int32_t* chosen, T* probability
) {
    NAME(linear)(team, x, sizes->hidden, n, w->router, w->router_bias, sizes->router, sizes->hidden, state, sizes->router, 0);
    end_phase(team);
    NAME(route)(
        team, n, sizes, state, before, w->state_scale, w->router_norm, eps, w->fc1, w->fc1_bias, w->fc2, w->fc2_bias,
        w->classes, w->balancing, active, chosen, probability
    );
}
void NAME(run_router)(
    int threads, const Sizes* sizes, const Layer* w, float eps, long n, const T* x, const T* before, T* state,
    const int32_t* active, int32_t* chosen, T* probability
) {
    WITH_TEAM(threads, NAME(one_router)(team, sizes, w, eps, n, x, before, state, active, chosen, probability));
}

static void NAME(one_experts)(
    Team* team, const Sizes* sizes, const Layer* w, const Buffers* at, long n, const T* x, const int32_t* chosen,
    const T* probability, T* out
) {
    ITEMS(team, item, 1) sort_tokens(chosen, n, sizes->experts, at);
    end_phase(team);
    NAME(gate_up)(team, sizes, x, at, w->gate_up, at->inner);
    end_phase(team);
    NAME(down)(team, sizes, at->inner, at, w->down, probability, out);
}
void NAME(run_experts)(
    int threads, const Sizes* sizes, const Layer* w, const Buffers* at, long n, const T* x, const int32_t* chosen,
    const T* probability, T* out
) {
    WITH_TEAM(threads, NAME(one_experts)(team, sizes, w, at, n, x, chosen, probability, out));
}

/* Wait until all is done, and count the time since the last mark to an operator. */
static void NAME(mark)(Team* team, int64_t* nanoseconds, int operator, int64_t* last) {
    end_phase(team);
    if (!nanoseconds || team->thread) return;
    int64_t now = clock_nanoseconds();
    nanoseconds[operator] += now - *last;
    *last = now;
}

static void NAME(all_layers)(
    Team* team, const Model* model, const Step* step, const Buffers* at, const int64_t* tokens, T* out, int32_t* routes,
    int64_t* nanoseconds
) {
    const Sizes* sizes = &model->sizes;
    long n = step->batch * step->slots, hidden = sizes->hidden, query = sizes->query_heads * sizes->head_dim;
    long projected = query + 2 * sizes->kv_heads * sizes->head_dim;
    int64_t last = nanoseconds ? clock_nanoseconds() : 0;
    NAME(embed)(team, tokens, n, hidden, model->table, model->bias, model->scale, at->residual);
    NAME(mark)(team, nanoseconds, EMBEDDING, &last);
    NAME(residual_norm)(team, NULL, at->residual, NULL, model->first_norm, model->eps, n, hidden, at->normed);
    NAME(mark)(team, nanoseconds, NORMS, &last);
    for (long i = 0; i < model->layers; i++) {
        const Layer* w = model->layer + i;
        int32_t* chosen = routes + i * n;
        T *state = i % 2 ? at->other_state : at->state, *before = i % 2 ? at->state : at->other_state;
        NAME(linear)(team, at->normed, hidden, n, w->qkv, NULL, projected, hidden, at->projected, projected, 0);
        NAME(mark)(team, nanoseconds, QKV, &last);
        NAME(one_cca)(team, step, sizes, w, at->projected, at->query);
        NAME(mark)(team, nanoseconds, CCA, &last);
        NAME(one_attention)(team, step, sizes, w, at->query, at->attended);
        NAME(mark)(team, nanoseconds, ATTENTION, &last);
        NAME(linear)(team, at->attended, query, n, w->output, NULL, hidden, query, at->branch, hidden, 0);
        NAME(mark)(team, nanoseconds, OUTPUT, &last);
        NAME(residual_norm)(
            team, at->branch, at->residual, w->middle_scaling, w->middle_norm, model->eps, n, hidden, at->normed
        );
        NAME(mark)(team, nanoseconds, NORMS, &last);
        NAME(one_router)(
            team, sizes, w, model->router_eps, n, at->normed, i ? before : NULL, state, step->active, chosen, at->share
        );
        NAME(mark)(team, nanoseconds, ROUTER, &last);
        NAME(one_experts)(team, sizes, w, at, n, at->normed, chosen, at->share, at->branch);
        NAME(mark)(team, nanoseconds, EXPERTS, &last);
        NAME(residual_norm)(
            team, at->branch, at->residual, w->end_scaling, w->end_norm, model->eps, n, hidden,
            i + 1 == model->layers ? out : at->normed
        );
        NAME(mark)(team, nanoseconds, NORMS, &last);
    }
}

/* out [N, hidden], behind the last norm; routes [layers, N]. nanoseconds [OPERATORS] is added to, or NULL.
 * Returns 0, or what it refuses to read: 1 for an unknown token, 2 for slots that do not fit the cache.
 */
int NAME(forward)(
    int threads, const Model* model, const Step* step, const Buffers* at, const int64_t* tokens, T* out, int32_t* routes,
    int64_t* nanoseconds
) {
    long n = step->batch * step->slots;
    for (long t = 0; t < n; t++)
        if (tokens[t] < 0 || tokens[t] >= model->sizes.vocabulary) return 1;
    for (long b = 0; b < step->batch; b++)
        if (step->lengths[b] < 0 || step->lengths[b] + step->slots > step->capacity) return 2;
    if (n * model->products < WORTH_THREADS) threads = 1;
    WITH_TEAM(threads, NAME(all_layers)(team, model, step, at, tokens, out, routes, nanoseconds));
    return 0;
}

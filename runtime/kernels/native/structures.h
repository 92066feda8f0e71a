/* What a forward is given; forward.py fills the same structures through ctypes, field by field. */
#ifndef STRUCTURES_H
#define STRUCTURES_H

#include <stdint.h>

typedef struct {
    int64_t hidden, query_heads, kv_heads, head_dim, experts, width, router, history, vocabulary;
} Sizes;

/* One forward of N = batch * slots tokens, row-major [batch, slots]. */
typedef struct {
    int64_t batch, slots, capacity, ring, committed;
    int64_t row;                             /* the cache row of the first sequence */
    const int32_t *lengths, *offsets, *taps; /* [batch], [slots], [slots, history + 1] */
    const int8_t* visible;                   /* [slots, slots], or NULL: causal */
    const int32_t* active;                   /* tokens from here on are padding, or NULL */
} Step;

/* scaling: constant, scale of the branch, scale of the residual. Of what a pointer's type is not said, it is T. */
typedef struct {
    const void *qkv, *convolution, *convolution_bias, *output;
    const float* temperature;
    const void *cos_, *sin_;
    const int64_t* swap;
    const float* middle_scaling[3];
    const void* middle_norm;
    const float* end_scaling[3];
    const void* end_norm;
    const void *router, *router_bias, *state_scale, *router_norm, *fc1, *fc1_bias, *fc2, *fc2_bias, *classes;
    const float* balancing;
    const void *gate_up, *down;
    void *keys, *values, *columns;
    int64_t window; /* 0: none */
} Layer;

typedef struct {
    Sizes sizes;
    int64_t layers, products; /* products: multiplications per token, by which threads are worth their start */
    const Layer* layer;
    const void *table, *bias, *scale, *first_norm;
    float eps, router_eps;
} Model;

/* Memory for what one operator leaves to the next, of at least N tokens. */
typedef struct {
    float* residual;                           /* [N, hidden] */
    void *normed, *branch;                     /* [N, hidden] */
    void *projected, *query, *attended;        /* [N, qkv], [N, query heads * head_dim] twice */
    void *state, *other_state, *inner, *share; /* [N, router] twice, [N, width], [N] */
    int32_t *order, *first, *hit;              /* [N], [experts + 2], [experts] */
} Buffers;

enum { EMBEDDING, NORMS, QKV, CCA, ATTENTION, OUTPUT, ROUTER, EXPERTS, OPERATORS };
#endif

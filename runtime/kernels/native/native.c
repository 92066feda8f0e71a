/* The operators of the fused forward for CPUs, for weights in fp32 and bf16. */
#include "simd.h"
#include "structures.h"

static int64_t clock_nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Tokens by expert: `order`; where each expert's begin: `first` [E + 2]; the experts that have any: `hit`, ended by -1. */
static void sort_tokens(const int32_t* chosen, long n, long experts, const Buffers* at) {
    int32_t *first = at->first, *hit = at->hit;
    memset(first, 0, (experts + 2) * sizeof *first);
    for (long t = 0; t < n; t++) first[chosen[t] + 1]++;
    for (long e = 0; e < experts; e++)
        if (first[e + 1]) *hit++ = e;
    *hit = -1;
    for (long e = 0; e <= experts; e++) first[e + 1] += first[e];
    for (long t = 0; t < n; t++) at->order[first[chosen[t]]++] = t;
    for (long e = experts + 1; e > 0; e--) first[e] = first[e - 1];
    first[0] = 0;
}
/* Bounded, for a thread that comes late reads what the next layer is writing, before it finds its phase over. */
static long count_hit(const Buffers* at, long experts) {
    long count = 0;
    while (count < experts && at->hit[count] >= 0) count++;
    return count;
}

#define T float
#define NAME(x) x##_f32
#define T_IS_BF16 0
#include "products.h"
#include "operators.h"
#include "attention.h"
#include "experts.h"
#include "forward.h"
#undef T
#undef NAME
#undef T_IS_BF16

#define T bf16
#define NAME(x) x##_bf16
#define T_IS_BF16 1
#include "products.h"
#include "operators.h"
#include "attention.h"
#include "experts.h"
#include "forward.h"

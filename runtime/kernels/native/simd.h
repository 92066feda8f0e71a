/* Vectors, their sums and functions, and sharing work among threads: nothing here depends on the weights' type. */
#ifndef SIMD_H
#define SIMD_H

#include <math.h>
#include <omp.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

/* TILE tokens by 4 outputs are summed at once: as many accumulators as the registers hold beside what is loaded. */
#if defined(__AVX512F__)
#define LANES 16
#define TILE 6
#else
#define LANES 8
#define TILE 3
#endif
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef float half_vf __attribute__((vector_size(2 * LANES)));
typedef float f4 __attribute__((vector_size(16)));
typedef uint16_t bf16;

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t i4 __attribute__((vector_size(16)));
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (i4){i, j, k, l})
#endif

INLINE vf splat(float x) { return (vf){0} + x; }
INLINE vf select_f(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

INLINE vf load_f32(const float* p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
INLINE void store_f32(float* p, vf v) { memcpy(p, &v, sizeof v); }

INLINE vf load_bf16(const bf16* p) {
    vh half;
    memcpy(&half, p, sizeof half);
    return (vf)(__builtin_convertvector(half, vu) << 16);
}

/* To the nearest, ties to even. A NaN stays one: rounding must not carry its mantissa into the exponent. */
INLINE vu rounded_bf16(vf v) {
    vu bits = (vu)v;
    vu nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = (vu)(v != v);
    return (nan & ((bits >> 16) | 0x40)) | (~nan & nearest);
}
INLINE void store_bf16(bf16* p, vf v) {
    vh half = __builtin_convertvector(rounded_bf16(v), vh);
    memcpy(p, &half, sizeof half);
}

INLINE float to_f32(float x) { return x; }
INLINE float from_f32(float x) { return x; }
INLINE float to_bf16(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
INLINE bf16 from_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? (bf16)(bits >> 16 | 0x40) : (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* The sum of four neighbours: 16 or 8 lanes to 4. */
INLINE f4 quarter(vf v) {
    union { vf whole; half_vf halves[2]; } first = {v};
    union { half_vf whole; f4 parts[LANES / 8]; } second = {first.halves[0] + first.halves[1]};
#if LANES == 16
    return second.parts[0] + second.parts[1];
#else
    return second.parts[0];
#endif
}
INLINE float sum(vf v) {
    f4 a = quarter(v);
    return (a[0] + a[2]) + (a[1] + a[3]);
}
/* The sums of four vectors, side by side. */
INLINE f4 sum4(vf a, vf b, vf c, vf d) {
    f4 p = quarter(a), q = quarter(b), r = quarter(c), s = quarter(d);
    f4 pq = SHUFFLE(p, q, 0, 1, 4, 5) + SHUFFLE(p, q, 2, 3, 6, 7);
    f4 rs = SHUFFLE(r, s, 0, 1, 4, 5) + SHUFFLE(r, s, 2, 3, 6, 7);
    return SHUFFLE(pq, rs, 0, 2, 4, 6) + SHUFFLE(pq, rs, 1, 3, 5, 7);
}

/* e^x within 2 units in the last place; 0 below -87. */
INLINE vf exp_f(vf x) {
    vf bounded = select_f(x > splat(88.0f), splat(88.0f), select_f(x < splat(-87.0f), splat(-87.0f), x));
    vf magic = splat(12582912.0f), n = bounded * 1.44269504f + magic;
    vi exponent = (vi)n - (vi)magic;
    n -= magic;
    vf r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return select_f(x < splat(-87.0f), splat(0), (vf)((vi)p + (exponent << 23)));
}

/* x * Phi(x). Abramowitz and Stegun 7.1.26: erf within 1.5e-7. */
INLINE vf gelu_f(vf x) {
    vf z = x * 0.70710678f, size = (vf)((vi)z & 0x7fffffff), t = 1.0f / (size * 0.3275911f + 1.0f);
    vf p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = (p * t + 0.254829592f) * t;
    vf erf = 1.0f - p * exp_f(-z * z);
    return x * 0.5f * (select_f(x < splat(0), -erf, erf) + 1.0f);
}
INLINE vf silu_f(vf x) { return x / (exp_f(-x) + 1.0f); }

/* Threads share the items of a phase: whoever is free takes the next, and a phase is over when all are done. Nobody waits
 * for a thread that does nothing: one that the system has put aside finds its phases over, and catches up.
 */
typedef struct {
    uint64_t state; /* the phase, and in the lower half its next item */
    char apart[120];
    long done; /* of this phase's items */
} Shared;
typedef struct {
    Shared* shared;
    int thread, threads;
    uint64_t phase; /* in which this thread is */
} Team;

/* An item of this phase, or `count` when all are taken. What a phase reads to find its items is right while it lasts. */
INLINE long take(Team* team, long count) {
    uint64_t state = __atomic_load_n(&team->shared->state, __ATOMIC_ACQUIRE), following = (team->phase + 1) << 32;
    if (count == 0 && state == team->phase << 32)
        __atomic_compare_exchange_n(&team->shared->state, &state, following, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    while (state >> 32 == team->phase && (long)(uint32_t)state < count)
        if (__atomic_compare_exchange_n(
                &team->shared->state, &state, state + 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE
            ))
            return (uint32_t)state;
    return count;
}
INLINE void finish(Team* team, long count) {
    if (__atomic_add_fetch(&team->shared->done, 1, __ATOMIC_ACQ_REL) < count) return;
    __atomic_store_n(&team->shared->done, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&team->shared->state, (team->phase + 1) << 32, __ATOMIC_RELEASE);
}
INLINE void end_phase(Team* team) {
    for (int tries = 0; __atomic_load_n(&team->shared->state, __ATOMIC_ACQUIRE) >> 32 <= team->phase; tries++) {
        if (tries > 2000) sched_yield();
#if defined(__x86_64__)
        else __builtin_ia32_pause();
#endif
    }
    team->phase++;
}
#define ITEMS(team, item, count)                                                      \
    for (long count_ = (count), item = take(team, count_); item < count_;             \
         finish(team, count_), item = take(team, count_))
#define WITH_TEAM(count, ...)                                                            \
    do {                                                                                 \
        Shared shared = {0};                                                             \
        int wanted = (count);                                                            \
        if (wanted <= 1) {                                                               \
            Team team_ = {&shared, 0, 1, 0}, *team = &team_;                             \
            __VA_ARGS__;                                                                 \
        } else {                                                                         \
            _Pragma("omp parallel num_threads(wanted)") {                                \
                Team team_ = {&shared, omp_get_thread_num(), omp_get_num_threads(), 0};  \
                Team* team = &team_;                                                     \
                __VA_ARGS__;                                                             \
            }                                                                            \
        }                                                                                \
    } while (0)

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long most(long a, long b) { return a > b ? a : b; }
INLINE long parts(long count, long size) { return (count + size - 1) / size; }
#endif

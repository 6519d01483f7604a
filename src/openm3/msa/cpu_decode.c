/* Decode over pages on a CPU: attention and block scores of single queries, every key and value read once.
 *
 * Work comes as items, each some of a token's blocks, which threads take one after the other: what an item gives does
 * not depend on who computes it. Vectors are 16 floats wide on every machine; the compiler makes the machine's own
 * out of them. Queries come four at a time, one product's keys being read once for all of them (cpu_decode.py pads).
 * Plain C without Python's headers, called through ctypes.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__) && defined(__linux__)
#define CLONES __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

enum { WIDTH = 16, GROUP = 4, MAX_BLOCK = 256, AHEAD = 64 /* rows read into the cache ahead of their use */ };

typedef float vec __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef uint32_t words __attribute__((vector_size(4 * WIDTH), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH), aligned(2)));

/* Strides are in values. `bf16`: what the pages hold, else float32. Items: parts, within heads, within tokens. */
typedef struct {
    const float *q;           /* [tokens, heads, group, dim], scaled; group a multiple of GROUP, dim of WIDTH */
    const void *k, *v;        /* [pages, heads, block, dim] */
    const int32_t *table;     /* [tokens, width] */
    const int32_t *blocks;    /* [index_heads, tokens, slots], ascending, -1 last; or NULL for all of the context */
    const int64_t *positions; /* [tokens]: the last key that is visible */
    float *out, *top, *total; /* attention: [items, group, dim], and the softmax's maximum and sum [items, group] */
    float *scores;            /* block scores: [tokens, group, slots] */
    int64_t tokens, heads, group, dim, block, slots, part, index_heads, width, pages, table_stride, bf16;
    int64_t k_page, k_head, k_row, v_page, v_head, v_row;
} Problem;

INLINE vec load(const void *values, int64_t at, int bf16) {
    if (!bf16) return *(const vec *)((const float *)values + at);
    return (vec)(__builtin_convertvector(*(const halves *)((const uint16_t *)values + at), words) << 16);
}

INLINE const void *row(const void *values, int64_t at, int bf16) { return (const char *)values + at * (bf16 ? 2 : 4); }

/* The sums of 16 vectors side by side: each step adds the halves of two vectors and puts the results beside another. */
INLINE vec sums(const vec x[16]) {
    vec a[8], b[4], c[2];
    UNROLL for (int i = 0; i < 8; i++)
        a[i] = __builtin_shufflevector(x[i], x[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               __builtin_shufflevector(x[i], x[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    UNROLL for (int i = 0; i < 4; i++)
        b[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    UNROLL for (int i = 0; i < 2; i++)
        c[i] = __builtin_shufflevector(b[i], b[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               __builtin_shufflevector(b[i], b[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return __builtin_shufflevector(c[0], c[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           __builtin_shufflevector(c[0], c[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

INLINE float sum(vec x) {
    float total = 0.0f;
    UNROLL for (int i = 0; i < 4; i++) total += (x[i] + x[i + 4]) + (x[i + 8] + x[i + 12]);
    return total;
}

/* e^x for x <= 0, to two units in the last place; 0 below -87. Cephes' coefficients. */
INLINE vec exponential(vec x) {
    const float rounds = 12582912.0f; /* 1.5 * 2^23: what is added to it becomes a whole number */
    ints gone = x < -87.0f; /* what is not a number stays that */
    x = (vec)((ints)x & ~gone);
    vec whole = (x * 1.44269504f + rounds) - rounds;
    vec r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    vec p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = ((p * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r + 1.6666665459e-1f;
    p = (p * r + 0.5f) * r * r + r + 1.0f;
    vec found = p * (vec)((__builtin_convertvector(whole, ints) + 127) << 23);
    return (vec)((ints)found & ~gone);
}

INLINE void ahead(const void *values, int64_t at, int64_t dim, int bf16) {
    for (int64_t x = 0; x < dim; x += bf16 ? 32 : 16) __builtin_prefetch(row(values, at + x, bf16), 0, 2);
}

/* scores[g][i] = <q[g], key i> of `count` keys; up to three numbers behind the last are written too. */
INLINE void dots(const float *q, int64_t dim, const void *keys, int64_t stride, int64_t count, int bf16,
                 float (*scores)[MAX_BLOCK]) {
    for (int64_t i = 0; i < count; i += 4) {
        vec products[4 * GROUP] = {0};
        UNROLL for (int n = 0; n < 4; n++) ahead(keys, (i + n + AHEAD) * stride, dim, bf16);
        for (int64_t x = 0; x < dim; x += WIDTH) UNROLL for (int n = 0; n < 4; n++) {
            vec key = load(keys, (i + n < count ? i + n : i) * stride + x, bf16);
            UNROLL for (int g = 0; g < GROUP; g++) products[4 * g + n] += key * *(const vec *)(q + g * dim + x);
        }
        vec found = sums(products);
        UNROLL for (int n = 0; n < 4 * GROUP; n++) scores[n / 4][i + n % 4] = found[n];
    }
}

/* out[g] += sum of weights[g][i] * value i, in `columns` vectors of the head. */
INLINE void add_columns(float (*weights)[MAX_BLOCK], const void *values, int64_t stride, int64_t count, int64_t dim,
                        int bf16, int columns, float *out) {
    vec total[GROUP][4];
    UNROLL for (int g = 0; g < GROUP; g++) UNROLL for (int y = 0; y < columns; y++)
        total[g][y] = *(vec *)(out + g * dim + y * WIDTH);
    for (int64_t i = 0; i < count; i++) {
        ahead(values, (i + AHEAD) * stride, columns * WIDTH, bf16);
        UNROLL for (int y = 0; y < columns; y++) {
            vec value = load(values, i * stride + y * WIDTH, bf16);
            UNROLL for (int g = 0; g < GROUP; g++) total[g][y] += weights[g][i] * value;
        }
    }
    UNROLL for (int g = 0; g < GROUP; g++) UNROLL for (int y = 0; y < columns; y++)
        *(vec *)(out + g * dim + y * WIDTH) = total[g][y];
}

INLINE void add_values(float (*weights)[MAX_BLOCK], const void *values, int64_t stride, int64_t count, int64_t dim,
                       int bf16, float *out) {
    int64_t x = 0;
    for (; x + 4 * WIDTH <= dim; x += 4 * WIDTH)
        add_columns(weights, row(values, x, bf16), stride, count, dim, bf16, 4, out + x);
    for (; x < dim; x += WIDTH) add_columns(weights, row(values, x, bf16), stride, count, dim, bf16, 1, out + x);
}

/* Softmax so far: scores of `count` keys become weights relative to the largest score ever, and what was summed before
 * is brought to that. */
INLINE void weigh(float *scores, int64_t count, int64_t dim, float *top, float *total, float *out) {
    float best = *top;
    for (int64_t i = 0; i < count; i++) best = scores[i] > best ? scores[i] : best;
    for (int64_t i = count; i % WIDTH; i++) scores[i] = -INFINITY;
    if (best > *top) {
        float before = expf(*top - best);
        *total *= before;
        for (int64_t x = 0; x < dim; x++) out[x] *= before;
        *top = best;
    }
    vec weights = {0};
    for (int64_t i = 0; i < count; i += WIDTH) {
        vec weight = exponential(*(vec *)(scores + i) - best);
        *(vec *)(scores + i) = weight;
        weights += weight;
    }
    *total += sum(weights);
}

/* The slot's block and how many of its keys are visible, 0 where there is none; -1 for a page that there is not. */
INLINE int64_t visible(const Problem *p, const int32_t *chosen, int64_t token, int64_t slot, int64_t *page) {
    int64_t block = chosen ? chosen[slot] : slot, count = p->positions[token] + 1 - block * p->block;
    if (block < 0 || count <= 0) return 0;
    if (block >= p->width) return -1;
    *page = p->table[token * p->table_stride + block];
    if (*page < 0 || *page >= p->pages) return -1;
    return count < p->block ? count : p->block;
}

INLINE int attend(const Problem *p, int64_t item, int bf16) {
    int64_t parts = (p->slots + p->part - 1) / p->part, pair = item / parts, token = pair / p->heads;
    int64_t head = pair % p->heads, first = item % parts * p->part, dim = p->dim;
    int64_t last = first + p->part < p->slots ? first + p->part : p->slots;
    const int32_t *chosen = p->blocks;
    if (chosen) chosen += (head * p->index_heads / p->heads * p->tokens + token) * p->slots;
    float *top = p->top + item * p->group, *total = p->total + item * p->group, *out = p->out + item * p->group * dim;
    for (int64_t g = 0; g < p->group; g++) top[g] = -INFINITY, total[g] = 0.0f;
    for (int64_t x = 0; x < p->group * dim; x++) out[x] = 0.0f;
    for (int64_t slot = first; slot < last; slot++) {
        int64_t page, count = visible(p, chosen, token, slot, &page);
        if (count < 0) return 1;
        if (count == 0) continue;
        const void *k = row(p->k, page * p->k_page + head * p->k_head, bf16);
        const void *v = row(p->v, page * p->v_page + head * p->v_head, bf16);
        for (int64_t g = 0; g < p->group; g += GROUP) {
            float weights[GROUP][MAX_BLOCK];
            dots(p->q + (pair * p->group + g) * dim, dim, k, p->k_row, count, bf16, weights);
            for (int n = 0; n < GROUP; n++)
                weigh(weights[n], count, dim, top + g + n, total + g + n, out + (g + n) * dim);
            add_values(weights, v, p->v_row, count, dim, bf16, out + g * dim);
        }
    }
    return 0;
}

INLINE int score(const Problem *p, int64_t item, int bf16) {
    int64_t parts = (p->slots + p->part - 1) / p->part, token = item / parts, first = item % parts * p->part;
    int64_t last = first + p->part < p->slots ? first + p->part : p->slots;
    for (int64_t slot = first; slot < last; slot++) {
        int64_t page, count = visible(p, NULL, token, slot, &page);
        if (count < 0) return 1;
        for (int64_t g = 0; g < p->group; g += GROUP) {
            float found[GROUP][MAX_BLOCK];
            if (count)
                dots(p->q + (token * p->group + g) * p->dim, p->dim, row(p->k, page * p->k_page, bf16), p->k_row, count,
                     bf16, found);
            for (int n = 0; n < GROUP; n++) {
                float best = -INFINITY;
                for (int64_t i = 0; i < count; i++) best = found[n][i] > best ? found[n][i] : best;
                p->scores[(token * p->group + g + n) * p->slots + slot] = best;
            }
        }
    }
    return 0;
}

/* Items that threads take one after the other, each the next. `failed`: a table names a page that is not there. */
typedef struct {
    const Problem *problem;
    int64_t items, next, failed;
} Work;

#define ITEMS(name, one)                                                                            \
    CLONES void name(Work *work) {                                                                  \
        const Problem *p = work->problem;                                                           \
        for (;;) {                                                                                  \
            int64_t item = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);                    \
            if (item >= work->items || work->failed) return;                                        \
            int failed = p->bf16 ? one(p, item, 1) : one(p, item, 0); /* compiled for each of the two */ \
            if (failed) work->failed = 1;                                                           \
        }                                                                                           \
    }

ITEMS(openm3_decode_attention, attend)
ITEMS(openm3_block_scores, score)

/* Callers compare it with their own: a library built from another revision is not used. */
int64_t openm3_decode_bytes(void) { return sizeof(Problem) + sizeof(Work); }

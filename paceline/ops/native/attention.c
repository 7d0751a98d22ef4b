// Rotary embedding with the write to the cache, and paged attention.

#include <math.h>

#include "kernels.h"

enum { KEYS = PANEL, ROWS = 96, MAX_PANELS = 4 };  // keys at once, rows (queries x heads of a group) at once, dim / 64

typedef struct {  // AttentionBatch
    const int32_t *page_table, *context_lens, *query_starts, *branch_starts, *tree_mask;  // tree_mask may be null
    index_t num_requests, table_width, page_size, tree_words, hides_first, num_before;
} batch_t;

// ---- rotary embedding

static void rotate(const bf16 *x, const float *table, index_t dim, bf16 *out) {
    const index_t half = dim / 2;
    for (index_t i = 0; i < half; i += LANES) {
        const mask_t mask = lanes(half - i);
        const vec cosine = load_floats(table + i, mask), sine = load_floats(table + half + i, mask);
        const vec low = load(x + i, mask), high = load(x + half + i, mask);
        store(out + i, mask, multiply_add(-high, sine, low * cosine));
        store(out + half + i, mask, multiply_add(low, sine, high * cosine));
    }
}

// See paceline.ops.rope. qkv is overwritten where heads are normalised.
void rope_and_cache(bf16 *qkv, const float *table, const int64_t *positions, const int64_t *locations, bf16 *keys,
                    bf16 *values, const bf16 *query_norm, const bf16 *key_norm, float eps, bf16 *queries,
                    index_t tokens, index_t heads, index_t kv_heads, index_t dim, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens > 4)
    for (index_t token = 0; token < tokens; token++) {
        bf16 *row = qkv + token * (heads + 2 * kv_heads) * dim;
        const float *angles = table + positions[token] * dim;
        const index_t place = locations[token] * kv_heads * dim;
        for (index_t head = 0; head < heads + kv_heads; head++) {
            bf16 *x = row + head * dim;
            if (query_norm) normalise(x, head < heads ? query_norm : key_norm, eps, dim, x);
            rotate(x, angles, dim, head < heads ? queries + (token * heads + head) * dim : keys + place + (head - heads) * dim);
        }
        memcpy(values + place, row + (heads + kv_heads) * dim, kv_heads * dim * sizeof(bf16));
    }
}

// ---- attention: a block of queries of one request and one key head, over its keys 64 at a time
//
// Blocks of keys begin at multiples of 64 of the request's own places, and what a query does not see adds exactly nothing,
// so its bits depend neither on the other queries nor, where nothing branches, on how many there are.

typedef struct {
    left_t query[ROWS * MAX_PANELS * PANEL], weights[ROWS * KEYS];
    bf16 keys[MAX_PANELS * PANEL / 2 * PAIR], values[MAX_PANELS * KEYS / 2 * PAIR];
    float scores[ROWS * KEYS], output[MAX_PANELS * ROWS * PANEL], total[ROWS * LANES], most[ROWS];
    uint64_t seen[ROWS];
} __attribute__((aligned(64))) workspace_t;

// Keys and values of `count` locations as panels: keys [dim / 2][64 keys][2], values [64 keys / 2][64 of dim][2].
static void gather(const bf16 *const *keys, const bf16 *const *values, index_t count, index_t dim, workspace_t *work) {
    for (index_t group = 0; group < KEYS; group += LANES)
        for (index_t i = 0; i < dim; i += 2 * LANES) {
            ints x[LANES];
#pragma GCC unroll 16
            for (int key = 0; key < LANES; key++)
                x[key] = group + key < count ? load_ints(keys[group + key] + i) : (ints){0};
            transpose(x);
#pragma GCC unroll 16
            for (int pair = 0; pair < LANES; pair++) store_ints(work->keys + (i / 2 + pair) * PAIR + 2 * group, x[pair]);
        }
    for (index_t key = 0; key < KEYS; key += 2)
        for (index_t i = 0; i < dim; i += 2 * LANES) {
            const ints a = key < count ? load_ints(values[key] + i) : (ints){0};
            const ints b = key + 1 < count ? load_ints(values[key + 1] + i) : (ints){0};
            interleave(a, b, work->values + (i / PANEL * KEYS / 2 + key / 2) * PAIR + 2 * (i % PANEL));
        }
}

static inline uint64_t below(index_t bit) { return bit <= 0 ? 0 : bit >= 64 ? ~0ull : (1ull << bit) - 1; }

// 64 bits of a query's tree mask from bit `begin` on, which may be negative.
static inline uint64_t tree_bits(const batch_t *batch, index_t query, index_t begin) {
    const uint32_t *words = (const uint32_t *)batch->tree_mask + query * batch->tree_words;
    uint64_t bits = 0;
    for (index_t word = 0; word < batch->tree_words; word++) {
        const index_t shift = 32 * word - begin;
        if (shift >= 64 || shift <= -32) continue;
        bits |= shift >= 0 ? (uint64_t)words[word] << shift : (uint64_t)words[word] >> -shift;
    }
    return bits;
}

// Weights of one row's 64 scores, in bfloat16; its maximum, total and output so far are brought to the new maximum.
static void softmax(workspace_t *work, index_t row, float scale, index_t panels) {
    const uint64_t seen = work->seen[row];
    left_t *weights = work->weights + row * KEYS;
    if (!seen) {
        memset(weights, 0, KEYS * sizeof(left_t));
        return;
    }
    vec score[PARTS], most = all(work->most[row]), total = load_floats(work->total + row * LANES, lanes(LANES));
    for (int part = 0; part < PARTS; part++) {
        score[part] = load_floats(work->scores + row * KEYS + part * LANES, lanes(LANES)) * all(scale);
        most = larger_where(seen >> LANES * part, most, score[part]);
    }
    const float before = work->most[row], now = most_of(most);
    if (now > before) {
        const vec factor = power_of_two(all(before - now));
        total *= factor;
        for (index_t panel = 0; panel < panels; panel++)
            for (int part = 0; part < PARTS; part++) {
                float *place = work->output + (panel * ROWS + row) * PANEL + part * LANES;
                store_floats(place, load_floats(place, lanes(LANES)) * factor);
            }
        work->most[row] = now;
    }
    for (int part = 0; part < PARTS; part++) {
        const vec weight = only_where(seen >> LANES * part, power_of_two(score[part] - all(now)));
        total += weight;
        store_left(weights + part * LANES, weight);
    }
    store_floats(work->total + row * LANES, total);
}

// Queries [first, last) of a request (counted from its root) and the `group` heads of one key head.
static void attend(const batch_t *batch, index_t request, index_t first, index_t last, index_t kv_head, index_t group,
                   index_t kv_heads, index_t dim, const bf16 *query, const bf16 *keys, const bf16 *values, float scale,
                   bf16 *output, workspace_t *work) {
    const index_t panels = (dim + PANEL - 1) / PANEL, rows = (last - first) * group, groups = (rows + TILE - 1) / TILE;
    const index_t context = batch->context_lens[request], root = batch->query_starts[request];
    const int32_t *pages = batch->page_table + request * batch->table_width;
    const index_t heads = group * kv_heads, all_queries = batch->query_starts[request + 1] - root;
    const index_t before = context + batch->num_before, length = before + (batch->tree_mask ? all_queries : last);
    for (index_t row = 0; row < rows; row++) {
        const bf16 *from = query + ((root + first + row / group) * heads + kv_head * group + row % group) * dim;
        copy_left(work->query + row * dim, from, dim);
        work->most[row] = -1e30f;
    }
    memset(work->total, 0, rows * LANES * sizeof(float));
    for (index_t panel = 0; panel < panels; panel++)
        memset(work->output + panel * ROWS * PANEL, 0, rows * PANEL * sizeof(float));
    if (dim % PANEL) memset(work->values, 0, sizeof(work->values));  // columns that no value fills
    for (index_t begin = 0; begin < length; begin += KEYS) {
        const index_t count = least(KEYS, length - begin);
        const bf16 *key[KEYS], *value[KEYS];
        for (index_t i = 0; i < count; i++) {
            const index_t place = begin + i;
            const index_t location = pages[place / batch->page_size] * batch->page_size + place % batch->page_size;
            key[i] = keys + (location * kv_heads + kv_head) * dim;
            value[i] = values + (location * kv_heads + kv_head) * dim;
        }
        gather(key, value, count, dim, work);
        for (index_t row = 0; row < rows; row++) {
            const index_t own = first + row / group, branch = batch->branch_starts[root + own];
            if (batch->tree_mask)
                work->seen[row] =
                    (below(context - begin) | tree_bits(batch, root + own, begin - context)) & below(length - begin);
            else
                work->seen[row] = below(context + 1 - begin) |
                                  (below(context + own + 1 - begin) & ~below(context + branch - begin));
            if (batch->hides_first && begin == 0 && before + own > 0) work->seen[row] &= ~1ull;
        }
        for (index_t each = 0; each < groups; each++) {
            const index_t row = each * rows / groups, end = (each + 1) * rows / groups;
            uint64_t any = 0;
            for (index_t i = row; i < end; i++) any |= work->seen[i];
            if (!any) continue;
            tile(end - row, work->query + row * dim, dim, work->keys, dim / 2, work->scores + row * KEYS, 1, work->keys, 0);
            for (index_t i = row; i < end; i++) softmax(work, i, scale, panels);
            for (index_t panel = 0; panel < panels; panel++)
                tile(end - row, work->weights + row * KEYS, KEYS, work->values + panel * KEYS / 2 * PAIR, KEYS / 2,
                     work->output + (panel * ROWS + row) * PANEL, 0, work->values, 0);
        }
    }
    for (index_t row = 0; row < rows; row++) {
        bf16 *to = output + ((root + first + row / group) * heads + kv_head * group + row % group) * dim;
        const vec share = all(1.0f / sum_of(load_floats(work->total + row * LANES, lanes(LANES))));
        for (index_t i = 0; i < dim; i += LANES) {
            const float *from = work->output + (i / PANEL * ROWS + row) * PANEL + i % PANEL;
            store(to + i, lanes(dim - i), load_floats(from, lanes(LANES)) * share);
        }
    }
}

// See paceline.ops.attention. dim is a multiple of 32 up to 256, a group at most 96 heads.
void paged_attention(const batch_t *batch, const bf16 *query, const bf16 *keys, const bf16 *values, float scale,
                     index_t heads, index_t kv_heads, index_t dim, bf16 *output, int threads) {
    const index_t group = heads / kv_heads, tokens = batch->query_starts[batch->num_requests];
    const index_t share = (tokens + threads - 1) / threads;  // few queries still go to all threads
    const index_t most = least(ROWS / group, share);
    index_t blocks = 0;
    if (tokens == 0) return;
    for (index_t request = 0; request < batch->num_requests; request++)
        blocks += (batch->query_starts[request + 1] - batch->query_starts[request] + most - 1) / most;
    scale *= 1.44269504f;
#pragma omp parallel num_threads(threads)
    {
        workspace_t work;
#pragma omp for schedule(dynamic, 1)
        for (index_t task = 0; task < blocks * kv_heads; task++) {
            index_t block = blocks - 1 - task / kv_heads, request = 0;  // the last see most: begin with them
            for (;; request++) {
                const index_t count = batch->query_starts[request + 1] - batch->query_starts[request];
                const index_t own = (count + most - 1) / most;
                if (block < own) {
                    attend(batch, request, block * count / own, (block + 1) * count / own, task % kv_heads, group, kv_heads,
                           dim, query, keys, values, scale, output, &work);
                    break;
                }
                block -= own;
            }
        }
    }
}

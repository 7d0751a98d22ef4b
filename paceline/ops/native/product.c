// Matrix products with the small work next to them fused in: RMS norm before, bias, gate or residual after.

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "kernels.h"

enum { BLOCK_PAIRS = 1024 };  // of K at once: 256 KB of a panel, which stays in the L2 cache
enum { BLOCK_ROWS = 192 };    // rows of x at once

typedef struct {
    const bf16 *panels;
    const float *bias;  // by panel column, padded; null where there is none
    index_t rows;       // of the weight
    index_t columns;    // of the weight
    index_t gated;      // a panel holds 32 columns of gate, then the same 32 of up
} weight_t;

// ---- packing

// Asks for pages of 2 MB in memory not written before: fewer faults, and reads that run on past 4 KB.
static void use_huge_pages(void *begin, size_t size) {
    const uintptr_t huge = 1 << 21, first = ((uintptr_t)begin + huge - 1) & -huge, last = ((uintptr_t)begin + size) & -huge;
    if (last > first) madvise((void *)first, last - first, MADV_HUGEPAGE);
}

void pack(const bf16 *matrix, bf16 *panels, index_t rows, index_t columns, index_t gated, int threads) {
    const index_t pairs = (columns + 1) / 2, count = gated ? (rows / 2 + 31) / 32 : (rows + PANEL - 1) / PANEL;
    use_huge_pages(panels, count * pairs * PAIR * sizeof(bf16));
#pragma omp parallel for num_threads(threads)
    for (index_t panel = 0; panel < count; panel++) {
        for (index_t column = 0; column < PANEL; column++) {
            index_t row = panel * PANEL + column, end = rows;
            if (gated) {
                row = panel * 32 + column % 32;
                end = rows / 2;
                if (row < end && column >= 32) row += rows / 2, end = rows;
            }
            bf16 *to = panels + panel * pairs * PAIR + 2 * column;
            const bf16 *from = matrix + row * columns;
            for (index_t k = 0; k < 2 * pairs; k++)
                to[k / 2 * PAIR + k % 2] = row < end && k < columns ? from[k] : 0;
        }
    }
}

// ---- a tile: sums [rows, 64] = or += x [rows, 2 * pairs] times a panel

static inline __attribute__((always_inline)) void
multiply(const int rows, const bf16 *x, index_t stride, const bf16 *panel, index_t pairs, float *sums, int fresh,
         const bf16 *ahead, index_t step) {
    __m512 sum[TILE][4];
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++)
            sum[row][part] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + row * PANEL + part * 16);
    for (index_t pair = 0; pair < pairs; pair++) {
        _mm_prefetch((const char *)(ahead + pair * step), _MM_HINT_T1);
        _mm_prefetch((const char *)(ahead + pair * step + step / 2), _MM_HINT_T1);
        const __m512bh w0 = (__m512bh)_mm512_loadu_si512(panel + pair * PAIR);
        const __m512bh w1 = (__m512bh)_mm512_loadu_si512(panel + pair * PAIR + 32);
        const __m512bh w2 = (__m512bh)_mm512_loadu_si512(panel + pair * PAIR + 64);
        const __m512bh w3 = (__m512bh)_mm512_loadu_si512(panel + pair * PAIR + 96);
#pragma GCC unroll 6
        for (int row = 0; row < rows; row++) {
            int both;
            memcpy(&both, x + row * stride + 2 * pair, 4);
            const __m512bh v = (__m512bh)_mm512_set1_epi32(both);
            sum[row][0] = _mm512_dpbf16_ps(sum[row][0], v, w0);
            sum[row][1] = _mm512_dpbf16_ps(sum[row][1], v, w1);
            sum[row][2] = _mm512_dpbf16_ps(sum[row][2], v, w2);
            sum[row][3] = _mm512_dpbf16_ps(sum[row][3], v, w3);
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++) _mm512_storeu_ps(sums + row * PANEL + part * 16, sum[row][part]);
}

void tile(int rows, const bf16 *x, index_t stride, const bf16 *panel, index_t pairs, float *sums, int fresh,
          const bf16 *ahead, index_t step) {
    switch (rows) {
    case 1: multiply(1, x, stride, panel, pairs, sums, fresh, ahead, step); break;
    case 2: multiply(2, x, stride, panel, pairs, sums, fresh, ahead, step); break;
    case 3: multiply(3, x, stride, panel, pairs, sums, fresh, ahead, step); break;
    case 4: multiply(4, x, stride, panel, pairs, sums, fresh, ahead, step); break;
    case 5: multiply(5, x, stride, panel, pairs, sums, fresh, ahead, step); break;
    case 6: multiply(6, x, stride, panel, pairs, sums, fresh, ahead, step); break;
    }
}

// One row of one panel's sums on its way out: bias; then gate, or residual. Rounded wherever the reference rounds.
static void finish(const weight_t *weight, index_t panel, const float *sums, const bf16 *residual, bf16 *out) {
    __m512 value[4];
    for (int part = 0; part < 4; part++) {
        value[part] = _mm512_loadu_ps(sums + part * 16);
        if (weight->bias)
            value[part] = _mm512_add_ps(value[part], _mm512_loadu_ps(weight->bias + panel * PANEL + part * 16));
    }
    if (weight->gated) {
        for (int part = 0; part < 2; part++) {
            const index_t column = panel * 32 + part * 16;
            const __m512 gate = rounded(value[part]), up = rounded(value[part + 2]), one = _mm512_set1_ps(1.0f);
            const __m512 below = _mm512_add_ps(one, power_of_two(_mm512_mul_ps(gate, _mm512_set1_ps(-1.44269504f))));
            const __m512 active = rounded(_mm512_div_ps(gate, below));
            store(out + column, lanes(weight->rows / 2 - column), _mm512_mul_ps(active, up));
        }
        return;
    }
    for (int part = 0; part < 4; part++) {
        const index_t column = panel * PANEL + part * 16;
        const __mmask16 mask = lanes(weight->rows - column);
        if (residual) value[part] = _mm512_add_ps(load(residual + column, mask), rounded(value[part]));
        store(out + column, mask, value[part]);
    }
}

// ---- rows

void normalise(const bf16 *x, const bf16 *factors, float eps, index_t columns, bf16 *out) {
    __m512 squares = _mm512_setzero_ps();
    for (index_t k = 0; k < columns; k += 16) {
        const __m512 value = load(x + k, lanes(columns - k));
        squares = _mm512_fmadd_ps(value, value, squares);
    }
    const __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / columns + eps));
    for (index_t k = 0; k < columns; k += 16) {
        const __mmask16 mask = lanes(columns - k);
        const __m512 value = rounded(_mm512_mul_ps(load(x + k, mask), scale));
        store(out + k, mask, _mm512_mul_ps(value, load(factors + k, mask)));
    }
}

// x as the tiles read it: normalised where there is a norm, padded to whole pairs
static void prepare(const bf16 *x, const bf16 *norm, float eps, index_t columns, bf16 *out) {
    if (columns % 2) out[columns] = 0;
    if (norm) normalise(x, norm, eps, columns, out);
    else memcpy(out, x, columns * sizeof(bf16));
}

// Rows [from, to) by one panel; sums has room for BLOCK_ROWS rows.
static void panel_by_rows(const weight_t *weight, index_t panel, const bf16 *x, index_t stride, index_t from, index_t to,
                          const bf16 *residual, bf16 *out, float *sums) {
    const index_t pairs = stride / 2, width = weight->gated ? weight->rows / 2 : weight->rows;
    const index_t count = to - from, groups = (count + TILE - 1) / TILE;
    for (index_t begin = 0; begin < pairs; begin += BLOCK_PAIRS) {
        const index_t length = least(BLOCK_PAIRS, pairs - begin);
        const index_t step = PAIR / least(groups, 4);
        const bf16 *block = weight->panels + (panel * pairs + begin) * PAIR;
        for (index_t group = 0; group < groups; group++) {
            const index_t row = group * count / groups, rows = (group + 1) * count / groups - row;
            const bf16 *ahead = block;  // one group reads from memory itself; of more, the first four fetch what comes next
            if (groups == 1) ahead += 32 * PANEL;
            else if (group < 4) ahead += length * PAIR + group * length * step;
            tile(rows, x + (from + row) * stride + 2 * begin, stride, block, length, sums + row * PANEL, begin == 0,
                 ahead, step);
            if (begin + length < pairs) continue;
            for (index_t each = row; each < row + rows; each++)
                finish(weight, panel, sums + each * PANEL, residual ? residual + (from + each) * width : 0,
                       out + (from + each) * width);
        }
    }
}

// out [rows, N] = x [rows, K] by the weight; K is normalised before where `norm` is not null, `residual` (which may be
// out) added after where that is not null. A gated weight gives N / 2 columns.
void product(const weight_t *weight, const bf16 *x, const bf16 *norm, float eps, const bf16 *residual, bf16 *out,
             index_t rows, int threads) {
    const index_t columns = weight->columns, stride = (columns + 1) / 2 * 2;
    const index_t panels = weight->gated ? (weight->rows / 2 + 31) / 32 : (weight->rows + PANEL - 1) / PANEL;
    index_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    if (rows > 2 * TILE && panels % threads && panels < 16 * threads && blocks % threads) blocks += threads - blocks % threads;
    bf16 *ready = norm || columns % 2 ? malloc(rows * stride * sizeof(bf16)) : 0;
    const int by_panel = rows <= BLOCK_ROWS;  // all rows of a panel in a row; else all panels of a block
    if (!residual) use_huge_pages(out, rows * (weight->gated ? weight->rows / 2 : weight->rows) * sizeof(bf16));
    const int together = rows > 2;  // fewer are not worth a barrier
    for (index_t row = 0; ready && !together && row < rows; row++)
        prepare(x + row * columns, norm, eps, columns, ready + row * stride);
#pragma omp parallel num_threads(threads)
    {
        if (ready && together) {
#pragma omp for
            for (index_t row = 0; row < rows; row++)
                prepare(x + row * columns, norm, eps, columns, ready + row * stride);
        }
        const bf16 *from = ready ? ready : x;
        float sums[BLOCK_ROWS * PANEL] __attribute__((aligned(64)));
#pragma omp for
        for (index_t task = 0; task < blocks * panels; task++) {
            const index_t panel = by_panel ? task / blocks : task % panels, block = by_panel ? task % blocks : task / panels;
            panel_by_rows(weight, panel, from, stride, block * rows / blocks, (block + 1) * rows / blocks, residual, out, sums);
        }
    }
    free(ready);
}

// choices [rows] = the index of each row's largest of `columns`, the lowest of equals
void argmax(const bf16 *x, index_t rows, index_t columns, int64_t *choices, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 1)
    for (index_t row = 0; row < rows; row++) {
        const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        __m512 most = _mm512_set1_ps(-INFINITY);
        __m512i place = _mm512_setzero_si512();
        for (index_t column = 0; column < columns; column += 16) {
            const __mmask16 mask = lanes(columns - column);
            const __m512 value = load(x + row * columns + column, mask);
            const __mmask16 more = _mm512_mask_cmp_ps_mask(mask, value, most, _CMP_GT_OQ);
            most = _mm512_mask_mov_ps(most, more, value);
            place = _mm512_mask_add_epi32(place, more, lane, _mm512_set1_epi32(column));
        }
        const __mmask16 best = _mm512_cmp_ps_mask(most, _mm512_set1_ps(_mm512_reduce_max_ps(most)), _CMP_EQ_OQ);
        choices[row] = best ? _mm512_mask_reduce_min_epi32(best, place) : 0;
    }
}

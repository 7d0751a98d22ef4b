// Matrix products with the small work next to them fused in: RMS norm before, bias, gate or residual after.

#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "kernels.h"

enum { BLOCK_ROWS = 192 };  // rows of x at once

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

// ---- a tile

void tile(int rows, const left_t *x, index_t stride, const bf16 *panel, index_t pairs, float *sums, int fresh,
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
    vec value[PARTS];
    for (int part = 0; part < PARTS; part++) {
        value[part] = load_floats(sums + part * LANES, lanes(LANES));
        if (weight->bias) value[part] += load_floats(weight->bias + panel * PANEL + part * LANES, lanes(LANES));
    }
    if (weight->gated) {
        for (int part = 0; part < PARTS / 2; part++) {
            const index_t column = panel * 32 + part * LANES;
            const vec gate = rounded(value[part]), up = rounded(value[part + PARTS / 2]);
            const vec below = all(1.0f) + power_of_two(gate * all(-1.44269504f));
            const vec active = rounded(gate / below);
            store(out + column, lanes(weight->rows / 2 - column), active * up);
        }
        return;
    }
    for (int part = 0; part < PARTS; part++) {
        const index_t column = panel * PANEL + part * LANES;
        const mask_t mask = lanes(weight->rows - column);
        if (residual) value[part] = load(residual + column, mask) + rounded(value[part]);
        store(out + column, mask, value[part]);
    }
}

// ---- rows

void normalise(const bf16 *x, const bf16 *factors, float eps, index_t columns, bf16 *out) {
    vec squares = all(0);
    for (index_t k = 0; k < columns; k += LANES) {
        const vec value = load(x + k, lanes(columns - k));
        squares = multiply_add(value, value, squares);
    }
    const vec scale = all(1.0f / sqrtf(sum_of(squares) / columns + eps));
    for (index_t k = 0; k < columns; k += LANES) {
        const mask_t mask = lanes(columns - k);
        const vec value = rounded(load(x + k, mask) * scale);
        store(out + k, mask, value * load(factors + k, mask));
    }
}

// x as the tiles read it: normalised where there is a norm, padded to whole pairs
static void prepare(const bf16 *x, const bf16 *norm, float eps, index_t columns, left_t *out) {
    bf16 *normed = (bf16 *)(out + columns) - columns;  // the row's end, from which it is widened in place
    if (columns % 2) out[columns] = 0;
    if (norm) normalise(x, norm, eps, columns, normed), x = normed;
    if (x != (const void *)out) copy_left(out, x, columns);
}

// Rows [from, to) by one panel; sums has room for BLOCK_ROWS rows.
static void panel_by_rows(const weight_t *weight, index_t panel, const left_t *x, index_t stride, index_t from, index_t to,
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
            if (groups == 1) ahead += AHEAD;
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
    if (rows > TILE * threads && panels % threads && panels < 16 * threads && blocks % threads) blocks += threads - blocks % threads;
    const int as_it_is = !norm && columns % 2 == 0 && sizeof(left_t) == sizeof(bf16);
    left_t *ready = as_it_is ? 0 : malloc(rows * stride * sizeof(left_t));
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
        const left_t *from = ready ? ready : (const left_t *)x;
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
        vec most = all(-INFINITY);
        ints place = {0};
        for (index_t column = 0; column < columns; column += LANES) {
            const mask_t mask = lanes(columns - column);
            take_larger(load(x + row * columns + column, mask), mask, column, &most, &place);
        }
        choices[row] = first_of_largest(most, place);
    }
}

// Matrix products with the small work next to them fused in: RMS norm before, bias, gate or residual after.

#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "kernels.h"

// Tuned, like those of avx2.h and avx512.h, with `python -m benchmarks.tools.cpu` on two cores each of an AMD EPYC with
// AVX512-BF16 and of an older one with AVX2.
enum { BLOCK_ROWS = 192, MANY_ROWS = 32 };  // rows of x at once; rows from which on a panel keeps a thread busy

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

// How the left operand stands: rows of `part` columns, the next `part` columns `apart` elements on. 0: a row is one part.
typedef struct {
    index_t part, apart;
} layout_t;

// x as the tiles read it: normalised where there is a norm, padded to whole pairs
static void prepare(const bf16 *x, const bf16 *norm, float eps, index_t columns, layout_t layout, left_t *out) {
    bf16 normed[columns];
    if (norm) normalise(x, norm, eps, columns, normed), x = normed;
    if (columns % 2) out[columns / layout.part * layout.apart + columns % layout.part] = 0;
    for (index_t k = 0; k < columns; k += layout.part, out += layout.apart)
        copy_left(out, x + k, least(layout.part, columns - k));
}

// sums [count, 64] = x [count, 2 * pairs] by one panel
static void panel_by_rows(index_t count, const left_t *x, layout_t layout, const bf16 *panel, index_t pairs, float *sums) {
#ifdef WIDE_ROWS
    if (layout.apart) {
        wide_panel(count, x, layout.apart, panel, pairs, sums);
        return;
    }
#endif
    const index_t groups = (count + TILE - 1) / TILE;
    for (index_t begin = 0; begin < pairs; begin += BLOCK_PAIRS) {
        const index_t length = least(BLOCK_PAIRS, pairs - begin), step = PAIR / least(groups, 4);
        const bf16 *block = panel + begin * PAIR;
        for (index_t group = 0; group < groups; group++) {
            const index_t row = group * count / groups, rows = (group + 1) * count / groups - row;
            const bf16 *ahead = block;  // one group reads from memory itself; of more, the first four fetch what comes next
            if (groups == 1) ahead += AHEAD;
            else if (group < 4) ahead += length * PAIR + group * length * step;
            tile(rows, x + row * layout.part + 2 * begin, layout.part, block, length, sums + row * PANEL, begin == 0, ahead,
                 step);
        }
    }
}

typedef struct {
    const weight_t *weight;
    const left_t *x;
    layout_t layout;
    const bf16 *residual;
    bf16 *out;
    index_t rows, blocks, panels;
} job_t;

// One block of rows by one panel; sums has room for BLOCK_ROWS rows.
static void multiply_panel(const job_t *job, index_t task, float *sums) {
    const weight_t *weight = job->weight;
    const index_t pairs = (weight->columns + 1) / 2, width = weight->gated ? weight->rows / 2 : weight->rows;
    const int by_panel = job->rows <= BLOCK_ROWS;  // all rows of a panel in a row; else all panels of a block
    const index_t panel = by_panel ? task / job->blocks : task % job->panels;
    const index_t block = by_panel ? task % job->blocks : task / job->panels;
    const index_t first = block * job->rows / job->blocks, last = (block + 1) * job->rows / job->blocks;
    const left_t *x = job->x + first * job->layout.part;
    panel_by_rows(last - first, x, job->layout, weight->panels + panel * pairs * PAIR, pairs, sums);
    for (index_t row = first; row < last; row++)
        finish(weight, panel, sums + (row - first) * PANEL, job->residual ? job->residual + row * width : 0,
               job->out + row * width);
}

// out [rows, N] = x [rows, K] by the weight; K is normalised before where `norm` is not null, `residual` (which may be
// out) added after where that is not null. A gated weight gives N / 2 columns.
void product(const weight_t *weight, const bf16 *x, const bf16 *norm, float eps, const bf16 *residual, bf16 *out,
             index_t rows, int threads) {
    const index_t columns = weight->columns, pairs = (columns + 1) / 2;
    const index_t width = weight->gated ? weight->rows / 2 : weight->rows;
    const index_t panels = weight->gated ? (width + 31) / 32 : (width + PANEL - 1) / PANEL;
    index_t blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    if (rows > TILE * threads && panels % threads && panels < 16 * threads && blocks % threads)
        blocks += threads - blocks % threads;
    layout_t layout = {2 * pairs, 0};
#ifdef WIDE_ROWS
    if (rows >= WIDE_ROWS * blocks) layout = (layout_t){2 * CHUNK, rows * 2 * CHUNK};
#endif
    const int as_it_is = !norm && columns % 2 == 0 && sizeof(left_t) == sizeof(bf16);
    left_t *ready = as_it_is ? 0 : malloc(rows * ((2 * pairs + layout.part - 1) / layout.part) * layout.part * sizeof(left_t));
    if (!residual) use_huge_pages(out, rows * width * sizeof(bf16));
    const int together = rows > 2;  // fewer are not worth a barrier
    for (index_t row = 0; ready && !together && row < rows; row++)
        prepare(x + row * columns, norm, eps, columns, layout, ready + row * layout.part);
#pragma omp parallel num_threads(threads)
    {
        if (ready && together) {
#pragma omp for
            for (index_t row = 0; row < rows; row++)
                prepare(x + row * columns, norm, eps, columns, layout, ready + row * layout.part);
        }
        const left_t *from = ready ? ready : (const left_t *)x;
        const job_t job = {weight, from, layout, residual, out, rows, blocks, panels};
        float sums[BLOCK_ROWS * PANEL] __attribute__((aligned(64)));
        // few rows are bound by reading: each thread reads its part of the weight; of many, whoever is free takes a panel
        if (rows < MANY_ROWS) {
#pragma omp for nowait
            for (index_t task = 0; task < blocks * panels; task++) multiply_panel(&job, task, sums);
        } else {
#pragma omp for schedule(dynamic, 1) nowait
            for (index_t task = 0; task < blocks * panels; task++) multiply_panel(&job, task, sums);
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

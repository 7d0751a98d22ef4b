// What the kernels share: bfloat16 in vectors of floats, and the tile of products.
//
// Right operands are panels of 64 columns, [K / 2][64][2]: K in pairs because AVX512-BF16 multiplies pairs. Every value of a
// product is one accumulator that runs over all of K in order, so a row's bits depend neither on how many rows there are
// nor on the blocks that K and the rows are cut into.

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;
typedef long index_t;

enum { PANEL = 64, TILE = 6, PAIR = 2 * PANEL };  // a tile is up to TILE rows by one panel

static inline index_t least(index_t a, index_t b) { return a < b ? a : b; }

#ifdef __AVX512BF16__
#include "avx512.h"
#else
#include "avx2.h"
#endif

enum { PARTS = PANEL / LANES };  // vectors a panel is wide

// sums [rows, 64] = (or, where not fresh, +=) x [rows, 2 * pairs] by a panel. On the way it prefetches from `ahead`,
// `step` elements a pair.
void tile(int rows, const left_t *x, index_t stride, const bf16 *panel, index_t pairs, float *sums, int fresh,
          const bf16 *ahead, index_t step);

// 2^x within 3e-6 of its size: 2^n by the series of 2^r, r in [-1/2, 1/2]
static inline vec power_of_two(vec x) {
    x = within_range(x);
    const vec n = nearest(x), r = x - n;
    vec p = all(1.33335581e-3f);
    p = multiply_add(p, r, all(9.61812911e-3f));
    p = multiply_add(p, r, all(5.55041087e-2f));
    p = multiply_add(p, r, all(2.40226507e-1f));
    p = multiply_add(p, r, all(6.93147181e-1f));
    p = multiply_add(p, r, all(1.0f));
    return scaled(p, n);
}

// RMS norm of one row, rounded before and after `factors` as the reference does; out may be x
void normalise(const bf16 *x, const bf16 *factors, float eps, index_t columns, bf16 *out);

// What the kernels share: bfloat16 in vectors of 16 floats, and the tile of products.
//
// Right operands are panels of 64 columns, [K / 2][64][2]: K in pairs because the instruction multiplies pairs. Every
// value of a product is one accumulator that runs over all of K in order, so a row's bits depend neither on how many rows
// there are nor on the blocks that K and the rows are cut into.

#include <immintrin.h>
#include <stdint.h>

typedef uint16_t bf16;
typedef long index_t;

enum { PANEL = 64, TILE = 6, PAIR = 2 * PANEL };  // a tile is up to TILE rows by one panel: 24 accumulators

// sums [rows, 64] = (or, where not fresh, +=) x [rows, 2 * pairs] by a panel. On the way it prefetches from `ahead`,
// `step` elements a pair.
void tile(int rows, const bf16 *x, index_t stride, const bf16 *panel, index_t pairs, float *sums, int fresh,
          const bf16 *ahead, index_t step);

static inline index_t least(index_t a, index_t b) { return a < b ? a : b; }

static inline __mmask16 lanes(index_t left) { return left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1; }

static inline __m512 widen(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

static inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

static inline __m512 rounded(__m512 x) { return widen(narrow(x)); }

static inline __m512 load(const bf16 *x, __mmask16 mask) { return widen(_mm256_maskz_loadu_epi16(mask, x)); }

static inline void store(bf16 *x, __mmask16 mask, __m512 value) { _mm256_mask_storeu_epi16(x, mask, narrow(value)); }

// 2^x within 3e-6 of its size: 2^n by the series of 2^r, r in [-1/2, 1/2]
static inline __m512 power_of_two(__m512 x) {
    const __m512 n = _mm512_roundscale_ps(x, 0), r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.33335581e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.61812911e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.55041087e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.40226507e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93147181e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// RMS norm of one row, rounded before and after `factors` as the reference does; out may be x
void normalise(const bf16 *x, const bf16 *factors, float eps, index_t columns, bf16 *out);

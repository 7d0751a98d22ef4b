// Vectors of 16 floats, and the tile of products by the instruction that multiplies pairs of bfloat16.

typedef __m512 vec;
typedef __m512i ints;
typedef __mmask16 mask_t;  // the lanes that a load or a store means
typedef bf16 left_t;       // left operands of products

enum { LANES = 16, BLOCK_PAIRS = 1024 };  // of K at once: 256 KB of a panel, which stays in the L2 cache
enum { AHEAD = 32 * PANEL };

static inline mask_t lanes(index_t left) { return left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1; }

static inline vec all(float x) { return _mm512_set1_ps(x); }

static inline vec load_floats(const float *x, mask_t mask) { return _mm512_maskz_loadu_ps(mask, x); }

static inline void store_floats(float *x, vec value) { _mm512_storeu_ps(x, value); }

static inline vec multiply_add(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }

static inline float sum_of(vec x) { return _mm512_reduce_add_ps(x); }

static inline float most_of(vec x) { return _mm512_reduce_max_ps(x); }

static inline vec nearest(vec x) { return _mm512_roundscale_ps(x, 0); }

// x * 2^n, and the n that it takes: any
static inline vec scaled(vec x, vec n) { return _mm512_scalef_ps(x, n); }

static inline vec within_range(vec n) { return n; }

static inline vec widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

static inline __m256i narrow(vec x) { return (__m256i)_mm512_cvtneps_pbh(x); }

static inline vec rounded(vec x) { return widen(narrow(x)); }

static inline vec load(const bf16 *x, mask_t mask) { return widen(_mm256_maskz_loadu_epi16(mask, x)); }

static inline void store(bf16 *x, mask_t mask, vec value) { _mm256_mask_storeu_epi16(x, mask, narrow(value)); }

static inline void store_left(left_t *x, vec value) { store(x, 0xffff, value); }

static inline void copy_left(left_t *to, const bf16 *from, index_t count) { memcpy(to, from, count * sizeof(bf16)); }

// Of the lanes whose bits are set: the larger of the two; x, and 0 in the others
static inline vec larger_where(uint64_t bits, vec most, vec x) { return _mm512_mask_max_ps(most, bits, most, x); }

static inline vec only_where(uint64_t bits, vec x) { return _mm512_maskz_mov_ps(bits, x); }

// A running maximum of each lane, with the column it first stood in
static inline void take_larger(vec value, mask_t mask, index_t column, vec *most, ints *place) {
    const ints lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __mmask16 more = _mm512_mask_cmp_ps_mask(mask, value, *most, _CMP_GT_OQ);
    *most = _mm512_mask_mov_ps(*most, more, value);
    *place = _mm512_mask_add_epi32(*place, more, lane, _mm512_set1_epi32(column));
}

static inline index_t first_of_largest(vec most, ints place) {
    const __mmask16 best = _mm512_cmp_ps_mask(most, all(most_of(most)), _CMP_EQ_OQ);
    return best ? _mm512_mask_reduce_min_epi32(best, place) : 0;
}

static inline ints load_ints(const bf16 *x) { return _mm512_loadu_si512(x); }

static inline void store_ints(bf16 *x, ints value) { _mm512_storeu_si512(x, value); }

static inline void transpose(ints x[16]) {  // 16 x 16 of 32 bits: swap blocks of 8, 4, 2 and 1 off the diagonal
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
    for (int size = 8; size; size /= 2) {
        const __mmask16 upper = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(size));
        const __m512i shift = _mm512_set1_epi32(size), other = _mm512_set1_epi32(16);
        const __m512i low = _mm512_mask_add_epi32(lane, upper, _mm512_sub_epi32(lane, shift), other);
        const __m512i high = _mm512_mask_add_epi32(_mm512_add_epi32(lane, shift), upper, lane, other);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            if (!(i & size)) {
                const __m512i first = x[i], second = x[i + size];
                x[i] = _mm512_permutex2var_epi32(first, low, second);
                x[i + size] = _mm512_permutex2var_epi32(first, high, second);
            }
    }
}

// to = a[0], b[0], a[1], b[1], ... of 16 bits
static inline void interleave(ints a, ints b, bf16 *to) {
    const __m512i even = _mm512_cvtepu16_epi32(_mm256_set_epi16(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    const __m512i low = _mm512_or_si512(even, _mm512_slli_epi32(_mm512_add_epi32(even, _mm512_set1_epi32(32)), 16));
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    store_ints(to, _mm512_permutex2var_epi16(a, low, b));
    store_ints(to + 32, _mm512_permutex2var_epi16(a, high, b));
}

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

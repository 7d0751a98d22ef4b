// Vectors of 8 floats, and the tile of products in float32 (AVX2 and FMA). A panel's bfloat16 are widened in the registers:
// the even of a pair by a shift, the odd by a mask; left operands are floats that were rounded to bfloat16 before.

typedef __m256 vec;
typedef __m256i ints;
typedef int mask_t;    // how many lanes, from the first, a load or a store means
typedef float left_t;  // left operands of products

enum { LANES = 8, BLOCK_PAIRS = 256 };  // of K at once: 64 KB of a panel, which stays in the L2 cache
enum { CHUNK = 32, AHEAD = CHUNK * PAIR };  // pairs that a tile reads several times, from the L1 cache

static inline mask_t lanes(index_t left) { return left >= 8 ? 8 : left <= 0 ? 0 : left; }

static inline vec all(float x) { return _mm256_set1_ps(x); }

static inline ints first_lanes(mask_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}

static inline vec load_floats(const float *x, mask_t count) {
    return count == 8 ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, first_lanes(count));
}

static inline void store_floats(float *x, vec value) { _mm256_storeu_ps(x, value); }

static inline vec multiply_add(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }

static inline float sum_of(vec x) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

static inline float most_of(vec x) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}

static inline vec nearest(vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT); }

// x * 2^n, in two steps because 2^n itself may be no float, and the n that it takes: beyond them 2^n is 0 or infinite.
static inline vec scaled(vec x, vec n) {
    const ints whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
    const ints rest = _mm256_sub_epi32(whole, half);
    x *= _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
    return x * _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
}

static inline vec within_range(vec n) {  // not-a-number, the second operand, stays what it is
    return _mm256_min_ps(all(152), _mm256_max_ps(all(-152), n));
}

static inline vec rounded(vec x) {  // to the nearest bfloat16, of two the even; not-a-number stays what it is
    const ints bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const ints up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const ints even = _mm256_and_si256(up, _mm256_set1_epi32(0xffff0000));
    const vec none = all(__builtin_nanf(""));
    return _mm256_blendv_ps(_mm256_castsi256_ps(even), none, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
}

static inline vec load(const bf16 *x, mask_t count) {
    bf16 part[8] = {0};
    if (count < 8) x = memcpy(part, x, count * sizeof(bf16));
    const __m128i narrow = _mm_loadu_si128((const __m128i *)x);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}

static inline void store(bf16 *x, mask_t count, vec value) {
    const ints high = _mm256_srli_epi32(_mm256_castps_si256(rounded(value)), 16);
    const __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    if (count == 8) _mm_storeu_si128((__m128i *)x, narrow);
    else memcpy(x, &narrow, count * sizeof(bf16));
}

static inline void store_left(left_t *x, vec value) { store_floats(x, rounded(value)); }

static inline void copy_left(left_t *to, const bf16 *from, index_t count) {
    index_t i = 0;
    for (; i + 8 <= count; i += 8) store_floats(to + i, load(from + i, 8));
    for (; i < count; i++) {
        const uint32_t bits = (uint32_t)from[i] << 16;
        memcpy(to + i, &bits, sizeof(bits));
    }
}

static inline vec where(uint64_t bits) {
    const ints lane = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), lane), lane));
}

// Of the lanes whose bits are set: the larger of the two; x, and 0 in the others
static inline vec larger_where(uint64_t bits, vec most, vec x) {
    return _mm256_blendv_ps(most, _mm256_max_ps(most, x), where(bits));
}

static inline vec only_where(uint64_t bits, vec x) { return _mm256_and_ps(x, where(bits)); }

// A running maximum of each lane, with the column it first stood in
static inline void take_larger(vec value, mask_t count, index_t column, vec *most, ints *place) {
    const ints lane = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    const vec more = _mm256_and_ps(_mm256_cmp_ps(value, *most, _CMP_GT_OQ), _mm256_castsi256_ps(first_lanes(count)));
    *most = _mm256_blendv_ps(*most, value, more);
    const ints here = _mm256_add_epi32(lane, _mm256_set1_epi32(column));
    *place = _mm256_blendv_epi8(*place, here, _mm256_castps_si256(more));
}

static inline index_t first_of_largest(vec most, ints place) {
    float values[8];
    int32_t places[8];
    store_floats(values, most);
    _mm256_storeu_si256((ints *)places, place);
    int best = 0;
    for (int i = 1; i < 8; i++)
        if (values[i] > values[best] || (values[i] == values[best] && places[i] < places[best])) best = i;
    return places[best];
}

static inline ints load_ints(const bf16 *x) { return _mm256_loadu_si256((const ints *)x); }

static inline void store_ints(bf16 *x, ints value) { _mm256_storeu_si256((ints *)x, value); }

static inline void transpose(ints x[8]) {  // 8 x 8 of 32 bits: rows of two, of four, then the halves
    ints two[8], four[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) {
        two[i] = _mm256_unpacklo_epi32(x[i], x[i + 1]);
        two[i + 1] = _mm256_unpackhi_epi32(x[i], x[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            four[i + 2 * j] = _mm256_unpacklo_epi64(two[i + j], two[i + j + 2]);
            four[i + 2 * j + 1] = _mm256_unpackhi_epi64(two[i + j], two[i + j + 2]);
        }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        x[i] = _mm256_permute2x128_si256(four[i], four[i + 4], 0x20);
        x[i + 4] = _mm256_permute2x128_si256(four[i], four[i + 4], 0x31);
    }
}

// to = a[0], b[0], a[1], b[1], ... of 16 bits
static inline void interleave(ints a, ints b, bf16 *to) {
    const ints low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
    store_ints(to, _mm256_permute2x128_si256(low, high, 0x20));
    store_ints(to + 16, _mm256_permute2x128_si256(low, high, 0x31));
}

// `rows` rows by `parts` vectors of a panel: as many accumulators as the registers hold
static inline __attribute__((always_inline)) void
strip(const int rows, const int parts, const float *x, index_t stride, const bf16 *panel, index_t pairs, float *sums,
      int fresh, const bf16 *ahead, index_t step) {
    vec sum[TILE][8];
    const ints upper = _mm256_set1_epi32(0xffff0000);
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
        for (int part = 0; part < parts; part++)
            sum[row][part] = fresh ? all(0) : _mm256_loadu_ps(sums + row * PANEL + part * 8);
    for (index_t pair = 0; pair < pairs; pair++) {
#pragma GCC unroll 4
        for (int line = 0; line < parts / 2; line++)
            _mm_prefetch((const char *)(ahead + pair * step + line * 32), _MM_HINT_T0);
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++) {
            vec w[8];
#pragma GCC unroll 8
            for (int part = 0; part < parts; part++) {
                const ints both = load_ints(panel + pair * PAIR + part * 16);
                w[part] = _mm256_castsi256_ps(odd ? _mm256_and_si256(both, upper) : _mm256_slli_epi32(both, 16));
            }
#pragma GCC unroll 6
            for (int row = 0; row < rows; row++) {
                const vec v = all(x[row * stride + 2 * pair + odd]);
#pragma GCC unroll 8
                for (int part = 0; part < parts; part++) sum[row][part] = multiply_add(v, w[part], sum[row][part]);
            }
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 8
        for (int part = 0; part < parts; part++) store_floats(sums + row * PANEL + part * 8, sum[row][part]);
}

static inline __attribute__((always_inline)) void
multiply(const int rows, const float *x, index_t stride, const bf16 *panel, index_t pairs, float *sums, int fresh,
         const bf16 *ahead, index_t step) {
    const int parts = rows == 1 ? 8 : rows == 2 ? 4 : 2;
    for (index_t begin = 0; begin < pairs; begin += CHUNK)
        for (int part = 0; part < 8; part += parts)
            strip(rows, parts, x + 2 * begin, stride, panel + begin * PAIR + part * 16,
                  pairs - begin < CHUNK ? pairs - begin : CHUNK, sums + part * 8, fresh && begin == 0,
                  ahead + begin * step + part * step / 8, step);
}

// ---- many rows: a chunk of the panel is widened once for all, and read by tiles of 3 rows by 4 vectors, which take the
// fewest instructions a multiplication: the bound where another thread shares the core.

#define WIDE_ROWS 16
enum { WIDE_TILE = 3 };

// sum += v * w where it stands: the compiler left to itself reads w anew for every row
#define ADD_PRODUCT(sum, v, w) __asm__("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(v), "x"(w))

// wide [2 * pairs, 64] = a chunk of a panel
static inline void widen(const bf16 *panel, index_t pairs, float *wide) {
    const ints upper = _mm256_set1_epi32(0xffff0000);
    for (index_t pair = 0; pair < pairs; pair++, panel += PAIR, wide += PAIR)
        for (int part = 0; part < 8; part++) {
            const ints both = load_ints(panel + part * 16);
            store_floats(wide + part * 8, _mm256_castsi256_ps(_mm256_slli_epi32(both, 16)));
            store_floats(wide + PANEL + part * 8, _mm256_castsi256_ps(_mm256_and_si256(both, upper)));
        }
}

static inline __attribute__((always_inline)) void
wide_strip(const int rows, const float *x, index_t stride, const float *wide, index_t pairs, float *sums, int fresh,
           const bf16 *ahead, index_t step) {
    vec sum[WIDE_TILE][4];
#pragma GCC unroll 3
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++)
            sum[row][part] = fresh ? all(0) : _mm256_loadu_ps(sums + row * PANEL + part * 8);
    for (index_t pair = 0; pair < pairs; pair++, x += 2, wide += PAIR, ahead += step) {
        _mm_prefetch((const char *)ahead, _MM_HINT_T0);
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++) {
            vec v[WIDE_TILE];
#pragma GCC unroll 3
            for (int row = 0; row < rows; row++) v[row] = all(x[row * stride + odd]);
#pragma GCC unroll 4
            for (int part = 0; part < 4; part++) {
                const vec w = _mm256_loadu_ps(wide + odd * PANEL + part * 8);
#pragma GCC unroll 3
                for (int row = 0; row < rows; row++) ADD_PRODUCT(sum[row][part], v[row], w);
            }
        }
    }
#pragma GCC unroll 3
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 4
        for (int part = 0; part < 4; part++) store_floats(sums + row * PANEL + part * 8, sum[row][part]);
}

static void wide_tile(int rows, const float *x, index_t stride, const float *wide, index_t pairs, float *sums, int fresh,
                      const bf16 *ahead, index_t step) {
    for (int half = 0; half < 2; half++, wide += PANEL / 2, sums += PANEL / 2, ahead += pairs * step)
        switch (rows) {
        case 1: wide_strip(1, x, stride, wide, pairs, sums, fresh, ahead, step); break;
        case 2: wide_strip(2, x, stride, wide, pairs, sums, fresh, ahead, step); break;
        case 3: wide_strip(3, x, stride, wide, pairs, sums, fresh, ahead, step); break;
        }
}

// sums [rows, 64] = x [rows, 2 * pairs] by a panel, where x stands as [pairs / CHUNK][rows][2 * CHUNK], the chunks `apart`.
// The first two tiles fetch what comes next, half of it each.
static void wide_panel(index_t rows, const float *x, index_t apart, const bf16 *panel, index_t pairs, float *sums) {
    float wide[CHUNK * PAIR] __attribute__((aligned(64)));
    const index_t tiles = (rows + WIDE_TILE - 1) / WIDE_TILE;
    for (index_t begin = 0; begin < pairs; begin += CHUNK, panel += CHUNK * PAIR, x += apart) {
        const index_t length = least(CHUNK, pairs - begin);
        widen(panel, length, wide);
        for (index_t each = 0; each < tiles; each++) {
            const index_t row = each * rows / tiles, end = (each + 1) * rows / tiles;
            const bf16 *ahead = panel + length * PAIR + (each % 2 ? length * PAIR / 2 : 0);
            wide_tile(end - row, x + row * 2 * CHUNK, 2 * CHUNK, wide, length, sums + row * PANEL, begin == 0, ahead,
                      each < 2 ? PAIR / 4 : 0);
        }
    }
}

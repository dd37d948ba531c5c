// The product of a few rows with a weight that is read as its codes: no value of the weight is ever written to memory.
//
// Each weight is what dequantize makes of it, rounded to the dtype; products and sums are float32, in 16 partial sums
// that are added pairwise at the end, then the bias; the result is rounded once.

#include "operand.cpp"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

constexpr i64 LANES = 16, GROUP = 32, MOST_ROWS = 8;

struct Product {
    const T* x;
    const u8* data;
    const S* scale;
    const float* above;
    i64 above_step;
    i64 count, outputs, inputs;  // rows of x; rows and columns of the weight
    i64 row_bytes, row_blocks;
    const float* spread;  // x as the fast way reads it
    i64 padded;
};

static INLINE float sum_of(const float* lanes) {
    float sums[LANES];
    for (i64 j = 0; j < LANES; j++) sums[j] = lanes[j];
    for (i64 half = LANES / 2; half; half /= 2)
        for (i64 j = 0; j < half; j++) sums[j] += sums[j + half];
    return sums[0];
}

static INLINE T result_of(float sum) {
#if DTYPE == 3
    if ((bits(sum) & MAGNITUDE) >= 0x477ff000u && (bits(sum) & MAGNITUDE) <= EXPONENT)  // rounds to infinity
        return 0x7c00 | ((bits(sum) & SIGN) >> 16);
#endif
    return store(sum);
}

// ---- any format: a chunk of a row is dequantized into the first cache

static void multiply_row(const Product& p, i64 row, Buffers& buffers, float* sums) {
    static thread_local std::vector<T> values(CHUNK);
    Job job{nullptr, nullptr, const_cast<u8*>(p.data), const_cast<S*>(p.scale), 1, p.outputs, p.inputs, p.above,
            p.above_step, 0, p.row_bytes, p.row_blocks};
    float lanes[MOST_ROWS][LANES] = {};
    for (i64 column = 0; column < p.inputs; column += CHUNK) {
        const i64 width = p.inputs - column < CHUNK ? p.inputs - column : CHUNK, whole = width / LANES * LANES;
        job.out = values.data() - (row * p.inputs + column);  // where decode_tile writes the chunk
        decode_tile(job, Tile{row, 1, column, width}, buffers);
        for (i64 b = 0; b < p.count; b++) {
            const T* const __restrict x = p.x + b * p.inputs + column;
            const T* const __restrict w = values.data();
            for (i64 j = 0; j < whole; j += LANES)
                for (i64 k = 0; k < LANES; k++) lanes[b][k] += load(w[j + k]) * load(x[j + k]);
            for (i64 j = whole; j < width; j++) lanes[b][j - whole] += load(w[j]) * load(x[j]);
        }
    }
    for (i64 b = 0; b < p.count; b++) sums[b] = sum_of(lanes[b]);
}

// ---- four bits in blocks of 16 or more: the 16 values of an element are one register

#if defined(__AVX512F__) && ELEMENT_BITS == 4 && BLOCK_COLUMNS && BLOCK_COLUMNS % 16 == 0 && SCALE
#define FAST 1

// Whether a block's scale may be multiplied with its sum: then no value of the weight has a bit that the dtype lacks.
constexpr bool FACTORS = SCALE == 1 && FITS && (DTYPE == 1 || EXACT);

struct Elements {
    float value[16];
    Elements() {
        for (int c = 0; c < 16; c++) value[c] = decoded(u8(c));
    }
};
static const Elements ELEMENTS;

// Write the scales of a row's blocks. Returns whether a value may have to be clamped, which decode_tile alone does:
// under a scale that no rounding gives, or where the tensor scale takes a block beyond the dtype.
constexpr float MARGIN = ELEMENT_FLOAT ? 1.0f : 0.5f;  // an integer's least value is beyond the negative of its largest

static bool find_row_scales(const Product& p, i64 row, float* to) {
    const S* const from = p.scale + row / HEIGHT * p.row_blocks;
    const float above = p.above ? p.above[row * p.above_step] : 1.0f;
    int beyond = 0;
    for (i64 b = 0; b < p.row_blocks; b++) {
        const float own = value_of_scale(from[b]);
        const float s = p.above ? own * above : own;
        beyond |= value(bits(own) & MAGNITUDE) > SCALE_LARGEST * MARGIN;
        beyond |= !FITS && value(bits(s) & MAGNITUDE) * ELEMENT_MAX > DTYPE_MAX * MARGIN;
        to[b] = s == s ? s : value(0x7fc00000u);
    }
    return beyond;
}

static INLINE __m512 narrowed_lanes(__m512 x) {
#if DTYPE == 2
    const __m512i b = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(b, _mm512_set1_epi32(0x7fff)), odd);
    return _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(int(0xffff0000u))));
#elif DTYPE == 3
    return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    return x;
#endif
}

// The scales of a group's lanes: a lane has the values 2j and 2j + 1, so that a block of 16 has eight of them.
static INLINE __m512 scale_lanes(const float* scales, i64 group) {
    if (WIDTH % GROUP == 0) return _mm512_set1_ps(scales[group * GROUP / WIDTH]);
    const float *const low = scales + group * GROUP / WIDTH, *const high = scales + (group * GROUP + LANES) / WIDTH;
    return _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(*low), _mm512_set1_ps(*high));
}

template <int COUNT>
static INLINE void multiply_group(const Product& p, __m128i codes, __m512 table, __m512 scale, i64 group,
                                  __m512 (&lanes)[COUNT][2]) {
    const __m512i wide = _mm512_cvtepu8_epi32(codes);
    __m512 even = _mm512_permutexvar_ps(wide, table);  // reads the lower four bits of each
    __m512 odd = _mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), table);
    if (!FACTORS) {
        even = narrowed_lanes(_mm512_mul_ps(even, scale));
        odd = narrowed_lanes(_mm512_mul_ps(odd, scale));
    }
    for (int b = 0; b < COUNT; b++) {
        const float* const x = p.spread + b * p.padded + group * GROUP;
        if (FACTORS) {
            const __m512 both = _mm512_fmadd_ps(odd, _mm512_loadu_ps(x + LANES), _mm512_mul_ps(even, _mm512_loadu_ps(x)));
            lanes[b][group & 1] = _mm512_fmadd_ps(both, scale, lanes[b][group & 1]);
        } else {
            lanes[b][0] = _mm512_fmadd_ps(even, _mm512_loadu_ps(x), lanes[b][0]);
            lanes[b][1] = _mm512_fmadd_ps(odd, _mm512_loadu_ps(x + LANES), lanes[b][1]);
        }
    }
}

template <int COUNT>
static bool multiply_fast(const Product& p, i64 row, float* sums) {
    static thread_local std::vector<float> scales;
    if (i64(scales.size()) <= p.row_blocks) scales.resize(p.row_blocks + 1);  // one more than a short last group has
    if (find_row_scales(p, row, scales.data())) return false;
    const float* const scale = scales.data();
    const u8* const data = p.data + row * p.row_bytes;
    const __m512 table = _mm512_loadu_ps(ELEMENTS.value);
    __m512 lanes[COUNT][2];
    for (int b = 0; b < COUNT; b++) lanes[b][0] = lanes[b][1] = _mm512_setzero_ps();
    const i64 whole = p.inputs / GROUP;
    i64 group = 0;
    for (; group + 1 < whole; group += 2)  // an even and an odd one, whose sums are apart
        for (i64 g = group; g < group + 2; g++) {
            const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data + g * GROUP / 2));
            multiply_group<COUNT>(p, codes, table, scale_lanes(scale, g), g, lanes);
        }
    for (; group * GROUP < p.inputs; group++) {
        u8 last[GROUP / 2] = {};
        const u8* const from = data + group * GROUP / 2;
        for (i64 j = 0; j < GROUP / 2 && j < p.row_bytes - group * GROUP / 2; j++) last[j] = from[j];
        const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(last));
        multiply_group<COUNT>(p, codes, table, scale_lanes(scale, group), group, lanes);
    }
    for (int b = 0; b < COUNT; b++) {
        float both[LANES];
        _mm512_storeu_ps(both, _mm512_add_ps(lanes[b][0], lanes[b][1]));
        sums[b] = sum_of(both);
    }
    return true;
}

// In each group the values at even places first, as the codes are taken apart; zeros where a row ends, and rows of them
// where there are fewer than are multiplied at a time.
static void spread_rows(const Product& p, float* to) {
    const i64 rows = p.count <= 2 ? p.count : p.count <= 4 ? 4 : MOST_ROWS;
    for (i64 i = 0; i < rows * p.padded; i++) to[i] = 0.0f;
    for (i64 b = 0; b < p.count; b++)
        for (i64 j = 0; j < p.inputs; j++)
            to[b * p.padded + j / GROUP * GROUP + j % GROUP / 2 + j % 2 * LANES] = load(p.x[b * p.inputs + j]);
}

static bool multiply(const Product& p, i64 row, float* sums) {
    if (p.count == 1) return multiply_fast<1>(p, row, sums);
    if (p.count == 2) return multiply_fast<2>(p, row, sums);
    return p.count <= 4 ? multiply_fast<4>(p, row, sums) : multiply_fast<MOST_ROWS>(p, row, sums);
}
#else
#define FAST 0
static bool multiply(const Product&, i64, float*) { return false; }
#endif

extern "C" {

// Whether product is faster here than dequantizing the weight and multiplying with it.
int has_product() { return FAST; }

// Write x (count, inputs), at most MOST_ROWS rows, times the weight (outputs, inputs) transposed, plus bias, into out.
void product(const T* x, const u8* data, const S* scale, const float* above, i64 above_step, const T* bias, T* out,
             i64 count, i64 outputs, i64 inputs, int threads) {
    Product p{x, data, scale, above, above_step, count, outputs, inputs, (inputs * ELEMENT_BITS + 7) / 8,
              (inputs + WIDTH - 1) / WIDTH, nullptr, (inputs + GROUP - 1) / GROUP * GROUP};
#if FAST
    static thread_local std::vector<float> spread;
    if (i64(spread.size()) < MOST_ROWS * p.padded) spread.resize(MOST_ROWS * p.padded);
    spread_rows(p, spread.data());
    p.spread = spread.data();
#endif
    std::fenv_t caller;  // as in run
    std::fegetenv(&caller);
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
    {
        static thread_local Buffers buffers;
        std::fenv_t own;
        std::fegetenv(&own);
        std::fesetenv(&caller);
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (i64 row = 0; row < outputs; row++) {
            float sums[MOST_ROWS];
            if (!multiply(p, row, sums)) multiply_row(p, row, buffers, sums);
            for (i64 b = 0; b < count; b++)
                out[b * outputs + row] = result_of(bias ? sums[b] + load(bias[row]) : sums[b]);
        }
        std::fesetenv(&own);
    }
}

}  // extern "C"

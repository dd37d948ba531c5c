// A whole operand of a product in one call: its tensor scale is found here, and codes and values are written together.

#include "native.cpp"

// What the tensor scale is, as operand.py numbers it: none, one for all values, one a row, a number that is given, or
// that number a row, so that what is not finite marks its row alone.
enum Kind : int { NONE, WHOLE, ROWS, GIVEN, GIVEN_ROWS };

static u32 largest_of(const T* x, i64 count) {
    M most = 0;
    for (i64 j = 0; j < count; j++) {
        const M m = M(magnitude(x[j]));
        most = most < m ? m : most;
    }
    return most;
}

static u32 largest_of_all(const T* x, i64 count, int threads) {
    constexpr i64 PIECE = 1 << 14;
    u32 most = 0;
#ifdef _OPENMP
#pragma omp parallel for schedule(static) reduction(max : most) num_threads(threads) if (threads > 1)
#endif
    for (i64 first = 0; first < count; first += PIECE) {
        const u32 found = largest_of(x + first, count - first < PIECE ? count - first : PIECE);
        most = most < found ? found : most;
    }
    return most;
}

// As scale_of in arithmetic.py, of the bits of the largest magnitude.
static float tensor_scale_of(u32 most, Kind kind, float number) {
    const float top = widened(most), found = top / TOP;
    const float scale = kind >= GIVEN ? number : found < SMALLEST_ABOVE ? SMALLEST_ABOVE : found;
    const bool is_nan = scale != scale || (SCALE == 0 && bits(top) >= EXPONENT);
    return is_nan ? value(0x7fc00000u) : scale;
}

static void find_tensor_scales(const T* x, float* above, i64 rows, i64 columns, Kind kind, float number, int threads) {
    if (kind == WHOLE) above[0] = tensor_scale_of(largest_of_all(x, rows * columns, threads), kind, number);
    if (kind == GIVEN) above[0] = tensor_scale_of(0, kind, number);
    if (kind == ROWS || kind == GIVEN_ROWS) {
#ifdef _OPENMP
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
#endif
        for (i64 r = 0; r < rows; r++)
            above[r] = tensor_scale_of(largest_of(x + r * columns, columns), kind, number);
    }
}

// Rows that share all scales but their blocks', and have only whole ones, are one long row: short rows fill no vector.
static bool is_one_row(i64 columns, Kind kind) {
    return HEIGHT == 1 && BLOCK_COLUMNS && !STOCHASTIC && kind != ROWS && kind != GIVEN_ROWS && columns % WIDTH == 0 &&
           columns * ELEMENT_BITS % 8 == 0;
}

extern "C" {

// Write the values, the packed codes and block scales, or both, of x; above has room for the tensor scales, or is null.
void operand(const T* x, T* out, u8* data, S* scale, float* above, i64 matrices, i64 rows, i64 columns, int kind_number,
             float number, u32 seed, int threads) {
    static thread_local std::vector<float> own;
    const Kind kind = Kind(kind_number);
    const bool by_row = kind == ROWS || kind == GIVEN_ROWS;
    const i64 count = kind == NONE ? 0 : by_row ? matrices * rows : 1;
    if (!above && count) {
        if (i64(own.size()) < count) own.resize(count);
        above = own.data();
    }
    find_tensor_scales(x, above, matrices * rows, columns, kind, number, threads);
    if (is_one_row(columns, kind)) {
        columns *= matrices * rows;
        matrices = rows = 1;
    }
    const Job job{x, out, data, scale, matrices, rows, columns, count ? above : nullptr, by_row ? 1 : 0, seed, 0, 0};
    round_all(job, threads);
}

}  // extern "C"

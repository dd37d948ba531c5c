// One format and one dtype on a CPU, in a single pass over memory.
//
// native.py compiles this file with the constants that native_numbers.h tells of. The loops are plain and their trip
// counts constant, so that the compiler vectorizes them; no product is fused into a sum (-ffp-contract).

#include "native_numbers.h"

#include <cfenv>
#include <cstddef>
#include <type_traits>
#include <utility>
#include <vector>

constexpr i64 COLUMNS = 2048;  // worked on at a time: they stay in the first cache

// ---- blocks

constexpr i64 HEIGHT = BLOCK_ROWS, WIDTH = BLOCK_COLUMNS ? BLOCK_COLUMNS : 64;

// The smallest multiple of a block, and of eight codes, so that each chunk begins with a byte, about COLUMNS of them.
constexpr i64 chunk_columns() {
    i64 step = WIDTH;
    while (step % 8) step += WIDTH;
    return step >= COLUMNS ? step : COLUMNS / step * step;
}

struct Job {
    const T* x;
    T* out;
    u8* data;
    S* scale;
    i64 matrices, rows, columns;
    const float* above;  // the tensor scale: one, or one a row
    i64 above_step;
    u32 seed;
    i64 row_bytes, row_blocks;
};

// Where a tile of at most HEIGHT rows and CHUNK columns lies; rows are counted through all matrices.
struct Tile {
    i64 row, height, column, width;
    i64 blocks() const { return (width + WIDTH - 1) / WIDTH; }
};

template <class Do>
static INLINE void each(i64 count, Do&& act) {  // a constant trip count where the block is whole
    if (count == WIDTH) {
        for (i64 j = 0; j < WIDTH; j++) act(j);
    } else {
        for (i64 j = 0; j < count; j++) act(j);
    }
}

constexpr i64 CHUNK = chunk_columns();

// What a thread works with.
struct Buffers {
    std::vector<float> scale = std::vector<float>(CHUNK / WIDTH);
    std::vector<float> whole = scale, divide = scale;  // times the tensor scale, and what to divide by
    std::vector<u32> top = std::vector<u32>(CHUNK / WIDTH);
    std::vector<M> most = std::vector<M>(2 * CHUNK);
    std::vector<float> square = std::vector<float>(FOUR_OVER_SIX ? HEIGHT * WIDTH : 0);
    std::vector<float> each_scale = std::vector<float>(CHUNK);  // of a value, so that loops over values know no blocks
    std::vector<float> each_divisor = std::vector<float>(CHUNK);
    std::vector<u8> codes = std::vector<u8>(CHUNK + 8);
};

static INLINE i64 width_of(const Tile& t, i64 block) {
    const i64 left = t.width - block * WIDTH;
    return left < WIDTH ? left : WIDTH;
}

static INLINE float error_of(const Job& job, const Tile& t, i64 block, float scale, std::vector<float>& square) {
    const i64 count = width_of(t, block);
    const float d = divisor(scale);
    for (i64 j = 0; j < HEIGHT * WIDTH; j++) square[j] = 0.0f;
    for (i64 r = 0; r < t.height; r++) {
        const T* x = job.x + (t.row + r) * job.columns + t.column + block * WIDTH;
        each(count, [&](i64 j) {
            const float v = load(x[j]), difference = nearest(divided(v, d)) * scale - v;
            square[r * WIDTH + j] = difference * difference;
        });
    }
    for (i64 length = HEIGHT * WIDTH; length > 1;) {
        const i64 half = (length + 1) / 2;
        for (i64 j = 0; j < length - half; j++) square[j] += square[j + half];
        length = half;
    }
    return square[0];
}

static INLINE void halve(const M* __restrict from, M* __restrict to, i64 count) {
    for (i64 j = 0; j < count; j++) to[j] = from[2 * j] < from[2 * j + 1] ? from[2 * j + 1] : from[2 * j];
}

// Raise buffers.top by the magnitudes of a row, as integers: there NaN and infinity are larger than all numbers.
static INLINE void find_largest(const T* x, const Tile& t, Buffers& buffers) {
    u32* const top = buffers.top.data();
    i64 done = 0;
    if constexpr (WIDTH < 32 && (WIDTH & (WIDTH - 1)) == 0) {
        // Halve the whole row, neighbour by neighbour: short blocks alone would fill no vector.
        M *from = buffers.most.data(), *to = from + CHUNK;
        done = t.width / WIDTH;
        i64 count = done * WIDTH;
        for (i64 j = 0; j < count; j++) from[j] = magnitude(x[j]);
        for (i64 width = WIDTH; width > 1; width /= 2) {
            count /= 2;
            halve(from, to, count);
            std::swap(from, to);
        }
        for (i64 b = 0; b < done; b++) top[b] = top[b] < from[b] ? from[b] : top[b];
    }
    for (i64 b = done; b < t.blocks(); b++) {
        u32 most = top[b];
        each(width_of(t, b), [&](i64 j) {
            const u32 m = magnitude(x[b * WIDTH + j]);
            most = most < m ? m : most;
        });
        top[b] = most;
    }
}

static void find_scales(const Job& job, const Tile& t, Buffers& buffers) {
    const i64 blocks = t.blocks();
    const float above = job.above ? job.above[t.row * job.above_step] : 1.0f;
    float* const scale = buffers.scale.data();
#if SCALE == 0
    for (i64 b = 0; b < blocks; b++) scale[b] = 1.0f;
#else
    u32* const top = buffers.top.data();
    for (i64 b = 0; b < blocks; b++) top[b] = 0;
    for (i64 r = 0; r < t.height; r++) find_largest(job.x + (t.row + r) * job.columns + t.column, t, buffers);
    for (i64 b = 0; b < blocks; b++) {
        // Under a static scale that is too small for it, the quotient may be infinite: then the scale saturates.
        const float largest = widened(top[b]), amax = job.above ? largest / above : largest;
        scale[b] = bits(largest) < EXPONENT ? scale_of(amax) : value(0x7fc00000u);
        top[b] = bits(amax);
    }
#if FOUR_OVER_SIX
    for (i64 b = 0; b < blocks; b++) {
        const float wider = to_scale(value(top[b]) / FOUR);
        const float at_four = error_of(job, t, b, job.above ? wider * above : wider, buffers.square);
        const float at_six = error_of(job, t, b, job.above ? scale[b] * above : scale[b], buffers.square);
        if (at_four < at_six && scale[b] == scale[b]) scale[b] = wider;
    }
#endif
#endif
}

// Codes as packing.py lays them out: a run of bits, the earlier code in the lower ones. GROUP_CODES fill GROUP_BYTES.
static_assert(ELEMENT_BITS >= 1 && ELEMENT_BITS <= 8, "a code is a byte at most");
static_assert(GROUP_CODES * ELEMENT_BITS == GROUP_BYTES * 8 && 8 % GROUP_CODES == 0, "chunks begin with a byte");
using Group = std::conditional_t<(GROUP_BYTES > 4), std::uint64_t, u32>;

static INLINE Group joined(const u8* codes) {
    Group group = 0;
    for (int k = 0; k < GROUP_CODES; k++) group |= Group(codes[k]) << (ELEMENT_BITS * k);
    return group;
}

static INLINE void separate(Group group, u8* codes) {
    for (int k = 0; k < GROUP_CODES; k++) codes[k] = (group >> (ELEMENT_BITS * k)) & ((1 << ELEMENT_BITS) - 1);
}

// Codes up to a whole group are there, of 0.
static void pack(const u8* codes, u8* data, i64 width) {
    const i64 bytes = (width * ELEMENT_BITS + 7) / 8, whole = bytes / GROUP_BYTES;
    for (i64 j = 0; j < whole; j++) {
        const Group group = joined(codes + GROUP_CODES * j);
        for (int k = 0; k < GROUP_BYTES; k++) data[GROUP_BYTES * j + k] = u8(group >> (8 * k));
    }
    const i64 done = GROUP_BYTES * whole;
    for (i64 k = done; k < bytes; k++) data[k] = u8(joined(codes + GROUP_CODES * whole) >> (8 * (k - done)));
}

static void unpack(const u8* data, u8* codes, i64 width) {
    const i64 bytes = (width * ELEMENT_BITS + 7) / 8, whole = bytes / GROUP_BYTES;
    for (i64 j = 0; j < whole; j++) {
        Group group = 0;
        for (int k = 0; k < GROUP_BYTES; k++) group |= Group(data[GROUP_BYTES * j + k]) << (8 * k);
        separate(group, codes + GROUP_CODES * j);
    }
    Group last = 0;
    for (i64 k = GROUP_BYTES * whole; k < bytes; k++) last |= Group(data[k]) << (8 * (k - GROUP_BYTES * whole));
    if (GROUP_BYTES * whole < bytes) separate(last, codes + GROUP_CODES * whole);
}

// Where the scales of a tile stand among all.
static INLINE S* scales_of(const Job& job, const Tile& t) {
    const i64 heights = (job.rows + HEIGHT - 1) / HEIGHT;
    const i64 first = t.row / job.rows * heights + t.row % job.rows / HEIGHT;
    return job.scale + first * job.row_blocks + t.column / WIDTH;
}

static INLINE void spread(const float* per_block, i64 blocks, float* per_value) {
    for (i64 b = 0; b < blocks; b++)
        for (i64 j = 0; j < WIDTH; j++) per_value[b * WIDTH + j] = per_block[b];
}

// Give each value of a row the scale of its block, and what to divide by.
static INLINE void prepare(const Job& job, const Tile& t, i64 row, Buffers& buffers) {
    const float above = job.above ? job.above[row * job.above_step] : 1.0f;
    const i64 blocks = t.blocks();
    float *const whole = buffers.whole.data(), *const divide = buffers.divide.data();
    for (i64 b = 0; b < blocks; b++) {
        whole[b] = job.above ? buffers.scale[b] * above : buffers.scale[b];
        divide[b] = divisor(whole[b]);
    }
    spread(whole, blocks, buffers.each_scale.data());
    if (RECIPROCAL) spread(divide, blocks, buffers.each_divisor.data());
}

template <bool PACK>
static void round_tile(const Job& job, const Tile& t, Buffers& buffers) {
    const float *const each_scale = buffers.each_scale.data(), *const each_divisor = buffers.each_divisor.data();
    u8* const codes = buffers.codes.data();
    if (PACK && SCALE) {
        S* const to = scales_of(job, t);
        for (i64 b = 0; b < t.blocks(); b++) to[b] = code_of_scale(buffers.scale[b]);
    }
    for (i64 r = 0; r < t.height; r++) {
        const i64 row = t.row + r;
        const T* const __restrict x = job.x + row * job.columns + t.column;
        T* const __restrict out = job.out + row * job.columns + t.column;
        const u32 key = STOCHASTIC ? mixed(u32(row) + job.seed) : 0, column = u32(t.column);
        prepare(job, t, row, buffers);
        const i64 width = t.width;
        for (i64 j = 0; j < width; j++) {
            const float v = load(x[j]), s = each_scale[j], d = RECIPROCAL ? each_divisor[j] : divisor(s);
            const float q = rounded(divided(v, d), v, key, column + u32(j));
            if (PACK) codes[j] = code(q);
            else out[j] = narrowed(q * s);
        }
        if (PACK) {
            for (i64 j = width; j % 8; j++) codes[j] = 0;
            pack(codes, job.data + row * job.row_bytes + t.column * ELEMENT_BITS / 8, width);
        }
    }
}

static void mark_tile(const Job& job, const Tile& t, Buffers& buffers) {
    // That FP32 rounds the product of the scales is no saturation.
    const float beyond = job.above ? 0x1.00001p0f : 1.0f;
    float *const limit = buffers.divide.data(), *const each_limit = buffers.each_divisor.data();
    for (i64 r = 0; r < t.height; r++) {
        const i64 row = t.row + r, width = t.width;
        const T* const __restrict x = job.x + row * job.columns + t.column;
        u8* const __restrict marks = job.data + row * job.columns + t.column;
        prepare(job, t, row, buffers);
        for (i64 b = 0; b < t.blocks(); b++) limit[b] = buffers.whole[b] * ELEMENT_MAX * beyond;
        spread(limit, t.blocks(), each_limit);
        for (i64 j = 0; j < width; j++) marks[j] = value(bits(load(x[j])) & MAGNITUDE) > each_limit[j];
    }
}

static void decode_tile(const Job& job, const Tile& t, Buffers& buffers) {
    float* const each_scale = buffers.each_scale.data();
    u8* const codes = buffers.codes.data();
    const S* const from = SCALE ? scales_of(job, t) : nullptr;
    bool usual = !ELEMENT_INFINITY;  // what rounding gives; bytes from elsewhere may say more
    for (i64 b = 0; b < t.blocks(); b++) {
        const float s = SCALE ? value_of_scale(from[b]) : 1.0f;
        usual = usual && !(s > SCALE_LARGEST * (ELEMENT_FLOAT ? 1.0f : 0.5f));
        buffers.scale[b] = s;
    }
    for (i64 r = 0; r < t.height; r++) {
        const i64 row = t.row + r, width = t.width;
        T* const __restrict out = job.out + row * job.columns + t.column;
        unpack(job.data + row * job.row_bytes + t.column * ELEMENT_BITS / 8, codes, width);
        prepare(job, t, row, buffers);
        if (usual)
            for (i64 j = 0; j < width; j++) out[j] = narrowed(decoded(codes[j]) * each_scale[j]);
        else
            for (i64 j = 0; j < width; j++) out[j] = store(clamped(decoded(codes[j]) * each_scale[j], DTYPE_MAX));
    }
}

template <class Act>
static void run(Job job, int threads, Act&& act) {
    job.row_bytes = (job.columns * ELEMENT_BITS + 7) / 8;
    job.row_blocks = (job.columns + WIDTH - 1) / WIDTH;
    const i64 chunks = (job.columns + CHUNK - 1) / CHUNK, heights = (job.rows + HEIGHT - 1) / HEIGHT;
    const i64 tiles = job.matrices * heights * chunks;
    std::fenv_t caller;  // whether it flushes subnormal numbers: a thread made earlier would not know
    std::fegetenv(&caller);
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
#endif
    {
        static thread_local Buffers buffers;  // a call on few values costs less than making them
        std::fenv_t own;
        std::fegetenv(&own);
        std::fesetenv(&caller);
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
        for (i64 i = 0; i < tiles; i++) {
            const i64 column = i % chunks * CHUNK, row = i / chunks % heights * HEIGHT;
            Tile t{i / chunks / heights * job.rows + row, job.rows - row, column, job.columns - column};
            if (t.height > HEIGHT) t.height = HEIGHT;
            if (t.width > CHUNK) t.width = CHUNK;
            act(job, t, buffers);
        }
        std::fesetenv(&own);
    }
}

static void round_all(const Job& job, int threads) {  // into values, codes or both
    run(job, threads, [](const Job& j, const Tile& t, Buffers& buffers) {
        find_scales(j, t, buffers);
        if (j.out) round_tile<false>(j, t, buffers);
        if (j.data) round_tile<true>(j, t, buffers);
    });
}

extern "C" {

void fake_quantize(const T* x, T* out, i64 matrices, i64 rows, i64 columns, const float* above, i64 above_step,
                   u32 seed, int threads) {
    const Job job{x, out, nullptr, nullptr, matrices, rows, columns, above, above_step, seed, 0, 0};
    round_all(job, threads);
}

void quantize(const T* x, u8* data, S* scale, i64 matrices, i64 rows, i64 columns, const float* above, i64 above_step,
              u32 seed, int threads) {
    const Job job{x, nullptr, data, scale, matrices, rows, columns, above, above_step, seed, 0, 0};
    round_all(job, threads);
}

void saturates(const T* x, u8* marks, i64 matrices, i64 rows, i64 columns, const float* above, i64 above_step,
               int threads) {
    const Job job{x, nullptr, marks, nullptr, matrices, rows, columns, above, above_step, 0, 0, 0};
    run(job, threads, [](const Job& j, const Tile& t, Buffers& buffers) {
        find_scales(j, t, buffers);
        mark_tile(j, t, buffers);
    });
}

void dequantize(const u8* data, const S* scale, T* out, i64 matrices, i64 rows, i64 columns, const float* above,
                i64 above_step, int threads) {
    const Job job{nullptr, out, const_cast<u8*>(data), const_cast<S*>(scale), matrices, rows, columns, above,
                  above_step, 0, 0, 0};
    run(job, threads, decode_tile);
}

}  // extern "C"

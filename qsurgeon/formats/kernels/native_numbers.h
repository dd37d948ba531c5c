// What native.cpp does to one value: the same arithmetic as arithmetic.py and element.py, to the bit.
//
// native.py writes these constants from a format's fields:
//
//   DTYPE                 1 float32, 2 bfloat16, 3 float16
//   ELEMENT_*             the element: FLOAT 1 or 0 (integer), BITS, MAX, SMALLEST, NAN_CODE; of a float also
//                         MANTISSA, MIN_NORMAL, BIAS, FINITE (how many codes are finite numbers), INFINITY (1: the next
//                         one is infinity; 0: NaN)
//   GROUP_CODES, _BYTES   how many codes fill how many bytes, see packing.py
//   BLOCK_ROWS, _COLUMNS  of a block; 0 columns: no blocks, the tensor scale alone
//   SCALE                 0 none, 1 a power of two, 2 an element, 3 bfloat16, 4 float32
//   SCALE_*               SMALLEST, LARGEST; of a power of two also EMAX (of the element) and CARRY (see PowerRule in
//                         scale.py); of an element scale also what ELEMENT_* says of the element
//   STOCHASTIC, FOUR_OVER_SIX, FOUR
//   TOP                   what the largest value under a tensor scale takes; SMALLEST_ABOVE: the least tensor scale

#pragma once

#include <cstdint>

#define INLINE inline __attribute__((always_inline))

using i64 = std::int64_t;
using u32 = std::uint32_t;
using u16 = std::uint16_t;
using u8 = std::uint8_t;

static INLINE u32 bits(float x) { return __builtin_bit_cast(u32, x); }
static INLINE float value(u32 x) { return __builtin_bit_cast(float, x); }

constexpr u32 SIGN = 0x80000000u, MAGNITUDE = 0x7fffffffu, EXPONENT = 0x7f800000u;
constexpr float MAGIC = 0x1.8p23f;  // adding and subtracting this many steps rounds to whole steps, ties to even

// ---- dtypes

#if DTYPE == 1
using T = float;
using M = u32;  // a magnitude's bits
static INLINE float load(T x) { return x; }
static INLINE T store(float x) { return x; }
static INLINE u32 magnitude(T x) { return bits(x) & MAGNITUDE; }
static INLINE float widened(u32 m) { return value(m); }
constexpr float DTYPE_MAX = 0x1.fffffep127f;
#elif DTYPE == 2
using T = u16;
using M = u16;
static INLINE float load(T x) { return value(u32(x) << 16); }
static INLINE T store(float x) {
    const u32 b = bits(x);
    return (b & MAGNITUDE) > EXPONENT ? 0x7fc0 : (b + 0x7fffu + ((b >> 16) & 1)) >> 16;
}
static INLINE u32 magnitude(T x) { return x & 0x7fffu; }
static INLINE float widened(u32 m) { return value(m << 16); }
constexpr float DTYPE_MAX = 0x1.fep127f;
#elif DTYPE == 3
using T = u16;
using M = u16;
static INLINE float widened(u32 m) {
    const float normal = value((m << 13) + (m < 0x7c00u ? 112u << 23 : 224u << 23));
    return m < 0x400u ? float(int(m)) * 0x1p-24f : normal;
}
static INLINE float load(T x) { return value(bits(widened(x & 0x7fffu)) | u32(x & 0x8000u) << 16); }
static INLINE T store(float x) {
    const u32 b = bits(x), m = b & MAGNITUDE;
    const u32 subnormal = bits(value(m) + 0.5f) - bits(0.5f);  // a step of float16 here is the last bit of 0.5
    const u32 normal = (m + 0xfffu + ((m >> 13) & 1) - (112u << 23)) >> 13;
    return m > EXPONENT ? 0x7e00 : (m < 0x38800000u ? subnormal : normal) | ((b & SIGN) >> 16);
}
static INLINE u32 magnitude(T x) { return x & 0x7fffu; }
constexpr float DTYPE_MAX = 65504.0f;
#else
#error "no such DTYPE"
#endif

static INLINE float clamped(float x, float limit) {
    const float low = x > limit ? limit : x;
    return low < -limit ? -limit : low;
}

// Whether an element times a power of two is a number of the dtype: then nothing is left to clamp, or to round.
constexpr bool FITS = SCALE == 1 && ELEMENT_MAX * SCALE_LARGEST <= DTYPE_MAX;
constexpr bool EXACT = FITS && DTYPE == 2 && ELEMENT_BITS <= 8 && ELEMENT_SMALLEST * SCALE_SMALLEST >= 0x1p-133f;

static INLINE T narrowed(float x) {
    if (EXACT) return T(bits(x) >> (DTYPE == 2 ? 16 : 0));
    return store(FITS ? x : clamped(x, DTYPE_MAX));
}

// ---- the element

template <int MANTISSA>
static INLINE float steps_of_float(float x, float min_normal, float times) {
    const float power = value(bits(x) & EXPONENT);
    return (power < min_normal ? min_normal : power) * (times / (1 << MANTISSA));
}

static INLINE float steps_at(float x, float times) {
#if ELEMENT_FLOAT
    return steps_of_float<ELEMENT_MANTISSA>(x, ELEMENT_MIN_NORMAL, times);
#else
    return ELEMENT_SMALLEST * times;
#endif
}

static INLINE float with_sign_of(float x, float rounded) {
#if ELEMENT_FLOAT
    return value((bits(rounded) & MAGNITUDE) | (bits(x) & SIGN));
#else
    return rounded + 0.0f;  // there is no negative zero
#endif
}

static INLINE float nearest(float x) {
    const float c = clamped(x, ELEMENT_MAX), magic = steps_at(c, MAGIC);
    const float rounded = (c + magic) - magic;
    return with_sign_of(c, rounded);
}

static INLINE float either(float x, float uniform) {
    const float c = clamped(x, ELEMENT_MAX), step = steps_at(c, 1.0f), steps = value(bits(c) & MAGNITUDE) / step;
    const float whole = __builtin_floorf(steps);
    const float up = steps - whole > uniform ? 1.0f : 0.0f;
    return with_sign_of(c, value(bits((whole + up) * step) | (bits(c) & SIGN)));
}

static INLINE u32 mixed(u32 x) {  // lowbias32, see stochastic.py
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

static INLINE float uniform(u32 key, u32 column, float x) {
    const u32 hash = mixed((key + column * 0x9e3779b9u) ^ (bits(x) & MAGNITUDE));
    return float(int(hash >> 8)) * 0x1p-24f;
}

static INLINE float rounded(float quotient, float x, u32 key, u32 column) {
    return STOCHASTIC ? either(quotient, uniform(key, column, x)) : nearest(quotient);
}

template <int MANTISSA, int BIAS>
static INLINE u32 code_of_float(float x, float min_normal, float per_smallest) {  // without the sign
    const u32 m = bits(x) & MAGNITUDE;
    const u32 subnormal = int(value(m) < min_normal ? value(m) * per_smallest : 0.0f);
    return value(m) < min_normal ? subnormal : (m >> (23 - MANTISSA)) - ((127 - BIAS) << MANTISSA);
}

static INLINE u8 code(float x) {
#if ELEMENT_FLOAT
    const u32 c = code_of_float<ELEMENT_MANTISSA, ELEMENT_BIAS>(x, ELEMENT_MIN_NORMAL, 1.0f / ELEMENT_SMALLEST);
    const u32 sign = (bits(x) & SIGN) >> (32 - ELEMENT_BITS);
    return (bits(x) & MAGNITUDE) > EXPONENT ? ELEMENT_NAN_CODE : c | sign;
#else
    const float whole = (bits(x) & MAGNITUDE) > EXPONENT ? 0.0f : x * (1.0f / ELEMENT_SMALLEST);
    return u32(int(whole)) & ((1u << ELEMENT_BITS) - 1);
#endif
}

template <int MANTISSA, int BIAS, u32 FINITE, bool INFINITE>
static INLINE float value_of_float(u32 c, float smallest) {  // of a code without its sign
    const float subnormal = float(int(c)) * smallest;
    const float normal = value((c << (23 - MANTISSA)) + ((127 - BIAS) << 23));
    const float finite = c < (1u << MANTISSA) ? subnormal : normal;
    return c < FINITE ? finite : value(INFINITE && c == FINITE ? EXPONENT : 0x7fc00000u);
}

static INLINE float decoded(u8 c) {
#if ELEMENT_FLOAT
    constexpr u32 HALF = 1u << (ELEMENT_BITS - 1);
    const float m = value_of_float<ELEMENT_MANTISSA, ELEMENT_BIAS, ELEMENT_FINITE, ELEMENT_INFINITY>(
        c & (HALF - 1), ELEMENT_SMALLEST);
    return value(bits(m) | u32(c & HALF) << (32 - ELEMENT_BITS));
#else
    return float(int(u32(c) << (32 - ELEMENT_BITS)) >> (32 - ELEMENT_BITS)) * ELEMENT_SMALLEST;
#endif
}

// ---- the scale

#if SCALE == 0 || SCALE == 1 || SCALE == 2
using S = u8;
#elif SCALE == 3
using S = u16;
#elif SCALE == 4
using S = float;
#else
#error "no such SCALE"
#endif

static INLINE float bfloat16_of(float x) {
    const u32 b = bits(x);
    return value((b + 0x7fffu + ((b >> 16) & 1)) & 0xffff0000u);
}

static INLINE float scale_range(float x) {
    const float low = x < SCALE_SMALLEST ? SCALE_SMALLEST : x;
    return low > SCALE_LARGEST ? SCALE_LARGEST : low;
}

static INLINE float to_scale(float x) {  // of a scale that is no power of two
#if SCALE == 2
    const float c = clamped(x, SCALE_MAX), magic = steps_of_float<SCALE_MANTISSA>(c, SCALE_MIN_NORMAL, MAGIC);
    return scale_range((c + magic) - magic);
#elif SCALE == 3
    return scale_range(bfloat16_of(x));
#else
    return scale_range(x);
#endif
}

static INLINE float scale_of(float amax) {
#if SCALE == 1
    const int b = int(bits(amax));
    if (SCALE_EMAX > 0) {  // a subnormal amax is below all scales whatever is added
        const int moved = SCALE_CARRY < 0 && b + SCALE_CARRY < 0 ? 0 : b + SCALE_CARRY;
        return scale_range(value(u32(moved) & EXPONENT) * value(u32(127 - SCALE_EMAX) << 23));
    }
    const int counted = b > 0x7fffff ? b : int(bits(float(b))) - (149 << 23);
    const int exponent = ((counted + SCALE_CARRY) >> 23) - SCALE_EMAX;
    return scale_range(value(exponent > 0 ? u32(exponent) << 23 : 0x00400000u));
#else
    return to_scale(amax / ELEMENT_MAX);
#endif
}

static INLINE S code_of_scale(float s) {
#if SCALE == 1
    return (bits(s) >> 23) & 0xff;
#elif SCALE == 2
    const u32 c = code_of_float<SCALE_MANTISSA, SCALE_BIAS>(s, SCALE_MIN_NORMAL, 1.0f / SCALE_SMALLEST);
    return (bits(s) & MAGNITUDE) > EXPONENT ? SCALE_NAN_CODE : c;
#elif SCALE == 3
    return (bits(s) & MAGNITUDE) > EXPONENT ? 0x7fc0 : bits(s) >> 16;
#else
    return s;
#endif
}

static INLINE float value_of_scale(S c) {
#if SCALE == 1
    return value(c == 255 ? 0x7fc00000u : c == 0 ? 0x00400000u : u32(c) << 23);
#elif SCALE == 2
    constexpr u32 HALF = 1u << (SCALE_BITS - 1);
    const float m = value_of_float<SCALE_MANTISSA, SCALE_BIAS, SCALE_FINITE, SCALE_INFINITY>(
        c & (HALF - 1), SCALE_SMALLEST);
    return value(bits(m) | u32(c & HALF) << (32 - SCALE_BITS));  // a sign is no scale's, but a code has room for it
#elif SCALE == 3
    return value(u32(c) << 16);
#else
    return c;
#endif
}

// Dividing by a power of two is multiplying with its reciprocal, unless that is subnormal and might be flushed.
constexpr bool RECIPROCAL = SCALE == 1 && SCALE_LARGEST <= 0x1p126f;
static INLINE float divisor(float s) {
    const float d = s == 0.0f ? 1.0f : s;  // a subnormal scale, where denormals are flushed
    return RECIPROCAL ? 1.0f / d : d;
}
static INLINE float divided(float x, float d) { return RECIPROCAL ? x * d : x / d; }

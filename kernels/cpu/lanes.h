// Sixteen numbers at a time in GCC's vector types, which become whatever vectors the machine has.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));

// What one register holds. Of wider vectors GCC makes several, but keeps their sums in memory, and spreads a number over
// them lane by lane: sums of many products are of these, and numbers that meet vectors are spread by `all`.
#if defined(__AVX512F__)
constexpr int NATIVE = 16;
#elif defined(__AVX__)
constexpr int NATIVE = 8;
#else
constexpr int NATIVE = 4;
#endif
typedef float vn __attribute__((vector_size(NATIVE * 4)));
typedef uint32_t un __attribute__((vector_size(NATIVE * 4)));

inline v16 all(float x) {
  vn parts[16 / NATIVE];
  for (vn& part : parts) part = x - vn{};
  v16 found;
  std::memcpy(&found, parts, 64);
  return found;
}

struct bfloat {
  uint16_t bits;
};

template <typename Number>
struct Lanes;
template <>
struct Lanes<float> {
  typedef v16 type;
};
template <>
struct Lanes<int32_t> {
  typedef i16 type;
};
template <>
struct Lanes<uint32_t> {
  typedef u16 type;
};

template <typename Number>
inline typename Lanes<Number>::type load(const Number* from) {
  typename Lanes<Number>::type found;
  std::memcpy(&found, from, 64);
  return found;
}
inline void store(float* to, v16 value) { std::memcpy(to, &value, 64); }

inline v16 as_float(u16 bits) { return (v16)bits; }
inline float as_float(uint32_t bits) {
  float found;
  std::memcpy(&found, &bits, 4);
  return found;
}
inline v16 as_floats(i16 numbers) { return __builtin_convertvector(numbers, v16); }

// bfloat16 is the upper half of a float; rounding is to the nearest, ties to even, as everywhere.
#if defined(__AVX512F__)  // which GCC makes of the lines below only by halves
inline v16 widened(const uint16_t* from) {
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (v16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
}
#else
inline v16 widened(const uint16_t* from) {
  typedef uint16_t h16 __attribute__((vector_size(32)));
  h16 narrow;
  std::memcpy(&narrow, from, 32);
  return as_float(__builtin_convertvector(narrow, u16) << 16);
}
#endif
inline float widened(bfloat x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
inline bfloat narrowed(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return {static_cast<uint16_t>((bits >> 16) | 64)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline v16 load(const bfloat* from) { return widened(reinterpret_cast<const uint16_t*>(from)); }
// The upper halves of rounded numbers, in the low bits.
inline u16 rounded(v16 value) {
  const u16 bits = (u16)value, nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 64 : nearest;  // NaN stays NaN
}
inline void store(bfloat* to, v16 value) {
  typedef uint16_t h16 __attribute__((vector_size(32)));
  const h16 narrow = __builtin_convertvector(rounded(value), h16);
  std::memcpy(to, &narrow, 32);
}
inline void store_pairs(bfloat* to, v16 even, v16 odd) {
  const u16 both = rounded(even) | rounded(odd) << 16;
  std::memcpy(to, &both, 64);
}

// A number as it is kept: what is computed from it is then the same as from memory.
template <typename Number>
inline v16 as_kept(v16 value) {
  if constexpr (sizeof(Number) == 4)
    return value;
  else
    return as_float(rounded(value) << 16);
}

inline void put(float* to, const float* from, int64_t count) { std::memcpy(to, from, count * 4); }
inline void put(bfloat* to, const float* from, int64_t count) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = narrowed(from[i]);
}
inline void take(float* to, const float* from, int64_t count) { std::memcpy(to, from, count * 4); }
inline void take(float* to, const bfloat* from, int64_t count) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = widened(from[i]);
}

// e^x for x <= 0 to 2 ulp; 0 below -87.
inline v16 exponential(v16 x) {
  const v16 floor = {-87.3f, -87.3f, -87.3f, -87.3f, -87.3f, -87.3f, -87.3f, -87.3f,
                     -87.3f, -87.3f, -87.3f, -87.3f, -87.3f, -87.3f, -87.3f, -87.3f};
  const v16 inside = x > floor ? x : floor;
  const v16 shifted = inside * 1.44269504f + 12582912.f;  // the nearest whole number, in the low bits
  const v16 whole = shifted - 12582912.f;
  const v16 r = (inside - whole * 0.693359375f) - whole * -2.12194440e-4f;
  v16 y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.f;
  const i16 exponent = (__builtin_convertvector(whole, i16) + 127) << 23;
  y = y * (v16)exponent;
  return x > floor ? y : x != x ? x : y - y;  // what is NaN stays NaN
}

// up silu(gate)
inline v16 gated(v16 gate, v16 up) {
  const v16 small = exponential(gate < 0 ? gate : -gate);  // e^-|g|
  const v16 sigmoid = (gate < 0 ? small : small - small + 1) / (1 + small);
  return gate * sigmoid * up;
}

// Vectors of two, four, eight blocks of lanes folded onto one another; after four rounds a lane holds a whole vector.
constexpr int fold_lane(int lane, int half, int side) {
  const int block = lane / half, inside = lane % half;
  return (block / 2) * 2 * half + inside + (block % 2) * 16 + side * half;
}
template <int HALF, int SIDE>
inline i16 fold_lanes() {
  return i16{fold_lane(0, HALF, SIDE),  fold_lane(1, HALF, SIDE),  fold_lane(2, HALF, SIDE),  fold_lane(3, HALF, SIDE),
             fold_lane(4, HALF, SIDE),  fold_lane(5, HALF, SIDE),  fold_lane(6, HALF, SIDE),  fold_lane(7, HALF, SIDE),
             fold_lane(8, HALF, SIDE),  fold_lane(9, HALF, SIDE),  fold_lane(10, HALF, SIDE), fold_lane(11, HALF, SIDE),
             fold_lane(12, HALF, SIDE), fold_lane(13, HALF, SIDE), fold_lane(14, HALF, SIDE), fold_lane(15, HALF, SIDE)};
}
template <int HALF>
inline void fold(v16* part) {
#pragma GCC unroll 8
  for (int n = 0; n < HALF; ++n)
    part[n] = __builtin_shuffle(part[n], part[n + HALF], fold_lanes<HALF, 0>()) +
              __builtin_shuffle(part[n], part[n + HALF], fold_lanes<HALF, 1>());
}

// Lane n: the sum of part[n].
inline v16 totals(v16 part[16]) {
  fold<8>(part), fold<4>(part), fold<2>(part), fold<1>(part);
  return part[0];
}

// The lanes of x by `join`, all of them the same.
template <typename Join>
inline float folded(v16 x, Join&& join) {
  x = join(x, __builtin_shuffle(x, i16{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));
  x = join(x, __builtin_shuffle(x, i16{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}));
  x = join(x, __builtin_shuffle(x, i16{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13}));
  x = join(x, __builtin_shuffle(x, i16{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}));
  return x[0];
}
inline float total(v16 x) {
  return folded(x, [](v16 a, v16 b) { return a + b; });
}
inline float largest(v16 x) {
  return folded(x, [](v16 a, v16 b) { return a > b ? a : b; });
}

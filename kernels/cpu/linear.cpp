// y = x W^T with a weight that was packed for decoding: read once, in the order in which it lies in memory.
//
// A panel is 16 rows of W, all of D, in the order that a tile of AMX or a dot product of AVX-512 takes them. A thread
// walks pairs of panels. Each output is summed over D in one order, whatever the number of rows of x and wherever among
// them its own stands, so a row's result depends on that row alone, bit for bit.
//
//   float  (P, D, 16)               bfloat16 (P, D/32, 16, 16, 2)
//   8 bits (P, D/64, 16, 16, 4)     4 bits   (P, D/64, 8, 16, 4), the low half of a byte 32 columns before the high one
//
// Few bits: numbers are unsigned, `zero` stands for 0. Activations are rounded to 8 bits, a scale for each 64 numbers of
// a row; their products are exact integers, and only the sum over groups rounds.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define TILES 1
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "lanes.h"

namespace {

constexpr int64_t WIDE = 16;      // rows of a panel
constexpr int64_t GROUP = 64;     // numbers that share a scale
constexpr int64_t ROWS = 32;      // rows of x that a pass over a pair of panels serves
constexpr int64_t AHEAD = 8192;   // bytes between what is read and what is asked for
constexpr int64_t STEP = 2;       // rows whose sums are put away while a tile of the next is read

// What becomes of sums: y; stream + y; or, of a product whose first half are gates, silu(gate) * up.
enum class End { PLAIN, ADD, GATE };

struct Job {
  const void* x;  // (M, D) in its own type, or 8 bits
  int64_t rows, depth, size;  // depth: of what is packed
  const void* weight;
  const uint16_t* scales;     // (P, G, 16) bfloat16
  const float* row_scales;    // (M, G)
  const float* row_sums;      // (M, G): zero * sum of a group
  const float* bias;
  const void* stream;         // (M, F)
  End end;
};

// -- sums of one pair of panels: out (rows, 32) fp32 -----------------------------------------------------------------

// Into the second cache: the first has too few lines under way for memory that answers late.
inline void ahead(const void* line) { __builtin_prefetch(static_cast<const char*>(line) + AHEAD, 0, 2); }

constexpr int LINE = 2 * WIDE / NATIVE;  // registers that hold a line of a pair of panels

template <typename Number, typename Vector>
inline void take_line(const Number* const panel[2], int64_t line, Vector* to) {
  for (int p = 0; p < 2; ++p) {
    const Number* from = panel[p] + line * WIDE;
    for (int n = 0; n < WIDE / NATIVE; ++n, ++to) std::memcpy(to, from + n * NATIVE, sizeof(Vector));
    ahead(from);
  }
}

template <int R>
void sums_float(const Job& job, int64_t first, const float* const panel[2], float* out) {
  const float* x = static_cast<const float*>(job.x) + first * job.depth;
  vn sum[R][LINE] = {};
  for (int64_t d = 0; d < job.depth; ++d) {
    vn w[LINE];
    take_line(panel, d, w);
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < LINE; ++n) sum[r][n] += x[r * job.depth + d] * w[n];
  }
  std::memcpy(out, sum, sizeof(sum));
}

// Of pairs of columns: what a dot product of the processor takes, and where it has none, their halves as floats.
template <int R>
void sums_bfloat(const Job& job, int64_t first, const uint32_t* const panel[2], float* out) {
  const int64_t pairs = job.depth / 2;
  const uint32_t* x = static_cast<const uint32_t*>(job.x) + first * pairs;
  vn sum[R][LINE] = {};
  for (int64_t d = 0; d < pairs; ++d) {
    un w[LINE];
    take_line(panel, d, w);
    for (int r = 0; r < R; ++r) {
      const uint32_t both = x[r * pairs + d];
      for (int n = 0; n < LINE; ++n) {
#if defined(__AVX512BF16__)
        sum[r][n] = (vn)_mm512_dpbf16_ps((__m512)sum[r][n], (__m512bh)_mm512_set1_epi32(both), (__m512bh)w[n]);
#else
        sum[r][n] += as_float(both << 16) * (vn)(w[n] << 16);
        sum[r][n] += as_float(both & 0xffff0000u) * (vn)(w[n] & 0xffff0000u);
#endif
      }
    }
  }
  std::memcpy(out, sum, sizeof(sum));
}

// One group of one panel by R rows of x, exact: found[r][n] = sum_d x[r][d] w[n][d].
template <int BITS, int R>
inline void products(const int8_t* x, int64_t stride, const uint8_t* w, i16* found) {
#if defined(__AVX512VNNI__)
  for (int r = 0; r < R; ++r) found[r] = i16{};
  const __m512i half = _mm512_set1_epi8(15);
  for (int q = 0; q < 16; ++q) {
    __m512i line;
    if constexpr (BITS == 8) {
      line = _mm512_loadu_si512(w + q * 64);
      ahead(w + q * 64);
    } else {
      line = _mm512_loadu_si512(w + (q & 7) * 64);
      line = _mm512_and_si512(q < 8 ? line : _mm512_srli_epi16(line, 4), half);
      if (q < 8) ahead(w + q * 64);
    }
    for (int r = 0; r < R; ++r) {
      int32_t four;
      std::memcpy(&four, x + r * stride + q * 4, 4);
      found[r] = (i16)_mm512_dpbusd_epi32((__m512i)found[r], line, _mm512_set1_epi32(four));
    }
  }
#elif defined(__AVX2__)
  // Bytes 0 and 2 of each four, then 1 and 3, as numbers of 16 bits: two of their products are added exactly.
  const __m256i low = _mm256_set1_epi32(BITS == 8 ? 0x00ff00ff : 0x000f000f);
  __m256i sum[R][2] = {};
  for (int q = 0; q < 16; ++q) {
    const uint8_t* line = w + (BITS == 8 ? q : q & 7) * 64;
    if (BITS == 8 || q < 8) ahead(line);
    for (int n = 0; n < 2; ++n) {
      __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line) + n);
      if (BITS == 4 && q >= 8) bytes = _mm256_srli_epi16(bytes, 4);
      const __m256i even = _mm256_and_si256(bytes, low), odd = _mm256_and_si256(_mm256_srli_epi16(bytes, 8), low);
      for (int r = 0; r < R; ++r) {
        const int8_t* four = x + r * stride + q * 4;
        const auto both = [&](int j) { return _mm256_set1_epi32((four[j + 2] << 16) | (four[j] & 0xffff)); };
        sum[r][n] = _mm256_add_epi32(sum[r][n], _mm256_madd_epi16(even, both(0)));
        sum[r][n] = _mm256_add_epi32(sum[r][n], _mm256_madd_epi16(odd, both(1)));
      }
    }
  }
  std::memcpy(found, sum, sizeof(sum));
#else
  for (int r = 0; r < R; ++r) found[r] = i16{};
  for (int q = 0; q < 16; ++q)
    for (int n = 0; n < 16; ++n)
      for (int j = 0; j < 4; ++j) {
        uint8_t byte = BITS == 8 ? w[q * 64 + n * 4 + j] : w[(q & 7) * 64 + n * 4 + j];
        int32_t number = BITS == 8 ? byte : q < 8 ? byte & 15 : byte >> 4;
        for (int r = 0; r < R; ++r) found[r][n] += number * x[r * stride + q * 4 + j];
      }
#endif
}

// Both ways to the integers end here, so that they give the same bits.
inline v16 scaled(v16 sum, i16 found, float row_scale, float row_sum, v16 scale) {
  return sum + (as_floats(found) - all(row_sum)) * (all(row_scale) * scale);
}

template <int BITS, int R>
void sums_bits(const Job& job, int64_t first, const uint8_t* const panel[2], const uint16_t* const scales[2],
               float* out) {
  const int64_t groups = job.depth / GROUP, bytes = GROUP * WIDE * BITS / 8;
  const int8_t* x = static_cast<const int8_t*>(job.x) + first * job.depth;
  v16 sum[R][2] = {};
  for (int64_t g = 0; g < groups; ++g)
    for (int p = 0; p < 2; ++p) {
      i16 found[R];
      products<BITS, R>(x + g * GROUP, job.depth, panel[p] + g * bytes, found);
      v16 scale = widened(scales[p] + g * WIDE);
      for (int r = 0; r < R; ++r) {
        int64_t at = (first + r) * groups + g;
        sum[r][p] = scaled(sum[r][p], found[r], job.row_scales[at], job.row_sums[at], scale);
      }
    }
  for (int r = 0; r < R; ++r)
    for (int p = 0; p < 2; ++p) store(out + r * 2 * WIDE + p * WIDE, sum[r][p]);
}

#if defined(TILES)

// GCC does not know that tiles read memory: stores before this line are not moved behind it.
inline void written() { asm volatile("" ::: "memory"); }

struct alignas(64) Shapes {  // tiles 0-3: sums, by (16 rows, panel); 4, 5: x; 6, 7: the panels
  uint8_t palette = 1, start = 0, rest[14] = {};
  uint16_t bytes[16] = {};
  uint8_t lines[16] = {};
  explicit Shapes(int64_t rows) {
    int64_t upper = std::min<int64_t>(rows, 16), lower = std::max<int64_t>(rows - 16, 1);
    for (int tile = 0; tile < 8; ++tile) bytes[tile] = 64;
    lines[0] = lines[1] = lines[4] = upper, lines[2] = lines[3] = lines[5] = lower, lines[6] = lines[7] = 16;
  }
};

bool tiles_allowed() {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return allowed;
}

template <typename Between>
void tiles_bfloat(const Job& job, int64_t first, int64_t rows, const uint16_t* const panel[2], float* out,
                  Between&& between) {
  const int64_t stride = job.depth * 2;
  const char* x = static_cast<const char*>(job.x) + first * stride;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t d = 0; d < job.depth; d += 32) {
    const uint16_t *one = panel[0] + d * WIDE, *two = panel[1] + d * WIDE;
    for (int line = 0; line < 16; ++line) ahead(one + line * 32), ahead(two + line * 32);
    _tile_loadd(4, x + d * 2, stride);
    _tile_loadd(6, one, 64);
    _tile_loadd(7, two, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (rows > 16) {
      _tile_loadd(5, x + 16 * stride + d * 2, stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    between();
  }
  _tile_stored(0, out, 128);
  _tile_stored(1, out + 16, 128);
  if (rows > 16) {
    _tile_stored(2, out + 16 * 32, 128);
    _tile_stored(3, out + 16 * 32 + 16, 128);
  }
}

template <int BITS>
void tiles_bits(const Job& job, int64_t first, int64_t rows, const uint8_t* const panel[2],
                const uint16_t* const scales[2], float* out) {
  const int64_t groups = job.depth / GROUP, bytes = GROUP * WIDE * BITS / 8;
  const int8_t* x = static_cast<const int8_t*>(job.x) + first * job.depth;
  alignas(64) int32_t found[ROWS * 2 * WIDE];
  alignas(64) uint8_t wide[2][GROUP * WIDE];
  std::fill(out, out + rows * 2 * WIDE, 0.f);
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* line[2] = {panel[0] + g * bytes, panel[1] + g * bytes};
    for (int p = 0; p < 2; ++p) {
      for (int64_t at = 0; at < bytes; at += 64) ahead(line[p] + at);
      if constexpr (BITS == 4) {
        const __m512i half = _mm512_set1_epi8(15);
        for (int q = 0; q < 8; ++q) {
          __m512i both = _mm512_loadu_si512(line[p] + q * 64);
          _mm512_store_si512(wide[p] + q * 64, _mm512_and_si512(both, half));
          _mm512_store_si512(wide[p] + (q + 8) * 64, _mm512_and_si512(_mm512_srli_epi16(both, 4), half));
        }
        line[p] = wide[p];
      }
    }
    written();
    _tile_zero(0);
    _tile_zero(1);
    _tile_loadd(4, x + g * GROUP, job.depth);
    _tile_loadd(6, line[0], 64);
    _tile_loadd(7, line[1], 64);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_stored(0, found, 128);
    _tile_stored(1, found + 16, 128);
    if (rows > 16) {
      _tile_zero(2);
      _tile_zero(3);
      _tile_loadd(5, x + 16 * job.depth + g * GROUP, job.depth);
      _tile_dpbsud(2, 5, 6);
      _tile_dpbsud(3, 5, 7);
      _tile_stored(2, found + 16 * 32, 128);
      _tile_stored(3, found + 16 * 32 + 16, 128);
    }
    v16 scale[2] = {widened(scales[0] + g * WIDE), widened(scales[1] + g * WIDE)};
    for (int64_t r = 0; r < rows; ++r) {
      int64_t at = (first + r) * groups + g;
      for (int p = 0; p < 2; ++p) {
        float* sum = out + r * 2 * WIDE + p * WIDE;
        i16 exact = load(found + r * 2 * WIDE + p * WIDE);
        store(sum, scaled(load(sum), exact, job.row_scales[at], job.row_sums[at], scale[p]));
      }
    }
  }
}
#endif

// -- rows of x -------------------------------------------------------------------------------------------------------

// The sums of up to 32 rows where there are no tiles: so many at a time that their sums stay in registers.
constexpr int FEW = NATIVE == 16 ? 8 : 4;

template <int R = FEW, typename Few>
void in_few(int64_t first, int64_t rows, float* out, Few&& few) {
  for (; rows >= R; first += R, rows -= R, out += R * 2 * WIDE) few(std::integral_constant<int, R>{}, first, out);
  if constexpr (R > 1)
    if (rows) in_few<R - 1>(first, rows, out, few);
}

enum class Kind { FLOAT, BFLOAT, BITS8, BITS4 };

template <Kind KIND, typename Between>
void pair_of_panels(const Job& job, int64_t one, int64_t two, int64_t first, int64_t rows, bool tiles, float* out,
                    Between&& between) {
  const int64_t groups = job.depth / GROUP;
  if constexpr (KIND == Kind::FLOAT) {
    const float* base = static_cast<const float*>(job.weight);
    const float* const panel[2] = {base + one * job.depth * WIDE, base + two * job.depth * WIDE};
    in_few(first, rows, out, [&](auto count, int64_t at, float* to) {
      sums_float<decltype(count)::value>(job, at, panel, to);
    });
  } else if constexpr (KIND == Kind::BFLOAT) {
    const uint16_t* base = static_cast<const uint16_t*>(job.weight);
    const uint16_t* const panel[2] = {base + one * job.depth * WIDE, base + two * job.depth * WIDE};
#if defined(TILES)
    if (tiles) return tiles_bfloat(job, first, rows, panel, out, between);
#endif
    const uint32_t* const pairs[2] = {reinterpret_cast<const uint32_t*>(panel[0]),
                                      reinterpret_cast<const uint32_t*>(panel[1])};
    in_few(first, rows, out, [&](auto count, int64_t at, float* to) {
      sums_bfloat<decltype(count)::value>(job, at, pairs, to);
    });
  } else {
    constexpr int BITS = KIND == Kind::BITS8 ? 8 : 4;
    const uint8_t* base = static_cast<const uint8_t*>(job.weight);
    const int64_t bytes = job.depth * WIDE * BITS / 8;
    const uint8_t* const panel[2] = {base + one * bytes, base + two * bytes};
    const uint16_t* const scales[2] = {job.scales + one * groups * WIDE, job.scales + two * groups * WIDE};
#if defined(TILES)
    if (tiles && rows > 4) return tiles_bits<BITS>(job, first, rows, panel, scales, out);
#endif
    in_few(first, rows, out, [&](auto count, int64_t at, float* to) {
      sums_bits<BITS, decltype(count)::value>(job, at, panel, scales, to);
    });
  }
}

// The sums of one row by one panel into y, rounded as if they had been kept before they are used.
template <typename Number>
void finish(const Job& job, float* line, int64_t row, int64_t panel, Number* y) {
  const int64_t start = panel * WIDE, width = std::min<int64_t>(WIDE, job.size - start);
  if (job.end == End::ADD) {
    alignas(64) float stream[WIDE];
    take(stream, static_cast<const Number*>(job.stream) + row * job.size + start, width);
    store(line, as_kept<Number>(load(line)) + load(stream));
  }
  put(y + row * job.size + start, line, width);
}

// Sums of a pair of panels that are put away while the next pair is read: memory never waits for arithmetic.
template <typename Number>
struct Sums {
  const Job& job;
  Number* y;
  alignas(64) float lines[2][ROWS * 2 * WIDE];
  int now = 0;  // of the two, which is being computed
  int64_t one = 0, two = 0, first = 0, row = 0, rows = 0;  // of the other

  float* place() { return lines[now]; }
  void begin(int64_t panel, int64_t other, int64_t at, int64_t count) {
    put_away(rows);
    now ^= 1, one = panel, two = other, first = at, row = 0, rows = count;
  }
  void ask() const {  // for the memory of what was just computed
    for (int64_t r = first; r < first + rows; ++r)
      for (int p = 0; p < (job.end == End::GATE ? 1 : 2); ++p)
        __builtin_prefetch(y + r * (job.end == End::GATE ? job.size / 2 : job.size) + (p ? two : one) * WIDE, 1);
  }
  void put_away(int64_t count) {
    for (const int64_t end = std::min(rows, row + count); row < end; ++row) {
      float* line = lines[now ^ 1] + row * 2 * WIDE;
      if (job.bias)
        for (int p = 0; p < 2; ++p)
          for (int64_t n = 0, at = (p ? two : one) * WIDE; n < WIDE && at < job.size; ++n, ++at)
            line[p * WIDE + n] += job.bias[at];
      if (job.end == End::GATE) {
        const v16 gate = as_kept<Number>(load(line)), up = as_kept<Number>(load(line + WIDE));
        store(y + (first + row) * (job.size / 2) + one * WIDE, gated(gate, up));
      } else {
        finish(job, line, first + row, one, y);
        if (two != one) finish(job, line + WIDE, first + row, two, y);
      }
    }
  }
};

// Panels are walked in pairs that are half of all panels apart: two streams through memory, each without a gap, and what
// is asked for beyond the end of a panel is what is read next.
template <Kind KIND, typename Number>
void run(const Job& job, Number* y) {
  const int64_t panels = (job.size + WIDE - 1) / WIDE, pairs = (panels + 1) / 2;
  bool tiles = false;
#if defined(TILES)
  tiles = KIND != Kind::FLOAT && tiles_allowed();
#endif
  at::parallel_for(0, pairs, 1, [&](int64_t begin, int64_t end) {
    Sums<Number> sums{job, y};
    int64_t shaped = 0;
    for (int64_t one = begin; one < end; ++one) {
      const int64_t two = one + pairs < panels ? one + pairs : one;
      for (int64_t first = 0; first < job.rows; first += ROWS) {
        const int64_t rows = std::min(ROWS, job.rows - first);
#if defined(TILES)
        if (tiles && shaped != rows) {
          Shapes shapes(rows);
          written();
          _tile_loadconfig(&shapes);
          shaped = rows;
        }
#endif
        sums.ask();
        pair_of_panels<KIND>(job, one, two, first, rows, tiles, sums.place(), [&] { sums.put_away(STEP); });
        sums.begin(one, two, first, rows);
      }
    }
    sums.put_away(ROWS);
#if defined(TILES)
    if (shaped) _tile_release();
#endif
  });
}

// Rows of x to 8 bits, a scale for each group; depth is a whole number of groups, what is beyond x is 0.
template <typename Number>
void rounded(const Number* x, int64_t rows, int64_t dim, int64_t depth, float zero, int8_t* to, float* scales,
             float* sums) {
  const int64_t groups = depth / GROUP;
  at::parallel_for(0, rows, 8, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t g = 0; g < groups; ++g) {
        alignas(64) float line[GROUP] = {};
        const int64_t count = std::min(GROUP, dim - g * GROUP);
        take(line, x + r * dim + g * GROUP, count);
        v16 most = {};
        for (int i = 0; i < 4; ++i) {
          v16 part = load(line + i * 16), size = part < 0 ? -part : part;
          most = most > size ? most : size;
        }
        float largest = 0;
        for (int i = 0; i < 16; ++i) largest = std::max(largest, most[i]);
        const float scale = largest / 127, inverse = largest > 0 ? 127 / largest : 0;
        int32_t sum = 0;
        int8_t* out = to + r * depth + g * GROUP;
        for (int i = 0; i < GROUP; ++i) {
          const int32_t number = static_cast<int32_t>(std::nearbyintf(line[i] * inverse));
          out[i] = static_cast<int8_t>(number);
          sum += number;
        }
        scales[r * groups + g] = scale;
        sums[r * groups + g] = zero * static_cast<float>(sum);
      }
  });
}

template <typename Number>
void few_bits(Job job, int64_t dim, bool eight, const Number* x, Number* y) {
  static thread_local std::vector<int8_t> numbers;  // workers read it through `job`
  static thread_local std::vector<float> scales, sums;
  const int64_t groups = job.depth / GROUP;
  numbers.resize(job.rows * job.depth), scales.resize(job.rows * groups), sums.resize(job.rows * groups);
  rounded(x, job.rows, dim, job.depth, eight ? 128.f : 8.f, numbers.data(), scales.data(), sums.data());
  job.x = numbers.data(), job.row_scales = scales.data(), job.row_sums = sums.data();
  eight ? run<Kind::BITS8>(job, y) : run<Kind::BITS4>(job, y);
}

at::Tensor product(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& scales,
                   const std::optional<at::Tensor>& bias, int64_t size, int64_t bits, End end,
                   const at::Tensor& stream = {}) {
  auto shape = x.sizes().vec();
  const int64_t dim = shape.back();
  shape.back() = end == End::GATE ? size / 2 : size;
  at::Tensor y = at::empty(shape, x.options()), beside;
  Job job{};
  job.rows = x.numel() / std::max<int64_t>(dim, 1), job.size = size, job.weight = weight.data_ptr();
  job.bias = bias ? bias->data_ptr<float>() : nullptr, job.end = end;
  if (!y.numel()) return y;
  if (end == End::ADD) beside = stream.contiguous(), job.stream = beside.data_ptr();
  at::Tensor lines = x.contiguous();
  if (bits <= 8) {
    job.depth = weight.size(1) * GROUP;
    job.scales = reinterpret_cast<const uint16_t*>(scales->data_ptr());
    if (x.scalar_type() == at::kFloat)
      few_bits(job, dim, bits == 8, lines.data_ptr<float>(), y.data_ptr<float>());
    else
      few_bits(job, dim, bits == 8, reinterpret_cast<const bfloat*>(lines.data_ptr()),
               reinterpret_cast<bfloat*>(y.data_ptr()));
    return y;
  }
  job.depth = bits == 16 ? weight.size(1) * 32 : weight.size(1);
  if (job.depth != dim) lines = at::constant_pad_nd(lines, {0, job.depth - dim});
  job.x = lines.data_ptr();
  if (bits == 16)
    run<Kind::BFLOAT>(job, reinterpret_cast<bfloat*>(y.data_ptr()));
  else
    run<Kind::FLOAT>(job, y.data_ptr<float>());
  return y;
}

at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& scales,
                         const std::optional<at::Tensor>& bias, int64_t size, int64_t bits) {
  return product(x, weight, scales, bias, size, bits, End::PLAIN);
}

at::Tensor packed_linear_add(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& scales,
                             const std::optional<at::Tensor>& bias, int64_t size, int64_t bits,
                             const at::Tensor& stream) {
  return product(x, weight, scales, bias, size, bits, End::ADD, stream);
}

at::Tensor packed_swiglu(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& scales,
                         const std::optional<at::Tensor>& bias, int64_t size, int64_t bits) {
  TORCH_CHECK(size % (2 * WIDE) == 0, "packed_swiglu: gates must fill whole panels, size is ", size);
  return product(x, weight, scales, bias, size, bits, End::GATE);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(edifice_cpu, library) {
  library.def("packed_linear(Tensor x, Tensor weight, Tensor? scales, Tensor? bias, int size, int bits) -> Tensor");
  library.def("packed_linear_add(Tensor x, Tensor weight, Tensor? scales, Tensor? bias, int size, int bits, Tensor stream) -> Tensor");
  library.def("packed_swiglu(Tensor x, Tensor weight, Tensor? scales, Tensor? bias, int size, int bits) -> Tensor");
}

TORCH_LIBRARY_IMPL(edifice_cpu, CPU, library) {
  library.impl("packed_linear", packed_linear);
  library.impl("packed_linear_add", packed_linear_add);
  library.impl("packed_swiglu", packed_swiglu);
}

// Attention of the few tokens of a decode step over a past, paged or not: keys and values are read in place.
//
// Keys are taken in runs of 16 that begin at multiples of 16 of the index in the document, wherever they are stored and
// whether they came with this call or earlier. So a token's result depends neither on the other rows nor on how many
// tokens the call has, bit for bit. Softmax is the online one, in fp32. A thread meets a run with all its heads before
// the next one, so that it reads pages in the order in which they lie.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "lanes.h"

namespace {

constexpr int64_t RUN = 16;
constexpr int64_t WIDTH = 32;  // channels that are met together: what is copied is padded to whole ones
constexpr float NEVER = -std::numeric_limits<float>::infinity();

// Rows of (rows, columns, groups, size) numbers, rows being batch rows or pages. Steps are in bytes.
struct Entries {
  const char* data = nullptr;
  int64_t row, column, group, size, bytes;  // bytes: of a line of `size` numbers
  bool narrow;
  Entries() = default;
  explicit Entries(const at::Tensor& x)
      : data(static_cast<const char*>(x.data_ptr())), row(x.stride(0) * x.element_size()),
        column(x.stride(1) * x.element_size()), group(x.stride(2) * x.element_size()), size(x.size(3)),
        bytes(size * x.element_size()), narrow(x.scalar_type() == at::kBFloat16) {}
  const char* at(int64_t r, int64_t c) const { return data + r * row + c * column; }
  void read(const char* from, float* to) const {
    if (narrow)
      take(to, reinterpret_cast<const bfloat*>(from), size);
    else
      take(to, reinterpret_cast<const float*>(from), size);
  }
};

struct Call {
  Entries q, k, v, past_k, past_v;
  int64_t rows, tokens, heads, groups, page, pages, capacity;
  const int64_t *length = nullptr, *positions = nullptr, *segments = nullptr, *table = nullptr, *parents = nullptr;
  const float *slopes = nullptr, *sinks = nullptr;
  float scale, softcap;
  int64_t window;
  bool narrow;  // all in bf16 and of whole widths: keys and values are met where they lie, else as padded fp32 copies
};

struct Query {          // one head of one token
  const bfloat* given;  // in place, where all is narrow
  float *q, *sum;       // sum: of weighted values, in the order of `channels`
  float most, mass;
};

struct Run {  // the keys and values of 16 indices: of lane n those of group g begin at k[n] + g * k_step[n]
  int64_t begin;
  uint32_t past = 0, fresh = 0;  // lanes; the others hold zeros
  int64_t column[RUN] = {};      // of the call, in fresh lanes
  const char *k[RUN], *v[RUN];
  int64_t k_step[RUN] = {}, v_step[RUN] = {};
  Run(int64_t begin, const char* zeros) : begin(begin) { std::fill(k, k + RUN, zeros), std::fill(v, v + RUN, zeros); }
};

struct Scratch {  // of one thread, kept from one call to the next
  std::vector<float> numbers;
  std::vector<Query> queries;
  std::vector<int64_t> at, next, others;
  std::vector<uint8_t> sees;
};

// 32 channels as two vectors, of bf16 the even and the odd ones, which takes no shuffling.
inline void channels(const float* from, v16& one, v16& two) { one = load(from), two = load(from + 16); }
inline void channels(const bfloat* from, v16& one, v16& two) {
  const u16 both = load(reinterpret_cast<const uint32_t*>(from));
  one = as_float(both << 16), two = as_float(both & 0xffff0000u);
}

// 32 channels of what is read soon, while these are met: all at once would keep the arithmetic waiting for memory.
template <typename Number>
inline void ask(const Number* coming) {
  for (int64_t at = 0; at < WIDTH; at += 64 / sizeof(Number)) __builtin_prefetch(coming + at, 0, 2);
}

// coming: null, or what is to be asked for.
template <int CHANNELS, typename Number>
inline v16 scores(const Query& query, const Number* const keys[RUN], const Number* const* coming, int64_t K) {
  if constexpr (CHANNELS > 0) K = CHANNELS;
  v16 part[RUN];
  for (int n = 0; n < RUN; ++n) {
    for (int64_t i = 0; coming && i < K; i += WIDTH) ask(coming[n] + i);
    v16 sum = {};
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<Number, bfloat>) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < K; i += WIDTH)
        sum = (v16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(query.given + i),
                                    (__m512bh)_mm512_loadu_si512(keys[n] + i));
      part[n] = sum;
      continue;
    }
#endif
#pragma GCC unroll 4
    for (int64_t i = 0; i < K; i += 16) sum += load(query.q + i) * load(keys[n] + i);
    part[n] = sum;
  }
  return totals(part);
}

// The keys and values of a run meet QUERIES heads of a token; `mine`: those that it reads. CHANNELS: K and V where they
// are the usual size and known to the compiler, else 0.
template <int QUERIES, int CHANNELS, typename Number>
void meet(Query* queries, const Number* const* keys, const Number* const* values, const Number* const* coming_keys,
          const Number* const* coming_values, int64_t K, int64_t V, const v16 bias[QUERIES], float scale, float softcap, uint32_t mine) {
  if constexpr (CHANNELS > 0) K = V = CHANNELS;
  const i16 bits = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  alignas(64) float weights[QUERIES][RUN];
  float keep[QUERIES];
  for (int h = 0; h < QUERIES; ++h) {
    Query& query = queries[h];
    v16 score = scores<CHANNELS>(query, keys, h ? nullptr : coming_keys, K) * all(scale);
    if (softcap > 0)
      for (int n = 0; n < RUN; ++n) score[n] = softcap * std::tanh(score[n] / softcap);
    score = (bits & static_cast<int32_t>(mine)) != 0 ? score + bias[h] : all(NEVER);
    const float most = std::max(query.most, largest(score));
    const v16 weight = exponential(score - all(most));
    keep[h] = query.most == most ? 1.f : query.most == NEVER ? 0.f : exponential(all(query.most - most))[0];
    query.most = most, query.mass = query.mass * keep[h] + total(weight);
    store(weights[h], weight);
  }
#pragma GCC unroll 4
  for (int64_t i = 0; i < V; i += WIDTH) {
    v16 sum[QUERIES][2];
    for (int h = 0; h < QUERIES; ++h)
      for (int half = 0; half < 2; ++half) sum[h][half] = load(queries[h].sum + i + half * 16) * all(keep[h]);
#pragma GCC unroll 16
    for (int n = 0; n < RUN; ++n) {
      v16 one, two;
      if (coming_values) ask(coming_values[n] + i);
      channels(values[n] + i, one, two);
      for (int h = 0; h < QUERIES; ++h) sum[h][0] += all(weights[h][n]) * one, sum[h][1] += all(weights[h][n]) * two;
    }
    for (int h = 0; h < QUERIES; ++h)
      for (int half = 0; half < 2; ++half) store(queries[h].sum + i + half * 16, sum[h][half]);
  }
}

template <int QUERIES, typename Number, typename... Rest>
void meet_sized(int64_t K, int64_t V, Query* queries, const Number* const* keys, Rest... rest) {
  if (K == 64 && V == 64)
    meet<QUERIES, 64>(queries, keys, rest...);
  else if (K == 128 && V == 128)
    meet<QUERIES, 128>(queries, keys, rest...);
  else
    meet<QUERIES, 0>(queries, keys, rest...);
}

// First index of a row's past that a new token may read.
int64_t oldest(const Call& c, int64_t row) {
  const int64_t carried = c.length ? c.length[row] : 0, kept = std::max<int64_t>(0, carried - c.capacity);
  return c.window ? std::max(kept, carried - c.window + 1) : kept;
}

// The past in the run from `begin` on. zeros: a line for lanes in which there is nothing yet.
Run remembered(const Call& c, int64_t row, int64_t begin, const char* zeros) {
  Run run(begin, zeros);
  const int64_t first = oldest(c, row), carried = c.length && c.capacity ? c.length[row] : 0;
  const int64_t slot = begin % std::max<int64_t>(c.capacity, 1);
  int64_t page = slot / c.page, offset = slot % c.page;
  for (int n = 0; n < RUN && begin + n < carried; ++n) {
    if (begin + n >= first) {
      const int64_t where = c.table ? c.table[row * c.pages + page] : row;
      run.past |= 1u << n;
      run.k[n] = c.past_k.at(where, offset), run.k_step[n] = c.past_k.group;
      run.v[n] = c.past_v.at(where, offset), run.v_step[n] = c.past_v.group;
    }
    if (++offset == c.page) offset = 0, page = page + 1 == c.pages ? 0 : page + 1;
  }
  return run;
}

int64_t padded(int64_t size) { return (size + WIDTH - 1) / WIDTH * WIDTH; }

// Groups `from` to `to` of a row. Number: that keys and values are met in.
template <typename Number>
void attend(const Call& c, int64_t row, int64_t from, int64_t to, Scratch& scratch, char* y) {
  const int64_t shared = c.heads / c.groups, mine = (to - from) * shared, K = padded(c.k.size), V = padded(c.v.size);
  const int64_t carried = c.length ? c.length[row] : 0;
  auto& [numbers, state, at, next, others, sees] = scratch;
  numbers.assign(K + V + RUN * (K + V) + c.tokens * mine * (K + V), 0.f);
  state.resize(c.tokens * mine), at.resize(c.tokens), next.clear(), others.clear();
  const char* zeros = reinterpret_cast<const char*>(numbers.data());
  float *copies = numbers.data() + K + V, *queries = copies + RUN * (K + V);
  for (int64_t t = 0; t < c.tokens; ++t) {
    at[t] = c.positions ? c.positions[row * c.tokens + t] : carried + t;
    for (int64_t h = 0; h < mine; ++h) {
      Query& query = state[t * mine + h];
      const int64_t head = from * shared + h;
      const char* given = c.q.at(row, t) + head * c.q.group;
      query.given = reinterpret_cast<const bfloat*>(given);
      query.q = queries + (t * mine + h) * (K + V), query.sum = query.q + K;
      c.q.read(given, query.q);
      query.most = c.sinks ? c.sinks[head] : NEVER;
      query.mass = c.sinks ? 1.f : 0.f;
    }
  }
  if (c.parents) {
    sees.assign(c.tokens * c.tokens, 0);
    for (int64_t t = 0; t < c.tokens; ++t)
      for (int64_t up = t; up >= 0; up = c.parents[row * c.tokens + up]) sees[t * c.tokens + up] = 1;
  }
  auto segment = [&](int64_t t) { return c.segments ? c.segments[row * c.tokens + t] : 0; };

  // Lanes that a token reads. What is past belongs to the document of segment 0.
  auto lanes = [&](const Run& run, int64_t t) {
    uint32_t found = segment(t) == 0 ? run.past : 0;
    for (int n = 0; n < RUN && run.fresh; ++n) {
      const int64_t j = run.column[n];
      if (run.fresh >> n & 1 && segment(j) == segment(t) && j <= t && (!c.parents || sees[t * c.tokens + j]))
        found |= 1u << n;
    }
    for (int n = 0; n < RUN && c.window; ++n)
      if (run.begin + n <= at[t] - c.window) found &= ~(1u << n);
    return found;
  };
  auto met = [&](const Run& run, const Run& coming) {
    const Number *keys[RUN], *values[RUN], *next_keys[RUN], *next_values[RUN];
    for (int64_t g = from; g < to; ++g) {
      for (int n = 0; n < RUN; ++n) {
        keys[n] = reinterpret_cast<const Number*>(run.k[n] + g * run.k_step[n]);
        values[n] = reinterpret_cast<const Number*>(run.v[n] + g * run.v_step[n]);
        next_keys[n] = reinterpret_cast<const Number*>(coming.k[n] + g * coming.k_step[n]);
        next_values[n] = reinterpret_cast<const Number*>(coming.v[n] + g * coming.v_step[n]);
      }
      bool asked = false;
      if constexpr (!std::is_same_v<Number, bfloat>)
        for (int n = 0; n < RUN; ++n) {
          const bool past = run.past >> n & 1;
          float *k = copies + n * K, *v = copies + RUN * K + n * V;
          (past ? c.past_k : c.k).read(reinterpret_cast<const char*>(keys[n]), k);
          (past ? c.past_v : c.v).read(reinterpret_cast<const char*>(values[n]), v);
          keys[n] = k, values[n] = v;
        }
      for (int64_t t = 0; t < c.tokens; ++t) {
        const uint32_t found = lanes(run, t);
        if (!found) continue;
        for (int64_t h = 0; h < shared; h += 2) {
          v16 bias[2] = {};
          for (int64_t one = h; one < std::min(h + 2, shared) && c.slopes; ++one)
            for (int n = 0; n < RUN; ++n)
              bias[one - h][n] = -c.slopes[g * shared + one] * static_cast<float>(std::abs(at[t] - run.begin - n));
          Query* both = &state[t * mine + (g - from) * shared + h];
          const Number* const* ask_k = asked ? nullptr : next_keys, * const* ask_v = asked ? nullptr : next_values;
          asked = true;
          if (h + 1 < shared)
            meet_sized<2>(K, V, both, keys, values, ask_k, ask_v, K, V, bias, c.scale, c.softcap, found);
          else
            meet_sized<1>(K, V, both, keys, values, ask_k, ask_v, K, V, bias, c.scale, c.softcap, found);
        }
      }
    }
  };
  auto put_fresh = [&](Run& run, int n, int64_t column) {
    run.column[n] = column, run.fresh |= 1u << n;
    run.k[n] = c.k.at(row, column), run.k_step[n] = c.k.group;
    run.v[n] = c.v.at(row, column), run.v_step[n] = c.v.group;
  };

  // The past, from the first index that any token of the carried document reads. Its new tokens follow at once: their
  // lanes are filled before a run is met, but those of a tree, which are not in order of their index.
  for (int64_t t = 0; t < c.tokens; ++t) {
    if (segment(t) == 0 && !c.parents)
      next.push_back(t);
    else if (segment(t) >= 0)
      others.push_back(t);
  }
  const int64_t end = carried + static_cast<int64_t>(next.size());
  auto beginning = [&](int64_t of) { return remembered(c, of, oldest(c, of) / RUN * RUN, zeros); };
  Run coming = beginning(row);
  while (coming.begin < end) {
    Run run = coming;
    const int64_t begin = run.begin, after = begin + RUN;
    for (int64_t index = std::max(begin, carried); index < std::min(after, end); ++index)
      put_fresh(run, index - begin, next[index - carried]);
    coming = remembered(c, row, after, zeros);
    const bool last = after >= end && row + 1 < c.rows;  // then the next row is what comes
    met(run, last ? beginning(row + 1) : coming);
  }
  // Documents that begin in this call, in the same runs as if they were remembered, and trees, of which siblings have one
  // index: a column at a time.
  for (size_t i = 0; i < others.size();) {
    const int64_t first = others[i];
    Run run(at[first] / RUN * RUN, zeros);
    for (int64_t index = at[first]; i < others.size() && index < run.begin + RUN; ++index, ++i) {
      if (at[others[i]] != index || segment(others[i]) != segment(first) || (c.parents && others[i] != first)) break;
      put_fresh(run, index - run.begin, others[i]);
    }
    met(run, Run(run.begin, zeros));
  }

  for (int64_t t = 0; t < c.tokens; ++t)
    for (int64_t h = 0; h < mine; ++h) {
      Query& query = state[t * mine + h];
      const float inverse = segment(t) < 0 || query.mass == 0 ? 0.f : 1 / query.mass;
      const int64_t out = ((row * c.tokens + t) * c.heads + from * shared + h) * c.v.size;
      for (int64_t i = 0; i < V; i += WIDTH) {
        const v16 one = load(query.sum + i) * all(inverse), two = load(query.sum + i + 16) * all(inverse);
        if constexpr (std::is_same_v<Number, bfloat>)
          store_pairs(reinterpret_cast<bfloat*>(y) + out + i, one, two);
        else
          store(query.sum + i, one), store(query.sum + i + 16, two);
      }
      if constexpr (!std::is_same_v<Number, bfloat>) {
        if (c.q.narrow)
          put(reinterpret_cast<bfloat*>(y) + out, query.sum, c.v.size);
        else
          put(reinterpret_cast<float*>(y) + out, query.sum, c.v.size);
      }
    }
}

const int64_t* whole(const std::optional<at::Tensor>& x, at::Tensor& kept) {
  if (!x) return nullptr;
  kept = x->contiguous();
  return kept.data_ptr<int64_t>();
}

at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                     const std::optional<at::Tensor>& past_k, const std::optional<at::Tensor>& past_v,
                     const std::optional<at::Tensor>& length, const std::optional<at::Tensor>& positions,
                     const std::optional<at::Tensor>& segments, const std::optional<at::Tensor>& table,
                     const std::optional<at::Tensor>& slopes, const std::optional<at::Tensor>& sinks,
                     const std::optional<at::Tensor>& parents, double scale, int64_t window, double softcap) {
  auto lined = [](const at::Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); };
  const at::Tensor own_q = lined(q), own_k = lined(k), own_v = lined(v);
  at::Tensor y = at::empty({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options());
  if (!y.numel()) return y;
  at::Tensor kept[5], old_k, old_v, own_slopes, own_sinks;
  Call c{};
  c.q = Entries(own_q), c.k = Entries(own_k), c.v = Entries(own_v);
  c.rows = q.size(0), c.tokens = q.size(1), c.heads = q.size(2), c.groups = k.size(2), c.page = c.pages = 1;
  if (past_k) {
    old_k = lined(*past_k), old_v = lined(*past_v);
    c.past_k = Entries(old_k), c.past_v = Entries(old_v);
    c.page = old_k.size(1), c.pages = table ? table->size(1) : 1, c.capacity = c.page * c.pages;
    c.length = whole(length, kept[0]), c.table = whole(table, kept[1]);
  }
  c.positions = whole(positions, kept[2]), c.segments = whole(segments, kept[3]), c.parents = whole(parents, kept[4]);
  if (slopes) own_slopes = slopes->to(at::kFloat).contiguous(), c.slopes = own_slopes.data_ptr<float>();
  if (sinks) own_sinks = sinks->to(at::kFloat).contiguous(), c.sinks = own_sinks.data_ptr<float>();
  c.scale = static_cast<float>(scale), c.softcap = static_cast<float>(softcap), c.window = window;
  const bool past = !past_k || (c.past_k.narrow && c.past_v.narrow);
  c.narrow = c.q.narrow && c.k.narrow && c.v.narrow && past && c.k.size % WIDTH == 0 && c.v.size % WIDTH == 0;
  char* out = static_cast<char*>(y.data_ptr());
  at::parallel_for(0, q.size(0) * c.groups, 1, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    while (begin < end) {
      const int64_t row = begin / c.groups, from = begin % c.groups, to = std::min(c.groups, from + end - begin);
      c.narrow ? attend<bfloat>(c, row, from, to, scratch, out) : attend<float>(c, row, from, to, scratch, out);
      begin += to - from;
    }
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(edifice_cpu, library) {
  library.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor? past_k, Tensor? past_v, Tensor? length, Tensor? positions, "
      "Tensor? segments, Tensor? table, Tensor? slopes, Tensor? sinks, Tensor? parents, float scale, int window, "
      "float softcap) -> Tensor");
}

TORCH_LIBRARY_IMPL(edifice_cpu, CPU, library) { library.impl("attention", attention); }

// Attention of the few tokens of a decode step over a past, paged or not: keys and values are read in place.
//
// Keys are taken in runs of 16 that begin at multiples of 16 of the index in the document, wherever they are stored and
// whether they came with this call or earlier. So a token's result depends neither on the other rows nor on how many
// tokens the call has, bit for bit. Softmax is the online one, in fp32.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "lanes.h"

namespace {

constexpr int64_t RUN = 16;
constexpr float NEVER = -std::numeric_limits<float>::infinity();

// Rows of (rows, columns, groups, size) numbers, read as fp32; rows are batch rows, or pages.
struct Entries {
  const char* data = nullptr;
  int64_t row, column, group, size;
  bool narrow;
  Entries() = default;
  explicit Entries(const at::Tensor& x)
      : data(static_cast<const char*>(x.data_ptr())), row(x.stride(0)), column(x.stride(1)), group(x.stride(2)),
        size(x.size(3)), narrow(x.scalar_type() == at::kBFloat16) {}
  void read(int64_t r, int64_t c, int64_t g, float* to) const {
    const int64_t at = r * row + c * column + g * group;
    if (narrow)
      take(to, reinterpret_cast<const bfloat*>(data) + at, size);
    else
      take(to, reinterpret_cast<const float*>(data) + at, size);
  }
};

struct Call {
  Entries q, k, v, past_k, past_v;
  int64_t tokens, heads, groups, page, pages, capacity;
  const int64_t *length = nullptr, *positions = nullptr, *segments = nullptr, *table = nullptr, *parents = nullptr;
  const float *slopes = nullptr, *sinks = nullptr;
  float scale, softcap;
  int64_t window;
};

struct Query {  // one head of one token
  float* q;     // scaled
  float* sum;
  float most, mass;
};

struct Scratch {  // of one thread, kept from one item to the next
  std::vector<float> numbers;
  std::vector<Query> queries;
  std::vector<int64_t> at, next, others;
  std::vector<uint8_t> sees;
};

// Sixteen keys and values (fp32 lines of K and V channels) meet a query; `mine`: those that it reads. CHANNELS: K and V
// where they are the usual size and known to the compiler, else 0.
template <int CHANNELS>
void meet(Query& query, const float* keys, const float* values, int64_t K, int64_t V, v16 bias, float softcap,
          uint32_t mine) {
  if constexpr (CHANNELS > 0) K = V = CHANNELS;
  v16 part[RUN];
  for (int n = 0; n < RUN; ++n) {
    v16 sum = {};
#pragma GCC unroll 4
    for (int64_t i = 0; i < K; i += 16) sum += load(query.q + i) * load(keys + n * K + i);
    part[n] = sum;
  }
  v16 score = totals(part);
  if (softcap > 0)
    for (int n = 0; n < RUN; ++n) score[n] = softcap * std::tanh(score[n] / softcap);
  const i16 bits = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  score = (bits & static_cast<int32_t>(mine)) != 0 ? score + bias : all(NEVER);
  const float most = std::max(query.most, largest(score));
  const v16 weight = exponential(score - most);
  const float keep = query.most == most ? 1.f : query.most == NEVER ? 0.f : exponential(all(query.most - most))[0];
  query.most = most, query.mass = query.mass * keep + total(weight);
  alignas(64) float weights[RUN];
  store(weights, weight);
#pragma GCC unroll 4
  for (int64_t i = 0; i < V; i += 16) {
    v16 sum = load(query.sum + i) * keep;
#pragma GCC unroll 16
    for (int n = 0; n < RUN; ++n) sum += weights[n] * load(values + n * V + i);
    store(query.sum + i, sum);
  }
}

void attend(const Call& c, int64_t row, int64_t group, Scratch& scratch, char* y, bool narrow) {
  const int64_t shared = c.heads / c.groups, K = (c.k.size + 15) / 16 * 16, V = (c.v.size + 15) / 16 * 16;
  const int64_t carried = c.length ? c.length[row] : 0;
  auto& [numbers, state, at, next, others, sees] = scratch;
  numbers.assign((RUN + c.tokens * shared) * (K + V), 0.f);
  state.resize(c.tokens * shared), at.resize(c.tokens), next.clear(), others.clear();
  float *keys = numbers.data(), *values = keys + RUN * K, *queries = values + RUN * V;
  for (int64_t t = 0; t < c.tokens; ++t) {
    at[t] = c.positions ? c.positions[row * c.tokens + t] : carried + t;
    for (int64_t h = 0; h < shared; ++h) {
      Query& query = state[t * shared + h];
      query.q = queries + (t * shared + h) * (K + V), query.sum = query.q + K;
      c.q.read(row, t, group * shared + h, query.q);
      for (int64_t i = 0; i < K; ++i) query.q[i] *= c.scale;
      query.most = c.sinks ? c.sinks[group * shared + h] : NEVER;
      query.mass = c.sinks ? 1.f : 0.f;
    }
  }
  if (c.parents) {
    sees.assign(c.tokens * c.tokens, 0);
    for (int64_t t = 0; t < c.tokens; ++t)
      for (int64_t up = t; up >= 0; up = c.parents[row * c.tokens + up]) sees[t * c.tokens + up] = 1;
  }
  auto segment = [&](int64_t t) { return c.segments ? c.segments[row * c.tokens + t] : 0; };

  // What is in the scratch now: `lanes` bits of past entries from index `begin` on, or one column in each lane.
  auto run = [&](int64_t begin, const int64_t* columns, uint32_t lanes) {
    for (int64_t t = 0; t < c.tokens; ++t) {
      if (segment(t) < 0 || (!columns && segment(t) != 0)) continue;
      uint32_t mine = columns || c.window ? 0 : lanes;
      for (int n = 0; n < RUN && (columns || c.window); ++n) {
        if (!(lanes >> n & 1) || (c.window && begin + n <= at[t] - c.window)) continue;
        if (columns) {
          const int64_t j = columns[n];
          if (segment(j) != segment(t) || j > t || (c.parents && !sees[t * c.tokens + j])) continue;
        }
        mine |= 1u << n;
      }
      if (!mine) continue;
      for (int64_t h = 0; h < shared; ++h) {
        v16 bias = {};
        if (c.slopes)
          for (int n = 0; n < RUN; ++n)
            bias[n] = -c.slopes[group * shared + h] * static_cast<float>(std::abs(at[t] - begin - n));
        Query& query = state[t * shared + h];
        if (K == 64 && V == 64)
          meet<64>(query, keys, values, K, V, bias, c.softcap, mine);
        else if (K == 128 && V == 128)
          meet<128>(query, keys, values, K, V, bias, c.softcap, mine);
        else
          meet<0>(query, keys, values, K, V, bias, c.softcap, mine);
      }
    }
  };

  // The past, from the first index that any token of the carried document reads.
  int64_t first = std::max<int64_t>(0, carried - c.capacity);
  if (c.window) first = std::max(first, carried - c.window + 1);
  first = std::max<int64_t>(first, 0);
  int64_t begin = first / RUN * RUN;
  // New tokens of the carried document follow at once: their lanes are filled before a run is met.
  // `next` are columns of the carried document, which a tree has not in order of their index.
  for (int64_t t = 0; t < c.tokens; ++t) {
    if (segment(t) == 0 && !c.parents)
      next.push_back(t);
    else if (segment(t) >= 0)
      others.push_back(t);
  }
  const int64_t end = carried + static_cast<int64_t>(next.size());
  for (; begin < end; begin += RUN) {
    uint32_t past = 0, fresh = 0;
    int64_t columns[RUN] = {};
    int64_t slot = begin % std::max<int64_t>(c.capacity, 1);
    int64_t page = slot / c.page, offset = slot % c.page;
    for (int n = 0; n < RUN; ++n) {
      const int64_t index = begin + n;
      if (index >= first && index < carried && c.capacity) {
        const int64_t where = c.table ? c.table[row * c.pages + page] : row;
        c.past_k.read(where, offset, group, keys + n * K);
        c.past_v.read(where, offset, group, values + n * V);
        past |= 1u << n;
      } else if (index >= carried && index < end) {
        columns[n] = next[index - carried];
        c.k.read(row, columns[n], group, keys + n * K);
        c.v.read(row, columns[n], group, values + n * V);
        fresh |= 1u << n;
      } else {
        std::fill(keys + n * K, keys + (n + 1) * K, 0.f);
        std::fill(values + n * V, values + (n + 1) * V, 0.f);
      }
      if (++offset == c.page) offset = 0, page = page + 1 == c.pages ? 0 : page + 1;
    }
    if (!fresh) {
      run(begin, nullptr, past);
      continue;
    }
    // A run that both fill is met once, so that its sums do not tell where the call began: past lanes read as columns
    // that every later token of the document sees.
    for (int n = 0; n < RUN; ++n)
      if (past >> n & 1) columns[n] = next[0];
    run(begin, columns, past | fresh);
  }
  // Documents that begin in this call, and trees: columns as they come, in runs of one index each.
  for (int64_t j : others) {
    const int64_t lane = at[j] % RUN;
    int64_t columns[RUN] = {};
    std::fill(keys, keys + RUN * K, 0.f), std::fill(values, values + RUN * V, 0.f);
    c.k.read(row, j, group, keys + lane * K);
    c.v.read(row, j, group, values + lane * V);
    columns[lane] = j;
    run(at[j] - lane, columns, 1u << lane);
  }

  for (int64_t t = 0; t < c.tokens; ++t)
    for (int64_t h = 0; h < shared; ++h) {
      Query& query = state[t * shared + h];
      const float inverse = segment(t) < 0 || query.mass == 0 ? 0.f : 1 / query.mass;
      for (int64_t i = 0; i < V; i += 16) store(query.sum + i, load(query.sum + i) * inverse);
      const int64_t to = ((row * c.tokens + t) * c.heads + group * shared + h) * c.v.size;
      if (narrow)
        put(reinterpret_cast<bfloat*>(y) + to, query.sum, c.v.size);
      else
        put(reinterpret_cast<float*>(y) + to, query.sum, c.v.size);
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
  c.tokens = q.size(1), c.heads = q.size(2), c.groups = k.size(2), c.page = c.pages = 1;
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
  char* out = static_cast<char*>(y.data_ptr());
  const bool narrow = y.scalar_type() == at::kBFloat16;
  at::parallel_for(0, q.size(0) * c.groups, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch;
    for (int64_t item = begin; item < end; ++item) attend(c, item / c.groups, item % c.groups, scratch, out, narrow);
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

// Lines of tables: picked from panels, written to pages, and the largest number of each.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstring>
#include <limits>

#include "lanes.h"

namespace {

constexpr int64_t GRAIN = 1 << 14;  // bytes that are worth a thread

template <typename Each>
void lines(int64_t count, int64_t bytes, Each&& each) {
  at::parallel_for(0, count, std::max<int64_t>(1, GRAIN / std::max<int64_t>(bytes, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) each(line);
  });
}

// The place of a row's largest number, the first of equals; NaN is larger than all, as it is to torch.
template <typename Number>
int64_t place_of_largest(const Number* row, int64_t count) {
  const float least = -std::numeric_limits<float>::infinity();
  alignas(64) float line[16];
  auto some = [&](int64_t i) {
    if (i + 16 <= count) return load(row + i);
    for (float& x : line) x = least;
    take(line, row + i, count - i);
    return load(line);
  };
  v16 most = all(least), nan = {};
  for (int64_t i = 0; i < count; i += 16) {
    const v16 x = some(i);
    most = x > most ? x : most;
    nan = x == x ? nan : all(1);
  }
  const bool broken = largest(nan) > 0;
  const v16 wanted = all(largest(most)), one = all(1), none = {};
  for (int64_t i = 0; i < count; i += 16) {
    const v16 x = some(i), hit = broken ? (x == x ? none : one) : (x == wanted ? one : none);
    if (largest(hit) > 0)
      for (int64_t n = 0; n < 16; ++n)
        if (hit[n] > 0) return i + n;
  }
  return 0;
}

at::Tensor argmax(const at::Tensor& x) {
  const at::Tensor given = x.contiguous();
  const int64_t rows = x.size(0), count = x.size(1);
  at::Tensor found = at::empty({rows}, x.options().dtype(at::kLong));
  int64_t* to = found.data_ptr<int64_t>();
  lines(rows, count * x.element_size(), [&](int64_t row) {
    to[row] = x.scalar_type() == at::kBFloat16
                  ? place_of_largest(static_cast<const bfloat*>(given.data_ptr()) + row * count, count)
                  : place_of_largest(given.data_ptr<float>() + row * count, count);
  });
  return found;
}

// pool[page, offset] = entries, of (B, T) places
void write_pages(at::Tensor pool, const at::Tensor& page, const at::Tensor& offset, const at::Tensor& entries) {
  if (!page.numel()) return;
  const at::Tensor pages = page.contiguous(), offsets = offset.contiguous();
  const at::Tensor given = entries.select(1, 0).select(0, 0).is_contiguous() ? entries : entries.contiguous();
  const int64_t bytes = pool.stride(1) * pool.element_size(), size = pool.size(1), tokens = page.size(1);
  const int64_t *p = pages.data_ptr<int64_t>(), *o = offsets.data_ptr<int64_t>();
  char* to = static_cast<char*>(pool.data_ptr());
  const char* from = static_cast<const char*>(given.data_ptr());
  for (int64_t n = 0; n < pages.numel(); ++n) {
    TORCH_CHECK_INDEX(p[n] >= 0 && p[n] < pool.size(0) && o[n] >= 0 && o[n] < size, "write_pages: no place ", p[n], ", ",
                      o[n], " in ", pool.sizes());
    const int64_t at = n / tokens * given.stride(0) + n % tokens * given.stride(1);
    std::memcpy(to + (p[n] * size + o[n]) * bytes, from + at * pool.element_size(), bytes);
  }
}

// weight (P, L, 16) of four bytes, ids (N): (N, L), the rows of panels.
at::Tensor picked(const at::Tensor& weight, const at::Tensor& ids) {
  const at::Tensor own = ids.contiguous();
  const int64_t length = weight.size(1), count = ids.numel(), most = weight.size(0) * 16;
  at::Tensor found = at::empty({count, length}, weight.options());
  const int32_t* from = weight.data_ptr<int32_t>();
  const int64_t* id = own.data_ptr<int64_t>();
  int32_t* to = found.data_ptr<int32_t>();
  for (int64_t n = 0; n < count; ++n)
    TORCH_CHECK_INDEX(id[n] >= 0 && id[n] < most, "packed rows: there is no row ", id[n], " of ", most);
  lines(count, length * 64, [&](int64_t n) {
    const int32_t* line = from + (id[n] / 16) * length * 16 + id[n] % 16;
    for (int64_t i = 0; i < length; ++i) to[n * length + i] = line[i * 16];
  });
  return found;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(edifice_cpu, library) {
  library.def("argmax(Tensor x) -> Tensor");
  library.def("write_pages(Tensor(a!) pool, Tensor page, Tensor offset, Tensor entries) -> ()");
  library.def("picked(Tensor weight, Tensor ids) -> Tensor");
}

TORCH_LIBRARY_IMPL(edifice_cpu, CPU, library) {
  library.impl("argmax", argmax);
  library.impl("write_pages", write_pages);
  library.impl("picked", picked);
}

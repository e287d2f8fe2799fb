// The small steps between two products of a layer, each one pass over its input.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>

#include "lanes.h"

namespace {

constexpr int64_t GRAIN = 1 << 14;  // numbers that are worth a thread

// Runs `each` for both widths of numbers.
template <typename Each>
void by_width(at::ScalarType type, Each&& each) {
  if (type == at::kBFloat16)
    each(bfloat{});
  else
    each(float{});
}

template <typename Number>
v16 some(const Number* from, int64_t count) {
  if (count >= 16) return load(from);
  alignas(64) float line[16] = {};
  take(line, from, count);
  return load(line);
}

template <typename Number>
void keep(Number* to, v16 value, int64_t count) {
  if (count >= 16) return store(to, value);
  alignas(64) float line[16];
  store(line, value);
  put(to, line, count);
}

at::Tensor rms_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight, double eps) {
  const at::Tensor given = x.contiguous();
  at::Tensor y = at::empty_like(given), own;
  const int64_t dim = x.size(-1), rows = dim ? x.numel() / dim : 0;
  if (weight) own = weight->to(x.scalar_type()).contiguous();
  by_width(x.scalar_type(), [&](auto kind) {
    using Number = decltype(kind);
    const Number* from = static_cast<const Number*>(given.data_ptr());
    const Number* w = weight ? static_cast<const Number*>(own.data_ptr()) : nullptr;
    Number* to = static_cast<Number*>(y.data_ptr());
    at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / std::max<int64_t>(dim, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        v16 squares = {};
        for (int64_t i = 0; i < dim; i += 16) {
          const v16 part = some(from + r * dim + i, dim - i);
          squares += part * part;
        }
        const float scale = 1 / std::sqrt(total(squares) / dim + static_cast<float>(eps));
        for (int64_t i = 0; i < dim; i += 16) {
          v16 part = some(from + r * dim + i, dim - i) * all(scale);
          if (w) part *= some(w + i, dim - i);
          keep(to + r * dim + i, part, dim - i);
        }
      }
    });
  });
  return y;
}

// gate and up (N, F): lines of their own, each in one piece.
at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& up) {
  const int64_t units = gate.size(-1), rows = units ? gate.numel() / units : 0;
  auto lined = [&](const at::Tensor& x) {  // lines at equal distances, as halves of one projection are
    bool even = x.stride(-1) == 1;
    for (int64_t d = x.dim() - 2; d > 0; --d) even = even && (x.size(d - 1) == 1 || x.stride(d - 1) == x.size(d) * x.stride(d));
    return even ? x : x.contiguous();
  };
  const at::Tensor one = lined(gate), two = lined(up);
  at::Tensor y = at::empty(gate.sizes(), gate.options());
  const int64_t step[2] = {gate.dim() > 1 ? one.stride(-2) : units, gate.dim() > 1 ? two.stride(-2) : units};
  by_width(gate.scalar_type(), [&](auto kind) {
    using Number = decltype(kind);
    const Number *a = static_cast<const Number*>(one.data_ptr()), *b = static_cast<const Number*>(two.data_ptr());
    Number* to = static_cast<Number*>(y.data_ptr());
    at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / std::max<int64_t>(units, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        for (int64_t i = 0; i < units; i += 16) {
          const v16 g = some(a + r * step[0] + i, units - i), u = some(b + r * step[1] + i, units - i);
          keep(to + r * units + i, gated(g, u), units - i);
        }
    });
  });
  return y;
}

at::Tensor rope(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool interleaved) {
  const at::Tensor given = x.stride(3) == 1 ? x : x.contiguous();
  const at::Tensor c = cos.to(at::kFloat).contiguous(), s = sin.to(at::kFloat).contiguous();
  at::Tensor y = at::empty(x.sizes(), x.options());
  const int64_t T = x.size(1), H = x.size(2), K = x.size(3), R = cos.size(2);
  by_width(x.scalar_type(), [&](auto kind) {
    using Number = decltype(kind);
    const Number* from = static_cast<const Number*>(given.data_ptr());
    Number* to = static_cast<Number*>(y.data_ptr());
    const int64_t tokens = x.size(0) * T;
    at::parallel_for(0, tokens, std::max<int64_t>(1, GRAIN / std::max<int64_t>(H * K, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; ++token) {
        const int64_t row = token / T, t = token % T;
        const float* cosine = c.data_ptr<float>() + ((c.size(0) == 1 ? 0 : row) * T + t) * R;
        const float* sine = s.data_ptr<float>() + ((s.size(0) == 1 ? 0 : row) * T + t) * R;
        for (int64_t h = 0; h < H; ++h) {
          const Number* a = from + row * given.stride(0) + t * given.stride(1) + h * given.stride(2);
          Number* b = to + (token * H + h) * K;
          if (interleaved) {
            for (int64_t i = 0; i < R; ++i) {
              float first, second;
              take(&first, a + 2 * i, 1), take(&second, a + 2 * i + 1, 1);
              const float ends[2] = {first * cosine[i] - second * sine[i], second * cosine[i] + first * sine[i]};
              put(b + 2 * i, ends, 2);
            }
          } else {
            for (int64_t i = 0; i < R; i += 16) {
              const int64_t count = R - i;
              const v16 first = some(a + i, count), second = some(a + R + i, count);
              const v16 cs = some(cosine + i, count), sn = some(sine + i, count);
              keep(b + i, first * cs - second * sn, count);
              keep(b + R + i, second * cs + first * sn, count);
            }
          }
          for (int64_t i = 2 * R; i < K; ++i) b[i] = a[i];
        }
      }
    });
  });
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(edifice_cpu, library) {
  library.def("rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor");
  library.def("swiglu(Tensor gate, Tensor up) -> Tensor");
  library.def("rope(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor");
}

TORCH_LIBRARY_IMPL(edifice_cpu, CPU, library) {
  library.impl("rms_norm", rms_norm);
  library.impl("swiglu", swiglu);
  library.impl("rope", rope);
}

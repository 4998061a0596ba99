// Unquantized products, attention and norms of a decode step. Compiled once for each instruction set, see
// moe_cpu/vectors.h.
#include <cmath>
#include <type_traits>

#include "moe_cpu/kernels.h"
#include "moe_cpu/vectors.h"

namespace gemq {
namespace {

// Elements [i, i + kLanes) of a buffer as float32.
template <Element E>
GEMQ_INLINE Float load_as(const void* base, int64_t i) {
  if constexpr (E == kElementFloat32) {
    return load<Float>(static_cast<const float*>(base) + i);
  } else if constexpr (E == kElementFloat16) {
    return load_half(static_cast<const uint16_t*>(base) + i);
  } else {
    using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));
    const auto halves = load<Halves>(static_cast<const uint16_t*>(base) + i);
    return (Float)(__builtin_convertvector(halves, Word) << 16);
  }
}

template <Element E>
GEMQ_INLINE float one_as(const void* base, int64_t i) {
  if constexpr (E == kElementFloat32) return static_cast<const float*>(base)[i];
  const uint16_t bits = static_cast<const uint16_t*>(base)[i];
  return E == kElementFloat16 ? half_to_float(bits) : bits_float(static_cast<uint32_t>(bits) << 16);
}

template <class F>
GEMQ_INLINE void with_element(Element type, F&& f) {
  switch (type) {
    case kElementFloat32:
      return f(std::integral_constant<Element, kElementFloat32>());
    case kElementFloat16:
      return f(std::integral_constant<Element, kElementFloat16>());
    default:
      return f(std::integral_constant<Element, kElementBFloat16>());
  }
}

// One row after another, so that memory is read in one stream; T tokens share what is loaded. A token's sum
// runs in the same two chains whatever T is, so that it does not depend on the other tokens.
template <Element E, int T>
void dense_rows(const DenseArgs& a, int first_token, float* out) {
  constexpr int kChains = 2, kLoads = T == 1 ? 4 : 2, kStep = kLoads * kLanes;
  const float* x[T];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) x[t] = a.x + (first_token + t) * a.x_stride;
  const auto* row = static_cast<const char*>(a.weights);
  for (int r = 0; r < a.rows; ++r, row += static_cast<int64_t>(a.k) * element_bytes(E)) {
    Float sum[T][kChains] = {};
    int i = 0;
    for (; i + kStep <= a.k; i += kStep) {
      const char* at = row + i * element_bytes(E);
#pragma GCC unroll 4
      for (int line = 0; line < kStep * element_bytes(E); line += 64) prefetch(at + kAhead + line);
#pragma GCC unroll 4
      for (int c = 0; c < kLoads; ++c) {
        const Float w = load_as<E>(at, c * kLanes);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) sum[t][c % kChains] += w * load<Float>(x[t] + i + c * kLanes);
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < kLoads; ++c) {
      if (i + kLanes > a.k) break;
      const Float w = load_as<E>(row, i);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) sum[t][c % kChains] += w * load<Float>(x[t] + i);
      i += kLanes;
    }
    float* to = out + (r / kRows * a.tokens + first_token) * kRows + r % kRows;
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
      for (int c = 1; c < kChains; ++c) sum[t][0] += sum[t][c];
      float value = total(sum[t][0]);
      for (int rest = i; rest < a.k; ++rest) value += one_as<E>(row, rest) * x[t][rest];
      to[t * kRows] = value;
    }
  }
}

// sums[h] += key . query h of N heads, `step` floats apart
template <Element E, int N>
GEMQ_INLINE void dots(const char* key, const float* query, int64_t step, int count, float* sums) {
  Float sum[N] = {};
  int d = 0;
  for (; d + kLanes <= count; d += kLanes) {
    const Float k = load_as<E>(key, d);
#pragma GCC unroll 4
    for (int h = 0; h < N; ++h) sum[h] += k * load<Float>(query + h * step + d);
  }
#pragma GCC unroll 4
  for (int h = 0; h < N; ++h) {
    sums[h] += total(sum[h]);
    for (int rest = d; rest < count; ++rest) sums[h] += one_as<E>(key, rest) * query[h * step + rest];
  }
}

// scores[j] = scale * query . key j of N heads, and the largest of each head.
template <Element E, int N>
GEMQ_INLINE void score(const AttendArgs& a, int first, int64_t stride) {
  const int64_t step = a.dim + a.more;
  const float* query = a.queries + first * step;
  float most[N];
#pragma GCC unroll 4
  for (int h = 0; h < N; ++h) most[h] = -INFINITY;
  const auto *key = static_cast<const char*>(a.keys), *more = static_cast<const char*>(a.more_keys);
  for (int64_t j = 0; j < a.count; ++j) {
    float sums[N] = {};
    dots<E, N>(key, query, step, a.dim, sums);
    key += static_cast<int64_t>(a.dim) * element_bytes(E);
    if (a.more > 0) {
      dots<E, N>(more, query + a.dim, step, a.more, sums);
      more += static_cast<int64_t>(a.more) * element_bytes(E);
    }
#pragma GCC unroll 4
    for (int h = 0; h < N; ++h) {
      const float value = sums[h] * a.scale;
      a.scores[(first + h) * stride + j] = value;
      most[h] = value > most[h] ? value : most[h];
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < N; ++h) a.most[first + h] = most[h];
}

// scores to e^(score - most) and their sum. A NaN stays one.
GEMQ_INLINE float soften(float* scores, int64_t count, int64_t stride, float most) {
  for (int64_t j = count; j < stride; ++j) scores[j] = -INFINITY;
  Float sum = {};
  for (int64_t j = 0; j < stride; j += kLanes) {
    const Float p = exp_float(load<Float>(scores + j) - most);
    store(scores + j, p);
    sum += p;
  }
  return total(sum);
}

template <Element E, int N, int V>
GEMQ_INLINE void weigh_columns(const AttendArgs& a, int first, int64_t stride, int d) {
  Float sum[N][V] = {};
  const auto* value = static_cast<const char*>(a.values);
  const float* p = a.scores + first * stride;
  for (int64_t j = 0; j < a.count; ++j, value += static_cast<int64_t>(a.dim) * element_bytes(E)) {
    Float v[V];
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) v[i] = load_as<E>(value, d + i * kLanes);
#pragma GCC unroll 4
    for (int h = 0; h < N; ++h) {
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i) sum[h][i] += p[h * stride + j] * v[i];
    }
  }
#pragma GCC unroll 4
  for (int h = 0; h < N; ++h) {
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) store(a.out + (first + h) * a.dim + d + i * kLanes, sum[h][i]);
  }
}

template <Element E, int N>
GEMQ_INLINE void weigh(const AttendArgs& a, int first, int64_t stride) {
  int d = 0;
  for (; d + 2 * kLanes <= a.dim; d += 2 * kLanes) weigh_columns<E, N, 2>(a, first, stride, d);
  for (; d + kLanes <= a.dim; d += kLanes) weigh_columns<E, N, 1>(a, first, stride, d);
  for (; d < a.dim; ++d) {
    for (int h = first; h < first + N; ++h) {
      float sum = 0;
      for (int64_t j = 0; j < a.count; ++j)
        sum += a.scores[h * stride + j] * one_as<E>(a.values, j * a.dim + d);
      a.out[h * a.dim + d] = sum;
    }
  }
}

}  // namespace

namespace GEMQ_VARIANT {

void dense_product(const DenseArgs& a, float* out) {
  with_element(a.type, [&](auto element) {
    in_runs<4>(a.tokens, [&](auto count, int first) {
      dense_rows<decltype(element)::value, decltype(count)::value>(a, first, out);
    });
  });
}

void attend(const AttendArgs& a) {
  const int64_t stride = score_stride(a.count);
  with_element(a.type, [&](auto element) {
    constexpr Element E = decltype(element)::value;
    in_runs<4>(a.heads, [&](auto count, int first) {
      constexpr int N = decltype(count)::value;
      score<E, N>(a, first, stride);
      for (int h = first; h < first + N; ++h) {
        a.sums[h] = soften(a.scores + h * stride, a.count, stride, a.most[h]);
      }
      weigh<E, N>(a, first, stride);
    });
  });
}

void rms_norm(const float* x, const float* weight, int64_t count, float eps, float* out) {
  Float squares[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const Float a = load<Float>(x + i), b = load<Float>(x + i + kLanes);
    squares[0] += a * a;
    squares[1] += b * b;
  }
  float sum = total(squares[0] + squares[1]);
  for (; i < count; ++i) sum += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(sum / static_cast<float>(count) + eps);
  for (i = 0; i + kLanes <= count; i += kLanes) {
    store(out + i, load<Float>(x + i) * factor * load<Float>(weight + i));
  }
  for (; i < count; ++i) out[i] = x[i] * factor * weight[i];
}

void rotate(const float* x, const float* cosines, const float* sines, int rotary, int dim, float* out) {
  const int half = rotary / 2;
  for (int i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    out[i] = a * cosines[i] + b * sines[i];
    out[i + half] = b * cosines[i + half] + a * sines[i + half];
  }
  for (int i = rotary; i < dim; ++i) out[i] = x[i];
}

}  // namespace GEMQ_VARIANT
}  // namespace gemq

// GPTQ inside one group: the grid of a row, and its columns quantized left to right, each error propagated to
// the later ones; and descent over the codes that this chose. One text for the CPU, where a value is a vector
// of rows, and for CUDA, where it is one row's float.
//
// Ops names V (the value), I (its 32-bit integers) and a few operations; `w(k)` is column k of the rows.
#pragma once

#include "gemq/half.h"
#include "gptq/group.h"

namespace gemq {

constexpr float kTinyHalf = 5.9604644775390625e-8f;  // 2^-24, the smallest float16 above zero

template <class V>
struct Grid {
  V s, m;
};

template <class V>
GEMQ_HD V lesser(V a, V b) {
  return a < b ? a : b;
}

template <class V>
GEMQ_HD V greater(V a, V b) {
  return a > b ? a : b;
}

// To the nearest integer, ties to even, for values in 0..2^22: the sum with 2^23 has no bits behind the
// point.
template <class V>
GEMQ_HD V nearest(V value) {
  return (value + 8388608.0f) - 8388608.0f;
}

// log2 and exp2 to about 1e-6, as plain arithmetic that vectorises.
template <class Ops, class V>
GEMQ_HD V fast_log2(V x) {
  using I = typename Ops::I;
  const I shifted = Ops::bits(x) - 0x3f3504f3;  // mantissa into [sqrt(1/2), sqrt(2))
  const V exponent = Ops::to_float(shifted >> 23);
  const V t = Ops::from_bits((shifted & 0x007fffff) + 0x3f3504f3) - 1.0f;
  V p = t * 0.172130747f - 0.269509344f;  // log2(1 + t) / t, a least-squares fit
  p = p * t + 0.295634105f;
  p = p * t - 0.359350379f;
  p = p * t + 0.480629104f;
  p = p * t - 0.721364045f;
  p = p * t + 1.44269643f;
  return exponent + t * p;
}

// For -120 <= x <= 120.
template <class Ops, class V>
GEMQ_HD V fast_exp2(V x) {
  const V shifted = x + 12582912.0f;  // 1.5 * 2^23: an integer in the low bits
  const V f = x - (shifted - 12582912.0f);
  const V p =
      1.0f + f * (0.693147181f +
                  f * (0.240226507f + f * (0.0555041087f + f * (0.00961812911f + f * 0.00133335581f))));
  return Ops::from_bits(Ops::bits(p) + (Ops::bits(shifted) << 23));
}

template <class V>
GEMQ_HD V code_of(V w, const Grid<V>& grid, float max_code) {
  const V code = (w - grid.m) / grid.s, zero = code - code;
  return nearest(lesser(greater(code, zero), zero + max_code));
}

// |error|^2 and, as the paper's scripts have it, |error|^2.4, from error^2; both up to a factor of the row.
// `root` undoes the power, so that root(sum) is a norm of the errors.
template <class Ops>
struct SquareNorm {
  using V = typename Ops::V;
  GEMQ_DEVICE_TOO explicit SquareNorm(V) {}
  GEMQ_DEVICE_TOO V operator()(V square) const { return square; }
  GEMQ_DEVICE_TOO static V root(V sum) { return fast_exp2<Ops>(0.5f * fast_log2<Ops>(sum + 1e-36f)); }
};

template <class Ops>
struct PowerNorm {
  using V = typename Ops::V;
  GEMQ_DEVICE_TOO explicit PowerNorm(V) {}
  // 1e-36 keeps the logarithm of an exact hit finite; its term vanishes beside any other
  GEMQ_DEVICE_TOO V operator()(V square) const {
    return fast_exp2<Ops>(greater(1.2f * fast_log2<Ops>(square + 1e-36f), V{} - 120.0f));
  }
  GEMQ_DEVICE_TOO static V root(V sum) {
    return fast_exp2<Ops>(fast_log2<Ops>(sum + 1e-36f) * (1.0f / 2.4f));
  }
};

// Only compared, so it multiplies by 1 / s where the codes themselves are divided: a tie may fall to either
// side.
template <class Norm, class V, class Columns>
GEMQ_HD V grid_error(const Columns& w, int group, const Norm& norm, const Grid<V>& grid, float max_code) {
  const V zero = V{}, most = zero + max_code, inverse = 1.0f / grid.s, shift = grid.m * inverse;
  V sum = V{};
  for (int k = 0; k < group; ++k) {
    const V value = w(k);
    const V code = nearest(lesser(greater(value * inverse - shift, zero), most));
    const V error = code * grid.s + grid.m - value;
    sum += norm(error * error);
  }
  return sum;
}

template <class Ops, class V>
GEMQ_HD Grid<V> scaled_range(V low, V high, V factor, float max_code) {
  return {greater(Ops::half(factor * (high - low) / max_code), V{} + kTinyHalf), Ops::half(factor * low)};
}

template <class Ops, class Columns>
GEMQ_HD Grid<typename Ops::V> binary_grid(const Columns& w, int group) {
  using V = typename Ops::V;
  V sum = V{};
  for (int k = 0; k < group; ++k) {
    const V value = w(k);
    sum += greater(value, -value);
  }
  const V s = greater(Ops::half(2.0f * (sum / static_cast<float>(group))), V{} + kTinyHalf);
  return {s, Ops::half(s * -0.5f)};
}

// Factors first, first + step, ... around 1, which is number `unscaled`.
struct Factors {
  float step;
  int unscaled, count;
};

GEMQ_HD Factors factors_of(Clip clip) {
  return clip == Clip::kPaper ? Factors{0.002f, 50, 101} : Factors{0.02f, 40, 41};
}

// The factor of the least error for every row; ties keep the unscaled range. Rows go upwards through the
// factors each at their own pace: levels are proportional to the factor f and a weight is at most s / 2 from
// its level unless it lies outside, so from f to f' the norm of the errors falls by (f' - f) * (|w| / f +
// |s / 2|) at most (norms over the group, s at f = 1), and factors that cannot reach the best one so far are
// passed over. float16's smallest steps are in the bound as `rounded`. Its relative rounding is not: the
// bound has room for it unless all weights of a row are at one end, which then lie 2^-11 of their size off at
// most.
template <class Ops, class Norm, class Columns>
GEMQ_HD Grid<typename Ops::V> best_range(const Columns& w, int group, typename Ops::V low,
                                         typename Ops::V high, const Factors& factors, float max_code) {
  using V = typename Ops::V;
  const V zero = V{}, one = zero + 1.0f, half_step = (high - low) * (0.5f / max_code);
  const float last = static_cast<float>(factors.count - 1), unscaled = static_cast<float>(factors.unscaled);
  const Norm norm(high - low);
  V total = zero;
  for (int k = 0; k < group; ++k) total += norm(w(k) * w(k));
  const V weights = Norm::root(total);
  const V steps = Norm::root(norm(half_step * half_step) * static_cast<float>(group));
  const V least = V{} + (max_code + 1) * kTinyHalf;
  const V rounded = Norm::root(norm(least * least) * static_cast<float>(group));
  Grid<V> grid = scaled_range<Ops>(low, high, one, max_code);
  V best = grid_error(w, group, norm, grid, max_code);
  for (V number = zero; Ops::any_below(number, last + 0.5f);) {
    const V factor = (lesser(number, zero + last) - unscaled) * factors.step + 1.0f;
    const Grid<V> tried = scaled_range<Ops>(low, high, factor, max_code);
    const V error = grid_error(w, group, norm, tried, max_code);
    grid.s = error < best ? tried.s : grid.s;
    grid.m = error < best ? tried.m : grid.m;
    best = lesser(error, best);
    const V fall = factors.step * (weights / factor + steps) + 1e-30f;
    const V passed = (Norm::root(error) - Norm::root(best) - rounded) / fall;
    // rounded down, and an integer to one less
    number += nearest(lesser(greater(passed - 0.5f, zero), zero + last)) + 1.0f;
  }
  return grid;
}

template <class Ops, class Columns>
GEMQ_HD Grid<typename Ops::V> find_grid(const Columns& w, int group, int bits, Clip clip) {
  using V = typename Ops::V;
  if (bits == 1) return binary_grid<Ops>(w, group);
  const float max_code = static_cast<float>((1 << bits) - 1);
  V low = V{}, high = V{};
  for (int k = 0; k < group; ++k) {
    const V value = w(k);
    low = lesser(low, value);
    high = greater(high, value);
  }
  if (clip == Clip::kNone) return scaled_range<Ops>(low, high, V{} + 1.0f, max_code);
  if (clip == Clip::kMse) {
    return best_range<Ops, SquareNorm<Ops>>(w, group, low, high, factors_of(clip), max_code);
  }
  return best_range<Ops, typename Ops::PaperNorm>(w, group, low, high, factors_of(clip), max_code);
}

// What these columns' values take off the ones that follow them, in the same order as one by one: later
// columns are read and written once. `rows` is the factor's or Hessian's row of the first one.
template <int kTogether, class V, class Columns>
GEMQ_HD void take_off_later(const Columns& w, const float* rows, int first, int group,
                            const V (&values)[kTogether]) {
  for (int j = first + kTogether; j < group; ++j) {
    V value = w(j);
    GEMQ_UNROLL
    for (int i = 0; i < kTogether; ++i) value -= values[i] * rows[i * group + j];
    w(j) = value;
  }
}

// Calls put(column, codes as floats, errors) from left to right; w is used up.
template <class Ops, class Columns, class Put>
GEMQ_HD void quantize_columns(const Columns& w, const float* factor, int group, int bits, bool propagate,
                              const Grid<typename Ops::V>& grid, Put&& put) {
  using V = typename Ops::V;
  constexpr int kTogether = 4;
  const float max_code = static_cast<float>((1 << bits) - 1);
  for (int first = 0; first < group; first += kTogether) {
    const float* rows = factor + static_cast<int64_t>(first) * group;
    V errors[kTogether];
    GEMQ_UNROLL
    for (int i = 0; i < kTogether; ++i) {
      const float* row = rows + i * group + first;
      const V value = w(first + i), zero = V{}, one = zero + 1.0f;
      const V code = bits == 1 ? (value >= zero ? one : zero) : code_of(value, grid, max_code);
      errors[i] = (value - (code * grid.s + grid.m)) / row[i];
      put(first + i, code, errors[i]);
      if (!propagate) continue;
      GEMQ_UNROLL
      for (int j = i + 1; j < kTogether; ++j) w(first + j) -= errors[i] * row[j];
    }
    if (propagate) take_off_later(w, rows, first, group, errors);
  }
}

// Coordinate descent over a group's codes, left to right: get(column) is a code as a float, put(column, code)
// the best one for the output error while all others stay. `products` are (weights - quantized) H in these
// columns and are used up; `hessian` is H's block on the diagonal.
template <class V, class Columns, class Get, class Put>
GEMQ_HD void descend_columns(const Columns& products, const float* hessian, int group, int bits, V scale,
                             Get&& get, Put&& put) {
  constexpr int kTogether = 4;
  const V zero = V{}, most = zero + static_cast<float>((1 << bits) - 1);
  for (int first = 0; first < group; first += kTogether) {
    const float* rows = hessian + static_cast<int64_t>(first) * group;
    V changes[kTogether];
    GEMQ_UNROLL
    for (int i = 0; i < kTogether; ++i) {
      const float* row = rows + i * group + first;
      const V old = get(first + i), best = old + products(first + i) / (row[i] * scale);
      const V chosen = nearest(lesser(greater(best, zero), most));
      changes[i] = (chosen - old) * scale;
      put(first + i, chosen);
      GEMQ_UNROLL
      for (int j = i + 1; j < kTogether; ++j) products(first + j) -= changes[i] * row[j];
    }
    take_off_later(products, rows, first, group, changes);
  }
}

}  // namespace gemq

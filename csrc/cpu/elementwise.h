// Activations, losses and the input's rows: everything of a step that is not a product. Included per instruction set.
#pragma once

#include "gemm.h"

namespace dante {
namespace {

using Bits = int32_t __attribute__((vector_size(kLanes * 4)));

inline Vec magnitude(Vec z) { return (Vec)((Bits)z & 0x7fffffff); }

// exp(x) for x <= 0, to about an ulp and down to denormal results: x = n ln 2 + r with a polynomial in r (Cephes' expf).
// NaN stays NaN.
inline Vec exp_of_negative(Vec x) {
  x = x < -104.0f ? broadcast(-104.0f) : x;
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
  const Vec shifted = x * 1.44269504f + magic;
  const Vec n = shifted - magic;
  const Vec r = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), x));
  Vec p = fma(broadcast(1.9875691500e-4f), r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  const Vec y = fma(p * r, r, r) + 1.0f;
  // 2^n as two factors, since one alone would underflow before the product does.
  const Bits exponent = (Bits)shifted - (Bits)magic, half = exponent >> 1;
  const auto power = [](Bits e) { return (Vec)((e + 127) * (1 << 23)); };
  return y * power(half) * power(exponent - half);
}

// sigmoid(z) and its derivative, both without cancellation: with e = exp(-|z|) they are 1 / (1 + e), or e / (1 + e) for
// negative z, and e / (1 + e)^2.
inline Vec sigmoid(Vec z, Vec& slope) {
  const Vec e = exp_of_negative(-magnitude(z));
  const Vec inverse = 1.0f / (1.0f + e);
  slope = e * inverse * inverse;
  return z < 0 ? e * inverse : inverse;
}

// tanh(z): an odd polynomial (Cephes' tanhf) below 0.625, where the other form would cancel; its derivative is
// 1 - tanh(z)^2 = 4 sigmoid'(2 z), which does not cancel where tanh saturates.
inline Vec tanh(Vec z, Vec& slope) {
  const Vec s = z * z, e = exp_of_negative(-2.0f * magnitude(z)), inverse = 1.0f / (1.0f + e);
  slope = 4.0f * e * inverse * inverse;
  Vec p = fma(broadcast(-5.70498872745e-3f), s, broadcast(2.06390887954e-2f));
  p = fma(p, s, broadcast(-5.37397155531e-2f));
  p = fma(p, s, broadcast(1.33314422036e-1f));
  p = fma(p, s, broadcast(-3.33332819422e-1f));
  const Vec near = fma(z * s, p, z), far = (1.0f - e) * inverse;
  return magnitude(z) < 0.625f ? near : (z < 0 ? -far : far);
}

// One row: h = phi(z + bias) and, where asked for, slope = g(z + bias); h may be z. n values each, bias dense or null.
inline void activate(Activation phi, const float* z, const float* bias, float* h, float* slope, int64_t n) {
  if (phi.kind == Kind::generalized_relu) {
    const float a = phi.a, b = phi.b;
    for (int64_t j = 0; j < n; ++j) {
      const float value = bias ? z[j] + bias[j] : z[j];
      h[j] = value > 0 ? b * value : a * value;
      if (slope) slope[j] = value < 0 ? a : b;
    }
    return;
  }
  for (int64_t j = 0; j < n; j += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, n - j);
    const size_t bytes = static_cast<size_t>(count) * sizeof(float);
    Vec value = {}, shift = {}, g;
    std::memcpy(&value, z + j, bytes);
    if (bias) std::memcpy(&shift, bias + j, bytes);
    const Vec result = phi.kind == Kind::sigmoid ? sigmoid(value + shift, g) : tanh(value + shift, g);
    std::memcpy(h + j, &result, bytes);
    if (slope) std::memcpy(slope + j, &g, bytes);
  }
}

// One row of targets as n values: a class becomes its one-hot row, a class out of range a row of NaN.
inline void target_row(const Target& target, int64_t row, float* values, int64_t n) {
  if (!target.classes) {
    for (int64_t j = 0; j < n; ++j) values[j] = target.values[row * target.row_stride + j * target.col_stride];
    return;
  }
  const int64_t label = target.classes[row * target.row_stride];
  const bool valid = label >= 0 && label < n;
  std::fill_n(values, n, valid ? 0.0f : std::numeric_limits<float>::quiet_NaN());
  if (valid) values[label] = 1.0f;
}

// log sum_j exp(h_j - top), and p = softmax(h), of one row; `top` is its largest element.
inline double log_sum_exp(const float* h, float top, float* p, int64_t n) {
  double sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += p[j] = std::exp(h[j] - top);
  const float inverse = static_cast<float>(1 / sum);
  for (int64_t j = 0; j < n; ++j) p[j] *= inverse;
  return std::log(sum);
}

// One row's share of the loss, before the factor of `loss_factor`; d = (dJ/dh) * slope, in place in `slope`.
// `scale` is the factor of the gradient; h (the output), t (the target) and p (scratch) have n values.
inline double loss_row(Loss loss, float scale, const float* h, const float* t, float* p, float* slope, int64_t n) {
  double sum = 0;
  if (loss == Loss::mse) {
    for (int64_t j = 0; j < n; ++j) {
      const float difference = h[j] - t[j];
      sum += static_cast<double>(difference) * difference;
      slope[j] *= difference * scale;
    }
  } else if (loss == Loss::cross_entropy) {
    float top = h[0];
    double mass = 0;
    for (int64_t j = 0; j < n; ++j) {
      top = h[j] > top ? h[j] : top;
      mass += t[j];
    }
    const double log_sum = log_sum_exp(h, top, p, n);
    for (int64_t j = 0; j < n; ++j) {
      if (t[j] != 0) sum -= t[j] * (static_cast<double>(h[j] - top) - log_sum);
      slope[j] *= (p[j] * static_cast<float>(mass) - t[j]) * scale;
    }
  } else {
    for (int64_t j = 0; j < n; ++j) {
      const float e = std::exp(-std::fabs(h[j]));
      sum += std::log1p(e) + (h[j] < 0 ? 0.0f : h[j]) - static_cast<double>(h[j]) * t[j];
      slope[j] *= ((h[j] < 0 ? e : 1.0f) / (1.0f + e) - t[j]) * scale;
    }
  }
  return sum;
}

// What the rows' sums are multiplied with: one over the number of rows, or of elements.
inline double loss_factor(Loss loss, int64_t rows, int64_t n) {
  const double count = static_cast<double>(rows);
  return 1 / (loss == Loss::cross_entropy ? count : count * static_cast<double>(n));
}

inline float widen(float value, float) { return value; }
inline float widen(uint8_t value, float scale) { return static_cast<float>(value) * scale; }
inline float widen(uint16_t bfloat16, float) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <typename T>
void gather_rows_as(const Input& x, int64_t first, int64_t rows, const Dense& to, int64_t at) {
  const float scale = x.scale;  // as a member it might be what is written below
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = static_cast<const T*>(x.data) + x.row(first + r) * x.row_stride;
    float* out = to.row(at + r);
    if (x.col_stride == 1) {
      for (int64_t j = 0; j < x.cols; ++j) out[j] = widen(from[j], scale);
    } else {
      for (int64_t j = 0; j < x.cols; ++j) out[j] = widen(from[j * x.col_stride], scale);
    }
  }
}

// Visits first .. first + rows of the input, gathered, widened to float32 and scaled, to rows at .. at + rows of `to`.
inline void gather_rows(const Input& x, int64_t first, int64_t rows, const Dense& to, int64_t at) {
  switch (x.element) {
    case Element::float32:
      return gather_rows_as<float>(x, first, rows, to, at);
    case Element::bfloat16:
      return gather_rows_as<uint16_t>(x, first, rows, to, at);
    case Element::uint8:
      return gather_rows_as<uint8_t>(x, first, rows, to, at);
  }
}

}  // namespace
}  // namespace dante

// The SNGD step on one layer, and what shares its parts: the layer's forward pass and its gradient.
// Included once per instruction set; see kernels_*.cpp.
#pragma once

#include "elementwise.h"
#include "gemm.h"

namespace dante {
namespace {

// Rows that go through the chain at a time: bounds the workspace for any batch size, and keeps a chunk of activations
// in the L2 cache. A multiple of the product's block of K, so that a batch's chunks add up as its blocks do.
constexpr int64_t kChunk = 4 * kDepth;

inline Packed pack_forward(const Matrix& w) { return pack(w.data, w.cols, w.rows, w.col_stride, w.row_stride); }
inline Packed pack_backward(const Matrix& w) { return pack(w.data, w.rows, w.cols, w.row_stride, w.col_stride); }

inline std::vector<float> dense(const Vector& v) {
  std::vector<float> values(static_cast<size_t>(v.data ? v.size : 0));
  for (size_t i = 0; i < values.size(); ++i) values[i] = v.data[static_cast<int64_t>(i) * v.stride];
  return values;
}

inline void write_back(const std::vector<float>& values, const Vector& v) {
  for (size_t i = 0; i < values.size(); ++i) v.data[static_cast<int64_t>(i) * v.stride] = values[i];
}

// A layer of the chain with its weights packed and its activations of one chunk.
struct Stage {
  Packed weight;            // (n_in, n_out): W^T, the forward product's B
  Packed backward;          // (n_out, n_in): W, the backward product's B; only in the suffix
  std::vector<float> bias;  // (n_out,) or empty
  Activation phi;
  Dense h;  // (chunk, n_out): h = phi(Z); on the way back dJ/dh
  Dense d;  // (chunk, n_out): g(Z), then D = dJ/dZ; the columns that fill up a panel stay zero

  Stage(const Layer& layer, bool frozen, int64_t chunk)
      : weight(pack_forward(layer.weight)),
        backward(frozen ? pack_backward(layer.weight) : Packed()),
        bias(dense(layer.bias)),
        phi(layer.phi),
        h(chunk, layer.weight.rows),
        d(chunk, layer.weight.rows) {}
};

// s^2 of a packed gradient (depth, width), summed in double, column by column, without the columns that fill a panel.
template <int V>
double square_sum(const float* data, int64_t rows, int64_t row_stride, int64_t width) {
  typedef float Half __attribute__((vector_size(kLanes * 2), aligned(4), may_alias));
  typedef double Wide __attribute__((vector_size(kLanes * 4)));
  Wide acc[2 * V] = {};
  for (int64_t r = 0; r < rows; ++r, data += row_stride) {
    for (int i = 0; i < 2 * V; ++i) {
      const Wide value = __builtin_convertvector(*reinterpret_cast<const Half*>(data + i * (kLanes / 2)), Wide);
      acc[i] += value * value;
    }
  }
  double sum = 0;
  for (int64_t j = 0; j < width; ++j) sum += acc[j / (kLanes / 2)][j % (kLanes / 2)];
  return sum;
}

inline double square_sum(const Packed& packed) {
  const Panels panels = packed.panels();
  double sum = 0;
  for (int64_t j = 0; j < packed.width; j += kPanel) {
    const float* data = panels.data + j / kPanel * panels.panel_stride;
    if (packed.width - j >= kPanel) {
      sum += square_sum<kVectors>(data, packed.depth, panels.row_stride, kPanel);
      continue;
    }
    for (int64_t i = j; i < packed.width; i += kLanes) {
      sum += square_sum<1>(data + i - j, packed.depth, panels.row_stride, std::min<int64_t>(kLanes, packed.width - i));
    }
  }
  return sum;
}

// G / s is taken as (G up) inverse, with `up` a power of two near 1 / s, so that no factor over- or underflows even
// where s is denormal.
struct Normalizer {
  float up, inverse;
  explicit Normalizer(float norm) {
    int exponent;
    std::frexp(norm, &exponent);
    up = std::ldexp(1.0f, std::clamp(-exponent, -126, 126));
    inverse = static_cast<float>(1 / (static_cast<double>(norm) * up));
  }
};

// W <- W - lr G / s over n values, a multiple of kLanes.
inline void descend(float* w, const float* g, int64_t n, float lr, Normalizer s) {
  const Vec up = broadcast(s.up), step = broadcast(-(lr * s.inverse));
  for (int64_t i = 0; i < n; i += kLanes) store(w + i, fma(step, load(g + i) * up, load(w + i)));
}

// V <- mu V + G / s; W <- W - lr V, or with Nesterov W <- W - lr (G / s + mu V), over n values, a multiple of kLanes.
inline void descend(float* w, float* velocity, const float* g, int64_t n, const Update& update, Normalizer s) {
  const Vec up = broadcast(s.up), inverse = broadcast(s.inverse);
  const Vec mu = broadcast(update.momentum), step = broadcast(-update.lr);
  for (int64_t i = 0; i < n; i += kLanes) {
    const Vec direction = load(g + i) * up * inverse;
    const Vec v = fma(mu, load(velocity + i), direction);
    store(velocity + i, v);
    store(w + i, fma(step, update.nesterov ? fma(mu, v, direction) : v, load(w + i)));
  }
}

// All that a pass keeps from step to step, allocated once: packed weights, the gradient, one chunk of activations.
class Pass {
 public:
  Pass(const Problem& problem, int64_t batch)
      : problem_(problem),
        batch_(std::min(batch, problem.x.visits)),
        chunk_(std::min(batch_, kChunk)),
        x_(chunk_, problem.x.cols),
        grad_weight_(problem.x.cols, problem.layers[0].weight.rows),
        grad_bias_(static_cast<size_t>(problem.layers[0].weight.rows)),
        target_(static_cast<size_t>(problem.layers.back().weight.rows)),
        scratch_(target_.size()) {
    for (const Layer& layer : problem.layers) stages_.emplace_back(layer, !stages_.empty(), chunk_);
  }

  Stage& active() { return stages_.front(); }
  const Packed& grad_weight() const { return grad_weight_; }
  const std::vector<double>& grad_bias() const { return grad_bias_; }

  // The loss of visits first .. first + rows; leaves G = D^T X and the column sums of D behind.
  double loss_and_gradient(int64_t first, int64_t rows) {
    double sum = 0;
    std::fill(grad_bias_.begin(), grad_bias_.end(), 0.0);
    for (int64_t done = 0; done < rows; done += kChunk) {
      const int64_t count = std::min(kChunk, rows - done);
      gather_rows(problem_.x, first + done, count, x_);
      forward(count);
      sum += residual(first + done, count, rows);
      backward(count);
      gradient(count, done > 0);
    }
    return sum * loss_factor(problem_.loss, rows, static_cast<int64_t>(target_.size()));
  }

  // s, the Frobenius norm of [G, bias gradient].
  float norm() {
    double squares = square_sum(grad_weight_);
    if (!active().bias.empty()) {
      for (const double g : grad_bias_) squares += g * g;
    }
    return static_cast<float>(std::sqrt(squares));
  }

 private:
  // h = phi(Z) and g(Z) of every layer, for the chunk in x_.
  void forward(int64_t rows) {
    const Dense* input = &x_;
    for (Stage& stage : stages_) {
      const int64_t n = stage.weight.width;
      gemm<false>(rows, n, stage.weight.depth, input->row(0), input->ld, stage.weight.panels(), stage.h.panels(), false);
      const float* bias = stage.bias.empty() ? nullptr : stage.bias.data();
      for (int64_t r = 0; r < rows; ++r) activate(stage.phi, stage.h.row(r), bias, stage.h.row(r), stage.d.row(r), n);
      input = &stage.h;
    }
  }

  // D of the last layer, and the chunk's share of the loss; `rows_in_batch` is what the loss averages over.
  double residual(int64_t first, int64_t rows, int64_t rows_in_batch) {
    Stage& last = stages_.back();
    const int64_t n = last.weight.width;
    const double factor = loss_factor(problem_.loss, rows_in_batch, n);
    const float scale = static_cast<float>(problem_.loss == Loss::mse ? 2 * factor : factor);
    double sum = 0;
    for (int64_t r = 0; r < rows; ++r) {
      target_row(problem_.target, problem_.x.row(first + r), target_.data(), n);
      sum += loss_row(problem_.loss, scale, last.h.row(r), target_.data(), scratch_.data(), last.d.row(r), n);
    }
    return sum;
  }

  // D_{l-1} = (D_l W_l) * g(Z_{l-1}), down to the active layer.
  void backward(int64_t rows) {
    for (size_t l = stages_.size() - 1; l > 0; --l) {
      const Stage& above = stages_[l];
      Stage& below = stages_[l - 1];
      const int64_t n = below.weight.width;
      gemm<false>(rows, n, above.weight.width, above.d.row(0), above.d.ld, above.backward.panels(), below.h.panels(), false);
      for (int64_t r = 0; r < rows; ++r) {
        const float* from = below.h.row(r);
        float* d = below.d.row(r);
        for (int64_t j = 0; j < n; ++j) d[j] *= from[j];
      }
    }
  }

  // G^T (+)= X^T D, in the layout of the packed weight, and the column sums of D.
  void gradient(int64_t rows, bool add) {
    const Dense& d = active().d;
    gemm<true>(x_cols(), grad_weight_.width, rows, x_.row(0), x_.ld, d.panels(), grad_weight_.panels(), add);
    for (int64_t r = 0; r < rows; ++r) {
      for (size_t j = 0; j < grad_bias_.size(); ++j) grad_bias_[j] += d.row(r)[j];
    }
  }

  int64_t x_cols() const { return problem_.x.cols; }

  const Problem& problem_;
  int64_t batch_, chunk_;
  Dense x_;
  Packed grad_weight_;
  std::vector<double> grad_bias_;
  std::vector<float> target_, scratch_;
  std::vector<Stage> stages_;
};

// h = phi(x W^T + bias), rows in chunks, into row-major `out` (visits, n_out).
void forward(const Layer& layer, const Input& x, float* out) {
  const int64_t chunk = std::min(x.visits, kChunk), n = layer.weight.rows;
  const Packed weight = pack_forward(layer.weight);
  const std::vector<float> bias = dense(layer.bias);
  const Dense input(chunk, x.cols), z(chunk, n);
  for (int64_t first = 0; first < x.visits; first += kChunk) {
    const int64_t rows = std::min(kChunk, x.visits - first);
    gather_rows(x, first, rows, input);
    gemm<false>(rows, n, x.cols, input.row(0), input.ld, weight.panels(), z.panels(), false);
    for (int64_t r = 0; r < rows; ++r) {
      activate(layer.phi, z.row(r), bias.empty() ? nullptr : bias.data(), out + (first + r) * n, nullptr, n);
    }
  }
}

// SNGD over mini-batches. Weight and velocity live packed for the whole pass and go back, bit for bit, at its end.
void epoch(const Problem& problem, const Update& update, int64_t batch, float* losses, float* norms) {
  Pass pass(problem, batch);
  Stage& layer = pass.active();
  Packed velocity;
  const Matrix& v = update.velocity_weight;
  if (v.data) velocity = pack_forward(v);
  std::vector<float> velocity_bias = dense(update.velocity_bias);
  const size_t n_bias = layer.bias.size();
  // The bias takes the weight's update in whole vectors.
  const int64_t padded = round_up(static_cast<int64_t>(n_bias), kLanes);
  layer.bias.resize(static_cast<size_t>(padded));
  if (!velocity_bias.empty()) velocity_bias.resize(static_cast<size_t>(padded));
  std::vector<float> grad_bias(static_cast<size_t>(padded));

  const int64_t visits = problem.x.visits;
  int64_t step = 0;
  for (int64_t first = 0; first < visits; ++step) {
    const int64_t rows = std::min(batch, visits - first);
    losses[step] = static_cast<float>(pass.loss_and_gradient(first, rows));
    const float norm = norms[step] = pass.norm();
    first += rows;
    if (!(norm > 0 && std::isfinite(norm))) continue;
    const Normalizer s(norm);
    for (size_t j = 0; j < n_bias; ++j) grad_bias[j] = static_cast<float>(pass.grad_bias()[j]);
    if (v.data) {
      descend(layer.weight.buffer.data(), velocity.buffer.data(), pass.grad_weight().buffer.data(), velocity.buffer.size(),
              update, s);
      descend(layer.bias.data(), velocity_bias.data(), grad_bias.data(), padded, update, s);
    } else {
      descend(layer.weight.buffer.data(), pass.grad_weight().buffer.data(), layer.weight.buffer.size(), update.lr, s);
      descend(layer.bias.data(), grad_bias.data(), padded, update.lr, s);
    }
  }
  const Matrix& w = problem.layers[0].weight;
  unpack(layer.weight, w.data, w.col_stride, w.row_stride);
  if (v.data) unpack(velocity, v.data, v.col_stride, v.row_stride);
  layer.bias.resize(n_bias);
  write_back(layer.bias, problem.layers[0].bias);
  velocity_bias.resize(update.velocity_bias.data ? n_bias : 0);
  write_back(velocity_bias, update.velocity_bias);
}

// The gradient of all rows as one batch.
void gradient(const Problem& problem, Matrix grad_weight, Vector grad_bias, float* norm) {
  Pass pass(problem, problem.x.visits);
  pass.loss_and_gradient(0, problem.x.visits);
  unpack(pass.grad_weight(), grad_weight.data, grad_weight.col_stride, grad_weight.row_stride);
  if (grad_bias.data) {
    for (int64_t j = 0; j < grad_bias.size; ++j) {
      grad_bias.data[j * grad_bias.stride] = static_cast<float>(pass.grad_bias()[static_cast<size_t>(j)]);
    }
  }
  *norm = pass.norm();
}

}  // namespace
}  // namespace dante

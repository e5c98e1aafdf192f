// What a pass over the data keeps from step to step, and the parts of a step that a team of threads does side by side.
// Included once per instruction set; see kernels_*.cpp.
#pragma once

#include "elementwise.h"
#include "gemm.h"
#include "gram.h"

namespace dante {
namespace {

// Rows that go through the chain at a time: bounds the workspace for any batch size, and keeps a chunk of activations
// in the L2 cache. A multiple of the product's block of K, so that a batch's chunks add up as its blocks do.
constexpr int64_t kChunk = 2 * kDepth;

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// A member's share of n items, in whole blocks of `grain`.
inline Range share(int64_t n, int64_t grain, int member, int members) {
  const int64_t blocks = ceil_div(n, grain);
  return {std::min(blocks * member / members * grain, n), std::min(blocks * (member + 1) / members * grain, n)};
}

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

// The sum of the squares of `rows` rows of a packed gradient from row `first` on, in double, without the columns that fill
// up a panel.
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

inline double square_sum(const Packed& packed, int64_t first, int64_t rows) {
  const Panels panels = packed.panels().from(first);
  double sum = 0;
  for (int64_t j = 0; j < packed.width; j += kPanel) {
    const float* data = panels.data + j / kPanel * panels.panel_stride;
    if (packed.width - j >= kPanel) {
      sum += square_sum<kVectors>(data, rows, panels.row_stride, kPanel);
      continue;
    }
    for (int64_t i = j; i < packed.width; i += kLanes) {
      sum += square_sum<1>(data + i - j, rows, panels.row_stride, std::min<int64_t>(kLanes, packed.width - i));
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
  const Vec up = broadcast(s.up), inverse = broadcast(s.inverse), step = broadcast(-lr);
  for (int64_t i = 0; i < n; i += kLanes) store(w + i, fma(step, load(g + i) * up * inverse, load(w + i)));
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

// All that a pass keeps from step to step, allocated once: packed weights, the gradient, one chunk of activations. The
// members of a team call its functions side by side, each on its own share, with a barrier between those that follow on
// each other; every number is computed in the same way whichever member does it.
class Pass {
 public:
  Pass(const Problem& problem, int64_t batch, const Team& team)
      : problem_(problem),
        team_(team),
        chunk_(std::min({batch, problem.x.visits, kChunk})),
        x_(chunk_, problem.x.cols),
        grad_weight_(problem.x.cols, problem.layers[0].weight.rows),
        grad_bias_(static_cast<size_t>(problem.layers[0].weight.rows)),
        squares_(static_cast<size_t>(ceil_div(problem.x.cols, kGroup))),
        row_losses_(static_cast<size_t>(chunk_)),
        gram_(static_cast<size_t>(ceil_div(kGramRows, kGramBlock))) {
    for (const Layer& layer : problem.layers) stages_.emplace_back(layer, !stages_.empty(), chunk_);
    for (int i = 0; i < team.most(); ++i) scratch_.emplace_back(static_cast<size_t>(2 * n_last()));
  }

  Stage& active() { return stages_.front(); }
  const Packed& grad_weight() const { return grad_weight_; }
  const std::vector<double>& grad_bias() const { return grad_bias_; }

  // Whether to take the norm from the Gram matrices of a mini-batch: that costs rows^2 (n_in + n_out) operations, and
  // saves writing, squaring and reading G. The factor is measured (dante bench pass).
  bool prefers_gram(int64_t rows) const { return rows <= kGramRows && rows * rows <= 8 * active_width(); }

  // G = D^T X of one chunk of a batch of `rows` rows, added to that of the chunks before, where `done` rows are behind it; with
  // the batch's last chunk also the sums of squares. Gives the chunk's share of the loss, unscaled. Ends on a barrier.
  double loss_and_gradient(Team& team, int member, int64_t first, int64_t count, int64_t done, int64_t rows) {
    const double loss = loss_and_residual(team, member, first, count, rows);
    gradient(member, count, done > 0, done + count == rows);
    team.barrier(member);
    return loss;
  }

  // h, g and D of all layers for one chunk, and its share of the loss, unscaled. Ends on a barrier.
  double loss_and_residual(Team& team, int member, int64_t first, int64_t count, int64_t rows_in_batch) {
    const Range rows = share(count, 1, member, team_.size());
    gather_rows(problem_.x, first + rows.begin, rows.size(), x_, rows.begin);
    forward(rows);
    residual(member, first, rows, rows_in_batch);
    backward(rows);
    team.barrier(member);
    return std::accumulate(row_losses_.begin(), row_losses_.begin() + count, 0.0);
  }

  // A member's part of G^T (+)= X^T D, in the layout of the packed weight, and of the column sums of D; with `last` also
  // the squares.
  void gradient(int member, int64_t rows, bool add, bool last) {
    const Range inputs = share(x_.cols, kGroup, member, team_.size());
    gemm<true>(inputs.size(), active_width(), rows, x_.row(0) + inputs.begin, x_.ld, active().d.panels(),
               grad_weight_.panels().from(inputs.begin), add, 1, last ? squares_.data() + inputs.begin / kGroup : nullptr);
    bias_gradient(member, rows, add);
    if (!last) return;
    for (int64_t first = inputs.begin; first < inputs.end; first += kGroup) {
      double& sum = squares_[static_cast<size_t>(first / kGroup)];
      // The float32 sums of the product hold where neither they nor the squares that matter over- or underflow.
      if (!(sum > 1e-25 && sum < 1e30)) sum = square_sum(grad_weight_, first, std::min(kGroup, inputs.end - first));
    }
  }

  void bias_gradient(int member, int64_t rows, bool add) {
    const Range columns = share(active_width(), kLanes, member, team_.size());
    if (!add) std::fill(grad_bias_.begin() + columns.begin, grad_bias_.begin() + columns.end, 0.0);
    for (int64_t r = 0; r < rows; ++r) {
      const float* d = active().d.row(r);
      for (int64_t j = columns.begin; j < columns.end; ++j) grad_bias_[static_cast<size_t>(j)] += d[j];
    }
  }

  // s, the Frobenius norm of [G, bias gradient].
  float norm() {
    double squares = std::accumulate(squares_.begin(), squares_.end(), 0.0);
    if (!active().bias.empty()) {
      for (const double g : grad_bias_) squares += g * g;
    }
    return static_cast<float>(std::sqrt(squares));
  }

  // A member's part of the Gram sums of one mini-batch of at most kGramRows rows, for gram_norm().
  void gram(int member, int64_t rows) {
    const double one = active().bias.empty() ? 0 : 1;
    for (int64_t block = member; block * kGramBlock < rows; block += team_.size()) {
      gram_[static_cast<size_t>(block)] = gram_sums(block, rows, x_, active().d, active_width(), one);
    }
  }

  // s from the Gram sums, or nothing where they cannot be trusted with it: where their terms cancel, over- or underflow.
  std::optional<float> gram_norm(int64_t rows) const {
    GramSums sums;
    for (int64_t block = 0; block * kGramBlock < rows; ++block) {
      sums.squares += gram_[static_cast<size_t>(block)].squares;
      sums.magnitude += gram_[static_cast<size_t>(block)].magnitude;
      sums.fits &= gram_[static_cast<size_t>(block)].fits;
    }
    if (!(sums.fits && sums.squares > 0.02 * sums.magnitude && sums.squares > kLeastSquares)) return std::nullopt;
    return static_cast<float>(std::sqrt(sums.squares));
  }

  // A member's part of W <- W + scale G, as one product of rank `rows`, without G.
  void rank_update(int member, int64_t rows, float scale) {
    const Range inputs = share(x_.cols, kGroup, member, team_.size());
    gemm<true>(inputs.size(), active_width(), rows, x_.row(0) + inputs.begin, x_.ld, active().d.panels(),
               active().weight.panels().from(inputs.begin), true, scale);
  }

  // Calls body(offset, count) for the runs of consecutive numbers that are a member's share of the packed weight.
  template <typename Body>
  void for_own_weights(int member, Body body) const {
    const Range inputs = share(x_.cols, kGroup, member, team_.size());
    const Panels panels = grad_weight_.panels();
    for (int64_t j = 0; j < grad_weight_.width; j += kPanel) {
      body(j / kPanel * panels.panel_stride + inputs.begin * panels.row_stride, inputs.size() * panels.row_stride);
    }
  }

  double loss_scale(int64_t rows) const { return loss_factor(problem_.loss, rows, n_last()); }

 private:
  int64_t n_last() const { return problem_.layers.back().weight.rows; }
  int64_t active_width() const { return problem_.layers[0].weight.rows; }

  // h = phi(Z) and g(Z) of every layer, for these rows of the chunk in x_.
  void forward(Range rows) {
    const Dense* input = &x_;
    for (Stage& stage : stages_) {
      const int64_t n = stage.weight.width;
      gemm<false>(rows.size(), n, stage.weight.depth, input->row(rows.begin), input->ld, stage.weight.panels(),
                  stage.h.panels().from(rows.begin), false);
      const float* bias = stage.bias.empty() ? nullptr : stage.bias.data();
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        activate(stage.phi, stage.h.row(r), bias, stage.h.row(r), stage.d.row(r), n);
      }
      input = &stage.h;
    }
  }

  // D of the last layer, and each row's share of the loss; `rows_in_batch` is what the loss averages over.
  void residual(int member, int64_t first, Range rows, int64_t rows_in_batch) {
    Stage& last = stages_.back();
    const int64_t n = n_last();
    const double factor = loss_factor(problem_.loss, rows_in_batch, n);
    const float scale = static_cast<float>(problem_.loss == Loss::mse ? 2 * factor : factor);
    float* target = scratch_[static_cast<size_t>(member)].data();
    for (int64_t r = rows.begin; r < rows.end; ++r) {
      target_row(problem_.target, problem_.x.row(first + r), target, n);
      row_losses_[static_cast<size_t>(r)] = loss_row(problem_.loss, scale, last.h.row(r), target, target + n, last.d.row(r), n);
    }
  }

  // D_{l-1} = (D_l W_l) * g(Z_{l-1}), down to the active layer.
  void backward(Range rows) {
    for (size_t l = stages_.size() - 1; l > 0; --l) {
      const Stage& above = stages_[l];
      Stage& below = stages_[l - 1];
      const int64_t n = below.weight.width;
      gemm<false>(rows.size(), n, above.weight.width, above.d.row(rows.begin), above.d.ld, above.backward.panels(),
                  below.h.panels().from(rows.begin), false);
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        const float* from = below.h.row(r);
        float* d = below.d.row(r);
        for (int64_t j = 0; j < n; ++j) d[j] *= from[j];
      }
    }
  }

  const Problem& problem_;
  const Team& team_;
  int64_t chunk_;
  Dense x_;
  Packed grad_weight_;
  std::vector<double> grad_bias_, squares_, row_losses_;
  std::vector<GramSums> gram_;
  std::vector<std::vector<float>> scratch_;  // for each member a row of targets and one of the softmax
  std::vector<Stage> stages_;
};

}  // namespace
}  // namespace dante

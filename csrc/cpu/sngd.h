// The three kernels on one layer: SNGD over mini-batches, the gradient, and the forward pass.
// Included once per instruction set; see kernels_*.cpp.
#pragma once

#include "pass.h"

namespace dante {
namespace {

// As many members as help: none that would have less than some 10 microseconds of work between two barriers, or 200 in all.
inline int members(int threads, int64_t rows, int64_t visits, int64_t flops_per_row) {
  constexpr int64_t kFlops = int64_t{1} << 20, kCallFlops = int64_t{1} << 24;
  const int64_t most = std::min(rows * flops_per_row / kFlops, visits * flops_per_row / kCallFlops);
  return static_cast<int>(std::clamp<int64_t>(most, 1, threads));
}

// h = phi(x W^T + bias), rows in chunks, into row-major `out` (visits, n_out). Members take the next chunk that is left.
void forward(const Layer& layer, const Input& x, float* out, int threads) {
  const int64_t n = layer.weight.rows;
  const Packed weight = pack_forward(layer.weight);
  const std::vector<float> bias = dense(layer.bias);
  // A member's scratch stays under 8 MiB, however wide the layer.
  const int64_t chunk =
      std::clamp<int64_t>((int64_t{1} << 20) / (n + x.cols), 1, std::min(std::max<int64_t>(x.visits, 1), kChunk));
  std::atomic<int64_t> taken{0};
  Team team(members(threads, x.visits, x.visits, 2 * n * x.cols), true);
  std::vector<std::pair<Dense, Dense>> scratch;
  for (int i = 0; i < team.most(); ++i) scratch.emplace_back(Dense(chunk, x.cols), Dense(chunk, n));
  team.run([&](int member, int64_t) {
    const auto& [input, z] = scratch[static_cast<size_t>(member)];
    int64_t first;
    while ((first = taken.fetch_add(chunk, std::memory_order_relaxed)) < x.visits) {
      const int64_t rows = std::min(chunk, x.visits - first);
      gather_rows(x, first, rows, input, 0);
      gemm<false>(rows, n, x.cols, input.row(0), input.ld, weight.panels(), z.panels(), false);
      for (int64_t r = 0; r < rows; ++r) {
        activate(layer.phi, z.row(r), bias.empty() ? nullptr : bias.data(), out + (first + r) * n, nullptr, n);
      }
    }
  });
}

// Multiplications and additions of a step, for each row.
inline int64_t step_flops(const Problem& problem) {
  int64_t flops = 0;
  for (const Layer& layer : problem.layers) flops += 4 * layer.weight.rows * layer.weight.cols;
  return flops;
}

// SNGD over mini-batches. Weight and velocity live packed for the whole pass and go back, bit for bit, at its end.
void epoch(const Problem& problem, const Update& update, int64_t batch, float* losses, float* norms, int threads) {
  const int64_t visits = problem.x.visits;
  Team team(members(threads, std::min(batch, visits), visits, step_flops(problem)));
  Pass pass(problem, batch, team);
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

  const auto update_bias = [&](Normalizer s) {
    for (size_t j = 0; j < n_bias; ++j) grad_bias[j] = static_cast<float>(pass.grad_bias()[j]);
    if (v.data) {
      descend(layer.bias.data(), velocity_bias.data(), grad_bias.data(), padded, update, s);
    } else {
      descend(layer.bias.data(), grad_bias.data(), padded, update.lr, s);
    }
  };
  const auto update_weight = [&](int member, Normalizer s) {
    const float* g = pass.grad_weight().buffer.data();
    float* w = layer.weight.buffer.data();
    pass.for_own_weights(member, [&](int64_t at, int64_t count) {
      if (v.data) {
        descend(w + at, velocity.buffer.data() + at, g + at, count, update, s);
      } else {
        descend(w + at, g + at, count, update.lr, s);
      }
    });
  };
  double loss = 0;  // member 0's
  team.run([&](int member, int64_t start) {
    for (int64_t first = start, count; first < visits; first += count) {
      const int64_t step = first / batch, done = first % batch, rows = std::min(batch, visits - step * batch);
      count = std::min(kChunk, rows - done);
      bool by_gram = false;
      std::optional<float> norm;
      double chunk_loss;
      if (!v.data && pass.prefers_gram(rows)) {
        chunk_loss = pass.loss_and_residual(team, member, first, count, rows);
        pass.gram(member, rows);
        pass.bias_gradient(member, rows, false);
        team.barrier(member);
        norm = pass.gram_norm(rows);
        // The update multiplies with lr / s, which must be an ordinary number.
        by_gram = norm && update.lr / *norm < 1e30f && update.lr / *norm > 1e-30f;
        if (!by_gram) {
          pass.gradient(member, rows, false, true);
          team.barrier(member);
        }
      } else {
        chunk_loss = pass.loss_and_gradient(team, member, first, count, done, rows);
      }
      if (member == 0) loss = (done ? loss : 0) + chunk_loss;
      if (done + count == rows) {
        if (!by_gram) norm = pass.norm();
        if (*norm > 0 && std::isfinite(*norm)) {
          if (by_gram) {
            pass.rank_update(member, rows, -(update.lr / *norm));
          } else {
            update_weight(member, Normalizer(*norm));
          }
          if (member == 0) update_bias(Normalizer(*norm));
        }
        if (member == 0) {
          losses[step] = static_cast<float>(loss * pass.loss_scale(rows));
          norms[step] = *norm;
        }
      }
      if (!team.stays(member, first + count)) return;
    }
  });
  const Matrix& w = problem.layers[0].weight;
  unpack(layer.weight, w.data, w.col_stride, w.row_stride);
  if (v.data) unpack(velocity, v.data, v.col_stride, v.row_stride);
  layer.bias.resize(n_bias);
  write_back(layer.bias, problem.layers[0].bias);
  velocity_bias.resize(update.velocity_bias.data ? n_bias : 0);
  write_back(velocity_bias, update.velocity_bias);
}

// The gradient of all rows as one batch.
void gradient(const Problem& problem, Matrix grad_weight, Vector grad_bias, float* norm, int threads) {
  const int64_t visits = problem.x.visits;
  Team team(members(threads, visits, visits, step_flops(problem)));
  Pass pass(problem, visits, team);
  team.run([&](int member, int64_t start) {
    for (int64_t first = start, count; first < visits; first += count) {
      count = std::min(kChunk, visits - first);
      pass.loss_and_gradient(team, member, first, count, first, visits);
      if (!team.stays(member, first + count)) return;
    }
  });
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

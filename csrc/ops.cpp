// The operators dante_cpp::*: schemas, checks of what the kernels rely on, and the way from tensors to pointers.
// Built against LibTorch's stable ABI, so one binary serves torch 2.11 and newer on every Python.
//
// The checks that give users a message are in dante_kernels/ops/checks.py; those here keep a direct call of
// torch.ops.dante_cpp from reading or writing where it must not.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/problem.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;
using OptionalTensors = std::vector<OptionalTensor>;

void check_tensor(const char* name, const Tensor& t, int64_t dim) {
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(t.dim() == dim, name, ": expected ", dim, " dimensions, got ", t.dim());
}

void check_float(const char* name, const Tensor& t, int64_t dim) {
  check_tensor(name, t, dim);
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, ": expected float32");
}

dante::Matrix matrix(const char* name, const Tensor& t) {
  check_float(name, t, 2);
  return {static_cast<float*>(t.data_ptr()), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

dante::Vector vector(const char* name, const OptionalTensor& t, int64_t size) {
  if (!t) return {};
  check_float(name, *t, 1);
  STD_TORCH_CHECK(t->size(0) == size, name, ": expected ", size, " elements, got ", t->size(0));
  return {static_cast<float*>(t->data_ptr()), size, t->stride(0)};
}

// The activation of the three numbers [code, a, b] at `numbers`.
dante::Activation activation(const double* numbers) {
  STD_TORCH_CHECK(numbers[0] == 0 || numbers[0] == 1 || numbers[0] == 2, "activation: expected a code from 0 to 2");
  return {static_cast<dante::Kind>(static_cast<int>(numbers[0])), static_cast<float>(numbers[1]),
          static_cast<float>(numbers[2])};
}

dante::Layer layer(const Tensor& weight, const OptionalTensor& bias, const double* numbers) {
  const dante::Matrix w = matrix("weight", weight);
  STD_TORCH_CHECK(w.rows > 0 && w.cols > 0, "weight: expected at least one row and one column");
  return {w, vector("bias", bias, w.rows), activation(numbers)};
}

dante::Element element(const Tensor& x) {
  if (x.scalar_type() == ScalarType::BFloat16) return dante::Element::bfloat16;
  if (x.scalar_type() == ScalarType::Byte) return dante::Element::uint8;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "x: expected float32, bfloat16 or uint8");
  return dante::Element::float32;
}

// x (rows, cols) in the order given, or as its rows lie.
dante::Input input(const Tensor& x, int64_t cols, const OptionalTensor& order, double scale) {
  check_tensor("x", x, 2);
  STD_TORCH_CHECK(x.size(1) == cols, "x: expected ", cols, " columns, got ", x.size(1));
  dante::Input in{x.data_ptr(), element(x), static_cast<float>(scale), cols, x.stride(0), x.stride(1)};
  in.visits = x.size(0);
  if (order) {
    check_tensor("order", *order, 1);
    STD_TORCH_CHECK(order->scalar_type() == ScalarType::Long, "order: expected int64");
    in.order = static_cast<const int64_t*>(order->data_ptr());
    in.order_stride = order->stride(0);
    in.visits = order->size(0);
    bool valid = true;
    for (int64_t i = 0; i < in.visits; ++i) valid &= in.row(i) >= 0 && in.row(i) < x.size(0);
    STD_TORCH_CHECK(valid, "order: expected row numbers from 0 to ", x.size(0) - 1);
  }
  return in;
}

dante::Target target(const Tensor& t, int64_t rows, int64_t n_last) {
  if (t.scalar_type() == ScalarType::Long) {
    check_tensor("target", t, 1);
    STD_TORCH_CHECK(t.size(0) == rows, "target: expected ", rows, " class indices, got ", t.size(0));
    return {static_cast<const int64_t*>(t.data_ptr()), nullptr, t.stride(0), 0};
  }
  const dante::Matrix m = matrix("target", t);
  STD_TORCH_CHECK(m.rows == rows && m.cols == n_last, "target: expected shape (", rows, ", ", n_last, ")");
  return {nullptr, m.data, m.row_stride, m.col_stride};
}

dante::Problem problem(const Tensor& weight, const OptionalTensor& bias, const Tensor& x, const Tensor& targets,
                       const OptionalTensor& order, const Tensors& suffix_weights, const OptionalTensors& suffix_biases,
                       const std::vector<double>& activations, int64_t loss, double x_scale) {
  const size_t suffix = suffix_weights.size();
  STD_TORCH_CHECK(suffix_biases.size() == suffix, "suffix_biases: expected ", suffix, " entries");
  STD_TORCH_CHECK(activations.size() == 3 * (suffix + 1), "activations: expected ", 3 * (suffix + 1), " numbers");
  STD_TORCH_CHECK(loss >= 0 && loss <= 2, "loss: expected a code from 0 to 2, got ", loss);
  dante::Problem p;
  p.layers.reserve(suffix + 1);
  p.layers.push_back(layer(weight, bias, activations.data()));
  for (size_t i = 0; i < suffix; ++i) {
    p.layers.push_back(layer(suffix_weights[i], suffix_biases[i], activations.data() + 3 * (i + 1)));
    STD_TORCH_CHECK(p.layers[i + 1].weight.cols == p.layers[i].weight.rows, "suffix[", i, "] weight: expected ",
                    p.layers[i].weight.rows, " columns");
  }
  p.x = input(x, p.layers[0].weight.cols, order, x_scale);
  p.target = target(targets, x.size(0), p.layers.back().weight.rows);
  p.loss = static_cast<dante::Loss>(loss);
  return p;
}

dante::Update update(const dante::Layer& active, const Tensor& lr, const OptionalTensor& velocity_weight,
                     const OptionalTensor& velocity_bias, double momentum, bool nesterov) {
  check_float("lr", lr, 0);
  dante::Update u;
  u.lr = *static_cast<const float*>(lr.data_ptr());
  u.momentum = static_cast<float>(momentum);
  u.nesterov = nesterov;
  if (velocity_weight) {
    u.velocity_weight = matrix("velocity_weight", *velocity_weight);
    STD_TORCH_CHECK(u.velocity_weight.rows == active.weight.rows && u.velocity_weight.cols == active.weight.cols,
                    "velocity_weight: expected the weight's shape");
  }
  u.velocity_bias = vector("velocity_bias", velocity_bias, active.weight.rows);
  STD_TORCH_CHECK(velocity_bias.has_value() == (velocity_weight.has_value() && active.bias.data),
                  "velocity_bias: expected a tensor exactly where the layer has a bias and velocity_weight is given");
  return u;
}

// A new tensor of the weight's dtype and device.
Tensor result(const Tensor& weight, const std::vector<int64_t>& shape) { return torch::stable::new_empty(weight, shape); }

// torch.get_num_threads().
int threads() { return static_cast<int>(torch::stable::get_num_threads()); }

float* values(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

// h (rows, n_out) = phi(x W^T + bias).
Tensor layer_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const std::vector<double>& numbers,
                     double x_scale) {
  STD_TORCH_CHECK(numbers.size() == 3, "activation: expected the three numbers [code, a, b]");
  const dante::Layer l = layer(weight, bias, numbers.data());
  const dante::Input in = input(x, l.weight.cols, std::nullopt, x_scale);
  Tensor h = result(weight, {in.visits, l.weight.rows});
  dante::kernels().forward(l, in, values(h), threads());
  return h;
}

// G (n_out, n_in), the bias's gradient (empty without a bias), and the norm of both.
std::tuple<Tensor, Tensor, Tensor> layer_gradient(const Tensor& weight, const OptionalTensor& bias, const Tensor& x,
                                                  const Tensor& targets, const Tensors& suffix_weights,
                                                  const OptionalTensors& suffix_biases, const std::vector<double>& activations,
                                                  int64_t loss, double x_scale) {
  const dante::Problem p =
      problem(weight, bias, x, targets, std::nullopt, suffix_weights, suffix_biases, activations, loss, x_scale);
  const int64_t n_out = p.layers[0].weight.rows, n_in = p.layers[0].weight.cols;
  Tensor grad_weight = result(weight, {n_out, n_in});
  Tensor grad_bias = result(weight, {bias ? n_out : 0});
  Tensor norm = result(weight, {});
  dante::kernels().gradient(p, {values(grad_weight), n_out, n_in, n_in, 1},
                            bias ? dante::Vector{values(grad_bias), n_out, 1} : dante::Vector{}, values(norm), threads());
  return {grad_weight, grad_bias, norm};
}

// One mini-batch: (loss, norm), 0-dimensional.
std::tuple<Tensor, Tensor> sngd_step_(const Tensor& weight, const OptionalTensor& bias, const Tensor& x, const Tensor& targets,
                                      const Tensors& suffix_weights, const OptionalTensors& suffix_biases,
                                      const std::vector<double>& activations, int64_t loss, const Tensor& lr,
                                      const OptionalTensor& velocity_weight, const OptionalTensor& velocity_bias,
                                      double momentum, bool nesterov, double x_scale) {
  const dante::Problem p =
      problem(weight, bias, x, targets, std::nullopt, suffix_weights, suffix_biases, activations, loss, x_scale);
  const dante::Update u = update(p.layers[0], lr, velocity_weight, velocity_bias, momentum, nesterov);
  STD_TORCH_CHECK(p.x.visits > 0, "x: expected at least one row, got none");
  Tensor value = result(weight, {}), norm = result(weight, {});
  dante::kernels().epoch(p, u, p.x.visits, values(value), values(norm), threads());
  return {value, norm};
}

// All mini-batches of a pass: (losses, norms), each (steps,).
std::tuple<Tensor, Tensor> sngd_epoch_(const Tensor& weight, const OptionalTensor& bias, const Tensor& x, const Tensor& targets,
                                       const OptionalTensor& order, int64_t batch_size, const Tensors& suffix_weights,
                                       const OptionalTensors& suffix_biases, const std::vector<double>& activations,
                                       int64_t loss, const Tensor& lr, const OptionalTensor& velocity_weight,
                                       const OptionalTensor& velocity_bias, double momentum, bool nesterov, double x_scale) {
  const dante::Problem p = problem(weight, bias, x, targets, order, suffix_weights, suffix_biases, activations, loss, x_scale);
  const dante::Update u = update(p.layers[0], lr, velocity_weight, velocity_bias, momentum, nesterov);
  STD_TORCH_CHECK(batch_size >= 1, "batch_size: expected at least 1, got ", batch_size);
  // Not (visits + batch_size - 1) / batch_size, which overflows where batch_size says "everything".
  const int64_t batch = std::max<int64_t>(std::min(batch_size, p.x.visits), 1);
  const int64_t steps = (p.x.visits + batch - 1) / batch;
  Tensor losses = result(weight, {steps}), norms = result(weight, {steps});
  dante::kernels().epoch(p, u, batch, values(losses), values(norms), threads());
  return {losses, norms};
}

// The instruction set of the kernels of this process; an error where DANTE_CPU_ISA names one that is not to be had.
std::string isa() { return dante::kernels().isa; }

void work_alone() { dante::work_alone(); }

}  // namespace

#define DANTE_PROBLEM "Tensor[] suffix_weights, Tensor?[] suffix_biases, float[] activations, int loss"
#define DANTE_UPDATE \
  "Tensor lr, Tensor(c!)? velocity_weight=None, Tensor(d!)? velocity_bias=None, float momentum=0.0, bool nesterov=False"
#define DANTE_SCALE "float x_scale=1.0"
#define DANTE_DATA "Tensor(a!) weight, Tensor(b!)? bias, Tensor x, Tensor target"

STABLE_TORCH_LIBRARY(dante_cpp, m) {
  m.def("layer_forward(Tensor x, Tensor weight, Tensor? bias, float[] activation, " DANTE_SCALE ") -> Tensor");
  m.def("layer_gradient(Tensor weight, Tensor? bias, Tensor x, Tensor target, " DANTE_PROBLEM ", " DANTE_SCALE
        ") -> (Tensor, Tensor, Tensor)");
  m.def("sngd_step_(" DANTE_DATA ", " DANTE_PROBLEM ", " DANTE_UPDATE ", " DANTE_SCALE ") -> (Tensor, Tensor)");
  m.def("sngd_epoch_(" DANTE_DATA ", Tensor? order, int batch_size, " DANTE_PROBLEM ", " DANTE_UPDATE ", " DANTE_SCALE
        ") -> (Tensor, Tensor)");
  m.def("isa() -> str");
  m.def("work_alone() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dante_cpp, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("work_alone", TORCH_BOX(&work_alone));
}

STABLE_TORCH_LIBRARY_IMPL(dante_cpp, CPU, m) {
  m.impl("layer_forward", TORCH_BOX(&layer_forward));
  m.impl("layer_gradient", TORCH_BOX(&layer_gradient));
  m.impl("sngd_step_", TORCH_BOX(&sngd_step_));
  m.impl("sngd_epoch_", TORCH_BOX(&sngd_epoch_));
}

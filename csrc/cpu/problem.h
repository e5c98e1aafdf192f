// What the operators hand to the CPU kernels: pointers with strides, nothing owned, nothing of torch.
#pragma once

#include <cstdint>
#include <vector>

namespace dante {

// float32 matrix (rows, cols) with any strides, in elements.
struct Matrix {
  float* data = nullptr;
  int64_t rows = 0, cols = 0, row_stride = 0, col_stride = 0;
};

// float32 vector with any stride; a null pointer stands for "none".
struct Vector {
  float* data = nullptr;
  int64_t size = 0, stride = 0;
};

// The codes are those of dante_kernels/activations.py and losses.py.
enum class Kind { generalized_relu = 0, sigmoid = 1, tanh = 2 };
enum class Loss { mse = 0, cross_entropy = 1, binary_cross_entropy = 2 };

struct Activation {
  Kind kind = Kind::generalized_relu;
  float a = 1, b = 1;
};

// a = phi(x W^T + bias): weight (n_out, n_in), bias (n_out,).
struct Layer {
  Matrix weight;
  Vector bias;
  Activation phi;
};

enum class Element { float32, bfloat16, uint8 };

// The active layer's input (rows, cols); uint8 stands for its value times `scale`. Row i of a pass is row order[i], or i
// without an order.
struct Input {
  const void* data = nullptr;
  Element element = Element::float32;
  float scale = 1;
  int64_t cols = 0, row_stride = 0, col_stride = 0;
  const int64_t* order = nullptr;
  int64_t order_stride = 0;
  int64_t visits = 0;

  int64_t row(int64_t i) const { return order ? order[i * order_stride] : i; }
};

// Class indices (rows,) where `classes` is set, else values (rows, n_last).
struct Target {
  const int64_t* classes = nullptr;
  const float* values = nullptr;
  int64_t row_stride = 0, col_stride = 0;
};

// layers[0] is the active layer, the rest is the frozen suffix.
struct Problem {
  std::vector<Layer> layers;
  Input x;
  Target target;
  Loss loss = Loss::mse;
};

struct Update {
  float lr = 0, momentum = 0;
  bool nesterov = false;
  Matrix velocity_weight;
  Vector velocity_bias;
};

// One instruction set's kernels. Results are the same bits whenever the same set runs on the same input, on any number of
// threads.
struct Kernels {
  const char* isa;
  // out (visits, n_out), row-major.
  void (*forward)(const Layer& layer, const Input& x, float* out, int threads);
  // Steps over batches of `batch` rows; losses and norms have ceil(visits / batch) elements.
  void (*epoch)(const Problem& problem, const Update& update, int64_t batch, float* losses, float* norms, int threads);
  // grad_weight (n_out, n_in); grad_bias is "none" where the layer has no bias.
  void (*gradient)(const Problem& problem, Matrix grad_weight, Vector grad_bias, float* norm, int threads);
};

extern const Kernels kernels_generic, kernels_avx2, kernels_avx512;

// The best set that this processor has, or the one that the environment variable DANTE_CPU_ISA names.
const Kernels& kernels();

// Makes every later call work on the calling thread alone; for a process forked from one that used the pool's threads.
void work_alone();

}  // namespace dante

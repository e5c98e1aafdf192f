// What one core can do, and what the product of csrc/cpu/gemm.h gets out of it, as one line of JSON: "peak", the GFLOP/s of
// independent chains of fused multiply-adds, and for some shapes the GFLOP/s of a step's two products, alone.
// Compiled and run by limits.py.
#include <chrono>
#include <cstdio>

#include "problem.h"
#include "standard.h"

namespace dante {
namespace {
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 6, kVectors = 4;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 6, kVectors = 2;
#else
constexpr int kLanes = 4, kRows = 6, kVectors = 2;
#endif
typedef float Vec __attribute__((vector_size(kLanes * 4)));

inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }  // one instruction where -ffp-contract=fast finds it
}  // namespace
}  // namespace dante

#include "gemm.h"

namespace dante {
namespace {

template <typename Body>
double seconds(int repeats, Body body, double quantile = 0.5) {
  std::vector<double> samples;
  for (int i = 0; i < repeats; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    body();
    samples.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  const auto found = samples.begin() + static_cast<int>(quantile * repeats);
  std::nth_element(samples.begin(), found, samples.end());
  return *found;
}

double peak() {
  constexpr int kChains = 12, kSteps = 1000000;
  volatile float used = 0;
  const auto chains = [&] {
    const Vec a = broadcast(0.999f), b = broadcast(0.001f);
    Vec acc[kChains];  // different ones, or the compiler would keep only one
                       // chain
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) acc[i] = broadcast(used + static_cast<float>(i));
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i) acc[i] = fma(acc[i], a, b);
    }
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) used = used + acc[i][0];
  };
  const double time = seconds(31, chains, 0);  // a limit is the best that was seen
  return 2e-9 * kChains * kLanes * kSteps / time;
}

void products(int64_t rows, int64_t n_in, int64_t n_out, const char* end) {
  constexpr int64_t kChunk = 2 * kDepth;  // as in pass.h
  Dense x(rows, n_in), h(rows, n_out), d(rows, n_out);
  Packed w(n_in, n_out), g(n_in, n_out);
  std::vector<double> squares(static_cast<size_t>(ceil_div(n_in, kGroup)));
  const double gflop = 2e-9 * static_cast<double>(rows * n_in * n_out);
  const int repeats = std::max(9, static_cast<int>(10 / gflop));
  const double forward = seconds(repeats, [&] {
    for (int64_t r = 0; r < rows; r += kChunk) {
      gemm<false>(std::min(kChunk, rows - r), n_out, n_in, x.row(r), x.ld, w.panels(), h.panels().from(r), false);
    }
  });
  const double gradient = seconds(repeats, [&] {
    for (int64_t r = 0; r < rows; r += kChunk) {
      gemm<true>(n_in, n_out, std::min(kChunk, rows - r), x.row(r), x.ld, d.panels().from(r), g.panels(), r > 0, 1,
                 r + kChunk >= rows ? squares.data() : nullptr);
    }
  });
  std::printf(
      "{\"rows\": %d, \"n_in\": %d, \"n_out\": %d, \"forward\": %.1f, "
      "\"gradient\": %.1f}%s",
      static_cast<int>(rows), static_cast<int>(n_in), static_cast<int>(n_out), gflop / forward, gflop / gradient, end);
}

}  // namespace
}  // namespace dante

int main() {
  std::printf("{\"peak\": %.1f, \"products\": [", dante::peak());
  dante::products(20, 784, 100, ", ");
  dante::products(100, 784, 100, ", ");
  dante::products(500, 784, 100, ", ");
  dante::products(100, 784, 400, ", ");
  dante::products(100, 3072, 512, ", ");
  dante::products(500, 1024, 1024, "]}\n");
}

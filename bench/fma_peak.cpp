// Prints the GFLOP/s of twelve independent chains of fused multiply-adds on one core: what a product can reach at most.
#include <algorithm>
#include <chrono>
#include <cstdio>

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vec __attribute__((vector_size(kLanes * 4)));

int main() {
  constexpr int kChains = 12, kSteps = 1000000;
  Vec acc[kChains] = {}, a = {}, b = {};
  a += 0.999f;
  b += 0.001f;
  double best = 0;
  for (int repeat = 0; repeat < 30; ++repeat) {
    const auto begin = std::chrono::steady_clock::now();
    for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i) acc[i] = acc[i] * a + b;
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    best = std::max(best, 2e-9 * kChains * kLanes * kSteps / seconds.count());
  }
  float sum = 0;
  for (const Vec& v : acc) {
    for (int i = 0; i < kLanes; ++i) sum += v[i];
  }
  std::printf("%.1f\n", best + 0 * sum);
}

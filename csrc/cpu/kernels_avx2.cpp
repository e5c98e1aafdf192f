// The kernels for AVX2 with FMA: 6 x 2 vectors of eight floats make 12 of the 16 registers accumulators.
#include "problem.h"
#include "standard.h"
#include "team.h"

// Clang does not know the pragma; there the generic kernels serve.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma")

namespace dante {
namespace {
constexpr int kLanes = 8, kRows = 6, kVectors = 2;
typedef float Vec __attribute__((vector_size(kLanes * 4)));
inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
}  // namespace
}  // namespace dante

#include "sngd.h"

#pragma GCC pop_options

namespace dante {
const Kernels kernels_avx2 = {"avx2", forward, epoch, gradient};
}  // namespace dante
#endif

// The kernels for AVX-512: 6 x 4 vectors of sixteen floats make 24 of the 32 registers accumulators.
//
// With DANTE_EMULATE_AVX512 the same code is compiled without its instructions, so that a processor that lacks them can
// test it.
#include "problem.h"
#include "standard.h"
#include "team.h"

// Clang does not know the pragma; there the generic kernels serve.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>

#pragma GCC push_options
#ifndef DANTE_EMULATE_AVX512
#pragma GCC target("avx512f,avx2,fma")
#endif

namespace dante {
namespace {
constexpr int kLanes = 16, kRows = 6, kVectors = 4;
typedef float Vec __attribute__((vector_size(kLanes * 4)));
#ifdef DANTE_EMULATE_AVX512
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
#else
inline Vec fma(Vec a, Vec b, Vec c) { return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#endif
}  // namespace
}  // namespace dante

#include "sngd.h"

#pragma GCC pop_options

namespace dante {
const Kernels kernels_avx512 = {"avx512", forward, epoch, gradient};
}  // namespace dante
#endif

// The kernels for any processor: vectors of four floats (SSE2, NEON), multiplication and addition rounded separately.
#include "problem.h"
#include "standard.h"
#include "team.h"

namespace dante {
namespace {
constexpr int kLanes = 4, kRows = 6, kVectors = 2;
typedef float Vec __attribute__((vector_size(kLanes * 4)));
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
}  // namespace
}  // namespace dante

#include "sngd.h"

namespace dante {
const Kernels kernels_generic = {"generic", forward, epoch, gradient};
}  // namespace dante

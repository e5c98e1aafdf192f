// Which instruction set's kernels run in this process: decided once, at the first call.
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

#include "problem.h"

namespace dante {
namespace {

const Kernels& choose() {
  const char* variable = std::getenv("DANTE_CPU_ISA");
  const std::string wanted = variable ? variable : "";
  STD_TORCH_CHECK(wanted.empty() || wanted == "avx512" || wanted == "avx2" || wanted == "generic",
                  "DANTE_CPU_ISA: expected avx512, avx2 or generic, got '", wanted, "'");
  if (wanted == "generic") return kernels_generic;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#ifdef DANTE_EMULATE_AVX512
  const bool avx512 = avx2 && wanted == "avx512";
#else
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f");
#endif
  if (avx512 && wanted != "avx2") return kernels_avx512;
  if (avx2 && wanted != "avx512") return kernels_avx2;
#endif
  STD_TORCH_CHECK(wanted.empty(), "DANTE_CPU_ISA: ", wanted, " was asked for, which this processor or build does not have");
  return kernels_generic;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace dante

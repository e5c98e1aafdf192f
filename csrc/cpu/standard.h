// The standard headers of the kernels. They come before any `#pragma GCC target`, so that no inline function of the
// standard library is compiled for an instruction set that the processor may lack.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

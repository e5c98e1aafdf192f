// The gradient's norm without the gradient: s^2 = sum_ij (<x_i, x_j> + 1) <d_i, d_j>, the 1 where the layer has a bias.
//
// A mini-batch's G = D^T X is only as many rows deep as the mini-batch, so for few rows the two Gram matrices are smaller
// than G, and the update is one product straight into W. Included once per instruction set; see kernels_*.cpp.
#pragma once

#include "gemm.h"

namespace dante {
namespace {

constexpr int64_t kGramRows = 64;  // the largest mini-batch that may take this way
constexpr int kGramBlock = 2, kGramWidth = 4;

// Sums of the terms of s^2, and of their absolute values, whose ratio tells how much the terms cancel; and whether all rows
// of X and D are of sizes whose float32 products can be trusted.
struct GramSums {
  double squares = 0, magnitude = 0;
  bool fits = true;
};

// Squares of rows up to this size, and no sum of all squares under kLeastSquares: then what underflows in a row's products
// (below 1e-38, times a square of the other operand) is nothing beside the sum.
constexpr double kLargestSquare = 1e12, kLeastSquares = 1e-14;

// out[i][j] = <a_i, b_j> over n columns, a multiple of kLanes. Blocks of columns are added up in double, so that the sums
// carry hardly more error than their terms.
inline void dot_block(const float* const (&a)[kGramBlock], const float* const (&b)[kGramWidth], int64_t n,
                      double (&out)[kGramBlock][kGramWidth]) {
  constexpr int64_t kColumns = 16 * kLanes;
  constexpr int kHalf = kLanes / 2;
  typedef float Half __attribute__((vector_size(kHalf * 4)));
  typedef double Wide __attribute__((vector_size(kHalf * 8)));
  Wide sums[kGramBlock][kGramWidth] = {};
  for (int64_t begin = 0; begin < n; begin += kColumns) {
    const int64_t end = std::min(begin + kColumns, n);
    Vec acc[kGramBlock][kGramWidth] = {};
    for (int64_t k = begin; k < end; k += kLanes) {
      Vec left[kGramBlock];
      for (int i = 0; i < kGramBlock; ++i) left[i] = load(a[i] + k);
      for (int j = 0; j < kGramWidth; ++j) {
        const Vec right = load(b[j] + k);
        for (int i = 0; i < kGramBlock; ++i) acc[i][j] = fma(left[i], right, acc[i][j]);
      }
    }
    for (int i = 0; i < kGramBlock; ++i) {
      for (int j = 0; j < kGramWidth; ++j) {
        Half halves[2];
        std::memcpy(halves, &acc[i][j], sizeof halves);
        sums[i][j] += __builtin_convertvector(halves[0], Wide) + __builtin_convertvector(halves[1], Wide);
      }
    }
  }
  for (int i = 0; i < kGramBlock; ++i) {
    for (int j = 0; j < kGramWidth; ++j) {
      out[i][j] = 0;
      for (int lane = 0; lane < kHalf; ++lane) out[i][j] += sums[i][j][lane];
    }
  }
}

// The terms of s^2 with i in a block of kGramBlock rows and j <= i, those off the diagonal twice.
inline GramSums gram_sums(int64_t block, int64_t rows, const Dense& x, const Dense& d, int64_t width, double one) {
  const auto pointers = [rows](const Dense& m, int64_t first, auto& to) {
    for (size_t i = 0; i < std::size(to); ++i) to[i] = m.row(std::min(first + static_cast<int64_t>(i), rows - 1));
  };
  const int64_t first = block * kGramBlock;
  const float *x_i[kGramBlock], *x_j[kGramWidth], *d_i[kGramBlock], *d_j[kGramWidth];
  double x_dots[kGramBlock][kGramWidth], d_dots[kGramBlock][kGramWidth];
  pointers(x, first, x_i);
  pointers(d, first, d_i);
  GramSums sums;
  for (int64_t other = 0; other < std::min(first + kGramBlock, rows); other += kGramWidth) {
    pointers(x, other, x_j);
    pointers(d, other, d_j);
    dot_block(x_i, x_j, round_up(x.cols, kLanes), x_dots);
    dot_block(d_i, d_j, round_up(width, kLanes), d_dots);
    for (int64_t i = first; i < std::min(first + kGramBlock, rows); ++i) {
      for (int64_t j = other; j <= std::min(i, other + kGramWidth - 1); ++j) {
        const double term = (x_dots[i - first][j - other] + one) * d_dots[i - first][j - other] * (i == j ? 1 : 2);
        if (i == j)
          sums.fits &= x_dots[i - first][j - other] <= kLargestSquare && d_dots[i - first][j - other] <= kLargestSquare;
        sums.squares += term;
        sums.magnitude += std::fabs(term);
      }
    }
  }
  return sums;
}

}  // namespace
}  // namespace dante

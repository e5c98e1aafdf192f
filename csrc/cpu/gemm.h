// One matrix product for all that a step needs, on operands that are already laid out for it.
//
// C[M, N] = A[M, K] B[K, N]. B and C have their columns in panels of kPanel = kVectors * kLanes: a row-major matrix is
// one kind of panels (the next panel lies kPanel to the right), a packed weight the other (each panel is contiguous).
// So the packed weight, its gradient and its velocity share one layout, and neither the residual D nor the input X is
// ever packed twice: X serves the forward product as A and the gradient's as A^T.
//
// A tile of C (up to kRows x kPanel) stays in registers over a block of K. Every element of C is summed in the same
// order, whatever the tile it falls in, so a row's result does not depend on the rows beside it.
//
// Included once per instruction set, after isa definitions of Vec, kLanes, kRows, kVectors and fma(); see kernels_*.cpp.
#pragma once

namespace dante {
namespace {

constexpr int64_t kPanel = int64_t{kVectors} * kLanes;
// A block of K. Its sums start at zero and are added up afterwards, so the rounding errors of two short sums take the
// place of one long one's: with 256 the gradient's error exceeded twice that of torch's fp32 product on some small
// layers, with 64 it is below torch's on average, at the same speed.
constexpr int64_t kDepth = 64;

using UnalignedVec __attribute__((vector_size(kLanes * 4), aligned(4), may_alias)) = float;

inline Vec load(const float* p) { return (Vec) * reinterpret_cast<const UnalignedVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = (UnalignedVec)v; }
inline Vec broadcast(float s) { return s - Vec{}; }

inline int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }
inline int64_t round_up(int64_t n, int64_t d) { return ceil_div(n, d) * d; }

// Float32 storage on a cache line's boundary, and of exactly this size, so that a sanitizer sees what is beside it.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size) : size_(size), storage_(static_cast<float*>(::operator new(bytes(size), kLine))) {}
  float* data() const { return storage_.get(); }
  int64_t size() const { return size_; }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, kLine); }
  };
  static size_t bytes(int64_t size) { return static_cast<size_t>(size) * sizeof(float); }

  int64_t size_ = 0;
  std::unique_ptr<float, Free> storage_;
};

// A (rows, cols) operand with its columns in panels; see above.
struct Panels {
  float* data;
  int64_t row_stride, panel_stride;

  // The operand without its first r rows.
  Panels from(int64_t r) const { return {data + r * row_stride, row_stride, panel_stride}; }
};

// Row-major (rows, cols) storage, zero at first. The leading dimension is an odd number of cache lines: at a power of two the
// rows of a column would all fall into the same few sets of the cache.
struct Dense {
  int64_t cols = 0, ld = 0;
  Buffer buffer;

  Dense() = default;
  Dense(int64_t rows, int64_t cols) : cols(cols), ld((ceil_div(cols, 16) | 1) * 16), buffer(rows * ld) {
    std::fill_n(buffer.data(), buffer.size(), 0.0f);
  }
  float* row(int64_t r) const { return buffer.data() + r * ld; }
  Panels panels() const { return {buffer.data(), ld, kPanel}; }
};

// A (depth, width) operand packed in contiguous panels; its last panel, which the columns may not fill, is zero at first.
struct Packed {
  int64_t depth = 0, width = 0;
  Buffer buffer;

  Packed() = default;
  Packed(int64_t depth, int64_t width) : depth(depth), width(width), buffer(ceil_div(width, kPanel) * depth * panel_width()) {
    const int64_t last = depth * panel_width();
    std::fill_n(buffer.data() + buffer.size() - last, last, 0.0f);
  }
  // A matrix narrower than a panel does not pay for a whole one.
  int64_t panel_width() const { return std::min(kPanel, round_up(width, kLanes)); }
  Panels panels() const { return {buffer.data(), panel_width(), depth * panel_width()}; }
};

// Puts element j of vector i, and of vector i + kDistance, where bit kDistance of i and j have changed places.
template <int kDistance, int... j>
inline void exchange(Vec* rows, std::integer_sequence<int, j...>) {
  for (int i = 0; i < kLanes; ++i) {
    if (i & kDistance) continue;
    const Vec a = rows[i], b = rows[i + kDistance];
#ifdef __clang__
    rows[i] = __builtin_shufflevector(a, b, (j & kDistance ? j - kDistance + kLanes : j)...);
    rows[i + kDistance] = __builtin_shufflevector(a, b, (j & kDistance ? j + kLanes : j + kDistance)...);
#else
    using Lanes __attribute__((vector_size(kLanes * 4))) = int32_t;
    rows[i] = __builtin_shuffle(a, b, Lanes{(j & kDistance ? j - kDistance + kLanes : j)...});
    rows[i + kDistance] = __builtin_shuffle(a, b, Lanes{(j & kDistance ? j + kLanes : j + kDistance)...});
#endif
  }
}

// Transposes kLanes vectors in place, bit by bit of the indices.
template <int kDistance = kLanes / 2>
inline void transpose(Vec* rows) {
  exchange<kDistance>(rows, std::make_integer_sequence<int, kLanes>());
  if constexpr (kDistance > 1) transpose<kDistance / 2>(rows);
}

// Copies all elements (k, n) of the matrix at `data` to the packed one, or with `kBack` from it, bit for bit.
template <bool kBack>
inline void copy(const Packed& packed, float* data, int64_t k_stride, int64_t n_stride) {
  const Panels to = packed.panels();
  for (int64_t n = 0; n < packed.width; n += kPanel) {
    for (int64_t k = 0; k < packed.depth; k += kLanes) {
      const int64_t depth = std::min<int64_t>(kLanes, packed.depth - k);
      for (int64_t first = n; first < std::min(n + kPanel, packed.width); first += kLanes) {
        const int64_t width = std::min<int64_t>(kLanes, packed.width - first);
        float* inside = to.data + n / kPanel * to.panel_stride + k * to.row_stride + first - n;
        float* outside = data + k * k_stride + first * n_stride;
        if (k_stride == 1 && depth == kLanes) {
          Vec rows[kLanes] = {};
          for (int64_t i = 0; i < (kBack ? kLanes : width); ++i) {
            rows[i] = load(kBack ? inside + i * to.row_stride : outside + i * n_stride);
          }
          transpose(rows);
          for (int64_t i = 0; i < (kBack ? width : kLanes); ++i) {
            store(kBack ? outside + i * n_stride : inside + i * to.row_stride, rows[i]);
          }
          continue;
        }
        for (int64_t i = 0; i < depth; ++i) {
          for (int64_t j = 0; j < width; ++j) {
            float& in = inside[i * to.row_stride + j];
            float& out = outside[i * k_stride + j * n_stride];
            (kBack ? out : in) = kBack ? in : out;
          }
        }
      }
    }
  }
}

// Packs the (depth, width) matrix at `data`; the columns that fill up the last panel stay zero.
inline Packed pack(const float* data, int64_t depth, int64_t width, int64_t k_stride, int64_t n_stride) {
  Packed packed(depth, width);
  copy<false>(packed, const_cast<float*>(data), k_stride, n_stride);
  return packed;
}

// Writes a packed (depth, width) matrix back to `data`.
inline void unpack(const Packed& packed, float* data, int64_t k_stride, int64_t n_stride) {
  copy<true>(packed, data, k_stride, n_stride);
}

// What is done with a tile besides C = A B: C += scale A B, and with `squares` the squares of the sums are added to its V
// vectors, element by element.
struct Finish {
  bool add = false;
  float scale = 1;
  float* squares = nullptr;
};

// One tile: C[R, V * kLanes] from A[R, depth] B[depth, V * kLanes]. A(m, k) is a[m * lda + k], transposed a[k * lda + m].
template <bool kTransposed, int R, int V>
void tile(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, Finish finish) {
  Vec acc[R][V] = {};
  for (int64_t k = 0; k < depth; ++k, b += ldb) {
    Vec right[V];
    for (int v = 0; v < V; ++v) right[v] = load(b + v * kLanes);
    for (int m = 0; m < R; ++m) {
      const Vec left = broadcast(kTransposed ? a[k * lda + m] : a[m * lda + k]);
      for (int v = 0; v < V; ++v) acc[m][v] = fma(left, right[v], acc[m][v]);
    }
  }
  // Unrolled, since a loop over m would index the registers, that is, write them to the stack first.
#pragma GCC unroll 8
  for (int m = 0; m < R; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* out = c + m * ldc + v * kLanes;
      if (finish.add) acc[m][v] = fma(broadcast(finish.scale), acc[m][v], load(out));
      store(out, acc[m][v]);
    }
  }
  if (!finish.squares) return;
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    Vec sum = load(finish.squares + v * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < R; ++m) sum = fma(acc[m][v], acc[m][v], sum);
    store(finish.squares + v * kLanes, sum);
  }
}

using Tile = void (*)(int64_t, const float*, int64_t, const float*, int64_t, float*, int64_t, Finish);

// The tiles of 1..kRows rows and 1..kVectors vectors, rows first.
template <bool kTransposed, int... I>
constexpr std::array<Tile, sizeof...(I)> make_tiles(std::integer_sequence<int, I...>) {
  return {tile<kTransposed, I / kVectors + 1, I % kVectors + 1>...};
}

// Rows of C whose squares are summed together, and rows of C that are done before the next ones where A is transposed: so
// many columns of A, a batch deep, stay in the L2 cache for all panels of B. Multiples of every kRows.
constexpr int64_t kGroup = 48, kBlock = 4 * kGroup;

// C[M, N] = A[M, K] B[K, N], or with `add` C += scale A B; A is row-major with leading dimension lda, or A^T is
// (kTransposed). With `squares`, element i of which is set, the sums of the squares of C's rows kGroup i .. kGroup (i + 1).
template <bool kTransposed>
void gemm(int64_t M, int64_t N, int64_t K, const float* a, int64_t lda, Panels b, Panels c, bool add, float scale = 1,
          double* squares = nullptr) {
  static constexpr auto tiles = make_tiles<kTransposed>(std::make_integer_sequence<int, kRows * kVectors>());
  const int64_t a_m = kTransposed ? 1 : lda, a_k = kTransposed ? lda : 1;
  const int64_t block = kTransposed ? kBlock : M, group = kTransposed ? kGroup : M;
  if (squares) std::fill_n(squares, ceil_div(M, kGroup), 0.0);
  for (int64_t first = 0; first < M; first += block) {
    const int64_t last = std::min(first + block, M);
    for (int64_t panel = 0; panel * kPanel < N; ++panel) {
      const int64_t vectors = std::min<int64_t>(kVectors, ceil_div(N - panel * kPanel, kLanes));
      const float* b_panel = b.data + panel * b.panel_stride;
      float* c_panel = c.data + panel * c.panel_stride;
      float sums[kBlock / kGroup][kPanel] = {};
      for (int64_t k = 0; k < K; k += kDepth) {
        const int64_t depth = std::min(kDepth, K - k);
        const bool summed = squares && k + depth == K;
        for (int64_t begin = first; begin < last; begin += group) {
          // Rows are dealt out evenly: a tile of few rows waits for the latency of its own sums.
          int64_t m = begin;
          for (int64_t left = ceil_div(std::min(group, last - begin), kRows); left > 0; --left) {
            const int64_t rows = (std::min(begin + group, last) - m + left - 1) / left;
            tiles[static_cast<size_t>((rows - 1) * kVectors + vectors - 1)](
                depth, a + m * a_m + k * a_k, lda, b_panel + k * b.row_stride, b.row_stride, c_panel + m * c.row_stride,
                c.row_stride, {add || k > 0, scale, summed ? sums[(begin - first) / kGroup] : nullptr});
            m += rows;
          }
        }
      }
      if (!squares) continue;
      for (int64_t begin = first; begin < last; begin += kGroup) {
        for (const float sum : sums[(begin - first) / kGroup]) squares[begin / kGroup] += sum;
      }
    }
  }
}

}  // namespace
}  // namespace dante

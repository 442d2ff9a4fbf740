// For c_b = sum_t d_bt a_bt^T, d (n, t, o), a (n, t, i), in one pass and without a c_b in memory:
//
//     gradient  sum_b c_b      (o, i)
//     squares   sum_b c_b^2    (o, i)
//     norms     ||c_b||^2      (tasks, n), to be summed over the tasks
//
// With one position, sum_b c_b^2 = sum_b d_b^2 a_b^2: two products of matrices, the second of the squares of what is
// packed for the first.
//
// A task is a part of the parameter, whose rows and columns of d and a are packed, some examples at a time, into
// memory that stays in cache. Within it, a tile of c_b is formed in registers, and summed over these examples before it
// is added to gradient and squares: a long sum in one register would lose digits. Tasks do not depend on the number of
// threads, nor does any result. What a thread packs into it keeps for its next call, as libraries of linear algebra do.
//
// Index letters: n example, t position, o output, i input.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#include "numbers.h"

namespace {

// Bytes of a vector register, and whether there are 32 of them or 16.
#if defined(__AVX512F__)
constexpr int BYTES = 64;
constexpr bool MANY_REGISTERS = true;
#elif defined(__AVX2__)
constexpr int BYTES = 32;
constexpr bool MANY_REGISTERS = false;
#elif defined(__aarch64__) || defined(__powerpc64__)
constexpr int BYTES = 16;
constexpr bool MANY_REGISTERS = true;
#else
constexpr int BYTES = 16;
constexpr bool MANY_REGISTERS = false;
#endif

template <class S>
struct Vector {
  typedef S type __attribute__((vector_size(BYTES)));
  typedef std::conditional_t<sizeof(S) == 4, int32_t, int64_t> mask __attribute__((vector_size(BYTES)));
  static constexpr int lanes = BYTES / sizeof(S);
};

template <class V, class S>
inline V load(const S* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V, class S>
inline void store(S* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

// Up to FEW positions gradient and squares of a tile stay in registers beside c_b; with more, a larger tile loads less.
constexpr int64_t FEW = 4;
constexpr int FEW_TALL = 2, FEW_WIDE = MANY_REGISTERS ? 4 : 2, TALL = 4, WIDE = 3;
// With one, nothing else is in registers.
constexpr int ONE_TALL = MANY_REGISTERS ? 8 : 6, ONE_WIDE = MANY_REGISTERS ? 3 : 2;
// Most rows and columns of a task; rows are rounded up to what the tiles divide. Smaller tasks pack more often: of 96
// they took 1.15 times as long with 16 registers, and as long with 32, whose tiles are larger.
constexpr int64_t PART = 192, ROW_UNIT = 4, ONE_PART = MANY_REGISTERS ? 96 : PART;
// Examples times positions packed at once: a column of tiles of them stays in a first-level cache. Of fewer, gradient
// and squares go more often through the cache: with 20 of 256 examples a step took up to 1.4 times as long.
constexpr int64_t DEPTH = 128, ONE_DEPTH = MANY_REGISTERS ? 64 : DEPTH;

// Numbers that a thread keeps for its next call; an example with a hundred thousand positions needs more.
constexpr int64_t KEPT = 1 << 21;

// How a parameter is divided.
struct Plan {
  int64_t wide;           // columns of a tile
  int64_t rows, columns;  // of a task
  int64_t tasks, tasks_in_row;
  int64_t examples;  // packed at once
  int64_t scratch;   // numbers a thread needs

  Plan(int64_t n, int64_t t, int64_t o, int64_t i, bool norms, int64_t lanes) {
    const bool one = t == 1 && !norms;
    const int64_t most = one ? ONE_PART : PART;
    wide = (one ? ONE_WIDE : t > FEW ? WIDE : FEW_WIDE) * lanes;
    rows = part(o, most, one ? ONE_TALL : ROW_UNIT);
    columns = part(i, most / wide * wide, wide);
    tasks_in_row = (i + columns - 1) / columns;
    tasks = (o + rows - 1) / rows * tasks_in_row;
    const int64_t depth = one && n < ONE_DEPTH * DEPTH ? ONE_DEPTH : DEPTH;  // no sum of many more numbers than these
    examples = std::min(n, std::max<int64_t>(1, depth / t));
    scratch = (examples * (t * (rows + columns) + (norms ? lanes : 0)) + lanes - 1) / lanes * lanes;
  }

  static int64_t part(int64_t size, int64_t most, int64_t unit) {
    const int64_t parts = (size + most - 1) / most;
    return ((size + parts - 1) / parts + unit - 1) / unit * unit;
  }
};

template <class In>
struct Operand {
  const In* data;
  int64_t example, position, feature;  // strides
};

// One row of a packed operand, zeros after `valid` numbers.
template <class S, class In>
inline void pack(S* to, const In* from, int64_t stride, int64_t valid, int64_t size) {
  if (stride == 1)
    for (int64_t k = 0; k < valid; ++k) to[k] = widen(from[k]);
  else
    for (int64_t k = 0; k < valid; ++k) to[k] = widen(from[k * stride]);
  std::fill(to + valid, to + size, S(0));
}

// One tile, for the packed examples: d with `height` numbers between positions, a with VECTORS vectors at each. Where
// the parameter ends within the tile, only `tall` rows and `broad` columns of it count: elsewhere may stand an infinity
// times zero, which no norm should see.
template <int ROWS, int VECTORS, bool SQUARES, bool NORMS, class S>
inline __attribute__((always_inline)) void tile(const S* d, int64_t height, const S* a, int64_t n, int64_t t,
                                                S* gradient, S* squares, int64_t stride, S* norms, int64_t tall,
                                                int64_t broad) {
  using V = typename Vector<S>::type;
  using M = typename Vector<S>::mask;
  constexpr int lanes = Vector<S>::lanes;
  const bool edge = tall < ROWS || broad < VECTORS * lanes;
  M inside[VECTORS];
  if (NORMS && edge)
    for (int k = 0; k < VECTORS * lanes; ++k) inside[k / lanes][k % lanes] = k < broad ? -1 : 0;
  V g[ROWS][VECTORS] = {}, q[ROWS][VECTORS] = {};
  for (int64_t b = 0; b < n; ++b) {
    V c[ROWS][VECTORS] = {};
    for (int64_t s = 0; s < t; ++s, d += height, a += VECTORS * lanes) {
      V x[VECTORS];
      for (int k = 0; k < VECTORS; ++k) x[k] = load<V>(a + k * lanes);
      for (int r = 0; r < ROWS; ++r) {
        const V y = d[r] - V{};
        for (int k = 0; k < VECTORS; ++k) c[r][k] += y * x[k];
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int k = 0; k < VECTORS; ++k) {
        g[r][k] += c[r][k];
        if (SQUARES) q[r][k] += c[r][k] * c[r][k];
      }
    if (NORMS) {
      V norm = load<V>(norms + b * lanes);
      for (int r = 0; r < ROWS; ++r)
        for (int k = 0; k < VECTORS; ++k) {
          if (edge && r >= tall) continue;
          const V x = edge ? V(M(c[r][k]) & inside[k]) : c[r][k];
          norm += x * x;
        }
      store(norms + b * lanes, norm);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int k = 0; k < VECTORS; ++k) {
      S* const to = gradient + r * stride + k * lanes;
      store(to, load<V>(to) + g[r][k]);
      if (SQUARES) {
        S* const q_to = squares + r * stride + k * lanes;
        store(q_to, load<V>(q_to) + q[r][k]);
      }
    }
}

// One tile of a product d^T a, for the packed examples; the first of them find memory as it was.
template <int ROWS, int VECTORS, class S>
inline void product(const S* d, int64_t height, const S* a, int64_t n, S* sum, int64_t stride, bool adds) {
  using V = typename Vector<S>::type;
  constexpr int lanes = Vector<S>::lanes;
  V g[ROWS][VECTORS] = {};
  for (int64_t b = 0; b < n; ++b, d += height, a += VECTORS * lanes) {
    V x[VECTORS];
    for (int k = 0; k < VECTORS; ++k) x[k] = load<V>(a + k * lanes);
    for (int r = 0; r < ROWS; ++r) {
      const V y = d[r] - V{};
      for (int k = 0; k < VECTORS; ++k) g[r][k] += y * x[k];
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int k = 0; k < VECTORS; ++k) {
      S* const to = sum + r * stride + k * lanes;
      store(to, adds ? load<V>(to) + g[r][k] : g[r][k]);
    }
}

template <int ROWS, int VECTORS, bool SQUARES, bool NORMS, bool ONE, class S, class In>
void task(int64_t index, const Plan& plan, Operand<In> d, Operand<In> a, int64_t n, int64_t t, int64_t o, int64_t i,
          S* gradient, S* squares, S* norms, S* scratch) {
  constexpr int lanes = Vector<S>::lanes;
  constexpr int64_t wide = VECTORS * lanes;
  const int64_t row = index / plan.tasks_in_row * plan.rows, column = index % plan.tasks_in_row * plan.columns;
  const int64_t rows = std::min(plan.rows, o - row), columns = std::min(plan.columns, i - column);
  S* const packed_a = scratch;                                    // (column of tiles, example and position, wide)
  S* const packed_d = packed_a + plan.examples * t * plan.columns;  // (example and position, plan.rows)
  S* const norm = packed_d + plan.examples * t * plan.rows;         // (example, lanes)
  static_assert((ONE ? ONE_TALL : ROW_UNIT) % ROWS == 0);
  S edge_first[ROWS * wide] = {}, edge_second[ROWS * wide] = {};

  if (!ONE)
    for (int64_t r = row; r < row + rows; ++r) {
      std::fill_n(gradient + r * i + column, columns, S(0));
      if (SQUARES) std::fill_n(squares + r * i + column, columns, S(0));
    }
  for (int64_t start = 0; start < n; start += plan.examples) {
    const int64_t examples = std::min(plan.examples, n - start), depth = examples * t;
    for (int64_t place = 0; place < depth; ++place) {
      const int64_t b = start + place / t, s = place % t;
      pack(packed_d + place * plan.rows, d.data + b * d.example + s * d.position + row * d.feature, d.feature, rows,
           plan.rows);
      const In* from = a.data + b * a.example + s * a.position + column * a.feature;
      for (int64_t k = 0; k < columns; k += wide)
        pack(packed_a + k * depth + place * wide, from + k * a.feature, a.feature, std::min(wide, columns - k), wide);
    }
    if (NORMS) std::fill_n(norm, examples * lanes, S(0));

    // compute(d, a, first, second, stride, tall, broad) adds to a tile of each of these, or of the first alone.
    const auto each_tile = [&](S* first, S* second, auto compute) {
      for (int64_t k = 0; k < columns; k += wide)
        for (int64_t r = 0; r < rows; r += ROWS) {
          const int64_t place = (row + r) * i + column + k;
          const int64_t tall = std::min<int64_t>(ROWS, rows - r), broad = std::min(wide, columns - k);
          S* const g = first + place;
          S* const q = second == nullptr ? nullptr : second + place;
          if (tall == ROWS && broad == wide) {
            compute(packed_d + r, packed_a + k * depth, g, q, i, tall, broad);
            continue;
          }
          for (int64_t e = 0; e < tall; ++e) {
            std::copy_n(g + e * i, broad, edge_first + e * wide);
            if (q != nullptr) std::copy_n(q + e * i, broad, edge_second + e * wide);
          }
          compute(packed_d + r, packed_a + k * depth, edge_first, edge_second, wide, tall, broad);
          for (int64_t e = 0; e < tall; ++e) {
            std::copy_n(edge_first + e * wide, broad, g + e * i);
            if (q != nullptr) std::copy_n(edge_second + e * wide, broad, q + e * i);
          }
        }
    };
    if constexpr (ONE) {
      const auto multiply = [&](const S* d, const S* a, S* sum, S*, int64_t stride, int64_t, int64_t) {
        product<ROWS, VECTORS>(d, plan.rows, a, examples, sum, stride, start > 0);
      };
      each_tile(gradient, nullptr, multiply);
      for (S* x = scratch; x < norm; ++x) *x *= *x;
      each_tile(squares, nullptr, multiply);
    } else {
      each_tile(gradient, SQUARES ? squares : nullptr,
                [&](const S* d, const S* a, S* g, S* q, int64_t stride, int64_t tall, int64_t broad) {
                  tile<ROWS, VECTORS, SQUARES, NORMS>(d, plan.rows, a, examples, t, g, q, stride, norm, tall, broad);
                });
    }
    if (NORMS)
      for (int64_t b = 0; b < examples; ++b) {
        S sum = 0;
        for (int k = 0; k < lanes; ++k) sum += norm[b * lanes + k];
        norms[index * n + start + b] = sum;
      }
  }
}

// Of this thread alone.
template <class S>
std::vector<S>& memory() {
  thread_local std::vector<S> kept;
  return kept;
}

// Numbers in it, aligned to vectors; null where there is no memory for them.
template <class S>
S* scratch_of(int64_t size) try {
  size += BYTES / sizeof(S);
  if (memory<S>().size() < size_t(size)) memory<S>().resize(size);
  const auto address = reinterpret_cast<uintptr_t>(memory<S>().data());
  return reinterpret_cast<S*>((address + BYTES - 1) / BYTES * BYTES);
} catch (const std::bad_alloc&) {
  return nullptr;
}

// False if no thread was given memory; else those that were do the tasks of the others.
template <bool SQUARES, bool NORMS, class S, class In>
bool run(Operand<In> d, Operand<In> a, int64_t n, int64_t t, int64_t o, int64_t i, S* gradient, S* squares, S* norms,
         int threads) {
  const Plan plan(n, t, o, i, NORMS, Vector<S>::lanes);
  const auto run_task = t == 1 && !NORMS ? task<ONE_TALL, ONE_WIDE, SQUARES, false, true, S, In>
                        : t <= FEW         ? task<FEW_TALL, FEW_WIDE, SQUARES, NORMS, false, S, In>
                                            : task<TALL, WIDE, SQUARES, NORMS, false, S, In>;
  std::atomic<int64_t> next{0};
  threads = int(std::min<int64_t>(threads, plan.tasks));
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int thread = 0; thread < threads; ++thread) {
    S* const scratch = scratch_of<S>(plan.scratch);
    for (int64_t index; scratch != nullptr && (index = next++) < plan.tasks;)
      run_task(index, plan, d, a, n, t, o, i, gradient, squares, norms, scratch);
    if (plan.scratch > KEPT) std::vector<S>().swap(memory<S>());
  }
  return next >= plan.tasks;
}

template <class S, class In>
bool choose(const int64_t* z, const In* d, const In* a, S* gradient, S* squares, S* norms, int threads) {
  const auto chosen = squares == nullptr ? run<false, true, S, In>
                      : norms == nullptr ? run<true, false, S, In>
                                         : run<true, true, S, In>;
  const Operand<In> rows{d, z[4], z[5], z[6]}, columns{a, z[7], z[8], z[9]};
  return chosen(rows, columns, z[0], z[1], z[2], z[3], gradient, squares, norms, threads);
}

}  // namespace

// Sizes are n, t, o, i, all positive, and the strides of d and of a. At least one of squares and norms is asked for,
// the other may be null. 0 is returned where there was no memory.
extern "C" {

// The number of tasks for norms of `bytes` bytes a number.
int64_t outer_sum_tasks(const int64_t* sizes, int64_t bytes) {
  return Plan(sizes[0], sizes[1], sizes[2], sizes[3], true, BYTES / bytes).tasks;
}

#define OUTER_SUM(NAME, S, IN)                                                                                         \
  int NAME(const int64_t* sizes, const IN* d, const IN* a, S* gradient, S* squares, S* norms, int threads) {           \
    return choose(sizes, d, a, gradient, squares, norms, threads);                                                     \
  }
OUTER_SUM(outer_sum_float32, float, float)
OUTER_SUM(outer_sum_float64, double, double)
OUTER_SUM(outer_sum_bfloat16, float, BFloat16)
}

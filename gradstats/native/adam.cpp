// A step of BatchInvariantAdam over all parameters in one call, whatever their number and sizes:
//
//     v  = product m m' + square q          m' = m, or unbias m~ + first m, or unbias m_before + first m
//     m~ <- m~ + w1 (m - m~)                s <- s + w2 (v - s)            q~ <- q~ + w3 (q - q~)
//     p  <- decay p - clip step m~ / (sqrt(max(s, bound)) + eps)           bound = 0, q~ inverse_reference, or m~^2
//
// with m the mean gradient and q the second moment of the batch: the equation of AdamUpdate (optim/adam.py) in one pass
// over memory, or in its two phases, averages and parameters. No result depends on the number of threads.
//
// It looks at the tensors itself: from Python, that takes as long as the step of a small model.

#include <c10/core/TensorImpl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <exception>
#include <vector>

#include "numbers.h"

namespace {

using c10::DispatchKey;
using c10::ScalarType;
using c10::TensorImpl;

// Of a tensor whose numbers are what lies in its memory. Lazy negation, implied zeros, sparsity, other devices, tracing
// and torch.func have keys of their own, and tensors made in inference mode lack some, having no version.
const c10::DispatchKeySet PLAIN(
    {DispatchKey::CPU, DispatchKey::ADInplaceOrView, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU});

enum Phase { BOTH, AVERAGES, MOVE };
enum Partner { ITSELF, AVERAGE, PREVIOUS, ITSELF_REMEMBERED };  // the last two keep m for the next batch
enum Bound { NONE, OF_SQUARES, OF_MEAN };

// In the order in which they come.
template <class S>
struct Scalars {
  S mean_scale, second_moment_scale, product, square, w1, w2, w3, step, eps, decay, first, unbias, inverse_reference,
      clip;
  explicit Scalars(const double* k)
      : mean_scale(k[0]), second_moment_scale(k[1]), product(k[2]), square(k[3]), w1(k[4]), w2(k[5]), w3(k[6]),
        step(k[7]), eps(k[8]), decay(k[9]), first(k[10]), unbias(k[11]), inverse_reference(k[12]), clip(k[13]) {}
};

// In the order of Row.
enum Column { PARAMETER, GRADIENT, MEAN, SECOND_MOMENT, SQUARES, LONG_RUN, BEFORE, COLUMNS };

// One parameter's tensors: those that the equation does not have are null.
template <class P, class S>
struct Row {
  P* p;
  const P* gradient;
  S *average, *square_average;
  const S* squares;
  S *squares_average, *previous;
};

template <int PHASE, int PARTNER, int BOUND, bool READS, class P, class S>
void move(const Row<P, S>& row, int64_t start, int64_t end, const Scalars<S>& k) {
  P* __restrict p = row.p;
  const P* __restrict gradient = row.gradient;
  S* __restrict average = row.average;
  S* __restrict square_average = row.square_average;
  const S* __restrict squares = row.squares;
  S* __restrict squares_average = row.squares_average;
  S* __restrict previous = row.previous;
#pragma omp simd
  for (int64_t i = start; i < end; ++i) {
    S mean = average[i], s = square_average[i], long_run = BOUND == OF_SQUARES ? squares_average[i] : 0;
    if (PHASE != MOVE) {
      const S m = k.mean_scale * widen(gradient[i]);
      S partner = m;
      if (PARTNER == AVERAGE) partner = k.unbias * mean + k.first * m;
      if (PARTNER == PREVIOUS) partner = k.unbias * previous[i] + k.first * m;
      S v = k.product * m * partner, q = 0;
      if (READS) v += k.square * (q = k.second_moment_scale * squares[i]);
      square_average[i] = s += k.w2 * (v - s);
      average[i] = mean += k.w1 * (m - mean);
      if (BOUND == OF_SQUARES) squares_average[i] = long_run += k.w3 * (q - long_run);
      if (PARTNER == PREVIOUS || PARTNER == ITSELF_REMEMBERED) previous[i] = m;
    }
    if (PHASE != AVERAGES) {
      if (BOUND == OF_SQUARES) s = std::max(s, long_run * k.inverse_reference);
      if (BOUND == OF_MEAN) s = std::max(s, mean * mean);
      narrow(k.decay * widen(p[i]) - k.clip * k.step * mean / (std::sqrt(s) + k.eps), p[i]);
    }
  }
}

// Addresses are (COLUMNS, count).
template <int PHASE, int PARTNER, int BOUND, bool READS, class P, class S>
void run(int64_t count, const int64_t* sizes, void* const* addresses, const double* numbers, int threads) {
  const Scalars<S> k(numbers);
  int64_t total = 0;
  for (int64_t c = 0; c < count; ++c) total += sizes[c];
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int thread = 0; thread < threads; ++thread) {
    const int64_t from = total * thread / threads, to = total * (thread + 1) / threads;
    int64_t offset = 0;
    for (int64_t c = 0; c < count && offset < to; offset += sizes[c++]) {
      const int64_t start = std::max<int64_t>(from - offset, 0), end = std::min(to - offset, sizes[c]);
      if (start >= end) continue;
      const auto address = [&](int column) { return addresses[column * count + c]; };
      const Row<P, S> row{(P*)address(PARAMETER),     (const P*)address(GRADIENT), (S*)address(MEAN),
                          (S*)address(SECOND_MOMENT), (const S*)address(SQUARES),  (S*)address(LONG_RUN),
                          (S*)address(BEFORE)};
      move<PHASE, PARTNER, BOUND, READS>(row, start, end, k);
    }
  }
}

template <class P, class S, int PHASE, int PARTNER, int BOUND>
auto reading(bool reads) {
  return reads ? run<PHASE, PARTNER, BOUND, true, P, S> : run<PHASE, PARTNER, BOUND, false, P, S>;
}

template <class P, class S, int PHASE, int PARTNER>
auto bounded(int bound, bool reads) {
  // Squares are read where their average is kept, and the mean is no bound of averages.
  return bound == OF_SQUARES ? run<PHASE, PARTNER, OF_SQUARES, true, P, S>
         : bound == OF_MEAN  ? reading<P, S, PHASE, PARTNER, PHASE == AVERAGES ? NONE : OF_MEAN>(reads)
                             : reading<P, S, PHASE, PARTNER, NONE>(reads);
}

template <class P, class S, int PHASE>
auto partnered(int partner, int bound, bool reads) {
  return partner == AVERAGE             ? bounded<P, S, PHASE, AVERAGE>(bound, reads)
         : partner == PREVIOUS          ? bounded<P, S, PHASE, PREVIOUS>(bound, reads)
         : partner == ITSELF_REMEMBERED ? bounded<P, S, PHASE, ITSELF_REMEMBERED>(bound, reads)
                                        : bounded<P, S, PHASE, ITSELF>(bound, reads);
}

template <class P, class S>
auto choose(int phase, int partner, int bound, bool reads) {
  return phase == BOTH       ? partnered<P, S, BOTH>(partner, bound, reads)
         : phase == AVERAGES ? partnered<P, S, AVERAGES>(partner, bound, reads)
                             : bounded<P, S, MOVE, ITSELF>(bound, false);
}

// Tensors are (COLUMNS, count), those that the equation does not have null. False, and nothing is moved, if one of them
// is not as it is wanted.
template <class P, class S>
bool step(int phase, int partner, int bound, bool reads, int64_t count, TensorImpl* const* tensors,
          const double* numbers, int threads, int64_t grain) {
  std::vector<int64_t> sizes(count);
  std::vector<void*> addresses(COLUMNS * count);
  int64_t total = 0;
  for (int64_t i = 0; i < COLUMNS * count; ++i) {
    TensorImpl* const t = tensors[i];
    if (t == nullptr) continue;
    const auto dtype = i / count <= GRADIENT ? tensors[0]->dtype() : caffe2::TypeMeta::Make<S>();
    if (t->key_set() != PLAIN || t->dtype() != dtype || !t->is_contiguous()) return false;
    if (i < count) total += sizes[i] = t->numel();
    if (t->numel() != sizes[i % count]) return false;
    addresses[i] = t->mutable_data();
  }
  threads = std::clamp<int64_t>(total / grain, 1, threads);
  choose<P, S>(phase, partner, bound, reads)(count, sizes.data(), addresses.data(), numbers, threads);
  // Tells autograd of what was written: a graph that saved it before is refused.
  for (const int column : {PARAMETER, MEAN, SECOND_MOMENT, LONG_RUN, BEFORE})
    if (phase == BOTH || (phase == MOVE) == (column == PARAMETER))
      for (int64_t c = 0; c < count && tensors[column * count] != nullptr; ++c)
        tensors[column * count + c]->bump_version();
  return true;
}

}  // namespace

extern "C" int adam(int phase, int partner, int bound, bool reads, int64_t count, TensorImpl* const* tensors,
                    const double* numbers, int threads, int64_t grain) try {
  const ScalarType dtype = tensors[0]->dtype().toScalarType();
  const auto chosen = dtype == ScalarType::Double     ? step<double, double>
                      : dtype == ScalarType::BFloat16 ? step<BFloat16, float>
                                                      : step<float, float>;
  return chosen(phase, partner, bound, reads, count, tensors, numbers, threads, grain);
} catch (const std::exception&) {  // by torch, of memory that it does not give: who is asked next says so
  return false;
}

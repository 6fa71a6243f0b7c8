// CPU kernels of hdet::pack, hdet::unpack, hdet::all_finite and hdet::scale_rates. The equations are in
// hdet/ops/__init__.py.
//
// Work is cut into blocks of kBlock wire positions, whatever tensors they belong to, so that threads share it evenly
// and the statistics do not depend on them. A block goes through short loops over buffers that stay in the L1 cache;
// each loop is compiled for several instruction sets and picked when the library is loaded.

#include <atomic>
#include <cmath>
#include <vector>

#include "arguments.h"

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define HDET_VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define HDET_VECTORISED __attribute__((target_clones("avx2", "default")))
#endif
#else
#define HDET_VECTORISED
#endif

namespace hdet {
namespace {

// Blocks to a thread, at least: below, starting a thread costs more than it saves.
constexpr int64_t kGrain = 16;
// Elements that are looked through before a thread asks whether another has found a one beyond the limit.
constexpr int64_t kFiniteStep = 32 * kBlock;

// ---------------------------------------------------------------------------------------- loops over one block

template <class From, class Real>
HDET_VECTORISED void widen_all(const From* __restrict from, Real* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}

template <class Real>
HDET_VECTORISED void subtract_all(const Real* __restrict values, const Real* __restrict anchor, Real* __restrict to,
                                  int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = values[i] - anchor[i];
}

template <class Real, class Wire>
HDET_VECTORISED int scale_all(const Real* __restrict values, Real scale, Limits limits, Wire* __restrict wire,
                              int64_t n) {
  int beyond = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Wire value = Narrow<Wire>::from(values[i] * scale);
    wire[i] = value;
    beyond += is_beyond(value, limits);
  }
  return beyond;
}

template <class From>
HDET_VECTORISED bool all_within(const From* from, Limits limits, int64_t n) {
  int beyond = 0;
  for (int64_t i = 0; i < n; ++i) beyond |= is_beyond(from[i], limits);
  return beyond == 0;
}

// By a power of two, multiplying with its reciprocal gives the same bits sooner.
template <class Real>
struct Divisor {
  explicit Divisor(Real value) : value(value), reciprocal(1 / value) {
    int exponent;
    is_power = std::frexp(value, &exponent) == Real(0.5) && exponent > -100 && exponent < 100;
  }
  Real value, reciprocal;
  bool is_power;
};

template <class Wire, class Real>
HDET_VECTORISED void divide_all(const Wire* __restrict wire, Divisor<Real> by, Real* __restrict mean, int64_t n) {
  if (by.is_power) {
    for (int64_t i = 0; i < n; ++i) mean[i] = widen(wire[i]) * by.reciprocal;
  } else {
    for (int64_t i = 0; i < n; ++i) mean[i] = widen(wire[i]) / by.value;
  }
}

template <class Real>
HDET_VECTORISED void add_all(const Real* __restrict anchor, Real* __restrict mean, int64_t n) {
  for (int64_t i = 0; i < n; ++i) mean[i] = anchor[i] + mean[i];
}

template <class Tensor, class Real>
HDET_INLINE Real replace(Tensor& element, Real mean) {
  const Real difference = widen(element) - mean;
  element = Narrow<Tensor>::from(mean);
  return difference;
}

// Puts wire / divisor into the piece.
template <class Wire, class Tensor, class Real>
HDET_VECTORISED void replace_all(const Wire* __restrict wire, Divisor<Real> by, Tensor* __restrict piece,
                                 Real* __restrict differences, int64_t n) {
  if (by.is_power) {
    for (int64_t i = 0; i < n; ++i) differences[i] = replace(piece[i], widen(wire[i]) * by.reciprocal);
  } else {
    for (int64_t i = 0; i < n; ++i) differences[i] = replace(piece[i], widen(wire[i]) / by.value);
  }
}

template <class Real>
HDET_VECTORISED void move_all(Real* __restrict slow, const Real* __restrict mean, Real weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) slow[i] = moved_towards(slow[i], mean[i], weight);
}

// sums[0] = the sum of sums[0] to sums[2 n - 1], by halves.
template <int n>
HDET_INLINE void fold(double* sums) {
  for (int i = 0; i < n; ++i) sums[i] += sums[i + n];
  if constexpr (n > 1) fold<n / 2>(sums);
}

// Of the squares: row by row, then sum_of_four of each four, then by halves.
template <class Real>
HDET_VECTORISED double sum_of_squares(const Real* __restrict x) {
  static_assert(kRows == 4, "there are as many terms below");
  alignas(64) double sums[kRow], fours[kRow / 4];
  for (int i = 0; i < kRow; ++i)
    sums[i] = square(x[i]) + square(x[i + kRow]) + square(x[i + 2 * kRow]) + square(x[i + 3 * kRow]);
  for (int i = 0; i < kRow / 4; ++i)
    fours[i] = sum_of_four(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
  fold<kRow / 8>(fours);
  return fours[0];
}

double sum_blocks(const std::vector<double>& blocks) {
  double lanes[kLanes] = {};
  for (size_t i = 0; i < blocks.size(); ++i) lanes[i % kLanes] += blocks[i];
  fold<kLanes / 2>(lanes);
  return lanes[0];
}

// --------------------------------------------------------------------------------------------------- the blocks

int64_t blocks_of(int64_t numel) { return (numel + kBlock - 1) / kBlock; }

// Calls run(piece, first, size, offset) for the pieces' parts in wire positions [begin, end): `size` elements from the
// piece's element `first`, at `offset` from `begin`. `piece` walks on from call to call.
template <class Run>
void for_each_run(const Piece*& piece, int64_t begin, int64_t end, Run&& run) {
  for (int64_t at = begin; at < end;) {
    while (piece->end <= at) ++piece;
    const int64_t stop = std::min(end, piece->end);
    run(*piece, at - piece->begin, stop - at, at - begin);
    at = stop;
  }
}

const Piece* piece_at(const std::vector<Piece>& table, int64_t position) {
  return &*std::upper_bound(table.begin(), table.end(), position,
                            [](int64_t value, const Piece& piece) { return value < piece.end; });
}

template <class Real, class Wire>
int64_t pack_as(const Arguments& a, const Real* anchor, Real scale, const Limits& limits) {
  std::atomic<int64_t> beyond{0};
  Wire* const wire = static_cast<Wire*>(a.wire);
  torch::stable::parallel_for(0, blocks_of(a.numel), kGrain, [&](int64_t first, int64_t last) {
    alignas(64) Real values[kBlock];
    int64_t found = 0;
    const Piece* piece = piece_at(a.table, first * kBlock);
    for (int64_t begin = first * kBlock; begin < std::min(last * kBlock, a.numel); begin += kBlock) {
      const int64_t size = std::min<int64_t>(kBlock, a.numel - begin);
      const Real* source = values;
      for_each_run(piece, begin, begin + size, [&](const Piece& p, int64_t from, int64_t n, int64_t offset) {
        visit(p.dtype, p.data, [&](auto* data) {
          using From = std::remove_pointer_t<decltype(data)>;
          if constexpr (std::is_same_v<From, Real>) {
            if (n == size) {
              source = data + from;
              return;
            }
          }
          if constexpr (std::is_same_v<From, double> == std::is_same_v<Real, double>)
            widen_all(data + from, values + offset, n);
        });
      });
      if (anchor) {
        subtract_all(source, anchor + begin, values, size);
        source = values;
      }
      found += scale_all(source, scale, limits, wire + begin, size);
    }
    beyond += found;
  });
  return beyond;
}

template <class Real, class Wire>
double unpack_as(const Arguments& a, double divisor, Real* anchor, Real* slow, double weight) {
  std::vector<double> sums(blocks_of(a.numel));
  const Wire* const wire = static_cast<const Wire*>(a.wire);
  const Divisor<Real> by_divisor(static_cast<Real>(divisor)), by_one(1);
  torch::stable::parallel_for(0, blocks_of(a.numel), kGrain, [&](int64_t first, int64_t last) {
    alignas(64) Real mean[kRow], differences[kBlock];
    const Piece* piece = piece_at(a.table, first * kBlock);
    for (int64_t block = first; block < last; ++block) {
      const int64_t start = block * kBlock, stop = std::min(start + kBlock, a.numel);
      for (int64_t begin = start; begin < stop; begin += kRow) {
        const int64_t size = std::min<int64_t>(kRow, stop - begin);
        const auto replace_row = [&](const auto* row, Divisor<Real> by) {
          for_each_run(piece, begin, begin + size, [&](const Piece& p, int64_t from, int64_t n, int64_t offset) {
            visit(p.dtype, p.data, [&](auto* data) {
              using To = std::remove_pointer_t<decltype(data)>;
              if constexpr (std::is_same_v<To, double> == std::is_same_v<Real, double>) {
                replace_all(row + offset, by, data + from, differences + (begin - start) + offset, n);
                if (anchor) widen_all(data + from, anchor + begin + offset, n);
              }
            });
          });
        };
        if (!anchor && !slow) {
          replace_row(wire + begin, by_divisor);
          continue;
        }
        divide_all(wire + begin, by_divisor, mean, size);
        if (anchor) add_all(anchor + begin, mean, size);
        replace_row(static_cast<const Real*>(mean), by_one);
        if (slow && weight == 1.0) memcpy(slow + begin, mean, size * sizeof(Real));
        if (slow && weight != 1.0) move_all(slow + begin, mean, static_cast<Real>(weight), size);
      }
      std::fill(differences + (stop - start), differences + kBlock, Real(0));
      sums[block] = sum_of_squares(differences);
    }
  });
  return sum_blocks(sums);
}

template <class Visitor>
auto visit_wire(const Arguments& a, Visitor&& visitor) {
  if (a.wire_dtype == kFloat64) return visitor(double{}, double{});
  if (a.wire_dtype == kBFloat16) return visitor(float{}, BFloat16{});
  return visitor(float{}, float{});
}

void write_rates(const Arguments& a) {
  for (size_t g = 0; g < a.lr_table.size(); ++g) write_rate(a.lr_table[g], rate_of(a.factors, static_cast<int64_t>(g)));
}

// ------------------------------------------------------------------------------------------------------ the ops

Tensor pack(const Tensor& wire, StableListHandle piece_list, double scale, const OptionalTensor& anchor,
            double limit) {
  const Tensors pieces(piece_list);
  Arguments a(wire, pieces, aoti_torch_device_type_cpu());
  void* const anchor_data = a.flat(anchor, "anchor");
  a.check_disjoint();
  const Limits limits(limit);
  const int64_t beyond = visit_wire(a, [&](auto real, auto packed) {
    using Real = decltype(real);
    return pack_as<Real, decltype(packed)>(a, static_cast<const Real*>(anchor_data), static_cast<Real>(scale), limits);
  });
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_scalar_to_tensor_int64(beyond, &result));
  return Tensor(result);
}

Tensor unpack(const Tensor& wire, StableListHandle piece_list, double divisor, const OptionalTensor& anchor,
              const OptionalTensor& slow, double slow_decay, StableListHandle lr_list,
              const OptionalTensor& schedule, const OptionalTensor& gain, const OptionalTensor& multiplier) {
  const Tensors pieces(piece_list), lrs(lr_list);
  Arguments a(wire, pieces, aoti_torch_device_type_cpu());
  void* const anchor_data = a.flat(anchor, "anchor");
  void* const slow_data = a.flat(slow, "slow");
  a.rates(lrs, schedule, gain, multiplier);
  a.check_disjoint();
  const double squared_distance = visit_wire(a, [&](auto real, auto packed) {
    using Real = decltype(real);
    return unpack_as<Real, decltype(packed)>(a, divisor, static_cast<Real*>(anchor_data),
                                             static_cast<Real*>(slow_data), 1.0 - slow_decay);
  });
  write_rates(a);
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_scalar_to_tensor_float64(squared_distance, &result));
  return Tensor(result);
}

Tensor all_finite(StableListHandle piece_list, double limit) {
  const Tensors pieces(piece_list);
  const std::vector<Piece> table = table_of(pieces, aoti_torch_device_type_cpu());
  const Limits limits(limit);
  std::atomic<bool> finite{true};
  const int64_t numel = table.empty() ? 0 : table.back().end;
  torch::stable::parallel_for(0, blocks_of(numel), kGrain, [&](int64_t first, int64_t last) {
    const Piece* piece = first < last ? piece_at(table, first * kBlock) : nullptr;
    for (int64_t begin = first * kBlock; begin < std::min(last * kBlock, numel) && finite; begin += kFiniteStep) {
      const int64_t end = std::min({begin + kFiniteStep, last * kBlock, numel});
      for_each_run(piece, begin, end, [&](const Piece& p, int64_t from, int64_t n, int64_t) {
        visit(p.dtype, p.data, [&](auto* data) {
          if (!all_within(data + from, limits, n)) finite = false;
        });
      });
    }
  });
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_scalar_to_tensor_bool(finite, &result));
  return Tensor(result);
}

void scale_rates(StableListHandle lr_list, const Numbers& schedule, const Numbers& gain, const Numbers& multiplier) {
  const Tensors lrs(lr_list);
  write_rates(Arguments(lrs, aoti_torch_device_type_cpu(), schedule, gain, multiplier));
}

}  // namespace
}  // namespace hdet

STABLE_TORCH_LIBRARY_IMPL(hdet, CPU, m) {
  m.impl("pack", TORCH_BOX(&hdet::pack));
  m.impl("unpack", TORCH_BOX(&hdet::unpack));
  m.impl("all_finite", TORCH_BOX(&hdet::all_finite));
  m.impl("scale_rates", TORCH_BOX(&hdet::scale_rates));
}

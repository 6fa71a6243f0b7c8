// CPU kernels of hdet::pack, hdet::unpack and hdet::all_finite. The equations are in hdet/ops/__init__.py.
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
constexpr int64_t kGrain = 32;
// Elements that are looked through before a thread asks whether another has found a non-finite one.
constexpr int64_t kFiniteStep = 64 * kBlock;

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
HDET_VECTORISED int scale_all(const Real* __restrict values, Real scale, Wire* __restrict wire, int64_t n) {
  int nonfinite = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Wire value = Narrow<Wire>::from(values[i] * scale);
    wire[i] = value;
    nonfinite += is_nonfinite(value);
  }
  return nonfinite;
}

template <class From>
HDET_VECTORISED bool all_finite_in(const From* from, int64_t n) {
  int nonfinite = 0;
  for (int64_t i = 0; i < n; ++i) nonfinite |= is_nonfinite(from[i]);
  return nonfinite == 0;
}

template <class Wire, class Real>
HDET_VECTORISED void divide_all(const Wire* __restrict wire, Real divisor, Real* __restrict mean, int64_t n) {
  int exponent;
  if (std::frexp(divisor, &exponent) == Real(0.5) && exponent > -100 && exponent < 100) {  // a power of two: same bits
    const Real reciprocal = 1 / divisor;
    for (int64_t i = 0; i < n; ++i) mean[i] = widen(wire[i]) * reciprocal;
  } else {
    for (int64_t i = 0; i < n; ++i) mean[i] = widen(wire[i]) / divisor;
  }
}

template <class Real>
HDET_VECTORISED void add_all(const Real* __restrict anchor, Real* __restrict mean, int64_t n) {
  for (int64_t i = 0; i < n; ++i) mean[i] = anchor[i] + mean[i];
}

template <class Tensor, class Real>
HDET_VECTORISED void replace_all(Tensor* __restrict piece, const Real* __restrict mean, Real* __restrict differences,
                                 int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    differences[i] = widen(piece[i]) - mean[i];
    piece[i] = Narrow<Tensor>::from(mean[i]);
  }
}

template <class Real>
HDET_VECTORISED void move_all(Real* __restrict slow, const Real* __restrict mean, Real weight, int64_t n) {
  for (int64_t i = 0; i < n; ++i) slow[i] = moved_towards(slow[i], mean[i], weight);
}

typedef double Four __attribute__((vector_size(32)));
typedef int64_t Order __attribute__((vector_size(32)));

#ifdef __clang__
#define HDET_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define HDET_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Order{__VA_ARGS__})
#endif

// sums[0] = the sum of sums[0] to sums[2 n - 1], by halves.
template <int n>
HDET_INLINE void fold(double* sums) {
  for (int i = 0; i < n; ++i) sums[i] += sums[i + n];
  if constexpr (n > 1) fold<n / 2>(sums);
}

// As square_of_difference() does. (For __builtin_convertvector g++ 12 takes twice the instructions.)
template <class Real>
HDET_INLINE void square_four(const Real* x, Four& squares) {
  squares = Four{x[0], x[1], x[2], x[3]};
  squares *= squares;
}

// Of the squares: sum_of_four of each four, then by halves. Four fours at a time are transposed by hand, which g++ does
// three times slower.
template <class Real>
HDET_VECTORISED double sum_of_squares(const Real* __restrict differences) {
  alignas(64) double sums[kBlock / 4];
  for (int i = 0; i < kBlock / 16; ++i) {
    Four a, b, c, d;
    square_four(differences + 16 * i, a);
    square_four(differences + 16 * i + 4, b);
    square_four(differences + 16 * i + 8, c);
    square_four(differences + 16 * i + 12, d);
    const Four ab = HDET_SHUFFLE(a, b, 0, 4, 2, 6) + HDET_SHUFFLE(a, b, 1, 5, 3, 7);
    const Four cd = HDET_SHUFFLE(c, d, 0, 4, 2, 6) + HDET_SHUFFLE(c, d, 1, 5, 3, 7);
    const Four sum = HDET_SHUFFLE(ab, cd, 0, 1, 4, 5) + HDET_SHUFFLE(ab, cd, 2, 3, 6, 7);
    memcpy(sums + 4 * i, &sum, sizeof(Four));
  }
  fold<kBlock / 8>(sums);
  return sums[0];
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
int64_t pack_as(const Arguments& a, const Real* anchor, Real scale) {
  std::atomic<int64_t> nonfinite{0};
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
      found += scale_all(source, scale, wire + begin, size);
    }
    nonfinite += found;
  });
  return nonfinite;
}

template <class Real, class Wire>
double unpack_as(const Arguments& a, double divisor, Real* anchor, Real* slow, double weight) {
  std::vector<double> sums(blocks_of(a.numel));
  const Wire* const wire = static_cast<const Wire*>(a.wire);
  torch::stable::parallel_for(0, blocks_of(a.numel), kGrain, [&](int64_t first, int64_t last) {
    alignas(64) Real mean[kBlock];
    alignas(64) Real differences[kBlock];
    const Piece* piece = piece_at(a.table, first * kBlock);
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kBlock, size = std::min<int64_t>(kBlock, a.numel - begin);
      divide_all(wire + begin, static_cast<Real>(divisor), mean, size);
      if (anchor) add_all(anchor + begin, mean, size);
      for_each_run(piece, begin, begin + size, [&](const Piece& p, int64_t from, int64_t n, int64_t offset) {
        visit(p.dtype, p.data, [&](auto* data) {
          using To = std::remove_pointer_t<decltype(data)>;
          if constexpr (std::is_same_v<To, double> == std::is_same_v<Real, double>) {
            replace_all(data + from, mean + offset, differences + offset, n);
            if (anchor) widen_all(data + from, anchor + begin + offset, n);
          }
        });
      });
      if (slow && weight == 1.0) memcpy(slow + begin, mean, size * sizeof(Real));
      if (slow && weight != 1.0) move_all(slow + begin, mean, static_cast<Real>(weight), size);
      std::fill(differences + size, differences + kBlock, Real(0));
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

// ------------------------------------------------------------------------------------------------------ the ops

Tensor pack(const Tensor& wire, StableListHandle piece_list, double scale, const OptionalTensor& anchor) {
  const Tensors pieces(piece_list);
  Arguments a(wire, pieces, aoti_torch_device_type_cpu());
  void* const anchor_data = a.flat(anchor, "anchor");
  a.check_disjoint();
  const int64_t nonfinite = visit_wire(a, [&](auto real, auto packed) {
    using Real = decltype(real);
    return pack_as<Real, decltype(packed)>(a, static_cast<const Real*>(anchor_data), static_cast<Real>(scale));
  });
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_scalar_to_tensor_int64(nonfinite, &result));
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
  for (size_t g = 0; g < a.lr_table.size(); ++g) write_rate(a.lr_table[g], a.factors, g);
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_scalar_to_tensor_float64(squared_distance, &result));
  return Tensor(result);
}

Tensor all_finite(StableListHandle piece_list) {
  const Tensors pieces(piece_list);
  const std::vector<Piece> table = table_of(pieces, aoti_torch_device_type_cpu());
  std::atomic<bool> finite{true};
  const int64_t numel = table.empty() ? 0 : table.back().end;
  torch::stable::parallel_for(0, blocks_of(numel), kGrain, [&](int64_t first, int64_t last) {
    const Piece* piece = first < last ? piece_at(table, first * kBlock) : nullptr;
    for (int64_t begin = first * kBlock; begin < std::min(last * kBlock, numel) && finite; begin += kFiniteStep) {
      const int64_t end = std::min({begin + kFiniteStep, last * kBlock, numel});
      for_each_run(piece, begin, end, [&](const Piece& p, int64_t from, int64_t n, int64_t) {
        visit(p.dtype, p.data, [&](auto* data) {
          if (!all_finite_in(data + from, n)) finite = false;
        });
      });
    }
  });
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_scalar_to_tensor_bool(finite, &result));
  return Tensor(result);
}

}  // namespace
}  // namespace hdet

STABLE_TORCH_LIBRARY_IMPL(hdet, CPU, m) {
  m.impl("pack", TORCH_BOX(&hdet::pack));
  m.impl("unpack", TORCH_BOX(&hdet::unpack));
  m.impl("all_finite", TORCH_BOX(&hdet::all_finite));
}

// Where a wire's elements live: what the bindings hand to the kernels. Plain C++, no torch.
#pragma once

#include <cstdint>

#include "arithmetic.h"

namespace hdet {

// One non-empty tensor and the wire positions [begin, end) that hold it. Pieces lie end to end in the wire.
struct Piece {
  void* data;
  int64_t begin;
  int64_t end;
  Dtype dtype;
};

// One learning rate to write, float32 or float64.
struct Rate {
  void* lr;
  Dtype dtype;
};

// The factors of the learning rates, `groups` numbers each: lr[g] = schedule[g] * gain[g] * multiplier[g].
struct Factors {
  const double* schedule;
  const double* gain;
  const double* multiplier;
};

// Calls visitor(data) with the dtype's pointer type.
template <class Visitor>
inline void visit(Dtype dtype, void* data, Visitor&& visitor) {
  switch (dtype) {
    case kFloat32: return visitor(static_cast<float*>(data));
    case kFloat64: return visitor(static_cast<double*>(data));
    case kFloat16: return visitor(static_cast<Half*>(data));
    case kBFloat16: return visitor(static_cast<BFloat16*>(data));
  }
}

HDET_INLINE double rate_of(Factors factors, int64_t group) {
  return factors.schedule[group] * factors.gain[group] * factors.multiplier[group];
}

HDET_INLINE void write_rate(Rate rate, double lr) {
  if (rate.dtype == kFloat64) *static_cast<double*>(rate.lr) = lr;
  else *static_cast<float*>(rate.lr) = static_cast<float>(lr);
}

}  // namespace hdet

// The arithmetic of hdet's ops, element by element, compiled by the host compiler and by nvcc alike.
//
// With contraction off (g++ -ffp-contract=off, nvcc -fmad=false) both give the same bits. The twin in Python is
// hdet/ops/_reference.py, where the equations stand as well.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define HDET_INLINE __host__ __device__ __forceinline__
#else
#define HDET_INLINE inline __attribute__((always_inline))
#endif

namespace hdet {

enum Dtype : int32_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

// Scalars and not structs, which g++ would not vectorise.
enum class Half : uint16_t {};
enum class BFloat16 : uint16_t {};

// Consecutive wire positions whose squared distances are summed as one tree: row by row at first.
constexpr int kBlock = 2048;
constexpr int kRows = 4;
constexpr int kRow = kBlock / kRows;
// Block sums are summed in this many lanes.
constexpr int kLanes = 1024;

template <class To, class From>
HDET_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between sizes");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// ------------------------------------------------------------------------- to float or double, exactly

HDET_INLINE float widen(float x) { return x; }
HDET_INLINE double widen(double x) { return x; }
HDET_INLINE float widen(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x) << 16); }

// Without a subnormal operand, which flush-to-zero would lose (after M. Dukhan's FP16 library).
HDET_INLINE float widen(Half x) {
  const uint32_t sign = (static_cast<uint32_t>(x) & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x) & 0x7fffu;
  const float normal = bit_cast<float>((magnitude << 13) + 0x70000000u) * 0x1p-112f;
  const float subnormal = bit_cast<float>(magnitude | 0x3f000000u) - 0.5f;
  const uint32_t bits = magnitude < 0x0400u ? bit_cast<uint32_t>(subnormal) : bit_cast<uint32_t>(normal);
  return bit_cast<float>(sign | bits);
}

// ------------------------------------------------------------ to a tensor's dtype, to nearest, ties to even

template <class To>
struct Narrow;

template <>
struct Narrow<float> {
  static HDET_INLINE float from(float x) { return x; }
};

template <>
struct Narrow<double> {
  static HDET_INLINE double from(double x) { return x; }
};

template <>
struct Narrow<BFloat16> {
  static HDET_INLINE BFloat16 from(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return static_cast<BFloat16>(nan ? 0x7fc0u : rounded);
  }
};

template <>
struct Narrow<Half> {
  static HDET_INLINE Half from(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Normal halves: rebias the exponent and round at bit 13; a carry into the exponent is right, up to infinity.
    const uint32_t normal = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal halves are multiples of 2^-24, the last place of a float in [0.5, 1).
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x47800000u ? 0x7c00u : half;
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    return static_cast<Half>(sign | half);
  }
};

HDET_INLINE int is_nonfinite(float x) { return (bit_cast<uint32_t>(x) & 0x7f800000u) == 0x7f800000u; }
HDET_INLINE int is_nonfinite(double x) { return (bit_cast<uint64_t>(x) >> 52 & 0x7ffu) == 0x7ffu; }
HDET_INLINE int is_nonfinite(BFloat16 x) { return (static_cast<uint32_t>(x) & 0x7f80u) == 0x7f80u; }
HDET_INLINE int is_nonfinite(Half x) { return (static_cast<uint32_t>(x) & 0x7c00u) == 0x7c00u; }

// ------------------------------------------------------------------------------------------ the equations

HDET_INLINE double square(double x) { return x * x; }

template <class Real>
HDET_INLINE Real moved_towards(Real slow, Real mean, Real weight) {
  return slow + weight * (mean - slow);
}

HDET_INLINE double sum_of_four(double a, double b, double c, double d) { return (a + b) + (c + d); }

}  // namespace hdet

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

// -------------------------------------------------------------------------------------- the size of an element

// |x| as an integer that grows with it. That of infinity and NaN is above all others.
HDET_INLINE int32_t magnitude(float x) { return bit_cast<int32_t>(x) & 0x7fffffff; }
HDET_INLINE int64_t magnitude(double x) { return bit_cast<int64_t>(x) & 0x7fffffffffffffff; }
HDET_INLINE int32_t magnitude(BFloat16 x) { return static_cast<int32_t>(x) & 0x7fff; }
HDET_INLINE int32_t magnitude(Half x) { return static_cast<int32_t>(x) & 0x7fff; }

// The largest finite magnitude of each dtype that is not above a limit.
struct Limits {
  int64_t float64;
  int32_t float32, bfloat16, float16;

  explicit Limits(double limit) {
    const double largest = bit_cast<double>(int64_t{0x7fefffffffffffff});
    if (!(limit < largest)) limit = largest;
    float64 = magnitude(limit);
    const float most = bit_cast<float>(int32_t{0x7f7fffff});
    const float nearest = limit < most ? static_cast<float>(limit) : most;
    float32 = magnitude(nearest) - (nearest > limit);
    bfloat16 = float32 >> 16;
    const Half half = Narrow<Half>::from(bit_cast<float>(float32));
    float16 = magnitude(half) - (magnitude(half) > 0x7bff || widen(half) > limit);
  }
};

HDET_INLINE int is_beyond(double x, const Limits& limits) { return magnitude(x) > limits.float64; }
HDET_INLINE int is_beyond(float x, const Limits& limits) { return magnitude(x) > limits.float32; }
HDET_INLINE int is_beyond(BFloat16 x, const Limits& limits) { return magnitude(x) > limits.bfloat16; }
HDET_INLINE int is_beyond(Half x, const Limits& limits) { return magnitude(x) > limits.float16; }

// ------------------------------------------------------------------------------------------ the equations

HDET_INLINE double square(double x) { return x * x; }

template <class Real>
HDET_INLINE Real moved_towards(Real slow, Real mean, Real weight) {
  return slow + weight * (mean - slow);
}

HDET_INLINE double sum_of_four(double a, double b, double c, double d) { return (a + b) + (c + d); }

}  // namespace hdet

// CUDA kernels of hdet::pack, hdet::unpack and hdet::all_finite. Without nvcc, emulation.h runs them on the CPU, thread by thread.
//
// A thread block takes a block of the wire, whatever tensors it belongs to; thread t owns elements 4 t to 4 t + 3 of
// each of its rows. A block inside one aligned tensor goes through 16-byte accesses, all issued before the first is
// used. Where tensors begin and end travels in the kernel's arguments: nothing is uploaded, and a graph can replay.

#include "kernels.h"

#include <algorithm>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define HDET_LAUNCH(kernel, grid, threads, stream, ...) \
  kernel<<<static_cast<unsigned>(grid), threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#else
#include "emulation.h"
#endif

namespace hdet {
namespace {

constexpr int kThreads = kRow / 4;
constexpr int64_t kMaxSlice = int64_t{1} << 30;
constexpr int kFew = 256;
// Any block of the wire must fit into one launch, with a tensor for every element; 32764 bytes of arguments at most.
constexpr int kMany = 2304;
constexpr int kRates = 64;

// The pieces of one launch. Positions are relative to `begin`, itself the beginning of a block.
template <int Capacity>
struct Slice {
  int64_t begin;
  uint32_t size;
  uint32_t count;
  void* data[Capacity];
  uint32_t start[Capacity + 1];
  uint8_t dtype[Capacity];
};
static_assert(sizeof(Slice<kMany>) <= 32000, "a kernel takes at most 32764 bytes of arguments");
static_assert(kMany > kBlock, "a block of the wire must fit into one launch");

// Learning rates to write by factors on the device, and by values.
struct Rates {
  Factors factors;
  int64_t first;
  int count;
  Rate rate[kRates];
};

struct ScaledRates {
  int count;
  Rate rate[kRates];
  double value[kRates];
};

// ------------------------------------------------------------------------------------------------- on the device

template <class T>
struct alignas(sizeof(T) >= 4 ? 16 : 8) Four {
  T at[4];
};

template <class T>
__device__ bool is_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % alignof(Four<T>) == 0;
}

template <class T>
__device__ Four<T>& four(T* pointer) {
  return *reinterpret_cast<Four<T>*>(pointer);
}

template <class T>
__device__ const Four<T>& four(const T* pointer) {
  return *reinterpret_cast<const Four<T>*>(pointer);
}

// The piece of [low, high] that holds `position`.
template <int Capacity>
__device__ uint32_t piece_at(const Slice<Capacity>& slice, uint32_t position, uint32_t low, uint32_t high) {
  while (low < high) {
    const uint32_t middle = (low + high + 1) / 2;
    if (slice.start[middle] <= position) low = middle;
    else high = middle - 1;
  }
  return low;
}

template <class Real>
struct Packing {
  const Real* anchor;
  Real scale;
  Limits limits;
  unsigned long long* beyond;
};

template <class Real>
struct Unpacking {
  Real divisor, weight;
  Real *anchor, *slow;
  double* sums;
};

// Puts the mean into a tensor's element, the anchor and the slow average; returns the squared distance.
template <class T, class Real>
__device__ double replace(const Unpacking<Real>& u, T& element, Real wire, Real& anchor, Real& slow) {
  Real mean = wire / u.divisor;
  if (u.anchor) mean = anchor + mean;
  const double squared = square(widen(element) - mean);
  element = Narrow<T>::from(mean);
  if (u.anchor) anchor = widen(element);
  if (u.slow) slow = u.weight == Real(1) ? mean : moved_towards(slow, mean, u.weight);
  return squared;
}

// In place of the accumulator's type, for pieces of all dtypes together.
struct Any {};

// Calls run(pointer) with the piece's dtype; fp64 travels with fp64 only.
template <class Real, class Run>
__device__ void with_dtype(uint8_t dtype, void* data, Run&& run) {
  if constexpr (std::is_same_v<Real, double>) {
    run(static_cast<double*>(data));
  } else {
    if constexpr (std::is_same_v<Real, Any>) {
      if (dtype == kFloat64) return run(static_cast<double*>(data));
    }
    if (dtype == kFloat32) run(static_cast<float*>(data));
    else if (dtype == kBFloat16) run(static_cast<BFloat16*>(data));
    else run(static_cast<Half*>(data));
  }
}

// Calls fast(pointer) if the block lies inside one piece, with the pointer to the thread's first element. Otherwise calls
// slow(pointer, position, j) for the thread's elements one by one, the j-th of four.
template <class Real, int Capacity, class Fast, class Slow>
__device__ void for_block(const Slice<Capacity>& slice, bool aligned, Fast&& fast, Slow&& slow) {
  const uint32_t first = blockIdx.x * kBlock;
  const uint32_t low = piece_at(slice, first, 0, slice.count - 1);
  if (aligned && slice.start[low + 1] - first >= kBlock) {
    bool done = false;
    with_dtype<Real>(slice.dtype[low], slice.data[low], [&](auto* data) {
      data += first - slice.start[low] + 4 * threadIdx.x;
      if (is_aligned(data)) {
        fast(data);
        done = true;
      }
    });
    if (done) return;
  }
  const uint32_t high = piece_at(slice, min(first + kBlock, slice.size) - 1, low, slice.count - 1);
#pragma unroll 1
  for (int u = 0; u < kRows; ++u) {
    const uint32_t position = first + u * kRow + 4 * threadIdx.x;
    uint32_t piece = piece_at(slice, position, low, high);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (position + j < slice.size) {
        while (slice.start[piece + 1] <= position + j) ++piece;
        with_dtype<Real>(slice.dtype[piece], slice.data[piece], [&](auto* data) {
          slow(data + (position + j - slice.start[piece]), slice.begin + position + j, j);
        });
      }
    }
  }
}

template <class Real, class Wire, int Capacity>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const __grid_constant__ Slice<Capacity> slice, Wire* __restrict__ wire, const Packing<Real> p) {
  const int64_t mine = slice.begin + int64_t{blockIdx.x} * kBlock + 4 * threadIdx.x;
  const bool aligned = is_aligned(wire + mine) && (!p.anchor || is_aligned(p.anchor + mine));
  int found = 0;
  for_block<Real>(
      slice, aligned,
      [&](auto* data) {
        using T = std::remove_pointer_t<decltype(data)>;
        Four<T> values[kRows];
        Four<Real> anchor[kRows] = {};
#pragma unroll
        for (int u = 0; u < kRows; ++u) {
          values[u] = four(data + u * kRow);
          if (p.anchor) anchor[u] = four(p.anchor + mine + u * kRow);
        }
#pragma unroll
        for (int u = 0; u < kRows; ++u) {
          Four<Wire> packed;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            packed.at[j] = Narrow<Wire>::from((widen(values[u].at[j]) - anchor[u].at[j]) * p.scale);
            found += is_beyond(packed.at[j], p.limits);
          }
          four(wire + mine + u * kRow) = packed;
        }
      },
      [&](auto* element, int64_t at, int) {
        const Real anchor = p.anchor ? p.anchor[at] : Real(0);
        const Wire packed = Narrow<Wire>::from((widen(*element) - anchor) * p.scale);
        wire[at] = packed;
        found += is_beyond(packed, p.limits);
      });
  for (int lanes = 16; lanes > 0; lanes /= 2) found += __shfl_down_sync(0xffffffffu, found, lanes);
  if (threadIdx.x % 32 == 0 && found) atomicAdd(p.beyond, static_cast<unsigned long long>(found));
}

template <class Real, class Wire, int Capacity>
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const __grid_constant__ Slice<Capacity> slice, const Wire* __restrict__ wire,
                  const Unpacking<Real> p) {
  __shared__ double sums_of_four[kThreads];
  const int64_t mine = slice.begin + int64_t{blockIdx.x} * kBlock + 4 * threadIdx.x;
  const bool aligned = is_aligned(wire + mine) && (!p.anchor || is_aligned(p.anchor + mine)) &&
                       (!p.slow || is_aligned(p.slow + mine));
  double sums[4] = {};  // over the rows
  for_block<Real>(
      slice, aligned,
      [&](auto* data) {
        using T = std::remove_pointer_t<decltype(data)>;
        Four<Wire> packed[kRows];
        Four<T> elements[kRows];
#pragma unroll
        for (int u = 0; u < kRows; ++u) {
          packed[u] = four(wire + mine + u * kRow);
          elements[u] = four(data + u * kRow);
        }
#pragma unroll
        for (int u = 0; u < kRows; ++u) {
          Four<Real> anchor = {}, slow = {};
          if (p.anchor) anchor = four(p.anchor + mine + u * kRow);
          if (p.slow) slow = four(p.slow + mine + u * kRow);
#pragma unroll
          for (int j = 0; j < 4; ++j)
            sums[j] += replace<T, Real>(p, elements[u].at[j], widen(packed[u].at[j]), anchor.at[j], slow.at[j]);
          four(data + u * kRow) = elements[u];
          if (p.anchor) four(p.anchor + mine + u * kRow) = anchor;
          if (p.slow) four(p.slow + mine + u * kRow) = slow;
        }
      },
      [&](auto* element, int64_t at, int j) {
        using T = std::remove_pointer_t<decltype(element)>;
        Real anchor = p.anchor ? p.anchor[at] : Real(0), slow = p.slow ? p.slow[at] : Real(0);
        sums[j] += replace<T, Real>(p, *element, widen(wire[at]), anchor, slow);
        if (p.anchor) p.anchor[at] = anchor;
        if (p.slow) p.slow[at] = slow;
      });
  sums_of_four[threadIdx.x] = sum_of_four(sums[0], sums[1], sums[2], sums[3]);
  __syncthreads();
  // One warp halves them: from 128 to 32 in each thread, then across them.
  if (threadIdx.x >= 32) return;
  double halves[kThreads / 32];
  for (int i = 0; i < kThreads / 32; ++i) halves[i] = sums_of_four[threadIdx.x + 32 * i];
  for (int half = kThreads / 64; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) halves[i] += halves[i + half];
  for (int lanes = 16; lanes > 0; lanes /= 2) halves[0] += __shfl_down_sync(0xffffffffu, halves[0], lanes);
  if (threadIdx.x == 0) p.sums[slice.begin / kBlock + blockIdx.x] = halves[0];
}

template <int Capacity>
__global__ void __launch_bounds__(kThreads)
    all_finite_kernel(const __grid_constant__ Slice<Capacity> slice, const Limits limits, bool* finite) {
  int found = 0;
  for_block<Any>(
      slice, true,
      [&](auto* data) {
        using T = std::remove_pointer_t<decltype(data)>;
        Four<T> values[kRows];
#pragma unroll
        for (int u = 0; u < kRows; ++u) values[u] = four(static_cast<const T*>(data + u * kRow));
#pragma unroll
        for (int u = 0; u < kRows; ++u)
#pragma unroll
          for (int j = 0; j < 4; ++j) found |= is_beyond(values[u].at[j], limits);
      },
      [&](auto* element, int64_t, int) { found |= is_beyond(*element, limits); });
  if (found) *finite = false;  // whoever writes, writes the same
}

__device__ void write_rates(const Rates& rates) {
  if (threadIdx.x < static_cast<unsigned>(rates.count))
    write_rate(rates.rate[threadIdx.x], rate_of(rates.factors, rates.first + threadIdx.x));
}

// The last launch of an unpack: sums the blocks in kLanes lanes, and writes the learning rates.
__global__ void __launch_bounds__(kLanes) finish_kernel(const double* __restrict__ sums, int64_t blocks,
                                                        double* squared_distance, const __grid_constant__ Rates rates) {
  __shared__ double lanes[kLanes];
  double sum = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < blocks; i += kLanes) sum += sums[i];
  lanes[threadIdx.x] = sum;
  for (unsigned half = kLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) lanes[threadIdx.x] += lanes[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *squared_distance = lanes[0];
  write_rates(rates);
}

__global__ void rates_kernel(const __grid_constant__ Rates rates) { write_rates(rates); }

__global__ void scaled_rates_kernel(const __grid_constant__ ScaledRates rates) {
  if (threadIdx.x < static_cast<unsigned>(rates.count)) write_rate(rates.rate[threadIdx.x], rates.value[threadIdx.x]);
}

// --------------------------------------------------------------------------------------------------- on the host

// Calls launch(slice, blocks) for slices that together cover the wire.
template <int Capacity, class Launch>
void for_slices(const Piece* table, int64_t pieces, int64_t numel, Launch&& launch) {
  int64_t first = 0;
  for (int64_t begin = 0; begin < numel;) {
    int64_t stop = first;
    while (stop < pieces && stop - first < Capacity && table[stop].begin < begin + kMaxSlice) ++stop;
    int64_t end = std::min(table[stop - 1].end, begin + kMaxSlice);
    if (end < numel) end -= end % kBlock;
    Slice<Capacity> slice;
    slice.begin = begin;
    slice.size = static_cast<uint32_t>(end - begin);
    slice.count = 0;
    for (int64_t i = first; i < stop && table[i].begin < end; ++i, ++slice.count) {
      const int64_t skipped = std::max<int64_t>(0, begin - table[i].begin);
      const int64_t bytes = table[i].dtype == kFloat64 ? 8 : table[i].dtype == kFloat32 ? 4 : 2;
      slice.data[slice.count] = static_cast<char*>(table[i].data) + skipped * bytes;
      slice.start[slice.count] = static_cast<uint32_t>(table[i].begin + skipped - begin);
      slice.dtype[slice.count] = static_cast<uint8_t>(table[i].dtype);
    }
    slice.start[slice.count] = slice.size;
    launch(slice, (slice.size + kBlock - 1) / kBlock);
    while (first < pieces && table[first].end <= end) ++first;
    begin = end;
  }
}

template <class Launch>
void for_slices(const Piece* table, int64_t pieces, int64_t numel, Launch&& launch) {
  if (pieces <= kFew) for_slices<kFew>(table, pieces, numel, launch);
  else for_slices<kMany>(table, pieces, numel, launch);
}

template <class Run>
void with_wire(Dtype dtype, Run&& run) {
  if (dtype == kFloat64) run(double{}, double{});
  else if (dtype == kBFloat16) run(float{}, BFloat16{});
  else run(float{}, float{});
}

}  // namespace
}  // namespace hdet

using namespace hdet;

extern "C" int hdet_cuda_pack(const Piece* table, int64_t pieces, int64_t numel, void* wire, Dtype wire_dtype,
                              const void* anchor, double scale, double limit, unsigned long long* beyond,
                              void* stream) {
  const cudaError_t error = cudaMemsetAsync(beyond, 0, sizeof(*beyond), static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) return error;
  with_wire(wire_dtype, [&](auto real, auto packed) {
    using Real = decltype(real);
    using Wire = decltype(packed);
    const Packing<Real> packing{static_cast<const Real*>(anchor), static_cast<Real>(scale), Limits(limit), beyond};
    for_slices(table, pieces, numel, [&](const auto& slice, uint32_t blocks) {
      HDET_LAUNCH((pack_kernel<Real, Wire>), blocks, kThreads, stream, slice, static_cast<Wire*>(wire), packing);
    });
  });
  return cudaGetLastError();
}

extern "C" int hdet_cuda_unpack(const Piece* table, int64_t pieces, int64_t numel, const void* wire, Dtype wire_dtype,
                                double divisor, void* anchor, void* slow, double weight, const Rate* rates,
                                int64_t groups, Factors factors, double* sums, double* squared_distance, void* stream) {
  with_wire(wire_dtype, [&](auto real, auto packed) {
    using Real = decltype(real);
    using Wire = decltype(packed);
    const Unpacking<Real> unpacking{static_cast<Real>(divisor), static_cast<Real>(weight), static_cast<Real*>(anchor),
                                    static_cast<Real*>(slow), sums};
    for_slices(table, pieces, numel, [&](const auto& slice, uint32_t blocks) {
      HDET_LAUNCH((unpack_kernel<Real, Wire>), blocks, kThreads, stream, slice, static_cast<const Wire*>(wire),
                  unpacking);
    });
  });
  int64_t first = 0;
  do {
    Rates some{factors, first, static_cast<int>(std::min<int64_t>(kRates, groups - first)), {}};
    std::copy(rates + first, rates + first + some.count, some.rate);
    if (first == 0) {
      HDET_LAUNCH(finish_kernel, 1, kLanes, stream, sums, (numel + kBlock - 1) / kBlock, squared_distance, some);
    } else {
      HDET_LAUNCH(rates_kernel, 1, kRates, stream, some);
    }
    first += kRates;
  } while (first < groups);
  return cudaGetLastError();
}

extern "C" int hdet_cuda_all_finite(const Piece* table, int64_t pieces, int64_t numel, double limit, bool* finite,
                                    void* stream) {
  const cudaError_t error = cudaMemsetAsync(finite, 1, sizeof(*finite), static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess) return error;
  for_slices(table, pieces, numel, [&](const auto& slice, uint32_t blocks) {
    HDET_LAUNCH(all_finite_kernel, blocks, kThreads, stream, slice, Limits(limit), finite);
  });
  return cudaGetLastError();
}

extern "C" int hdet_cuda_scale_rates(const Rate* rates, int64_t groups, Factors factors, void* stream) {
  for (int64_t first = 0; first < groups; first += kRates) {
    ScaledRates some{static_cast<int>(std::min<int64_t>(kRates, groups - first)), {}, {}};
    for (int i = 0; i < some.count; ++i) {
      some.rate[i] = rates[first + i];
      some.value[i] = rate_of(factors, first + i);
    }
    HDET_LAUNCH(scaled_rates_kernel, 1, kRates, stream, some);
  }
  return cudaGetLastError();
}

extern "C" const char* hdet_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

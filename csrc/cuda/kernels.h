// The CUDA kernels, as the binding calls them: enqueue on `stream` and return a cudaError_t, 0 for success.
//
// `table` holds `pieces` non-empty pieces that cover wire positions [0, numel) in order. Nothing is read from host
// memory once a call has returned, so that a CUDA graph can capture it.
#pragma once

#include "../table.h"

extern "C" {

// beyond: one number on the device.
int hdet_cuda_pack(const hdet::Piece* table, int64_t pieces, int64_t numel, void* wire, hdet::Dtype wire_dtype,
                   const void* anchor, double scale, double limit, unsigned long long* beyond, void* stream);

// sums: scratch on the device, a number for each block of the wire. squared_distance: one number on the device.
int hdet_cuda_unpack(const hdet::Piece* table, int64_t pieces, int64_t numel, const void* wire, hdet::Dtype wire_dtype,
                     double divisor, void* anchor, void* slow, double weight, const hdet::Rate* rates, int64_t groups,
                     hdet::Factors factors, double* sums, double* squared_distance, void* stream);

// finite: one bool on the device.
int hdet_cuda_all_finite(const hdet::Piece* table, int64_t pieces, int64_t numel, double limit, bool* finite,
                         void* stream);

// rates and factors: on the host.
int hdet_cuda_scale_rates(const hdet::Rate* rates, int64_t groups, hdet::Factors factors, void* stream);

const char* hdet_cuda_error(int error);
}

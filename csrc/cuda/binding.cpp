// hdet::pack, hdet::unpack, hdet::all_finite and hdet::scale_rates for CUDA tensors: checks, scratch memory and the
// current stream for the kernels.

#include <torch/csrc/stable/accelerator.h>

#include "../arguments.h"
#include "kernels.h"

namespace hdet {
namespace {

Tensor empty(int64_t dimensions, int64_t size, int32_t dtype, int32_t device) {
  const int64_t stride = 1;
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dimensions, &size, &stride, dtype, aoti_torch_device_type_cuda(),
                                                  device, &result));
  return Tensor(result);
}

void* current_stream(int32_t device) {
  void* stream;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

void check(int error) {
  if (error != 0) throw std::runtime_error(std::string("hdet: CUDA error: ") + hdet_cuda_error(error));
}

Tensor pack(const Tensor& wire, StableListHandle piece_list, double scale, const OptionalTensor& anchor,
            double limit) {
  const Tensors pieces(piece_list);
  Arguments a(wire, pieces, aoti_torch_device_type_cuda());
  void* const anchor_data = a.flat(anchor, "anchor");
  a.check_disjoint();

  const int32_t device = wire.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor beyond = empty(0, 0, aoti_torch_dtype_int64(), device);
  check(hdet_cuda_pack(a.table.data(), static_cast<int64_t>(a.table.size()), a.numel, a.wire, a.wire_dtype, anchor_data,
                       scale, limit, static_cast<unsigned long long*>(beyond.data_ptr()), current_stream(device)));
  return beyond;
}

Tensor unpack(const Tensor& wire, StableListHandle piece_list, double divisor, const OptionalTensor& anchor,
              const OptionalTensor& slow, double slow_decay, StableListHandle lr_list, const OptionalTensor& schedule,
              const OptionalTensor& gain, const OptionalTensor& multiplier) {
  const Tensors pieces(piece_list), lrs(lr_list);
  Arguments a(wire, pieces, aoti_torch_device_type_cuda());
  void* const anchor_data = a.flat(anchor, "anchor");
  void* const slow_data = a.flat(slow, "slow");
  a.rates(lrs, schedule, gain, multiplier);
  a.check_disjoint();

  const int32_t device = wire.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor sums = empty(1, (a.numel + kBlock - 1) / kBlock, aoti_torch_dtype_float64(), device);
  const Tensor squared_distance = empty(0, 0, aoti_torch_dtype_float64(), device);
  check(hdet_cuda_unpack(a.table.data(), static_cast<int64_t>(a.table.size()), a.numel, a.wire, a.wire_dtype, divisor,
                         anchor_data, slow_data, 1.0 - slow_decay, a.lr_table.data(),
                         static_cast<int64_t>(a.lr_table.size()), a.factors, static_cast<double*>(sums.data_ptr()),
                         static_cast<double*>(squared_distance.data_ptr()), current_stream(device)));
  return squared_distance;
}

Tensor all_finite(StableListHandle piece_list, double limit) {
  const Tensors pieces(piece_list);
  const std::vector<Piece> table = table_of(pieces, aoti_torch_device_type_cuda());
  int32_t device = 0;
  if (pieces.size() > 0) TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(pieces[0], &device));
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor finite = empty(0, 0, aoti_torch_dtype_bool(), device);
  check(hdet_cuda_all_finite(table.data(), static_cast<int64_t>(table.size()), table.empty() ? 0 : table.back().end,
                             limit, static_cast<bool*>(finite.data_ptr()), current_stream(device)));
  return finite;
}

void scale_rates(StableListHandle lr_list, const Numbers& schedule, const Numbers& gain, const Numbers& multiplier) {
  const Tensors lrs(lr_list);
  const Arguments a(lrs, aoti_torch_device_type_cuda(), schedule, gain, multiplier);
  const torch::stable::accelerator::DeviceGuard guard(a.device_index());
  check(hdet_cuda_scale_rates(a.lr_table.data(), static_cast<int64_t>(a.lr_table.size()), a.factors,
                              current_stream(a.device_index())));
}

}  // namespace
}  // namespace hdet

STABLE_TORCH_LIBRARY_IMPL(hdet, CUDA, m) {
  m.impl("pack", TORCH_BOX(&hdet::pack));
  m.impl("unpack", TORCH_BOX(&hdet::unpack));
  m.impl("all_finite", TORCH_BOX(&hdet::all_finite));
  m.impl("scale_rates", TORCH_BOX(&hdet::scale_rates));
}

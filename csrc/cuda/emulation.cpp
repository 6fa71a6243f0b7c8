// The CUDA ops, binding and kernels, for CPU tensors: torch.ops.hdet_emulated, which only tests load.

#define hdet hdet_emulated

#include <torch/csrc/stable/accelerator.h>

#include "../arguments.h"
#include "kernels.cu"

struct NoGuard {
  explicit NoGuard(int32_t) {}
};
namespace torch::stable::accelerator {
using ::NoGuard;
}

static AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return TORCH_SUCCESS;
}

#define DeviceGuard NoGuard
#define CUDA CPU
#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu
#include "binding.cpp"

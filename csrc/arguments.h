// What pack and unpack demand of their arguments, checked for every tensor, for the CPU and the CUDA bindings.
//
// hdet/ops/_reference.py states the same rules and words them for the user: the public functions ask it to explain
// when one of these checks fails.
#pragma once

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "table.h"

namespace hdet {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Numbers = std::vector<double>;

[[noreturn]] inline void reject(const std::string& name, const char* rule) {
  throw std::runtime_error("hdet: " + name + " " + rule);
}

// torch's code of a dtype as ours.
inline bool known(int32_t dtype, Dtype& kind) {
  static const int32_t float32 = aoti_torch_dtype_float32(), bfloat16 = aoti_torch_dtype_bfloat16(),
                       float16 = aoti_torch_dtype_float16(), float64 = aoti_torch_dtype_float64();
  if (dtype == float32) kind = kFloat32;
  else if (dtype == bfloat16) kind = kBFloat16;
  else if (dtype == float16) kind = kFloat16;
  else if (dtype == float64) kind = kFloat64;
  else return false;
  return true;
}

// A Tensor[] argument. Taken as the raw list, since a stable::Tensor for each element would cost more than the checks.
class Tensors {
 public:
  explicit Tensors(StableListHandle list) {
    size_t size = 0;
    AOTITorchError error = torch_list_size(list, &size);
    handles_.reserve(size);
    for (size_t i = 0; i < size && error == TORCH_SUCCESS; ++i) {
      StableIValue value;
      error = torch_list_get_item(list, i, &value);
      if (error == TORCH_SUCCESS) handles_.push_back(torch::stable::detail::to<AtenTensorHandle>(value));
    }
    torch_delete_list(list);  // not the tensors, which are ours now
    if (error != TORCH_SUCCESS) {
      release();
      reject("a list of tensors", "could not be read");
    }
  }
  Tensors(const Tensors&) = delete;
  Tensors& operator=(const Tensors&) = delete;
  ~Tensors() { release(); }

  size_t size() const { return handles_.size(); }
  AtenTensorHandle operator[](size_t i) const { return handles_[i]; }

 private:
  void release() {
    for (AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
  }
  std::vector<AtenTensorHandle> handles_;
};

// The pieces of a call that only reads: they need not be on a wire, nor disjoint.
inline std::vector<Piece> table_of(const Tensors& pieces, int32_t device_type) {
  std::vector<Piece> table;
  table.reserve(pieces.size());
  int64_t end = 0;
  int32_t device_index = 0;
  for (size_t i = 0; i < pieces.size(); ++i) {
    int32_t type, index, dtype;
    int64_t numel;
    bool contiguous;
    void* data;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(pieces[i], &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(pieces[i], &index));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(pieces[i], &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(pieces[i], &contiguous));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(pieces[i], &numel));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(pieces[i], &data));
    const auto name = [i] { return "pieces[" + std::to_string(i) + "]"; };
    if (i == 0) device_index = index;
    if (type != device_type || index != device_index) reject(name(), "must be on the op's device");
    if (!contiguous) reject(name(), "must be contiguous");
    Dtype kind;
    if (!known(dtype, kind)) reject(name(), "must be float32, float64, float16 or bfloat16");
    if (numel > 0) table.push_back({data, end, end + numel, kind});
    end += numel;
  }
  return table;
}

// Collects the arguments of one call: checks each alone, remembers its memory, and then checks that none overlap.
class Arguments {
 public:
  Arguments(const Tensor& wire, const Tensors& pieces, int32_t device_type) : device_type_(device_type) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(wire.get(), &device_index_));
    const Fact fact = add(wire.get(), "wire");
    if (fact.dtype != kFloat32 && fact.dtype != kBFloat16 && fact.dtype != kFloat64)
      reject("wire", "must be float32, bfloat16 or float64");
    if (wire.dim() != 1) reject("wire", "must have one dimension");
    this->wire = fact.data;
    this->wire_dtype = fact.dtype;
    this->numel = fact.numel;

    table.reserve(pieces.size());
    spans_.reserve(pieces.size() + 8);
    int64_t begin = 0;
    for (size_t i = 0; i < pieces.size(); ++i) {
      const Fact piece = add(pieces[i], "pieces", i);
      if ((piece.dtype == kFloat64) != (wire_dtype == kFloat64))
        reject(label("pieces", i), "must be float64 if the wire is, and only then");
      if (piece.numel > 0) table.push_back({piece.data, begin, begin + piece.numel, piece.dtype});
      begin += piece.numel;
    }
    if (begin != numel) reject("wire", "must have as many elements as the pieces together");
  }

  // Of a call without a wire: learning rates on one device, and as many factors of each kind, which stay where they are.
  Arguments(const Tensors& lrs, int32_t device_type, const Numbers& schedule, const Numbers& gain,
            const Numbers& multiplier)
      : factors{schedule.data(), gain.data(), multiplier.data()}, device_type_(device_type), device_index_(0) {
    for (const Numbers* numbers : {&schedule, &gain, &multiplier})
      if (numbers->size() != lrs.size()) reject("schedule, gain and multiplier", "must hold one number for each of lrs");
    if (lrs.size() > 0) TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(lrs[0], &device_index_));
    rates(lrs);
    check_disjoint();
  }

  // A flat buffer in the wire's order and the accumulator's dtype.
  void* flat(const OptionalTensor& tensor, const char* name) {
    if (!tensor) return nullptr;
    const Fact fact = add(tensor->get(), name);
    if (fact.dtype != (wire_dtype == kFloat64 ? kFloat64 : kFloat32)) reject(name, "must have the accumulator's dtype");
    if (tensor->dim() != 1 || fact.numel != numel) reject(name, "must have the wire's shape");
    return fact.data;
  }

  void rates(const Tensors& lrs) {
    for (size_t g = 0; g < lrs.size(); ++g) {
      const Fact fact = add(lrs[g], "lrs", g);
      if (fact.dtype != kFloat32 && fact.dtype != kFloat64) reject(label("lrs", g), "must be float32 or float64");
      if (fact.numel != 1) reject(label("lrs", g), "must have one element");
      lr_table.push_back({fact.data, fact.dtype});
    }
  }

  void rates(const Tensors& lrs, const OptionalTensor& schedule, const OptionalTensor& gain,
             const OptionalTensor& multiplier) {
    rates(lrs);
    factors = {factor(schedule, "schedule"), factor(gain, "gain"), factor(multiplier, "multiplier")};
  }

  int32_t device_index() const { return device_index_; }

  // The three factors are only read, and may share memory among themselves.
  void check_disjoint() {
    const auto before = [](const Span& a, const Span& b) { return a.begin < b.begin; };
    if (!std::is_sorted(spans_.begin(), spans_.end(), before)) std::sort(spans_.begin(), spans_.end(), before);
    uintptr_t end = 0, end_of_own = 0;
    for (const Span& span : spans_) {
      if (span.begin < (span.shareable ? end_of_own : end)) reject("arguments", "must not share memory");
      end = std::max(end, span.end);
      if (!span.shareable) end_of_own = std::max(end_of_own, span.end);
    }
  }

  void* wire;
  Dtype wire_dtype;
  int64_t numel;
  std::vector<Piece> table;
  std::vector<Rate> lr_table;
  Factors factors{};

 private:
  struct Fact {
    void* data;
    int64_t numel;
    Dtype dtype;
  };
  struct Span {
    uintptr_t begin, end;
    bool shareable;
  };

  static std::string label(const char* name, size_t index) {
    return index == kAlone ? name : std::string(name) + "[" + std::to_string(index) + "]";
  }

  Fact add(AtenTensorHandle handle, const char* name, size_t index = kAlone) {
    int32_t type, device, dtype;
    bool contiguous;
    Fact fact;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(handle, &contiguous));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(handle, &fact.numel));
    if (type != device_type_ || device != device_index_) reject(label(name, index), "must be on the wire's device");
    if (!contiguous) reject(label(name, index), "must be contiguous");
    if (!known(dtype, fact.dtype)) reject(label(name, index), "must be float32, float64, float16 or bfloat16");
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &fact.data));
    if (fact.numel > 0) {
      const uintptr_t begin = reinterpret_cast<uintptr_t>(fact.data);
      const int64_t size = fact.dtype == kFloat64 ? 8 : fact.dtype == kFloat32 ? 4 : 2;
      spans_.push_back({begin, begin + static_cast<uintptr_t>(fact.numel * size), false});
    }
    return fact;
  }

  const double* factor(const OptionalTensor& tensor, const char* name) {
    if (!tensor) {
      if (!lr_table.empty()) reject(name, "must be given with lrs");
      return nullptr;
    }
    const Fact fact = add(tensor->get(), name);
    if (fact.numel > 0) spans_.back().shareable = true;
    if (fact.dtype != kFloat64) reject(name, "must be float64");
    if (tensor->dim() != 1 || fact.numel != static_cast<int64_t>(lr_table.size()))
      reject(name, "must hold one number for each of lrs");
    return static_cast<const double*>(fact.data);
  }

  static constexpr size_t kAlone = static_cast<size_t>(-1);
  int32_t device_type_, device_index_;
  std::vector<Span> spans_;
};

}  // namespace hdet

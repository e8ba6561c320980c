// Python's tensors seen through DLPack's C interface, some 40 ns each, and what that does not tell
// of them. Includes no torch header but that one, which is plain C.
#pragma once

#include "python.h"
// torch's copy, which it hides from users of the stable ABI.
#undef TORCH_TARGET_VERSION
#include <ATen/dlpack.h>

#include <array>
#include <atomic>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

#include "float_types.h"
#include "strides.h"

namespace cl_optim {

inline const DLPackExchangeAPI& dlpack() {
  static const DLPackExchangeAPI* api = [] {
    const Object tensor = import("torch").attribute("Tensor");
    const Object capsule = tensor.attribute("__dlpack_c_exchange_api__");
    const auto* found = static_cast<const DLPackExchangeAPI*>(
        PyCapsule_GetPointer(capsule.get(), "dlpack_exchange_api"));
    if (found == nullptr) throw PythonError();
    if (found->header.version.major != DLPACK_MAJOR_VERSION) {
      throw std::runtime_error("torch speaks a version of DLPack that this build does not know");
    }
    return found;
  }();
  return *api;
}

// A look at a tensor, while it lives. Nothing where DLPack cannot say what it is (a sparse one).
inline std::optional<DLTensor> look(PyObject* tensor) {
  DLTensor seen;
  if (dlpack().dltensor_from_py_object_no_sync(tensor, &seen) == 0) return seen;
  PyErr_Clear();
  return std::nullopt;
}

// Whether torch sees a tensor's elements negated (Tensor.is_neg()), which DLPack does not tell. To
// ask torch takes longer than all else that is done for a tensor, and lets go of the GIL. The bit
// is in the last word of torch's object, behind the sizes that it holds of up to five dimensions;
// where exactly is found out from tensors with and without it.
class NegativeBit {
 public:
  static constexpr int kMostDims = 5;

  static const NegativeBit& instance() {
    // torch lets go of the GIL in between, for which a second thread must not wait holding it: it
    // finds the same once more.
    static std::atomic<const NegativeBit*> found{nullptr};
    const NegativeBit* known = found.load(std::memory_order_acquire);
    if (known == nullptr) {
      auto own = std::make_unique<const NegativeBit>(find());
      if (found.compare_exchange_strong(known, own.get())) known = own.release();
    }
    return *known;
  }

  bool is_known() const { return mask_ != 0; }
  // Of a tensor of kMostDims dimensions at most.
  bool is_set(const DLTensor& tensor) const { return (word(tensor, index_) & mask_) != 0; }

 private:
  // Words from the sizes on: five sizes and five strides come first, the object ends after the
  // last.
  static constexpr int kFirst = 10, kEnd = 14;

  static uint64_t word(const DLTensor& tensor, int index) {
    uint64_t value;
    std::memcpy(&value, reinterpret_cast<const char*>(tensor.shape) + 8 * index, sizeof(value));
    return value;
  }

  // Not known unless a single bit tells negated tensors from others. Some bits of torch's object
  // are never written and have what was in that memory before: all tensors live on, each in memory
  // of its own, and more are made until chance is ruled out.
  static NegativeBit find() {
    constexpr int kRounds = 8;
    std::array<uint64_t, kEnd> masks;
    masks.fill(~uint64_t{0});
    const Object torch = import("torch");
    const Object ones = torch.attribute("ones"), negate_view = torch.attribute("_neg_view");
    const auto negate = [&](const Object& tensor) {
      return Object::owned(PyObject_CallFunctionObjArgs(negate_view.get(), tensor.get(), nullptr));
    };
    std::vector<Object> alive;
    const auto narrow = [&](const Object& tensor, bool is_negated) {
      alive.push_back(tensor);
      const auto seen = look(tensor.get());
      if (!seen) return false;
      for (int i = kFirst; i < kEnd; ++i) {
        masks[i] &= is_negated ? word(*seen, i) : ~word(*seen, i);
      }
      return true;
    };
    NegativeBit found;
    for (int round = 0; round < kRounds && !found.is_known(); ++round) {
      for (const std::vector<int>& shape : {std::vector<int>{}, {3}, {0, 2}, {2, 3, 4, 5, 6}}) {
        for (const char* dtype : {"float32", "bfloat16", "uint8"}) {
          const Object sizes = to_python(std::tuple{to_python(shape)});
          const Object options = Object::owned(PyDict_New());
          checked(PyDict_SetItemString(options.get(), "dtype", torch.attribute(dtype).get()));
          const Object plain = Object::owned(PyObject_Call(ones.get(), sizes.get(), options.get()));
          const Object negated = negate(plain);
          if (!narrow(plain, false) || !narrow(negated, true) || !narrow(negate(negated), false)) {
            return {};
          }
        }
      }
      found = the_only_bit(masks);
    }
    return found;
  }

  // Not known where there is none, or more than one.
  static NegativeBit the_only_bit(const std::array<uint64_t, kEnd>& masks) {
    NegativeBit found;
    for (int i = kFirst; i < kEnd; ++i) {
      if (masks[i] == 0) continue;
      if (found.is_known() || (masks[i] & (masks[i] - 1)) != 0) return {};
      found.index_ = i;
      found.mask_ = masks[i];
    }
    return found;
  }

  int index_ = 0;
  uint64_t mask_ = 0;
};

// torch's classes of tensors, and what these do not override.
inline const std::array<PyObject*, 4>& known_classes() {
  static const std::array<PyObject*, 4> known = [] {
    const Object torch = import("torch"), type = torch.attribute("Tensor");
    const Object parameter = torch.attribute("nn").attribute("Parameter");
    return std::array{Object(type).release(), Object(parameter).release(),
                      type.attribute("__torch_dispatch__").release(),
                      parameter.attribute("__torch_function__").release()};
  }();
  return known;
}

// Whether no subclass at all is behind it.
inline bool is_of_torchs_class(PyObject* tensor) {
  const auto& known = known_classes();
  auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
  return type == known[0] || type == known[1];
}

// Whether it is a tensor that no subclass gives another meaning, nor lets Python code look on.
inline bool is_plain(PyObject* tensor) {
  if (is_of_torchs_class(tensor)) return true;
  const auto& known = known_classes();
  const Object type = Object::borrowed(reinterpret_cast<PyObject*>(Py_TYPE(tensor)));
  return checked(PyObject_IsInstance(tensor, known[0])) != 0 &&
         type.attribute("__torch_dispatch__").get() == known[2] &&
         type.attribute("__torch_function__").get() == known[3];
}

// Keeps a tensor's memory, also where the tensor is given other memory (p.data = ...).
inline Object storage_of(PyObject* tensor) {
  static PyObject* const method =
      import("torch").attribute("Tensor").attribute("untyped_storage").release();
  return Object::owned(PyObject_CallFunctionObjArgs(method, tensor, nullptr));
}

inline void* address(const DLTensor& tensor) {
  return static_cast<char*>(tensor.data) + tensor.byte_offset;
}

inline std::optional<ScalarKind> scalar_kind(DLDataType type) {
  if (type.lanes != 1) return std::nullopt;
  if (type.code == kDLFloat && type.bits == 32) return ScalarKind::float32;
  if (type.code == kDLFloat && type.bits == 64) return ScalarKind::float64;
  if (type.code == kDLFloat && type.bits == 16) return ScalarKind::float16;
  if (type.code == kDLBfloat && type.bits == 16) return ScalarKind::bfloat16;
  if (type.code == kDLUInt && type.bits == 8) return ScalarKind::codes;
  return std::nullopt;
}

inline int64_t numel_of(const DLTensor& tensor) {
  int64_t numel = 1;
  for (int d = 0; d < tensor.ndim; ++d) numel *= tensor.shape[d];
  return numel;
}

inline bool is_contiguous(const DLTensor& tensor) {
  int64_t expected = 1;
  for (int d = tensor.ndim - 1; d >= 0; --d) {
    if (tensor.shape[d] != 1 && tensor.strides && tensor.strides[d] != expected) return false;
    expected *= tensor.shape[d];
  }
  return true;
}

inline bool is_dense(const DLTensor& tensor) {
  return is_contiguous(tensor) || is_dense(tensor.ndim, tensor.shape, tensor.strides);
}

// Whether two tensors have their elements in the same places.
inline bool same_order(const DLTensor& a, const DLTensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int d = 0; d < a.ndim; ++d) {
    if (a.shape[d] != b.shape[d]) return false;
    if (a.shape[d] != 1 && a.strides && b.strides && a.strides[d] != b.strides[d]) return false;
  }
  return true;
}

inline bool operator==(const DLDevice& a, const DLDevice& b) {
  return a.device_type == b.device_type && a.device_id == b.device_id;
}

inline bool operator==(const DLDataType& a, const DLDataType& b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

inline bool is_alike(const DLTensor& a, const DLTensor& b) {
  return a.device == b.device && a.dtype == b.dtype && same_order(a, b);
}

}  // namespace cl_optim

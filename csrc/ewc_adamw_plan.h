// Launch plans: the step for the same parameters and state again and again, without handing a
// tensor to an operator, which takes longer than updating a small one. Tensors are read through
// DLPack's C interface, some 40 ns each.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
// torch's copy of a header of plain C, which it hides from users of the stable ABI.
#undef TORCH_TARGET_VERSION
#include <ATen/dlpack.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ewc_adamw_launch.h"

namespace cl_optim {

namespace py = pybind11;

inline const DLPackExchangeAPI& dlpack() {
  static const DLPackExchangeAPI* api = [] {
    const py::object tensor = py::module_::import("torch").attr("Tensor");
    const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
    const auto* found = static_cast<const DLPackExchangeAPI*>(
        PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (found == nullptr) throw py::error_already_set();
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

// Device, dtype, sizes and strides; not the strides of dimensions of one element.
class Layout {
 public:
  Layout() = default;
  explicit Layout(const DLTensor& tensor) {
    add(tensor.device.device_type);
    add(tensor.device.device_id);
    add(tensor.dtype.code << 16 | tensor.dtype.bits);
    add(tensor.ndim);
    for (int d = 0; d < tensor.ndim; ++d) {
      add(tensor.shape[d]);
      if (tensor.shape[d] != 1 && tensor.strides) add(tensor.strides[d]);
    }
  }

  bool operator==(const Layout& other) const { return hash_ == other.hash_; }

 private:
  // FNV-1a.
  void add(int64_t value) { hash_ = (hash_ ^ static_cast<uint64_t>(value)) * 0x100000001b3u; }

  uint64_t hash_ = 0xcbf29ce484222325u;
};

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

// Whether it fills its memory, in whatever order of dimensions.
inline bool is_dense(const DLTensor& tensor) {
  if (is_contiguous(tensor)) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (int d = 0; d < tensor.ndim; ++d) {
    if (tensor.shape[d] != 1) dims.emplace_back(tensor.strides[d], tensor.shape[d]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
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

// Whether a dict has these very keys and values, in this order.
inline bool same_items(const py::dict& dict, const std::vector<py::object>& items) {
  if (2 * static_cast<size_t>(PyDict_GET_SIZE(dict.ptr())) != items.size()) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (auto item = items.begin(); PyDict_Next(dict.ptr(), &position, &key, &value); item += 2) {
    if (key != item[0].ptr() || value != item[1].ptr()) return false;
  }
  return true;
}

inline std::vector<py::object> items_of(const py::dict& dict) {
  std::vector<py::object> items;
  for (const auto& [key, value] : dict) {
    items.push_back(py::reinterpret_borrow<py::object>(key));
    items.push_back(py::reinterpret_borrow<py::object>(value));
  }
  return items;
}

// A copy of an optimizer's state, one level deep: has a parameter been given other state?
class Snapshot {
 public:
  explicit Snapshot(const py::dict& dict) : items_(items_of(dict)) {}
  bool matches(const py::dict& dict) const { return same_items(dict, items_); }

 private:
  std::vector<py::object> items_;
};

// What runs a step on some device.
struct Launcher {
  size_t (*workspace)(const std::vector<EWCAdamWTensor>& tensors, bool sums);
  void (*run)(const std::vector<EWCAdamWTensor>& tensors, const EWCAdamWOptions& options,
              const DeviceNumbers& numbers, void* workspace, void* stream, int device);
};

// The step of some parameters of a group. It keeps their tensors, and is of use as long as these
// are the ones that have a gradient and their state holds the same tensors in the same memory:
// ready() looks.
template <const Launcher& launcher>
class Plan {
 public:
  // group: the parameters of the group; members: which of them take the step; skipped: which have
  // no gradient; states: the members' dicts.
  Plan(const py::list& group, std::vector<size_t> members, std::vector<size_t> skipped,
       const std::vector<py::dict>& states)
      : members_(std::move(members)), skipped_(std::move(skipped)) {
    for (const py::handle& param : group) {
      group_.push_back(py::reinterpret_borrow<py::object>(param));
    }
    for (size_t i = 0; i < members_.size(); ++i) {
      rows_.emplace_back();
      possible_ = possible_ && add(group_[members_[i]].ptr(), states[i], rows_.back());
    }
  }

  // Whether the tensors are laid out so that a plan can be made.
  bool possible() const { return possible_; }

  // Reads anew where parameters and gradients are. If false, nothing has changed, and the step must
  // be taken another way.
  bool ready(const py::list& group, bool amsgrad, const py::list& memories,
             const py::list& coefficients) {
    if (!possible_ || group.size() != group_.size()) return false;
    for (size_t i : skipped_) {
      if (!is_same(group, i) || gradient(i).ptr() != Py_None) return false;
    }
    tensors_.clear();
    for (size_t i = 0; i < members_.size(); ++i) {
      const Row& row = rows_[i];
      if (i + kAhead < members_.size()) prefetch(rows_[i + kAhead]);
      if (!is_same(group, members_[i]) || !is_current(row)) return false;
      const auto param = look(group_[members_[i]].ptr());
      const py::object grad_object = gradient(members_[i]);
      if (!param || !(Layout(*param) == row.layout) || grad_object.is_none()) return false;
      const auto grad = look(grad_object.ptr());
      if (!grad || !(Layout(*grad) == row.layout)) return false;
      EWCAdamWTensor tensor = row.tensor;
      tensor.param = address(*param);
      tensor.grad = address(*grad);
      if (tensor.numel != 0 && (!tensor.param || !tensor.grad)) return false;
      if (amsgrad && tensor.numel != 0 && !tensor.max_exp_avg_sq) return false;
      if (memories.size() != 0 && !add_rows(memories[i], coefficients[i], *param, tensor)) {
        return false;
      }
      tensors_.push_back(tensor);
    }
    return true;
  }

  size_t workspace(bool sums) const { return launcher.workspace(tensors_, sums); }

  // Takes the step that ready() has prepared. The addresses of device numbers may be 0.
  void run(uintptr_t workspace, uintptr_t lr_tensor, uintptr_t grad_scale, uintptr_t found_inf,
           uintptr_t sums, double lr, double beta1, double beta2, double eps, double weight_decay,
           double ewc_lambda, double damping, const std::string& penalty, bool amsgrad,
           bool maximize, bool stochastic) {
    const EWCAdamWOptions options{lr,           beta1,      beta2,     eps,
                                  weight_decay, ewc_lambda, damping,   parse_penalty(penalty),
                                  amsgrad,      maximize,   stochastic};
    const DeviceNumbers numbers{
        reinterpret_cast<const float*>(lr_tensor), reinterpret_cast<const float*>(grad_scale),
        reinterpret_cast<const float*>(found_inf), reinterpret_cast<PenaltySums*>(sums)};
    void* stream = nullptr;
    if (device_.device_type != kDLCPU &&
        dlpack().current_work_stream(device_.device_type, device_.device_id, &stream) != 0) {
      throw py::error_already_set();
    }
    const py::gil_scoped_release release;
    launcher.run(tensors_, options, numbers, reinterpret_cast<void*>(workspace), stream,
                 device_.device_id);
  }

 private:
  static constexpr size_t kAhead = 3;  // parameters

  // A tensor of a parameter's state. Its sizes lie within torch's object, where its address is.
  struct Place {
    PyObject* tensor;
    const void* address;
    const char* sizes;
  };

  // A parameter's state: its dict, what was in it, and where.
  struct Row {
    EWCAdamWTensor tensor{};
    Layout layout;
    py::dict state;
    std::vector<py::object> items;
    std::vector<Place> places;
  };

  bool is_same(const py::list& group, size_t i) const {
    return PyList_GET_ITEM(group.ptr(), i) == group_[i].ptr();
  }

  py::object gradient(size_t i) const {
    static PyObject* const name = PyUnicode_InternFromString("grad");
    PyObject* grad = PyObject_GetAttr(group_[i].ptr(), name);
    if (grad == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(grad);
  }

  static bool is_current(const Row& row) {
    if (!same_items(row.state, row.items)) return false;
    for (const Place& place : row.places) {
      const auto seen = look(place.tensor);
      if (!seen || address(*seen) != place.address) return false;
    }
    return true;
  }

  // After a model's forward and backward pass nothing of this is in the cache, and to find it out
  // takes longer than the step of a small parameter.
  static void prefetch(const Row& row) {
    for (const Place& place : row.places) {
      for (int line = -1; line <= 1; ++line) __builtin_prefetch(place.sizes + 64 * line);
    }
  }

  bool add(PyObject* object, const py::dict& state, Row& row) {
    row.state = state;
    row.items = items_of(state);
    const auto param = look(object);
    if (!param || !is_dense(*param)) return false;
    const auto kind = scalar_kind(param->dtype);
    if (!kind) return false;
    if (rows_.size() == 1) device_ = param->device;
    row.layout = Layout(*param);
    EWCAdamWTensor& t = row.tensor;
    t.numel = numel_of(*param);
    t.param_kind = *kind;
    ScalarKind step_kind{}, compensation_kind{};
    void *exp_avg{}, *exp_avg_sq{}, *max_exp_avg_sq{}, *importance{}, *anchor{}, *compensation{},
        *step{};
    const std::array<std::tuple<const char*, void**, ScalarKind*>, 7> arrays{{
        {"exp_avg", &exp_avg, &t.moment_kind},
        {"exp_avg_sq", &exp_avg_sq, &t.moment_kind},
        {"max_exp_avg_sq", &max_exp_avg_sq, &t.moment_kind},
        {"importance", &importance, &t.importance_kind},
        {"anchor", &anchor, &t.anchor_kind},
        {"compensation", &compensation, &compensation_kind},
        {"step", &step, &step_kind},
    }};
    for (const auto& [key, place, array_kind] : arrays) {
      if (!state.contains(key)) continue;
      const py::object tensor = state[key];
      const auto seen = look(tensor.ptr());
      if (!seen || seen->device.device_type != device_.device_type ||
          seen->device.device_id != device_.device_id) {
        return false;
      }
      const auto seen_kind = scalar_kind(seen->dtype);
      if (!seen_kind) return false;
      const bool placed = place == &step ? numel_of(*seen) == 1
                          : *seen_kind == ScalarKind::codes
                              ? is_contiguous(*seen) && is_contiguous(*param)
                              : same_order(*seen, *param);
      if (!placed) return false;
      *array_kind = *seen_kind;
      *place = address(*seen);
      row.places.push_back({tensor.ptr(), *place, reinterpret_cast<const char*>(seen->shape)});
    }
    t.exp_avg = exp_avg;
    t.exp_avg_sq = exp_avg_sq;
    t.max_exp_avg_sq = max_exp_avg_sq;
    t.importance = importance;
    t.anchor = anchor;
    t.compensation = static_cast<BFloat16*>(compensation);
    t.step = static_cast<float*>(step);
    return true;
  }

  // What GEM adds to the gradient: rows [t, ...] of the parameter's layout, float64 [t].
  static bool add_rows(const py::handle& rows, const py::handle& coefficients,
                       const DLTensor& param, EWCAdamWTensor& tensor) {
    const auto seen = look(rows.ptr()), numbers = look(coefficients.ptr());
    if (!seen || !numbers || seen->ndim != param.ndim + 1) return false;
    DLTensor row = *seen;
    row.ndim -= 1;
    row.shape += 1;
    row.strides += 1;
    const auto kind = scalar_kind(seen->dtype);
    if (!same_order(row, param) || !kind) return false;
    tensor.memory = {address(*seen), static_cast<const double*>(address(*numbers)),
                     seen->strides[0], static_cast<int>(seen->shape[0]), *kind};
    return true;
  }

  std::vector<py::object> group_;
  std::vector<size_t> members_;
  std::vector<size_t> skipped_;
  std::vector<Row> rows_;
  std::vector<EWCAdamWTensor> tensors_;
  DLDevice device_{};
  bool possible_ = true;
};

inline void bind_snapshot(py::module_& m) {
  py::class_<Snapshot>(m, "Snapshot", "What was in a dict.")
      .def(py::init<const py::dict&>(), py::arg("dict"))
      .def("matches", &Snapshot::matches, py::arg("dict"),
           "Whether it has these very keys and values, in this order.");
}

template <const Launcher& launcher>
void bind_plan(py::module_& m) {
  using P = Plan<launcher>;
  py::class_<P>(m, "Plan", py::module_local(), "A step that is taken again and again.")
      .def(py::init<const py::list&, std::vector<size_t>, std::vector<size_t>,
                    const std::vector<py::dict>&>(),
           py::arg("group"), py::arg("members"), py::arg("skipped"), py::arg("states"))
      .def_property_readonly("possible", &P::possible)
      .def("ready", &P::ready, py::arg("group"), py::arg("amsgrad"), py::arg("memories"),
           py::arg("coefficients"))
      .def("workspace", &P::workspace, py::arg("sums"))
      .def("run", &P::run, py::arg("workspace"), py::arg("lr_tensor"), py::arg("grad_scale"),
           py::arg("found_inf"), py::arg("sums"), py::kw_only(), py::arg("lr"), py::arg("beta1"),
           py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"), py::arg("ewc_lambda"),
           py::arg("damping"), py::arg("penalty"), py::arg("amsgrad"), py::arg("maximize"),
           py::arg("stochastic"));
}

}  // namespace cl_optim

// Launch plans: the step for the same parameters and state again and again, without handing a
// tensor to an operator, which takes longer than updating a small one. Between the look at the
// tensors and the step's end no other thread may free their memory: see take_step().
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "dlpack_tensors.h"
#include "ewc_adamw_launch.h"

namespace cl_optim {

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

// What one plan's part of a step takes besides.
struct Call {
  py::list group;  // all parameters of the group
  py::list memories;
  py::list coefficients;
  py::object workspace;  // a tensor or None, as the others
  py::object lr;
  py::object grad_scale;
  py::object found_inf;
  py::object sums;
  EWCAdamWOptions options;

  // Of a tuple in the order above, with a dict of options at its end.
  explicit Call(const py::tuple& call)
      : group(call[0]),
        memories(call[1]),
        coefficients(call[2]),
        workspace(call[3]),
        lr(call[4]),
        grad_scale(call[5]),
        found_inf(call[6]),
        sums(call[7]) {
    const py::dict given = call[8];
    options.for_each([&](const char* name, auto& option) {
      using T = std::decay_t<decltype(option)>;
      if constexpr (std::is_same_v<T, Penalty>) {
        option = parse_penalty(given[name].template cast<std::string>());
      } else {
        option = given[name].template cast<T>();
      }
    });
  }
};

// A part of a step, ready to be launched.
struct Prepared {
  std::vector<EWCAdamWTensor> tensors;
  DeviceNumbers numbers{};
  void* workspace = nullptr;
  // Of a long step the gradients and the storages of all tensors; else what gradients nobody holds.
  std::vector<py::object> kept;
};

// While it lives no garbage is collected: that would run other code amid what must not be
// disturbed.
class NoCollection {
 public:
  NoCollection() : was_enabled_(PyGC_Disable() != 0) {}
  ~NoCollection() {
    if (was_enabled_) PyGC_Enable();
  }
  NoCollection(const NoCollection&) = delete;
  NoCollection& operator=(const NoCollection&) = delete;

 private:
  bool was_enabled_;
};

// The step of some parameters of a group. It keeps their tensors, and is of use as long as these
// are the ones that have a gradient and their state holds the same tensors in the same memory:
// prepare() looks.
template <const Launcher& launcher>
class Plan {
 public:
  // group: the parameters of the group; members: which of them take the step; skipped: which have
  // no gradient; states: the members' dicts; is_protected: whether their importance, where they
  // have one, takes part; pull_only: whether nothing else does.
  Plan(const py::list& group, std::vector<size_t> members, std::vector<size_t> skipped,
       const std::vector<py::dict>& states, bool is_protected, bool pull_only)
      : is_protected_(is_protected),
        pull_only_(pull_only),
        members_(std::move(members)),
        skipped_(std::move(skipped)) {
    for (const py::handle& param : group) {
      group_.push_back(py::reinterpret_borrow<py::object>(param));
    }
    possible_ = negative_bit_.is_known();
    for (size_t i = 0; i < members_.size(); ++i) {
      rows_.emplace_back();
      possible_ = possible_ && add(group_[members_[i]].ptr(), states[i], rows_.back());
    }
  }

  // Whether the tensors are such that a plan can be made.
  bool possible() const { return possible_; }

  size_t workspace(bool sums) const {
    std::vector<EWCAdamWTensor> tensors;
    for (const Row& row : rows_) tensors.push_back(row.tensor);
    return launcher.workspace(tensors, sums);
  }

  int64_t numel() const { return numel_; }

  // Reads anew where everything is. If nothing is returned, nothing has changed, and the step must
  // be taken another way. Runs no Python code.
  std::optional<Prepared> prepare(const Call& call, bool keep_storages) const {
    const size_t rows = call.memories.size();
    if (!possible_ || call.group.size() != group_.size() || rows != call.coefficients.size() ||
        (rows != 0 && rows != members_.size())) {
      return std::nullopt;
    }
    for (size_t i : skipped_) {
      if (!is_same(call.group, i) || gradient(i).ptr() != Py_None) return std::nullopt;
    }
    Prepared prepared;
    prepared.tensors = std::move(spare_);
    prepared.tensors.clear();
    prepared.tensors.reserve(members_.size());
    for (size_t i = 0; i < members_.size(); ++i) {
      if (i + kAhead < members_.size()) prefetch(rows_[i + kAhead]);
      if (!is_same(call.group, members_[i]) || !prepare(i, call, keep_storages, prepared)) {
        return std::nullopt;
      }
    }
    const bool fits = place(call.lr, kFloat, 1, prepared.numbers.lr) &&
                      place(call.grad_scale, kFloat, 1, prepared.numbers.grad_scale) &&
                      place(call.found_inf, kFloat, 1, prepared.numbers.found_inf) &&
                      place(call.sums, kDouble, 2, prepared.numbers.sums);
    if (!fits) return std::nullopt;
    if (!call.workspace.is_none()) prepared.workspace = address(*look(call.workspace.ptr()));
    return prepared;
  }

  // Takes back the memory of what has been launched, which the next step needs again.
  void recycle(Prepared& prepared) const { spare_ = std::move(prepared.tensors); }

  void* stream() const {
    void* stream = nullptr;
    if (device_.device_type != kDLCPU &&
        dlpack().current_work_stream(device_.device_type, device_.device_id, &stream) != 0) {
      throw py::error_already_set();
    }
    return stream;
  }

  void launch(const Prepared& prepared, const EWCAdamWOptions& options, void* stream) const {
    if (prepared.tensors.empty()) return;
    launcher.run(prepared.tensors, options, prepared.numbers, prepared.workspace, stream,
                 device_.device_id);
  }

 private:
  static constexpr size_t kAhead = 3;  // parameters
  static constexpr DLDataType kFloat{kDLFloat, 32, 1}, kDouble{kDLFloat, 64, 1};

  enum class Form { like_param, codes, number };

  // A tensor of a parameter's state. Its sizes lie within torch's object, where its address is.
  struct Place {
    PyObject* tensor;
    const void* address;
    const char* sizes;
    DLDataType dtype;
    Form form;
  };

  // A parameter's state: its dict, what was in it, and where.
  struct Row {
    EWCAdamWTensor tensor{};
    DLDataType dtype;
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

  // A look at what a kernel can read as it lies.
  std::optional<DLTensor> plain_look(PyObject* tensor) const {
    if (!is_plain(tensor)) return std::nullopt;
    const auto seen = look(tensor);
    if (!seen || seen->ndim > NegativeBit::kMostDims || negative_bit_.is_set(*seen)) {
      return std::nullopt;
    }
    return seen;
  }

  bool prepare(size_t i, const Call& call, bool keep_storages, Prepared& prepared) const {
    const Row& row = rows_[i];
    PyObject* const param_object = group_[members_[i]].ptr();
    const auto param = plain_look(param_object);
    if (!param || !fits(*param, row) || !is_current(row, *param)) return false;
    const Penalty penalty = call.options.penalty;
    if (pull_only_ && penalty == Penalty::decoupled) return false;  // nobody knows what is beside
    const bool needs_grad = !pull_only_ || penalty == Penalty::gradient;
    EWCAdamWTensor tensor = row.tensor;
    tensor.param = address(*param);
    if (tensor.numel != 0 && !tensor.param) return false;
    py::object grad_object = py::none();
    if (needs_grad) {
      grad_object = gradient(members_[i]);
      if (grad_object.is_none()) return false;
      const auto grad = plain_look(grad_object.ptr());
      if (!grad || !is_alike(*grad, *param)) return false;
      void* const gradient = address(*grad);
      if (tensor.numel != 0 && !gradient) return false;
      tensor.grad = gradient;
      if (pull_only_) {  // into the gradient, beside the weight
        tensor.grad = tensor.param;
        tensor.param = gradient;
      }
    }
    if (call.options.stochastic && pull_only_ && !tensor.step) return false;
    if (call.options.amsgrad && tensor.numel != 0 && !tensor.max_exp_avg_sq) return false;
    const bool projected = call.memories.size() != 0;
    if (projected && !add_rows(call.memories[i], call.coefficients[i], *param, tensor)) {
      return false;
    }
    prepared.tensors.push_back(tensor);
    if (keep_storages) {
      prepared.kept.push_back(storage_of(param_object));
      if (needs_grad) prepared.kept.push_back(storage_of(grad_object.ptr()));
      for (const Place& place : row.places) prepared.kept.push_back(storage_of(place.tensor));
      if (projected) prepared.kept.push_back(storage_of(py::object(call.memories[i]).ptr()));
    }
    // A subclass may make a gradient whenever it is asked.
    if (keep_storages || !is_of_torchs_class(param_object))
      prepared.kept.push_back(std::move(grad_object));
    return true;
  }

  bool is_current(const Row& row, const DLTensor& param) const {
    if (!same_items(row.state, row.items)) return false;
    for (const Place& place : row.places) {
      const auto seen = look(place.tensor);
      if (!seen || address(*seen) != place.address || !(seen->dtype == place.dtype) ||
          !fits(*seen, place.form, param) || negative_bit_.is_set(*seen)) {
        return false;
      }
    }
    return true;
  }

  // A parameter. Its sizes and strides are those of its state, or of no matter beside codes.
  bool fits(const DLTensor& param, const Row& row) const {
    return param.device == device_ && param.dtype == row.dtype &&
           numel_of(param) == row.tensor.numel && is_dense(param);
  }

  bool fits(const DLTensor& seen, Form form, const DLTensor& param) const {
    if (!(seen.device == device_) || seen.ndim > NegativeBit::kMostDims) return false;
    switch (form) {
      case Form::number:
        return numel_of(seen) == 1;
      case Form::codes:
        return seen.ndim == 2 && are_blocks(seen.shape[0], seen.shape[1], numel_of(param)) &&
               is_contiguous(seen) && is_contiguous(param);
      default:
        return same_order(seen, param);
    }
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
    const auto param = plain_look(object);
    if (!param || !is_dense(*param)) return false;
    const auto kind = scalar_kind(param->dtype);
    if (!kind || *kind == ScalarKind::codes) return false;
    if (rows_.size() == 1) device_ = param->device;
    if (!(param->device == device_)) return false;
    row.dtype = param->dtype;
    EWCAdamWTensor& t = row.tensor;
    t.numel = numel_of(*param);
    t.param_kind = *kind;
    numel_ += t.numel;
    ScalarKind exp_avg_sq_kind{}, max_exp_avg_sq_kind{}, step_kind{}, compensation_kind{};
    void *exp_avg{}, *exp_avg_sq{}, *max_exp_avg_sq{}, *importance{}, *anchor{}, *compensation{},
        *step{};
    const std::array<std::tuple<const char*, void**, ScalarKind*>, 7> arrays{{
        {"exp_avg", &exp_avg, &t.moment_kind},
        {"exp_avg_sq", &exp_avg_sq, &exp_avg_sq_kind},
        {"max_exp_avg_sq", &max_exp_avg_sq, &max_exp_avg_sq_kind},
        {"importance", &importance, &t.importance_kind},
        {"anchor", &anchor, &t.anchor_kind},
        {"compensation", &compensation, &compensation_kind},
        {"step", &step, &step_kind},
    }};
    const auto has = [&](const char* key) {
      const bool protects = std::strcmp(key, "importance") == 0 || std::strcmp(key, "anchor") == 0;
      if (pull_only_ && !protects && std::strcmp(key, "step") != 0) return false;
      return state.contains(key) && (is_protected_ || !protects);
    };
    t.pull_only = pull_only_;
    t.moment_kind = *kind == ScalarKind::float64 ? *kind : ScalarKind::float32;
    for (const auto& [key, array, array_kind] : arrays) {
      if (!has(key)) continue;
      const py::object tensor = state[key];
      const auto seen = plain_look(tensor.ptr());
      if (!seen) return false;
      const auto seen_kind = scalar_kind(seen->dtype);
      if (!seen_kind) return false;
      const Form form = array == &step                    ? Form::number
                        : *seen_kind == ScalarKind::codes ? Form::codes
                                                          : Form::like_param;
      if (!fits(*seen, form, *param)) return false;
      *array_kind = *seen_kind;
      *array = address(*seen);
      row.places.push_back(
          {tensor.ptr(), *array, reinterpret_cast<const char*>(seen->shape), seen->dtype, form});
    }
    t.exp_avg = exp_avg;
    t.exp_avg_sq = exp_avg_sq;
    t.max_exp_avg_sq = max_exp_avg_sq;
    t.importance = importance;
    t.anchor = anchor;
    t.compensation = static_cast<BFloat16*>(compensation);
    t.step = static_cast<float*>(step);
    const bool steps = has("exp_avg") && has("exp_avg_sq") && has("step") &&
                       exp_avg_sq_kind == t.moment_kind && is_state_kind(t.moment_kind, *kind);
    return (pull_only_ ? has("importance") : steps) && has("importance") == has("anchor") &&
           (!has("step") || step_kind == ScalarKind::float32) &&
           (!has("max_exp_avg_sq") || max_exp_avg_sq_kind == t.moment_kind) &&
           (!has("importance") ||
            (is_state_kind(t.importance_kind, *kind) && is_anchor_kind(t.anchor_kind, *kind))) &&
           (!has("compensation") ||
            (compensation_kind == ScalarKind::bfloat16 && *kind == ScalarKind::bfloat16));
  }

  // What GEM adds to the gradient: rows [t, ...] of the parameter's layout, float64 [t].
  bool add_rows(const py::handle& rows, const py::handle& coefficients, const DLTensor& param,
                EWCAdamWTensor& tensor) const {
    const auto seen = plain_look(rows.ptr());
    if (!seen || !(seen->device == device_) || seen->ndim != param.ndim + 1) return false;
    DLTensor row = *seen;
    row.ndim -= 1;
    row.shape += 1;
    row.strides += 1;
    const auto kind = scalar_kind(seen->dtype);
    if (!same_order(row, param) || !kind || *kind == ScalarKind::codes) return false;
    if (*kind == ScalarKind::float64 && tensor.param_kind != ScalarKind::float64) return false;
    const double* numbers = nullptr;
    const auto numbers_seen = look(coefficients.ptr());
    if (!numbers_seen || numbers_seen->ndim != 1 ||
        !place(coefficients, kDouble, seen->shape[0], numbers)) {
      return false;
    }
    tensor.memory = {address(*seen), numbers, seen->strides[0], static_cast<int>(seen->shape[0]),
                     *kind};
    return true;
  }

  // Where so many numbers of a type begin; null for None.
  template <typename T>
  bool place(const py::handle& tensor, DLDataType dtype, int64_t count, T*& numbers) const {
    if (tensor.is_none()) return true;
    const auto seen = plain_look(tensor.ptr());
    if (!seen || !(seen->device == device_) || !(seen->dtype == dtype) ||
        numel_of(*seen) != count || !is_contiguous(*seen)) {
      return false;
    }
    numbers = static_cast<T*>(address(*seen));
    return true;
  }

  mutable std::vector<EWCAdamWTensor> spare_;
  const NegativeBit negative_bit_ = NegativeBit::instance();
  std::vector<py::object> group_;
  const bool is_protected_;
  const bool pull_only_;
  std::vector<size_t> members_;
  std::vector<size_t> skipped_;
  std::vector<Row> rows_;
  DLDevice device_{};
  int64_t numel_ = 0;
  bool possible_ = true;
};

// A step of fewer elements takes a few milliseconds at most, after which threads take turns anyway.
constexpr int64_t kLongStep = 1 << 20;

// Takes a step by all of the plans, if all of them may, and says whether they may. From the look at
// the tensors on nothing else runs until the kernels are done with them or a long step has taken
// hold of all storages: else a thread could free memory that is being written.
template <const Launcher& launcher>
bool take_step(const std::vector<const Plan<launcher>*>& plans, const py::list& arguments) {
  std::vector<Call> calls;
  for (const py::handle& call : arguments) calls.emplace_back(py::cast<py::tuple>(call));
  int64_t numel = 0;
  for (const auto* plan : plans) numel += plan->numel();
  const bool is_long = numel >= kLongStep;

  std::vector<Prepared> prepared;
  std::vector<void*> streams;
  {
    const NoCollection undisturbed;
    for (size_t i = 0; i < plans.size(); ++i) {
      auto ready = plans[i]->prepare(calls[i], is_long);
      if (!ready) return false;
      prepared.push_back(std::move(*ready));
      streams.push_back(plans[i]->stream());
    }
  }
  {
    std::optional<py::gil_scoped_release> release;
    if (is_long) release.emplace();
    for (size_t i = 0; i < plans.size(); ++i) {
      plans[i]->launch(prepared[i], calls[i].options, streams[i]);
    }
  }
  for (size_t i = 0; i < plans.size(); ++i) plans[i]->recycle(prepared[i]);
  return true;
}

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
                    const std::vector<py::dict>&, bool, bool>(),
           py::arg("group"), py::arg("members"), py::arg("skipped"), py::arg("states"),
           py::arg("is_protected"), py::arg("pull_only"))
      .def_property_readonly("possible", &P::possible)
      .def("workspace", &P::workspace, py::arg("sums"));
  m.def("take_step", &take_step<launcher>, py::arg("plans"), py::arg("calls"),
        "Take a step by all of the plans, each with a tuple of its group's parameters, memories, "
        "coefficients, workspace, lr, grad_scale, found_inf, sums, and a dict of hyperparameters; "
        "false where one of them cannot, and nothing has changed.");
}

}  // namespace cl_optim

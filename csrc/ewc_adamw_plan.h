// Launch plans: the step for the same parameters and state again and again, without handing a
// tensor to an operator, which takes longer than updating a small one. Between the look at the
// tensors and the step's end no other thread may free their memory: see take_step().
#pragma once

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
inline bool same_items(const Object& dict, const std::vector<Object>& items) {
  if (2 * static_cast<size_t>(PyDict_Size(dict.get())) != items.size()) return false;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  for (auto item = items.begin(); PyDict_Next(dict.get(), &position, &key, &value); item += 2) {
    if (key != item[0].get() || value != item[1].get()) return false;
  }
  return true;
}

inline std::vector<Object> items_of(const Object& dict) {
  std::vector<Object> items;
  PyObject *key, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(dict.get(), &position, &key, &value)) {
    items.push_back(Object::borrowed(key));
    items.push_back(Object::borrowed(value));
  }
  return items;
}

// A copy of an optimizer's state, one level deep: has a parameter been given other state?
class Snapshot {
 public:
  static Snapshot from(PyObject* args, PyObject* kwargs) {
    return Snapshot(dict_of(arguments<1>(args, kwargs, {"dict"})[0]));
  }
  bool matches(const Object& dict) const { return same_items(dict, items_); }

 private:
  explicit Snapshot(const Object& dict) : items_(items_of(dict)) {}

  std::vector<Object> items_;
};

// What runs a step on some device.
struct Launcher {
  size_t (*workspace)(const std::vector<EWCAdamWTensor>& tensors, bool sums);
  void (*run)(const std::vector<EWCAdamWTensor>& tensors, const EWCAdamWOptions& options,
              const DeviceNumbers& numbers, void* workspace, void* stream, int device);
};

// What one plan's part of a step takes besides.
struct Call {
  Object group;  // a list of all parameters of the group
  Object memories;
  Object coefficients;
  Object workspace;  // a tensor or None, as the others
  Object lr;
  Object grad_scale;
  Object found_inf;
  Object sums;
  EWCAdamWOptions options;

  // Of a tuple in the order above, with a dict of options at its end.
  explicit Call(PyObject* call) {
    Object* const parts[] = {&group, &memories,   &coefficients, &workspace,
                             &lr,    &grad_scale, &found_inf,    &sums};
    const Py_ssize_t count = std::size(parts);
    require(call, PyTuple_Check(call) && PyTuple_Size(call) == count + 1, "tuple of nine");
    for (Py_ssize_t i = 0; i < count; ++i) {
      *parts[i] = Object::borrowed(PyTuple_GetItem(call, i));
    }
    for (Object* list : {&group, &memories, &coefficients}) list_of(list->get());
    const Object given = dict_of(PyTuple_GetItem(call, count));
    options.for_each([&](const char* name, auto& option) {
      using T = std::decay_t<decltype(option)>;
      const Object value = Object::owned(PyMapping_GetItemString(given.get(), name));
      if constexpr (std::is_same_v<T, Penalty>) {
        option = parse_penalty(from_python<std::string>(value.get()));
      } else {
        option = from_python<T>(value.get());
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
  std::vector<Object> kept;
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

// While it lives, other threads run Python code.
class OthersRun {
 public:
  OthersRun() : state_(PyEval_SaveThread()) {}
  ~OthersRun() { PyEval_RestoreThread(state_); }
  OthersRun(const OthersRun&) = delete;
  OthersRun& operator=(const OthersRun&) = delete;

 private:
  PyThreadState* state_;
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
  static Plan from(PyObject* args, PyObject* kwargs) {
    const auto [group, members, skipped, states, is_protected, pull_only] = arguments<6>(
        args, kwargs, {"group", "members", "skipped", "states", "is_protected", "pull_only"});
    return Plan(from_python<std::vector<Object>>(group), from_python<std::vector<size_t>>(members),
                from_python<std::vector<size_t>>(skipped), from_python<std::vector<Object>>(states),
                from_python<bool>(is_protected), from_python<bool>(pull_only));
  }

  Plan(std::vector<Object> group, std::vector<size_t> members, std::vector<size_t> skipped,
       const std::vector<Object>& states, bool is_protected, bool pull_only)
      : group_(std::move(group)),
        is_protected_(is_protected),
        pull_only_(pull_only),
        members_(std::move(members)),
        skipped_(std::move(skipped)) {
    possible_ = negative_bit_.is_known();
    for (size_t i = 0; i < members_.size(); ++i) {
      rows_.emplace_back();
      const Object state = dict_of(states.at(i).get());
      possible_ = possible_ && add(group_.at(members_[i]).get(), state, rows_.back());
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
    const size_t rows = size_of(call.memories);
    if (!possible_ || size_of(call.group) != group_.size() || rows != size_of(call.coefficients) ||
        (rows != 0 && rows != members_.size())) {
      return std::nullopt;
    }
    for (size_t i : skipped_) {
      if (!is_same(call.group, i) || !gradient(i).is_none()) return std::nullopt;
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
    const bool fits = place(call.lr.get(), kFloat, 1, prepared.numbers.lr) &&
                      place(call.grad_scale.get(), kFloat, 1, prepared.numbers.grad_scale) &&
                      place(call.found_inf.get(), kFloat, 1, prepared.numbers.found_inf) &&
                      place(call.sums.get(), kDouble, 2, prepared.numbers.sums);
    if (!fits) return std::nullopt;
    if (!call.workspace.is_none()) prepared.workspace = address(*look(call.workspace.get()));
    return prepared;
  }

  // Takes back the memory of what has been launched, which the next step needs again.
  void recycle(Prepared& prepared) const { spare_ = std::move(prepared.tensors); }

  void* stream() const {
    void* stream = nullptr;
    if (device_.device_type != kDLCPU &&
        dlpack().current_work_stream(device_.device_type, device_.device_id, &stream) != 0) {
      throw PythonError();
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
    Object state;
    std::vector<Object> items;
    std::vector<Place> places;
  };

  static size_t size_of(const Object& list) { return checked(PyList_Size(list.get())); }

  bool is_same(const Object& group, size_t i) const {
    return item(group.get(), i) == group_[i].get();
  }

  Object gradient(size_t i) const {
    static PyObject* const name = PyUnicode_InternFromString("grad");
    return Object::owned(PyObject_GetAttr(group_[i].get(), name));
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
    PyObject* const param_object = group_[members_[i]].get();
    const auto param = plain_look(param_object);
    if (!param || !fits(*param, row) || !is_current(row, *param)) return false;
    const Penalty penalty = call.options.penalty;
    if (pull_only_ && penalty == Penalty::decoupled) return false;  // nobody knows what is beside
    const bool needs_grad = !pull_only_ || penalty == Penalty::gradient;
    EWCAdamWTensor tensor = row.tensor;
    tensor.param = address(*param);
    if (tensor.numel != 0 && !tensor.param) return false;
    Object grad_object = none();
    if (needs_grad) {
      grad_object = gradient(members_[i]);
      if (grad_object.is_none()) return false;
      const auto grad = plain_look(grad_object.get());
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
    const bool projected = size_of(call.memories) != 0;
    if (projected &&
        !add_rows(item(call.memories.get(), i), item(call.coefficients.get(), i), *param, tensor)) {
      return false;
    }
    prepared.tensors.push_back(tensor);
    if (keep_storages) {
      prepared.kept.push_back(storage_of(param_object));
      if (needs_grad) prepared.kept.push_back(storage_of(grad_object.get()));
      for (const Place& place : row.places) prepared.kept.push_back(storage_of(place.tensor));
      if (projected) prepared.kept.push_back(storage_of(item(call.memories.get(), i)));
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

  bool add(PyObject* object, const Object& state, Row& row) {
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
      return PyMapping_HasKeyString(state.get(), key) != 0 && (is_protected_ || !protects);
    };
    t.pull_only = pull_only_;
    t.moment_kind = *kind == ScalarKind::float64 ? *kind : ScalarKind::float32;
    for (const auto& [key, array, array_kind] : arrays) {
      if (!has(key)) continue;
      const Object tensor = Object::owned(PyMapping_GetItemString(state.get(), key));
      const auto seen = plain_look(tensor.get());
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
          {tensor.get(), *array, reinterpret_cast<const char*>(seen->shape), seen->dtype, form});
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
  bool add_rows(PyObject* rows, PyObject* coefficients, const DLTensor& param,
                EWCAdamWTensor& tensor) const {
    const auto seen = plain_look(rows);
    if (!seen || !(seen->device == device_) || seen->ndim != param.ndim + 1) return false;
    DLTensor row = *seen;
    row.ndim -= 1;
    row.shape += 1;
    row.strides += 1;
    const auto kind = scalar_kind(seen->dtype);
    if (!same_order(row, param) || !kind || *kind == ScalarKind::codes) return false;
    if (*kind == ScalarKind::float64 && tensor.param_kind != ScalarKind::float64) return false;
    const double* numbers = nullptr;
    const auto numbers_seen = look(coefficients);
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
  bool place(PyObject* tensor, DLDataType dtype, int64_t count, T*& numbers) const {
    if (tensor == Py_None) return true;
    const auto seen = plain_look(tensor);
    if (!seen || !(seen->device == device_) || !(seen->dtype == dtype) ||
        numel_of(*seen) != count || !is_contiguous(*seen)) {
      return false;
    }
    numbers = static_cast<T*>(address(*seen));
    return true;
  }

  mutable std::vector<EWCAdamWTensor> spare_;
  const NegativeBit negative_bit_ = NegativeBit::instance();
  std::vector<Object> group_;
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
bool take_step(const std::vector<const Plan<launcher>*>& plans, const std::vector<Call>& calls) {
  int64_t numel = 0;
  for (const auto* plan : plans) numel += plan->numel();
  const bool is_long = numel >= kLongStep;

  std::vector<Prepared> prepared;
  std::vector<void*> streams;
  {
    const NoCollection undisturbed;
    for (size_t i = 0; i < plans.size(); ++i) {
      auto ready = plans[i]->prepare(calls.at(i), is_long);
      if (!ready) return false;
      prepared.push_back(std::move(*ready));
      streams.push_back(plans[i]->stream());
    }
  }
  {
    std::optional<OthersRun> others;
    if (is_long) others.emplace();
    for (size_t i = 0; i < plans.size(); ++i) {
      plans[i]->launch(prepared[i], calls[i].options, streams[i]);
    }
  }
  for (size_t i = 0; i < plans.size(); ++i) plans[i]->recycle(prepared[i]);
  return true;
}

template <const Launcher& launcher>
PyObject* py_take_step(PyObject*, PyObject* args, PyObject* kwargs) {
  return guarded([&] {
    const auto [given_plans, given_calls] = arguments<2>(args, kwargs, {"plans", "calls"});
    std::vector<const Plan<launcher>*> plans;
    for (const Object& plan : from_python<std::vector<Object>>(given_plans)) {
      plans.push_back(&Class<Plan<launcher>>::of(plan.get()));
    }
    std::vector<Call> calls;
    for (const Object& call : from_python<std::vector<Object>>(given_calls)) {
      calls.emplace_back(call.get());
    }
    return take_step(plans, calls);
  });
}

inline void add_snapshot(PyObject* module) {
  static PyMethodDef methods[] = {method(
                                      "matches",
                                      [](PyObject* self, PyObject* args, PyObject* kwargs) {
                                        return guarded([&] {
                                          const Object dict =
                                              dict_of(arguments<1>(args, kwargs, {"dict"})[0]);
                                          return Class<Snapshot>::of(self).matches(dict);
                                        });
                                      },
                                      "Whether it has these very keys and values, in this order."),
                                  {}};
  Class<Snapshot>::add(module, "cl_optim._C.Snapshot", "What was in a dict.", methods);
}

template <const Launcher& launcher>
void add_plan(PyObject* module, const char* name) {
  using P = Plan<launcher>;
  static PyMethodDef methods[] = {
      method(
          "workspace",
          [](PyObject* self, PyObject* args, PyObject* kwargs) {
            return guarded([&] {
              const auto sums = from_python<bool>(arguments<1>(args, kwargs, {"sums"})[0]);
              return Class<P>::of(self).workspace(sums);
            });
          },
          "How many bytes a step needs for the time being."),
      {}};
  static PyGetSetDef properties[] = {
      {"possible",
       [](PyObject* self, void*) { return guarded([&] { return Class<P>::of(self).possible(); }); },
       nullptr, "Whether the tensors are such that a plan can be made.", nullptr},
      {}};
  static PyMethodDef functions[] = {
      method("take_step", py_take_step<launcher>,
             "Take a step by all of the plans, each with a tuple of its group's parameters, "
             "memories, coefficients, workspace, lr, grad_scale, found_inf, sums, and a dict of "
             "hyperparameters; false where one of them cannot, and nothing has changed."),
      {}};
  // Found while the module is imported: later, threads might wait for one another's GIL in it.
  dlpack();
  known_classes();
  Class<P>::add(module, name, "A step that is taken again and again.", methods, properties);
  checked(PyModule_AddFunctions(module, functions));
}

}  // namespace cl_optim

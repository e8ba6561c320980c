// Python by its limited C API, as much as the modules need: one binary serves every CPython from
// 3.10 on. What a function calls throws PythonError where Python has raised; no exception leaves
// guarded().
#pragma once

#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <memory>
#include <new>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace cl_optim {

// Python's error is set, and says what is wrong.
struct PythonError {};

// Of what returns -1 where Python has raised.
inline Py_ssize_t checked(Py_ssize_t result) {
  if (result == -1 && PyErr_Occurred() != nullptr) throw PythonError();
  return result;
}

// An object that is kept. Of a new reference it takes possession, of a borrowed one it makes one.
class Object {
 public:
  Object() = default;
  static Object owned(PyObject* object) {
    if (object == nullptr) throw PythonError();
    return Object(object);
  }
  static Object borrowed(PyObject* object) {
    if (object == nullptr) throw PythonError();
    Py_INCREF(object);
    return Object(object);
  }
  Object(const Object& other) : object_(other.object_) { Py_XINCREF(object_); }
  Object(Object&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Object& operator=(Object other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Object() { Py_XDECREF(object_); }

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }
  bool is_none() const { return object_ == Py_None; }
  Object attribute(const char* name) const { return owned(PyObject_GetAttrString(object_, name)); }

 private:
  explicit Object(PyObject* object) : object_(object) {}

  PyObject* object_ = nullptr;
};

inline Object import(const char* module) { return Object::owned(PyImport_ImportModule(module)); }

inline Object none() { return Object::borrowed(Py_None); }

// --- from Python
// ----------------------------------------------------------------------------------

// An item of a list, borrowed from it.
inline PyObject* item(PyObject* list, Py_ssize_t index) {
  PyObject* found = PyList_GetItem(list, index);
  if (found == nullptr) throw PythonError();
  return found;
}

inline PyObject* require(PyObject* object, bool is_of_type, const char* type) {
  if (!is_of_type) {
    PyErr_Format(PyExc_TypeError, "expected a %s", type);
    throw PythonError();
  }
  return object;
}

inline Object list_of(PyObject* object) {
  return Object::borrowed(require(object, PyList_Check(object), "list"));
}

inline Object dict_of(PyObject* object) {
  return Object::borrowed(require(object, PyDict_Check(object), "dict"));
}

template <typename T>
struct FromPython;

template <>
struct FromPython<bool> {
  static bool cast(PyObject* object) { return checked(PyObject_IsTrue(object)) != 0; }
};

template <>
struct FromPython<double> {
  static double cast(PyObject* object) {
    const double value = PyFloat_AsDouble(object);
    if (value == -1.0 && PyErr_Occurred() != nullptr) throw PythonError();
    return value;
  }
};

template <>
struct FromPython<int64_t> {
  static int64_t cast(PyObject* object) {
    const long long value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred() != nullptr) throw PythonError();
    return value;
  }
};

template <>
struct FromPython<size_t> {
  static size_t cast(PyObject* object) {
    const size_t value = PyLong_AsSize_t(object);
    if (value == static_cast<size_t>(-1) && PyErr_Occurred() != nullptr) throw PythonError();
    return value;
  }
};

template <>
struct FromPython<std::string> {
  static std::string cast(PyObject* object) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(object, &size);
    if (text == nullptr) throw PythonError();
    return {text, static_cast<size_t>(size)};
  }
};

template <>
struct FromPython<Object> {
  static Object cast(PyObject* object) { return Object::borrowed(object); }
};

template <typename T>
struct FromPython<std::vector<T>> {
  static std::vector<T> cast(PyObject* object) {
    const Object list = list_of(object);
    std::vector<T> values;
    const Py_ssize_t size = checked(PyList_Size(list.get()));
    for (Py_ssize_t i = 0; i < size; ++i) {
      values.push_back(FromPython<T>::cast(item(list.get(), i)));
    }
    return values;
  }
};

template <typename T>
T from_python(PyObject* object) {
  return FromPython<T>::cast(object);
}

// --- to Python
// ------------------------------------------------------------------------------------

inline Object to_python(bool value) { return Object::borrowed(value ? Py_True : Py_False); }
inline Object to_python(double value) { return Object::owned(PyFloat_FromDouble(value)); }
inline Object to_python(float value) { return to_python(double{value}); }
inline Object to_python(int value) { return Object::owned(PyLong_FromLong(value)); }
inline Object to_python(int64_t value) { return Object::owned(PyLong_FromLongLong(value)); }
inline Object to_python(size_t value) { return Object::owned(PyLong_FromSize_t(value)); }
inline Object to_python(const char* value) { return Object::owned(PyUnicode_FromString(value)); }
inline Object to_python(Object value) { return value; }

template <typename... Parts>
Object to_python(const std::tuple<Parts...>& values) {
  return std::apply(
      [](const auto&... parts) {
        return Object::owned(PyTuple_Pack(sizeof...(parts), to_python(parts).get()...));
      },
      values);
}

template <typename T>
Object to_python(const std::vector<T>& values) {
  Object list = Object::owned(PyList_New(0));
  for (const T& value : values) checked(PyList_Append(list.get(), to_python(value).get()));
  return list;
}

inline Object dict(std::initializer_list<std::pair<const char*, const char*>> items) {
  Object made = Object::owned(PyDict_New());
  for (const auto& [key, value] : items) {
    checked(PyDict_SetItemString(made.get(), key, to_python(value).get()));
  }
  return made;
}

// --- what Python calls
// ----------------------------------------------------------------------------

// Returns what body() does, and nothing, with an error set, where it throws.
template <typename F>
PyObject* guarded(F&& body) noexcept {
  try {
    return to_python(body()).release();
  } catch (const PythonError&) {
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// The arguments of a call, by place or name; all of them must be given.
template <size_t count>
std::array<PyObject*, count> arguments(PyObject* args, PyObject* kwargs,
                                       const std::array<const char*, count>& names = {}) {
  std::array<PyObject*, count> found{};
  const std::string format(count, 'O');
  std::array<const char*, count + 1> keywords{};
  std::copy(names.begin(), names.end(), keywords.begin());
  const bool fits = std::apply(
      [&](auto&... each) {
        return PyArg_ParseTupleAndKeywords(args, kwargs, format.c_str(),
                                           const_cast<char**>(keywords.data()), &each...) != 0;
      },
      found);
  if (!fits) throw PythonError();
  return found;
}

using Function = PyObject* (*)(PyObject* self, PyObject* args, PyObject* kwargs);

inline PyMethodDef method(const char* name, Function function, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
          METH_VARARGS | METH_KEYWORDS, doc};
}

// A class of Python whose objects hold a T each. make(args, kwargs) makes one.
template <typename T>
class Class {
 public:
  static void add(PyObject* module, const char* name, const char* doc, PyMethodDef* methods,
                  PyGetSetDef* properties = nullptr) {
    PyType_Slot slots[] = {
        {Py_tp_new, reinterpret_cast<void*>(make)},
        {Py_tp_dealloc, reinterpret_cast<void*>(forget)},
        {Py_tp_methods, methods},
        {Py_tp_doc, const_cast<char*>(doc)},
        {properties == nullptr ? 0 : Py_tp_getset, properties},
        {0, nullptr},
    };
    PyType_Spec spec{name, sizeof(Held), 0, Py_TPFLAGS_DEFAULT, slots};
    Object made = Object::owned(PyType_FromSpec(&spec));
    const char* short_name = std::strrchr(name, '.') + 1;
    type_ = reinterpret_cast<PyTypeObject*>(made.get());
    checked(PyModule_AddObjectRef(module, short_name, made.get()));
    made.release();  // lives as long as the process, as the module does
  }

  static T& of(PyObject* object) {
    if (!PyObject_TypeCheck(object, type_)) {
      PyErr_Format(PyExc_TypeError, "expected a %R", type_);
      throw PythonError();
    }
    return *reinterpret_cast<Held*>(object)->value;
  }

 private:
  struct Held {
    PyObject_HEAD T* value;
  };

  static PyObject* make(PyTypeObject* type, PyObject* args, PyObject* kwargs) {
    return guarded([&] {
      auto value = std::make_unique<T>(T::from(args, kwargs));
      const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
      Object object = Object::owned(allocate(type, 0));
      reinterpret_cast<Held*>(object.get())->value = value.release();
      return object;
    });
  }

  static void forget(PyObject* object) {
    PyTypeObject* const type = Py_TYPE(object);
    delete reinterpret_cast<Held*>(object)->value;
    reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
  }

  inline static PyTypeObject* type_ = nullptr;
};

// Makes a module, and lets fill(module) add to it.
template <typename F>
PyObject* make_module(PyModuleDef& definition, F&& fill) noexcept {
  return guarded([&] {
    Object module = Object::owned(PyModule_Create(&definition));
    fill(module.get());
    return module;
  });
}

}  // namespace cl_optim

// Calls with many arguments, each by its name: read from Python straight into a struct.
//
// pybind11's own keywords take some 90 ns each, more than a launch may cost. Here a table says which argument
// goes where; a caller that keeps to its order pays about 10 ns for each. CPython passes up to 28 names without
// a dictionary, so no table is longer.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <concepts>
#include <cstdint>
#include <exception>
#include <string>
#include <type_traits>
#include <utility>

#include "host/launches.hpp"

namespace deepep::bindings {

namespace py = pybind11;

/// An argument of a `Call`. preset: what stands for it in the signature if it may be left out; null: it may
/// not.
template <class Call>
struct Parameter {
  using CallType = Call;
  const char* name;
  void (*set)(Call& call, PyObject* value);
  const char* preset = nullptr;
};

template <std::integral T>
void read(T& into, PyObject* value) {
  static_assert(sizeof(long) == sizeof(int64_t));  // and its conversion takes half of long long's time
  const long wide = PyLong_AsLong(value);
  if (wide == -1 && PyErr_Occurred()) throw py::error_already_set();
  if constexpr (std::same_as<T, bool>) {
    into = wide != 0;
  } else {
    if (!std::in_range<T>(wide)) throw py::value_error("out of range: " + std::to_string(wide));
    into = static_cast<T>(wide);
  }
}
/// Its number.
template <class T>
  requires std::is_enum_v<T>
void read(T& into, PyObject* value) {
  std::underlying_type_t<T> number = 0;
  read(number, value);
  into = static_cast<T>(number);
}
/// An address; 0 is null.
template <class T>
void read(T*& into, PyObject* value) {
  uintptr_t address = 0;
  read(address, value);
  into = reinterpret_cast<T*>(address);
}
/// None is null.
inline void read(const host::RowCounts*& into, PyObject* value) {
  into = value == Py_None ? nullptr : py::cast<const host::RowCounts*>(py::handle(value));
}
inline void read(const kernels::ExpandedRows*& into, PyObject* value) {
  into = value == Py_None ? nullptr : py::cast<const kernels::ExpandedRows*>(py::handle(value));
}
/// A tuple of two.
inline void read(kernels::Strides& into, PyObject* value) {
  if (!PyTuple_Check(value) || PyTuple_GET_SIZE(value) != 2) throw py::type_error("allowed: a tuple of two");
  read(into.row, PyTuple_GET_ITEM(value, 0));
  read(into.column, PyTuple_GET_ITEM(value, 1));
}
/// Anything that has these three.
inline void read(host::Blocks& into, PyObject* value) {
  static PyObject* const kNames[] = {PyUnicode_InternFromString("total"), PyUnicode_InternFromString("remote"),
                                     PyUnicode_InternFromString("local")};
  int* const fields[] = {&into.total, &into.remote, &into.local};
  for (int i = 0; i < 3; ++i) {
    const auto field = py::reinterpret_steal<py::object>(PyObject_GetAttr(value, kNames[i]));
    if (!field) throw py::error_already_set();
    read(*fields[i], field.ptr());
  }
}

/// `Field` says where the argument goes: a lambda without captures, from the call to a reference.
template <class Call, class Field>
constexpr Parameter<Call> parameter(const char* name, Field, const char* preset = nullptr) {
  return {name, [](Call& call, PyObject* value) { read(Field{}(call), value); }, preset};
}

/// The method of `Target` that takes the arguments of the table `kParameters` by name, and calls `kRun` with
/// them.
template <class Target, const auto& kParameters, auto kRun>
class NamedMethod {
  using Call = typename std::decay_t<decltype(kParameters[0])>::CallType;
  static constexpr size_t kCount = std::size(kParameters);
  static_assert(kCount <= 28, "CPython makes a dictionary of more");

 public:
  /// `name` and `text` must outlive the module.
  static void add_to(py::class_<Target>& target, const char* name, const char* text) {
    std::string names;
    for (size_t i = 0; i < kCount; ++i) {
      keys_[i] = PyUnicode_InternFromString(kParameters[i].name);
      const char* preset = kParameters[i].preset;
      names += std::string(", ") + kParameters[i].name + (preset == nullptr ? "" : std::string("=") + preset);
    }
    text_ = std::string(name) + "($self, *" + names + ")\n--\n\n" + text;
    definition_.ml_name = name;
    definition_.ml_meth = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call));
    definition_.ml_flags = METH_FASTCALL | METH_KEYWORDS;
    definition_.ml_doc = text_.c_str();
    auto* type = reinterpret_cast<PyTypeObject*>(target.ptr());
    target.attr(name) = py::reinterpret_steal<py::object>(PyDescr_NewMethod(type, &definition_));
  }

 private:
  static PyObject* call(PyObject* self, PyObject* const* values, Py_ssize_t num_positional, PyObject* names) {
    try {
      if (num_positional != 0) throw py::type_error(named("takes arguments by name alone"));
      Call call;
      read_all(call, values, names);
      Target& target = py::cast<Target&>(py::handle(self));
      if constexpr (std::is_void_v<decltype((target.*kRun)(call))>) {
        (target.*kRun)(call);
        Py_RETURN_NONE;
      } else {
        return py::cast((target.*kRun)(call)).release().ptr();
      }
    } catch (...) {
      // Raised from within a function of pybind11's, it becomes what it would be there.
      const std::exception_ptr error = std::current_exception();
      return PyObject_CallNoArgs(py::cpp_function([error] { std::rethrow_exception(error); }).ptr());
    }
  }

  static void read_all(Call& call, PyObject* const* values, PyObject* names) {
    uint64_t given = 0;
    const auto count = names == nullptr ? 0 : static_cast<size_t>(PyTuple_GET_SIZE(names));
    size_t expected = 0;  // callers mostly keep to the order of the table
    for (size_t i = 0; i < count; ++i, ++expected) {
      PyObject* name = PyTuple_GET_ITEM(names, static_cast<Py_ssize_t>(i));
      if (expected >= kCount || keys_[expected] != name) expected = find(name);
      try {
        kParameters[expected].set(call, values[i]);
      } catch (py::error_already_set& error) {
        py::raise_from(error, error.type().ptr(), named(kParameters[expected].name).c_str());
        throw py::error_already_set();
      } catch (const py::builtin_exception& error) {
        throw py::value_error(named(kParameters[expected].name) + ": " + error.what());
      }
      given |= uint64_t{1} << expected;
    }
    for (size_t i = 0; i < kCount; ++i)
      if (kParameters[i].preset == nullptr && (given >> i & 1) == 0)
        throw py::type_error(named("lacks the argument ") + kParameters[i].name);
  }

  static size_t find(PyObject* name) {
    for (size_t i = 0; i < kCount; ++i)
      if (keys_[i] == name || PyUnicode_Compare(keys_[i], name) == 0) return i;
    throw py::type_error(named("takes no argument ") + py::cast<std::string>(py::handle(name)));
  }

  static std::string named(const char* what) { return std::string(definition_.ml_name) + ": " + what; }

  static inline std::array<PyObject*, kCount> keys_{};
  static inline std::string text_;
  static inline PyMethodDef definition_{};
};

}  // namespace deepep::bindings

// Uninitialised torch tensors of shapes that are known before, all made in one call: each of Python's calls for
// one takes 1.5 us of host time or more, and a view 2.
//
// Nothing of torch is linked, and none of its headers is read. What makes tensors is looked up by name in the
// libraries that this process has loaded: the C functions of torch's stable ABI (shim.h of
// torch/csrc/inductor/aoti_torch), and the function that gives a tensor its Python object, whose mangled name
// has its signature. A torch without one of them has no TensorSet, and says so; Python makes tensors then
// one by one.
#pragma once

#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace deepep::bindings {

namespace py = pybind11;

/// torch's functions. A tensor is a pointer there, to be deleted; functions that fail say so by a number.
struct TorchFunctions {
  int32_t (*empty_strided)(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                           int32_t device_type, int32_t device_index, void** made) = nullptr;
  int32_t (*reinterpret)(void* tensor, int64_t dims, const int64_t* sizes, const int64_t* strides,
                         int64_t offset, void** made) = nullptr;
  int32_t (*delete_tensor)(void* tensor) = nullptr;
  PyObject* (*wrap)(const void* tensor) = nullptr;
  void* library = nullptr;

  [[nodiscard]] bool are_there() const {
    return empty_strided != nullptr && reinterpret != nullptr && delete_tensor != nullptr && wrap != nullptr;
  }

  [[nodiscard]] static const TorchFunctions& get() {
    static const TorchFunctions found = look_up();
    return found;
  }

  /// The number of a dtype ("int32") or of a kind of device ("cuda").
  [[nodiscard]] int32_t number_of(const std::string& kind, const std::string& name) const {
    const auto function =
        reinterpret_cast<int32_t (*)()>(dlsym(library, ("aoti_torch_" + kind + "_" + name).c_str()));
    if (function == nullptr) throw std::invalid_argument(kind + ": torch knows no " + name);
    return function();
  }

 private:
  [[nodiscard]] static TorchFunctions look_up() {
    TorchFunctions found;
    found.library = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
    void* const python = dlopen("libtorch_python.so", RTLD_NOLOAD | RTLD_LAZY);
    if (found.library == nullptr || python == nullptr) return found;
    take(found.empty_strided, found.library, "aoti_torch_empty_strided");
    take(found.reinterpret, found.library, "aoti_torch__reinterpret_tensor");
    take(found.delete_tensor, found.library, "aoti_torch_delete_tensor_object");
    take(found.wrap, python, "_Z16THPVariable_WrapRKN2at10TensorBaseE");
    return found;
  }

  template <class Function>
  static void take(Function& into, void* library, const char* name) {
    into = reinterpret_cast<Function>(dlsym(library, name));
  }
};

/// Arrays, each in memory of its own, and views of them.
class TensorSet {
 public:
  /// otherwise: what makes such a tuple if torch's C functions make none.
  TensorSet(const std::string& device_type, int device_index, py::function otherwise)
      : torch_(TorchFunctions::get()), device_index_(device_index), otherwise_(std::move(otherwise)) {
    if (!torch_.are_there()) throw std::runtime_error("this torch makes no tensors by name");
    device_type_ = torch_.number_of("device_type", device_type);
  }

  void add_array(const std::string& dtype, std::vector<int64_t> sizes, std::vector<int64_t> strides) {
    check(sizes, strides);
    if (!views_.empty()) throw std::invalid_argument("arrays come before views");
    arrays_.push_back({{std::move(sizes), std::move(strides)}, torch_.number_of("dtype", dtype)});
  }

  /// Of array `of`, from an element on.
  void add_view(size_t of, std::vector<int64_t> sizes, std::vector<int64_t> strides, int64_t offset) {
    check(sizes, strides);
    if (of >= arrays_.size()) throw std::invalid_argument("a view of an array that is not there");
    views_.push_back({{std::move(sizes), std::move(strides)}, of, offset});
  }

  /// A tuple of the arrays, then the views, on the current stream.
  [[nodiscard]] py::object make() const {
    Handles made(torch_, arrays_.size() + views_.size());
    bool is_made = false;
    {
      const py::gil_scoped_release released;
      is_made = fill(made);
    }
    if (!is_made) return otherwise_();
    py::tuple tensors(made.size());
    for (size_t i = 0; i < made.size(); ++i) {
      PyObject* const tensor = torch_.wrap(made[i]);
      if (tensor == nullptr) throw py::error_already_set();
      PyTuple_SET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i), tensor);
    }
    return tensors;
  }

 private:
  struct Shape {
    std::vector<int64_t> sizes;
    std::vector<int64_t> strides;

    [[nodiscard]] int64_t dims() const { return static_cast<int64_t>(sizes.size()); }
  };
  struct Array {
    Shape shape;
    int32_t dtype;
  };
  struct View {
    Shape shape;
    size_t of;
    int64_t offset;
  };

  /// torch's pointers, deleted in the end.
  class Handles {
   public:
    Handles(const TorchFunctions& torch, size_t count) : torch_(torch), handles_(count, nullptr) {}
    ~Handles() {
      for (void* handle : handles_)
        if (handle != nullptr) torch_.delete_tensor(handle);
    }
    Handles(const Handles&) = delete;
    Handles& operator=(const Handles&) = delete;
    [[nodiscard]] void*& operator[](size_t i) { return handles_[i]; }
    [[nodiscard]] size_t size() const { return handles_.size(); }

   private:
    const TorchFunctions& torch_;
    std::vector<void*> handles_;
  };

  [[nodiscard]] bool fill(Handles& made) const {
    size_t i = 0;
    for (const auto& [shape, dtype] : arrays_)
      if (torch_.empty_strided(shape.dims(), shape.sizes.data(), shape.strides.data(), dtype, device_type_,
                               device_index_, &made[i++]) != 0)
        return false;
    for (const auto& [shape, of, offset] : views_)
      if (torch_.reinterpret(made[of], shape.dims(), shape.sizes.data(), shape.strides.data(), offset,
                             &made[i++]) != 0)
        return false;
    return true;
  }

  static void check(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
    if (sizes.size() != strides.size()) throw std::invalid_argument("a stride for each size");
  }

  const TorchFunctions& torch_;
  int32_t device_type_ = 0;
  int32_t device_index_;
  py::function otherwise_;
  std::vector<Array> arrays_;
  std::vector<View> views_;
};

inline void bind_tensor_set(py::module_& m) {
  using namespace py::literals;
  py::class_<TensorSet>(m, "TensorSet", py::module_local())
      .def_static("is_available", [] { return TorchFunctions::get().are_there(); })
      .def(py::init<const std::string&, int, py::function>(), "device_type"_a, "device_index"_a, "otherwise"_a)
      .def("add_array", &TensorSet::add_array, "dtype"_a, "sizes"_a, "strides"_a)
      .def("add_view", &TensorSet::add_view, "of"_a, "sizes"_a, "strides"_a, "offset"_a)
      .def("make", &TensorSet::make);
}

}  // namespace deepep::bindings

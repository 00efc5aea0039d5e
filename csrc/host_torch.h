// PyTorch as host.cpp sees it: tensors by C functions, what Python gives, work by elements, products, and `open`.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <malloc.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

// ---- PyTorch, by its C functions

using Handle = void*;  // at::Tensor*

struct Torch {
    int32_t (*get_dim)(Handle, int64_t*);
    int32_t (*get_sizes)(Handle, int64_t**);
    int32_t (*get_strides)(Handle, int64_t**);
    int32_t (*get_dtype)(Handle, int32_t*);
    int32_t (*get_device_type)(Handle, int32_t*);
    int32_t (*get_device_index)(Handle, int32_t*);
    int32_t (*get_data_ptr)(Handle, void**);
    int32_t (*empty_strided)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*);
    int32_t (*reinterpret)(Handle, int64_t, const int64_t*, const int64_t*, int64_t, Handle*);
    int32_t (*delete_object)(Handle);
    int32_t (*mm_out)(Handle, Handle, Handle);
    int32_t (*addmm_out)(Handle, Handle, Handle, Handle, double, double);
    PyObject* (*wrap)(Handle);    // THPVariable_Wrap(const at::TensorBase&)
    int (*get_num_threads)();     // at::get_num_threads
    PyTypeObject* types[2] = {nullptr, nullptr};  // the types whose operators no one else implements
    Py_ssize_t handle_at = 0;                     // of a Python tensor: its at::Tensor
    Py_ssize_t keys_at = 0;                       // of a TensorImpl: its dispatch keys
    uint64_t dense_keys = 0;                      // of a dense CPU tensor
    uint64_t inference_keys = 0;                  // the same of one made in inference mode
    int32_t float32 = 0, float64 = 0, int64 = 0, boolean = 0;
};
Torch torch;

struct NotServed {};

void check(int32_t error, const char* what) {
    if (error) throw std::runtime_error(std::string("PyTorch failed in ") + what + ", as it says above");
}

// A tensor with what is asked of it often. Either borrowed from Python or owned.
struct Tensor {
    Handle handle = nullptr;
    bool owned = false;
    int64_t dim = 0;
    const int64_t* sizes = nullptr;
    const int64_t* strides = nullptr;

    Tensor() = default;
    Tensor(Handle handle, bool owned) : handle(handle), owned(owned) {
        torch.get_dim(handle, &dim);
        int64_t *sizes_, *strides_;
        torch.get_sizes(handle, &sizes_);
        torch.get_strides(handle, &strides_);
        sizes = sizes_, strides = strides_;
    }
    Tensor(Tensor&& other) noexcept { *this = std::move(other); }
    Tensor& operator=(Tensor&& other) noexcept {
        std::swap(handle, other.handle), std::swap(owned, other.owned), std::swap(dim, other.dim);
        std::swap(sizes, other.sizes), std::swap(strides, other.strides);
        return *this;
    }
    Tensor(const Tensor&) = delete;
    ~Tensor() {
        if (owned) torch.delete_object(handle);
    }
    explicit operator bool() const { return handle != nullptr; }
    int32_t dtype() const {
        int32_t code;
        torch.get_dtype(handle, &code);
        return code;
    }
    template <typename T = void>
    T* data() const {
        void* address;
        torch.get_data_ptr(handle, &address);
        return static_cast<T*>(address);
    }
    Tensor view(int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride, int64_t offset = 0) const {
        const int64_t view_sizes[] = {rows, columns}, view_strides[] = {row_stride, column_stride};
        Handle made;
        check(torch.reinterpret(handle, 2, view_sizes, view_strides, offset, &made), "_reinterpret_tensor");
        return Tensor(made, true);
    }
    Tensor transposed() const { return view(sizes[1], sizes[0], strides[1], strides[0]); }
    Tensor columns(int64_t start, int64_t count) const {
        return view(sizes[0], count, strides[0], strides[1], start * strides[1]);
    }
    Tensor some_columns(int64_t start, int64_t count) const {
        return count == sizes[1] ? borrowed() : columns(start, count);
    }
    Tensor rows(int64_t start, int64_t count) const {
        return view(count, sizes[1], strides[0], strides[1], start * strides[0]);
    }
    Tensor alias() const { return view(sizes[0], sizes[1], strides[0], strides[1]); }
    Tensor borrowed() const { return Tensor(handle, false); }
};

// On the CPU, or on the device of `like`, where Python is to say what a failure is (torch.OutOfMemoryError)
Tensor empty(const int64_t* sizes, int64_t dim, int32_t dtype, Handle like = nullptr) {
    std::vector<int64_t> strides(dim, 1);
    for (int64_t at = dim - 1; at > 0; at--) strides[at - 1] = strides[at] * sizes[at];
    int32_t device = 0, index = -1;
    if (like) check(torch.get_device_type(like, &device) || torch.get_device_index(like, &index), "device");
    Handle made;
    const int32_t error = torch.empty_strided(dim, sizes, strides.data(), dtype, device, index, &made);
    if (error && like) throw NotServed();
    check(error, "empty_strided");
    return Tensor(made, true);
}

Tensor empty(int64_t rows, int64_t columns, int32_t dtype) {
    const int64_t sizes[] = {rows, columns};
    return empty(sizes, 2, dtype);
}

// out = alpha left right + beta onto
void product(const Tensor& out, const Tensor& left, const Tensor& right, double alpha, double beta,
             const Tensor& onto) {
    if (alpha == 1 && beta == 0)
        check(torch.mm_out(out.handle, left.handle, right.handle), "mm");
    else
        check(torch.addmm_out(out.handle, onto.handle, left.handle, right.handle, beta, alpha), "addmm");
}

void product(const Tensor& out, const Tensor& left, const Tensor& right, double alpha, double beta) {
    product(out, left, right, alpha, beta, out);
}

// ---- From Python's objects

uint64_t keys_of(Handle handle) {
    uint64_t keys;
    std::memcpy(&keys, *static_cast<char**>(handle) + torch.keys_at, sizeof keys);
    return keys;
}

Handle handle_of(PyObject* object) {
    if (Py_TYPE(object) != torch.types[0] && Py_TYPE(object) != torch.types[1]) throw NotServed();
    return reinterpret_cast<char*>(object) + torch.handle_at;
}

// The tensor of a Python object; none for None. Not served: what is no dense CPU tensor with its values as they are.
Tensor tensor_of(PyObject* object, int32_t dtype) {
    if (object == Py_None) return Tensor();
    Handle handle = handle_of(object);
    const uint64_t keys = keys_of(handle);
    if (keys != torch.dense_keys && keys != torch.inference_keys) throw NotServed();
    Tensor tensor(handle, false);
    if (tensor.dtype() != dtype) throw NotServed();
    for (int64_t at = 0; at < tensor.dim; at++)
        if (!tensor.sizes[at]) throw NotServed();
    return tensor;
}

Tensor matrix_of(PyObject* object, int32_t dtype) {
    Tensor tensor = tensor_of(object, dtype);
    if (!tensor || tensor.dim != 2) throw NotServed();
    return tensor;
}

// [..., columns] as [M, columns], where that is a view.
Tensor tokens(const Tensor& tensor) {
    if (!tensor || tensor.dim == 2) return tensor ? tensor.borrowed() : Tensor();
    if (tensor.dim < 2) throw NotServed();
    const int64_t last = tensor.dim - 1;
    int64_t rows = 1, stride = 0;
    for (int64_t at = last - 1; at >= 0; at--) {
        if (tensor.sizes[at] == 1) continue;
        if (rows == 1)
            stride = tensor.strides[at];
        else if (tensor.strides[at] != stride * rows)
            throw NotServed();
        rows *= tensor.sizes[at];
    }
    if (rows == 1) stride = tensor.sizes[last];
    return tensor.view(rows, tensor.sizes[last], stride, tensor.strides[last]);
}

// A matrix [M, columns] with x's leading dimensions
Tensor like_tokens(Tensor&& matrix, const Tensor& x) {
    if (x.dim == 2 || !matrix) return std::move(matrix);
    std::vector<int64_t> sizes(x.sizes, x.sizes + x.dim), strides(x.dim, matrix.strides[1]);
    sizes.back() = matrix.sizes[1];
    strides[x.dim - 2] = matrix.strides[0];
    for (int64_t at = x.dim - 2; at > 0; at--) strides[at - 1] = strides[at] * sizes[at];
    Handle made;
    check(torch.reinterpret(matrix.handle, x.dim, sizes.data(), strides.data(), 0, &made), "_reinterpret_tensor");
    return Tensor(made, true);
}

bool same_leading(const Tensor& one, const Tensor& other) {
    return one.dim == other.dim && std::equal(one.sizes, one.sizes + one.dim - 1, other.sizes);
}

int32_t dtype_of(PyObject* object) {
    const int32_t dtype = Tensor(handle_of(object), false).dtype();
    if (dtype != torch.float32 && dtype != torch.float64) throw NotServed();
    return dtype;
}

PyObject* to_python(Tensor&& tensor) {
    if (!tensor) Py_RETURN_NONE;
    return torch.wrap(tensor.handle);
}

PyObject* packed(std::vector<Tensor>& tensors) {
    PyObject* made = PyTuple_New(tensors.size());
    for (size_t at = 0; made && at < tensors.size(); at++) {
        PyObject* item = to_python(std::move(tensors[at]));
        if (!item) Py_CLEAR(made);
        if (made) PyTuple_SET_ITEM(made, at, item);
    }
    return made;
}

std::vector<int64_t> integers(PyObject* tuple) {
    std::vector<int64_t> found;
    for (Py_ssize_t at = 0; at < PyTuple_GET_SIZE(tuple); at++)
        found.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, at)));
    return found;
}

// What Python gets of `work`: None where it is not served
template <typename Work>
PyObject* served(Work work) {
    try {
        return work();
    } catch (const NotServed&) {
        Py_RETURN_NONE;
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
}

class WithoutGIL {
    PyThreadState* state = PyEval_SaveThread();

   public:
    ~WithoutGIL() { PyEval_RestoreThread(state); }
};

// ---- Element by element, for the M x r side of a layer

template <typename T>
void copy_matrix(const Tensor& to, const Tensor& from) {
    T* target = to.data<T>();
    const T* source = from.data<T>();
    for (int64_t row = 0; row < to.sizes[0]; row++) {
        T* out = target + row * to.strides[0];
        const T* in = source + row * from.strides[0];
        if (to.strides[1] == 1 && from.strides[1] == 1)
            std::memcpy(out, in, to.sizes[1] * sizeof(T));
        else
            for (int64_t column = 0; column < to.sizes[1]; column++)
                out[column * to.strides[1]] = in[column * from.strides[1]];
    }
}

// to += from, or to = c from
template <typename T>
void add_matrix(const Tensor& to, const Tensor& from, T keep, T c) {
    T* target = to.data<T>();
    const T* source = from.data<T>();
    for (int64_t row = 0; row < to.sizes[0]; row++)
        for (int64_t column = 0; column < to.sizes[1]; column++) {
            T* out = target + row * to.strides[0] + column * to.strides[1];
            const T added = c * source[row * from.strides[0] + column * from.strides[1]];
            *out = keep != 0 ? *out + added : added;
        }
}

void copy(const Tensor& to, const Tensor& from, int32_t dtype) {
    dtype == torch.float32 ? copy_matrix<float>(to, from) : copy_matrix<double>(to, from);
}

void set_to_multiple(const Tensor& to, const Tensor& from, double c, int32_t dtype) {
    dtype == torch.float32 ? add_matrix<float>(to, from, 0, c) : add_matrix<double>(to, from, 0, c);
}

void add_multiple(const Tensor& to, const Tensor& from, double c, int32_t dtype) {
    dtype == torch.float32 ? add_matrix<float>(to, from, 1, c) : add_matrix<double>(to, from, 1, c);
}

// ---- Products with stacks of matrices

constexpr int64_t OPERATOR = 1 << 12;  // values that are copied in the time that a product takes beside its arithmetic

struct Span {
    int64_t from, to;
};

// A stack of A [r, K] or of B [N, r]: `axis` is that of r, `size` is K or N. S [size, R] is all of it side by side.
struct Stack {
    std::vector<Tensor> parts;
    std::vector<int64_t> ends{0};
    int axis;
    int64_t size;
    int32_t dtype;

    Stack(PyObject* const* objects, int64_t count, int axis, int64_t size, int32_t dtype)
        : axis(axis), size(size), dtype(dtype) {
        parts.reserve(count), ends.reserve(count + 1);
        for (int64_t at = 0; at < count; at++) {
            parts.push_back(matrix_of(objects[at], dtype));
            if (parts.back().sizes[1 - axis] != size) throw NotServed();
            ends.push_back(ends.back() + parts.back().sizes[axis]);
        }
    }
    int64_t count() const { return parts.size(); }
    int64_t total() const { return ends.back(); }
    Span all() const { return {0, count()}; }
    int64_t rank(Span of) const { return ends[of.to] - ends[of.from]; }
    // Whether a product for each of them costs less than one for all, which takes copies of the matrices, or of their
    // gradients where autograd adds to them: each product more reads or writes M x size values once more.
    bool apart(Span of, int64_t m) const {
        return (of.to - of.from - 1) * (m * size + OPERATOR) <= rank(of) * size;
    }
    // Matrices in turn, each with the first of its columns of S and their number; or joined, as one
    template <typename Use>
    void each(Span of, int64_t m, Use use) const {
        const bool joins = !apart(of, m);
        Tensor whole;
        if (joins) whole = axis ? empty(size, rank(of), dtype) : empty(rank(of), size, dtype);
        for (int64_t at = of.from; at < of.to; at++) {
            const int64_t start = ends[at] - ends[of.from], length = ends[at + 1] - ends[at];
            if (joins)
                copy(axis ? whole.columns(start, length) : whole.rows(start, length), parts[at], dtype);
            else
                use(parts[at], start, length);
        }
        if (joins) use(whole, 0, rank(of));
    }
    // out = alpha left S + beta out, of some of the matrices: [M, size] to [M, R]
    void project(const Tensor& out, const Tensor& left, double alpha, double beta, Span of) const {
        each(of, left.sizes[0], [&](const Tensor& part, int64_t start, int64_t length) {
            const Tensor columns = out.some_columns(start, length);
            product(columns, left, axis ? part.borrowed() : part.transposed(), alpha, beta);
        });
    }
    // out = alpha left S^T + beta onto, of some of the matrices: [M, R] to [M, size]
    void expand(const Tensor& out, const Tensor& left, double alpha, double beta, const Tensor& onto, Span of) const {
        each(of, left.sizes[0], [&](const Tensor& part, int64_t start, int64_t length) {
            const Tensor columns = left.some_columns(start, length);
            product(out, columns, axis ? part.transposed() : part.borrowed(), alpha, start ? 1 : beta,
                    start ? out : onto);
        });
    }
};

// ---- Finding PyTorch

template <typename Function>
void find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (!function) throw std::runtime_error(std::string("this PyTorch has no ") + name);
}

void* opened(const char* path) {
    void* library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
    if (!library) throw std::runtime_error(std::string(path) + " is not loaded");
    return library;
}

// The only place in `size` bytes of every object at which it holds its word
Py_ssize_t place_of(const std::vector<char*>& objects, const std::vector<uint64_t>& words, Py_ssize_t size,
                    const char* what) {
    Py_ssize_t found = -1;
    for (Py_ssize_t at = 8; at + 8 <= size; at += 8) {
        bool everywhere = true;
        for (size_t each = 0; each < objects.size(); each++)
            everywhere = everywhere && !std::memcmp(objects[each] + at, &words[each], 8);
        if (everywhere && found >= 0) throw std::runtime_error(std::string("this PyTorch holds two of ") + what);
        if (everywhere) found = at;
    }
    if (found < 0) throw std::runtime_error(std::string("this PyTorch does not hold ") + what);
    return found;
}

// open(libtorch_cpu, libtorch_python, (Tensor, Parameter), samples, dtypes): samples are (tensor, capsule of its
// at::Tensor*, its dispatch keys), first a dense one, second one made in inference mode; RuntimeError says why not.
PyObject* open(PyObject*, PyObject* arguments) {
    const char *cpu, *python;
    PyObject *types[2], *samples;
    int float32, float64, int64, boolean;
    if (!PyArg_ParseTuple(arguments, "ss(OO)O!(iiii)", &cpu, &python, &types[0], &types[1], &PyTuple_Type, &samples,
                          &float32, &float64, &int64, &boolean))
        return nullptr;
    try {
        void *libtorch = opened(cpu), *bindings = opened(python);
        find(libtorch, "aoti_torch_get_dim", torch.get_dim), find(libtorch, "aoti_torch_get_sizes", torch.get_sizes);
        find(libtorch, "aoti_torch_get_strides", torch.get_strides);
        find(libtorch, "aoti_torch_get_dtype", torch.get_dtype);
        find(libtorch, "aoti_torch_get_device_type", torch.get_device_type);
        find(libtorch, "aoti_torch_get_device_index", torch.get_device_index);
        find(libtorch, "aoti_torch_get_data_ptr", torch.get_data_ptr);
        find(libtorch, "aoti_torch_empty_strided", torch.empty_strided);
        find(libtorch, "aoti_torch__reinterpret_tensor", torch.reinterpret);
        find(libtorch, "aoti_torch_delete_tensor_object", torch.delete_object);
        find(libtorch, "aoti_torch_cpu_mm_out", torch.mm_out);
        find(libtorch, "aoti_torch_cpu_addmm_out", torch.addmm_out);
        find(libtorch, "_ZN2at15get_num_threadsEv", torch.get_num_threads);
        find(bindings, "_Z16THPVariable_WrapRKN2at10TensorBaseE", torch.wrap);
        std::vector<char*> objects, tensors;
        std::vector<uint64_t> addresses, keys;
        size_t size = SIZE_MAX;
        for (Py_ssize_t at = 0; at < PyTuple_GET_SIZE(samples); at++) {
            PyObject *object, *capsule;
            unsigned long long bits;
            if (!PyArg_ParseTuple(PyTuple_GET_ITEM(samples, at), "OOK", &object, &capsule, &bits)) return nullptr;
            void* handle = PyCapsule_GetPointer(capsule, nullptr);
            if (!handle) return nullptr;
            char* tensor = *static_cast<char**>(handle);
            objects.push_back(reinterpret_cast<char*>(object)), tensors.push_back(tensor);
            addresses.push_back(reinterpret_cast<uint64_t>(tensor)), keys.push_back(bits);
            size = std::min(size, malloc_usable_size(tensor));
            torch.delete_object(handle);
        }
        torch.types[0] = reinterpret_cast<PyTypeObject*>(types[0]);
        torch.types[1] = reinterpret_cast<PyTypeObject*>(types[1]);
        Py_INCREF(types[0]), Py_INCREF(types[1]);
        torch.handle_at = place_of(objects, addresses, torch.types[0]->tp_basicsize, "a tensor in its Python object");
        torch.keys_at = place_of(tensors, keys, size, "dispatch keys in a tensor");
        torch.dense_keys = keys[0], torch.inference_keys = keys[1];
        torch.float32 = float32, torch.float64 = float64, torch.int64 = int64, torch.boolean = boolean;
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
    Py_RETURN_NONE;
}

}  // namespace

// Both passes of a layer on a CPU as one call each, and the dropout mask: the module _host, built by the C++ compiler alone.
//
// PyTorch does the arithmetic, through the C functions that it keeps stable for code compiled ahead of time
// (torch/csrc/inductor/aoti_torch/c_shim.h). They are found when the module is told to `open` libtorch, so that one build
// serves every PyTorch and no header of it is needed. What they cannot say is read from a tensor's own memory, at places
// that `open` looks for and checks. A call that is not served returns None, and changes nothing.

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <malloc.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the dropout mask is written for little-endian machines"
#endif

namespace {

// ---- PyTorch, by its C functions

using Handle = void*;  // at::Tensor*

struct Torch {
    int32_t (*get_dim)(Handle, int64_t*);
    int32_t (*get_sizes)(Handle, int64_t**);
    int32_t (*get_strides)(Handle, int64_t**);
    int32_t (*get_dtype)(Handle, int32_t*);
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
    Tensor rows(int64_t start, int64_t count) const {
        return view(count, sizes[1], strides[0], strides[1], start * strides[0]);
    }
    Tensor alias() const { return view(sizes[0], sizes[1], strides[0], strides[1]); }
    Tensor borrowed() const { return Tensor(handle, false); }
};

Tensor empty(const int64_t* sizes, int64_t dim, int32_t dtype) {
    std::vector<int64_t> strides(dim, 1);
    for (int64_t at = dim - 1; at > 0; at--) strides[at - 1] = strides[at] * sizes[at];
    Handle made;
    check(torch.empty_strided(dim, sizes, strides.data(), dtype, 0, -1, &made), "empty_strided");
    return Tensor(made, true);
}

Tensor empty(int64_t rows, int64_t columns, int32_t dtype) {
    const int64_t sizes[] = {rows, columns};
    return empty(sizes, 2, dtype);
}

// out = alpha left right + beta out
void product(const Tensor& out, const Tensor& left, const Tensor& right, double alpha, double beta) {
    if (alpha == 1 && beta == 0)
        check(torch.mm_out(out.handle, left.handle, right.handle), "mm");
    else
        check(torch.addmm_out(out.handle, out.handle, left.handle, right.handle, beta, alpha), "addmm");
}

// ---- From Python's objects

uint64_t keys_of(Handle handle) {
    uint64_t keys;
    std::memcpy(&keys, *static_cast<char**>(handle) + torch.keys_at, sizeof keys);
    return keys;
}

// The tensor of a Python object; none for None. Not served: whatever is no dense CPU tensor with its values as they are.
Tensor tensor_of(PyObject* object, int32_t dtype) {
    if (object == Py_None) return Tensor();
    if (Py_TYPE(object) != torch.types[0] && Py_TYPE(object) != torch.types[1]) throw NotServed();
    Handle handle = reinterpret_cast<char*>(object) + torch.handle_at;
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

bool same_leading(const Tensor& one, const Tensor& other) {
    return one.dim == other.dim && std::equal(one.sizes, one.sizes + one.dim - 1, other.sizes);
}

int32_t dtype_of(PyObject* object) {
    if (Py_TYPE(object) != torch.types[0] && Py_TYPE(object) != torch.types[1]) throw NotServed();
    const int32_t dtype = Tensor(reinterpret_cast<char*>(object) + torch.handle_at, false).dtype();
    if (dtype != torch.float32 && dtype != torch.float64) throw NotServed();
    return dtype;
}

PyObject* to_python(Tensor&& tensor) {
    if (!tensor) Py_RETURN_NONE;
    return torch.wrap(tensor.handle);
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

// ---- Dropout: the mask of reslora_kernels/dropout.py, bit for bit

constexpr int64_t LANES = 64, COLUMNS_PER_CALL = 8, BLOCK = LANES * COLUMNS_PER_CALL;

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
__attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#endif
void keep_block(uint32_t k0, uint32_t k1, int64_t row, uint32_t first, uint32_t least, uint8_t* kept) {
    uint32_t c0[LANES], c1[LANES], c2[LANES], c3[LANES];
    for (int lane = 0; lane < LANES; lane++) {
        c0[lane] = first + lane, c1[lane] = static_cast<uint32_t>(row);
        c2[lane] = static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32), c3[lane] = 0;
    }
    for (int round = 0; round < 7; round++) {
        for (int lane = 0; lane < LANES; lane++) {
            const uint64_t even = uint64_t{0xD2511F53} * c0[lane], odd = uint64_t{0xCD9E8D57} * c2[lane];
            c0[lane] = static_cast<uint32_t>(odd >> 32) ^ c1[lane] ^ k0, c1[lane] = static_cast<uint32_t>(odd);
            c2[lane] = static_cast<uint32_t>(even >> 32) ^ c3[lane] ^ k1, c3[lane] = static_cast<uint32_t>(even);
        }
        k0 += 0x9E3779B9, k1 += 0xBB67AE85;
    }
    uint32_t words[LANES * 4];
    uint16_t halves[BLOCK];
    for (int lane = 0; lane < LANES; lane++) {
        words[4 * lane] = c0[lane], words[4 * lane + 1] = c1[lane];
        words[4 * lane + 2] = c2[lane], words[4 * lane + 3] = c3[lane];
    }
    std::memcpy(halves, words, sizeof halves);
    for (int at = 0; at < BLOCK; at++) kept[at] = halves[at] >= least;
}

// work(first row, last row) over all rows, by as many threads as PyTorch has where the mask is large
template <typename Work>
void by_rows(int64_t rows, int64_t columns, Work work) {
    const int64_t useful = std::min(rows, rows * columns >> 18);
    const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(torch.get_num_threads(), useful));
    std::vector<std::thread> others;
    for (int64_t at = 1; at < threads; at++) {
        const int64_t first = rows * at / threads, last = rows * (at + 1) / threads;
        try {
            others.emplace_back([=] { work(first, last); });
        } catch (const std::system_error&) {  // no more threads on this machine
            work(first, last);
        }
    }
    work(0, rows / threads);
    for (std::thread& other : others) other.join();
}

// kept[columns], 1 where the element of the row is kept
void keep_row(uint64_t seed, int64_t row, int64_t columns, uint32_t least, uint8_t* kept) {
    uint8_t block[BLOCK];
    for (int64_t start = 0; start < columns; start += BLOCK) {
        keep_block(seed, seed >> 32, row, start / COLUMNS_PER_CALL, least, block);
        std::memcpy(kept + start, block, std::min(BLOCK, columns - start));
    }
}

struct Dropout {
    uint64_t seed = 0;
    double p = 0;

    explicit operator bool() const { return p > 0; }
    uint32_t least() const { return std::nearbyint(p * 65536); }

    // to = D(from), both [M, K]; to is contiguous and may be from
    template <typename T>
    void drop(const Tensor& to, const Tensor& from) const {
        const int64_t columns = from.sizes[1], step = from.strides[1], next = from.strides[0];
        T* const target = to.data<T>();
        const T* const source = from.data<T>();
        by_rows(from.sizes[0], columns, [=, *this](int64_t first, int64_t last) {
            const T scale = 1.0 / (1.0 - p);
            uint8_t kept[BLOCK];
            for (int64_t row = first; row < last; row++)
                for (int64_t start = 0; start < columns; start += BLOCK) {
                    const int64_t count = std::min(BLOCK, columns - start);
                    keep_block(seed, seed >> 32, row, start / COLUMNS_PER_CALL, least(), kept);
                    T* out = target + row * columns + start;
                    const T* in = source + row * next + start * step;
                    if (step == 1)
                        for (int64_t at = 0; at < count; at++) out[at] = kept[at] ? in[at] * scale : T(0);
                    else
                        for (int64_t at = 0; at < count; at++) out[at] = kept[at] ? in[at * step] * scale : T(0);
                }
        });
    }
    void apply(const Tensor& to, const Tensor& from, int32_t dtype) const {
        dtype == torch.float32 ? drop<float>(to, from) : drop<double>(to, from);
    }
};

// ---- The two passes. Names and equations are those of reslora_kernels/backends/torch.py

constexpr int64_t FEW_ROWS = 32;         // up to here dB is written as it is, beyond as its transpose
constexpr int64_t FEW_VALUES = 1 << 15;  // of y: up to here a copy of our own beats PyTorch's in many threads

// What a call is beside its tensors: (side = (c, scaling, hand_start, hand_stop), p, depth, ...), a tuple of Python's.
struct Call {
    double c, scaling, p;
    int64_t start, stop, depth;

    explicit Call(PyObject* call) {
        PyObject* side = PyTuple_GET_ITEM(call, 0);
        c = PyFloat_AsDouble(PyTuple_GET_ITEM(side, 0)), scaling = PyFloat_AsDouble(PyTuple_GET_ITEM(side, 1));
        start = PyLong_AsLongLong(PyTuple_GET_ITEM(side, 2)), stop = PyLong_AsLongLong(PyTuple_GET_ITEM(side, 3));
        p = PyFloat_AsDouble(PyTuple_GET_ITEM(call, 1)), depth = PyLong_AsLongLong(PyTuple_GET_ITEM(call, 2));
        if (PyErr_Occurred()) {
            PyErr_Clear();
            throw NotServed();
        }
    }
    bool hands_on() const { return stop > start; }
};

// A stack of A [r, K] or of B [N, r]; `axis` is that of r.
struct Stack {
    std::vector<Tensor> parts;
    std::vector<int64_t> ends{0};
    int axis;

    Stack(PyObject* const* objects, int64_t count, int axis, int64_t size, int32_t dtype) : axis(axis) {
        parts.reserve(count), ends.reserve(count + 1);
        for (int64_t at = 0; at < count; at++) {
            parts.push_back(matrix_of(objects[at], dtype));
            if (parts.back().sizes[1 - axis] != size) throw NotServed();
            ends.push_back(ends.back() + parts.back().sizes[axis]);
        }
    }
    int64_t count() const { return parts.size(); }
    int64_t total() const { return ends.back(); }
    // Parts [from, to) as one matrix
    Tensor joined(int64_t from, int64_t to, int32_t dtype) const {
        if (to - from == 1) return parts[from].borrowed();
        const int64_t height = ends[to] - ends[from], size = parts[from].sizes[1 - axis];
        Tensor whole = axis ? empty(size, height, dtype) : empty(height, size, dtype);
        for (int64_t at = from; at < to; at++) {
            const int64_t start = ends[at] - ends[from], length = ends[at + 1] - ends[at];
            copy(axis ? whole.columns(start, length) : whole.rows(start, length), parts[at], dtype);
        }
        return whole;
    }
    // How many of the matrices make u, of `own` columns, where the others are just what is handed on; else all.
    int64_t of_u(int64_t own, const Call& call) const {
        if (call.hands_on() && call.start == own && call.stop == total())
            for (int64_t at = 1; at < count(); at++)
                if (ends[at] == own) return at;
        return count();
    }
};

Dropout dropout_of(PyObject* seed, const Call& call) {
    Dropout dropout;
    if (seed == Py_None) return dropout;
    Tensor tensor = tensor_of(seed, torch.int64);
    for (int64_t at = 0; at < tensor.dim; at++)
        if (tensor.sizes[at] != 1) throw NotServed();
    if (!(call.p > 0 && call.p < 1)) throw NotServed();
    dropout.seed = *tensor.data<uint64_t>();
    dropout.p = call.p;
    return dropout;
}

struct Outputs {
    Tensor y, handed, u;
    bool shared = false;  // what is handed on is u itself
};

// u [M, R_b] and what is handed on [M, stop - start]
void project(const Tensor& x, const Stack& a, int64_t own, const Tensor& residual, const Call& call, int32_t dtype,
             Outputs& out) {
    const int64_t m = x.sizes[0], count = a.of_u(own, call);
    const bool apart = count < a.count();
    Tensor low = a.joined(0, count, dtype).transposed();
    if (apart) {
        out.handed = empty(m, call.stop - call.start, dtype);
        product(out.handed, x, a.joined(count, a.count(), dtype).transposed(), 1, 0);
    }
    if ((apart || !call.hands_on()) && low.sizes[1] == own) {
        out.u = empty(m, own, dtype);
        if (residual) copy(out.u, residual, dtype);
        product(out.u, x, low, call.c, residual ? 1 : 0);
        return;
    }
    Tensor h = empty(m, a.total(), dtype);
    product(h, x, low, 1, 0);
    const bool whole = call.start == 0 && call.stop == a.total();
    if (whole && own == a.total() && call.c == 1 && !residual) {
        out.u = std::move(h), out.shared = true;
        return;
    }
    out.u = empty(m, own, dtype);
    Tensor mine = h.columns(0, own);
    if (residual) {
        copy(out.u, residual, dtype);
        add_multiple(out.u, mine, call.c, dtype);
    } else
        set_to_multiple(out.u, mine, call.c, dtype);
    if (whole)
        out.handed = std::move(h);
    else if (call.hands_on()) {
        out.handed = empty(m, call.stop - call.start, dtype);
        copy(out.handed, h.columns(call.start, call.stop - call.start), dtype);
    }
}

// A matrix [M, columns] with x's leading dimensions
Tensor like_tokens(Tensor&& matrix, const Tensor& x) {
    if (x.dim == 2 || !matrix) return std::move(matrix);
    std::vector<int64_t> sizes(x.sizes, x.sizes + x.dim), strides(x.dim, 1);
    sizes.back() = matrix.sizes[1];
    for (int64_t at = x.dim - 1; at > 0; at--) strides[at - 1] = strides[at] * sizes[at];
    Handle made;
    check(torch.reinterpret(matrix.handle, x.dim, sizes.data(), strides.data(), 0, &made), "_reinterpret_tensor");
    return Tensor(made, true);
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

constexpr Py_ssize_t LEADING = 6;  // arguments of forward before the stacks

std::vector<Tensor> forward_pass(PyObject* const* arguments, Py_ssize_t count) {
    const int32_t dtype = dtype_of(arguments[0]);
    const Tensor given = tensor_of(arguments[0], dtype), weight = matrix_of(arguments[1], dtype);
    const Tensor bias = tensor_of(arguments[2], dtype), given_residual = tensor_of(arguments[3], dtype);
    const Call call(arguments[5]);
    if (given.dim < 2 || given.sizes[given.dim - 1] != weight.sizes[1]) throw NotServed();
    const int64_t n = weight.sizes[0], k = weight.sizes[1], b_count = count - LEADING - call.depth;
    if (call.depth < 0 || b_count < 1 || (bias && (bias.dim != 1 || bias.sizes[0] != n))) throw NotServed();
    const Stack a(arguments + LEADING, call.depth, 0, k, dtype);
    const Stack b(arguments + LEADING + call.depth, b_count, 1, n, dtype);
    const int64_t own = b.total();
    if (a.count() ? a.total() < own || call.start < 0 || call.stop > a.total() : !given_residual || call.hands_on())
        throw NotServed();
    if (given_residual && (!same_leading(given_residual, given) || given_residual.sizes[given.dim - 1] != own))
        throw NotServed();
    const Dropout dropout = dropout_of(arguments[4], call);
    const Tensor x = tokens(given), residual = tokens(given_residual);

    WithoutGIL released;
    const int64_t m = x.sizes[0];
    Outputs out;
    if (a.count()) {
        Tensor dropped;
        if (dropout) {
            dropped = empty(m, k, dtype);
            dropout.apply(dropped, x, dtype);
        }
        project(dropout ? dropped : x, a, own, residual, call, dtype, out);
    }
    const Tensor& u = a.count() ? out.u : residual;
    Tensor low_b = b.joined(0, b.count(), dtype).transposed();
    std::vector<int64_t> sizes(given.sizes, given.sizes + given.dim);
    sizes.back() = n;
    Tensor shaped = empty(sizes.data(), given.dim, dtype);
    const Tensor y = tokens(shaped);
    if (m * n <= FEW_VALUES) {  // in the order of `composed`, bit for bit
        if (bias) copy(y, bias.view(m, n, 0, bias.strides[0]), dtype);
        product(y, x, weight.transposed(), 1, bias ? 1 : 0);
        product(y, u, low_b, call.scaling, 1);
    } else {
        if (bias)
            check(torch.addmm_out(y.handle, bias.handle, u.handle, low_b.handle, 1, call.scaling), "addmm");
        else
            product(y, u, low_b, call.scaling, 0);
        product(y, x, weight.transposed(), 1, 1);
    }
    std::vector<Tensor> outputs;
    outputs.push_back(std::move(shaped));
    if (out.shared) out.handed = out.u.alias();
    outputs.push_back(like_tokens(std::move(out.handed), given));
    outputs.push_back(std::move(out.u));
    return outputs;
}

// dA of parts [from, to) of a stack: leftᵀ x times `factor`, one product for all of them
void gradients_of_a(const Stack& a, int64_t from, int64_t to, const Tensor& left, const Tensor& x, double factor,
                    int32_t dtype, std::vector<Tensor>& gradients) {
    Tensor whole = empty(a.ends[to] - a.ends[from], x.sizes[1], dtype);
    product(whole, left.transposed(), x, factor, 0);
    if (to - from == 1)
        gradients.push_back(std::move(whole));
    else
        for (int64_t at = from; at < to; at++)
            gradients.push_back(whole.rows(a.ends[at] - a.ends[from], a.ends[at + 1] - a.ends[at]));
}

// dB_j = s dyᵀ u_j, each in memory of its own
void gradients_of_b(const Stack& b, const Tensor& dy, const Tensor& u, double scaling, int32_t dtype,
                    std::vector<Tensor>& gradients) {
    const int64_t n = dy.sizes[1];
    const bool few = dy.sizes[0] <= FEW_ROWS;
    Tensor whole, left = dy.transposed();
    if (!few) {
        whole = empty(b.total(), n, dtype);
        product(whole, u.transposed(), dy, scaling, 0);
    }
    for (int64_t at = 0; at < b.count(); at++) {
        const int64_t start = b.ends[at], length = b.ends[at + 1] - start;
        Tensor gradient = empty(n, length, dtype);
        if (few)
            product(gradient, left, b.count() == 1 ? u.borrowed() : u.columns(start, length), scaling, 0);
        else
            copy(gradient, whole.rows(start, length).transposed(), dtype);
        gradients.push_back(std::move(gradient));
    }
}

// h's gradient in up to two parts, each of some matrices of A: factor * left
struct Part {
    int64_t from, to;
    Tensor left;
    double factor;
};

std::vector<Part> gradient_of_h(const Stack& a, const Tensor& du, const Tensor& dhanded, const Call& call,
                                int32_t dtype) {
    const int64_t own = du.sizes[1], count = a.of_u(own, call);
    std::vector<Part> parts;
    if (count < a.count()) {
        parts.push_back({0, count, du.borrowed(), call.c});
        if (dhanded) parts.push_back({count, a.count(), dhanded.borrowed(), 1});
    } else if (!dhanded && a.total() == own) {
        parts.push_back({0, count, du.borrowed(), call.c});
    } else {
        Tensor dh = empty(du.sizes[0], a.total(), dtype);
        std::memset(dh.data(), 0, dh.sizes[0] * dh.sizes[1] * (dtype == torch.float32 ? 4 : 8));
        set_to_multiple(dh.columns(0, own), du, call.c, dtype);
        if (dhanded) add_multiple(dh.columns(call.start, dhanded.sizes[1]), dhanded, 1, dtype);
        parts.push_back({0, count, std::move(dh), 1});
    }
    return parts;
}

constexpr Py_ssize_t LEADING_BACK = 8;  // arguments of backward before the stacks

std::vector<Tensor> backward_pass(PyObject* const* arguments, Py_ssize_t count) {
    const int32_t dtype = dtype_of(arguments[0]);
    const Tensor given = tensor_of(arguments[0], dtype), given_dhanded = tensor_of(arguments[1], dtype);
    const Call call(arguments[2]);
    bool needs[4];  // dx, da, db, dresidual
    for (int at = 0; at < 4; at++) needs[at] = PyTuple_GET_ITEM(arguments[3], at) == Py_True;
    const Tensor given_x = tensor_of(arguments[4], dtype), weight = matrix_of(arguments[5], dtype);
    const Tensor u = tensor_of(arguments[6], dtype);
    const int64_t n = weight.sizes[0], k = weight.sizes[1];
    const Stack a(arguments + LEADING_BACK, call.depth, 0, k, dtype);
    const Stack b(arguments + LEADING_BACK + call.depth, count - LEADING_BACK - call.depth, 1, n, dtype);
    if (given.dim < 2 || given.sizes[given.dim - 1] != n) throw NotServed();
    const Dropout dropout = dropout_of(arguments[7], call);
    const Tensor dy = tokens(given), dhanded = tokens(given_dhanded), x = tokens(given_x);

    WithoutGIL released;
    const int64_t m = dy.sizes[0], own = b.total();
    const bool through_a = a.count() && (needs[0] || needs[1]);
    std::vector<Tensor> gradients, of_b;
    Tensor dx, du;
    if (needs[2]) gradients_of_b(b, dy, u, call.scaling, dtype, of_b);
    if (needs[3] || through_a) {
        du = empty(m, own, dtype);
        product(du, dy, b.joined(0, b.count(), dtype), call.scaling, 0);
    }
    std::vector<Part> parts;
    if (through_a) parts = gradient_of_h(a, du, dhanded, call, dtype);
    if (needs[0]) {
        std::vector<int64_t> sizes(given.sizes, given.sizes + given.dim);
        sizes.back() = k;
        dx = empty(sizes.data(), given.dim, dtype);
        const Tensor flat = tokens(dx);
        for (const Part& part : parts)
            product(flat, part.left, a.joined(part.from, part.to, dtype), part.factor, part.from ? 1 : 0);
        if (dropout && !parts.empty()) dropout.apply(flat, flat, dtype);
        product(flat, dy, weight, 1, parts.empty() ? 0 : 1);
    }
    gradients.push_back(std::move(dx));
    gradients.emplace_back(), gradients.emplace_back();  // of weight and bias
    gradients.push_back(needs[3] ? like_tokens(du.alias(), given) : Tensor());
    gradients.emplace_back(), gradients.emplace_back();  // of seed and call
    if (needs[1] && a.count()) {
        Tensor dropped;
        if (dropout) {
            dropped = empty(m, k, dtype);
            dropout.apply(dropped, x, dtype);
        }
        for (const Part& part : parts)
            gradients_of_a(a, part.from, part.to, part.left, dropout ? dropped : x, part.factor, dtype, gradients);
    }
    gradients.resize(LEADING + a.count());
    for (Tensor& gradient : of_b) gradients.push_back(std::move(gradient));
    gradients.resize(LEADING + a.count() + b.count());
    return gradients;
}

// ---- What Python calls

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

PyObject* forward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    return served([&] {
        const char* asked = std::getenv("RESLORA_BACKEND");
        if (count <= LEADING || (asked && std::strcmp(asked, "auto") && std::strcmp(asked, "torch"))) throw NotServed();
        std::vector<Tensor> outputs = forward_pass(arguments, count);
        return packed(outputs);
    });
}

PyObject* backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    return served([&] {
        if (count <= LEADING_BACK) throw NotServed();
        std::vector<Tensor> gradients = backward_pass(arguments, count);
        return packed(gradients);
    });
}

PyObject* keep_mask(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
    return served([&]() -> PyObject* {
        if (count != 4) throw NotServed();
        const Tensor seed = tensor_of(arguments[0], torch.int64);
        if (!seed) throw NotServed();
        const int64_t rows = PyLong_AsLongLong(arguments[1]), columns = PyLong_AsLongLong(arguments[2]);
        const long long least = PyLong_AsLongLong(arguments[3]);
        if (PyErr_Occurred()) return nullptr;
        Tensor mask = empty(rows, columns, torch.boolean);
        {
            WithoutGIL released;
            const uint64_t key = *seed.data<uint64_t>();
            uint8_t* const kept = mask.data<uint8_t>();
            by_rows(rows, columns, [=](int64_t first, int64_t last) {
                for (int64_t row = first; row < last; row++) keep_row(key, row, columns, least, kept + row * columns);
            });
        }
        return to_python(std::move(mask));
    });
}

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

PyMethodDef methods[] = {
    {"open", open, METH_VARARGS, "Find libtorch; RuntimeError says what is missing."},
    {"forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(forward)), METH_FASTCALL,
     "(x, weight, bias, residual, seed, call, *a_stack, *b_stack) -> (y, handed, u), or None where not served."},
    {"backward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(backward)), METH_FASTCALL,
     "(dy, dhanded, call, needs, x, weight, u, seed, *a_stack, *b_stack) -> a gradient for each argument of forward."},
    {"keep_mask", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(keep_mask)), METH_FASTCALL,
     "(seed, rows, columns, least) -> bool [rows, columns], or None where not served."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_host", "Both passes of a layer on a CPU, one call each.", -1, methods,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__host() { return PyModule_Create(&definition); }

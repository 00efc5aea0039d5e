// Both passes of a layer on a CPU as one call each, the dropout mask, kinds of calls: the module _host, without nvcc.
//
// PyTorch does the arithmetic, through the C functions that it keeps stable for code compiled ahead of time
// (torch/csrc/inductor/aoti_torch/c_shim.h). They are found when the module is told to `open` libtorch, so that one
// build serves every PyTorch and no header of it is needed. What they cannot say is read from a tensor's own memory, at
// places that `open` looks for and checks. A call that is not served returns None, and changes nothing.

#include "host_dropout.h"
#include "host_torch.h"

namespace {

// ---- The two passes. Names and equations are those of reslora_kernels/backends/torch.py

constexpr int64_t FEW_ROWS = 32;         // up to here dB is written as it is, beyond as its transpose
constexpr int64_t FEW_VALUES = 1 << 15;  // of y: up to here a copy of our own beats PyTorch's in many threads
constexpr int64_t FEW_TO_READ = 1 << 18;  // of x: up to here another read of it beats copies of the M x r side

// What a call is beside its tensors, a tuple of Python's:
// (side = (c, scaling, hand_start, hand_stop), p, depth, widths, passes_x, height, ...).
struct Call {
    double c, scaling, p;
    int64_t start, stop, depth, height;
    std::vector<int64_t> widths;  // of the parts in which what is handed on is given to others that read x; or none
    bool passes_x;

    explicit Call(PyObject* call) {
        PyObject* side = PyTuple_GET_ITEM(call, 0);
        c = PyFloat_AsDouble(PyTuple_GET_ITEM(side, 0)), scaling = PyFloat_AsDouble(PyTuple_GET_ITEM(side, 1));
        start = PyLong_AsLongLong(PyTuple_GET_ITEM(side, 2)), stop = PyLong_AsLongLong(PyTuple_GET_ITEM(side, 3));
        p = PyFloat_AsDouble(PyTuple_GET_ITEM(call, 1)), depth = PyLong_AsLongLong(PyTuple_GET_ITEM(call, 2));
        PyObject* parts = PyTuple_GET_ITEM(call, 3);
        for (Py_ssize_t at = 0; at < PyTuple_GET_SIZE(parts); at++)
            widths.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(parts, at)));
        passes_x = PyTuple_GET_ITEM(call, 4) == Py_True, height = PyLong_AsLongLong(PyTuple_GET_ITEM(call, 5));
        if (PyErr_Occurred()) {
            PyErr_Clear();
            throw NotServed();
        }
        int64_t total = 0;
        for (const int64_t width : widths) total += width;
        if (!widths.empty() && total != stop - start) throw NotServed();
    }
    bool hands_on() const { return stop > start; }
};

// How many of the matrices of A make u, of `own` columns, where the others are just what is handed on, and a product of
// their own with x, of so many `values`, costs least; else all.
int64_t matrices_of_u(const Stack& a, int64_t own, const Call& call, int64_t values) {
    if (call.widths.empty() && values <= FEW_TO_READ && call.start == own && call.stop == a.total())
        for (int64_t at = 1; at < a.count(); at++)
            if (a.ends[at] == own) return at;
    return a.count();
}

struct Outputs {
    Tensor handed, u;  // each in memory of its own, but where what is handed on goes to others that read x
};

// u = c h[:, :own] + residual
Tensor u_of(const Tensor& h, int64_t own, const Tensor& residual, const Call& call, int32_t dtype) {
    Tensor u = empty(h.sizes[0], own, dtype);
    const Tensor mine = h.columns(0, own);
    if (residual) {
        copy(u, residual, dtype);
        add_multiple(u, mine, call.c, dtype);
    } else
        set_to_multiple(u, mine, call.c, dtype);
    return u;
}

// u [M, R_b] and what is handed on [M, stop - start]
Outputs project(const Tensor& x, const Stack& a, int64_t own, const Tensor& residual, const Call& call, int32_t dtype) {
    Outputs out;
    const int64_t m = x.sizes[0], count = matrices_of_u(a, own, call, m * x.sizes[1]), columns = call.stop - call.start;
    const bool apart = count < a.count();
    if (apart) {
        out.handed = empty(m, columns, dtype);
        a.project(out.handed, x, 1, 0, {count, a.count()});
    }
    if ((apart || !call.hands_on()) && a.ends[count] == own) {
        out.u = empty(m, own, dtype);
        if (residual) copy(out.u, residual, dtype);
        a.project(out.u, x, call.c, residual ? 1 : 0, {0, count});
        return out;
    }
    Tensor h = empty(m, a.total(), dtype);
    a.project(h, x, 1, 0, a.all());
    const bool lasts = !call.widths.empty() && !residual && call.c == 1;  // h, in what goes to others that read x
    out.u = lasts ? h.columns(0, own) : u_of(h, own, residual, call, dtype);
    if (columns == a.total())
        out.handed = std::move(h);
    else if (!call.widths.empty())
        out.handed = h.columns(call.start, columns);
    else if (call.hands_on()) {
        out.handed = empty(m, columns, dtype);
        copy(out.handed, h.columns(call.start, columns), dtype);
    }
    return out;
}

// The same where h is known: views of it as far as they can be
Outputs taken(const Tensor& h, int64_t own, const Tensor& residual, const Call& call, int32_t dtype) {
    Outputs out;
    out.u = residual || call.c != 1 ? u_of(h, own, residual, call, dtype) : h.columns(0, own);
    if (call.hands_on()) out.handed = h.columns(call.start, call.stop - call.start);
    return out;
}

constexpr Py_ssize_t LEADING = 7;  // arguments of forward before the stacks

std::vector<Tensor> forward_pass(PyObject* const* arguments, Py_ssize_t count) {
    const int32_t dtype = dtype_of(arguments[0]);
    const Tensor given = tensor_of(arguments[0], dtype), weight = matrix_of(arguments[1], dtype);
    const Tensor bias = tensor_of(arguments[2], dtype), given_residual = tensor_of(arguments[3], dtype);
    const Tensor given_h = tensor_of(arguments[4], dtype);
    const Call call(arguments[6]);
    if (given.dim < 2 || given.sizes[given.dim - 1] != weight.sizes[1]) throw NotServed();
    const int64_t n = weight.sizes[0], k = weight.sizes[1], b_count = count - LEADING - call.depth;
    if (call.depth < 0 || b_count < 1 || (bias && (bias.dim != 1 || bias.sizes[0] != n))) throw NotServed();
    const Stack a(arguments + LEADING, call.depth, 0, k, dtype);
    const Stack b(arguments + LEADING + call.depth, b_count, 1, n, dtype);
    const int64_t own = b.total();
    const int64_t height = given_h ? given_h.sizes[given_h.dim - 1] : a.total();
    if (a.count() ? bool(given_h) : !given_h && (!given_residual || call.hands_on())) throw NotServed();
    if ((a.count() || given_h) && (height < own || call.start < 0 || call.stop > height)) throw NotServed();
    if (given_residual && (!same_leading(given_residual, given) || given_residual.sizes[given.dim - 1] != own))
        throw NotServed();
    if (given_h && (!same_leading(given_h, given) || height != call.height)) throw NotServed();
    const Dropout dropout = dropout_of(arguments[5], call.p);
    const Tensor x = tokens(given), residual = tokens(given_residual), h = tokens(given_h);

    WithoutGIL released;
    const int64_t m = x.sizes[0];
    Outputs out;
    if (a.count()) {
        Tensor dropped;
        if (dropout) {
            dropped = empty(m, k, dtype);
            dropout.apply(dropped, x, dtype);
        }
        out = project(dropout ? dropped : x, a, own, residual, call, dtype);
    } else if (h)
        out = taken(h, own, residual, call, dtype);
    const Tensor& u = out.u ? out.u : residual;
    std::vector<int64_t> sizes(given.sizes, given.sizes + given.dim);
    sizes.back() = n;
    Tensor shaped = empty(sizes.data(), given.dim, dtype);
    const Tensor y = tokens(shaped);
    if (m * n <= FEW_VALUES) {  // in the order of `composed`, bit for bit
        if (bias) copy(y, bias.view(m, n, 0, bias.strides[0]), dtype);
        product(y, x, weight.transposed(), 1, bias ? 1 : 0);
        b.expand(y, u, call.scaling, 1, y, b.all());
    } else {
        b.expand(y, u, call.scaling, bias ? 1 : 0, bias ? bias : y, b.all());
        product(y, x, weight.transposed(), 1, 1);
    }
    std::vector<Tensor> outputs;
    outputs.push_back(std::move(shaped));
    int64_t start = 0;
    for (const int64_t width : call.widths) {
        outputs.push_back(like_tokens(out.handed.columns(start, width), given));
        start += width;
    }
    if (call.widths.empty()) outputs.push_back(like_tokens(std::move(out.handed), given));
    outputs.push_back(std::move(out.u));
    return outputs;
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
            product(gradient, left, u.some_columns(start, length), scaling, 0);
        else
            copy(gradient, whole.rows(start, length).transposed(), dtype);
        gradients.push_back(std::move(gradient));
    }
}

// What a gradient of h comes from beside du: gradients of what was handed on, each of some columns of h
struct Handed {
    int64_t start;
    Tensor gradient;
};

// dh = c pad(du) + the gradients of what was handed on, [M, height]
Tensor gradient_of_h(int64_t height, const Tensor& du, const std::vector<Handed>& handed, const Call& call,
                     int32_t dtype) {
    Tensor dh = empty(du.sizes[0], height, dtype);
    std::memset(dh.data(), 0, dh.sizes[0] * height * (dtype == torch.float32 ? 4 : 8));
    set_to_multiple(dh.columns(0, du.sizes[1]), du, call.c, dtype);
    for (const Handed& part : handed)
        add_multiple(dh.columns(part.start, part.gradient.sizes[1]), part.gradient, 1, dtype);
    return dh;
}

// It in up to two parts, each of some matrices of A: factor * left
struct Part {
    Span of;
    Tensor left;
    double factor;
};

std::vector<Part> parts_of_h(const Stack& a, const Tensor& du, const std::vector<Handed>& handed, const Call& call,
                             int64_t values, int32_t dtype) {
    const int64_t own = du.sizes[1], count = matrices_of_u(a, own, call, values);
    std::vector<Part> parts;
    if (count < a.count()) {
        parts.push_back({{0, count}, du.borrowed(), call.c});
        if (!handed.empty()) parts.push_back({{count, a.count()}, handed[0].gradient.borrowed(), 1});
    } else if (handed.empty() && a.total() == own)
        parts.push_back({a.all(), du.borrowed(), call.c});
    else
        parts.push_back({a.all(), gradient_of_h(a.total(), du, handed, call, dtype), 1});
    return parts;
}

// dA of the matrices of such a part: leftᵀ x times factor, or views of that of all of them
void gradients_of_a(const Stack& a, const Part& part, const Tensor& x, int32_t dtype, std::vector<Tensor>& gradients) {
    const bool apart = a.apart(part.of, x.sizes[0]);
    Tensor whole;
    if (!apart) {
        whole = empty(a.rank(part.of), a.size, dtype);
        product(whole, part.left.transposed(), x, part.factor, 0);
    }
    for (int64_t at = part.of.from; at < part.of.to; at++) {
        const int64_t start = a.ends[at] - a.ends[part.of.from], length = a.ends[at + 1] - a.ends[at];
        Tensor gradient = apart ? empty(length, a.size, dtype) : whole.rows(start, length);
        if (apart) product(gradient, part.left.some_columns(start, length).transposed(), x, part.factor, 0);
        gradients.push_back(std::move(gradient));
    }
}

bool is_matrix(const Tensor& tensor, int64_t rows, int64_t columns) {
    return tensor && tensor.dim == 2 && tensor.sizes[0] == rows && tensor.sizes[1] == columns;
}

constexpr Py_ssize_t LEADING_BACK = 9;  // arguments of backward before the stacks

std::vector<Handed> gradients_of_handed(PyObject* given, const Call& call, int64_t m, int32_t dtype) {
    std::vector<Handed> handed;
    const bool whole = call.widths.empty();
    if (PyTuple_GET_SIZE(given) > Py_ssize_t(whole ? 1 : call.widths.size())) throw NotServed();
    int64_t start = call.start;
    for (Py_ssize_t at = 0; at < PyTuple_GET_SIZE(given); at++) {
        const int64_t width = whole ? call.stop - call.start : call.widths[at];
        Tensor gradient = tokens(tensor_of(PyTuple_GET_ITEM(given, at), dtype));
        if (gradient && !is_matrix(gradient, m, width)) throw NotServed();
        if (gradient) handed.push_back({start, std::move(gradient)});
        start += width;
    }
    return handed;
}

std::vector<Tensor> backward_pass(PyObject* const* arguments, Py_ssize_t count) {
    const int32_t dtype = dtype_of(arguments[0]);
    const Tensor given = tensor_of(arguments[0], dtype), given_onto = tensor_of(arguments[2], dtype);
    const Call call(arguments[3]);
    bool needs[5];  // dx, da, db, dresidual, dh
    for (int at = 0; at < 5; at++) needs[at] = PyTuple_GET_ITEM(arguments[4], at) == Py_True;
    const Tensor given_x = tensor_of(arguments[5], dtype), weight = matrix_of(arguments[6], dtype);
    const Tensor u = tensor_of(arguments[7], dtype);
    const int64_t n = weight.sizes[0], k = weight.sizes[1];
    const Stack a(arguments + LEADING_BACK, call.depth, 0, k, dtype);
    const Stack b(arguments + LEADING_BACK + call.depth, count - LEADING_BACK - call.depth, 1, n, dtype);
    if (given.dim < 2 || given.sizes[given.dim - 1] != n) throw NotServed();
    const Dropout dropout = dropout_of(arguments[8], call.p);
    const Tensor dy = tokens(given), x = tokens(given_x), onto = tokens(given_onto);
    const int64_t m = dy.sizes[0], own = b.total();
    const std::vector<Handed> handed = gradients_of_handed(arguments[1], call, m, dtype);
    if ((needs[1] && a.count() && !is_matrix(x, m, k)) || (needs[2] && !is_matrix(u, m, own))) throw NotServed();
    if (onto && (dropout || !needs[0] || !is_matrix(onto, m, k))) throw NotServed();

    WithoutGIL released;
    const bool through_a = a.count() && (needs[0] || needs[1]);
    std::vector<Tensor> gradients, of_b;
    Tensor dx, du;
    if (needs[2]) gradients_of_b(b, dy, u, call.scaling, dtype, of_b);
    if (needs[3] || needs[4] || through_a) {
        du = empty(m, own, dtype);
        b.project(du, dy, call.scaling, 0, b.all());
    }
    std::vector<Part> parts;
    if (through_a) parts = parts_of_h(a, du, handed, call, m * k, dtype);
    if (needs[0]) {
        std::vector<int64_t> sizes(given.sizes, given.sizes + given.dim);
        sizes.back() = k;
        dx = onto ? given_onto.borrowed() : empty(sizes.data(), given.dim, dtype);
        const Tensor flat = tokens(dx);
        for (const Part& part : parts)
            a.expand(flat, part.left, part.factor, part.of.from || onto ? 1 : 0, flat, part.of);
        if (dropout && !parts.empty()) dropout.apply(flat, flat, dtype);
        product(flat, dy, weight, 1, parts.empty() && !onto ? 0 : 1);
    }
    gradients.push_back(std::move(dx));
    gradients.emplace_back(), gradients.emplace_back();  // of weight and bias
    gradients.push_back(needs[3] ? like_tokens(du.alias(), given) : Tensor());
    Tensor dh;
    if (needs[4])
        dh = handed.empty() && call.height == own && call.c == 1 ? du.alias()
                                                                 : gradient_of_h(call.height, du, handed, call, dtype);
    gradients.push_back(like_tokens(std::move(dh), given));
    gradients.emplace_back(), gradients.emplace_back();  // of seed and call
    if (needs[1] && a.count()) {
        Tensor dropped;
        if (dropout) {
            dropped = empty(m, k, dtype);
            dropout.apply(dropped, x, dtype);
        }
        for (const Part& part : parts) gradients_of_a(a, part, dropout ? dropped : x, dtype, gradients);
    }
    gradients.resize(LEADING + a.count());
    for (Tensor& gradient : of_b) gradients.push_back(std::move(gradient));
    gradients.resize(LEADING + a.count() + b.count());
    return gradients;
}

// ---- Kinds of calls, on any device: what backends/kinds.py keeps its prepared passes by

constexpr uint64_t ALIGNMENT = 16;  // as there

// All of the operands but their values and addresses, and these; whatever device they are on
PyObject* described(PyObject* const* operands, Py_ssize_t count) {
    std::vector<int64_t> words;
    std::vector<uint64_t> addresses;
    words.reserve(16 * count), addresses.reserve(count);
    uint64_t odd = 0;
    for (Py_ssize_t at = 0; at < count; at++) {
        if (operands[at] == Py_None) {
            words.push_back(-1), addresses.push_back(0);
            continue;
        }
        Handle handle = handle_of(operands[at]);
        int32_t dtype, device, index;
        int64_t dim, *sizes, *strides;
        void* address;
        if (torch.get_dtype(handle, &dtype) || torch.get_device_type(handle, &device) ||
            torch.get_device_index(handle, &index) || torch.get_dim(handle, &dim) ||
            torch.get_sizes(handle, &sizes) || torch.get_strides(handle, &strides) ||
            torch.get_data_ptr(handle, &address))
            throw NotServed();
        words.insert(words.end(), {dim, dtype, device, index});
        words.insert(words.end(), sizes, sizes + dim), words.insert(words.end(), strides, strides + dim);
        addresses.push_back(reinterpret_cast<uint64_t>(address)), odd |= addresses.back();
    }
    if (odd % ALIGNMENT)
        for (const uint64_t address : addresses) words.push_back(address % ALIGNMENT);
    PyObject* listed = PyList_New(count);
    for (Py_ssize_t at = 0; listed && at < count; at++) {
        PyObject* address = PyLong_FromUnsignedLongLong(addresses[at]);
        if (!address) Py_CLEAR(listed);
        if (listed) PyList_SET_ITEM(listed, at, address);
    }
    if (!listed) return nullptr;
    return Py_BuildValue("y#N", reinterpret_cast<char*>(words.data()), Py_ssize_t(words.size() * sizeof(int64_t)), listed);
}

// Tensors beside `like` of each of `forms`, (sizes, dtype) or None, without values. Their addresses are added to
// `addresses`; of the last one, where there are `offsets`, those of its parts.
PyObject* allocated(const Tensor& like, PyObject* forms, PyObject* offsets, PyObject* addresses) {
    std::vector<Tensor> made(PyTuple_GET_SIZE(forms));
    std::vector<uint64_t> found;
    for (size_t at = 0; at < made.size(); at++) {
        PyObject* form = PyTuple_GET_ITEM(forms, at);
        if (form != Py_None) {
            const std::vector<int64_t> sizes = integers(PyTuple_GET_ITEM(form, 0));
            made[at] = empty(sizes.data(), sizes.size(), PyLong_AsLong(PyTuple_GET_ITEM(form, 1)), like.handle);
        }
        found.push_back(made[at] ? reinterpret_cast<uint64_t>(made[at].data()) : 0);
    }
    const std::vector<int64_t> parts = integers(offsets);
    const uint64_t base = parts.empty() ? 0 : found.back();
    if (!parts.empty()) found.pop_back();
    for (const int64_t part : parts) found.push_back(base + part);
    for (const uint64_t address : found) {
        PyObject* number = PyLong_FromUnsignedLongLong(address);
        const bool failed = !number || PyList_Append(addresses, number);
        Py_XDECREF(number);
        if (failed) return nullptr;
    }
    return packed(made);
}

// ---- What Python calls

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

PyObject* kind_of(PyObject*, PyObject* const* operands, Py_ssize_t count) {
    return served([&] { return described(operands, count); });
}

PyObject* allocate(PyObject*, PyObject* const* given, Py_ssize_t count) {
    return served([&] {
        if (count != 4 || !PyTuple_Check(given[1]) || !PyTuple_Check(given[2]) || !PyList_Check(given[3]))
            throw NotServed();
        return allocated(Tensor(handle_of(given[0]), false), given[1], given[2], given[3]);
    });
}

PyMethodDef methods[] = {
    {"open", open, METH_VARARGS, "Find libtorch; RuntimeError says what is missing."},
    {"forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(forward)), METH_FASTCALL,
     "(x, weight, bias, residual, h, seed, call, *a_stack, *b_stack) -> (y, *handed, u), or None where not served."},
    {"backward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(backward)), METH_FASTCALL,
     "(dy, (dhanded, ...), onto, call, needs, x, weight, u, seed, *a_stack, *b_stack) -> gradients, as forward's."},
    {"kind_of", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(kind_of)), METH_FASTCALL,
     "(*tensors or None) -> (all but values and addresses, as bytes; [address, ...]), or None where not served."},
    {"allocate", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(allocate)), METH_FASTCALL,
     "(like, ((sizes, dtype) or None, ...), offsets in the last, addresses to add to) -> tensors, or None."},
    {"keep_mask", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(keep_mask)), METH_FASTCALL,
     "(seed, rows, columns, least) -> bool [rows, columns], or None where not served."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_host", "Both passes of a layer on a CPU, one call each.", -1,
                          methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__host() {
    PyObject* module = PyModule_Create(&definition);
    if (module && PyModule_AddIntConstant(module, "INTERFACE", 4)) Py_CLEAR(module);
    return module;
}

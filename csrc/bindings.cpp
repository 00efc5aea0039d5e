// What Python sees of the kernels. Everything is checked in backends/cuda.py, where there is a message for it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "pass.h"

namespace py = pybind11;
using namespace reslora;

namespace {

using Address = std::uintptr_t;

template <class Element>
Element* at(Address address) {
    return reinterpret_cast<Element*>(address);
}

Matrix matrix(Address data, std::int64_t row, std::int64_t column, std::int64_t rows, std::int64_t columns, int type) {
    return {at<const void>(data), row, column, rows, columns, static_cast<Type>(type), ELEMENTS};
}

Output output(Address data, std::int64_t columns, int type) {
    return {at<void>(data), columns, static_cast<Type>(type)};
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "The CUDA kernels of reslora_kernels, by address. Use reslora_kernels.backends.cuda.";
#ifdef RESLORA_EMULATED
    m.attr("EMULATED") = true;
#else
    m.attr("EMULATED") = false;
#endif
#ifdef RESLORA_HAS_SM90
    m.attr("HAS_SM90") = true;
#else
    m.attr("HAS_SM90") = false;
#endif
    py::class_<Matrix>(m, "Matrix").def(py::init(&matrix));
    py::class_<Output>(m, "Output").def(py::init(&output));
    py::class_<SideChannel>(m, "SideChannel")
        .def(py::init([](std::optional<Matrix> extra, std::int64_t extra_start, std::optional<Output> inner,
                         std::optional<Output> raw, std::int64_t raw_start, float factor, float raw_factor) {
                 return SideChannel{extra.value_or(Matrix{}), extra_start, inner.value_or(Output{}),
                                    raw.value_or(Output{}),   raw_start,   factor, raw_factor};
             }),
             py::kw_only(), py::arg("extra"), py::arg("extra_start"), py::arg("inner"), py::arg("raw"),
             py::arg("raw_start"), py::arg("factor"), py::arg("raw_factor"));
    py::class_<Sum>(m, "Sum").def(
        py::init([](Address partial, Output out, std::int64_t parts, std::int64_t size, float scale) {
            return Sum{at<const float>(partial), out, parts, size, scale};
        }));
    py::class_<Strips>(m, "Strips")
        .def(py::init([](Matrix stream, std::optional<Matrix> t, Output out, std::int64_t column, std::int64_t rank,
                         float scale) {
                 return Strips{stream, t.value_or(Matrix{}), out, column, rank, scale};
             }),
             py::kw_only(), py::arg("stream"), py::arg("t"), py::arg("out"), py::arg("column"), py::arg("rank"),
             py::arg("scale"));
    py::class_<OuterProduct>(m, "OuterProduct")
        .def(py::init([](std::optional<Matrix> t, std::optional<Matrix> stream, Address seed, std::uint32_t threshold,
                         Address keep, std::int64_t keep_bytes, std::int64_t rank, std::int64_t columns,
                         std::int64_t rows, Address partial, std::int64_t row, std::int64_t column) {
                 return OuterProduct{t.value_or(Matrix{}),
                                     stream.value_or(Matrix{}),
                                     {at<const std::int64_t>(seed), threshold},
                                     at<std::uint8_t>(keep), keep_bytes, rank, columns, rows,
                                     at<float>(partial), row, column};
             }),
             py::kw_only(), py::arg("t"), py::arg("stream"), py::arg("seed") = 0, py::arg("threshold") = 0,
             py::arg("keep") = 0, py::arg("keep_bytes") = 0, py::arg("rank"), py::arg("columns"), py::arg("rows"),
             py::arg("partial"), py::arg("row"), py::arg("column"));
    py::class_<Device>(m, "Device").def(py::init([](Address stream, int processors) {
        return Device{stream, processors};
    }));
    py::class_<Pass>(m, "Pass")
        .def(py::init<>())
        .def("begin", &Pass::begin)
        .def("end", [](const Pass&) { Pass::end(); })
        .def("settle", &Pass::settle)
        .def("__len__", &Pass::size)
        .def("run", [](const Pass& pass, Address stream, int processors, const Pass::Addresses& addresses) {
            pass.run({stream, processors}, addresses);
        });
    m.def(
        "project",
        [](int math, Device device, Matrix x, Matrix a, const SideChannel& side, Address seed, std::uint32_t threshold,
           Address partial, std::int64_t split, std::int64_t parts, bool hopper) {
            const Project p{x, a, {at<const std::int64_t>(seed), threshold}, side, at<float>(partial), split, parts};
            Pass::make(ProjectCall{p, static_cast<Math>(math), hopper}, device);
        },
        py::arg("math"), py::arg("device"), py::kw_only(), py::arg("x"), py::arg("a"), py::arg("side"), py::arg("seed"),
        py::arg("threshold"), py::arg("partial"), py::arg("split"), py::arg("parts"), py::arg("hopper") = false);
    m.def(
        "augmented_matmul",
        [](int math, Device device, bool large, Matrix x, Matrix w, std::optional<Matrix> t, Matrix b,
           std::optional<Matrix> a, std::optional<SideChannel> side, Address bias, Address keep,
           std::int64_t keep_words, float scale, Output y, std::optional<Sum> first, std::optional<Sum> second,
           Address partial, std::int64_t split, std::int64_t parts, Address scaled, std::optional<Strips> of_inputs,
           std::optional<Strips> of_made, int strip_blocks, int hopper) {
            const AugmentedMatmul p{x, w, t.value_or(Matrix{}), b, a.value_or(Matrix{}), side.value_or(SideChannel{}),
                                    at<const void>(bias), at<const std::uint32_t>(keep), keep_words, scale, y,
                                    {first.value_or(Sum{}), second.value_or(Sum{})},
                                    at<float>(partial), partial ? split : x.columns, parts, at<void>(scaled),
                                    {of_inputs.value_or(Strips{}), of_made.value_or(Strips{})}, strip_blocks};
            Pass::make(MatmulCall{p, static_cast<Math>(math), large, hopper}, device);
        },
        py::arg("math"), py::arg("device"), py::arg("large"), py::kw_only(), py::arg("x"), py::arg("w"),
        py::arg("t") = py::none(), py::arg("b"), py::arg("a") = py::none(), py::arg("side") = py::none(),
        py::arg("bias") = 0, py::arg("keep") = 0, py::arg("keep_words") = 0, py::arg("scale"), py::arg("y"),
        py::arg("first") = py::none(), py::arg("second") = py::none(), py::arg("partial") = 0, py::arg("split") = 0,
        py::arg("parts") = 1, py::arg("scaled") = 0, py::arg("of_inputs") = py::none(),
        py::arg("of_made") = py::none(), py::arg("strip_blocks") = 0, py::arg("hopper") = 0);
    m.def(
        "low_rank_grads",
        [](int math, Device device, std::optional<OuterProduct> da, std::optional<OuterProduct> db, std::int64_t split,
           std::int64_t parts) {
            const LowRankGrads p{{da.value_or(OuterProduct{}), db.value_or(OuterProduct{})}, split};
            Pass::make(GradsCall{p, static_cast<Math>(math), parts}, device);
        },
        py::arg("math"), py::arg("device"), py::kw_only(), py::arg("da"), py::arg("db"), py::arg("split"),
        py::arg("parts"));
    m.def(
        "finish",
        [](Device device, std::optional<Sum> first, std::optional<Sum> second) {
            Pass::make(FinishCall{first.value_or(Sum{}), second.value_or(Sum{})}, device);
        },
        py::arg("device"), py::arg("first"), py::arg("second"));
}

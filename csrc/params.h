// What the kernels are given: one plain struct for each, filled in bindings.cpp, copied to the device by value.
#pragma once
#include <cstdint>

namespace reslora {

enum Type : int { FLOAT32, FLOAT16, BFLOAT16, FLOAT64 };
enum Math : int { MATH_BFLOAT16, MATH_FLOAT16, MATH_TF32, MATH_IEEE };  // float32 products: TF32, or exact ones

// See pipeline_sm90.cuh: in two passes alone, in pairs one below the other, in turns; in one pass.
enum Hopper : int { COOPERATIVE = 1, COOPERATIVE_PAIR, PING_PONG, ONE_PASS };

enum Access : int { ELEMENTS, CONVERTED, COPIED };  // one at a time; float32 four at a time; 16 bytes as they are

// A matrix [rows, columns] to read. Strides count elements. No data: there is none.
struct Matrix {
    const void* data;
    std::int64_t row, column;
    std::int64_t rows, columns;
    Type type;
    Access access;  // along its columns
};

// A contiguous matrix to write.
struct Output {
    void* data;
    std::int64_t columns;
    Type type;
};

// out = scale * (partial[0] + partial[1] + ...) of ``size`` elements each, in that order.
struct Sum {
    const float* partial;
    Output out;
    std::int64_t parts, size;
    float scale;
};

// What becomes of a product p [M, R]: inner = factor p + extra in columns below inner.columns,
// raw = raw_factor p in columns [raw_start, raw_start + raw.columns). ``extra`` covers columns from extra_start on.
struct SideChannel {
    Matrix extra;
    std::int64_t extra_start;
    Output inner, raw;
    std::int64_t raw_start;
    float factor, raw_factor;
};

// A keep bit for every element: see elementwise.cuh. No seed: no dropout.
struct Dropout {
    const std::int64_t* seed;
    std::uint32_t threshold;
};

// p = D(x) aᵀ with x [M, K], a [R, K]; K in ``parts`` of ``split`` columns.
struct Project {
    Matrix x, a;
    Dropout dropout;
    SideChannel side;
    float* partial;  // [parts, M, R], or none: then there is one part
    std::int64_t split, parts;
};

// out[c, r] = scale * sum over rows m of stream[m, c] t[m, r], at c * column + r * rank.
struct Strips {
    Matrix stream, t;
    Output out;
    std::int64_t column, rank;
    float scale;
};

// y = x w + bias + keep * (scale t b) with x [M, K], w [K, N], t [M, R], b [R, N].
// With ``a`` [R_a, K] in place of t: t = side.inner of p = x aᵀ, made in the same pass. With ``partial`` the portable
// kernel takes K in ``parts`` of ``split`` columns; the launch behind it adds them in order.
struct AugmentedMatmul {
    Matrix x, w, t, b, a;
    SideChannel side;
    const void* bias;
    const std::uint32_t* keep;  // [M, keep_words], lowest bit first
    std::int64_t keep_words;
    float scale;
    Output y;
    Sum sums[2];
    float* partial;  // [parts, M, N], or none: then there is one part
    std::int64_t split, parts;
    void* scaled;  // in one pass by a Hopper kernel: room for scale t [M, R], R rounded up to 16, 32 or 64
    Strips strips[2];  // of the same launch by a Hopper kernel: of inputs, and with t as made here; on so many blocks
    int strip_blocks;
};

// partial[part, r, c] = sum over the rows m of a part of t[m, r] D(stream)[m, c]; each part has strides (row, column).
struct OuterProduct {
    Matrix t, stream;
    Dropout dropout;
    std::uint8_t* keep;  // [M, keep_bytes]: the bits of the dropout that is drawn here
    std::int64_t keep_bytes, rank, columns, rows;
    float* partial;  // none: only the bits are wanted
    std::int64_t row, column;
};

struct LowRankGrads {
    OuterProduct products[2];
    std::int64_t split;  // rows in a part
};

struct Device {
    std::uintptr_t stream;
    int processors;
};

// Each raises std::runtime_error with the kernel's name and configuration where the launch fails.
void project(const Project&, Math, Device);
void project_sm90(const Project&, Math, Device);  // no dropout; at most 128 columns of a product
void finish_projection(const Project&, Math, Device);  // adds the parts, if there are any
void augmented_matmul(const AugmentedMatmul&, Math, bool large, Device);
void augmented_matmul_sm90(const AugmentedMatmul&, Math, Hopper, Device);
void augmented_matmul_one_pass_sm90(const AugmentedMatmul&, Math, Device);  // with ``a``, of 64 rows at most
void low_rank_grads(const LowRankGrads&, Math, std::int64_t parts, Device);
void finish(const Sum&, const Sum&, Device);

}  // namespace reslora

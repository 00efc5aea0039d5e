// Dropout: the mask of reslora_kernels/dropout.py, bit for bit.
#pragma once

#include <cmath>
#include <system_error>
#include <thread>

#include "host_torch.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the dropout mask is written for little-endian machines"
#endif

namespace {

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

// The dropout of a call, of its seed and probability
Dropout dropout_of(PyObject* seed, double p) {
    Dropout dropout;
    if (seed == Py_None && p == 0) return dropout;
    Tensor tensor = tensor_of(seed, torch.int64);
    if (!tensor) throw NotServed();
    for (int64_t at = 0; at < tensor.dim; at++)
        if (tensor.sizes[at] != 1) throw NotServed();
    if (!(p > 0 && p < 1)) throw NotServed();
    dropout.seed = *tensor.data<uint64_t>();
    dropout.p = p;
    return dropout;
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

}  // namespace

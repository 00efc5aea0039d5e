// Blocks of matrices in shared memory, swizzled so that neither ldmatrix nor the copies meet a bank twice; how they get
// there, and how elements of any type are read and written.
#pragma once
#include "params.h"
#include "ptx.cuh"

namespace reslora {

template <class Element>
struct alignas(16) Chunk {  // what one copy moves
    static constexpr int SIZE = 16 / sizeof(Element);
    Element elements[SIZE];
};

template <class Element, int ROWS_, int COLUMNS_>
struct SharedTile {
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, PER_CHUNK = Chunk<Element>::SIZE;
    static constexpr int CHUNKS = COLUMNS / PER_CHUNK, BYTES = ROWS * CHUNKS * 16;
    unsigned char* base;

    // Eight rows at one column lie in eight different groups of four banks.
    RESLORA_DEVICE Chunk<Element>* chunk(int row, int chunk) const {
        constexpr int LINE = CHUNKS < 8 ? CHUNKS : 8;
        return reinterpret_cast<Chunk<Element>*>(base) + row * CHUNKS + (chunk ^ (row / (8 / LINE) % LINE));
    }
    RESLORA_DEVICE Element& at(int row, int column) const {
        return chunk(row, column / PER_CHUNK)->elements[column % PER_CHUNK];
    }
};

// The place of a tile among [rows, columns] of them: ``group`` rows are walked together, so that both operands of the
// blocks that run at one time stay in L2.
template <class Index>
RESLORA_DEVICE void tile_of(Index tile, Index rows, Index columns, Index group, Index& row, Index& column) {
    const Index first = tile / (group * columns) * group, within = tile % (group * columns);
    const Index height = rows - first < group ? rows - first : group;
    row = first + within % height;
    column = within / height;
}

RESLORA_DEVICE float load_as_float(const void* data, Type type, std::int64_t at) {
    switch (type) {
        case FLOAT16: return to_float(static_cast<const Fp16*>(data)[at]);
        case BFLOAT16: return to_float(static_cast<const Bf16*>(data)[at]);
        case FLOAT64: return static_cast<float>(static_cast<const double*>(data)[at]);
        default: return static_cast<const float*>(data)[at];
    }
}

RESLORA_DEVICE float load_as_float(const Matrix& matrix, std::int64_t row, std::int64_t column) {
    return load_as_float(matrix.data, matrix.type, row * matrix.row + column * matrix.column);
}

RESLORA_DEVICE void store_float(const Output& out, std::int64_t at, float value) {
    switch (out.type) {
        case FLOAT16: from_float(static_cast<Fp16*>(out.data)[at], value); break;
        case BFLOAT16: from_float(static_cast<Bf16*>(out.data)[at], value); break;
        case FLOAT64: static_cast<double*>(out.data)[at] = value; break;
        default: static_cast<float*>(out.data)[at] = value;
    }
}

// tile = matrix[row : , column : ], zero from row ``rows`` and column ``columns`` on. It is there after wait_copies and
// a barrier. What is not copied as it is goes through registers and is converted there.
template <int THREADS, class Element, int ROWS, int COLUMNS>
RESLORA_DEVICE void load_tile(SharedTile<Element, ROWS, COLUMNS> tile, const Matrix& matrix, std::int64_t row,
                              std::int64_t column, std::int64_t rows, std::int64_t columns) {
    using Tile = SharedTile<Element, ROWS, COLUMNS>;
    RESLORA_UNROLL
    for (int first = 0; first < ROWS * Tile::CHUNKS; first += THREADS) {
        const int i = first + thread_id();
        if (ROWS * Tile::CHUNKS % THREADS != 0 && i >= ROWS * Tile::CHUNKS) break;
        const int r = i / Tile::CHUNKS, c = i % Tile::CHUNKS;
        const std::int64_t from = column + c * Tile::PER_CHUNK;
        const std::int64_t left = row + r < rows ? columns - from : 0;
        const int inside = left < 0 ? 0 : left < Tile::PER_CHUNK ? static_cast<int>(left) : Tile::PER_CHUNK;
        if (matrix.access == COPIED) {
            const Element* data = static_cast<const Element*>(matrix.data);
            copy_async(tile.chunk(r, c), inside ? data + (row + r) * matrix.row + from : data,
                       inside * static_cast<int>(sizeof(Element)));
        } else if (sizeof(Element) == 2 && matrix.access == CONVERTED && inside == Tile::PER_CHUNK) {
            const auto* data = static_cast<const Chunk<float>*>(matrix.data) + ((row + r) * matrix.row + from) / 4;
            const Chunk<float> halves[2] = {data[0], data[1]};
            Chunk<Element> values;
            RESLORA_UNROLL
            for (int e = 0; e < Tile::PER_CHUNK; ++e) from_float(values.elements[e], halves[e / 4].elements[e % 4]);
            *tile.chunk(r, c) = values;
        } else {
            Element* elements = tile.chunk(r, c)->elements;
            RESLORA_KEEP_LOOP
            for (int e = 0; e < Tile::PER_CHUNK; ++e)
                from_float(elements[e], e < inside ? load_as_float(matrix, row + r, from + e) : 0.0f);
        }
    }
}

}  // namespace reslora

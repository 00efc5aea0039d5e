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

template <class Element_, int ROWS_, int COLUMNS_>
struct SharedTile {
    using Element = Element_;
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, PER_CHUNK = Chunk<Element>::SIZE;
    static constexpr int CHUNKS = COLUMNS / PER_CHUNK, BYTES = ROWS * CHUNKS * 16;
    unsigned char* base;

    // Of a chunk, in chunks from the base. Eight rows at one column lie in eight different groups of four banks, and
    // four rows at two neighbours as well.
    RESLORA_DEVICE static constexpr unsigned place(unsigned row, unsigned chunk) {
        constexpr unsigned LINE = CHUNKS < 8 ? CHUNKS : 8;
        const unsigned turn = row / (8 / LINE) % LINE * 2;
        return row * CHUNKS + (chunk ^ (turn % LINE + turn / LINE));
    }
    RESLORA_DEVICE Chunk<Element>* chunk(unsigned row, unsigned chunk) const {
        return reinterpret_cast<Chunk<Element>*>(base) + place(row, chunk);
    }
    // Of the chunk ``rows`` below one: eight rows on, all lies as before.
    RESLORA_DEVICE static constexpr int below(int rows) { return rows * CHUNKS; }
    RESLORA_DEVICE Element& at(unsigned row, unsigned column) const {
        return chunk(row, column / PER_CHUNK)->elements[column % PER_CHUNK];
    }
};

// What a warp stores of a product, on its way out: pairs of neighbours in, as a multiplication leaves them, chunks out.
template <class Element, int ROWS, int COLUMNS>
struct StagedTile : SharedTile<Element, ROWS, COLUMNS> {
    struct alignas(2 * sizeof(Element)) Pair {
        Element first, second;
    };

    RESLORA_DEVICE Pair* pair(unsigned row, unsigned column) const {
        return reinterpret_cast<Pair*>(&this->at(row, column));
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

RESLORA_DEVICE void store_float(const Output& out, std::int64_t at, float value) {
    switch (out.type) {
        case FLOAT16: from_float(static_cast<Fp16*>(out.data)[at], value); break;
        case BFLOAT16: from_float(static_cast<Bf16*>(out.data)[at], value); break;
        case FLOAT64: static_cast<double*>(out.data)[at] = value; break;
        default: static_cast<float*>(out.data)[at] = value;
    }
}

// Tiles of a matrix on their way to shared memory, the next one along k with each copy, zeros beyond the end. BY_K: k
// runs along its rows. A thread copies EACH chunks of a tile, all at one column, ROWS_ON rows apart: in the loop that
// leaves one addition for each. AS_IS: the matrix is known to be COPIED; else its access is asked each time, and what
// must be converted goes through registers. A tile is there after wait_copies and a barrier.
template <int THREADS, class Tile, bool BY_K, bool AS_IS>
struct Stream {
    using Element = typename Tile::Element;
    static constexpr int ROWS_ON = THREADS / Tile::CHUNKS, EACH = (Tile::ROWS + ROWS_ON - 1) / ROWS_ON;
    static_assert(THREADS % Tile::CHUNKS == 0 && (EACH == 1 || Tile::ROWS % ROWS_ON == 0), "the same chunks for all");

    const Matrix& matrix;
    const unsigned char* from;  // this thread's first chunk of the next tile
    std::int64_t rows_on, step;  // in bytes
    int others;                  // rows (BY_K) or columns that there are from this thread's first on

    // ``other``: where the tiles begin in the dimension that is not k.
    RESLORA_DEVICE Stream(const Matrix& matrix, std::int64_t other, std::int64_t k) : matrix(matrix) {
        const std::int64_t row = (BY_K ? other : k) + first_row(), column = (BY_K ? k : other) + first_column();
        const int size = matrix.type == FLOAT64 ? 8 : matrix.type == FLOAT32 ? 4 : 2;
        const std::int64_t left = BY_K ? matrix.rows - row : matrix.columns - column;
        others = static_cast<int>(left < Tile::ROWS + Tile::COLUMNS ? left : Tile::ROWS + Tile::COLUMNS);
        from = static_cast<const unsigned char*>(matrix.data) + (row * matrix.row + column * matrix.column) * size;
        rows_on = ROWS_ON * matrix.row * size;
        step = (BY_K ? Tile::COLUMNS * matrix.column : Tile::ROWS * matrix.row) * size;
        if (AS_IS && BY_K) step = 16 * Tile::CHUNKS;  // which the compiler knows
    }

    RESLORA_DEVICE static int first_row() { return static_cast<unsigned>(thread_id()) / Tile::CHUNKS; }
    RESLORA_DEVICE static int first_column() {
        return static_cast<unsigned>(thread_id()) % Tile::CHUNKS * Tile::PER_CHUNK;
    }

    // ``left``: the k that there are from this tile on.
    RESLORA_DEVICE void copy(Tile tile, int left) {
        const int row = first_row(), chunk = first_column() / Tile::PER_CHUNK;
        const int rows = BY_K ? others : left - row, columns = BY_K ? left - first_column() : others;
        const unsigned char* at = from;
        if (Tile::ROWS % ROWS_ON == 0 || row < Tile::ROWS) {
            Chunk<Element>* const to = tile.chunk(row, chunk);
            RESLORA_UNROLL
            for (int i = 0; i < EACH; ++i, at += rows_on) {
                const int on = i * ROWS_ON;
                Chunk<Element>* here = ROWS_ON % 8 ? tile.chunk(row + on, chunk) : to + Tile::below(on);
                copy_chunk(here, at, on < rows ? columns : 0);
            }
        }
        from += step;
    }

    // ``inside``: how many of its elements there are, at least; of a COPIED matrix all or none.
    RESLORA_DEVICE void copy_chunk(Chunk<Element>* to, const unsigned char* at, int inside) {
        if (AS_IS || matrix.access == COPIED) {
            copy_async(to, at, inside > 0);
        } else if (sizeof(Element) == 2 && matrix.access == CONVERTED && inside >= Tile::PER_CHUNK) {
            const auto* halves = reinterpret_cast<const Chunk<float>*>(at);
            const Chunk<float> read[2] = {halves[0], halves[1]};
            Chunk<Element> values;
            RESLORA_UNROLL
            for (int e = 0; e < Tile::PER_CHUNK; ++e) from_float(values.elements[e], read[e / 4].elements[e % 4]);
            *to = values;
        } else {
            const int size = matrix.type == FLOAT64 ? 8 : matrix.type == FLOAT32 ? 4 : 2;
            RESLORA_KEEP_LOOP
            for (int e = 0; e < Tile::PER_CHUNK; ++e, at += matrix.column * size)
                from_float(to->elements[e], e < inside ? load_as_float(at, matrix.type, 0) : 0.0f);
        }
    }
};

}  // namespace reslora

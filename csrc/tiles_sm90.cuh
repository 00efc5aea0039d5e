// What the kernels of sm_90a that multiply to y share: a block's tiles, their way out, the maps of the operands.
#pragma once
#include <tuple>

#include "launch.cuh"
#include "pipeline_sm90.cuh"

namespace reslora {

// The tiles of one block: every so many of those of the whole launch, of which a cluster takes DOWN together.
struct Tiles {
    int tile, stride, rows, columns;

    template <class P, class Params>
    RESLORA_DEVICE static Tiles make(const Params& p, int blocks) {
        return {static_cast<int>(block_id().x) / P::DOWN, blocks / P::DOWN,
                (p.rows + P::DOWN * P::BM - 1) / (P::DOWN * P::BM), (p.columns + P::BN - 1) / P::BN};
    }
    RESLORA_DEVICE bool left() const { return tile < rows * columns; }
    template <class P>
    RESLORA_DEVICE void place(const P& pipeline, int& row, int& column) const {
        tile_of(tile, rows, columns, P::GROUP / P::DOWN, row, column);
        row = (row * P::DOWN + pipeline.rank) * P::BM;
        column *= P::BN;
    }
    // All of the first column before the others, in which tiles may wait for what is made there. Whether it is of that.
    template <class P>
    RESLORA_DEVICE bool place_first_column_first(const P&, int& row, int& column) const {
        if (tile < rows) {
            row = tile;
            column = 0;
        } else {
            tile_of(tile - rows, rows, columns - 1, P::GROUP, row, column);
            ++column;
        }
        row *= P::BM;
        column *= P::BN;
        return tile < rows;
    }
};

// The bias of a tile's columns: lane l of each warp has those of columns 2 l and 2 l + 1 of every 64.
template <class P>
struct Bias {
    std::uint32_t pairs[P::BN / 64] = {};
    bool there;

    template <class Params>
    RESLORA_DEVICE Bias(const Params& p, int column) : there(p.bias != nullptr) {
        if (!there) return;
        const auto* bias = static_cast<const std::uint16_t*>(p.bias);
        RESLORA_UNROLL
        for (int i = 0; i < P::BN / 64; ++i) {
            const int c = column + 64 * i + thread_id() % 32 * 2;
            if (c < p.columns) pairs[i] = bias[c] | static_cast<std::uint32_t>(bias[c + 1]) << 16;  // N is even
        }
    }
    // Of columns 8 j + 2 q and the next, q = lane % 4.
    RESLORA_DEVICE std::uint32_t of(int j, int lane) const {
        return there ? from_lane(pairs[j / 8], j % 8 * 4 + lane % 4) : 0;
    }
};

// y [64, BN] at (row, column) = acc + bias: 64 columns at a time to a box of shared memory, from where the copy engine
// takes them while this warpgroup goes on. It writes nothing beyond the edges of y. BOXES: how many it may use.
template <int BOXES, class P, class Params>
RESLORA_DEVICE void store(const P& pipeline, const float (&acc)[P::BN / 2], const Bias<P>& bias, const Params& p,
                          int consumer, int row, int column) {
    using Element = typename P::Element;
    struct alignas(4) Pair {
        Element first, second;
    };
    const int thread = thread_id() % WARPGROUP, lane = thread % 32, r = thread / 32 * 16 + lane / 4;
    RESLORA_UNROLL
    for (int part = 0; part < P::BN / DEPTH; ++part) {
        unsigned char* box = pipeline.store_box(consumer, part % BOXES);
        if (thread == 0 && part == 0) tma_store_wait_read<0>();
        if (thread == 0 && part > 0) tma_store_wait_read<BOXES - 1>();
        named_barrier(1 + consumer, WARPGROUP);
        RESLORA_UNROLL
        for (int j = 0; j < 8; ++j) {
            const std::uint32_t biases = bias.of(part * 8 + j, lane);
            const float left = to_float(Element{static_cast<std::uint16_t>(biases)});
            const float right = to_float(Element{static_cast<std::uint16_t>(biases >> 16)});
            RESLORA_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int at = part * 32 + 4 * j + 2 * half;
                Pair pair;
                from_float(pair.first, acc[at] + left);
                from_float(pair.second, acc[at + 1] + right);
                // Row r + 8 half, whose number modulo 8 is that of r: a warp's stores meet 32 different banks.
                *reinterpret_cast<Pair*>(box + (r + 8 * half) * LINE + (j ^ (r % 8)) * 16 + lane % 4 * 4) = pair;
            }
        }
        fence_async_shared();
        named_barrier(1 + consumer, WARPGROUP);
        if (thread == 0) {
            tma_store(&p.y, box, column + part * DEPTH, row);
            tma_store_commit();
        }
    }
}

// A block's whole work, by the ``produce`` and ``consume`` of these parameters.
template <class P, class Params>
RESLORA_DEVICE void play_roles(const Params& p) {
    const P pipeline = P::make();
    pipeline.start();
    grid_dependency_wait();  // every thread: what this launch reads, adds up and writes over belongs to those before it
    const int role = thread_id() / WARPGROUP;
    if (role == PRODUCER) {
        set_registers_down<40>();
        if (thread_id() == PRODUCER * WARPGROUP) produce(pipeline, p);
    } else {
        set_registers_up<232>();
        consume(pipeline, p, role);
    }
    if constexpr (P::DOWN > 1) P::meet();
}

// How many blocks can run at a time, of the first GPU that this kernel runs on: one too many would begin when all others
// have ended.
template <class P, class Params>
std::int64_t room_for(void (*kernel)(Params), Device device) {
    static const int clusters =
        P::DOWN > 1 ? clusters_at_a_time(reinterpret_cast<const void*>(kernel), P::THREADS, P::SHARED_BYTES, P::DOWN) : 0;
    const std::int64_t most = device.processors / P::DOWN;
    return P::DOWN * (clusters > 0 && clusters < most ? clusters : most);
}

template <class P>
std::int64_t tiles_of(std::int64_t rows, std::int64_t columns) {
    return P::DOWN * blocks(rows, P::DOWN * P::BM) * blocks(columns, P::BN);
}

// Of the matrix as its memory is ordered. A weight's is the same in every call, and those of activations come round.
inline TensorMap map_of(const Matrix& m, int box_rows) {
    constexpr std::size_t MOST = 4096;
    using Form = std::tuple<const void*, Type, std::int64_t, std::int64_t, std::int64_t, int>;
    thread_local std::map<Form, TensorMap> known;
    const bool by_rows = m.column == 1;
    const std::int64_t rows = by_rows ? m.rows : m.columns, columns = by_rows ? m.columns : m.rows;
    const std::int64_t stride = by_rows ? m.row : m.column;
    const Form form{m.data, m.type, rows, columns, stride, box_rows};
    const auto found = known.find(form);
    if (found != known.end()) return found->second;
    if (known.size() >= MOST) known.clear();
    return known.emplace(form, encode_tensor_map(m.data, m.type, rows, columns, stride, box_rows, DEPTH)).first->second;
}

}  // namespace reslora

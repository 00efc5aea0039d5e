// What the kernels of sm_90a that multiply to y share: a block's tiles, their way out, the maps of the operands.
#pragma once
#include <tuple>

#include "launch.cuh"
#include "pipeline_sm90.cuh"

namespace reslora {

// The tiles of one block: every so many of those of the whole launch, of which a cluster takes DOWN by ACROSS together.
struct Tiles {
    int tile, stride, rows, columns;

    template <class P, class Params>
    RESLORA_DEVICE static Tiles make(const Params& p) {
        return {static_cast<int>(block_id().x) / P::CLUSTER, static_cast<int>(grid_size().x) / P::CLUSTER,
                (p.rows + P::DOWN * P::BM - 1) / (P::DOWN * P::BM),
                (p.columns + P::ACROSS * P::BN - 1) / (P::ACROSS * P::BN)};
    }
    RESLORA_DEVICE bool left() const { return tile < rows * columns; }
    template <class P>
    RESLORA_DEVICE void place(const P& pipeline, int& row, int& column) const {
        tile_of(tile, rows, columns, P::GROUP / P::DOWN, row, column);
        row = (row * P::DOWN + pipeline.down()) * P::BM;
        column = (column * P::ACROSS + pipeline.across()) * P::BN;
    }
};

// y [64, BN] at (row, column) = acc + bias: 64 columns at a time to a box of shared memory, from where the copy engine
// takes them while this warpgroup goes on. It writes nothing beyond the edges of y.
template <class P, class Params>
RESLORA_DEVICE void store(const P& pipeline, const float (&acc)[P::BN / 2], const Params& p, int consumer, int row,
                          int column) {
    using Element = typename P::Element;
    struct alignas(4) Pair {
        Element first, second;
    };
    const int thread = thread_id() % WARPGROUP, lane = thread % 32, r = thread / 32 * 16 + lane / 4;
    const auto* bias = static_cast<const Element*>(p.bias);
    RESLORA_UNROLL
    for (int part = 0; part < P::BN / DEPTH; ++part) {
        unsigned char* box = pipeline.store_box(consumer, part % P::STORE_BOXES);
        if (thread == 0) tma_store_wait_read<P::STORE_BOXES - 1>();
        named_barrier(1 + consumer, WARPGROUP);
        RESLORA_UNROLL
        for (int j = 0; j < 8; ++j) {
            const int c = column + part * DEPTH + 8 * j + lane % 4 * 2;
            const bool biased = bias && c < p.columns;  // N is even
            const float left = biased ? to_float(bias[c]) : 0.0f, right = biased ? to_float(bias[c + 1]) : 0.0f;
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
    if constexpr (P::CLUSTER > 1) P::meet();
}

// On as many clusters as can run, or as there are tiles for them.
template <class P, class Params>
void run_tiles(const char* name, void (*kernel)(Params), const Params& p, Device device) {
    const std::int64_t tiles = blocks(p.rows, P::DOWN * P::BM) * blocks(p.columns, P::ACROSS * P::BN);
    // Of the first GPU that it runs on: one too many would begin when all others have ended.
    static const int most =
        P::CLUSTER > 1 ? clusters_at_a_time(reinterpret_cast<const void*>(kernel), P::THREADS, P::SHARED_BYTES, P::CLUSTER)
                       : 0;
    const std::int64_t room = device.processors / P::CLUSTER, clusters = most > 0 && most < room ? most : room;
    run(name, kernel, {P::CLUSTER * (tiles < clusters ? tiles : clusters), 1, 1}, P::THREADS, P::SHARED_BYTES, p, device,
        P::CLUSTER, true);
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

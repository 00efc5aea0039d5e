// y = x w + bias + keep * (scale t b): a matmul whose accumulator also takes a rank-r product. See params.h.
// The low-rank product is the first thing in the accumulator, is scaled and masked there in float32, and the main loop
// adds x w on top; its first tiles are under way meanwhile. In one pass, the main loop also accumulates x aᵀ, from
// which t is made when it is over. With few rows K is split, and a second launch adds the parts in order.
#include "elementwise.cuh"
#include "launch.cuh"

namespace reslora {
namespace {

constexpr int GROUP = 8;  // tile rows that are walked together, so that both operands stay in L2
constexpr int ONE_PASS_RANK = 32;

struct Large {  // warp tiles of 64 x 64: a multiplication reads half as much of shared memory as of 32 x 32
    static constexpr int SIZE = 128, STAGES = 3, BLOCKS = 2;
};
struct Small {
    static constexpr int SIZE = 64, STAGES = 4, BLOCKS = 3;
};

template <class Math, class Tile, bool W_BY_K, bool ONE_PASS>
using Matmul =
    BlockMatmul<Math, Tile::SIZE, Tile::SIZE, 2, 2, true, W_BY_K, Tile::STAGES, ONE_PASS ? ONE_PASS_RANK : 0>;

// The low-rank product, in the accumulators alone: scaled, and zero where x was dropped.
template <class M>
RESLORA_DEVICE void scale_and_mask(M& matmul, const AugmentedMatmul& p, std::int64_t row, std::int64_t column) {
    const int lane = thread_id() % 32;
    RESLORA_UNROLL
    for (int i = 0; i < 2 * M::FM; ++i) {
        const std::int64_t m = row + M::warp_row() + 8 * i + lane / 4;
        RESLORA_UNROLL
        for (int n = 0; n < M::FN; n += 4) {  // 32 columns, one word
            const std::int64_t word = (column + M::warp_column() + 8 * n) / 32;
            std::uint32_t keep = ~0u;
            if (p.keep && m < p.x.rows && word < p.keep_words) keep = p.keep[m * p.keep_words + word];
            RESLORA_UNROLL
            for (int e = 0; e < 8; ++e) {
                float& value = matmul.acc[i / 2][n + e / 2][i % 2 * 2 + e % 2];
                value = keep >> (e / 2 * 8 + lane % 4 * 2 + e % 2) & 1u ? value * p.scale : 0.0f;
            }
        }
    }
}

template <class M>
RESLORA_DEVICE void store_part(M& matmul, const AugmentedMatmul& p, std::int64_t part, std::int64_t row,
                               std::int64_t column) {
    using Element = typename M::Element;
    matmul.for_each_pair([&](int r, int c, float first, float second) {
        for (int e = 0; e < 2; ++e) {
            const std::int64_t i = row + r, j = column + c + e;
            if (i >= p.x.rows || j >= p.y.columns) continue;
            const float bias = p.bias && part == 0 ? to_float(static_cast<const Element*>(p.bias)[j]) : 0.0f;
            p.partial[(part * p.x.rows + i) * p.y.columns + j] = (e ? second : first) + bias;
        }
    });
}

template <class Element>
RESLORA_DEVICE float bias_of(const AugmentedMatmul& p, std::int64_t column) {
    return p.bias && column < p.y.columns ? to_float(static_cast<const Element*>(p.bias)[column]) : 0.0f;
}

// Each warp by itself, through shared memory, so that rows leave in pieces of 128 bytes, 16 at a time.
template <class M>
RESLORA_DEVICE void store(const M& matmul, const AugmentedMatmul& p, std::int64_t row, std::int64_t column) {
    using Element = typename M::Element;
    constexpr int MOST = 128 / sizeof(Element), COLUMNS = M::WARP_N < MOST ? M::WARP_N : MOST;
    using Staged = StagedTile<Element, M::WARP_M, COLUMNS>;
    static_assert(M::THREADS / 32 * Staged::BYTES <= M::SHARED_BYTES, "all warps at once");
    const int lane = thread_id() % 32;
    const Staged staged{{shared_memory() + thread_id() / 32 * Staged::BYTES}};
    const bool wide = p.y.columns % Staged::PER_CHUNK == 0;
    row += M::warp_row();
    column += M::warp_column();
    RESLORA_UNROLL
    for (int start = 0; start < M::WARP_N; start += COLUMNS, column += COLUMNS) {
        if (start) warp_barrier();
        RESLORA_UNROLL
        for (int n = 0; n < COLUMNS / 8; ++n) {
            const int c = 8 * n + lane % 4 * 2;
            const float bias[2] = {bias_of<Element>(p, column + c), bias_of<Element>(p, column + c + 1)};
            RESLORA_UNROLL
            for (int i = 0; i < 2 * M::FM; ++i) {
                const float* values = &matmul.acc[i / 2][start / 8 + n][i % 2 * 2];
                typename Staged::Pair pair;
                from_float(pair.first, values[0] + bias[0]);
                from_float(pair.second, values[1] + bias[1]);
                store_shared(staged.pair(8 * i + lane / 4, c), pair);
            }
        }
        warp_barrier();
        RESLORA_UNROLL
        for (int first = 0; first < M::WARP_M * Staged::CHUNKS; first += 32) {
            const int r = (first + lane) / Staged::CHUNKS, c = (first + lane) % Staged::CHUNKS;
            const Chunk<Element> values = load_shared(staged.chunk(r, c));
            const std::int64_t i = row + r, j = column + c * Staged::PER_CHUNK;
            if (i >= p.x.rows || j >= p.y.columns) continue;
            Element* to = static_cast<Element*>(p.y.data) + i * p.y.columns + j;
            if (wide) {
                *reinterpret_cast<Chunk<Element>*>(to) = values;
            } else {
                RESLORA_UNROLL
                for (int e = 0; e < Staged::PER_CHUNK; ++e)
                    if (j + e < p.y.columns) to[e] = values.elements[e];
            }
        }
    }
}

// AS_IS: x and w are copied as they are; else as their access says.
template <class Math, class Tile, bool W_BY_K, bool ONE_PASS, bool AS_IS>
__global__ void __launch_bounds__(128, Tile::BLOCKS - ONE_PASS) augmented_matmul_kernel(const AugmentedMatmul p) {
    using M = Matmul<Math, Tile, W_BY_K, ONE_PASS>;
    using Element = typename M::Element;
    static_assert(M::THREADS == 128 && (Tile::BLOCKS - ONE_PASS) * (M::SHARED_BYTES + 1024) <= 100 << 10,
                  "the blocks fit the shared memory of the smallest GPU");
    int tile_row, tile_column;
    tile_of(static_cast<int>(block_id().x), static_cast<int>((p.x.rows + M::BM - 1) / M::BM),
            static_cast<int>((p.y.columns + M::BN - 1) / M::BN), GROUP, tile_row, tile_column);
    const std::int64_t row = static_cast<std::int64_t>(tile_row) * M::BM;
    const std::int64_t column = static_cast<std::int64_t>(tile_column) * M::BN;
    const std::int64_t part = block_id().z, start = part * p.split;
    const std::int64_t size = p.x.columns - start < p.split ? p.x.columns - start : p.split;
    const int steps = M::steps_of(size), rest = static_cast<int>(size - static_cast<std::int64_t>(steps - 1) * M::BK);
    typename M::template StreamA<AS_IS> x(p.x, row, start);
    typename M::template StreamB<AS_IS> w(p.w, column, start);
    typename M::template StreamB<false> b(p.b, column, 0);
    const auto copy_step = [&](int step, int stage) {
        const int left = step + 1 < steps ? M::BK : rest;
        x.copy(M::tile_a(stage), left);
        w.copy(M::tile_b(stage), left);
    };
    const auto nothing = [](int, int) {};
    M matmul;
    if constexpr (ONE_PASS) {
        typename M::StreamExtra a(p.a, 0, start);
        const auto copy = [&](int step, int stage) {
            if (step < steps) {
                copy_step(step, stage);
                a.copy(M::tile_extra(stage), step + 1 < steps ? M::BK : rest);
            } else if (step == steps) {  // t b: t will take the place of x
                b.copy(M::tile_b(stage), static_cast<int>(p.side.inner.columns));
            }
        };
        matmul.begin(copy);
        matmul.add(steps, copy, nothing);
        matmul.end();
        const typename M::TileA t = M::tile_a(matmul.stage);
        matmul.for_each_extra_pair([&](int r, int c, float first, float second) {
            for (int e = 0; e < 2; ++e) {
                const bool inside = row + r < p.x.rows;
                const float product = e ? second : first;
                const float value = inside ? pass_on<Element>(p.side, row + r, c + e, product, column == 0) : 0.0f;
                from_float(t.at(r, c + e), value * p.scale);
            }
        });
        barrier();
        matmul.template multiply_stage<false>(matmul.stage);
        barrier();
    } else {
        const int rank = part ? 0 : static_cast<int>(p.t.columns), first = M::steps_of(rank);
        typename M::template StreamA<false> t(p.t, row, 0);
        const auto copy = [&](int step, int stage) {
            if (step < steps) copy_step(step, stage);
        };
        const auto copy_first = [&](int step, int stage) {
            if (step >= first) return copy(step - first, stage);
            t.copy(M::tile_a(stage), rank - step * M::BK);
            b.copy(M::tile_b(stage), rank - step * M::BK);
        };
        matmul.begin(copy_first);
        matmul.add(first, copy_first, nothing);
        if (rank) scale_and_mask(matmul, p, row, column);
        matmul.add(steps, copy, nothing);
        matmul.end();
    }
    if (p.partial) store_part(matmul, p, part, row, column);
    else store(matmul, p, row, column);
    for (const Sum& sum : p.sums)
        add_partials<M::THREADS>(sum, part * grid_size().x + block_id().x, grid_size().x * grid_size().z);
}

template <class Math, class Tile, bool W_BY_K, bool ONE_PASS, bool AS_IS>
void launch_kernel(const AugmentedMatmul& p, Device device) {
    using M = Matmul<Math, Tile, W_BY_K, ONE_PASS>;
    run(ONE_PASS ? "augmented_matmul_one_pass" : "augmented_matmul",
        &augmented_matmul_kernel<Math, Tile, W_BY_K, ONE_PASS, AS_IS>,
        {blocks(p.x.rows, M::BM) * blocks(p.y.columns, M::BN), 1, p.parts}, M::THREADS, M::SHARED_BYTES, p, device);
}

template <class Math, class Tile, bool W_BY_K, bool ONE_PASS>
void launch_access(AugmentedMatmul p, Device device) {
    using Element = typename Math::Element;
    p.x = as_read<Element>(p.x);
    p.w = as_read<Element>(W_BY_K ? transposed(p.w) : p.w);
    p.b = as_read<Element>(W_BY_K ? transposed(p.b) : p.b);
    p.t = as_read<Element>(p.t);
    p.a = as_read<Element>(p.a);
    if (p.x.access == COPIED && p.w.access == COPIED) launch_kernel<Math, Tile, W_BY_K, ONE_PASS, true>(p, device);
    else launch_kernel<Math, Small, W_BY_K, ONE_PASS, false>(p, device);
}

template <class Math, class Tile, bool ONE_PASS>
void launch_layout(const AugmentedMatmul& p, Device device) {
    if (p.w.row == 1) launch_access<Math, Tile, true, ONE_PASS>(p, device);
    else launch_access<Math, Tile, false, ONE_PASS>(p, device);
}

template <class Math>
void launch_math(const AugmentedMatmul& p, bool large, Device device) {
    if constexpr (sizeof(typename Math::Element) == 2) {
        if (p.a.data && large) return launch_layout<Math, Large, true>(p, device);
        if (p.a.data) return launch_layout<Math, Small, true>(p, device);
    }
    if constexpr (!SAME<Math, IeeeMath>) {
        if (large) return launch_layout<Math, Large, false>(p, device);
    }
    launch_layout<Math, Small, false>(p, device);
}

}  // namespace

void augmented_matmul(const AugmentedMatmul& p, Math math, bool large, Device device) {
    with_math(math, [&](auto tag) { launch_math<decltype(tag)>(p, large, device); });
    if (p.partial) finish({p.partial, p.y, p.parts, p.x.rows * p.y.columns, 1.0f}, {}, device);
}

}  // namespace reslora

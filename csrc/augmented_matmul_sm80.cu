// y = x w + bias + keep * (scale t b): a matmul whose accumulator also takes a rank-r product. See params.h.
// The low-rank product is the first thing in the accumulator, is scaled and masked there in float32, and the main loop
// adds x w on top. In one pass, the main loop also accumulates x aᵀ, from which t is made when it is over.
#include "epilogue.cuh"
#include "launch.cuh"

namespace reslora {
namespace {

constexpr std::int64_t GROUP = 8;  // tile rows that are walked together, so that both operands stay in L2
constexpr int ONE_PASS_RANK = 32;

struct Large {
    static constexpr int SIZE = 128, WARPS_M = 4;
};
struct Small {
    static constexpr int SIZE = 64, WARPS_M = 2;
};

template <class Math, class Tile, bool W_BY_K, bool ONE_PASS>
using Matmul =
    BlockMatmul<Math, Tile::SIZE, Tile::SIZE, Tile::WARPS_M, 2, true, W_BY_K, 4, ONE_PASS ? ONE_PASS_RANK : 0>;

template <class Element>
RESLORA_DEVICE void store_pair(const AugmentedMatmul& p, std::int64_t row, std::int64_t column, float first,
                               float second) {
    if (row >= p.x.rows || column >= p.y.columns) return;
    struct alignas(2 * sizeof(Element)) Pair {
        Element first, second;
    } pair;
    const bool whole = column + 1 < p.y.columns;
    if (p.bias) {
        first += to_float(static_cast<const Element*>(p.bias)[column]);
        if (whole) second += to_float(static_cast<const Element*>(p.bias)[column + 1]);
    }
    from_float(pair.first, first);
    from_float(pair.second, second);
    Element* at = static_cast<Element*>(p.y.data) + row * p.y.columns + column;
    if (p.y.columns % 2 == 0) {
        *reinterpret_cast<Pair*>(at) = pair;
    } else {
        at[0] = pair.first;
        if (whole) at[1] = pair.second;
    }
}

template <class Math, class Tile, bool W_BY_K, bool ONE_PASS>
__global__ void __launch_bounds__(64 * Tile::WARPS_M, 1) augmented_matmul_kernel(const AugmentedMatmul p) {
    using M = Matmul<Math, Tile, W_BY_K, ONE_PASS>;
    using Element = typename M::Element;
    std::int64_t row, column;
    tile_of(block_id().x, (p.x.rows + M::BM - 1) / M::BM, (p.y.columns + M::BN - 1) / M::BN, GROUP, row,
            column);
    const bool first_column = column == 0;
    row *= M::BM;
    column *= M::BN;
    M matmul;
    const auto nothing = [](int, std::int64_t) {};
    if constexpr (!ONE_PASS) {
        matmul.add(p.t, p.b, Matrix{}, row, column, 0, p.t.columns, nothing);
        matmul.for_each_pair([&](int r, int c, float& first, float& second) {
            const std::int64_t i = row + r, j = column + c;
            std::uint32_t keep = 3;
            if (p.keep && i < p.x.rows && j < p.y.columns) keep = p.keep[i * p.keep_words + j / 32] >> (j % 32);
            first = keep & 1u ? first * p.scale : 0.0f;
            second = keep & 2u ? second * p.scale : 0.0f;
        });
    }
    matmul.add(p.x, p.w, p.a, row, column, 0, p.x.columns, nothing);
    if constexpr (ONE_PASS) {
        const typename M::TileA t = M::tile_a(0);
        matmul.for_each_extra_pair([&](int r, int c, float first, float second) {
            for (int e = 0; e < 2; ++e) {
                const bool inside = row + r < p.x.rows;
                const float product = e ? second : first;
                const float value = inside ? pass_on<Element>(p.side, row + r, c + e, product, first_column) : 0.0f;
                from_float(t.at(r, c + e), value * p.scale);
            }
        });
        M::load_b(0, p.b, column, 0, p.side.inner.columns);
        commit_copies();
        wait_copies<0>();
        barrier();
        matmul.template multiply_stage<false>(0);
    }
    matmul.for_each_pair([&](int r, int c, float first, float second) {
        store_pair<Element>(p, row + r, column + c, first, second);
    });
    for (const Sum& sum : p.sums) add_partials<M::THREADS>(sum, block_id().x, grid_size().x);
}

template <class Math, class Tile, bool W_BY_K, bool ONE_PASS>
void launch_kernel(AugmentedMatmul p, Device device) {
    using M = Matmul<Math, Tile, W_BY_K, ONE_PASS>;
    using Element = typename M::Element;
    p.x = as_read<Element>(p.x);
    p.w = as_read<Element>(W_BY_K ? transposed(p.w) : p.w);
    p.b = as_read<Element>(W_BY_K ? transposed(p.b) : p.b);
    p.t = as_read<Element>(p.t);
    p.a = as_read<Element>(p.a);
    run(ONE_PASS ? "augmented_matmul_one_pass" : "augmented_matmul",
        &augmented_matmul_kernel<Math, Tile, W_BY_K, ONE_PASS>,
        {blocks(p.x.rows, M::BM) * blocks(p.y.columns, M::BN), 1, 1}, M::THREADS, M::SHARED_BYTES, p, device);
}

template <class Math, class Tile, bool ONE_PASS>
void launch_layout(const AugmentedMatmul& p, Device device) {
    if (p.w.row == 1) launch_kernel<Math, Tile, true, ONE_PASS>(p, device);
    else launch_kernel<Math, Tile, false, ONE_PASS>(p, device);
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
}

}  // namespace reslora

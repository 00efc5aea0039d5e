// dA = dhᵀ D(x) and dBᵀ = uᵀ dy in one launch: tall reductions over tokens, split into parts that whoever needs the sum
// adds in order. The mask of x is drawn once more and left as packed bits for the matmul that makes dx.
#include "elementwise.cuh"
#include "launch.cuh"

namespace reslora {
namespace {

constexpr int WIDTH = 128;  // columns of the stream in a block; a multiple of 32, so that every word of bits is written

template <class Math, int BR>
using Matmul = BlockMatmul<Math, BR, WIDTH, (BR < 64 ? 1 : 2), (BR < 64 ? 4 : 2), false, false, 4>;

// AS_IS: the streams are copied as they are.
template <class Math, int BR, bool AS_IS>
__global__ void __launch_bounds__(128, 1) low_rank_grads_kernel(const LowRankGrads p) {
    using M = Matmul<Math, BR>;
    const std::int64_t first = (p.products[0].columns + WIDTH - 1) / WIDTH;
    const bool second = block_id().x >= first;
    const OuterProduct& product = p.products[second];
    const std::int64_t rank = block_id().y * BR, column = (block_id().x - (second ? first : 0)) * WIDTH;
    if (rank >= product.rank) return;
    const std::int64_t part = block_id().z, start = part * p.split;
    const std::int64_t end = start + p.split < product.rows ? start + p.split : product.rows;
    const auto keep = [&](std::int64_t i, std::int64_t group, std::uint32_t bits) {
        if (product.keep && rank == 0 && i < end && group < product.keep_bytes)
            product.keep[i * product.keep_bytes + group] = static_cast<std::uint8_t>(bits);
    };
    if (product.partial == nullptr) {
        for (std::int64_t m = start; m < end; m += M::BK)
            drop<M::THREADS>(typename M::TileB{nullptr}, product.dropout, m, column, keep);
        return;
    }
    const int steps = M::steps_of(end - start);
    typename M::template StreamA<false> left_factor(product.t, rank, start);
    typename M::template StreamB<AS_IS> stream(product.stream, column, start);
    const auto copy = [&](int step, int stage) {
        if (step >= steps) return;
        const int left = static_cast<int>(end - start - static_cast<std::int64_t>(step) * M::BK);
        left_factor.copy(M::tile_a(stage), left);
        stream.copy(M::tile_b(stage), left);
    };
    M matmul;
    matmul.begin(copy);
    matmul.add(steps, copy, [&](int step, int stage) {
        if (product.dropout.seed == nullptr) return;
        const std::int64_t m = start + static_cast<std::int64_t>(step) * M::BK;
        drop<M::THREADS>(M::tile_b(stage), product.dropout, m, column, keep);
        barrier();
    });
    matmul.for_each_pair([&](int r, int c, float left, float right) {
        for (int e = 0; e < 2; ++e) {
            const std::int64_t i = rank + r, j = column + c + e;
            if (i >= product.rank || j >= product.columns) continue;
            const std::int64_t at = i * product.row + j * product.column;
            product.partial[part * product.rank * product.columns + at] = e ? right : left;
        }
    });
}

struct Sums {
    Sum sums[2];
};

__global__ void __launch_bounds__(128) finish_kernel(const Sums p) {
    for (const Sum& sum : p.sums) add_partials<128>(sum, block_id().x, grid_size().x);
}

template <class Math, int BR>
void launch_tile(LowRankGrads p, std::int64_t parts, Device device) {
    using M = Matmul<Math, BR>;
    std::int64_t columns = 0, rank = 1;
    bool as_is = true;
    for (OuterProduct& product : p.products) {
        product.t = as_read<typename M::Element>(product.t);
        product.stream = as_read<typename M::Element>(product.stream);
        as_is = as_is && (product.stream.data == nullptr || product.stream.access == COPIED);
        columns += blocks(product.columns, WIDTH);
        rank = product.rank > rank ? product.rank : rank;
    }
    run("low_rank_grads", as_is ? &low_rank_grads_kernel<Math, BR, true> : &low_rank_grads_kernel<Math, BR, false>,
        {columns, blocks(rank, BR), parts}, M::THREADS, M::SHARED_BYTES, p, device);
}

}  // namespace

void low_rank_grads(const LowRankGrads& p, Math math, std::int64_t parts, Device device) {
    const bool narrow = p.products[0].rank <= 16 && p.products[1].rank <= 16;
    with_math(math, [&](auto tag) {
        if (narrow) launch_tile<decltype(tag), 16>(p, parts, device);
        else launch_tile<decltype(tag), 64>(p, parts, device);
    });
}

void finish(const Sum& first, const Sum& second, Device device) {
    const std::int64_t wanted = blocks(first.size > second.size ? first.size : second.size, 128);
    run("finish", &finish_kernel, {wanted < device.processors ? wanted : device.processors, 1, 1}, 128, 0,
        Sums{{first, second}}, device);
}

}  // namespace reslora

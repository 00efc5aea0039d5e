// p = D(x) aᵀ: one pass over x, bound by bandwidth. In the backward pass x is dy and a is B_catᵀ.
// Few rows leave most of the GPU idle, so then K is split, and a second launch adds the parts in order.
#include "elementwise.cuh"
#include "launch.cuh"

namespace reslora {
namespace {

template <class Math, int BR, bool A_BY_K>
using Matmul = BlockMatmul<Math, 64, BR, (BR < 64 ? 4 : 2), (BR < 64 ? 1 : 2), true, A_BY_K, (BR < 64 ? 8 : 6)>;

// AS_IS: x is copied as it is.
template <class Math, int BR, bool A_BY_K, bool AS_IS>
__global__ void __launch_bounds__(128, 1) project_kernel(const Project p) {
    using M = Matmul<Math, BR, A_BY_K>;
    const std::int64_t row = block_id().x * M::BM, column = block_id().y * BR, part = block_id().z;
    const std::int64_t start = part * p.split, end = start + p.split < p.x.columns ? start + p.split : p.x.columns;
    const int steps = M::steps_of(end - start);
    typename M::template StreamA<AS_IS> x(p.x, row, start);
    typename M::template StreamB<false> a(p.a, column, start);
    const auto copy = [&](int step, int stage) {
        if (step >= steps) return;
        const int left = static_cast<int>(end - start - static_cast<std::int64_t>(step) * M::BK);
        x.copy(M::tile_a(stage), left);
        a.copy(M::tile_b(stage), left);
    };
    M matmul;
    matmul.begin(copy);
    matmul.add(steps, copy, [&](int step, int stage) {
        if (p.dropout.seed == nullptr) return;
        drop<M::THREADS>(M::tile_a(stage), p.dropout, row, start + static_cast<std::int64_t>(step) * M::BK,
                         [](std::int64_t, std::int64_t, std::uint32_t) {});
        barrier();
    });
    const std::int64_t rank = A_BY_K ? p.a.rows : p.a.columns;
    matmul.for_each_pair([&](int r, int c, float first, float second) {
        for (int e = 0; e < 2; ++e) {
            const std::int64_t i = row + r, j = column + c + e;
            if (i >= p.x.rows) continue;
            if (p.partial == nullptr) pass_on<typename M::Element>(p.side, i, j, e ? second : first, true);
            else if (j < rank) p.partial[(part * p.x.rows + i) * rank + j] = e ? second : first;
        }
    });
}

template <class Element>
__global__ void __launch_bounds__(128) finish_projection_kernel(const Project p) {
    const std::int64_t rank = p.a.rows, width = rank > p.side.inner.columns ? rank : p.side.inner.columns;
    const std::int64_t size = p.x.rows * width;
    for (std::int64_t at = block_id().x * 128 + thread_id(); at < size; at += grid_size().x * 128) {
        const std::int64_t row = at / width, column = at % width;
        float total = 0.0f;
        if (column < rank)
            for (std::int64_t part = 0; part < p.parts; ++part)
                total += p.partial[(part * p.x.rows + row) * rank + column];
        pass_on<Element>(p.side, row, column, total, true);
    }
}

template <class Math, int BR, bool A_BY_K>
void launch_tile(Project p, Device device) {
    using M = Matmul<Math, BR, A_BY_K>;
    const std::int64_t rank = p.a.rows, width = rank > p.side.inner.columns ? rank : p.side.inner.columns;
    p.x = as_read<typename M::Element>(p.x);
    p.a = as_read<typename M::Element>(A_BY_K ? p.a : transposed(p.a));
    const Grid grid{blocks(p.x.rows, M::BM), blocks(width, BR), p.parts};
    const auto kernel = p.x.access == COPIED ? &project_kernel<Math, BR, A_BY_K, true>
                                             : &project_kernel<Math, BR, A_BY_K, false>;
    run("project", kernel, grid, M::THREADS, M::SHARED_BYTES, p, device);
}

template <class Math>
void launch_math(const Project& p, Device device) {
    const bool by_k = p.a.column == 1 || p.a.row != 1, narrow = p.a.rows <= 16;
    if (narrow && by_k) launch_tile<Math, 16, true>(p, device);
    else if (narrow) launch_tile<Math, 16, false>(p, device);
    else if (by_k) launch_tile<Math, 64, true>(p, device);
    else launch_tile<Math, 64, false>(p, device);
}

}  // namespace

void project(const Project& p, Math math, Device device) {
    with_math(math, [&](auto tag) { launch_math<decltype(tag)>(p, device); });
    finish_projection(p, math, device);
}

void finish_projection(const Project& p, Math math, Device device) {
    if (p.partial == nullptr) return;
    with_math(math, [&](auto tag) {
        const std::int64_t wanted = blocks(p.x.rows * (p.a.rows + p.side.inner.columns), 128);
        run("finish_projection", &finish_projection_kernel<typename decltype(tag)::Element>,
            {wanted < device.processors ? wanted : device.processors, 1, 1}, 128, 0, p, device);
    });
}

}  // namespace reslora

// y = x w + bias + scale t b for Hopper in one pass: t = side.inner of x aᵀ, see params.h. As augmented_matmul_sm90.cu,
// but a narrow wgmma accumulates x aᵀ beside the main one from the same stages. After the last of them each consumer
// rounds scale t of its rows into its box of shared memory, and a stage with b alone makes the product on top.
#include "epilogue.cuh"
#include "launch.cuh"
#include "tiles_sm90.cuh"

namespace reslora {
namespace {

constexpr int ONE_PASS_RANK = 32;  // of a, and of b: at most

struct OnePassMatmul {
    TensorMap x, w, a, b, y;
    SideChannel side;
    const void* bias;
    float scale;
    int rows, columns, depth;  // M, N, K
    Sum sums[2];
};

template <class P>
RESLORA_DEVICE void produce(P pipeline, const OnePassMatmul& p) {
    for (Tiles tiles = Tiles::make<P>(p); tiles.left(); tiles.tile += tiles.stride) {
        int row, column;
        tiles.place<P>(row, column);
        for (int k = 0; k < p.depth; k += DEPTH) pipeline.fill(&p.x, &p.w, row, column, k, &p.a);
        pipeline.fill(nullptr, &p.b, row, column, 0);
    }
}

// Puts scale t [64, EXTRA], made of product, into the box, by k for wgmma; its rows begin at ``row``.
template <class P>
RESLORA_DEVICE void pass_rows_on(unsigned char* box, const float (&product)[P::EXTRA / 2], const OnePassMatmul& p,
                                 int row, bool first_column) {
    using Element = typename P::Element;
    struct alignas(4) Pair {
        Element element[2];
    };
    const int thread = thread_id() % WARPGROUP, lane = thread % 32, r = thread / 32 * 16 + lane / 4;
    RESLORA_UNROLL
    for (int j = 0; j < P::EXTRA / 8; ++j) {
        RESLORA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int i = row + r + 8 * half;
            Pair pair;
            RESLORA_UNROLL
            for (int e = 0; e < 2; ++e) {
                float value = 0.0f;
                if (i < p.rows)
                    value = pass_on<Element>(p.side, i, 8 * j + lane % 4 * 2 + e, product[4 * j + 2 * half + e],
                                             first_column);
                from_float(pair.element[e], value * p.scale);
            }
            *reinterpret_cast<Pair*>(box + (r + 8 * half) * LINE + (j ^ (r % 8)) * 16 + lane % 4 * 4) = pair;
        }
    }
}

template <class P>
RESLORA_DEVICE void consume(P pipeline, const OnePassMatmul& p, int consumer) {
    const int thread = thread_id() % WARPGROUP, first_row = 64 * consumer;
    const int steps = (p.depth + DEPTH - 1) / DEPTH;
    for (Tiles tiles = Tiles::make<P>(p); tiles.left(); tiles.tile += tiles.stride) {
        int row, column;
        tiles.place<P>(row, column);
        row += first_row;
        float acc[1][P::BN / 2] = {}, product[P::EXTRA / 2] = {};
        int previous = -1;
        RESLORA_KEEP_LOOP
        for (int step = 0; step < steps; ++step) {
            pipeline.multiply_both(acc, product, first_row);
            wgmma_wait<1>();  // of the stage before
            if (previous >= 0) pipeline.release(previous);
            previous = pipeline.ring.stage;
            pipeline.ring.advance();
        }
        wgmma_wait<0>();
        pipeline.release(previous);
        unsigned char* box = pipeline.store_box(consumer, 0);
        if (thread == 0) tma_store_wait_read<0>();  // of the tile before
        named_barrier(1 + consumer, WARPGROUP);
        pass_rows_on<P>(box, product, p, row, column == 0);
        fence_async_shared();
        named_barrier(1 + consumer, WARPGROUP);
        mbarrier_wait(pipeline.full(pipeline.ring.stage), pipeline.ring.parity);
        const std::uint64_t left = wgmma_descriptor(box, 16, EIGHT_LINES);
        const std::uint64_t right = wgmma_descriptor(pipeline.b(pipeline.ring.stage), 16, EIGHT_LINES);
        wgmma_fence();
        RESLORA_UNROLL
        for (int k = 0; k < P::EXTRA / 16; ++k)
            wgmma<P::BN, false>(acc[0], descriptor_after(left, k * 32), descriptor_after(right, k * 32),
                                typename P::Element{});
        wgmma_commit();
        wgmma_wait<0>();
        pipeline.release(pipeline.ring.stage);
        pipeline.ring.advance();
        store(pipeline, acc[0], p, consumer, row, column);
    }
    for (const Sum& sum : p.sums) add_partials<2 * WARPGROUP>(sum, block_id().x, grid_size().x);
    if (thread == 0) tma_store_wait_read<0>();
}

template <class P>
__global__ void __launch_bounds__(P::THREADS, 1)
    augmented_matmul_one_pass_hopper_kernel(const __grid_constant__ OnePassMatmul p) {
    play_roles<P>(p);
}

template <class Element>
void launch_kernel(const AugmentedMatmul& p, Device device) {
    using P = Pipeline<Element, true, false, 1, ONE_PASS_RANK>;
    const Matrix y{p.y.data, p.y.columns, 1, p.x.rows, p.y.columns, p.y.type, COPIED};
    const OnePassMatmul params{map_of(p.x, P::BM), map_of(transposed(p.w), P::B_BOX_ROWS), map_of(p.a, P::EXTRA),
                               map_of(transposed(p.b), P::B_BOX_ROWS), map_of(y, 64), p.side, p.bias, p.scale,
                               static_cast<int>(p.x.rows), static_cast<int>(p.y.columns),
                               static_cast<int>(p.x.columns), {p.sums[0], p.sums[1]}};
    const std::int64_t tiles = blocks(p.x.rows, P::BM) * blocks(p.y.columns, P::BN);
    run("augmented_matmul_one_pass_hopper", &augmented_matmul_one_pass_hopper_kernel<P>,
        {tiles < device.processors ? tiles : device.processors, 1, 1}, P::THREADS, P::SHARED_BYTES, params, device,
        1, true);
}

}  // namespace

void augmented_matmul_one_pass_sm90(const AugmentedMatmul& p, Math math, Device device) {
    if (math == MATH_BFLOAT16) launch_kernel<Bf16>(p, device);
    else launch_kernel<Fp16>(p, device);
}

}  // namespace reslora

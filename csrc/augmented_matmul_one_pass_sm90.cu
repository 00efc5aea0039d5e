// y = x w + bias + scale t b for Hopper in one pass: t = side.inner of x aᵀ, see params.h. As augmented_matmul_sm90.cu,
// but a narrow wgmma accumulates x aᵀ beside the main one from the same stages, and the product with b is one stage more,
// whose x is scale t. Of two blocks side by side, which have the same x, each makes t of 64 rows only, and has the copy
// engine bring it to the other. So the tensor cores do EXTRA / 512 more than for y alone, instead of EXTRA / 256.
#include "elementwise.cuh"
#include "launch.cuh"
#include "tiles_sm90.cuh"

namespace reslora {
namespace {

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
        tiles.place(pipeline, row, column);
        for (int k = 0; k < p.depth; k += DEPTH) pipeline.fill(&p.x, &p.w, row, column, k, &p.a);
        pipeline.fill_b(&p.b, column, P::ACROSS > 1 ? SQUARE : 0);
    }
}

// Puts scale t [64, EXTRA], made of product, where x lies in a stage; its rows begin at ``row``.
template <class P>
RESLORA_DEVICE void pass_rows_on(unsigned char* lines, const float (&product)[P::EXTRA / 2], const OnePassMatmul& p,
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
            *reinterpret_cast<Pair*>(lines + (r + 8 * half) * LINE + (j ^ (r % 8)) * 16 + lane % 4 * 4) = pair;
        }
    }
}

// NARROW: this consumer makes t of its 64 rows; else that comes from the block beside.
template <bool NARROW, class P>
RESLORA_DEVICE void multiply_tiles(P pipeline, const OnePassMatmul& p, int consumer) {
    const int thread = thread_id() % WARPGROUP, first_row = 64 * consumer;
    const int steps = (p.depth + DEPTH - 1) / DEPTH;
    for (Tiles tiles = Tiles::make<P>(p); tiles.left(); tiles.tile += tiles.stride) {
        int row, column;
        tiles.place(pipeline, row, column);
        row += first_row;
        float acc[1][P::BN / 2] = {};
        [[maybe_unused]] float product[P::EXTRA / 2] = {};
        int previous = -1;
        RESLORA_KEEP_LOOP
        for (int step = 0; step < steps; ++step) {
            if constexpr (NARROW) pipeline.multiply_both(acc, product, first_row);
            else pipeline.multiply(acc, first_row);
            wgmma_wait<1>();  // of the stage before
            if (previous >= 0) pipeline.release(previous);
            previous = pipeline.ring.stage;
            pipeline.ring.advance();
        }
        wgmma_wait<0>();
        pipeline.release(previous);
        const int stage = pipeline.ring.stage;
        if constexpr (NARROW) {
            unsigned char* lines = pipeline.a(stage) + first_row * LINE;
            pipeline.await_empty();  // here, and so in the block beside
            pass_rows_on<P>(lines, product, p, row, column < P::ACROSS * P::BN);
            fence_async_shared();
            named_barrier(1 + consumer, WARPGROUP);
            if (P::ACROSS > 1 && thread == 0) copy_to_block(lines, SQUARE, pipeline.full(stage), pipeline.rank ^ 1);
        }
        pipeline.template multiply<P::EXTRA / 16>(acc, first_row);
        wgmma_wait<0>();
        pipeline.release(stage);
        pipeline.ring.advance();
        store(pipeline, acc[0], p, consumer, row, column);
    }
}

template <class P>
RESLORA_DEVICE void consume(P pipeline, const OnePassMatmul& p, int consumer) {
    if (P::ACROSS == 1 || consumer == pipeline.across()) multiply_tiles<true>(pipeline, p, consumer);
    else multiply_tiles<false>(pipeline, p, consumer);
    for (const Sum& sum : p.sums) add_partials<2 * WARPGROUP>(sum, block_id().x, grid_size().x);
    if (thread_id() % WARPGROUP == 0) tma_store_wait_read<0>();
}

template <class P>
__global__ void __launch_bounds__(P::THREADS, 1)
    augmented_matmul_one_pass_hopper_kernel(const __grid_constant__ OnePassMatmul p) {
    play_roles<P>(p);
}

template <class P>
void launch_kernel(const AugmentedMatmul& p, Device device) {
    const Matrix w = P::W_BY_K ? transposed(p.w) : p.w, b = P::W_BY_K ? transposed(p.b) : p.b;
    const Matrix y{p.y.data, p.y.columns, 1, p.x.rows, p.y.columns, p.y.type, COPIED};
    const OnePassMatmul params{map_of(p.x, P::A_BOX_ROWS), map_of(w, P::B_BOX_ROWS), map_of(p.a, P::EXTRA_BOX_ROWS),
                               map_of(b, P::B_BOX_ROWS), map_of(y, 64), p.side, p.bias, p.scale,
                               static_cast<int>(p.x.rows), static_cast<int>(p.y.columns),
                               static_cast<int>(p.x.columns), {p.sums[0], p.sums[1]}};
    run_tiles<P>("augmented_matmul_one_pass_hopper", &augmented_matmul_one_pass_hopper_kernel<P>, params, device);
}

template <class Element, bool W_BY_K, int EXTRA>
void launch_variant(const AugmentedMatmul& p, Hopper variant, Device device) {
    switch (variant) {
        case ONE_PASS_PAIR: return launch_kernel<Pipeline<Element, W_BY_K, false, 1, EXTRA, 2>>(p, device);
        case ONE_PASS_QUAD: return launch_kernel<Pipeline<Element, W_BY_K, false, 2, EXTRA, 2>>(p, device);
        default: return launch_kernel<Pipeline<Element, W_BY_K, false, 1, EXTRA>>(p, device);
    }
}

template <class Element, bool W_BY_K>
void launch_width(const AugmentedMatmul& p, Hopper variant, Device device) {
    const std::int64_t width = p.a.rows > p.side.inner.columns ? p.a.rows : p.side.inner.columns;
    if (width <= 16) return launch_variant<Element, W_BY_K, 16>(p, variant, device);
    if (width <= 32) return launch_variant<Element, W_BY_K, 32>(p, variant, device);
    launch_variant<Element, W_BY_K, 64>(p, variant, device);
}

template <class Element>
void launch_layout(const AugmentedMatmul& p, Hopper variant, Device device) {
    if (p.w.row == 1) launch_width<Element, true>(p, variant, device);
    else launch_width<Element, false>(p, variant, device);
}

}  // namespace

void augmented_matmul_one_pass_sm90(const AugmentedMatmul& p, Math math, Hopper variant, Device device) {
    if (math == MATH_BFLOAT16) launch_layout<Bf16>(p, variant, device);
    else launch_layout<Fp16>(p, variant, device);
}

}  // namespace reslora

// y = x w + bias + keep * (scale t b) for Hopper, in two-byte types: see params.h. Persistent blocks; one thread has the
// copy engine fill stages of shared memory, two warpgroups multiply them with wgmma. As for sm_80 the low-rank product
// is the first thing in the accumulator, scaled and masked there in float32, and the main loop adds x w on top.
#include "elementwise.cuh"
#include "launch.cuh"
#include "tiles_sm90.cuh"

namespace reslora {
namespace {

struct HopperMatmul {
    TensorMap x, w, t, b, y;
    const void* bias;
    const std::uint32_t* keep;
    std::int64_t keep_words;
    float scale;
    int rows, columns, depth, rank;  // M, N, K, R
    Sum sums[2];
};

template <class P>
RESLORA_DEVICE void produce(P pipeline, const HopperMatmul& p) {
    for (Tiles tiles = Tiles::make<P>(p, static_cast<int>(grid_size().x)); tiles.left(); tiles.tile += tiles.stride) {
        int row, column;
        tiles.place(pipeline, row, column);
        for (int k = 0; k < p.rank; k += DEPTH) pipeline.fill(&p.t, &p.b, row, column, k);
        for (int k = 0; k < p.depth; k += DEPTH) pipeline.fill(&p.x, &p.w, row, column, k);
    }
}

// acc = keep * (scale acc); this thread has rows row and row + 8, and of every eight columns two neighbours.
template <int BN>
RESLORA_DEVICE void scale_and_mask(float (&acc)[BN / 2], const HopperMatmul& p, int row, int column, int lane) {
    RESLORA_UNROLL
    for (int half = 0; half < 2; ++half) {
        const std::int64_t i = row + 8 * half;
        RESLORA_UNROLL
        for (int word = 0; word < BN / 32; ++word) {
            const std::int64_t at = column / 32 + word;
            std::uint32_t bits = 0xFFFFFFFFu;
            if (p.keep && i < p.rows && at < p.keep_words) bits = p.keep[i * p.keep_words + at];
            bits >>= lane % 4 * 2;
            RESLORA_UNROLL
            for (int e = 0; e < 8; ++e) {
                float& value = acc[16 * word + e / 2 * 4 + half * 2 + e % 2];
                value = bits >> (e / 2 * 8 + e % 2) & 1u ? value * p.scale : 0.0f;
            }
        }
    }
}

template <class P>
RESLORA_DEVICE void consume(P pipeline, const HopperMatmul& p, int consumer) {
    const int thread = thread_id() % WARPGROUP, r = thread / 32 * 16 + thread % 32 / 4;
    const int first_row = P::PING_PONG ? 0 : 64 * consumer;
    const int low_rank_steps = (p.rank + DEPTH - 1) / DEPTH, steps = (p.depth + DEPTH - 1) / DEPTH;
    Tiles tiles = Tiles::make<P>(p, static_cast<int>(grid_size().x));
    if (P::PING_PONG && consumer == 1) {
        pipeline.ring.advance(low_rank_steps + steps);
        tiles.tile += tiles.stride;
    }
    for (int count = 0; tiles.left(); ++count) {
        int row, column;
        tiles.place(pipeline, row, column);
        row += first_row;
        float acc[P::BLOCKS][P::BN / 2] = {};
        pipeline.await_turn(consumer, count);
        RESLORA_KEEP_LOOP
        for (int k = 0; k < p.rank; k += DEPTH) {
            pipeline.multiply_part(acc, first_row, p.rank - k < DEPTH ? (p.rank - k + 15) / 16 : DEPTH / 16);
            wgmma_wait<0>();
            pipeline.release(pipeline.ring.stage);
            pipeline.ring.advance();
        }
        RESLORA_UNROLL
        for (int block = 0; block < P::BLOCKS; ++block)
            scale_and_mask<P::BN>(acc[block], p, row + 64 * block + r, column, thread % 32);
        int previous = -1;
        RESLORA_KEEP_LOOP
        for (int step = 0; step < steps; ++step) {
            pipeline.multiply(acc, first_row);
            wgmma_wait<1>();  // of the stage before
            if (previous >= 0) pipeline.release(previous);
            previous = pipeline.ring.stage;
            pipeline.ring.advance();
        }
        pipeline.pass_turn(consumer);
        const Bias<P> bias(p, column);
        wgmma_wait<0>();
        pipeline.release(previous);
        RESLORA_UNROLL
        for (int block = 0; block < P::BLOCKS; ++block)
            store<P::STORE_BOXES>(pipeline, acc[block], bias, p, consumer, row + 64 * block, column);
        if constexpr (P::PING_PONG) pipeline.ring.advance(low_rank_steps + steps);
        tiles.tile += (P::PING_PONG ? 2 : 1) * tiles.stride;
    }
    for (const Sum& sum : p.sums) add_partials<2 * WARPGROUP>(sum, block_id().x, grid_size().x);
    if (thread == 0) tma_store_wait_read<0>();
}

template <class P>
__global__ void __launch_bounds__(P::THREADS, 1) augmented_matmul_hopper_kernel(const __grid_constant__ HopperMatmul p) {
    play_roles<P>(p);
}

template <class P>
void launch_kernel(const AugmentedMatmul& p, Device device) {
    const Matrix w = P::W_BY_K ? transposed(p.w) : p.w, b = P::W_BY_K ? transposed(p.b) : p.b;
    const Matrix y{p.y.data, p.y.columns, 1, p.x.rows, p.y.columns, p.y.type, COPIED};
    const HopperMatmul params{map_of(p.x, P::BM), map_of(w, P::B_BOX_ROWS), map_of(p.t, P::BM),
                              map_of(b, P::B_BOX_ROWS), map_of(y, 64), p.bias, p.keep, p.keep_words, p.scale, static_cast<int>(p.x.rows),
                              static_cast<int>(p.y.columns), static_cast<int>(p.x.columns),
                              static_cast<int>(p.t.columns), {p.sums[0], p.sums[1]}};
    const auto kernel = &augmented_matmul_hopper_kernel<P>;
    const std::int64_t tiles = tiles_of<P>(p.x.rows, p.y.columns), room = room_for<P>(kernel, device);
    run("augmented_matmul_hopper", kernel, {tiles < room ? tiles : room, 1, 1}, P::THREADS, P::SHARED_BYTES, params, device,
        P::DOWN, true);
}

template <class Element, bool W_BY_K>
void launch_variant(const AugmentedMatmul& p, Hopper variant, Device device) {
    switch (variant) {
        case COOPERATIVE: return launch_kernel<Pipeline<Element, W_BY_K, false, 1>>(p, device);
        case COOPERATIVE_PAIR: return launch_kernel<Pipeline<Element, W_BY_K, false, 2>>(p, device);
        default: return launch_kernel<Pipeline<Element, W_BY_K, true, 1>>(p, device);
    }
}

template <class Element>
void launch_layout(const AugmentedMatmul& p, Hopper variant, Device device) {
    if (p.w.row == 1) launch_variant<Element, true>(p, variant, device);
    else launch_variant<Element, false>(p, variant, device);
}

}  // namespace

void augmented_matmul_sm90(const AugmentedMatmul& p, Math math, Hopper variant, Device device) {
    if (p.a.data) return augmented_matmul_one_pass_sm90(p, math, device);
    if (math == MATH_BFLOAT16) launch_layout<Bf16>(p, variant, device);
    else launch_layout<Fp16>(p, variant, device);
}

}  // namespace reslora

// y = x w + bias + scale t b for Hopper in one pass: t = side.inner of x aᵀ, see params.h. As augmented_matmul_sm90.cu,
// but in the first tile of each row of tiles a narrow wgmma accumulates x aᵀ beside the main one from the same stages, and
// the product with b is one stage more, whose x is scale t; all other tiles of the row fetch that from global memory.
// Where the tiles leave blocks free, those make dA and dB meanwhile: strips_sm90.cuh.
#include "elementwise.cuh"
#include "launch.cuh"
#include "strips_sm90.cuh"
#include "tiles_sm90.cuh"

namespace reslora {
namespace {

// What blocks of a launch tell each other; zero before it and after it.
struct Progress {
    // For each BM rows how many warps have put their part of t there; then how many tiles are taken, and how many blocks
    // have ended.
    std::uint32_t* words;
    int rows;  // of tiles; 0: nothing waits for t

    // A tile waits only for one that was taken before it, so by a block that runs, and that waits for nothing: all comes to
    // its end however few blocks run at a time.
    RESLORA_DEVICE int take(int otherwise) const {
        return rows ? static_cast<int>(take_global(words + rows)) : otherwise;
    }
    RESLORA_DEVICE void publish(int row) const { release_global(words + row, 1); }
    RESLORA_DEVICE void await(int row) const {
        await_global(words + row, 2 * WARPGROUP / 32);
        fence_async_global();
    }
    // By all threads of a block, behind whatever they do: the last block leaves all words as it found them.
    RESLORA_DEVICE void end(std::uint32_t* shared_word) const {
        if (rows == 0) return;
        barrier();
        if (thread_id() == 0) *shared_word = add_global(words + rows + 1, 1);
        barrier();
        if (*shared_word + 1 != static_cast<std::uint32_t>(grid_size().x)) return;
        for (int i = thread_id(); i <= rows + 1; i += 3 * WARPGROUP) words[i] = 0;
    }
};

struct OnePassMatmul {
    TensorMap x, w, a, b, t, y;
    void* scaled;  // t, by all columns
    Progress progress;
    StripsOf strips[2];
    SideChannel side;
    const void* bias;
    float scale;
    int rows, columns, depth;  // M, N, K
    int blocks;                // that multiply; those behind them make strips
};

template <class P>
RESLORA_DEVICE void produce(P pipeline, const OnePassMatmul& p) {
    Tiles tiles = Tiles::make<P>(p, p.blocks);
    tiles.tile = p.progress.take(tiles.tile);
    for (int next; tiles.left(); tiles.tile = next) {
        next = p.progress.take(tiles.tile + tiles.stride);  // it comes while this one is loaded
        int row, column;
        const bool first = tiles.place_first_column_first(pipeline, row, column);
        pipeline.announce(tiles.tile);
        for (int k = 0; k < p.depth; k += DEPTH) pipeline.fill(&p.x, &p.w, row, column, k, first ? &p.a : nullptr);
        if (first) {
            pipeline.fill_b(&p.b, column);
        } else {
            p.progress.await(row / P::BM);
            pipeline.fill(&p.t, &p.b, row, column, 0);
        }
    }
    pipeline.announce(-1);
    mbarrier_arrive(pipeline.full(pipeline.ring.stage));
}

// Puts scale t [64, EXTRA], made of product, where x lies in a stage, and where others find it; its rows begin at ``row``.
template <class P>
RESLORA_DEVICE void pass_rows_on(unsigned char* lines, const float (&product)[P::EXTRA / 2], const OnePassMatmul& p,
                                 int row) {
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
                    value = pass_on<Element>(p.side, i, 8 * j + lane % 4 * 2 + e, product[4 * j + 2 * half + e], true);
                from_float(pair.element[e], value * p.scale);
            }
            *reinterpret_cast<Pair*>(lines + (r + 8 * half) * LINE + (j ^ (r % 8)) * 16 + lane % 4 * 4) = pair;
            if (p.progress.rows && i < p.rows)
                static_cast<Pair*>(p.scaled)[(static_cast<std::int64_t>(i) * P::EXTRA + 8 * j + lane % 4 * 2) / 2] = pair;
        }
    }
    if (p.progress.rows == 0) return;
    fence_async_global();
    warp_barrier();
    if (lane == 0) p.progress.publish(row / P::BM);
}

template <class P>
RESLORA_DEVICE void consume(P pipeline, const OnePassMatmul& p, int consumer) {
    const int thread = thread_id() % WARPGROUP, first_row = 64 * consumer;
    const int steps = (p.depth + DEPTH - 1) / DEPTH;
    Tiles tiles = Tiles::make<P>(p, p.blocks);
    while ((tiles.tile = pipeline.announced()) >= 0) {
        int row, column;
        const bool first = tiles.place_first_column_first(pipeline, row, column);
        row += first_row;
        float acc[1][P::BN / 2] = {};
        int previous = -1;
        const auto pass = [&] {
            wgmma_wait<1>();  // of the stage before
            if (previous >= 0) pipeline.release(previous);
            previous = pipeline.ring.stage;
            pipeline.ring.advance();
        };
        if (first) {
            float product[P::EXTRA / 2] = {};
            RESLORA_KEEP_LOOP
            for (int step = 0; step < steps; ++step) {
                pipeline.multiply_both(acc, product, first_row);
                pass();
            }
            wgmma_wait<0>();
            pipeline.release(previous);
            previous = -1;
            pipeline.await_empty();
            pass_rows_on<P>(pipeline.a(pipeline.ring.stage) + first_row * LINE, product, p, row);
            fence_async_shared();
            named_barrier(1 + consumer, WARPGROUP);
        } else {
            RESLORA_KEEP_LOOP
            for (int step = 0; step < steps; ++step) {
                pipeline.multiply(acc, first_row);
                pass();
            }
        }
        pipeline.template multiply<P::EXTRA / 16>(acc, first_row);
        const Bias<P> bias(p, column);
        pass();
        wgmma_wait<0>();
        pipeline.release(previous);
        if (first) store<1>(pipeline, acc[0], bias, p, consumer, row, column);
        else store<P::STORE_BOXES>(pipeline, acc[0], bias, p, consumer, row, column);
    }
    if (thread == 0) tma_store_wait_read<0>();
}

template <class P>
__global__ void __launch_bounds__(P::THREADS, 1)
    augmented_matmul_one_pass_hopper_kernel(const __grid_constant__ OnePassMatmul p) {
    const int block = static_cast<int>(block_id().x);
    if (block < p.blocks) {
        play_roles<P>(p);
    } else {
        grid_dependency_wait();
        add_strips<typename P::Element>(p.strips, p.rows, block - p.blocks, static_cast<int>(grid_size().x) - p.blocks,
                                        [&](int row) { p.progress.await(row / P::BM); });
    }
    p.progress.end(reinterpret_cast<std::uint32_t*>(P::make().full(P::BARRIERS)));
}

StripsOf strips_of(const Strips& strips, const Matrix& t) {
    if (!strips.stream.data) return {};
    return {map_of(strips.stream, DEPTH), map_of(t, DEPTH), strips.out, strips.column, strips.rank,
            static_cast<int>(strips.stream.columns), static_cast<int>(t.columns), strips.scale};
}

template <class P>
void launch_kernel(const AugmentedMatmul& p, Device device) {
    const Matrix w = P::W_BY_K ? transposed(p.w) : p.w, b = P::W_BY_K ? transposed(p.b) : p.b;
    const Matrix y{p.y.data, p.y.columns, 1, p.x.rows, p.y.columns, p.y.type, COPIED};
    const Matrix t{p.scaled, P::EXTRA, 1, p.x.rows, P::EXTRA, p.x.type, COPIED};
    Matrix made = t;
    made.columns = p.side.inner.columns;
    const auto kernel = &augmented_matmul_one_pass_hopper_kernel<P>;
    const std::int64_t tiles = tiles_of<P>(p.x.rows, p.y.columns), room = room_for<P>(kernel, device) - p.strip_blocks;
    const std::int64_t count = tiles < room ? tiles : room;
    const bool waits = p.y.columns > P::BN || p.strips[1].stream.data;
    const int rows = waits ? static_cast<int>(blocks(p.x.rows, P::BM)) : 0;
    const OnePassMatmul params{map_of(p.x, P::BM), map_of(w, P::B_BOX_ROWS), map_of(p.a, P::EXTRA),
                               map_of(b, P::B_BOX_ROWS), map_of(t, P::BM), map_of(y, 64), p.scaled,
                               {progress_words(rows + 2, device), rows},
                               {strips_of(p.strips[0], p.strips[0].t), strips_of(p.strips[1], made)}, p.side, p.bias,
                               p.scale, static_cast<int>(p.x.rows), static_cast<int>(p.y.columns),
                               static_cast<int>(p.x.columns), static_cast<int>(count)};
    constexpr int STRIPS = StripPipeline<typename P::Element>::SHARED_BYTES;
    run("augmented_matmul_one_pass_hopper", kernel, {count + p.strip_blocks, 1, 1}, P::THREADS,
        P::SHARED_BYTES > STRIPS ? P::SHARED_BYTES : STRIPS, params, device, 1, true, true);
}

template <class Element, bool W_BY_K>
void launch_width(const AugmentedMatmul& p, Device device) {
    const std::int64_t width = p.a.rows > p.side.inner.columns ? p.a.rows : p.side.inner.columns;
    if (width <= 16) return launch_kernel<Pipeline<Element, W_BY_K, false, 1, 16>>(p, device);
    if (width <= 32) return launch_kernel<Pipeline<Element, W_BY_K, false, 1, 32>>(p, device);
    launch_kernel<Pipeline<Element, W_BY_K, false, 1, 64>>(p, device);
}

template <class Element>
void launch_layout(const AugmentedMatmul& p, Device device) {
    if (p.w.row == 1) launch_width<Element, true>(p, device);
    else launch_width<Element, false>(p, device);
}

}  // namespace

void augmented_matmul_one_pass_sm90(const AugmentedMatmul& p, Math math, Device device) {
    if (math == MATH_BFLOAT16) launch_layout<Bf16>(p, device);
    else launch_layout<Fp16>(p, device);
}

}  // namespace reslora

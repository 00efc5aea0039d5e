// out = streamᵀ t for sm_90a, by the blocks of a launch that its matmul leaves free: dA of x and dh, dB of dy and u. A
// block takes 256 columns of the stream at a time, half for each of two warpgroups, all rows of them in order, so that
// nothing is left to be added. As in the matmul one thread has the copy engine fill stages; almost all of shared memory is
// under way.
#pragma once
#include "elementwise.cuh"
#include "launch.cuh"
#include "pipeline_sm90.cuh"

namespace reslora {

struct StripsOf {
    TensorMap stream, t;
    Output out;
    std::int64_t column, rank;  // steps in out
    int columns, ranks;
    float scale;
};

template <class Element>
struct StripPipeline {
    static constexpr int WIDTH = 128, COLUMNS = 2 * WIDTH, BOXES = COLUMNS / DEPTH;
    static constexpr int STAGES = 5, STAGE_BYTES = (BOXES + 1) * SQUARE;  // 64 rows of the stream and of t
    static constexpr int BARRIERS_AT = STAGES * STAGE_BYTES;
    static constexpr int SHARED_BYTES = EIGHT_LINES + BARRIERS_AT + 2 * STAGES * static_cast<int>(sizeof(Barrier));
    static_assert(SHARED_BYTES <= MOST_SHARED_BYTES);

    unsigned char* base;
    Ring<STAGES> ring;

    RESLORA_DEVICE static StripPipeline make() {
        const StripPipeline made{swizzled_memory(), {}};
        if (thread_id() == 0) {
            for (int stage = 0; stage < STAGES; ++stage) {
                mbarrier_init(made.full(stage), 1);
                mbarrier_init(made.empty(stage), 2 * WARPGROUP / 32);
            }
            fence_barrier_init();
        }
        barrier();
        return made;
    }
    RESLORA_DEVICE unsigned char* box(int i) const { return base + ring.stage * STAGE_BYTES + i * SQUARE; }
    RESLORA_DEVICE Barrier* full(int stage) const { return reinterpret_cast<Barrier*>(base + BARRIERS_AT) + stage; }
    RESLORA_DEVICE Barrier* empty(int stage) const { return full(stage) + STAGES; }
    // By the producer.
    RESLORA_DEVICE void fill(const StripsOf& strips, int column, int row) {
        Barrier* arrived = full(ring.stage);
        mbarrier_wait(empty(ring.stage), ring.parity ^ 1);
        mbarrier_expect(arrived, STAGE_BYTES);
        RESLORA_UNROLL
        for (int i = 0; i < BOXES; ++i) tma_load(box(i), &strips.stream, column + i * DEPTH, row, arrived);
        tma_load(box(BOXES), &strips.t, 0, row, arrived);
        ring.advance();
    }
    // By a consumer: begins acc [64 ranks, WIDTH] += tᵀ stream of its half.
    RESLORA_DEVICE void multiply(float (&acc)[WIDTH / 2], int consumer) const {
        const std::uint64_t left = wgmma_descriptor(box(BOXES), SQUARE, EIGHT_LINES);
        const std::uint64_t right = wgmma_descriptor(box(consumer * (WIDTH / DEPTH)), SQUARE, EIGHT_LINES);
        mbarrier_wait(full(ring.stage), ring.parity);
        wgmma_fence();
        RESLORA_UNROLL
        for (int step = 0; step < DEPTH / 16; ++step)
            wgmma<WIDTH, true, true>(acc, descriptor_after(left, step * 16 * LINE),
                                     descriptor_after(right, step * 16 * LINE), Element{});
        wgmma_commit();
    }
    RESLORA_DEVICE void release(int stage) const {
        if (thread_id() % 32 == 0) mbarrier_arrive(empty(stage));
    }
};

// By a block that is number ``block`` of ``blocks``. ``await(row)``, by one thread: t of the second is there for 128 rows
// from that multiple of 128 on.
template <class Element, class Await>
RESLORA_DEVICE void add_strips(const StripsOf (&every)[2], int rows, int block, int blocks, Await await) {
    using P = StripPipeline<Element>;
    P pipeline = P::make();
    const int role = thread_id() / WARPGROUP, thread = thread_id() % WARPGROUP;
    const int first = (every[0].columns + P::COLUMNS - 1) / P::COLUMNS;
    const int all = first + (every[1].columns + P::COLUMNS - 1) / P::COLUMNS;
    for (int part = block; part < all; part += blocks) {
        const bool second = part >= first;
        const StripsOf& strips = every[second];
        const int column = (part - (second ? first : 0)) * P::COLUMNS;
        if (role == PRODUCER) {
            if (thread > 0) return;
            for (int row = 0; row < rows; row += DEPTH) {
                if (second && row % 128 == 0) await(row);
                pipeline.fill(strips, column, row);
            }
            continue;
        }
        float acc[P::WIDTH / 2] = {};
        int previous = -1;
        RESLORA_KEEP_LOOP
        for (int row = 0; row < rows; row += DEPTH) {
            pipeline.multiply(acc, role);
            wgmma_wait<1>();  // of the stage before
            if (previous >= 0) pipeline.release(previous);
            previous = pipeline.ring.stage;
            pipeline.ring.advance();
        }
        wgmma_wait<0>();
        pipeline.release(previous);
        RESLORA_UNROLL
        for (int at = 0; at < P::WIDTH / 2; ++at) {
            const int r = thread / 32 * 16 + thread % 32 / 4 + at / 2 % 2 * 8;
            const int c = column + role * P::WIDTH + at / 4 * 8 + thread % 4 * 2 + at % 2;
            if (c < strips.columns && r < strips.ranks)
                store_float(strips.out, c * strips.column + r * strips.rank, acc[at] * strips.scale);
        }
    }
}

}  // namespace reslora

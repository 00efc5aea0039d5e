// How one producer thread and the consumer warpgroups of sm_90a pass stages of shared memory to each other, and where
// the operands of wgmma lie in a stage.
#pragma once
#include "ptx_sm90.cuh"

namespace reslora {

constexpr int LINE = 128;                    // bytes of a swizzled row: 64 elements
constexpr int DEPTH = LINE / 2;              // k in a stage
constexpr int EIGHT_LINES = 8 * LINE;        // after which the swizzle repeats
constexpr int SQUARE = DEPTH * LINE;         // bytes of a 64 x 64 box
constexpr int WARPGROUP = 128;
constexpr int MOST_SHARED_BYTES = 232448;    // that a block can have

enum Role : int { FIRST_CONSUMER, SECOND_CONSUMER, PRODUCER };  // by warpgroup

// Shared memory from the first place on where the swizzle begins: up to EIGHT_LINES further than its start.
RESLORA_DEVICE unsigned char* swizzled_memory() {
    unsigned char* memory = shared_memory();
    const unsigned over = static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(memory) % EIGHT_LINES);
    return memory + (EIGHT_LINES - over) % EIGHT_LINES;
}

// The next stage to fill or to drain, and the parity of the round in which it is.
template <int STAGES>
struct Ring {
    int stage = 0, parity = 0;

    RESLORA_DEVICE void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
    RESLORA_DEVICE void advance(int steps) {
        stage += steps;
        parity ^= stage / STAGES & 1;
        stage %= STAGES;
    }
};

// PING_PONG: the two consumers take tiles of [128, 128] in turn, so that one multiplies while the other stores. Else
// they share a tile of [128, 256], 64 rows each. In a cluster DOWN blocks, one below the other, share the tile of w. EXTRA
// rows of another matrix, which lie by k, come with each stage of x and w of some tiles and are multiplied with the same x.
template <class Element_, bool W_BY_K_, bool PING_PONG_, int DOWN_, int EXTRA_ = 0>
struct Pipeline {
    using Element = Element_;
    static constexpr bool W_BY_K = W_BY_K_, PING_PONG = PING_PONG_;
    static constexpr int DOWN = DOWN_, EXTRA = EXTRA_;
    static constexpr int BM = 128, BN = PING_PONG ? 128 : 256;
    static constexpr int GROUP = PING_PONG ? 8 : 16;  // rows of tiles that are walked together: x and w in equal parts
    static constexpr int BLOCKS = PING_PONG ? 2 : 1;  // of 64 rows, for each consumer
    static constexpr int EXTRA_BYTES = EXTRA * LINE;  // [EXTRA, 64 k]
    static constexpr int A_BYTES = BM * LINE, B_BYTES = BN * LINE, STAGE_BYTES = A_BYTES + B_BYTES;
    static constexpr int STAGES = PING_PONG ? 6 : EXTRA_BYTES > SQUARE / 2 ? 3 : 4;
    static constexpr int B_BOX_ROWS = W_BY_K ? BN / DOWN : DEPTH;  // a box holds [n, 64 k], or [64 k, 64 n]
    static constexpr int STORE_BOXES = 2;  // of y, for each consumer; while extra rows are about, one, and they have the others
    static constexpr int EXTRA_AT = STAGES * STAGE_BYTES + 2 * SQUARE;
    static constexpr int EXTRA_ROOM = STAGES * EXTRA_BYTES > 2 * SQUARE ? STAGES * EXTRA_BYTES : 2 * SQUARE;
    static constexpr int BARRIERS_AT = EXTRA_AT + EXTRA_ROOM;
    static constexpr int BARRIERS = 2 * STAGES + 2;
    static constexpr int SHARED_BYTES = EIGHT_LINES + BARRIERS_AT + (BARRIERS + 1) * static_cast<int>(sizeof(Barrier)) + STAGES * 4;
    static constexpr int THREADS = 3 * WARPGROUP;
    static_assert(SHARED_BYTES <= MOST_SHARED_BYTES && DOWN <= 2 && EXTRA <= DEPTH);

    unsigned char* base;  // aligned to where the swizzle repeats
    int rank;             // of the block in its cluster
    Ring<STAGES> ring;

    RESLORA_DEVICE static Pipeline make() {
        return {swizzled_memory(), DOWN > 1 ? cluster_rank() : 0, {}};
    }
    RESLORA_DEVICE unsigned char* a(int stage) const { return base + stage * STAGE_BYTES; }
    RESLORA_DEVICE unsigned char* b(int stage) const { return a(stage) + A_BYTES; }
    RESLORA_DEVICE unsigned char* extra(int stage) const { return base + EXTRA_AT + stage * EXTRA_BYTES; }
    RESLORA_DEVICE unsigned char* store_box(int consumer, int box) const {
        return base + STAGES * STAGE_BYTES + (2 * box + consumer) * SQUARE;
    }
    RESLORA_DEVICE Barrier* full(int stage) const { return reinterpret_cast<Barrier*>(base + BARRIERS_AT) + stage; }
    RESLORA_DEVICE Barrier* empty(int stage) const { return full(stage) + STAGES; }
    RESLORA_DEVICE int* tile() const { return reinterpret_cast<int*>(full(BARRIERS + 1)) + ring.stage; }
    RESLORA_DEVICE Barrier* turn(int consumer) const { return full(2 * STAGES) + consumer; }

    // By all threads. A stage is full when its bytes are there, empty when each warp that reads it, in this block and
    // in that with which it shares w, has let go of it.
    RESLORA_DEVICE void start() const {
        if (thread_id() == 0) {
            for (int stage = 0; stage < STAGES; ++stage) {
                mbarrier_init(full(stage), 1);
                mbarrier_init(empty(stage), (PING_PONG ? 4 : 8) * DOWN);
            }
            for (int consumer = 0; consumer < 2; ++consumer) mbarrier_init(turn(consumer), 4);
            fence_barrier_init();
        }
        meet();
    }
    // No block may leave while others of its cluster still write to it or read from it.
    RESLORA_DEVICE static void meet() {
        if constexpr (DOWN > 1) {
            cluster_arrive();
            cluster_wait();
        } else {
            barrier();
        }
    }

    // By the producer: a [BM, 64] at (row, k), b [64, BN] at (k, column), of which each sharer brings a part, and with a the
    // extra rows, if there is a map of them.
    RESLORA_DEVICE void fill(const TensorMap* map_a, const TensorMap* map_b, int row, int column, int k,
                             const TensorMap* map_extra = nullptr) {
        await_empty();
        mbarrier_expect(full(ring.stage), STAGE_BYTES + (map_extra ? EXTRA_BYTES : 0));
        tma_load(a(ring.stage), map_a, k, row, full(ring.stage));
        if (EXTRA > 0 && map_extra) tma_load(extra(ring.stage), map_extra, k, 0, full(ring.stage));
        load_b(map_b, column, k);
        ring.advance();
    }
    RESLORA_DEVICE void await_empty() const { mbarrier_wait(empty(ring.stage), ring.parity ^ 1); }
    // With the next stage comes the number of the tile that begins there.
    RESLORA_DEVICE void announce(int number) const {
        await_empty();
        *tile() = number;
    }
    // b alone: the consumers put their rows of a into the stage.
    RESLORA_DEVICE void fill_b(const TensorMap* map_b, int column) {
        await_empty();
        mbarrier_expect(full(ring.stage), B_BYTES);
        load_b(map_b, column, 0);
        ring.advance();
    }
    RESLORA_DEVICE void load_b(const TensorMap* map, int column, int k) const {
        if constexpr (W_BY_K) {
            load_shared_part(b(ring.stage) + rank * B_BOX_ROWS * LINE, map, k, column + rank * B_BOX_ROWS);
        } else {
            constexpr int BOXES = BN / DEPTH / DOWN;
            RESLORA_UNROLL
            for (int i = 0; i < BOXES; ++i) {
                const int box = rank * BOXES + i;
                load_shared_part(b(ring.stage) + box * SQUARE, map, column + box * DEPTH, k);
            }
        }
    }
    RESLORA_DEVICE void load_shared_part(void* to, const TensorMap* map, int column, int row) const {
        if constexpr (DOWN > 1) tma_load_multicast(to, map, column, row, full(ring.stage), (1 << DOWN) - 1);
        else tma_load(to, map, column, row, full(ring.stage));
    }

    // By a consumer.
    RESLORA_DEVICE int announced() const {
        mbarrier_wait(full(ring.stage), ring.parity);
        return same_in_warp(*tile());
    }
    // By a consumer: begins acc [64 BLOCKS, BN] += a b of the current stage, of its first 16 STEPS k.
    template <int STEPS = DEPTH / 16>
    RESLORA_DEVICE void multiply(float (&acc)[BLOCKS][BN / 2], int first_row) const {
        mbarrier_wait(full(ring.stage), ring.parity);
        wgmma_fence();
        RESLORA_UNROLL
        for (int step = 0; step < STEPS; ++step) multiply_step(acc, first_row, step);
        wgmma_commit();
    }
    // The same of all, and beside [64, EXTRA] += a (extra rows)ᵀ.
    template <int COUNT>
    RESLORA_DEVICE void multiply_both(float (&acc)[BLOCKS][BN / 2], float (&beside)[COUNT], int first_row) const {
        static_assert(COUNT == EXTRA / 2 && BLOCKS == 1);
        const std::uint64_t left = wgmma_descriptor(a(ring.stage) + first_row * LINE, 16, EIGHT_LINES);
        const std::uint64_t right = wgmma_descriptor(extra(ring.stage), 16, EIGHT_LINES);
        mbarrier_wait(full(ring.stage), ring.parity);
        wgmma_fence();
        RESLORA_UNROLL
        for (int step = 0; step < DEPTH / 16; ++step) {
            multiply_step(acc, first_row, step);
            wgmma<EXTRA, false>(beside, descriptor_after(left, step * 32), descriptor_after(right, step * 32), Element{});
        }
        wgmma_commit();
    }
    // As multiply, of its first 16 ``steps`` k only. (With a way out of the loop above, ptxas adds fences of its own.)
    RESLORA_DEVICE void multiply_part(float (&acc)[BLOCKS][BN / 2], int first_row, int steps) const {
        mbarrier_wait(full(ring.stage), ring.parity);
        RESLORA_KEEP_LOOP
        for (int step = 0; step < steps; ++step) {
            wgmma_fence();
            multiply_step(acc, first_row, step);
            wgmma_commit();
        }
    }
    RESLORA_DEVICE void multiply_step(float (&acc)[BLOCKS][BN / 2], int first_row, int step) const {
        const std::uint64_t left = wgmma_descriptor(a(ring.stage) + first_row * LINE, 16, EIGHT_LINES);
        const std::uint64_t right = wgmma_descriptor(b(ring.stage), W_BY_K ? 16 : SQUARE, EIGHT_LINES);
        RESLORA_UNROLL
        for (int block = 0; block < BLOCKS; ++block)
            wgmma<BN, !W_BY_K>(acc[block], descriptor_after(left, block * SQUARE + step * 32),
                               descriptor_after(right, step * (W_BY_K ? 32 : 16 * LINE)), Element{});
    }

    // PING_PONG: a consumer starts its ``count``-th tile when all warps of the other have seen its tile's stages arrive.
    // Without this a wait could mistake an earlier round of a stage for its own: parity tells only two apart.
    RESLORA_DEVICE void await_turn(int consumer, int count) const {
        if constexpr (PING_PONG) mbarrier_wait(turn(consumer), (count ^ consumer ^ 1) & 1);
    }
    RESLORA_DEVICE void pass_turn(int consumer) const {
        if (PING_PONG && thread_id() % 32 == 0) mbarrier_arrive(turn(consumer ^ 1));
    }
    RESLORA_DEVICE void release(int stage) const {
        if (thread_id() % 32 != 0) return;
        if constexpr (DOWN > 1) {
            for (int block = 0; block < DOWN; ++block) mbarrier_arrive_cluster(empty(stage), block);
        } else {
            mbarrier_arrive(empty(stage));
        }
    }
};

}  // namespace reslora

// The matmul of one block: acc [BM, BN] += a [BM, k] b [BN, k]ᵀ with tiles streaming through shared memory in STAGES
// buffers, multiplied by mma.sync. Every kernel here is this loop with another epilogue.
#pragma once
#include "tile.cuh"

namespace reslora {

struct Bf16Math {
    using Element = Bf16;
};
struct Fp16Math {
    using Element = Fp16;
};
struct Tf32Math {
    using Element = float;
};
struct IeeeMath {  // float32 on CUDA cores
    using Element = float;
};

template <class Left, class Right>
inline constexpr bool SAME = false;
template <class Type>
inline constexpr bool SAME<Type, Type> = true;

// A_BY_K: a is stored with k along its rows (in shared memory [BM, BK]); else its transpose is ([BK, BM]). B_BY_K too.
// EXTRA > 0: a second product a extraᵀ of width EXTRA, from the same fragments of a.
template <class Math, int BM_, int BN_, int WARPS_M, int WARPS_N, bool A_BY_K, bool B_BY_K, int STAGES, int EXTRA = 0>
struct BlockMatmul {
    using Element = typename Math::Element;
    static constexpr int BM = BM_, BN = BN_, BK = 64 / sizeof(Element), THREADS = 32 * WARPS_M * WARPS_N;
    static constexpr int WARP_M = BM / WARPS_M, WARP_N = BN / WARPS_N, FM = WARP_M / 16, FN = WARP_N / 8;
    static constexpr int WARP_EXTRA = EXTRA / WARPS_N, FE = EXTRA ? WARP_EXTRA / 8 : 1;
    using TileA = SharedTile<Element, A_BY_K ? BM : BK, A_BY_K ? BK : BM>;
    using TileB = SharedTile<Element, B_BY_K ? BN : BK, B_BY_K ? BK : BN>;
    using TileExtra = SharedTile<Element, EXTRA, BK>;
    static constexpr int STAGE_BYTES = TileA::BYTES + TileB::BYTES + TileExtra::BYTES;
    static constexpr int SHARED_BYTES = STAGES * STAGE_BYTES;
    static_assert(FM > 0 && FN > 0 && FN % 2 == 0 && (EXTRA == 0 || FE % 2 == 0), "ldmatrix takes 16 columns");

    template <bool AS_IS>
    using StreamA = Stream<THREADS, TileA, A_BY_K, AS_IS>;
    template <bool AS_IS>
    using StreamB = Stream<THREADS, TileB, B_BY_K, AS_IS>;
    using StreamExtra = Stream<THREADS, TileExtra, true, false>;

    float acc[FM][FN][4] = {};
    float extra_acc[FM][FE][4] = {};
    int stage = 0;  // of the next step

    RESLORA_DEVICE static TileA tile_a(int stage) { return {shared_memory() + stage * STAGE_BYTES}; }
    RESLORA_DEVICE static TileB tile_b(int stage) { return {tile_a(stage).base + TileA::BYTES}; }
    RESLORA_DEVICE static TileExtra tile_extra(int stage) { return {tile_b(stage).base + TileB::BYTES}; }

    RESLORA_DEVICE static int warp_row() { return thread_id() / 32 / WARPS_N * WARP_M; }
    RESLORA_DEVICE static int warp_column() { return thread_id() / 32 % WARPS_N * WARP_N; }

    // How many steps there are in ``size`` k.
    RESLORA_DEVICE static int steps_of(std::int64_t size) { return static_cast<int>((size + BK - 1) / BK); }

    // copy(step, stage) starts the copies of a step, if there is such a step: here of all but one of the first STAGES.
    template <class Copy>
    RESLORA_DEVICE static void begin(Copy copy) {
        for (int step = 0; step < STAGES - 1; ++step) {
            copy(step, step);
            commit_copies();
        }
    }
    // Adds the products of ``count`` steps, while copy(step, stage) starts those that come STAGES - 1 later.
    // arrived(step, stage) is called by all threads once a step is there.
    template <bool WITH_EXTRA = EXTRA != 0, class Copy, class Arrived>
    RESLORA_DEVICE void add(int count, Copy copy, Arrived arrived) {
        RESLORA_KEEP_LOOP
        for (int step = 0; step < count; ++step) {
            wait_copies<STAGES - 2>();
            barrier();
            copy(step + STAGES - 1, stage == 0 ? STAGES - 1 : stage - 1);
            commit_copies();
            arrived(step, stage);
            multiply_stage<WITH_EXTRA>(stage);
            stage = stage == STAGES - 1 ? 0 : stage + 1;
        }
    }
    // The buffers are free.
    RESLORA_DEVICE static void end() {
        wait_copies<0>();
        barrier();
    }

    template <bool WITH_EXTRA>
    RESLORA_DEVICE void multiply_stage(int stage) {
        const TileA a = tile_a(stage);
        const TileB b = tile_b(stage);
        if constexpr (SAME<Math, IeeeMath>) {
            multiply_exactly(a, b);
        } else {
            constexpr int STEP = sizeof(Element) == 2 ? 16 : 8;
            RESLORA_UNROLL
            for (int k = 0; k < BK; k += STEP) {
                std::uint32_t left[FM][4];
                RESLORA_UNROLL
                for (int m = 0; m < FM; ++m) fragment<A_BY_K, true>(left[m], a, warp_row(), 16 * m, k);
                multiply_by<B_BY_K>(acc, left, b, warp_column(), k);
                if constexpr (WITH_EXTRA)
                    multiply_by<true>(extra_acc, left, tile_extra(stage), warp_column() / WARP_N * WARP_EXTRA, k);
            }
        }
    }

    template <bool BY_K, int COUNT, class Tile>
    RESLORA_DEVICE static void multiply_by(float (&out)[FM][COUNT][4], const std::uint32_t (&left)[FM][4], Tile tile,
                                           int column, int k) {
        RESLORA_UNROLL
        for (int n = 0; n < COUNT; n += 2) {
            std::uint32_t right[4];
            fragment<BY_K, false>(right, tile, column, 8 * n, k);
            RESLORA_UNROLL
            for (int m = 0; m < FM; ++m) {
                multiply(out[m][n], left[m], right[0], right[1], Element{});
                multiply(out[m][n + 1], left[m], right[2], right[3], Element{});
            }
        }
    }

    // 16 rows of a (IS_A) or columns of b from ``first`` + ``more`` on by the k of a multiplication, 16 or for TF32 8,
    // in four matrices: of a, the next eight rows come before the other half of k.
    template <bool BY_K, bool IS_A, class Tile>
    RESLORA_DEVICE static void fragment(std::uint32_t (&r)[4], Tile tile, int first, int more, int k) {
        const int lane = thread_id() % 32;
        const auto others = [](int matrix) { return (IS_A ? matrix % 2 : matrix / 2) * 8; };
        const auto half = [](int matrix) { return IS_A ? matrix / 2 : matrix % 2; };
        if constexpr (BY_K) {  // four float32 are as wide as eight elements of 16 bits
            const int row = first + others(lane / 8) + lane % 8, chunk = k / Tile::PER_CHUNK + half(lane / 8);
            load_matrices<false>(r, tile.chunk(row, chunk) + Tile::below(more));
            if constexpr (sizeof(Element) == 4)
                for (std::uint32_t& value : r) value = round_to_tf32(value);
        } else if constexpr (sizeof(Element) == 2) {
            const int row = k + half(lane / 8) * 8 + lane % 8, chunk = (first + more + others(lane / 8)) / 8;
            load_matrices<true>(r, tile.chunk(row, chunk));
        } else {
            RESLORA_UNROLL
            for (int i = 0; i < 4; ++i)
                r[i] = round_to_tf32(
                    load_shared(&tile.at(k + half(i) * 4 + lane % 4, first + more + others(i) + lane / 4)));
        }
    }

    // Each stage is summed by itself: fewer roundings at the size of the whole sum.
    RESLORA_DEVICE void multiply_exactly(TileA a, TileB b) {
        const int lane = thread_id() % 32;
        float sums[2 * FM][2 * FN] = {};
        RESLORA_KEEP_LOOP
        for (int k = 0; k < BK; ++k) {
            float right[2 * FN];
            RESLORA_UNROLL
            for (int n = 0; n < 2 * FN; ++n) {
                const int column = warp_column() + n / 2 * 8 + lane % 4 * 2 + n % 2;
                right[n] = to_float(B_BY_K ? b.at(column, k) : b.at(k, column));
            }
            RESLORA_UNROLL
            for (int m = 0; m < 2 * FM; ++m) {
                const int row = warp_row() + m / 2 * 16 + lane / 4 + m % 2 * 8;
                const float left = to_float(A_BY_K ? a.at(row, k) : a.at(k, row));
                RESLORA_UNROLL
                for (int n = 0; n < 2 * FN; ++n) sums[m][n] = fused_multiply_add(left, right[n], sums[m][n]);
            }
        }
        RESLORA_UNROLL
        for (int i = 0; i < 4 * FM * FN; ++i)
            acc[i / FN / 4][i / 4 % FN][i % 4] += sums[i / FN / 4 * 2 + i % 4 / 2][i / 4 % FN * 2 + i % 2];
    }

    // visit(row, column, first, second) for each pair of neighbours of acc that this thread holds.
    template <class Visit>
    RESLORA_DEVICE void for_each_pair(Visit visit) {
        each_pair(acc, warp_column(), visit);
    }
    template <class Visit>
    RESLORA_DEVICE void for_each_extra_pair(Visit visit) {
        each_pair(extra_acc, warp_column() / WARP_N * WARP_EXTRA, visit);
    }
    template <int COUNT, class Visit>
    RESLORA_DEVICE static void each_pair(float (&values)[FM][COUNT][4], int first_column, Visit visit) {
        const int lane = thread_id() % 32;
        RESLORA_UNROLL
        for (int m = 0; m < FM; ++m)
            RESLORA_UNROLL
            for (int half = 0; half < 2; ++half)
                RESLORA_UNROLL
                for (int n = 0; n < COUNT; ++n)
                    visit(warp_row() + 16 * m + lane / 4 + 8 * half, first_column + 8 * n + lane % 4 * 2,
                          values[m][n][2 * half], values[m][n][2 * half + 1]);
    }
};

}  // namespace reslora

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

    float acc[FM][FN][4] = {};
    float extra_acc[FM][FE][4] = {};

    RESLORA_DEVICE static TileA tile_a(int stage) { return {shared_memory() + stage * STAGE_BYTES}; }
    RESLORA_DEVICE static TileB tile_b(int stage) { return {tile_a(stage).base + TileA::BYTES}; }
    RESLORA_DEVICE static TileExtra tile_extra(int stage) { return {tile_b(stage).base + TileB::BYTES}; }

    RESLORA_DEVICE static int warp_row() { return thread_id() / 32 / WARPS_N * WARP_M; }
    RESLORA_DEVICE static int warp_column() { return thread_id() / 32 % WARPS_N * WARP_N; }

    RESLORA_DEVICE static void load(int stage, const Matrix& a, const Matrix& b, const Matrix& extra, std::int64_t row,
                                    std::int64_t column, std::int64_t k, std::int64_t stop) {
        if constexpr (A_BY_K) load_tile<THREADS>(tile_a(stage), a, row, k, a.rows, stop);
        else load_tile<THREADS>(tile_a(stage), a, k, row, stop, a.columns);
        load_b(stage, b, column, k, stop);
        if constexpr (EXTRA > 0) load_tile<THREADS>(tile_extra(stage), extra, 0, k, extra.rows, stop);
    }
    RESLORA_DEVICE static void load_b(int stage, const Matrix& b, std::int64_t column, std::int64_t k,
                                      std::int64_t stop) {
        if constexpr (B_BY_K) load_tile<THREADS>(tile_b(stage), b, column, k, b.rows, stop);
        else load_tile<THREADS>(tile_b(stage), b, k, column, stop, b.columns);
    }

    // Adds the product over k in [start, stop). arrived(stage, k) is called by all threads once a stage is complete.
    // On return the buffers are free.
    template <class Arrived>
    RESLORA_DEVICE void add(const Matrix& a, const Matrix& b, const Matrix& extra, std::int64_t row,
                            std::int64_t column, std::int64_t start, std::int64_t stop, Arrived arrived) {
        const std::int64_t steps = (stop - start + BK - 1) / BK;
        for (int stage = 0; stage < STAGES - 1; ++stage) {
            if (stage < steps) load(stage, a, b, extra, row, column, start + stage * BK, stop);
            commit_copies();
        }
        for (std::int64_t step = 0; step < steps; ++step) {
            wait_copies<STAGES - 2>();
            barrier();
            const std::int64_t next = step + STAGES - 1;
            if (next < steps) load(next % STAGES, a, b, extra, row, column, start + next * BK, stop);
            commit_copies();
            arrived(static_cast<int>(step % STAGES), start + step * BK);
            multiply_stage<EXTRA != 0>(static_cast<int>(step % STAGES));
        }
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
                for (int m = 0; m < FM; ++m) fragment_a(left[m], a, warp_row() + 16 * m, k);
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
            fragment_b<BY_K>(right, tile, column + 8 * n, k);
            RESLORA_UNROLL
            for (int m = 0; m < FM; ++m) {
                multiply(out[m][n], left[m], right[0], right[1], Element{});
                multiply(out[m][n + 1], left[m], right[2], right[3], Element{});
            }
        }
    }

    // Rows row..row + 15 of a: 16 values of k, or 8 for TF32.
    RESLORA_DEVICE static void fragment_a(std::uint32_t (&r)[4], TileA tile, int row, int k) {
        const int lane = thread_id() % 32;
        if constexpr (sizeof(Element) == 2) {
            const int outer = row + lane / 8 % 2 * 8, inner = k + lane / 16 * 8;
            if constexpr (A_BY_K) load_matrices<false>(r, &tile.at(outer + lane % 8, inner));
            else load_matrices<true>(r, &tile.at(inner + lane % 8, outer));
        } else {
            RESLORA_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int outer = row + lane / 4 + i % 2 * 8, inner = k + lane % 4 + i / 2 * 4;
                r[i] = round_to_tf32(A_BY_K ? tile.at(outer, inner) : tile.at(inner, outer));
            }
        }
    }
    // Columns column..column + 15: r[0], r[1] for the first eight, r[2], r[3] for the others.
    template <bool BY_K, class Tile>
    RESLORA_DEVICE static void fragment_b(std::uint32_t (&r)[4], Tile tile, int column, int k) {
        const int lane = thread_id() % 32;
        if constexpr (sizeof(Element) == 2) {
            const int outer = column + lane / 16 * 8, inner = k + lane / 8 % 2 * 8;
            if constexpr (BY_K) load_matrices<false>(r, &tile.at(outer + lane % 8, inner));
            else load_matrices<true>(r, &tile.at(inner + lane % 8, outer));
        } else {
            RESLORA_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int outer = column + lane / 4 + i / 2 * 8, inner = k + lane % 4 + i % 2 * 4;
                r[i] = round_to_tf32(BY_K ? tile.at(outer, inner) : tile.at(inner, outer));
            }
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

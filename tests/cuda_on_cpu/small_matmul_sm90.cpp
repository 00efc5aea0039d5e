// c = a b with what host_ptx_sm90.h has, but copies between blocks, for tests/test_cuda_on_cpu.py: exact on integers,
// whatever the schedule. A producer copies tiles of a and b, two warpgroups multiply, and c leaves through shared memory.
// Two blocks of a cluster share their tile of b, of which each copies half to both.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "ptx.cuh"

#include "host_ptx_sm90.h"

namespace reslora {

constexpr int GROUPS = 2, THREADS = 128 * (GROUPS + 1), ROWS = 64 * GROUPS, N = 128, K = 64;
constexpr int BOX_BYTES = 64 * 128;  // 64 rows of 64 elements

template <int STAGES>
struct alignas(1024) Shared {
    unsigned char a[STAGES][GROUPS * BOX_BYTES], b[STAGES][2 * BOX_BYTES], c[GROUPS][2 * BOX_BYTES];
    Barrier full[STAGES], empty[STAGES];
};

template <int STAGES>
constexpr int SHARED_BYTES = sizeof(Shared<STAGES>) + 1024 - 128;  // it begins at a multiple of 128

struct Params {
    TensorMap a, b, c;
    int tiles_down, tiles_across, k;
};

template <int STAGES>
struct Turn {  // of the stages
    int stage = 0, phase = 0;
    RESLORA_DEVICE void next() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
};

template <class Element, bool B_MN_MAJOR, int BLOCKS, int STAGES>
__global__ void __launch_bounds__(THREADS) matmul(const __grid_constant__ Params p) {
    const auto misplaced = static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(shared_memory()) % 1024);
    auto& s = *reinterpret_cast<Shared<STAGES>*>(shared_memory() + (1024 - misplaced) % 1024);
    const int rank = cluster_rank(), group = thread_id() / 128, thread = thread_id() % 128;
    if (thread_id() == 0) {
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(&s.full[i], 1);
            mbarrier_init(&s.empty[i], GROUPS * 4 * BLOCKS);
        }
        fence_barrier_init();
    }
    cluster_arrive();
    cluster_wait();
    grid_dependency_wait();
    Turn<STAGES> turn;
    const int first = static_cast<int>(block_id().x) / BLOCKS, step = static_cast<int>(grid_size().x) / BLOCKS;
    const int tiles = p.tiles_down / BLOCKS * p.tiles_across;
    if (group == GROUPS) {
        set_registers_down<40>();
        if (thread == 0)
            for (int tile = first; tile < tiles; tile += step) {
                const int row = (tile / p.tiles_across * BLOCKS + rank) * ROWS, column = tile % p.tiles_across * N;
                for (int k = 0; k < p.k; k += K, turn.next()) {
                    Barrier* full = &s.full[turn.stage];
                    mbarrier_wait(&s.empty[turn.stage], turn.phase ^ 1);
                    mbarrier_expect(full, (GROUPS + 2) * BOX_BYTES);
                    for (int i = 0; i < GROUPS; ++i)
                        tma_load(s.a[turn.stage] + i * BOX_BYTES, &p.a, k, row + 64 * i, full);
                    for (int i = rank; i < 2; i += BLOCKS) {
                        const int at = column + 64 * i;
                        unsigned char* to = s.b[turn.stage] + i * BOX_BYTES;
                        if (BLOCKS == 1)
                            tma_load(to, &p.b, B_MN_MAJOR ? at : k, B_MN_MAJOR ? k : at, full);
                        else
                            tma_load_multicast(to, &p.b, B_MN_MAJOR ? at : k, B_MN_MAJOR ? k : at, full, 3);
                    }
                }
            }
    } else {
        set_registers_up<232>();
        const int lane = thread % 32;
        const auto release = [&](int stage) {
            if (lane != 0) return;
            mbarrier_arrive(&s.empty[stage]);
            if (BLOCKS == 2) mbarrier_arrive_cluster(&s.empty[stage], rank ^ 1);
        };
        for (int tile = first; tile < tiles; tile += step) {
            float acc[N / 2] = {};
            int before = -1;
            for (int k = 0; k < p.k; k += K, turn.next()) {
                mbarrier_wait(&s.full[turn.stage], turn.phase);
                const std::uint64_t a = wgmma_descriptor(s.a[turn.stage] + group * BOX_BYTES, 16, 1024);
                const std::uint64_t b = B_MN_MAJOR ? wgmma_descriptor(s.b[turn.stage], BOX_BYTES, 1024)
                                                   : wgmma_descriptor(s.b[turn.stage], 0, 1024);
                wgmma_fence();
                for (int i = 0; i < K / 16; ++i)
                    wgmma<N, B_MN_MAJOR, false, Element>(acc, a + i * 2, b + i * (B_MN_MAJOR ? 128 : 2), Element{});
                wgmma_commit();
                wgmma_wait<1>();
                if (before >= 0) release(before);
                before = turn.stage;
            }
            wgmma_wait<0>();
            release(before);
            if (thread == 0) tma_store_wait_read<0>();
            named_barrier(1 + group, 128);
            for (int i = 0; i < N / 2; ++i) {
                const int row = thread / 32 * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
                const int at = row * 128 + (column % 64 / 8 ^ row % 8) * 16 + column % 8 * 2;
                from_float(*reinterpret_cast<Element*>(s.c[group] + column / 64 * BOX_BYTES + at), acc[i]);
            }
            fence_async_shared();
            named_barrier(1 + group, 128);
            if (thread == 0) {
                const int row = (tile / p.tiles_across * BLOCKS + rank) * ROWS + group * 64;
                for (int i = 0; i < 2; ++i)
                    tma_store(&p.c, s.c[group] + i * BOX_BYTES, tile % p.tiles_across * N + i * 64, row);
                tma_store_commit();
            }
        }
        grid_dependency_launch();
        if (thread == 0) tma_store_wait_read<0>();
    }
    cluster_arrive();
    cluster_wait();
}

template <class Element, bool B_MN_MAJOR, int BLOCKS, int STAGES>
void check(const char* name) {
    constexpr int M = 300, COLUMNS = 200, DEPTH = 176, STRIDE = 208, LEFT = 0x1234;
    const auto draw = [](int rows, int columns, std::vector<Element>& bits, std::vector<float>& values) {
        bits.resize(rows * columns), values.resize(rows * columns);
        for (int i = 0; i < rows * columns; ++i)
            from_float(bits[i], values[i] = static_cast<float>(static_cast<int>(emulator::chance() % 9) - 4));
    };
    std::vector<Element> a, b, c(M * STRIDE, Element{LEFT});
    std::vector<float> a_values, b_values;
    draw(M, DEPTH, a, a_values);
    draw(COLUMNS, DEPTH, b, b_values);  // [COLUMNS, DEPTH] by k, else [DEPTH, COLUMNS]
    const Type type = std::is_same_v<Element, Bf16> ? BFLOAT16 : FLOAT16;
    const Params p{encode_tensor_map(a.data(), type, M, DEPTH, DEPTH, 64, 64),
                   B_MN_MAJOR ? encode_tensor_map(b.data(), type, DEPTH, COLUMNS, COLUMNS, 64, 64)
                              : encode_tensor_map(b.data(), type, COLUMNS, DEPTH, DEPTH, 64, 64),
                   encode_tensor_map(c.data(), type, M, COLUMNS, STRIDE, 64, 64), 4, 2, DEPTH};
    emulator::launch(name, {2 * BLOCKS, 1, 1}, THREADS, SHARED_BYTES<STAGES>,
                     [&] { matmul<Element, B_MN_MAJOR, BLOCKS, STAGES>(p); }, BLOCKS);
    for (int i = 0; i < M; ++i)
        for (int j = 0; j < STRIDE; ++j) {
            Element expected{LEFT};
            float sum = 0;
            for (int k = 0; k < DEPTH && j < COLUMNS; ++k)
                sum += a_values[i * DEPTH + k] * b_values[B_MN_MAJOR ? k * COLUMNS + j : j * DEPTH + k];
            if (j < COLUMNS) from_float(expected, sum);
            if (c[i * STRIDE + j].bits != expected.bits)
                throw std::runtime_error(std::string(name) + ": [" + std::to_string(i) + ", " + std::to_string(j) +
                                         "] is wrong");
        }
}

}  // namespace reslora

int main(int, char** arguments) {  // seeds, and which fault is planted
    using namespace reslora;
    emulator::planted = std::atoi(arguments[2]);
    try {
        for (int seed = 0; seed < std::atoi(arguments[1]); ++seed) {
            emulator::chance.seed(seed);
            check<Bf16, false, 1, 2>("by k, 2 stages");
            check<Fp16, true, 1, 3>("MN-major, 3 stages");
            check<Fp16, false, 2, 4>("by k, a cluster of 2, 4 stages");
            check<Bf16, true, 2, 2>("MN-major, a cluster of 2, 2 stages");
        }
    } catch (const std::runtime_error& error) {
        std::puts(error.what());
        return 1;
    }
    const auto& s = emulator::statistics;
    std::printf("%ld loads, %ld stores, %ld products\n", s.tensor_loads, s.tensor_stores, s.group_multiplications);
}

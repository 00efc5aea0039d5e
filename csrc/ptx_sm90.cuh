// One thin function per instruction that only sm_90a has: bulk tensor copies, their barriers, and warpgroup products.
// The host twins are in tests/cuda_on_cpu/host_ptx_sm90.h.
#pragma once
#include "params.h"
#include "ptx.cuh"

#ifndef __CUDACC__
#include "host_ptx_sm90.h"
#else

#include <cuda.h>

#include <stdexcept>
#include <string>

namespace reslora {

// A matrix in global memory as the copy engine sees it; a kernel takes it as (part of) a __grid_constant__ parameter.
struct alignas(64) TensorMap {
    unsigned char opaque[128];
};
static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));

// The driver's own functions need a context, and a thread that autograd has started has none before its first launch.
inline void bind_device() {
    static thread_local bool bound = false;
    int device = 0;
    if (bound) return;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaSetDevice(device);  // of 12.0 and later: makes its context this thread's
    if (error != cudaSuccess) throw std::runtime_error(std::string("no context: ") + cudaGetErrorString(error));
    bound = true;
}

// A row-major [rows, columns] of 16-bit elements, moved in boxes of [box_rows, box_columns], box_columns 64 at most. A
// box lies row by row in shared memory, its 16-byte chunks xored with the row's number modulo 8 (128-byte swizzle).
// base and row stride are multiples of 16 bytes. What lies outside is read as zero and not written.
inline TensorMap encode_tensor_map(const void* base, Type type, std::int64_t rows, std::int64_t columns,
                                   std::int64_t row_stride_elements, int box_rows, int box_columns) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {  // of the driver that is loaded: nothing links to it
        void* found = nullptr;
        cudaDriverEntryPointQueryResult status{};
#if CUDART_VERSION >= 12050
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &status);
#else
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status);
#endif
        return status == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
    }();
    if (encode == nullptr) throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled: it is before 12.0");
    bind_device();
    TensorMap map;
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[] = {2 * static_cast<cuuint64_t>(row_stride_elements)};
    const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
    const CUresult result = encode(
        reinterpret_cast<CUtensorMap*>(&map),
        type == FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(base),
        sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        throw std::runtime_error("cuTensorMapEncodeTiled failed with " + std::to_string(static_cast<int>(result)) +
                                 " for [" + std::to_string(rows) + ", " + std::to_string(columns) + "] of row stride " +
                                 std::to_string(row_stride_elements));
    return map;
}

// In shared memory. A phase is over when ``count`` threads have arrived and the expected bytes are there.
using Barrier = std::uint64_t;

RESLORA_DEVICE void mbarrier_init(Barrier* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
RESLORA_DEVICE void mbarrier_expect(Barrier* barrier, int bytes) {  // arrives, too
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
RESLORA_DEVICE void mbarrier_arrive(Barrier* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// At the barrier that lies at the same place in another block of the cluster. It hands on what wgmma has read, nothing
// that was written: .release.cluster would be a fence of the whole GPU each time, of twice a stage's cycles.
RESLORA_DEVICE void mbarrier_arrive_cluster(Barrier* barrier, int cta) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
        "r"(cta)
        : "memory");
}
// Returns when the phase of this parity is over: of a fresh barrier, 1 is and 0 is not.
RESLORA_DEVICE void mbarrier_wait(Barrier* barrier, int parity) {
    asm volatile(
        "{\n.reg .pred over;\nagain_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
        "@!over bra again_%=;\n}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}
RESLORA_DEVICE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Orders this thread's stores to shared memory before what the copy engine and the tensor cores read from it.
RESLORA_DEVICE void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The box at (row, column) to shared memory, aligned to 1024 bytes; its bytes count at the barrier.
RESLORA_DEVICE void tma_load(void* shared, const TensorMap* map, int column, int row, Barrier* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            shared_address(shared)),
        "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
        : "memory");
}
// To the same place in every block of the cluster whose bit is set, and at the barrier there.
RESLORA_DEVICE void tma_load_multicast(void* shared, const TensorMap* map, int column, int row, Barrier* barrier,
                                       std::uint16_t mask) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(shared)),
        "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(mask)
        : "memory");
}
RESLORA_DEVICE void tma_store(const TensorMap* map, const void* shared, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column),
                 "r"(row), "r"(shared_address(shared))
                 : "memory");
}
RESLORA_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Returns when the shared memory of all but the latest N groups of this thread may be written again.
template <int N>
RESLORA_DEVICE void tma_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// A block of shared memory that wgmma reads, in 128-byte swizzle. By k: rows of 64 k, eight rows every stride_bytes.
// Other way round (MN-major): rows of 64 columns, eight k every stride_bytes, 64 columns every leading_bytes.
RESLORA_DEVICE std::uint64_t wgmma_descriptor(const void* shared, int leading_bytes, int stride_bytes) {
    return static_cast<std::uint64_t>((shared_address(shared) & 0x3FFFF) >> 4) |
           static_cast<std::uint64_t>(leading_bytes >> 4) << 16 | static_cast<std::uint64_t>(stride_bytes >> 4) << 32 |
           std::uint64_t{1} << 62;
}

RESLORA_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
RESLORA_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
RESLORA_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

#define RESLORA_TEN(T) "%" #T "0, %" #T "1, %" #T "2, %" #T "3, %" #T "4, %" #T "5, %" #T "6, %" #T "7, %" #T "8, %" #T "9"
#define RESLORA_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define RESLORA_16 RESLORA_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define RESLORA_32 RESLORA_16 ", %16, %17, %18, %19, " RESLORA_TEN(2) ", %30, %31"
#define RESLORA_64 RESLORA_TEN() ", " RESLORA_TEN(1) ", " RESLORA_TEN(2) ", " RESLORA_TEN(3) ", " RESLORA_TEN(4) ", " \
    RESLORA_TEN(5) ", %60, %61, %62, %63"
#define RESLORA_128 RESLORA_64 ", %64, %65, %66, %67, %68, %69, " RESLORA_TEN(7) ", " RESLORA_TEN(8) ", "              \
    RESLORA_TEN(9) ", " RESLORA_TEN(10) ", " RESLORA_TEN(11) ", %120, %121, %122, %123, %124, %125, %126, %127"
#define RESLORA_ACC4(I) "+f"(acc[I]), "+f"(acc[I + 1]), "+f"(acc[I + 2]), "+f"(acc[I + 3])
#define RESLORA_ACC16(I) RESLORA_ACC4(I), RESLORA_ACC4(I + 4), RESLORA_ACC4(I + 8), RESLORA_ACC4(I + 12)
#define RESLORA_ACC64(I) RESLORA_ACC16(I), RESLORA_ACC16(I + 16), RESLORA_ACC16(I + 32), RESLORA_ACC16(I + 48)
#define RESLORA_WGMMA(SIZE, TYPE, ACC, A, B, A_MAJOR, B_MAJOR, ...)                                                    \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" SIZE "k16.f32." TYPE "." TYPE " {" ACC "}, " A ", " B             \
                 ", 1, 1, 1, " A_MAJOR ", " B_MAJOR ";"                                                                \
                 : __VA_ARGS__ : "l"(a), "l"(b), "n"(A_MN_MAJOR ? 1 : 0), "n"(B_MN_MAJOR ? 1 : 0) : "memory")

// acc [64, N] += a [64, 16] b [16, N], begun: acc is there after wgmma_commit and wgmma_wait. Thread t of the warpgroup
// holds, at 4 j + i, row t / 32 * 16 + t % 32 / 4 + i / 2 * 8 and column 8 j + t % 4 * 2 + i % 2. The last argument is
// the type of a and b.
#define RESLORA_WGMMA_OF(ELEMENT, TYPE)                                                                                \
    template <int N, bool B_MN_MAJOR, bool A_MN_MAJOR = false>                                                         \
    RESLORA_DEVICE void wgmma(float (&acc)[N / 2], std::uint64_t a, std::uint64_t b, ELEMENT) {                        \
        static_assert(N == 16 || N == 32 || N == 64 || N == 128 || N == 256);                                          \
        if constexpr (N == 256)                                                                                        \
            RESLORA_WGMMA("256", TYPE, RESLORA_128, "%128", "%129", "%130", "%131", RESLORA_ACC64(0), RESLORA_ACC64(64)); \
        else if constexpr (N == 128)                                                                                   \
            RESLORA_WGMMA("128", TYPE, RESLORA_64, "%64", "%65", "%66", "%67", RESLORA_ACC64(0));                      \
        else if constexpr (N == 64)                                                                                    \
            RESLORA_WGMMA("64", TYPE, RESLORA_32, "%32", "%33", "%34", "%35", RESLORA_ACC16(0), RESLORA_ACC16(16));    \
        else if constexpr (N == 32)                                                                                    \
            RESLORA_WGMMA("32", TYPE, RESLORA_16, "%16", "%17", "%18", "%19", RESLORA_ACC16(0));                       \
        else                                                                                                           \
            RESLORA_WGMMA("16", TYPE, RESLORA_8, "%8", "%9", "%10", "%11", RESLORA_ACC4(0), RESLORA_ACC4(4));          \
    }
RESLORA_WGMMA_OF(Bf16, "bf16")
RESLORA_WGMMA_OF(Fp16, "f16")
#undef RESLORA_WGMMA_OF
#undef RESLORA_WGMMA
#undef RESLORA_ACC64
#undef RESLORA_ACC16
#undef RESLORA_ACC4
#undef RESLORA_128
#undef RESLORA_64
#undef RESLORA_32
#undef RESLORA_16
#undef RESLORA_8
#undef RESLORA_TEN

// Registers of each thread of the warpgroup from here on. All its warps call it.
template <int N>
RESLORA_DEVICE void set_registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
RESLORA_DEVICE void set_registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// Arrived, then waited for, by every thread of every block of the cluster.
RESLORA_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
RESLORA_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
RESLORA_DEVICE int cluster_rank() {
    int rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// ``id`` 1 to 15: a barrier of so many threads. 0 is barrier().
RESLORA_DEVICE void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// What the kernel before has written is there; the kernel after may start.
RESLORA_DEVICE void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
RESLORA_DEVICE void grid_dependency_launch() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// A value that all lanes of a warp have, and that the compiler knows them to: what follows from it stays in uniform registers.
RESLORA_DEVICE int same_in_warp(int value) {
    int same;
    asm volatile("redux.sync.max.s32 %0, %1, 0xffffffff;" : "=r"(same) : "r"(value));
    return same;
}

// Words in global memory by which blocks of a launch tell each other how far they are.
RESLORA_DEVICE std::uint32_t add_global(std::uint32_t* word, std::uint32_t value) {
    std::uint32_t before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(word), "r"(value) : "memory");
    return before;
}
// Counts one on, and hands on nothing.
RESLORA_DEVICE std::uint32_t take_global(std::uint32_t* word) {
    std::uint32_t before;
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(word) : "memory");
    return before;
}
// Adds behind what this thread has written, and those of its warp before a warp_barrier.
RESLORA_DEVICE void release_global(std::uint32_t* word, std::uint32_t value) {
    asm volatile("fence.acq_rel.gpu;\nred.release.gpu.global.add.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}
// Returns when it is so much.
RESLORA_DEVICE void await_global(const std::uint32_t* word, std::uint32_t value) {
    std::uint32_t found;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(word) : "memory");
    while (found != value);
}
// Orders accesses of threads to global memory and those of the copy engine.
RESLORA_DEVICE void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

}  // namespace reslora
#endif

namespace reslora {

// The descriptor of what lies so many bytes further on: 32 for the next 16 k by k, 16 rows of 128 bytes otherwise.
RESLORA_DEVICE std::uint64_t descriptor_after(std::uint64_t descriptor, int bytes) {
    return descriptor + static_cast<std::uint64_t>(bytes >> 4);
}

}  // namespace reslora

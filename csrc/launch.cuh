// Launching, and choosing the instantiation for a type.
#pragma once
#include <cstddef>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "matmul.cuh"

namespace reslora {

struct Grid {
    std::int64_t x, y, z;
};

inline std::int64_t blocks(std::int64_t size, std::int64_t block) { return (size + block - 1) / block; }

#ifdef __CUDACC__
// How many clusters of this kernel can run at a time: fewer than processors / cluster where those of a GPU come in groups
// that the cluster does not divide. 0: none.
inline int clusters_at_a_time(const void* kernel, int threads, int shared, int cluster) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    cudaLaunchConfig_t launch{};
    launch.gridDim = dim3(cluster);
    launch.blockDim = dim3(threads);
    launch.dynamicSmemBytes = shared;
    launch.attrs = &attribute;
    launch.numAttrs = 1;
    int count = 0;
    const bool known =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared) == cudaSuccess &&
        cudaOccupancyMaxActiveClusters(&count, kernel, &launch) == cudaSuccess;
    if (!known) cudaGetLastError();  // the launch itself will say what is wrong
    return known ? count : 0;
}

// More than 48 KiB of shared memory must be allowed: once for a kernel and a GPU, as far as this thread knows.
inline cudaError_t allow_shared(const void* kernel, int shared) {
    thread_local std::map<std::pair<const void*, int>, int> allowed;
    int gpu = 0;
    cudaError_t error = cudaGetDevice(&gpu);
    if (error != cudaSuccess) return error;
    int& most = allowed[{kernel, gpu}];
    if (shared <= most) return cudaSuccess;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error == cudaSuccess) most = shared;
    return error;
}

template <class Params>
void run(const char* name, void (*kernel)(Params), Grid grid, int threads, int shared, Params params, Device device,
         int cluster = 1, bool programmatic = false, bool = false) {
    cudaError_t error = cudaSuccess;
    if (shared > 48 * 1024) error = allow_shared(reinterpret_cast<const void*>(kernel), shared);
    if (error == cudaSuccess) {
        cudaLaunchAttribute attributes[2]{};
        unsigned count = 0;
        if (cluster > 1) {
            attributes[count].id = cudaLaunchAttributeClusterDimension;
            attributes[count++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
        }
        if (programmatic) {  // the kernel calls grid_dependency_wait
            attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
            attributes[count++].val.programmaticStreamSerializationAllowed = 1;
        }
        cudaLaunchConfig_t launch{};
        launch.gridDim =
            dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
        launch.blockDim = dim3(threads);
        launch.dynamicSmemBytes = shared;
        launch.stream = reinterpret_cast<cudaStream_t>(device.stream);
        launch.attrs = attributes;
        launch.numAttrs = count;
        void* arguments[] = {&params};
        error = cudaLaunchKernelExC(&launch, reinterpret_cast<const void*>(kernel), arguments);
    }
    if (error != cudaSuccess) {
        cudaGetLastError();  // it is raised here; the next launch must not report it again
        throw std::runtime_error(std::string("CUDA kernel ") + name + "[grid " + std::to_string(grid.x) + " x " +
                                 std::to_string(grid.y) + " x " + std::to_string(grid.z) + ", " +
                                 std::to_string(threads) + " threads, " + std::to_string(shared) +
                                 " bytes of shared memory] failed: " + cudaGetErrorString(error));
    }
}
// Words in global memory that are zero, for a kernel that leaves them so. The launches of a stream follow each other and
// share them; a launch that a graph holds has its own for good, since the graph may run beside its stream.
inline std::uint32_t* progress_words(int count, Device device) {
    struct Words {
        std::uint32_t* words;
        int room;
    };
    constexpr int LEAST = 4096;
    static std::mutex one_at_a_time;
    static std::map<std::pair<int, std::uintptr_t>, Words> of_streams;
    static std::map<int, Words> of_graphs;  // what is left of the last piece
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    int gpu = 0;
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cudaError_t error = cudaGetDevice(&gpu);
    if (error == cudaSuccess) error = cudaStreamIsCapturing(reinterpret_cast<cudaStream_t>(device.stream), &status);
    const bool captured = status != cudaStreamCaptureStatusNone;
    Words& found = captured ? of_graphs[gpu] : of_streams[{gpu, device.stream}];
    if (error == cudaSuccess && found.room < count) {
        const int room = count > LEAST ? count : LEAST;
        cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // of this thread: an allocation is no part of a graph
        cudaStream_t beside{};
        void* made = nullptr;
        cudaThreadExchangeStreamCaptureMode(&mode);
        error = cudaMalloc(&made, sizeof(std::uint32_t) * static_cast<std::size_t>(room));
        if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&beside, cudaStreamNonBlocking);
        if (error == cudaSuccess) error = cudaMemsetAsync(made, 0, sizeof(std::uint32_t) * static_cast<std::size_t>(room), beside);
        if (error == cudaSuccess) error = cudaStreamSynchronize(beside);
        if (beside) cudaStreamDestroy(beside);
        cudaThreadExchangeStreamCaptureMode(&mode);
        if (error == cudaSuccess) found = {static_cast<std::uint32_t*>(made), room};
    }
    if (error != cudaSuccess) {
        cudaGetLastError();
        throw std::runtime_error(std::string("no memory for a kernel's progress: ") + cudaGetErrorString(error));
    }
    std::uint32_t* words = found.words;
    if (captured) found = {words + count, found.room - count};
    return words;
}
#else
inline int clusters_at_a_time(const void*, int, int, int) { return 0; }
inline std::uint32_t* progress_words(int count, Device) {
    static std::map<int, std::vector<std::uint32_t>> words;
    return words.try_emplace(count, count, 0u).first->second.data();
}

template <class Params>
void run(const char* name, void (*kernel)(Params), Grid grid, int threads, int shared, Params params, Device,
         int cluster = 1, bool = false, bool in_order = false) {
    emulator::launch(name, {grid.x, grid.y, grid.z}, threads, shared, [&] { kernel(params); }, cluster, in_order);
}
#endif

template <class Use>
void with_math(Math math, Use use) {
    switch (math) {
        case MATH_BFLOAT16: return use(Bf16Math{});
        case MATH_FLOAT16: return use(Fp16Math{});
        case MATH_TF32: return use(Tf32Math{});
        default: return use(IeeeMath{});
    }
}

inline Matrix transposed(Matrix m) { return {m.data, m.column, m.row, m.columns, m.rows, m.type, ELEMENTS}; }

// With the widest access that its rows allow: as they are, or float32 to be converted on the way.
template <class Element>
Matrix as_read(Matrix m) {
    constexpr Type TYPE = SAME<Element, Bf16> ? BFLOAT16 : SAME<Element, Fp16> ? FLOAT16 : FLOAT32;
    const std::int64_t size = m.type == FLOAT32 ? 4 : 2;
    const bool aligned = m.column == 1 && m.row * size % 16 == 0 && m.columns * size % 16 == 0 &&
                         reinterpret_cast<std::uintptr_t>(m.data) % 16 == 0;
    if (aligned) m.access = m.type == TYPE ? COPIED : m.type == FLOAT32 ? CONVERTED : ELEMENTS;
    return m;
}

}  // namespace reslora

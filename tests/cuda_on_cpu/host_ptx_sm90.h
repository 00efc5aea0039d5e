// The host twins of csrc/ptx_sm90.cuh: what each instruction does, by the PTX manual.
#pragma once
#include "emulator.h"
#include "params.h"
#include "ptx.cuh"

#define __grid_constant__

namespace reslora {

using emulator::Barrier;
using emulator::TensorMap;

inline TensorMap encode_tensor_map(const void* base, Type, std::int64_t rows, std::int64_t columns,
                                   std::int64_t row_stride_elements, int box_rows, int box_columns) {
    return emulator::make_tensor_map(base, rows, columns, row_stride_elements, box_rows, box_columns);
}

using emulator::fence_async_shared;
using emulator::fence_barrier_init;
using emulator::mbarrier_arrive;
using emulator::mbarrier_arrive_cluster;
using emulator::mbarrier_expect;
using emulator::mbarrier_init;
using emulator::mbarrier_wait;

inline void tma_load(void* shared, const TensorMap* map, int column, int row, Barrier* barrier) {
    emulator::tma_load_multicast(shared, map, column, row, barrier,
                                 static_cast<std::uint16_t>(1 << emulator::current->rank));
}
using emulator::tma_load_multicast;
using emulator::copy_to_block;
using emulator::tma_store;
using emulator::tma_store_commit;
template <int N>
void tma_store_wait_read() {
    emulator::tma_store_wait_read(N);
}

using emulator::wgmma_commit;
using emulator::wgmma_descriptor;
using emulator::wgmma_fence;
template <int N>
void wgmma_wait() {
    static_assert(N >= 0 && N <= 7);
    emulator::wgmma_wait(N);
}
template <int N, bool B_MN_MAJOR, bool A_MN_MAJOR = false, class Element>
void wgmma(float (&acc)[N / 2], std::uint64_t a, std::uint64_t b, Element) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256 && sizeof(Element) == 2);
    emulator::wgmma(acc, {a, b, N, A_MN_MAJOR, B_MN_MAJOR, [](std::uint16_t bits) { return to_float(Element{bits}); }});
}

template <int N>
void set_registers_up() {
    static_assert(N % 8 == 0 && N >= 24 && N <= 240);
}
template <int N>
void set_registers_down() {
    static_assert(N % 8 == 0 && N >= 24 && N <= 240);
}

using emulator::cluster_arrive;
using emulator::cluster_wait;
inline int cluster_rank() { return emulator::current->rank; }
using emulator::named_barrier;
inline void grid_dependency_wait() {}
inline void grid_dependency_launch() {}

inline int same_in_warp(int value) { return static_cast<int>(from_lane(static_cast<std::uint32_t>(value), 0)); }

inline std::uint32_t add_global(std::uint32_t* word, std::uint32_t value) {
    const std::uint32_t before = *word;
    *word += value;
    return before;
}
inline std::uint32_t take_global(std::uint32_t* word) { return add_global(word, 1); }
inline void release_global(std::uint32_t* word, std::uint32_t value) { *word += value; }
inline void await_global(const std::uint32_t* word, std::uint32_t value) {
    emulator::wait_until([word, value] { return *word == value; }, [] { return "a word in global memory"; });
}
inline void fence_async_global() {}

}  // namespace reslora

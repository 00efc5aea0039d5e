// The units that sm_90 has beside the threads: copy engine, transaction barriers, warpgroup products, clusters.
#pragma once
#include "emulator.h"

namespace emulator {

using Barrier = std::uint64_t;

// A matrix of 16-bit elements in global memory, moved in boxes of [box_rows, 64], in 128-byte swizzle.
struct alignas(64) TensorMap {
    std::uint64_t mark;
    unsigned char* base;
    std::int64_t rows, columns, row_bytes, box_rows;
    std::int64_t rest[10];
};
static_assert(sizeof(TensorMap) == 128);
TensorMap make_tensor_map(const void* base, std::int64_t rows, std::int64_t columns, std::int64_t row_stride_elements,
                          int box_rows, int box_columns);

void mbarrier_init(Barrier* barrier, int count);
void mbarrier_expect(Barrier* barrier, int bytes);
void mbarrier_arrive(Barrier* barrier);
void mbarrier_arrive_cluster(Barrier* barrier, int cta);
void mbarrier_wait(Barrier* barrier, int parity);
void fence_barrier_init();
void fence_async_shared();

void tma_load_multicast(void* shared, const TensorMap* map, int column, int row, Barrier* barrier, std::uint16_t mask);
void copy_to_block(void* shared, int bytes, Barrier* barrier, int cta);
void tma_store(const TensorMap* map, const void* shared, int column, int row);
void tma_store_commit();
void tma_store_wait_read(int left);

struct GroupFactors {
    std::uint64_t a, b;  // descriptors
    int n;
    bool b_mn_major;
    float (*to_float)(std::uint16_t bits);
};
std::uint64_t wgmma_descriptor(const void* shared, int leading_bytes, int stride_bytes);
void wgmma(float* accumulators, const GroupFactors& factors);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int left);

void cluster_arrive();
void cluster_wait();
void named_barrier(int id, int threads);

// Between the files of these units.
unsigned char* shared_of(int rank, std::int64_t offset, std::int64_t bytes, const char* instruction);
// What the copy engine and the tensor cores see there; an error if a thread has written since its last fence.
const unsigned char* fenced_shared(int rank, std::int64_t offset, std::int64_t bytes, const char* instruction);
void write_from_async(int rank, std::int64_t offset, const void* from, std::int64_t bytes);
void complete_bytes(int rank, std::int64_t barrier, std::int64_t bytes);
void require_barrier(int rank, std::int64_t barrier, const char* instruction);
std::int64_t offset_of(const void* address);
std::int64_t swizzled(std::int64_t offset);
void copies_begin();
void thread_copies_end();
void products_begin();
void thread_products_end();
void products_end();

}  // namespace emulator

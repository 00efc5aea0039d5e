// Runs CUDA kernels on the host, thread by thread, as unkindly as the programming model allows. See __init__.py.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace emulator {

struct Place {
    std::int64_t x, y, z;
};

struct Copy {  // of cp.async
    unsigned char* to;
    const unsigned char* from;
    int bytes;
};

struct Access {  // of store_shared or load_shared
    const void* address;
    int bytes;
};

enum class State { READY, BLOCKED, AT_BARRIER, AT_WARP, DONE };

struct Thread {
    void* stack_pointer = nullptr;
    std::vector<char> stack;
    int id = 0;     // in its block
    int index = 0;  // in its cluster
    int rank = 0;   // of its block in the cluster
    State state = State::DONE;
    std::function<bool()> may_go_on;           // of a blocked thread
    std::function<std::string()> waits_for;    // for the message when it never may
    std::vector<Copy> open;                // issued, not yet in a group
    std::deque<std::vector<Copy>> groups;  // not yet waited for, oldest first
    std::vector<Access> accesses;
    std::vector<Access> fills;  // by cp.async
    // What this thread brings to a warp-wide instruction, and where its result goes.
    const char* instruction = nullptr;
    const void* argument = nullptr;
    void* result = nullptr;
};

// Performs a warp-wide instruction for its 32 threads.
using WarpInstruction = void (*)(Thread* lanes);

struct Statistics {  // of everything since the last reset
    std::int64_t launches, copies, late_copies, matrix_loads, bank_conflicts, multiplications, barriers;
    std::int64_t tensor_loads, tensor_stores, block_copies, group_multiplications, shared_accesses;
};

struct Block {  // of the cluster that runs
    Place place;
    unsigned char* shared;
    int running;  // threads that have not ended
};

struct Event {  // what a unit beside the threads does, at a time of its own
    std::function<void()> happen;
};

extern Thread* current;
extern Place block, grid;
extern std::vector<Block> cluster;
extern std::vector<Thread> threads;
extern unsigned char* shared;
extern std::int64_t shared_size, shared_begin;  // begin: its address on the device
extern std::mt19937 chance;
extern int planted;  // which of the faults that a test has compiled in is there; 0: none
extern Statistics statistics;

// Ends the launch with this message; from a thread or from an event.
[[noreturn]] void fail(const std::string& message);
void require_shared(const void* address, int bytes, const char* instruction);
void barrier();
void warp_wide(const char* instruction, const void* argument, void* result, WarpInstruction perform);
void land(const Copy& copy);
void wait_until(std::function<bool()> may_go_on, std::function<std::string()> waits_for);
// Happens when chance has it, at the latest when nothing else can; or now, with settle.
std::shared_ptr<Event> later(std::function<void()> happen);
void settle(Event& event);
// Raises std::runtime_error for what would be a fault, a hang or a race on the device. The blocks of a cluster,
// neighbours in x, run together. In order: the device begins blocks by their number, only so many at a time as chance
// has it, the next when those have ended; else in any order.
void launch(const char* name, Place grid, int threads, int shared_bytes, const std::function<void()>& kernel,
            int cluster_size = 1, bool in_order = false);

// Of the units that only sm_90 has, in emulator_sm90.cpp.
void cluster_begins();
void warp_has_run(int rank, int warp);
void thread_ends();
void cluster_ends();

// The units that sm_90 has beside the threads: copy engine, transaction barriers, warpgroup products, clusters.

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
    bool a_mn_major, b_mn_major;
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

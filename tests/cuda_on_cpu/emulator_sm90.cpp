// Barriers of sm_90 and the two views of shared memory: the threads', and that of the units beside them.
#include "emulator_sm90.h"

#include <cstring>
#include <map>
#include <utility>

namespace emulator {

namespace {

constexpr Barrier MARK = 0x7FF5B0A7B0A7B0A7;  // what a barrier's memory holds
constexpr std::int64_t MOST = (1 << 20) - 1;  // arrivals or bytes that a barrier can count

struct Transaction {
    int count, missing;
    std::int64_t bytes, phase;
    int made_by;
    bool announced;  // to the copy engine and the other blocks, by a fence
};

struct Named {
    int threads, arrived;
    std::int64_t generation;
};

struct Memory {  // of a block
    std::vector<unsigned char> seen_by_units;
    std::map<std::int64_t, Transaction> barriers;
    Named named[16];
};

std::vector<Memory> memories;
std::vector<std::int64_t> arrived_in;  // the generation of the cluster's barrier, by thread; -1 once waited for
std::int64_t cluster_generation = 0;
std::size_t cluster_arrived = 0;

std::string name_of(int rank, std::int64_t offset) {
    return "mbarrier at byte " + std::to_string(offset) + " of shared memory" +
           (cluster.size() > 1 ? " of block " + std::to_string(rank) + " of the cluster" : "");
}

Transaction& at(int rank, std::int64_t offset, const char* instruction) {
    if (offset < 0 || offset % 8 || offset + 8 > shared_size)
        fail(std::string(instruction) + ": misaligned or outside of shared memory");
    const auto found = memories[rank].barriers.find(offset);
    if (found == memories[rank].barriers.end())
        fail(std::string(instruction) + ": there is no " + name_of(rank, offset));
    Barrier word;
    std::memcpy(&word, cluster[rank].shared + offset, 8);
    if (word != MARK) fail(std::string(instruction) + ": something else was written over the " + name_of(rank, offset));
    return found->second;
}

std::string counts(const Transaction& barrier) {
    return std::to_string(barrier.missing) + " of " + std::to_string(barrier.count) + " arrivals and " +
           std::to_string(barrier.bytes) + " bytes are missing";
}

void go_on(Transaction& barrier, int rank, std::int64_t offset) {
    if (barrier.missing < 0) fail(name_of(rank, offset) + ": more arrivals than its count");
    if (barrier.bytes > MOST || barrier.bytes < -MOST) fail(name_of(rank, offset) + ": more bytes than it can count");
    if (barrier.missing > 0) return;
    if (barrier.bytes < 0) fail(name_of(rank, offset) + ": more bytes came than were expected; " + counts(barrier));
    if (barrier.bytes > 0) return;
    ++barrier.phase;
    barrier.missing = barrier.count;
}

void arrive(int rank, std::int64_t offset, std::int64_t bytes, const char* instruction) {
    Transaction& barrier = at(rank, offset, instruction);
    if (rank != current->rank && !barrier.announced)
        fail(name_of(rank, offset) + " is used by another block before fence_barrier_init");
    barrier.bytes += bytes;
    --barrier.missing;
    go_on(barrier, rank, offset);
}

}  // namespace

std::int64_t offset_of(const void* address) { return static_cast<const unsigned char*>(address) - shared; }

std::int64_t swizzled(std::int64_t offset) { return offset ^ (offset >> 7 & 7) << 4; }

unsigned char* shared_of(int rank, std::int64_t offset, std::int64_t bytes, const char* instruction) {
    if (offset < 0 || offset + bytes > shared_size)
        fail(std::string(instruction) + ": address outside of shared memory");
    if (cluster[rank].running == 0) fail(std::string(instruction) + ": to a block that has ended");
    auto& seen = memories[rank].seen_by_units;
    if (seen.empty()) seen.assign(shared_size, 0xFF);
    return cluster[rank].shared + offset;
}

const unsigned char* fenced_shared(int rank, std::int64_t offset, std::int64_t bytes, const char* instruction) {
    const unsigned char* of_threads = shared_of(rank, offset, bytes, instruction);
    const unsigned char* of_units = memories[rank].seen_by_units.data() + offset;
    if (std::memcmp(of_threads, of_units, bytes) != 0)
        fail(std::string(instruction) + ": at byte " + std::to_string(offset) +
             " of shared memory, threads have written with no fence_async_shared since, or too early");
    return of_units;
}

void write_from_async(int rank, std::int64_t offset, const void* from, std::int64_t bytes) {
    std::memcpy(shared_of(rank, offset, bytes, "tma_load"), from, bytes);
    std::memcpy(memories[rank].seen_by_units.data() + offset, from, bytes);
}

// All writes of all threads until now: those of one thread cannot be told from another's.
void fence_async_shared() {
    for (auto& entry : memories[current->rank].barriers)
        if (entry.second.made_by == current->index) entry.second.announced = true;
    const unsigned char* written = shared_of(current->rank, 0, shared_size, "fence_async_shared");
    auto& seen = memories[current->rank].seen_by_units;
    if (std::memcmp(seen.data(), written, shared_size) != 0) std::memcpy(seen.data(), written, shared_size);
}

void mbarrier_init(Barrier* barrier, int count) {
    const std::int64_t offset = offset_of(barrier);
    if (offset < 0 || offset % 8 || offset + 8 > shared_size) fail("mbarrier_init: misaligned or outside of shared memory");
    if (count < 1 || count > MOST) fail("mbarrier_init: no such count");
    const Transaction fresh{count, count, 0, 0, current->index, false};
    if (!memories[current->rank].barriers.emplace(offset, fresh).second)
        fail("mbarrier_init: there is a " + name_of(current->rank, offset) + " already");
    std::memcpy(barrier, &MARK, 8);
}

void fence_barrier_init() {
    for (auto& entry : memories[current->rank].barriers)
        if (entry.second.made_by == current->index) entry.second.announced = true;
}

void mbarrier_expect(Barrier* barrier, int bytes) {
    if (bytes < 0 || bytes > MOST) fail("mbarrier_expect: no such number of bytes");
    arrive(current->rank, offset_of(barrier), bytes, "mbarrier_expect");
}

void mbarrier_arrive(Barrier* barrier) { arrive(current->rank, offset_of(barrier), 0, "mbarrier_arrive"); }

void mbarrier_arrive_cluster(Barrier* barrier, int cta) {
    if (cta < 0 || cta >= static_cast<int>(cluster.size())) fail("mbarrier_arrive_cluster: no such block");
    if (cluster[cta].running == 0) fail("mbarrier_arrive_cluster: at a block that has ended");
    arrive(cta, offset_of(barrier), 0, "mbarrier_arrive_cluster");
}

void mbarrier_wait(Barrier* barrier, int parity) {
    if (parity != 0 && parity != 1) fail("mbarrier_wait: the parity is 0 or 1");
    const int rank = current->rank;
    const std::int64_t offset = offset_of(barrier);
    const Transaction* waited = &at(rank, offset, "mbarrier_wait");
    wait_until([=] { return (waited->phase & 1) != parity; },
               [=] { return name_of(rank, offset) + ", parity " + std::to_string(parity) + ", where " + counts(*waited); });
}

void require_barrier(int rank, std::int64_t barrier, const char* instruction) {
    if (!at(rank, barrier, instruction).announced)
        fail(std::string(instruction) + ": no fence_barrier_init after mbarrier_init");
}

void complete_bytes(int rank, std::int64_t offset, std::int64_t bytes) {
    require_barrier(rank, offset, "tma_load");
    Transaction& barrier = at(rank, offset, "tma_load");
    barrier.bytes -= bytes;
    go_on(barrier, rank, offset);
}

void named_barrier(int id, int count) {
    if (id < 1 || id > 15) fail("named_barrier: its number is 1 to 15");
    if (count < 32 || count % 32 || count > static_cast<int>(threads.size() / cluster.size()))
        fail("named_barrier: no such number of threads");
    Named& barrier = memories[current->rank].named[id];
    if (barrier.arrived != 0 && barrier.threads != count) fail("named_barrier: of different numbers of threads");
    barrier.threads = count;
    const std::int64_t before = barrier.generation;
    if (++barrier.arrived == count) {
        barrier.arrived = 0;
        ++barrier.generation;
    }
    wait_until([&barrier, before] { return barrier.generation != before; },
               [&barrier, id] {
                   return "named barrier " + std::to_string(id) + ", where " + std::to_string(barrier.arrived) + " of " +
                          std::to_string(barrier.threads) + " have arrived";
               });
}

void cluster_arrive() {
    if (arrived_in[current->index] >= 0) fail("cluster_arrive: twice with no cluster_wait between");
    arrived_in[current->index] = cluster_generation;
    if (++cluster_arrived < threads.size()) return;
    cluster_arrived = 0;
    ++cluster_generation;
}

void cluster_wait() {
    const std::int64_t before = std::exchange(arrived_in[current->index], -1);
    if (before < 0) fail("cluster_wait: with no cluster_arrive before");
    wait_until([before] { return cluster_generation != before; }, [] { return "the barrier of the cluster"; });
}

void cluster_begins() {
    memories = std::vector<Memory>(cluster.size());
    arrived_in.assign(threads.size(), -1);
    cluster_generation = 0;
    cluster_arrived = 0;
    copies_begin();
    products_begin();
}

void thread_ends() {
    if (arrived_in[current->index] >= 0) fail("cluster_arrive with no cluster_wait when the kernel ends");
    thread_copies_end();
    thread_products_end();
}

void cluster_ends() {
    for (std::size_t rank = 0; rank < memories.size(); ++rank)
        for (const auto& [offset, barrier] : memories[rank].barriers)
            if (barrier.bytes != 0)
                fail(name_of(static_cast<int>(rank), offset) + " when the kernel ends: " + counts(barrier));
    products_end();
}

}  // namespace emulator

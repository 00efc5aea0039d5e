// Barriers of sm_90 and the two views of shared memory: the threads', and that of the units beside them.
#include "emulator.h"

#include <algorithm>
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

constexpr int WARP = 32, ANYONE = 33;

struct Memory {  // of a block
    // What the units see, and what all threads had written when the last warp stopped; empty until the first use.
    std::vector<unsigned char> seen_by_units, written;
    std::vector<unsigned char> writer;             // by byte: 1 + the warp whose write no fence has followed
    std::vector<std::int64_t> unfenced[ANYONE + 1];  // bytes, by writer
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
    if (word != MARK) fail(std::string(instruction) + ": something was written over the " + name_of(rank, offset));
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

// What has changed was written by this one.
void find_writes(int rank, int writer) {
    constexpr std::int64_t AT_ONCE = 1024;
    Memory& memory = memories[rank];
    const unsigned char* now = cluster[rank].shared;
    for (std::int64_t from = 0; from < shared_size; from += AT_ONCE) {
        const std::int64_t bytes = std::min(AT_ONCE, shared_size - from);
        if (std::memcmp(now + from, &memory.written[from], bytes) == 0) continue;
        for (std::int64_t i = from; i < from + bytes; ++i) {
            if (now[i] == memory.written[i]) continue;
            memory.written[i] = now[i];
            memory.writer[i] = static_cast<unsigned char>(writer);
            memory.unfenced[writer].push_back(i);
        }
    }
}

Memory& memory_in_use(int rank) {
    Memory& memory = memories[rank];
    if (!memory.written.empty()) return memory;
    memory.seen_by_units.assign(shared_size, 0xFF);
    memory.written.assign(shared_size, 0xFF);
    memory.writer.assign(shared_size, 0);
    find_writes(rank, ANYONE);
    return memory;
}

void publish(Memory& memory, int writer) {
    for (std::int64_t i : memory.unfenced[writer]) {
        if (memory.writer[i] != writer) continue;
        memory.seen_by_units[i] = memory.written[i];
        memory.writer[i] = 0;
    }
    memory.unfenced[writer].clear();
}

void announce_barriers() {
    for (auto& entry : memories[current->rank].barriers)
        if (entry.second.made_by == current->index) entry.second.announced = true;
}

}  // namespace

void warp_has_run(int rank, int warp) {
    if (!memories[rank].written.empty()) find_writes(rank, warp + 1);
}

std::int64_t offset_of(const void* address) { return static_cast<const unsigned char*>(address) - shared; }

std::int64_t swizzled(std::int64_t offset) {
    const std::int64_t address = shared_begin + offset;
    return (address ^ (address >> 7 & 7) << 4) - shared_begin;
}

unsigned char* shared_of(int rank, std::int64_t offset, std::int64_t bytes, const char* instruction) {
    if (offset < 0 || offset + bytes > shared_size)
        fail(std::string(instruction) + ": address outside of shared memory");
    if (cluster[rank].running == 0) fail(std::string(instruction) + ": to a block that has ended");
    memory_in_use(rank);
    return cluster[rank].shared + offset;
}

const unsigned char* fenced_shared(int rank, std::int64_t offset, std::int64_t bytes, const char* instruction) {
    const unsigned char* of_threads = shared_of(rank, offset, bytes, instruction);
    const Memory& memory = memories[rank];
    const unsigned char* of_units = memory.seen_by_units.data() + offset;
    if (std::memcmp(of_threads, of_units, bytes) == 0) return of_units;
    const std::int64_t first = std::mismatch(of_threads, of_threads + bytes, of_units).first - of_threads + offset;
    const int writer = memory.writer[first];
    fail(std::string(instruction) + ": at byte " + std::to_string(first) + " of shared memory, " +
         (writer == 0 || writer == ANYONE ? "a thread" : "warp " + std::to_string(writer - 1)) +
         " has written with no fence_async_shared since, or too early");
}

void write_from_async(int rank, std::int64_t offset, const void* from, std::int64_t bytes) {
    std::memcpy(shared_of(rank, offset, bytes, "tma_load"), from, bytes);
    Memory& memory = memories[rank];
    std::memcpy(&memory.seen_by_units[offset], from, bytes);
    std::memcpy(&memory.written[offset], from, bytes);
    std::memset(&memory.writer[offset], 0, bytes);
}

// For all of its warp: what the lanes of a warp have written is not told apart.
void fence_async_shared() {
    announce_barriers();
    Memory& memory = memory_in_use(current->rank);
    const int writer = current->id / WARP + 1;
    find_writes(current->rank, writer);
    publish(memory, writer);
    publish(memory, ANYONE);
}

void mbarrier_init(Barrier* barrier, int count) {
    const std::int64_t offset = offset_of(barrier);
    if (offset < 0 || offset % 8 || offset + 8 > shared_size)
        fail("mbarrier_init: misaligned or outside of shared memory");
    if (count < 1 || count > MOST) fail("mbarrier_init: no such count");
    memory_in_use(current->rank);
    const Transaction fresh{count, count, 0, 0, current->index, false};
    if (!memories[current->rank].barriers.emplace(offset, fresh).second)
        fail("mbarrier_init: there is a " + name_of(current->rank, offset) + " already");
    std::memcpy(barrier, &MARK, 8);
}

void fence_barrier_init() { announce_barriers(); }

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
    const auto name = [=] {
        return name_of(rank, offset) + ", parity " + std::to_string(parity) + ", where " + counts(*waited);
    };
    wait_until([=] { return (waited->phase & 1) != parity; }, name);
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
    const auto name = [&barrier, id] {
        return "named barrier " + std::to_string(id) + ", where " + std::to_string(barrier.arrived) + " of " +
               std::to_string(barrier.threads) + " have arrived";
    };
    wait_until([&barrier, before] { return barrier.generation != before; }, name);
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

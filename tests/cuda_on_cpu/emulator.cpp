// The scheduler: every thread of a block is a fiber; which warp runs on, and in which order its lanes do, is drawn.
#include "emulator.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define UNPOISON(stack) __asan_unpoison_memory_region((stack).data(), (stack).size())
#define POISON(from, bytes) __asan_poison_memory_region(from, bytes)
#else
#define POISON(from, bytes) (void)0
#define UNPOISON(stack) (void)0
#endif

#if !defined(__x86_64__)
#error "the emulator switches stacks with x86-64 code"
#endif

// Saves the registers that a function must keep and its stack, and goes on where the other one stopped. (swapcontext
// would do, with two system calls each time.)
extern "C" void reslora_switch_stack(void** save, void* load);
asm(R"(
.text
.globl reslora_switch_stack
.hidden reslora_switch_stack
.type reslora_switch_stack, @function
reslora_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

namespace emulator {

Thread* current = nullptr;
Place block, grid;
std::vector<Block> cluster;
std::vector<Thread> threads;
unsigned char* shared = nullptr;
std::int64_t shared_size = 0, shared_begin = 0;
std::mt19937 chance(0);
int planted = 0;
Statistics statistics{};

namespace {

constexpr int SHARED_AT = 1024;  // the system has what is before
constexpr int WARP = 32, STACK_BYTES = 256 << 10;
constexpr unsigned CHANGE_OF_WARP = 64;  // on average one warp runs so many steps ahead of the others

struct Failed {};  // thrown by fail() where no thread runs

std::vector<std::shared_ptr<Event>> events;
unsigned event_every = 0;  // steps; 0 until drawn
std::vector<WarpInstruction> pending;
void* scheduler = nullptr;
const std::function<void()>* kernel = nullptr;
std::string failure;

void suspend(State state) {
    current->state = state;
    reslora_switch_stack(&current->stack_pointer, scheduler);
}

void start() {
    (*kernel)();
    if (!current->open.empty()) failure = "copies were issued and never committed";
    for (const auto& group : current->groups)
        if (!group.empty()) failure = "copies are still in flight when the kernel ends";
    thread_ends();
    --cluster[current->rank].running;
    suspend(State::DONE);
}

void prepare(Thread& thread, int index) {
    const int count = static_cast<int>(threads.size() / cluster.size());
    thread.stack.resize(STACK_BYTES);
    UNPOISON(thread.stack);
    thread.index = index;
    thread.id = index % count;
    thread.rank = index / count;
    thread.state = State::READY;
    thread.open.clear();
    thread.groups.clear();
    thread.accesses.clear();
    thread.fills.clear();
    auto top = reinterpret_cast<std::uintptr_t>(thread.stack.data() + STACK_BYTES) & ~std::uintptr_t{15};
    void** frame = reinterpret_cast<void**>(top) - 2;  // start() sees the stack as after a call
    frame[1] = nullptr;
    frame[0] = reinterpret_cast<void*>(&start);
    thread.stack_pointer = frame - 6;
    std::memset(frame - 6, 0, 6 * sizeof(void*));
}

// Lets every lane of a warp run until it waits; performs the warp-wide instruction at which all 32 have arrived.
bool step(int warp) {
    Thread* lanes = &threads[warp * WARP];
    block = cluster[lanes->rank].place;
    shared = cluster[lanes->rank].shared;
    bool ran = false;
    const unsigned first = chance();
    for (unsigned i = 0; i < WARP && failure.empty(); ++i) {
        current = &lanes[(first + i) % WARP];
        if (current->state == State::BLOCKED && current->may_go_on()) current->state = State::READY;
        if (current->state != State::READY) continue;
        reslora_switch_stack(&scheduler, current->stack_pointer);
        ran = true;
    }
    current = nullptr;
    if (ran && failure.empty()) warp_has_run(lanes->rank, lanes->id / WARP);
    const auto count = [&](State state) {
        return std::count_if(lanes, lanes + WARP, [&](const Thread& t) { return t.state == state; });
    };
    if (count(State::AT_WARP) == 0 || count(State::BLOCKED) != 0 || !failure.empty()) return ran;
    for (int lane = 0; lane < WARP; ++lane)
        if (lanes[lane].state != State::AT_WARP || lanes[lane].instruction != lanes[0].instruction)
            return failure = "the lanes of a warp are at different instructions", true;
    pending[warp](lanes);
    for (int lane = 0; lane < WARP; ++lane) lanes[lane].state = State::READY;
    return true;
}

bool release_barrier(int rank) {
    const std::size_t count = threads.size() / cluster.size();
    const auto first = threads.begin() + rank * count;
    if (!std::all_of(first, first + count, [](const Thread& t) { return t.state == State::AT_BARRIER; })) return false;
    ++statistics.barriers;
    for (auto thread = first; thread != first + count; ++thread) thread->state = State::READY;
    return true;
}

// A step of the warp that is ahead; else of another one of its block; else of the other blocks.
bool step_ahead(int ahead) {
    const int blocks = static_cast<int>(cluster.size()), warps = static_cast<int>(threads.size()) / WARP / blocks;
    for (int i = 0; i < blocks; ++i) {
        const int rank = (ahead / warps + i) % blocks;
        for (int j = 0; j < warps; ++j)
            if (step(rank * warps + (ahead + j) % warps)) return true;
        if (failure.empty() && release_barrier(rank)) return true;
    }
    return false;
}

void one_event() {
    std::swap(events[chance() % events.size()], events.back());
    const std::shared_ptr<Event> event = std::move(events.back());
    events.pop_back();
    settle(*event);
}

// The banks that lanes need more than once of those that are served together, 128 bytes at a time. Lanes that have made
// another number of such accesses than ``count`` are not there.
void count_conflicts(const Thread* lanes, std::vector<Access> Thread::*kind, std::size_t access, std::size_t count) {
    int bytes = 0;
    for (int lane = 0; lane < WARP; ++lane)
        if ((lanes[lane].*kind).size() == count) bytes = (lanes[lane].*kind)[access].bytes;
    const int together = 128 / bytes;
    for (int first = 0; first < WARP; first += together) {
        std::array<std::set<std::uintptr_t>, 32> words;
        std::size_t most = 1;
        for (int lane = first; lane < first + together; ++lane) {
            if ((lanes[lane].*kind).size() != count) continue;
            for (int byte = 0; byte < bytes; byte += 4) {
                const auto address = reinterpret_cast<std::uintptr_t>((lanes[lane].*kind)[access].address) + byte;
                words[address / 4 % 32].insert(address / 4);
                most = std::max(most, words[address / 4 % 32].size());
            }
        }
        statistics.bank_conflicts += most - 1;
    }
    ++statistics.shared_accesses;
}

// Which copy of a thread goes with which of its neighbour is known of those that have made as many: the others have left
// out whole tiles, of fewer rows than the block has threads for.
void count_accesses() {
    for (std::size_t warp = 0; warp < threads.size(); warp += WARP) {
        const std::size_t count = threads[warp].accesses.size();
        std::set<std::size_t> fills;
        for (int lane = 0; lane < WARP; ++lane) {
            if (threads[warp + lane].accesses.size() != count) failure = "lanes of a warp with other shared accesses";
            fills.insert(threads[warp + lane].fills.size());
        }
        for (std::size_t access = 0; failure.empty() && access < count; ++access)
            count_conflicts(&threads[warp], &Thread::accesses, access, count);
        for (const std::size_t made : fills)
            for (std::size_t access = 0; failure.empty() && access < made; ++access)
                count_conflicts(&threads[warp], &Thread::fills, access, made);
    }
}

std::string deadlock() {
    std::map<std::string, int> waiting;
    for (const Thread& thread : threads)
        if (thread.state == State::BLOCKED)
            ++waiting[thread.waits_for()];
        else if (thread.state == State::AT_BARRIER)
            ++waiting["a barrier that others never reach"];
    std::string message = "deadlock: some threads wait at ";
    for (auto it = waiting.begin(); it != waiting.end(); ++it)
        message += (it == waiting.begin() ? "" : "; ") + it->first + " (" + std::to_string(it->second) + " threads)";
    return message;
}

void run_cluster() {
    const int warps = static_cast<int>(threads.size()) / WARP;
    for (std::size_t i = 0; i < threads.size(); ++i) prepare(threads[i], static_cast<int>(i));
    cluster_begins();
    events.clear();
    event_every = 0;
    int ahead = 0;
    while (failure.empty()) {
        if (!events.empty() && chance() % event_every == 0) {
            one_event();
            continue;
        }
        if (chance() % CHANGE_OF_WARP == 0) ahead = static_cast<int>(chance() % warps);
        if (step_ahead(ahead)) continue;
        if (!events.empty()) {
            one_event();
            continue;
        }
        if (std::all_of(threads.begin(), threads.end(), [](const Thread& t) { return t.state == State::DONE; })) break;
        failure = deadlock();
    }
    if (failure.empty()) cluster_ends();
    if (failure.empty()) count_accesses();
}

}  // namespace

void fail(const std::string& message) {
    failure = message;
    if (current == nullptr) throw Failed{};
    suspend(State::DONE);
    std::abort();  // a thread that failed is not resumed
}

void require_shared(const void* address, int bytes, const char* instruction) {
    const auto* from = static_cast<const unsigned char*>(address);
    if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) fail(std::string(instruction) + ": misaligned address");
    if (from < shared || from + bytes > shared + shared_size)
        fail(std::string(instruction) + ": address outside of shared memory");
}

void barrier() { suspend(State::AT_BARRIER); }

void warp_wide(const char* instruction, const void* argument, void* result, WarpInstruction perform) {
    current->instruction = instruction;
    current->argument = argument;
    current->result = result;
    pending[current->index / WARP] = perform;
    suspend(State::AT_WARP);
}

void land(const Copy& copy) {
    if (copy.bytes) std::memcpy(copy.to, copy.from, copy.bytes);
    std::memset(copy.to + copy.bytes, 0, 16 - copy.bytes);
}

void wait_until(std::function<bool()> may_go_on, std::function<std::string()> waits_for) {
    if (may_go_on() && chance() % 4 != 0) return;
    current->may_go_on = std::move(may_go_on);
    current->waits_for = std::move(waits_for);
    suspend(State::BLOCKED);
}

std::shared_ptr<Event> later(std::function<void()> happen) {
    // At once, or at some time, or not before nothing else can run.
    if (event_every == 0) event_every = std::array{1u, 8u, 128u, 1u << 31}[chance() % 4];
    return events.emplace_back(std::make_shared<Event>(Event{std::move(happen)}));
}

void settle(Event& event) {
    if (const std::function<void()> happen = std::exchange(event.happen, nullptr)) happen();
}

void launch(const char* name, Place size, int count, int shared_bytes, const std::function<void()>& body,
            int cluster_size, bool in_order) {
    failure.clear();
    if (in_order && size.x > 0)
        for (cluster_size = 1 + static_cast<int>(chance() % std::min<std::int64_t>(size.x, 8)); size.x % cluster_size;)
            --cluster_size;
    if (count % WARP || count > 1024) failure = "the number of threads must be a multiple of 32, at most 1024";
    if (size.x < 1 || size.y < 1 || size.z < 1 || size.x >= 1LL << 31 || size.y > 65535 || size.z > 65535)
        failure = "no such grid";
    if (cluster_size < 1 || cluster_size > 8 || size.x % cluster_size) failure = "the grid has no such clusters";
    if (shared_bytes > 227 << 10) failure = "more shared memory than a block may have";
    ++statistics.launches;
    grid = size;
    kernel = &body;
    shared_size = shared_bytes;
    const int past = static_cast<int>(chance() % 8) * 128;  // no more is aligned than what the sources ask for
    shared_begin = SHARED_AT + past;
    const int all = count * cluster_size;
    if (static_cast<int>(threads.size()) != all) threads = std::vector<Thread>(all);
    pending.assign(threads.size() / WARP, nullptr);
    std::vector<std::int64_t> order(failure.empty() ? size.x * size.y * size.z / cluster_size : 0);
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<std::int64_t>(i) * cluster_size;
    if (!in_order) std::shuffle(order.begin(), order.end(), chance);
    for (std::int64_t i : order) {
        // A piece of its own from the heap for each block, so that AddressSanitizer sees its bounds. All NaN at first.
        std::vector<std::unique_ptr<unsigned char, void (*)(void*)>> memory;
        cluster.clear();
        for (int rank = 0; rank < cluster_size; ++rank) {
            void* made = nullptr;
            if (posix_memalign(&made, SHARED_AT, past + shared_bytes + 1)) throw std::bad_alloc();
            memory.emplace_back(static_cast<unsigned char*>(made), std::free);
            POISON(made, past);
            unsigned char* begin = memory.back().get() + past;
            std::memset(begin, 0xFF, shared_bytes);
            cluster.push_back({{i % size.x + rank, i / size.x % size.y, i / size.x / size.y}, begin, count});
        }
        try {
            run_cluster();
        } catch (const Failed&) {
        }
        if (!failure.empty()) break;
    }
    events.clear();
    if (!failure.empty())
        throw std::runtime_error(std::string("CUDA kernel ") + name + "[grid " + std::to_string(size.x) + " x " +
                                 std::to_string(size.y) + " x " + std::to_string(size.z) + ", " +
                                 std::to_string(count) + " threads, " + std::to_string(shared_bytes) +
                                 " bytes of shared memory] failed: " + failure);
}

}  // namespace emulator

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void reslora_emulator_seed(unsigned seed) { emulator::chance.seed(seed); }
EXPORTED void reslora_emulator_plant(int fault) { emulator::planted = fault; }
EXPORTED void reslora_emulator_statistics(std::int64_t* values, bool reset) {
    std::memcpy(values, &emulator::statistics, sizeof emulator::statistics);
    if (reset) emulator::statistics = {};
}

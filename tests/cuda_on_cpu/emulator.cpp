// The scheduler: every thread of a block is a fiber; which warp runs on, and in which order its lanes do, is drawn.
#include "emulator.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define UNPOISON(stack) __asan_unpoison_memory_region((stack).data(), (stack).size())
#else
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
unsigned char* shared = nullptr;
std::int64_t shared_size = 0;
std::mt19937 chance(0);
Statistics statistics{};

namespace {

constexpr int WARP = 32, STACK_BYTES = 256 << 10;
constexpr unsigned CHANGE_OF_WARP = 64;  // on average one warp runs so many steps ahead of the others

std::vector<Thread> threads;
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
    suspend(State::DONE);
}

void prepare(Thread& thread, int id) {
    thread.stack.resize(STACK_BYTES);
    UNPOISON(thread.stack);
    thread.id = id;
    thread.state = State::READY;
    thread.open.clear();
    thread.groups.clear();
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
    bool ran = false;
    const unsigned first = chance();
    for (unsigned i = 0; i < WARP && failure.empty(); ++i) {
        current = &lanes[(first + i) % WARP];
        if (current->state != State::READY) continue;
        reslora_switch_stack(&scheduler, current->stack_pointer);
        ran = true;
    }
    const auto waiting = std::count_if(lanes, lanes + WARP, [](const Thread& t) { return t.state == State::AT_WARP; });
    if (waiting == 0 || !failure.empty()) return ran;
    for (int lane = 0; lane < WARP; ++lane)
        if (lanes[lane].state != State::AT_WARP || lanes[lane].instruction != lanes[0].instruction)
            return failure = "the lanes of a warp are at different instructions", true;
    pending[warp](lanes);
    for (int lane = 0; lane < WARP; ++lane) lanes[lane].state = State::READY;
    return true;
}

void run_block() {
    const int warps = static_cast<int>(threads.size()) / WARP;
    for (std::size_t id = 0; id < threads.size(); ++id) prepare(threads[id], static_cast<int>(id));
    int ahead = 0;
    while (failure.empty()) {
        if (chance() % CHANGE_OF_WARP == 0) ahead = static_cast<int>(chance() % warps);
        bool ran = false;
        for (int i = 0; i < warps && !ran; ++i) ran = step((ahead + i) % warps);
        if (ran) continue;
        const auto at_barrier =
            std::count_if(threads.begin(), threads.end(), [](const Thread& t) { return t.state == State::AT_BARRIER; });
        if (at_barrier == 0) return;
        if (at_barrier != static_cast<std::ptrdiff_t>(threads.size())) {
            failure = "deadlock: some threads wait at a barrier that others never reach";
            return;
        }
        ++statistics.barriers;
        for (Thread& thread : threads) thread.state = State::READY;
    }
}

}  // namespace

void fail(const std::string& message) {
    failure = message;
    suspend(State::DONE);
    std::abort();  // a thread that failed is not resumed
}

void require_shared(const void* address, int bytes, const char* instruction) {
    const auto* from = static_cast<const unsigned char*>(address);
    if (reinterpret_cast<std::uintptr_t>(address) % 16 != 0) fail(std::string(instruction) + ": misaligned address");
    if (from < shared || from + bytes > shared + shared_size)
        fail(std::string(instruction) + ": address outside of shared memory");
}

void barrier() { suspend(State::AT_BARRIER); }

void warp_wide(const char* instruction, const void* argument, void* result, WarpInstruction perform) {
    current->instruction = instruction;
    current->argument = argument;
    current->result = result;
    pending[current->id / WARP] = perform;
    suspend(State::AT_WARP);
}

void land(const Copy& copy) {
    if (copy.bytes) std::memcpy(copy.to, copy.from, copy.bytes);
    std::memset(copy.to + copy.bytes, 0, 16 - copy.bytes);
}

void launch(const char* name, Place size, int count, int shared_bytes, const std::function<void()>& body) {
    failure.clear();
    if (count % WARP || count > 1024) failure = "the number of threads must be a multiple of 32, at most 1024";
    if (size.x < 1 || size.y < 1 || size.z < 1 || size.x >= 1LL << 31 || size.y > 65535 || size.z > 65535)
        failure = "no such grid";
    if (shared_bytes > 227 << 10) failure = "more shared memory than a block may have";
    ++statistics.launches;
    grid = size;
    kernel = &body;
    if (static_cast<int>(threads.size()) != count) threads = std::vector<Thread>(count);
    pending.assign(count / WARP, nullptr);
    std::vector<std::int64_t> order(failure.empty() ? size.x * size.y * size.z : 0);
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<std::int64_t>(i);
    std::shuffle(order.begin(), order.end(), chance);
    for (std::int64_t i : order) {
        block = {i % size.x, i / size.x % size.y, i / size.x / size.y};
        // A block of its own from the heap, so that AddressSanitizer sees its bounds. All NaN at first.
        const std::unique_ptr<unsigned char, void (*)(void*)> memory(
            static_cast<unsigned char*>(std::aligned_alloc(128, (shared_bytes + 127) / 128 * 128 + 128)), std::free);
        shared = memory.get();
        shared_size = shared_bytes;
        std::memset(shared, 0xFF, shared_bytes);
        run_block();
        if (!failure.empty()) break;
    }
    if (!failure.empty())
        throw std::runtime_error(std::string("CUDA kernel ") + name + "[grid " + std::to_string(size.x) + " x " +
                                 std::to_string(size.y) + " x " + std::to_string(size.z) + ", " +
                                 std::to_string(count) + " threads, " + std::to_string(shared_bytes) +
                                 " bytes of shared memory] failed: " + failure);
}

}  // namespace emulator

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void reslora_emulator_seed(unsigned seed) { emulator::chance.seed(seed); }
EXPORTED void reslora_emulator_statistics(std::int64_t* values, bool reset) {
    std::memcpy(values, &emulator::statistics, sizeof emulator::statistics);
    if (reset) emulator::statistics = {};
}

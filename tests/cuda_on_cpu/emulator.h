// Runs CUDA kernels on the host, thread by thread, as unkindly as the programming model allows. See __init__.py.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
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

enum class State { READY, AT_BARRIER, AT_WARP, DONE };

struct Thread {
    void* stack_pointer = nullptr;
    std::vector<char> stack;
    int id = 0;
    State state = State::DONE;
    std::vector<Copy> open;                // issued, not yet in a group
    std::deque<std::vector<Copy>> groups;  // not yet waited for, oldest first
    // What this thread brings to a warp-wide instruction, and where its result goes.
    const char* instruction = nullptr;
    const void* argument = nullptr;
    void* result = nullptr;
};

// Performs a warp-wide instruction for its 32 threads.
using WarpInstruction = void (*)(Thread* lanes);

struct Statistics {  // of everything since the last reset
    std::int64_t launches, copies, late_copies, matrix_loads, bank_conflicts, multiplications, barriers;
};

extern Thread* current;
extern Place block, grid;
extern unsigned char* shared;
extern std::int64_t shared_size;
extern std::mt19937 chance;
extern Statistics statistics;

// Ends the launch with this message.
[[noreturn]] void fail(const std::string& message);
void require_shared(const void* address, int bytes, const char* instruction);
void barrier();
void warp_wide(const char* instruction, const void* argument, void* result, WarpInstruction perform);
void land(const Copy& copy);
// Raises std::runtime_error for what would be a fault, a hang or a race on the device.
void launch(const char* name, Place grid, int threads, int shared_bytes, const std::function<void()>& kernel);

}  // namespace emulator

// The host twins of csrc/ptx.cuh: what each instruction does, by the PTX manual.
#pragma once
#include <cmath>
#include <cstring>

#include "emulator.h"

#define __global__
#define __launch_bounds__(...)
#define RESLORA_DEVICE inline
#define RESLORA_UNROLL
#define RESLORA_KEEP_LOOP

namespace reslora {

using emulator::Place;

inline int thread_id() { return emulator::current->id; }
inline Place block_id() { return emulator::block; }
inline Place grid_size() { return emulator::grid; }
inline void barrier() { emulator::barrier(); }
inline void warp_barrier() {
    emulator::warp_wide("bar.warp.sync", nullptr, nullptr, [](emulator::Thread*) {});
}
inline std::uint32_t from_lane(std::uint32_t value, int lane) {
    struct Asked {
        std::uint32_t value;
        int lane;
    } asked{value, lane};
    std::uint32_t result = 0;
    emulator::warp_wide("shfl", &asked, &result, [](emulator::Thread* lanes) {
        for (int i = 0; i < 32; ++i) {
            const int from = static_cast<const Asked*>(lanes[i].argument)->lane;
            *static_cast<std::uint32_t*>(lanes[i].result) = static_cast<const Asked*>(lanes[from].argument)->value;
        }
    });
    return result;
}
inline unsigned char* shared_memory() { return emulator::shared; }

// One access of each lane, at a time of its own; banks are counted when the block has ended.
template <class Value>
inline void store_shared(Value* shared, Value value) {
    emulator::require_shared(shared, sizeof(Value), "st.shared");
    emulator::current->accesses.push_back({shared, sizeof(Value)});
    std::memcpy(shared, &value, sizeof(Value));
}
template <class Value>
inline Value load_shared(const Value* shared) {
    emulator::require_shared(shared, sizeof(Value), "ld.shared");
    emulator::current->accesses.push_back({shared, sizeof(Value)});
    Value value;
    std::memcpy(&value, shared, sizeof(Value));
    return value;
}

// Lands at once or when it is waited for, as chance has it; until then the destination holds nothing of use.
inline void copy_async(void* to, const void* from, bool there) {
    emulator::require_shared(to, 16, "cp.async");
    if (reinterpret_cast<std::uintptr_t>(from) % 16 != 0) emulator::fail("cp.async: misaligned global address");
    const emulator::Copy copy{static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), there ? 16 : 0};
    ++emulator::statistics.copies;
    emulator::current->fills.push_back({to, 16});
    if (emulator::chance() & 1) return emulator::land(copy);
    ++emulator::statistics.late_copies;
    std::memset(to, 0xFF, 16);
    emulator::current->open.push_back(copy);
}
inline void commit_copies() {
    emulator::current->groups.push_back(std::move(emulator::current->open));
    emulator::current->open.clear();
}
template <int LEFT>
inline void wait_copies() {
    auto& groups = emulator::current->groups;
    for (; groups.size() > LEFT; groups.pop_front())
        for (const emulator::Copy& copy : groups.front()) emulator::land(copy);
}

template <bool TRANSPOSED>
inline void load_matrices(std::uint32_t (&r)[4], const void* row) {
    emulator::require_shared(row, 16, "ldmatrix");
    emulator::warp_wide(TRANSPOSED ? "ldmatrix.trans" : "ldmatrix", row, r, [](emulator::Thread* lanes) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            std::uint16_t elements[8][8];
            int banks[8] = {}, most = 0;  // groups of four banks, of which one access uses each once
            for (int i = 0; i < 8; ++i) {
                const void* address = lanes[8 * matrix + i].argument;
                std::memcpy(elements[i], address, 16);
                most = std::max(most, ++banks[reinterpret_cast<std::uintptr_t>(address) / 16 % 8]);
            }
            ++emulator::statistics.matrix_loads;
            emulator::statistics.bank_conflicts += most - 1;
            for (int lane = 0; lane < 32; ++lane) {
                const int i = lane / 4, j = lane % 4 * 2;
                const std::uint32_t low = TRANSPOSED ? elements[j][i] : elements[i][j];
                const std::uint32_t high = TRANSPOSED ? elements[j + 1][i] : elements[i][j + 1];
                static_cast<std::uint32_t*>(lanes[lane].result)[matrix] = low | high << 16;
            }
        }
    });
}

inline float as_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline std::uint32_t as_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float to_float(Bf16 value) { return as_float(static_cast<std::uint32_t>(value.bits) << 16); }
inline float to_float(Fp16 value) {
    _Float16 half;
    std::memcpy(&half, &value.bits, 2);
    return static_cast<float>(half);
}
inline void from_float(Bf16& result, float value) {
    const std::uint32_t bits = as_bits(value);
    result.bits = static_cast<std::uint16_t>(std::isnan(value) ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline void from_float(Fp16& result, float value) {
    const _Float16 half = static_cast<_Float16>(value);
    std::memcpy(&result.bits, &half, 2);
}
inline std::uint32_t round_to_tf32(float value) {  // to nearest, ties away from zero
    return std::isfinite(value) ? (as_bits(value) + 0x1000u) & 0xFFFFE000u : as_bits(value);
}
inline std::uint32_t round_to_tf32(std::uint32_t bits) { return round_to_tf32(as_float(bits)); }
inline std::uint32_t high_product(std::uint32_t a, std::uint32_t b) {
    return static_cast<std::uint32_t>(static_cast<std::uint64_t>(a) * b >> 32);
}
inline float fused_multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

struct Factors {
    const std::uint32_t* a;
    std::uint32_t b[2];
};

template <class Element>
float half_of(std::uint32_t bits, int half) {
    return to_float(Element{static_cast<std::uint16_t>(bits >> 16 * half)});
}

// c [16, 8] += a [16, K] b [K, 8]. Lane l holds, of a, rows l / 4 and l / 4 + 8, and two neighbours (of 16 bits; one of
// TF32) of each half of K; of b, column l / 4.
template <int K, class Read>
void multiply_matrices(emulator::Thread* lanes, Read read) {
    float a[16][K], b[K][8];
    constexpr int EACH = K / 8;
    for (int lane = 0; lane < 32; ++lane) {
        const auto* factors = static_cast<const Factors*>(lanes[lane].argument);
        const int outer = lane / 4, inner = lane % 4 * EACH;
        for (int e = 0; e < EACH; ++e)
            for (int half = 0; half < 2; ++half) {
                a[outer][inner + e + half * K / 2] = read(factors->a[2 * half], e);
                a[outer + 8][inner + e + half * K / 2] = read(factors->a[2 * half + 1], e);
                b[inner + e + half * K / 2][outer] = read(factors->b[half], e);
            }
    }
    for (int lane = 0; lane < 32; ++lane) {
        float* c = static_cast<float*>(lanes[lane].result);
        for (int i = 0; i < 4; ++i)
            for (int k = 0; k < K; ++k) c[i] += a[lane / 4 + i / 2 * 8][k] * b[k][lane % 4 * 2 + i % 2];
    }
    ++emulator::statistics.multiplications;
}

template <class Element>
void multiply(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, Element) {
    const Factors factors{a, {b0, b1}};
    if constexpr (sizeof(Element) == 2)
        emulator::warp_wide("mma", &factors, c,
                            [](emulator::Thread* lanes) { multiply_matrices<16>(lanes, half_of<Element>); });
    else
        emulator::warp_wide("mma.tf32", &factors, c, [](emulator::Thread* lanes) {
            multiply_matrices<8>(lanes, [](std::uint32_t bits, int) { return as_float(bits & 0xFFFFE000u); });
        });
}

}  // namespace reslora

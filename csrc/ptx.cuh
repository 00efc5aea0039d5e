// One thin function per instruction. The host twins, which a C++ compiler sees, are in tests/cuda_on_cpu/.
#pragma once
#include <cstdint>

namespace reslora {

struct Bf16 {
    std::uint16_t bits;
};
struct Fp16 {
    std::uint16_t bits;
};

}  // namespace reslora

#ifndef __CUDACC__
#include "host_ptx.h"
#else

#define RESLORA_DEVICE __device__ __forceinline__
#define RESLORA_UNROLL _Pragma("unroll")
#define RESLORA_KEEP_LOOP _Pragma("unroll 1")

namespace reslora {

struct Place {
    std::int64_t x, y, z;
};

RESLORA_DEVICE int thread_id() { return threadIdx.x; }
RESLORA_DEVICE Place block_id() { return {blockIdx.x, blockIdx.y, blockIdx.z}; }
RESLORA_DEVICE Place grid_size() { return {gridDim.x, gridDim.y, gridDim.z}; }
RESLORA_DEVICE void barrier() { __syncthreads(); }
RESLORA_DEVICE void warp_barrier() { __syncwarp(); }
// What that lane of the warp has.
RESLORA_DEVICE std::uint32_t from_lane(std::uint32_t value, int lane) { return __shfl_sync(0xFFFFFFFFu, value, lane); }

RESLORA_DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char memory[];
    return memory;
}

RESLORA_DEVICE std::uint32_t shared_address(const void* pointer) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// One access by each lane of a warp, of 4, 8 or 16 bytes.
template <class Value>
RESLORA_DEVICE void store_shared(Value* shared, Value value) {
    *shared = value;
}
template <class Value>
RESLORA_DEVICE Value load_shared(const Value* shared) {
    return *shared;
}

// 16 bytes to shared memory, zeros where there are none.
RESLORA_DEVICE void copy_async(void* shared, const void* global, bool there) {
    asm volatile("{.reg .pred none; setp.eq.s32 none, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, none;}"
                 ::"r"(shared_address(shared)), "l"(global), "r"(static_cast<int>(there)) : "memory");
}
RESLORA_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT>
RESLORA_DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
template <bool TRANSPOSED>
RESLORA_DEVICE void load_matrices(std::uint32_t (&r)[4], const void* row) {
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

#define RESLORA_MMA(INSTRUCTION)                                                                                       \
    asm volatile(INSTRUCTION " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                        \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// c [16, 8] += a [16, 16] b [16, 8]; the last argument is the type of a and b.
RESLORA_DEVICE void multiply(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, Bf16) {
    RESLORA_MMA("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32");
}
RESLORA_DEVICE void multiply(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, Fp16) {
    RESLORA_MMA("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32");
}
// c [16, 8] += a [16, 8] b [8, 8] in TF32.
RESLORA_DEVICE void multiply(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1, float) {
    RESLORA_MMA("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef RESLORA_MMA

RESLORA_DEVICE std::uint32_t round_to_tf32(float value) {
    std::uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return bits;
}
RESLORA_DEVICE std::uint32_t round_to_tf32(std::uint32_t bits) { return round_to_tf32(__uint_as_float(bits)); }
RESLORA_DEVICE float to_float(Bf16 value) { return __uint_as_float(static_cast<std::uint32_t>(value.bits) << 16); }
RESLORA_DEVICE float to_float(Fp16 value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}
RESLORA_DEVICE void from_float(Bf16& result, float value) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
}
RESLORA_DEVICE void from_float(Fp16& result, float value) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
}
RESLORA_DEVICE std::uint32_t high_product(std::uint32_t a, std::uint32_t b) { return __umulhi(a, b); }
RESLORA_DEVICE float fused_multiply_add(float a, float b, float c) { return fmaf(a, b, c); }

}  // namespace reslora
#endif

namespace reslora {

RESLORA_DEVICE float to_float(float value) { return value; }
RESLORA_DEVICE void from_float(float& result, float value) { result = value; }

}  // namespace reslora

// p = x aᵀ for Hopper, in two-byte types and without dropout: see params.h. A block has 64 rows of x; one thread keeps as
// many stages of shared memory under way as fit, one warpgroup multiplies them. Bound by bandwidth: a comes from L2.
#include "elementwise.cuh"
#include "launch.cuh"
#include "pipeline_sm90.cuh"

namespace reslora {
namespace {

struct HopperProject {
    TensorMap x, a;
    SideChannel side;
    float* partial;
    int rows, rank, depth, split;  // M, R, K
};

// BN: of the product, filled up with zeros. A_BY_K: a lies by k, [BN, 64 k] in a stage; else in squares of [64 k, 64].
template <class Element_, int BN_, bool A_BY_K_>
struct Stream {
    using Element = Element_;
    static constexpr bool A_BY_K = A_BY_K_;
    static constexpr int BM = 64, BN = BN_;
    static constexpr int SQUARES = BN / DEPTH, A_BYTES = BN * LINE, STAGE_BYTES = SQUARE + A_BYTES;
    static constexpr int BARRIER_BYTES = 2 * static_cast<int>(sizeof(Barrier));
    static constexpr int FIT = (MOST_SHARED_BYTES - EIGHT_LINES) / (STAGE_BYTES + BARRIER_BYTES), STAGES = FIT < 16 ? FIT : 16;
    static constexpr int SHARED_BYTES = EIGHT_LINES + STAGES * (STAGE_BYTES + BARRIER_BYTES);
    static constexpr int THREADS = WARPGROUP + 32;
    static_assert(SHARED_BYTES <= MOST_SHARED_BYTES && STAGES >= 8 && (A_BY_K || SQUARES > 0) && A_BYTES % EIGHT_LINES == 0);

    unsigned char* base;  // aligned to where the swizzle repeats
    Ring<STAGES> ring;

    RESLORA_DEVICE static Stream make() {
        return {swizzled_memory(), {}};
    }
    RESLORA_DEVICE unsigned char* x(int stage) const { return base + stage * STAGE_BYTES; }
    RESLORA_DEVICE unsigned char* a(int stage) const { return x(stage) + SQUARE; }
    RESLORA_DEVICE Barrier* full(int stage) const {
        return reinterpret_cast<Barrier*>(base + STAGES * STAGE_BYTES) + stage;
    }
    RESLORA_DEVICE Barrier* empty(int stage) const { return full(stage) + STAGES; }

    // By all threads. A stage is full when its bytes are there, empty when each warp has let go of it.
    RESLORA_DEVICE void start() const {
        if (thread_id() == 0) {
            for (int stage = 0; stage < STAGES; ++stage) {
                mbarrier_init(full(stage), 1);
                mbarrier_init(empty(stage), WARPGROUP / 32);
            }
            fence_barrier_init();
        }
        barrier();
    }
    // By the producer.
    RESLORA_DEVICE void fill(const HopperProject& p, int row, int k) {
        mbarrier_wait(empty(ring.stage), ring.parity ^ 1);
        Barrier* arrived = full(ring.stage);
        mbarrier_expect(arrived, STAGE_BYTES);
        tma_load(x(ring.stage), &p.x, k, row, arrived);
        if constexpr (A_BY_K) {
            tma_load(a(ring.stage), &p.a, k, 0, arrived);
        } else {
            RESLORA_UNROLL
            for (int i = 0; i < SQUARES; ++i)
                tma_load(a(ring.stage) + i * SQUARE, &p.a, i * DEPTH, k, arrived);
        }
        ring.advance();
    }
    // By the consumer: begins acc [64, BN] += x aᵀ of the current stage.
    RESLORA_DEVICE void multiply(float (&acc)[BN / 2]) const {
        mbarrier_wait(full(ring.stage), ring.parity);
        const std::uint64_t left = wgmma_descriptor(x(ring.stage), 16, EIGHT_LINES);
        const std::uint64_t right = wgmma_descriptor(a(ring.stage), A_BY_K ? 16 : SQUARE, EIGHT_LINES);
        wgmma_fence();
        RESLORA_UNROLL
        for (int step = 0; step < DEPTH / 16; ++step)
            wgmma<BN, !A_BY_K>(acc, descriptor_after(left, step * 32),
                               descriptor_after(right, step * (A_BY_K ? 32 : 16 * LINE)), Element{});
        wgmma_commit();
    }
    RESLORA_DEVICE void release(int stage) const {
        if (thread_id() % 32 == 0) mbarrier_arrive(empty(stage));
    }
};

template <class S>
RESLORA_DEVICE void consume(S stream, const HopperProject& p, int row, int start, int end) {
    float acc[S::BN / 2] = {};
    int previous = -1;
    RESLORA_KEEP_LOOP
    for (int k = start; k < end; k += DEPTH) {
        stream.multiply(acc);
        wgmma_wait<1>();  // of the stage before
        if (previous >= 0) stream.release(previous);
        previous = stream.ring.stage;
        stream.ring.advance();
    }
    wgmma_wait<0>();
    const int lane = thread_id() % 32, first = row + thread_id() / 32 * 16 + lane / 4;
    const std::int64_t part = block_id().z;
    RESLORA_UNROLL
    for (int at = 0; at < S::BN / 2; ++at) {
        const std::int64_t i = first + at / 2 % 2 * 8, j = at / 4 * 8 + lane % 4 * 2 + at % 2;
        if (i >= p.rows) continue;
        if (p.partial == nullptr) pass_on<typename S::Element>(p.side, i, j, j < p.rank ? acc[at] : 0.0f, true);
        else if (j < p.rank) p.partial[(part * p.rows + i) * p.rank + j] = acc[at];
    }
}

template <class S>
__global__ void __launch_bounds__(S::THREADS, 1) project_hopper_kernel(const __grid_constant__ HopperProject p) {
    S stream = S::make();
    stream.start();
    grid_dependency_wait();  // every thread: what is written here may still be read by the kernel before
    const int row = static_cast<int>(block_id().x) * S::BM, start = static_cast<int>(block_id().z) * p.split;
    const int end = p.split < p.depth - start ? start + p.split : p.depth;
    if (thread_id() < WARPGROUP) {
        consume(stream, p, row, start, end);
    } else if (thread_id() == WARPGROUP) {
        for (int k = start; k < end; k += DEPTH) stream.fill(p, row, k);
        grid_dependency_launch();
    }
}

template <class S>
void launch_kernel(const Project& p, Device device) {
    const Matrix& a = p.a;
    const HopperProject params{
        encode_tensor_map(p.x.data, p.x.type, p.x.rows, p.x.columns, p.x.row, S::BM, DEPTH),
        S::A_BY_K ? encode_tensor_map(a.data, a.type, a.rows, a.columns, a.row, S::BN, DEPTH)
                  : encode_tensor_map(a.data, a.type, a.columns, a.rows, a.column, DEPTH, DEPTH),
        p.side, p.partial, static_cast<int>(p.x.rows), static_cast<int>(a.rows), static_cast<int>(p.x.columns),
        static_cast<int>(p.split)};
    run("project_hopper", &project_hopper_kernel<S>, {blocks(p.x.rows, S::BM), 1, p.parts}, S::THREADS, S::SHARED_BYTES,
        params, device, 1, true);
}

template <class Element>
void launch_width(const Project& p, Device device) {
    const std::int64_t width = p.a.rows > p.side.inner.columns ? p.a.rows : p.side.inner.columns;
    if (p.a.column != 1)  // a box has 64 columns anyway
        return width <= 64 ? launch_kernel<Stream<Element, 64, false>>(p, device)
                           : launch_kernel<Stream<Element, 128, false>>(p, device);
    if (width <= 16) return launch_kernel<Stream<Element, 16, true>>(p, device);
    if (width <= 32) return launch_kernel<Stream<Element, 32, true>>(p, device);
    if (width <= 64) return launch_kernel<Stream<Element, 64, true>>(p, device);
    launch_kernel<Stream<Element, 128, true>>(p, device);
}

}  // namespace

void project_sm90(const Project& p, Math math, Device device) {
    if (math == MATH_BFLOAT16) launch_width<Bf16>(p, device);
    else launch_width<Fp16>(p, device);
    finish_projection(p, math, device);
}

}  // namespace reslora

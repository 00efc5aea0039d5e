// Products of a warpgroup: begun, performed at some time, in the registers when waited for.
#include <algorithm>
#include <cstring>

#include "emulator_sm90.h"

namespace emulator {

namespace {

constexpr int WARP = 32, ROWS = 16, K = 16;
constexpr std::uint32_t POISON = 0xFFC0FFEE;  // NaN: what registers hold while a product is in flight

struct Sum {  // [16, n] of a warp
    float* registers[WARP];
    int n;
    std::vector<float> values;
    int in_flight;
    bool there;  // in the registers

    // of register i of a lane
    float& value(int lane, int i) {
        return values[(lane / 4 + i / 2 % 2 * 8) * n + i / 4 * 8 + lane % 4 * 2 + i % 2];
    }
};

struct Product {
    std::shared_ptr<Event> event;
    std::shared_ptr<Sum> sum;
};

struct Unit {  // of a warp
    std::vector<std::shared_ptr<Sum>> sums;
    std::vector<Product> open;
    std::deque<std::vector<Product>> groups;
    std::shared_ptr<Event> last;
    bool fenced;
    std::vector<std::uint64_t> issued;  // must be the same for the four warps
};
std::vector<Unit> units;

bool same_bits(float a, float b) { return std::memcmp(&a, &b, 4) == 0; }

struct Operand {
    std::uint64_t descriptor;
    bool mn_major;

    std::int64_t field(int from) const { return static_cast<std::int64_t>(descriptor >> from & 0x3FFF) << 4; }

    // values [outer, K] of rows (or columns) first, first + 1, ...
    void read(int rank, int first, int outer, float (*to_float)(std::uint16_t), float* values) const {
        const std::int64_t start = field(0), leading = field(16), stride = field(32);
        if (descriptor >> 62 != 1) fail("wgmma: the descriptor's swizzle is not of 128 bytes");
        if (descriptor >> 49 & 7) fail("wgmma: the descriptor has a base offset");
        if (start & 0x380) fail("wgmma: the descriptor's address is not in the first row of a 1024-byte pattern");
        for (int chunk = 0; chunk < outer * K / 8; ++chunk) {
            // By k: two chunks of 8 k for each row. MN-major: a chunk of 8 rows for each k.
            const int row = first + (mn_major ? chunk / K * 8 : chunk / 2), k = mn_major ? chunk % K : chunk % 2 * 8;
            const std::int64_t linear =
                mn_major ? start + row / 64 * leading + row % 64 * 2 + k / 8 * stride + k % 8 * 128
                         : start + row / 8 * stride + row % 8 * 128 + k * 2;
            std::uint16_t bits[8];
            std::memcpy(bits, fenced_shared(rank, swizzled(linear - shared_begin), 16, "wgmma"), 16);
            for (int e = 0; e < 8; ++e)
                values[mn_major ? (row - first + e) * K + k : (row - first) * K + k + e] = to_float(bits[e]);
        }
    }
};

void perform(Sum& sum, const GroupFactors& factors, int rank, int first_row) {
    std::vector<float> a(ROWS * K), b(factors.n * K);
    Operand{factors.a, false}.read(rank, first_row, ROWS, factors.to_float, a.data());
    Operand{factors.b, factors.b_mn_major}.read(rank, 0, factors.n, factors.to_float, b.data());
    for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < factors.n; ++j) {
            float total = sum.values[i * factors.n + j];
            for (int k = 0; k < K; ++k) total += a[i * K + k] * b[j * K + k];
            sum.values[i * factors.n + j] = total;
        }
}

std::shared_ptr<Sum> sum_in(Unit& unit, Thread* lanes, int n) {
    for (const auto& sum : unit.sums) {
        if (sum->registers[0] != lanes[0].result) continue;
        if (sum->n != n) fail("wgmma: the same registers in another shape, with no wgmma_fence");
        if (sum->in_flight == 0)
            for (int lane = 0; lane < WARP; ++lane)
                for (int i = 0; i < n / 2; ++i)
                    if (!same_bits(sum->registers[lane][i], sum->value(lane, i)))
                        fail("wgmma: registers were written with no wgmma_fence since");
        return sum;
    }
    if (!unit.fenced) fail("wgmma: no wgmma_fence before it");
    auto sum = std::make_shared<Sum>(Sum{{}, n, std::vector<float>(ROWS * n), 0, true});
    for (int lane = 0; lane < WARP; ++lane) {
        sum->registers[lane] = static_cast<float*>(lanes[lane].result);
        for (int i = 0; i < n / 2; ++i) sum->value(lane, i) = sum->registers[lane][i];
    }
    unit.sums.push_back(sum);
    return sum;
}

void issue(Thread* lanes) {
    Unit& unit = units[lanes->index / WARP];
    const auto& factors = *static_cast<const GroupFactors*>(lanes->argument);
    for (int lane = 1; lane < WARP; ++lane) {
        const auto& other = *static_cast<const GroupFactors*>(lanes[lane].argument);
        if (other.a != factors.a || other.b != factors.b) fail("wgmma: the lanes of a warp give different descriptors");
    }
    const int warp = lanes->id / WARP % 4;
    if (warp == 0) ++statistics.group_multiplications;
    for (std::uint64_t value : {factors.a, factors.b, static_cast<std::uint64_t>(factors.n * 2 + factors.b_mn_major)})
        unit.issued.push_back(value);
    const std::shared_ptr<Sum> sum = sum_in(unit, lanes, factors.n);
    ++sum->in_flight;
    sum->there = false;
    for (float* registers : sum->registers)
        for (int i = 0; i < sum->n / 2; ++i) std::memcpy(&registers[i], &POISON, 4);
    unit.last = later([before = unit.last, sum, factors, rank = lanes->rank, warp] {
        if (before) settle(*before);  // in the order in which they were issued
        perform(*sum, factors, rank, ROWS * warp);
    });
    unit.open.push_back({unit.last, sum});
}

void wait(Unit& unit, int left) {
    for (; static_cast<int>(unit.groups.size()) > left; unit.groups.pop_front())
        for (const Product& product : unit.groups.front()) {
            settle(*product.event);
            --product.sum->in_flight;
        }
    float poison;
    std::memcpy(&poison, &POISON, 4);
    for (const auto& sum : unit.sums) {
        if (sum->in_flight || sum->there) continue;
        for (int lane = 0; lane < WARP; ++lane)
            for (int i = 0; i < sum->n / 2; ++i) {
                float& result = sum->registers[lane][i];
                if (!same_bits(result, poison)) fail("registers were written while a wgmma into them was in flight");
                result = sum->value(lane, i);
            }
        sum->there = true;
    }
    unit.fenced = false;
}

}  // namespace

std::uint64_t wgmma_descriptor(const void* address, int leading_bytes, int stride_bytes) {
    const std::int64_t from = offset_of(address) + shared_begin;
    if (from % 16 || leading_bytes % 16 || stride_bytes % 16) fail("wgmma_descriptor: not a multiple of 16 bytes");
    if (leading_bytes < 0 || leading_bytes >> 18 || stride_bytes < 0 || stride_bytes >> 18)
        fail("wgmma_descriptor: a stride that does not fit in");
    return static_cast<std::uint64_t>((from & 0x3FFFF) >> 4) | static_cast<std::uint64_t>(leading_bytes >> 4) << 16 |
           static_cast<std::uint64_t>(stride_bytes >> 4) << 32 | std::uint64_t{1} << 62;
}

void wgmma(float* accumulators, const GroupFactors& factors) { warp_wide("wgmma", &factors, accumulators, issue); }

void wgmma_fence() {
    warp_wide("wgmma_fence", nullptr, nullptr, [](Thread* lanes) {
        Unit& unit = units[lanes->index / WARP];
        unit.fenced = true;
        auto& sums = unit.sums;
        sums.erase(std::remove_if(sums.begin(), sums.end(), [](const auto& sum) { return sum->in_flight == 0; }),
                   sums.end());
    });
}

void wgmma_commit() {
    warp_wide("wgmma_commit", nullptr, nullptr, [](Thread* lanes) {
        Unit& unit = units[lanes->index / WARP];
        unit.groups.push_back(std::move(unit.open));
        unit.open.clear();
    });
}

void wgmma_wait(int left) {
    warp_wide("wgmma_wait", &left, nullptr, [](Thread* lanes) {
        wait(units[lanes->index / WARP], *static_cast<const int*>(lanes->argument));
    });
}

void products_begin() { units = std::vector<Unit>(threads.size() / WARP); }

void thread_products_end() {
    const Unit& unit = units[current->index / WARP];
    if (!unit.open.empty()) fail("wgmma were issued and never committed");
    for (const auto& group : unit.groups)
        if (!group.empty()) fail("wgmma are still in flight when the kernel ends");
}

void products_end() {
    for (std::size_t warp = 0; warp < units.size(); ++warp) {
        const std::size_t first = warp - warp % (threads.size() / cluster.size() / WARP) % 4;
        if (units[warp].issued != units[first].issued) fail("wgmma: the warps of a warpgroup issue different ones");
    }
}

}  // namespace emulator

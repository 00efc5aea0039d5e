// What works beside the threads: the copy engine, which moves boxes of a matrix to and from swizzled shared memory at a
// time of its own, and the tensor cores, whose products are begun, performed at some time, in the registers when waited
// for.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "emulator.h"

namespace emulator {

namespace {

constexpr std::uint64_t MARK = 0x7E5507A97E5507A9;
constexpr int ROW = 128, CHUNK = 16, ELEMENTS = ROW / 2, EACH = CHUNK / 2;

struct Stores {  // of a thread
    std::vector<std::shared_ptr<Event>> open;
    std::deque<std::vector<std::shared_ptr<Event>>> groups;
};
std::vector<Stores> stores;
std::vector<int> in_flight;  // copies to and from the shared memory of each block of the cluster, but stores

void require_box(const TensorMap* map, std::int64_t offset, const char* instruction) {
    if (reinterpret_cast<std::uintptr_t>(map) % 64 != 0) fail(std::string(instruction) + ": misaligned tensor map");
    if (map->mark != MARK) fail(std::string(instruction) + ": that is no tensor map");
    if (offset % 128 != 0) fail(std::string(instruction) + ": misaligned address in shared memory");
    if (offset < 0 || offset + map->box_rows * ROW > shared_size)
        fail(std::string(instruction) + ": address outside of shared memory");
}

unsigned char* element(const TensorMap& map, std::int64_t row, std::int64_t column) {  // null where there is none
    const bool inside = row >= 0 && row < map.rows && column >= 0 && column < map.columns;
    return inside ? map.base + row * map.row_bytes + column * 2 : nullptr;
}

void load_box(const TensorMap& map, std::int64_t column, std::int64_t row, int rank, std::int64_t to) {
    for (std::int64_t i = 0; i < map.box_rows * ROW; i += CHUNK) {
        unsigned char chunk[CHUNK] = {};
        for (int e = 0; e < EACH; ++e)
            if (const unsigned char* from = element(map, row + i / ROW, column + i % ROW / 2 + e))
                std::memcpy(chunk + 2 * e, from, 2);
        write_from_async(rank, swizzled(to + i), chunk, CHUNK);
    }
}

// Reads the box now; writes it at yet another time.
void store_box(const TensorMap& map, std::int64_t column, std::int64_t row, int rank, std::int64_t from) {
    std::vector<std::uint16_t> box(map.box_rows * ELEMENTS);
    for (std::int64_t i = 0; i < map.box_rows * ROW; i += CHUNK) {
        bool any = false;
        for (int e = 0; e < EACH; ++e) any |= element(map, row + i / ROW, column + i % ROW / 2 + e) != nullptr;
        if (any) std::memcpy(&box[i / 2], fenced_shared(rank, swizzled(from + i), CHUNK, "tma_store"), CHUNK);
    }
    later([map, column, row, box] {
        for (std::size_t i = 0; i < box.size(); ++i)
            if (unsigned char* to = element(map, row + static_cast<std::int64_t>(i) / ELEMENTS, column + i % ELEMENTS))
                std::memcpy(to, &box[i], 2);
    });
}

}  // namespace

TensorMap make_tensor_map(const void* base, std::int64_t rows, std::int64_t columns, std::int64_t row_stride_elements,
                          int box_rows, int box_columns) {
    const auto require = [](bool holds, const char* what) {
        if (!holds) throw std::runtime_error(std::string("encode_tensor_map: ") + what);
    };
    require(reinterpret_cast<std::uintptr_t>(base) % 16 == 0, "the base must be a multiple of 16 bytes");
    require(row_stride_elements % 8 == 0 && row_stride_elements > 0, "the row stride must be a multiple of 16 bytes");
    require(row_stride_elements < 1LL << 39, "the row stride is too large");
    require(rows >= 1 && columns >= 1 && rows <= 1LL << 32 && columns <= 1LL << 32, "no such size");
    require(box_rows >= 1 && box_rows <= 256, "a box has 1 to 256 rows");
    require(box_columns == ELEMENTS, "a box has 64 columns: it is not documented how narrower ones lie");
    auto* data = const_cast<unsigned char*>(static_cast<const unsigned char*>(base));
    return {MARK, data, rows, columns, 2 * row_stride_elements, box_rows, {}};
}

void tma_load_multicast(void* to, const TensorMap* map, int column, int row, Barrier* barrier, std::uint16_t mask) {
    const std::int64_t offset = offset_of(to), at = offset_of(barrier), bytes = map->box_rows * ROW;
    require_box(map, offset, "tma_load");
    if (mask == 0 || mask >> cluster.size()) fail("tma_load: no such blocks");
    require_barrier(current->rank, at, "tma_load");
    ++statistics.tensor_loads;
    for (int rank = 0; rank < static_cast<int>(cluster.size()); ++rank) {
        if (!(mask >> rank & 1)) continue;
        fenced_shared(rank, offset, bytes, "tma_load");
        const std::vector<unsigned char> poison(bytes, 0xFF);
        write_from_async(rank, offset, poison.data(), bytes);
        ++in_flight[rank];
        later([map = *map, column, row, rank, offset, at, bytes] {
            --in_flight[rank];
            load_box(map, column, row, rank, offset);
            complete_bytes(rank, at, bytes);
        });
    }
}

void copy_to_block(void* place, int bytes, Barrier* barrier, int cta) {
    const std::int64_t offset = offset_of(place), at = offset_of(barrier);
    if (cta < 0 || cta >= static_cast<int>(cluster.size())) fail("copy_to_block: no such block");
    if (offset % 16 || bytes % 16 || bytes <= 0) fail("copy_to_block: not a multiple of 16 bytes");
    require_barrier(cta, at, "copy_to_block");
    ++statistics.block_copies;
    fenced_shared(cta, offset, bytes, "copy_to_block");
    const std::vector<unsigned char> poison(bytes, 0xFF);
    write_from_async(cta, offset, poison.data(), bytes);
    const int from = current->rank;
    ++in_flight[cta];
    ++in_flight[from];
    later([=] {
        --in_flight[cta];
        --in_flight[from];
        const unsigned char* source = fenced_shared(from, offset, bytes, "copy_to_block");
        const std::vector<unsigned char> read(source, source + bytes);
        write_from_async(cta, offset, read.data(), bytes);
        complete_bytes(cta, at, bytes);
    });
}

void tma_store(const TensorMap* map, const void* from, int column, int row) {
    const std::int64_t offset = offset_of(from);
    require_box(map, offset, "tma_store");
    ++statistics.tensor_stores;
    stores[current->index].open.push_back(
        later([map = *map, column, row, rank = current->rank, offset] { store_box(map, column, row, rank, offset); }));
}

void tma_store_commit() {
    Stores& mine = stores[current->index];
    mine.groups.push_back(std::move(mine.open));
    mine.open.clear();
}

void tma_store_wait_read(int left) {
    auto& groups = stores[current->index].groups;
    for (; static_cast<int>(groups.size()) > left; groups.pop_front())
        for (const auto& event : groups.front()) settle(*event);
}

void copies_begin() {
    stores = std::vector<Stores>(threads.size());
    in_flight.assign(cluster.size(), 0);
}

void thread_copies_end() {
    const Stores& mine = stores[current->index];
    if (cluster[current->rank].running == 1 && in_flight[current->rank])
        fail("bulk copies are still in flight to or from a block that has ended");
    if (!mine.open.empty()) fail("bulk stores were issued and never committed");
    for (const auto& group : mine.groups)
        if (!group.empty()) fail("bulk stores may still read shared memory when the kernel ends");
}

// The tensor cores.

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
    Operand{factors.a, factors.a_mn_major}.read(rank, first_row, ROWS, factors.to_float, a.data());
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

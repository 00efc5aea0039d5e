// The copy engine: boxes of a matrix to and from swizzled shared memory, at a time of its own.
#include <cstring>
#include <stdexcept>

#include "emulator_sm90.h"

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

}  // namespace emulator

// What kernels do element by element: the dropout mask on what comes in; the side channel of a finished product, and
// sums of parts in a fixed order, on what goes out. No atomics.
#pragma once
#include "tile.cuh"

namespace reslora {

// The dropout mask: Philox 4x32 with 7 rounds (Salmon et al., SC 2011), counter (column / 8, row, 0, 0), the seed as
// key, 16 bits an element: element (row, column) is kept iff its bits are at least the threshold. See dropout.py.

// Bit i says whether column 8 * group + i of the row is kept.
RESLORA_DEVICE std::uint32_t keep_byte(std::int64_t seed, std::uint32_t row, std::uint32_t group,
                                       std::uint32_t threshold) {
    std::uint32_t c[4] = {group, row, 0, 0};
    std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
    RESLORA_UNROLL
    for (int round = 0; round < 7; ++round) {
        const std::uint32_t high0 = high_product(c[0], 0xD2511F53u), low0 = c[0] * 0xD2511F53u;
        const std::uint32_t high2 = high_product(c[2], 0xCD9E8D57u), low2 = c[2] * 0xCD9E8D57u;
        c[0] = high2 ^ c[1] ^ k0;
        c[1] = low2;
        c[2] = high0 ^ c[3] ^ k1;
        c[3] = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    std::uint32_t keep = 0;
    RESLORA_UNROLL
    for (int word = 0; word < 4; ++word) {
        keep |= ((c[word] & 0xFFFFu) >= threshold ? 1u : 0u) << (2 * word);
        keep |= ((c[word] >> 16) >= threshold ? 1u : 0u) << (2 * word + 1);
    }
    return keep;
}

// Zeroes what is dropped in a tile whose first element is (row, column) of its matrix, and hands each byte of keep bits
// to found(row, group, byte). A tile without memory is only drawn.
template <int THREADS, class Element, int ROWS, int COLUMNS, class Found>
RESLORA_DEVICE void drop(SharedTile<Element, ROWS, COLUMNS> tile, Dropout dropout, std::int64_t row,
                         std::int64_t column, Found found) {
    const std::int64_t seed = *dropout.seed;
    for (int i = thread_id(); i < ROWS * COLUMNS / 8; i += THREADS) {
        const int r = i / (COLUMNS / 8), group = i % (COLUMNS / 8);
        const std::uint32_t keep = keep_byte(seed, static_cast<std::uint32_t>(row + r),
                                             static_cast<std::uint32_t>(column / 8 + group), dropout.threshold);
        found(row + r, column / 8 + group, keep);
        if (tile.base == nullptr) continue;
        RESLORA_UNROLL
        for (int e = 0; e < 8; ++e)
            if (!(keep >> e & 1u)) from_float(tile.at(r, 8 * group + e), 0.0f);
    }
}

// Puts element (row, column) of a product where it belongs; returns the side channel's inner value. All of the side
// channel is of type Element.
template <class Element>
RESLORA_DEVICE float pass_on(const SideChannel& side, std::int64_t row, std::int64_t column, float product,
                             bool store) {
    float value = product * side.factor;
    const std::int64_t extra = column - side.extra_start, raw = column - side.raw_start;
    if (side.extra.data && extra >= 0 && extra < side.extra.columns) {
        const auto* data = static_cast<const Element*>(side.extra.data);
        value += to_float(data[row * side.extra.row + extra * side.extra.column]);
    }
    if (column >= side.inner.columns) value = 0.0f;
    if (store && side.inner.data && column < side.inner.columns)
        from_float(static_cast<Element*>(side.inner.data)[row * side.inner.columns + column], value);
    if (store && side.raw.data && raw >= 0 && raw < side.raw.columns)
        from_float(static_cast<Element*>(side.raw.data)[row * side.raw.columns + raw], product * side.raw_factor);
    return value;
}

// The blocks of a launch share the elements of a sum.
template <int THREADS>
RESLORA_DEVICE void add_partials(const Sum& sum, std::int64_t block, std::int64_t blocks) {
    if (sum.partial == nullptr) return;
    for (std::int64_t at = block * THREADS + thread_id(); at < sum.size; at += blocks * THREADS) {
        float total = 0.0f;
        for (std::int64_t part = 0; part < sum.parts; ++part) total += sum.partial[part * sum.size + at];
        store_float(sum.out, at, total * sum.scale);
    }
}

}  // namespace reslora

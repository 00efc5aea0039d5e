// What kernels do with a finished product: the side channel, and sums of parts in a fixed order. No atomics.
#pragma once
#include "tile.cuh"

namespace reslora {

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

// A pass: its launches in order. Noted while they are made, it can be made again on other addresses by one call.
#pragma once
#include <algorithm>
#include <variant>
#include <vector>

#include "params.h"

namespace reslora {

struct ProjectCall {
    Project p;
    Math math;
    bool hopper;
};
struct MatmulCall {
    AugmentedMatmul p;
    Math math;
    bool large;
    int hopper;  // 0: the portable kernel
};
struct GradsCall {
    LowRankGrads p;
    Math math;
    std::int64_t parts;
};
struct FinishCall {
    Sum first, second;
};
using Call = std::variant<ProjectCall, MatmulCall, GradsCall, FinishCall>;

inline void launch(const ProjectCall& call, Device device) {
#ifdef RESLORA_HAS_SM90
    if (call.hopper) return project_sm90(call.p, call.math, device);
#endif
    project(call.p, call.math, device);
}
inline void launch(const MatmulCall& call, Device device) {
#ifdef RESLORA_HAS_SM90
    if (call.hopper) return augmented_matmul_sm90(call.p, call.math, static_cast<Hopper>(call.hopper), device);
#endif
    augmented_matmul(call.p, call.math, call.large, device);
}
inline void launch(const GradsCall& call, Device device) { low_rank_grads(call.p, call.math, call.parts, device); }
inline void launch(const FinishCall& call, Device device) { finish(call.first, call.second, device); }

// Every address that a call holds.
template <class Visit>
void each_address(Sum& sum, Visit visit) {
    visit(sum.partial);
    visit(sum.out.data);
}
template <class Visit>
void each_address(SideChannel& side, Visit visit) {
    visit(side.extra.data);
    visit(side.inner.data);
    visit(side.raw.data);
}
template <class Visit>
void each_address(ProjectCall& call, Visit visit) {
    visit(call.p.x.data);
    visit(call.p.a.data);
    visit(call.p.dropout.seed);
    each_address(call.p.side, visit);
    visit(call.p.partial);
}
template <class Visit>
void each_address(MatmulCall& call, Visit visit) {
    for (Matrix* matrix : {&call.p.x, &call.p.w, &call.p.t, &call.p.b, &call.p.a}) visit(matrix->data);
    each_address(call.p.side, visit);
    visit(call.p.bias);
    visit(call.p.keep);
    visit(call.p.y.data);
    visit(call.p.partial);
    visit(call.p.scaled);
    for (Strips& strips : call.p.strips) {
        visit(strips.stream.data);
        visit(strips.t.data);
        visit(strips.out.data);
    }
    for (Sum& sum : call.p.sums) each_address(sum, visit);
}
template <class Visit>
void each_address(GradsCall& call, Visit visit) {
    for (OuterProduct& product : call.p.products) {
        visit(product.t.data);
        visit(product.stream.data);
        visit(product.dropout.seed);
        visit(product.keep);
        visit(product.partial);
    }
}
template <class Visit>
void each_address(FinishCall& call, Visit visit) {
    each_address(call.first, visit);
    each_address(call.second, visit);
}

class Pass {
public:
    using Addresses = std::vector<std::uintptr_t>;

    // The launches of this thread are made and noted from here to ``end``.
    void begin() { noting() = this; }
    static void end() { noting() = nullptr; }

    static void make(const Call& call, Device device) {
        std::visit([&](const auto& made) { launch(made, device); }, call);
        if (noting()) noting()->calls.push_back(call);
    }

    // Each address becomes its place in ``addresses``. False: one is not among them, and the pass is of no use.
    bool settle(const Addresses& addresses) {
        bool all = true;
        for (Call& call : calls)
            std::visit([&](auto& made) {
                each_address(made, [&](auto*& address) {
                    if (!address) return;
                    const auto found = std::find(addresses.begin(), addresses.end(), as_number(address));
                    all = all && found != addresses.end();
                    put(address, found - addresses.begin() + 1);
                });
            }, call);
        return all;
    }

    void run(Device device, const Addresses& addresses) const {
        for (const Call& call : calls)
            std::visit([&](auto made) {
                each_address(made, [&](auto*& place) {
                    if (place) put(place, addresses.at(as_number(place) - 1));
                });
                launch(made, device);
            }, call);
    }

    std::size_t size() const { return calls.size(); }

private:
    template <class Pointer>
    static std::uintptr_t as_number(Pointer* address) {
        return reinterpret_cast<std::uintptr_t>(address);
    }
    template <class Pointer>
    static void put(Pointer*& address, std::uintptr_t number) {
        address = reinterpret_cast<Pointer*>(number);
    }
    static Pass*& noting() {
        thread_local Pass* pass = nullptr;
        return pass;
    }

    std::vector<Call> calls;
};

}  // namespace reslora

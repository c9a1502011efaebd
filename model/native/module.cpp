// model._native: what would take PyTorch most of its time. Checks numbers; the work is elsewhere.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>

#include "attention.h"

namespace py = pybind11;

namespace model {
namespace {

using Shape = std::array<std::int64_t, 4>;
using Floats = py::array_t<float>;
using Address = std::uintptr_t;  // of a contiguous array that outlives the call; 0: none

std::tuple<Floats, Floats, Floats> attend_checked(
    const Shape& shape, const Shape& slab, int element, bool each_placed, std::int64_t threads,
    Address q, Address cos, Address sin, Address keys, Address values, Address slots, Address gate,
    Address landmarks, Address local_out, Address local_lse) {
    const auto floats = [](Address at) { return reinterpret_cast<float*>(at); };
    Attention a;
    a.streams = shape[0], a.groups = shape[1], a.blocks = shape[2], a.rows = shape[3];
    a.slab = slab[0], a.size = slab[1], a.dim = slab[2], a.out_dim = slab[3];
    a.element = static_cast<Element>(element);
    a.q = floats(q), a.each_placed = each_placed, a.cos = floats(cos), a.sin = floats(sin);
    a.keys = reinterpret_cast<void*>(keys), a.values = reinterpret_cast<void*>(values);
    a.slots = reinterpret_cast<std::int64_t*>(slots);
    a.gate = floats(gate), a.landmarks = floats(landmarks);
    a.local_out = floats(local_out), a.local_lse = floats(local_lse);
    if (element < 0 || element > 2) throw py::value_error("no such element");
    for (const Shape& sizes : {shape, slab}) {
        for (const std::int64_t n : sizes) {
            if (n < 0) throw py::value_error("a negative size");
        }
    }
    if (a.size == 0) throw py::value_error("blocks without tokens");
    const std::int64_t n = a.streams * a.groups * a.blocks;
    for (std::int64_t i = 0; i < n; i++) {
        if (a.slots[i] >= a.slab) {
            throw py::index_error("there is no slot " + std::to_string(a.slots[i]));
        }
    }
    Floats out({a.streams, a.groups, a.rows, a.out_dim});
    Floats lse({a.streams, a.groups, a.rows});
    Floats weights({a.streams, a.groups, a.blocks, a.rows});
    a.out = out.mutable_data(), a.lse = lse.mutable_data(), a.weights = weights.mutable_data();
    {
        py::gil_scoped_release release;
        attend(a, threads);
    }
    return {out, lse, weights};
}

}  // namespace

PYBIND11_MODULE(_native, module) { module.def("attend", &attend_checked); }

}  // namespace model

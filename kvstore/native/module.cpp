// kvstore._native: what would take Python most of its time. Checks arguments; the work is elsewhere.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "rows.h"
#include "search.h"

namespace py = pybind11;

namespace kvstore {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

Rows rows_of(Array<std::uint8_t>& array) {
    if (array.ndim() != 2) throw py::value_error("rows are uint8 [n, bytes]");
    return {array.mutable_data(), array.shape(0), static_cast<std::size_t>(array.shape(1))};
}

std::int64_t checked(const std::optional<Array<std::int64_t>>& numbers, const Rows& rows) {
    if (!numbers) return rows.count;
    const std::int64_t* data = numbers->data();
    for (py::ssize_t i = 0; i < numbers->size(); i++) {
        if (data[i] < 0 || data[i] >= rows.count) {
            throw py::index_error("there is no row " + std::to_string(data[i]));
        }
    }
    return numbers->size();
}

void copy(Array<std::uint8_t> from, std::optional<Array<std::int64_t>> from_rows,
          Array<std::uint8_t> to, std::optional<Array<std::int64_t>> to_rows) {
    const Rows source = rows_of(from), target = rows_of(to);
    const std::int64_t n = checked(from_rows, source);
    if (source.nbytes != target.nbytes || n != checked(to_rows, target)) {
        throw py::value_error("rows of another number or size");
    }
    py::gil_scoped_release release;
    copy_rows(source, from_rows ? from_rows->data() : nullptr, target,
              to_rows ? to_rows->data() : nullptr, n);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    const auto given = [](const char* name) { return py::arg(name).noconvert(); };
    bind_search(module);
    module.def("copy_rows", &copy, given("source"), given("source_rows"), given("target"),
               given("target_rows"));
}

}  // namespace kvstore

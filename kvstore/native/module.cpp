// kvstore._native: what would take Python most of its time. Checks arguments; the work is elsewhere.
#include <optional>

#include "array.h"
#include "planes.h"
#include "policies.h"
#include "rows.h"
#include "search.h"
#include "tables.h"

namespace kvstore {
namespace {

Rows rows_of(Bytes& array) {
    if (array.ndim() != 2) throw py::value_error("rows are uint8 [n, bytes]");
    return {array.mutable_data(), array.shape(0), static_cast<std::size_t>(array.shape(1))};
}

std::int64_t checked(const std::optional<Int64s>& numbers, const Rows& rows) {
    if (!numbers) return rows.count;
    check(*numbers, rows.count);
    return numbers->size();
}

void copy(Bytes from, std::optional<Int64s> from_rows,
          Bytes to, std::optional<Int64s> to_rows) {
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
    bind_planes(module);
    bind_policies(module);
    bind_search(module);
    bind_tables(module);
    module.def("copy_rows", &copy, given("source"), given("source_rows"), given("target"),
               given("target_rows"));
}

}  // namespace kvstore

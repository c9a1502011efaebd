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

template <class Byte>
Rows<Byte> rows_of(Byte* data, const Bytes& array) {
    if (array.ndim() != 2) throw py::value_error("rows are uint8 [n, bytes]");
    return {data, array.shape(0), static_cast<std::size_t>(array.shape(1))};
}

// How many rows of so many are meant; IndexError for one that is not there.
std::int64_t checked(const std::optional<Int64s>& numbers, std::int64_t count) {
    if (!numbers) return count;
    check(*numbers, count);
    return numbers->size();
}

void copy(const Bytes& from, const std::optional<Int64s>& from_rows, Bytes& to,
          const std::optional<Int64s>& to_rows) {
    const auto source = rows_of(from.data(), from);
    const auto target = rows_of(to.mutable_data(), to);
    const std::int64_t n = checked(from_rows, source.count);
    if (source.nbytes != target.nbytes || n != checked(to_rows, target.count)) {
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

#pragma once

#include <cstddef>
#include <cstdint>

namespace kvstore {

// Rows of equal size, one behind the other.
template <class Byte>
struct Rows {
    Byte* data;
    std::int64_t count;
    std::size_t nbytes;  // of a row
};

// to[to_rows[i]] = from[from_rows[i]] for n rows; without numbers (null) they are taken in order.
void copy_rows(const Rows<const std::uint8_t>& from, const std::int64_t* from_rows,
               const Rows<std::uint8_t>& to, const std::int64_t* to_rows, std::int64_t n);

}  // namespace kvstore

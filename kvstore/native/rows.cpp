// Copies of many rows of bytes, from any place to any place.
#include "rows.h"

#include <cstring>

#include "vector.h"

namespace kvstore {
namespace {

constexpr std::size_t LINE = 64;
// So far ahead of the copy a row's bytes are asked for: the hardware does not look across pages.
constexpr std::size_t AHEAD = 16 * LINE;

inline void prefetch(const std::uint8_t* row, std::size_t nbytes) {
    for (std::size_t at = 0; at < nbytes; at += LINE) __builtin_prefetch(row + at, 0, 1);
}

}  // namespace

void copy_rows(const Rows<const std::uint8_t>& from, const std::int64_t* from_rows,
               const Rows<std::uint8_t>& to, const std::int64_t* to_rows, std::int64_t n) {
    const std::size_t nbytes = from.nbytes;
    const std::size_t ahead = nbytes < AHEAD ? nbytes : AHEAD;
    for (std::int64_t i = 0; i < n; i++) {
        const std::int64_t source = from_rows ? from_rows[i] : i;
        const std::int64_t target = to_rows ? to_rows[i] : i;
        if (i + 1 < n) {
            prefetch(from.data + nbytes * (from_rows ? from_rows[i + 1] : i + 1), ahead);
        }
        std::memcpy(to.data + nbytes * target, from.data + nbytes * source, nbytes);
    }
}

}  // namespace kvstore

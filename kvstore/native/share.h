#pragma once

#include <cstdint>
#include <functional>

namespace kvstore {

// Do pieces 0, 1, ... of some work on up to so many threads, this one included, and return when all
// are done. Other threads help if they wake in time; nobody waits for one that has not begun. What a
// piece throws is thrown here, once all others are done or given up.
void share(std::int64_t pieces, std::int64_t threads,
           const std::function<void(std::int64_t)>& piece);

}  // namespace kvstore

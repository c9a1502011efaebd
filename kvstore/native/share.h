#pragma once

#include <cstdint>
#include <functional>

namespace kvstore {

// Do pieces 0, 1, ... of some work on torch's threads, of which there are so many, or on this one
// alone where they cannot be had. What a piece throws is thrown here, when all others are done.
void share(std::int64_t pieces, std::int64_t threads,
           const std::function<void(std::int64_t)>& piece);

// Whether torch's threads can be had: where torch is loaded, with an OpenMP of GCC's interface.
bool can_share();

}  // namespace kvstore

#pragma once

#include <pybind11/pybind11.h>

namespace kvstore {

// Scans of landmarks, for kvstore/index.
void bind_search(pybind11::module_& module);

}  // namespace kvstore

#pragma once

#include <pybind11/pybind11.h>

namespace kvstore {

// Eviction orders, for kvstore/policy.
void bind_policies(pybind11::module_& module);

}  // namespace kvstore

#pragma once

#include <pybind11/pybind11.h>

namespace kvstore {

// The bytes of elements by significance, and frames' headers, for kvstore/codec.py.
void bind_planes(pybind11::module_& module);

}  // namespace kvstore

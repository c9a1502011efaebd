#pragma once

#include <pybind11/pybind11.h>

namespace kvstore {

// Tables that say where blocks lie, for kvstore/residency.py, occupancy.py and mover.py.
void bind_tables(pybind11::module_& module);

}  // namespace kvstore

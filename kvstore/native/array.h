// Arguments that are arrays: contiguous, of the right type, never copied.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>

namespace kvstore {

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Int64s = Array<std::int64_t>;
using Int32s = Array<std::int32_t>;
using Bools = Array<bool>;
using Bytes = Array<std::uint8_t>;

inline py::arg given(const char* name) { return py::arg(name).noconvert(); }

// IndexError unless all numbers are at least 0 and less than `end`.
inline void check(const std::int64_t* numbers, py::ssize_t count, std::int64_t end) {
    for (py::ssize_t i = 0; i < count; i++) {
        if (static_cast<std::uint64_t>(numbers[i]) >= static_cast<std::uint64_t>(end)) {
            throw py::index_error("there is no place " + std::to_string(numbers[i]) + " of " +
                                  std::to_string(end));
        }
    }
}

inline void check(const Int64s& numbers, std::int64_t end) {
    check(numbers.data(), numbers.size(), end);
}

template <class T>
py::array_t<T> made_of(const std::vector<T>& values) {
    return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

}  // namespace kvstore

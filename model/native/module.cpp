// model._native: attention over blocks where they lie.
#include <pybind11/pybind11.h>
PYBIND11_MODULE(_native, module) {}

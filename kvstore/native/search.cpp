#include "search.h"

namespace kvstore {

void bind_search(pybind11::module_&) {}

}  // namespace kvstore

#pragma once

#include <cstdint>
#include <vector>

#include "codes.h"

namespace kvstore {

// A part of a query, as codes are multiplied by it: q is near step * codes[d].
struct Query {
    // numbers: [count], of a query of this length.
    Query(const double* numbers, std::int64_t count, std::int64_t fours, double whole);

    std::vector<std::int8_t> codes;  // [fours, FOUR]
    std::int32_t centre;             // what 128 in every code of a landmark adds
    float step;
    float length;  // no less than |q|
    // A landmark's score is off by at most scale * (per_error * error + per_length * length), of
    // its group's bounds.
    float per_error, per_length;
};

// A query along the axes of a page.
struct Turned {
    Query first, rest;
    float offset;  // its inner product with what the landmarks have in common
};

// What a page has of a stream, from row 0 on.
struct View {
    Codes::Part first, rest;
    const std::uint16_t* lengths;  // of the rest
};

// Of each group that has some of the rows first..last, the largest score that one of its rows
// before `last` can have by what comes first: most [groups]. plain: by the code that every
// processor runs.
void scan(const View& view, std::int64_t first, std::int64_t last, const Turned& query,
          float* most, bool plain);

// The largest score that each landmark of a group can have by all numbers: up [LANES], with nothing
// of use for rows that are not written.
void look(const View& view, std::int64_t group, const Turned& query, float* up, bool plain);

// The float32 nearest to the inner product of [dim] numbers, which are added up in double
// precision, always in the same order: a product of two float32 is exact there.
float score(const float* landmark, const double* query, std::int64_t dim);

}  // namespace kvstore

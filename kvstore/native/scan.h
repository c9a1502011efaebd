#pragma once

#include <cstdint>
#include <vector>

#include "codes.h"

namespace kvstore {

// One query, as codes are multiplied by it: q is near step * codes[d].
struct Query {
    Query(const float* given, std::int64_t dim, std::int64_t fours);

    std::int64_t dim;
    std::vector<double> wide;        // [dim]: q
    std::vector<std::int8_t> codes;  // [fours, FOUR]
    std::int32_t centre;             // what 128 in every code of a landmark adds
    float step;
    double length;   // |q|
    double error;    // |q - step * codes|
    // A landmark's score is off by at most scale * (per_error * error + per_length * length), of
    // its group's bounds.
    float per_error, per_length;
};

// What a scan of some groups needs and gives. up: the largest score that each landmark can have,
// [groups, LANES]; low [LANES]: of each lane, the largest of the smallest that its landmarks can
// have, no less than what it was before.
struct Groups {
    const std::uint8_t* codes;
    const std::uint16_t* scales;
    const Codes::Bounds* bounds;
    std::int64_t count;
    std::int64_t fours;
    float offset;  // to be added to all scores
    float* up;
    float* low;
};

// Look at groups of landmarks. plain: by the code that every processor runs.
void scan(const Groups& groups, const Query& query, bool plain);

// The float32 nearest to the inner product with a landmark, whose numbers are added up in double
// precision, always in the same order: a product of two float32 is exact there.
float score(const float* landmark, const Query& query);

}  // namespace kvstore

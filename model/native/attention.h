#pragma once

#include <cstdint>

namespace model {

enum class Element { float32, bfloat16, float16 };

// One call of `block_attention` (model/attention.py), for float32 queries. Every array is
// contiguous; what may be missing is null.
struct Attention {
    std::int64_t streams, groups, blocks, rows;  // S, G, M, R
    std::int64_t slab, size, dim, out_dim;       // slots, B, D, Dv
    Element element;                             // of the slab
    const float* q;                              // [S, G, M if each_placed else 1, R, D]
    bool each_placed;
    const float* cos;             // [M, D], with sin: block m sees q rotated by the m-th, or null
    const float* sin;             // [M, D]
    const void* keys;             // [slots, B, D]
    const void* values;           // [slots, B, Dv]
    const std::int64_t* slots;    // [S, G, M], below slab; negative: no block
    const float* gate;            // [S, G, M, R] or null
    const float* landmarks;       // [S, G, M, D] or null: the gate is their product with the query
    const float* local_out;       // [S, G, R, Dv] or null
    const float* local_lse;       // [S, G, R], with local_out
    float* out;                   // [S, G, R, Dv]
    float* lse;                   // [S, G, R]
    float* weights;               // [S, G, M, R]
};

void attend(const Attention& a, std::int64_t threads);

}  // namespace model

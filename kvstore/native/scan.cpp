// Scores of landmarks: between which bounds they lie, by their codes, and exactly.
#include "scan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "vector.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define KVSTORE_VNNI 1
// GCC 12 takes what its own headers leave undefined for a mistake.
#ifndef __clang__
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

namespace kvstore {
namespace {

constexpr std::int64_t LANES = Codes::LANES, FOUR = Codes::FOUR;
constexpr std::int64_t ROW = LANES * FOUR;
// Below, a step would leave float32's range when it is multiplied.
constexpr double SMALLEST = 1e-30;
// More than what rounding to float32 changes, by some five operations on a number.
constexpr double ROUNDING = 1e-6;

constexpr float LOWEST = -std::numeric_limits<float>::infinity();

inline float wide(const Codes::Part& part, std::int64_t group, const Query& query) {
    const Codes::Bounds& bounds = part.bounds[group];
    return query.per_error * bounds.error + query.per_length * bounds.length;
}

// Add to `up` what a group's codes of a part say at most.
inline void add_plain(const Codes::Part& part, std::int64_t group, const Query& query, float* up) {
    const std::uint8_t* codes = part.codes + group * part.fours * ROW;
    std::int32_t sums[LANES];
    std::fill_n(sums, LANES, -query.centre);
    for (std::int64_t f = 0; f < part.fours; f++) {
        const std::int8_t* q = query.codes.data() + f * FOUR;
        for (std::int64_t lane = 0; lane < LANES; lane++) {
            const std::uint8_t* x = codes + f * ROW + lane * FOUR;
            sums[lane] += x[0] * q[0] + x[1] * q[1] + x[2] * q[2] + x[3] * q[3];
        }
    }
    const float wide = kvstore::wide(part, group, query);
    for (std::int64_t lane = 0; lane < LANES; lane++) {
        up[lane] += whole(part.scales[group * LANES + lane]) *
                    (static_cast<float>(sums[lane]) * query.step + wide);
    }
}

KVSTORE_VECTOR void scan_plain(const View& view, std::int64_t first, std::int64_t last,
                               const Turned& query, float* most) {
    for (std::int64_t g = first / LANES; g * LANES < last; g++) {
        float up[LANES];
        std::fill_n(up, LANES, query.offset);
        add_plain(view.first, g, query.first, up);
        float largest = LOWEST;
        for (std::int64_t row = g * LANES; row < std::min(last, g * LANES + LANES); row++) {
            float& most = up[row - g * LANES];
            if (view.rest.fours) most += whole(view.lengths[row]) * query.rest.length;
            largest = std::max(largest, most);
        }
        *most++ = largest;
    }
}

KVSTORE_VECTOR void look_plain(const View& view, std::int64_t group, const Turned& query,
                               float* up) {
    std::fill_n(up, LANES, query.offset);
    add_plain(view.first, group, query.first, up);
    if (view.rest.fours) add_plain(view.rest, group, query.rest, up);
}

#ifdef KVSTORE_VNNI
#define KVSTORE_VNNI_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
#define KVSTORE_VNNI_INLINE KVSTORE_VNNI_TARGET __attribute__((always_inline)) inline

KVSTORE_VNNI_INLINE __m512i broadcast(const Query& query, std::int64_t f) {
    std::int32_t four;
    std::memcpy(&four, query.codes.data() + f * FOUR, sizeof four);
    return _mm512_set1_epi32(four);
}

KVSTORE_VNNI_INLINE __m512 whole16(const std::uint16_t* halves) {
    const __m256i loaded = _mm256_load_si256(reinterpret_cast<const __m256i*>(halves));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(loaded), 16));
}

// What a group's codes of a part say at most. FOURS: of the part, where that is known.
template <std::int64_t FOURS>
KVSTORE_VNNI_INLINE __m512 part_vnni(const Codes::Part& part, std::int64_t group,
                                     const Query& query) {
    const std::int64_t fours = FOURS ? FOURS : part.fours;
    const std::uint8_t* codes = part.codes + group * fours * ROW;
    __m512i even = _mm512_set1_epi32(-query.centre), odd = _mm512_setzero_si512();
    std::int64_t f = 0;
    for (; f + 1 < fours; f += 2) {
        even = _mm512_dpbusd_epi32(even, _mm512_load_si512(codes + f * ROW), broadcast(query, f));
        odd = _mm512_dpbusd_epi32(odd, _mm512_load_si512(codes + (f + 1) * ROW),
                                  broadcast(query, f + 1));
    }
    if (f < fours) {
        even = _mm512_dpbusd_epi32(even, _mm512_load_si512(codes + f * ROW), broadcast(query, f));
    }
    const __m512 sums = _mm512_cvtepi32_ps(_mm512_add_epi32(even, odd));
    return _mm512_mul_ps(whole16(part.scales + group * LANES),
                         _mm512_add_ps(_mm512_mul_ps(sums, _mm512_set1_ps(query.step)),
                                       _mm512_set1_ps(wide(part, group, query))));
}

template <std::int64_t FOURS>
KVSTORE_VNNI_TARGET void scan_vnni(const View& view, std::int64_t first, std::int64_t last,
                                   const Turned& query, float* most) {
    const __m512 offset = _mm512_set1_ps(query.offset), rest = _mm512_set1_ps(query.rest.length);
    for (std::int64_t g = first / LANES; g * LANES < last; g++) {
        __m512 up = _mm512_add_ps(part_vnni<FOURS>(view.first, g, query.first), offset);
        if (view.rest.fours) {
            up = _mm512_add_ps(up, _mm512_mul_ps(whole16(view.lengths + g * LANES), rest));
        }
        const std::int64_t rows = std::min(last - g * LANES, LANES);
        *most++ = _mm512_reduce_max_ps(_mm512_mask_mov_ps(
            _mm512_set1_ps(LOWEST), static_cast<__mmask16>((1u << rows) - 1), up));
    }
}

KVSTORE_VNNI_TARGET void look_vnni(const View& view, std::int64_t group, const Turned& query,
                                   float* up) {
    __m512 both = _mm512_add_ps(part_vnni<0>(view.first, group, query.first),
                                _mm512_set1_ps(query.offset));
    if (view.rest.fours) both = _mm512_add_ps(both, part_vnni<0>(view.rest, group, query.rest));
    _mm512_storeu_ps(up, both);
}

bool has_vnni() {
    static const bool has = __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512vnni");
    return has;
}
#endif

constexpr std::int64_t EIGHT = 8;
typedef double Doubles __attribute__((vector_size(EIGHT * sizeof(double))));

}  // namespace

Query::Query(const double* numbers, std::int64_t count, std::int64_t fours, double whole)
    : codes(fours * FOUR, 0) {
    double most = 0, off = 0;
    for (std::int64_t d = 0; d < count; d++) most = std::max(most, std::fabs(numbers[d]));
    step = static_cast<float>(std::max(most / 127, SMALLEST));
    std::int32_t sum = 0;
    for (std::int64_t d = 0; d < count; d++) {
        const double code = std::clamp(std::nearbyint(numbers[d] / step), -127.0, 127.0);
        codes[d] = static_cast<std::int8_t>(code);
        sum += codes[d];
        off += (numbers[d] - code * step) * (numbers[d] - code * step);
    }
    centre = 128 * sum;
    const double error = std::sqrt(off);
    const double least = std::max(kvstore::length(numbers, count), SMALLEST);
    length = static_cast<float>(least * (1 + 4 * ROUNDING));
    per_error = length;
    per_length = static_cast<float>(error * (1 + 4 * ROUNDING) +
                                    ROUNDING * (std::max(whole, SMALLEST) + error));
}

void scan(const View& view, std::int64_t first, std::int64_t last, const Turned& query,
          float* most, bool plain) {
    if (first >= last) return;
#ifdef KVSTORE_VNNI
    if (!plain && has_vnni()) {
        switch (view.first.fours) {
            case 8: return scan_vnni<8>(view, first, last, query, most);
            case 16: return scan_vnni<16>(view, first, last, query, most);
            default: return scan_vnni<0>(view, first, last, query, most);
        }
    }
#endif
    scan_plain(view, first, last, query, most);
}

void look(const View& view, std::int64_t group, const Turned& query, float* up, bool plain) {
#ifdef KVSTORE_VNNI
    if (!plain && has_vnni()) return look_vnni(view, group, query, up);
#endif
    look_plain(view, group, query, up);
}

KVSTORE_VECTOR float score(const float* landmark, const double* query, std::int64_t dim) {
    Doubles sums = {};
    std::int64_t d = 0;
    for (; d + EIGHT <= dim; d += EIGHT) {
        Doubles q, x;
        for (std::int64_t i = 0; i < EIGHT; i++) {
            q[i] = query[d + i];
            x[i] = landmark[d + i];
        }
        sums += q * x;
    }
    for (std::int64_t i = 0; d + i < dim; i++) sums[i] += query[d + i] * landmark[d + i];
    return static_cast<float>(((sums[0] + sums[1]) + (sums[2] + sums[3])) +
                              ((sums[4] + sums[5]) + (sums[6] + sums[7])));
}

}  // namespace kvstore

// Scores of landmarks: between which bounds they lie, by their codes, and exactly.
#include "scan.h"

#include <algorithm>
#include <cmath>
#include <cstring>

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

KVSTORE_VECTOR void scan_plain(const Groups& at, const Query& query) {
    for (std::int64_t g = 0; g < at.count; g++) {
        const std::uint8_t* codes = at.codes + g * at.fours * ROW;
        std::int32_t sums[LANES] = {};
        for (std::int64_t f = 0; f < at.fours; f++) {
            const std::int8_t* q = query.codes.data() + f * FOUR;
            for (std::int64_t lane = 0; lane < LANES; lane++) {
                const std::uint8_t* x = codes + f * ROW + lane * FOUR;
                sums[lane] += x[0] * q[0] + x[1] * q[1] + x[2] * q[2] + x[3] * q[3];
            }
        }
        const float wide = query.per_error * at.bounds[g].error +
                           query.per_length * at.bounds[g].length;
        for (std::int64_t lane = 0; lane < LANES; lane++) {
            const std::uint32_t bits = static_cast<std::uint32_t>(at.scales[g * LANES + lane])
                                       << 16;
            float scale;
            std::memcpy(&scale, &bits, sizeof scale);
            const float near =
                scale * (static_cast<float>(sums[lane] - query.centre) * query.step) + at.offset;
            at.up[g * LANES + lane] = near + scale * wide;
            at.low[lane] = std::max(at.low[lane], near - scale * wide);
        }
    }
}

#ifdef KVSTORE_VNNI
// FOURS: at.fours where it is known when this is compiled, so that the query stays in registers.
template <std::int64_t FOURS>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) void scan_vnni(
    const Groups& at, const Query& query) {
    const std::int64_t fours = FOURS ? FOURS : at.fours;
    const auto broadcast = [&](std::int64_t f) __attribute__((
                               target("avx512f,avx512bw,avx512vl,avx512vnni"), always_inline)) {
        std::int32_t four;
        std::memcpy(&four, query.codes.data() + f * FOUR, sizeof four);
        return _mm512_set1_epi32(four);
    };
    const __m512i centre = _mm512_set1_epi32(query.centre);
    const __m512 step = _mm512_set1_ps(query.step), offset = _mm512_set1_ps(at.offset);
    __m512 low = _mm512_loadu_ps(at.low);
    __m512i q[FOURS ? FOURS : 1];
    for (std::int64_t f = 0; f < FOURS; f++) q[f] = broadcast(f);
    for (std::int64_t g = 0; g < at.count; g++) {
        const std::uint8_t* codes = at.codes + g * fours * ROW;
        __m512i even = _mm512_setzero_si512(), odd = even;
        std::int64_t f = 0;
        for (; f + 1 < fours; f += 2) {
            const __m512i a = _mm512_load_si512(codes + f * ROW);
            const __m512i b = _mm512_load_si512(codes + (f + 1) * ROW);
            even = _mm512_dpbusd_epi32(even, a, FOURS ? q[f] : broadcast(f));
            odd = _mm512_dpbusd_epi32(odd, b, FOURS ? q[f + 1] : broadcast(f + 1));
        }
        if (f < fours) {
            even = _mm512_dpbusd_epi32(even, _mm512_load_si512(codes + f * ROW), broadcast(f));
        }
        const __m512i sums = _mm512_sub_epi32(_mm512_add_epi32(even, odd), centre);
        const __m256i halves = _mm256_load_si256(
            reinterpret_cast<const __m256i*>(at.scales + g * LANES));
        const __m512 scale =
            _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
        const __m512 wide = _mm512_mul_ps(
            scale, _mm512_set1_ps(query.per_error * at.bounds[g].error +
                                  query.per_length * at.bounds[g].length));
        const __m512 near = _mm512_add_ps(
            _mm512_mul_ps(scale, _mm512_mul_ps(_mm512_cvtepi32_ps(sums), step)), offset);
        _mm512_storeu_ps(at.up + g * LANES, _mm512_add_ps(near, wide));
        low = _mm512_max_ps(low, _mm512_sub_ps(near, wide));
    }
    _mm512_storeu_ps(at.low, low);
}
#endif

using Scan = void (*)(const Groups&, const Query&);

Scan best(std::int64_t fours) {
#ifdef KVSTORE_VNNI
    static const bool vnni = __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512vl") &&
                             __builtin_cpu_supports("avx512vnni");
    if (vnni) return fours == 16 ? scan_vnni<16> : scan_vnni<0>;
#endif
    return scan_plain;
}

constexpr std::int64_t EIGHT = 8;
typedef double Doubles __attribute__((vector_size(EIGHT * sizeof(double))));

}  // namespace

Query::Query(const float* given, std::int64_t numbers, std::int64_t fours)
    : dim(numbers), wide(given, given + numbers), codes(fours * FOUR, 0) {
    double most = 0, square = 0, off = 0;
    for (double x : wide) {
        most = std::max(most, std::fabs(x));
        square += x * x;
    }
    step = static_cast<float>(std::max(most / 127, SMALLEST));
    std::int32_t sum = 0;
    for (std::int64_t d = 0; d < dim; d++) {
        const double code = std::clamp(std::nearbyint(wide[d] / step), -127.0, 127.0);
        codes[d] = static_cast<std::int8_t>(code);
        sum += codes[d];
        off += (wide[d] - code * step) * (wide[d] - code * step);
    }
    centre = 128 * sum;
    length = std::sqrt(square);
    error = std::sqrt(off);
    const double least = std::max(length, SMALLEST);
    per_error = static_cast<float>(least * (1 + 4 * ROUNDING));
    per_length = static_cast<float>(error * (1 + 4 * ROUNDING) + ROUNDING * (least + error));
}

void scan(const Groups& groups, const Query& query, bool plain) {
    (plain ? scan_plain : best(groups.fours))(groups, query);
}

KVSTORE_VECTOR float score(const float* landmark, const Query& query) {
    Doubles sums = {};
    std::int64_t d = 0;
    for (; d + EIGHT <= query.dim; d += EIGHT) {
        Doubles q, x;
        for (std::int64_t i = 0; i < EIGHT; i++) {
            q[i] = query.wide[d + i];
            x[i] = landmark[d + i];
        }
        sums += q * x;
    }
    for (std::int64_t i = 0; d + i < query.dim; i++) sums[i] += query.wide[d + i] * landmark[d + i];
    return static_cast<float>(((sums[0] + sums[1]) + (sums[2] + sums[3])) +
                              ((sums[4] + sums[5]) + (sums[6] + sums[7])));
}

}  // namespace kvstore

// Vectors of eight floats, by the vector extensions of GCC and Clang. Of sixteen, which AVX-512 has,
// GCC makes slow code for processors with AVX2: that was eight times slower there.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

// A function in several versions, of which the processor's best is taken when the module is loaded.
// What it calls must be INLINE, or it is compiled once, for the oldest processor.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define MODEL_VECTOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else  // which knows the levels, but not how to choose by them
#define MODEL_VECTOR __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define MODEL_VECTOR
#endif
#define INLINE __attribute__((always_inline)) inline

// How vectors are handed over and returned does not matter: everything here is INLINE.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace model {

constexpr std::int64_t LANES = 8;

using Floats = float __attribute__((vector_size(32)));
using Words = std::uint32_t __attribute__((vector_size(32)));
using Integers = std::int32_t __attribute__((vector_size(32)));
using Quad = float __attribute__((vector_size(16)));

struct BFloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};

template <class To, class From>
INLINE To bits_as(const From& from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

// Four or eight numbers of a and b, by their places in both.
template <int... Places, class Vector>
INLINE auto shuffled(const Vector& a, const Vector& b) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, Places...);
#else
    constexpr int width = sizeof(Vector) / sizeof(float);
    using Result = std::conditional_t<sizeof...(Places) == 4, Quad, Floats>;
    return Result{(Places < width ? a[Places % width] : b[Places % width])...};
#endif
}

// Two vectors of what lies in one row of a slab. Of narrow numbers the even ones and the odd ones:
// eight words hold two each, and taking them apart costs an operation a vector. A row is handled
// in this order throughout, see
// `pair_up`.
struct Pair {
    Floats first, second;
};
constexpr std::int64_t PAIR = 2 * LANES;

INLINE Floats load(const float* from) {
    Floats x;
    std::memcpy(&x, from, sizeof(x));
    return x;
}

INLINE void store(float* to, const Floats& x) { std::memcpy(to, &x, sizeof(x)); }

INLINE Words load_words(const void* from) {
    Words x;
    std::memcpy(&x, from, sizeof(x));
    return x;
}

INLINE Floats float_of_half(const Words& x) {
    const Words sign = (x & 0x8000) << 16;
    Words rest = (x & 0x7fff) << 13;
    rest |= (Words)((x & 0x7c00) == 0x7c00) & 0x7f800000;  // infinities and NaNs
    return bits_as<Floats>(bits_as<Words>(bits_as<Floats>(rest) * 0x1p112f) | sign);
}

INLINE Pair load_pair(const float* from) { return {load(from), load(from + LANES)}; }

INLINE Pair load_pair(const BFloat16* from) {
    const Words both = load_words(from);
    return {bits_as<Floats>(both << 16), bits_as<Floats>(both & 0xffff0000)};
}

INLINE Pair load_pair(const Float16* from) {
    const Words both = load_words(from);
    return {float_of_half(both & 0xffff), float_of_half(both >> 16)};
}

// The first n < PAIR of them, then zeros.
template <class T>
INLINE Pair load_some(const T* from, std::int64_t n) {
    T part[PAIR] = {};
    std::memcpy(part, from, sizeof(T) * n);
    return load_pair(part);
}

// A row of n floats, n a multiple of PAIR, put into the order of a slab's pairs of T.
template <class T>
INLINE void pair_up(const float* from, float* to, std::int64_t n) {
    const bool narrow = sizeof(T) < sizeof(float);
    for (std::int64_t i = 0; i < n; i += PAIR) {
        const Floats a = load(from + i), b = load(from + i + LANES);
        store(to + i, narrow ? shuffled<0, 2, 4, 6, 8, 10, 12, 14>(a, b) : a);
        store(to + i + LANES,
              narrow ? shuffled<1, 3, 5, 7, 9, 11, 13, 15>(a, b) : b);
    }
}

// The same undone.
template <class T>
INLINE void put_in_order(const float* from, float* to, std::int64_t n) {
    const bool narrow = sizeof(T) < sizeof(float);
    for (std::int64_t i = 0; i < n; i += PAIR) {
        const Floats a = load(from + i), b = load(from + i + LANES);
        store(to + i, narrow ? shuffled<0, 8, 1, 9, 2, 10, 3, 11>(a, b) : a);
        store(to + i + LANES,
              narrow ? shuffled<4, 12, 5, 13, 6, 14, 7, 15>(a, b) : b);
    }
}

INLINE Floats greater(const Floats& a, const Floats& b) { return a > b ? a : b; }

// The sum of the two halves of a vector.
INLINE Quad folded(const Floats& x) {
    return shuffled<0, 1, 2, 3>(x, x) + shuffled<4, 5, 6, 7>(x, x);
}

INLINE float sum(const Floats& x) {
    const Quad q = folded(x);
    return (q[0] + q[1]) + (q[2] + q[3]);
}

INLINE float greatest(const Floats& x) {
    float top = x[0];
    for (int i = 1; i < LANES; i++) top = x[i] > top ? x[i] : top;
    return top;
}

// e^x for x <= 0, as 2^n 2^f with f in [-1/2, 1/2] and a Taylor polynomial for the latter. What
// x log2(e) is rounded by grows with x as e^x falls: the error is always less than 2^-23, and
// relative to e^x less than |x| 2^-23 + 2^-22. Below -87 it is zero. NaN stays NaN.
INLINE Floats exp_of_negative(const Floats& x) {
    constexpr float MAGIC = 0x1.8p23f;  // added, it leaves the nearest integer in the last bits
    const Floats y = x * 1.44269504088896341f;
    const Integers n = bits_as<Integers>(y + MAGIC) - bits_as<std::int32_t>(MAGIC);
    const Floats f = y - __builtin_convertvector(n, Floats);
    Floats p = 1.5403530393381609e-4f + f * 1.5252733804059841e-5f;
    p = 1.3333558146428443e-3f + f * p;
    p = 9.6181291076284772e-3f + f * p;
    p = 5.5504108664821580e-2f + f * p;
    p = 2.4022650695910072e-1f + f * p;
    p = 6.9314718055994531e-1f + f * p;
    p = 1.0f + f * p;
    return x < -87.0f ? Floats{} : p * bits_as<Floats>((n + 127) << 23);
}

INLINE float exp_of_negative(float x) { return exp_of_negative(Floats{} + x)[0]; }

}  // namespace model

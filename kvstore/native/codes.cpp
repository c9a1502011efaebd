// Landmarks in a byte a number: how they are made.
#include "codes.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace kvstore {
namespace {

constexpr std::size_t LINE = 64;
// Below, a scale would leave float32's range when it is multiplied.
constexpr double SMALLEST = 1e-30;
// More than what rounding a bound to float32 can take from it.
constexpr double UP = 1 + 1e-6;

template <class T>
std::unique_ptr<T[], void (*)(void*)> lines(std::int64_t count) {
    const std::size_t nbytes = (count * sizeof(T) + LINE - 1) / LINE * LINE;
    void* made = std::aligned_alloc(LINE, std::max(nbytes, LINE));
    if (!made) throw std::bad_alloc();
    return {static_cast<T*>(made), std::free};
}

// The upper half of the smallest float32 of which no lower half is set and that is not below.
std::uint16_t half_up(double value) {
    float single = static_cast<float>(value);
    std::uint32_t bits;
    std::memcpy(&bits, &single, sizeof bits);
    return static_cast<std::uint16_t>((bits + 0xFFFF) >> 16);
}

double whole(std::uint16_t half) {
    const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
    float single;
    std::memcpy(&single, &bits, sizeof single);
    return single;
}

}  // namespace

Codes::Codes(const float* landmarks, std::vector<std::int64_t> bases, std::int64_t width,
             std::int64_t dim)
    : landmarks_(landmarks),
      bases_(std::move(bases)),
      width_(width),
      dim_(dim),
      fours_((dim + FOUR - 1) / FOUR),
      groups_((width + LANES - 1) / LANES),
      streams_(bases_.size()),
      codes_(lines<std::uint8_t>(count() * groups_ * fours_ * LANES * FOUR)),
      scales_(lines<std::uint16_t>(count() * groups_ * LANES)),
      bounds_(count() * groups_, Bounds{0, 0}) {}

void Codes::follow(const Codes& other) {
    for (std::size_t i = 0; i < streams_.size(); i++) {
        streams_[i].reference = other.streams_[i].reference;
    }
}

void Codes::refer(std::int64_t stream, std::int64_t last) {
    Stream& of = streams_[stream];
    of.own = true;
    if (last < ENOUGH && !of.reference.empty()) return;
    of.reference.assign(dim_, 0.0);
    for (std::int64_t i = 0; i < last; i++) {
        const float* landmark = this->landmark(stream, i);
        for (std::int64_t d = 0; d < dim_; d++) of.reference[d] += landmark[d];
    }
    for (double& x : of.reference) x /= static_cast<double>(last);
}

void Codes::encode(std::int64_t stream, std::int64_t first, std::int64_t last) {
    if (first >= last) return;
    Stream& of = streams_[stream];
    if (!of.own) refer(stream, last);
    std::uint8_t* codes = const_cast<std::uint8_t*>(this->codes(stream));
    std::uint16_t* scales = const_cast<std::uint16_t*>(this->scales(stream));
    Bounds* bounds = const_cast<Bounds*>(this->bounds(stream));
    std::vector<double> rest(dim_);
    for (std::int64_t row = first; row < last; row++) {
        const float* landmark = this->landmark(stream, row);
        double most = 0, square = 0;
        for (std::int64_t d = 0; d < dim_; d++) {
            const double x = landmark[d];
            rest[d] = x - of.reference[d];
            most = std::max(most, std::fabs(rest[d]));
            square += x * x;
        }
        const std::int64_t group = row / LANES, lane = row % LANES;
        const std::uint16_t half = half_up(std::max(most / 127, SMALLEST));
        const double scale = whole(half);
        std::uint8_t* to = codes + (group * fours_ * LANES + lane) * FOUR;
        double error = 0, length = 0;
        for (std::int64_t d = 0; d < fours_ * FOUR; d++) {
            const double code = d < dim_ ? std::nearbyint(rest[d] / scale) : 0.0;
            if (d < dim_) {
                const double off = rest[d] - code * scale;
                error += off * off / (scale * scale);
                length += code * code;
            }
            to[d / FOUR * LANES * FOUR + d % FOUR] = static_cast<std::uint8_t>(code + 128);
        }
        scales[row] = half;
        Bounds& bound = bounds[group];
        bound.error = std::max(bound.error, static_cast<float>(std::sqrt(error) * UP));
        bound.length = std::max(bound.length, static_cast<float>(std::sqrt(length) * UP));
        of.longest = std::max(of.longest, std::sqrt(square));
    }
}

std::size_t Codes::nbytes() const {
    return count() * groups_ * (fours_ * LANES * FOUR + LANES * sizeof(std::uint16_t)) +
           bounds_.size() * sizeof(Bounds);
}

}  // namespace kvstore

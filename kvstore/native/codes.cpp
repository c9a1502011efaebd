// Landmarks in a byte a number: how they are made.
#include "codes.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "vector.h"

namespace kvstore {
namespace {

constexpr std::size_t LINE = 64;
// Below, a scale would leave float32's range when it is multiplied.
constexpr double SMALLEST = 1e-30;
// More than what rounding a bound to float32 can take from it.
constexpr double UP = 1 + 1e-6;

template <class T>
Lines<T> lines(std::int64_t count) {
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

// Write the codes of one landmark's part, numbers [count].
KVSTORE_VECTOR void write(const Codes::Part& part, std::int64_t row, const double* numbers,
                          std::int64_t count) {
    const std::int64_t group = row / Codes::LANES, lane = row % Codes::LANES;
    double most = 0;
    for (std::int64_t d = 0; d < count; d++) most = std::max(most, std::fabs(numbers[d]));
    const std::uint16_t half = half_up(std::max(most / 127, SMALLEST));
    const double scale = whole(half);
    std::uint8_t* to = part.codes + (group * part.fours * Codes::LANES + lane) * Codes::FOUR;
    double error = 0, length = 0;
    for (std::int64_t d = 0; d < part.fours * Codes::FOUR; d++) {
        const double code = d < count ? std::nearbyint(numbers[d] / scale) : 0.0;
        if (d < count) {
            const double off = numbers[d] - code * scale;
            error += off * off / (scale * scale);
            length += code * code;
        }
        to[d / Codes::FOUR * Codes::LANES * Codes::FOUR + d % Codes::FOUR] =
            static_cast<std::uint8_t>(code + 128);
    }
    part.scales[row] = half;
    Codes::Bounds& bound = part.bounds[group];
    bound.error = std::max(bound.error, static_cast<float>(std::sqrt(error) * UP));
    bound.length = std::max(bound.length, static_cast<float>(std::sqrt(length) * UP));
}

}  // namespace

KVSTORE_VECTOR void turn(const double* axes, const double* x, std::int64_t dim, double* y) {
    constexpr std::int64_t SOME = 32;  // sums that stay in registers
    std::int64_t i = 0;
    for (; i + SOME <= dim; i += SOME) {
        double sums[SOME] = {};
        for (std::int64_t d = 0; d < dim; d++) {
            for (std::int64_t j = 0; j < SOME; j++) sums[j] += axes[d * dim + i + j] * x[d];
        }
        std::copy_n(sums, SOME, y + i);
    }
    for (; i < dim; i++) {
        y[i] = 0;
        for (std::int64_t d = 0; d < dim; d++) y[i] += axes[d * dim + i] * x[d];
    }
}

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
      rest_scales_(lines<std::uint16_t>(count() * groups_ * LANES)),
      lengths_(lines<std::uint16_t>(count() * groups_ * LANES)),
      bounds_(count() * groups_),
      rest_bounds_(count() * groups_) {
    for (Stream& of : streams_) of = {std::vector<double>(dim_, 0.0), {}, fours_, 0};
}

void Codes::refer(std::int64_t stream, const double* reference, const double* axes,
                  std::int64_t lead) {
    Stream& of = streams_[stream];
    of.reference.assign(reference, reference + dim_);
    of.axes.assign(axes, axes ? axes + dim_ * dim_ : axes);
    of.lead = axes ? std::clamp((lead + FOUR - 1) / FOUR, std::int64_t{1}, fours_) : fours_;
}

void Codes::follow(const Codes& other) {
    for (std::size_t i = 0; i < streams_.size(); i++) {
        const Stream& theirs = other.streams_[i];
        streams_[i] = {theirs.reference, theirs.axes, theirs.lead, 0};
    }
}

Codes::Part Codes::first(std::int64_t stream) const {
    return {streams_[stream].lead, codes_.get() + stream * groups_ * fours_ * LANES * FOUR,
            scales_.get() + stream * groups_ * LANES,
            const_cast<Bounds*>(bounds_.data()) + stream * groups_};
}

Codes::Part Codes::rest(std::int64_t stream) const {
    const std::int64_t lead = streams_[stream].lead;
    return {fours_ - lead,
            codes_.get() + (stream * fours_ + lead) * groups_ * LANES * FOUR,
            rest_scales_.get() + stream * groups_ * LANES,
            const_cast<Bounds*>(rest_bounds_.data()) + stream * groups_};
}

void Codes::encode(std::int64_t stream, std::int64_t first, std::int64_t last) {
    Stream& of = streams_[stream];
    const Part lead = this->first(stream), rest = this->rest(stream);
    const std::int64_t leading = std::min(dim_, lead.fours * FOUR);
    std::vector<double> off(dim_), turned(dim_);
    for (std::int64_t row = first; row < last; row++) {
        const float* landmark = this->landmark(stream, row);
        double square = 0;
        for (std::int64_t d = 0; d < dim_; d++) {
            const double x = landmark[d];
            off[d] = x - of.reference[d];
            square += x * x;
        }
        if (!of.axes.empty()) turn(of.axes.data(), off.data(), dim_, turned.data());
        const double* numbers = of.axes.empty() ? off.data() : turned.data();
        write(lead, row, numbers, leading);
        if (rest.fours) {
            write(rest, row, numbers + leading, dim_ - leading);
            const double left = length(numbers + leading, dim_ - leading);
            lengths(stream)[row] = half_up(std::max(left * UP, SMALLEST));
        }
        of.longest = std::max(of.longest, std::sqrt(square));
    }
}

std::size_t Codes::nbytes() const {
    const std::size_t rows = count() * groups_ * LANES;
    return rows * (fours_ * FOUR + 3 * sizeof(std::uint16_t)) +
           (bounds_.size() + rest_bounds_.size()) * sizeof(Bounds);
}

}  // namespace kvstore

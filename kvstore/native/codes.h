#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

namespace kvstore {

template <class T>
using Lines = std::unique_ptr<T[], void (*)(void*)>;  // whole lines of the cache

// A page's landmarks once more, in a byte a number, with a bound on what that leaves out: a
// landmark x is near reference + scale * (code - 128).
//
// The reference is what a stream's landmarks have in common, which is most of a trained one. If
// they differ along few axes, the codes are of the numbers along those, which come first, and along
// all others, of which a bound is known without a look at their codes. The scales of the two parts
// are each landmark's own, the bounds are those of a group of LANES landmarks. Once written they
// only grow, so that who knows fewer of a group's landmarks (a fork) is told a valid bound.
class Codes {
   public:
    static constexpr std::int64_t LANES = 16;  // landmarks of a group
    static constexpr std::int64_t FOUR = 4;    // numbers of a landmark that lie side by side

    struct Bounds {
        float error = 0;   // the largest |x - what its code says| / scale
        float length = 0;  // the largest |code - 128|
    };

    // What is said in some numbers of a stream's landmarks.
    struct Part {
        std::int64_t fours;
        // uint8 [groups, fours, LANES, FOUR]: what a vector instruction takes at a time lies
        // together.
        std::uint8_t* codes;
        std::uint16_t* scales;  // [groups, LANES]: the upper halves of float32
        Bounds* bounds;         // [groups]
    };

    struct Stream {
        std::vector<double> reference;  // [dim]
        std::vector<double> axes;       // [dim, dim], a column each, orthonormal; empty: as given
        std::int64_t lead = 0;          // fours of the numbers that come first
        double longest = 0;             // |x| of its longest landmark
    };

    // landmarks: float32 [bases.size(), width, dim], of which it owns nothing.
    Codes(const float* landmarks, std::vector<std::int64_t> bases, std::int64_t width,
          std::int64_t dim);

    // Say what a stream's landmarks have in common, before any of them is written. axes: [dim, dim]
    // or null; lead: along how many of them the landmarks differ most.
    void refer(std::int64_t stream, const double* reference, const double* axes, std::int64_t lead);
    // Take over what another page's landmarks have in common.
    void follow(const Codes& other);
    // Write the codes of a stream's landmarks at rows first..last.
    void encode(std::int64_t stream, std::int64_t first, std::int64_t last);

    std::int64_t dim() const { return dim_; }
    std::int64_t width() const { return width_; }
    std::int64_t fours() const { return fours_; }
    std::int64_t count() const { return static_cast<std::int64_t>(bases_.size()); }
    std::int64_t base(std::int64_t stream) const { return bases_[stream]; }
    const Stream& stream(std::int64_t stream) const { return streams_[stream]; }
    const float* landmark(std::int64_t stream, std::int64_t row) const {
        return landmarks_ + (stream * width_ + row) * dim_;
    }
    Part first(std::int64_t stream) const;
    // Of no fours, where all numbers come first.
    Part rest(std::int64_t stream) const;
    // [groups, LANES]: no less than the length of the rest, the upper halves of float32.
    std::uint16_t* lengths(std::int64_t stream) const {
        return lengths_.get() + stream * groups_ * LANES;
    }
    std::size_t nbytes() const;

   private:
    const float* landmarks_;
    std::vector<std::int64_t> bases_;
    std::int64_t width_, dim_, fours_, groups_;
    std::vector<Stream> streams_;
    // Not set: pages of memory that hold no landmark yet are not taken from the system.
    Lines<std::uint8_t> codes_;
    Lines<std::uint16_t> scales_, rest_scales_, lengths_;
    std::vector<Bounds> bounds_, rest_bounds_;
};

// The float32 of which this is the upper half.
inline float whole(std::uint16_t half) {
    const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
    float single;
    std::memcpy(&single, &bits, sizeof single);
    return single;
}

// The length of numbers [count].
inline double length(const double* numbers, std::int64_t count) {
    double square = 0;
    for (std::int64_t d = 0; d < count; d++) square += numbers[d] * numbers[d];
    return std::sqrt(square);
}

// Along the columns of axes [dim, dim], what x [dim] is: y [dim].
void turn(const double* axes, const double* x, std::int64_t dim, double* y);

}  // namespace kvstore

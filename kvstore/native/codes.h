#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace kvstore {

// A page's landmarks once more, in a byte a number, with a bound on what that leaves out: a
// landmark x is near reference + scale * (code - 128).
//
// The reference is what a stream's landmarks have in common, which is most of a trained one. A
// scale is each landmark's own, the bounds are those of a group of LANES landmarks. Once written
// they only grow, so that who knows fewer of a group's landmarks (a fork) is told a valid bound.
class Codes {
   public:
    static constexpr std::int64_t LANES = 16;  // landmarks of a group
    static constexpr std::int64_t FOUR = 4;    // numbers of a landmark that lie side by side
    // Landmarks whose mean is taken for what all have in common.
    static constexpr std::int64_t ENOUGH = 64;

    struct Bounds {
        float error;   // the largest |x - what its code says| / scale
        float length;  // the largest |code - 128|
    };

    struct Stream {
        std::vector<double> reference;  // [dim]
        bool own = false;               // it was made from this page's landmarks
        double longest = 0;             // |x| of its longest landmark
    };

    // landmarks: float32 [bases.size(), width, dim], of which it owns nothing.
    Codes(const float* landmarks, std::vector<std::int64_t> bases, std::int64_t width,
          std::int64_t dim);

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
    // uint8 [groups, fours, LANES, FOUR]: what a vector instruction takes at a time lies together.
    const std::uint8_t* codes(std::int64_t stream) const {
        return codes_.get() + stream * groups_ * fours_ * LANES * FOUR;
    }
    // [groups, LANES]: the upper halves of float32.
    const std::uint16_t* scales(std::int64_t stream) const {
        return scales_.get() + stream * groups_ * LANES;
    }
    const Bounds* bounds(std::int64_t stream) const { return bounds_.data() + stream * groups_; }
    std::size_t nbytes() const;

   private:
    void refer(std::int64_t stream, std::int64_t last);

    const float* landmarks_;
    std::vector<std::int64_t> bases_;
    std::int64_t width_, dim_, fours_, groups_;
    std::vector<Stream> streams_;
    // Not set: pages of memory that hold no landmark yet are not taken from the system.
    std::unique_ptr<std::uint8_t[], void (*)(void*)> codes_;
    std::unique_ptr<std::uint16_t[], void (*)(void*)> scales_;
    std::vector<Bounds> bounds_;
};

}  // namespace kvstore

// Exact search for a few queries: which landmarks could be among the best by their codes, and which
// of those are.
#include "search.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "codes.h"
#include "scan.h"

namespace py = pybind11;

namespace kvstore {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;
using Numbers = std::vector<std::int64_t>;

constexpr std::int64_t LANES = Codes::LANES;
// Landmarks of which one for each lane is compared with the others for the k-th best.
constexpr std::int64_t CHUNK = 64;
// Scores up to which float32 is far from overflowing.
constexpr double LARGEST = 1e30;
// Numbers of a landmark up to which sums of products of codes fit into int32.
constexpr std::int64_t WIDEST = 32768;
// Looking at the codes pays from so many landmarks on, for each that is wanted.
constexpr std::int64_t WORTH = 16;
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// Consecutive landmarks of a stream in one page: rows first..last are number, number + 1, ...
struct Span {
    const Codes* page;
    std::int64_t first, last, number;
};

struct Found {
    float score;
    std::int64_t number;
    bool operator<(const Found& other) const {  // the better one first; of equals the older
        return score > other.score || (score == other.score && number < other.number);
    }
};

// The k best of what is added, the worst of them last.
class Best {
   public:
    explicit Best(std::int64_t k) : k_(k) {}

    void add(const Found& found) {
        if (static_cast<std::int64_t>(kept_.size()) < k_) {
            kept_.push_back(found);
            std::push_heap(kept_.begin(), kept_.end());
        } else if (found < kept_.front()) {
            std::pop_heap(kept_.begin(), kept_.end());
            kept_.back() = found;
            std::push_heap(kept_.begin(), kept_.end());
        }
    }

    // What is worse is not among them.
    float least() const {
        return static_cast<std::int64_t>(kept_.size()) < k_ ? LOWEST : kept_.front().score;
    }

    void write(std::int64_t* numbers, float* scores) {
        std::sort_heap(kept_.begin(), kept_.end());
        for (std::int64_t i = 0; i < k_; i++) {
            const bool is = i < static_cast<std::int64_t>(kept_.size());
            numbers[i] = is ? kept_[i].number : -1;
            scores[i] = is ? kept_[i].score : LOWEST;
        }
    }

   private:
    std::int64_t k_;
    std::vector<Found> kept_;
};

void prefetch(const float* landmark, std::int64_t dim) {
    for (std::int64_t d = 0; d < dim; d += 16) __builtin_prefetch(landmark + d);
}

std::vector<Span> spans_of(const std::vector<Codes*>& pages, std::int64_t stream,
                           std::int64_t start, std::int64_t stop) {
    std::vector<Span> spans;
    std::int64_t end = stop;
    for (auto page = pages.rbegin(); page != pages.rend() && start < end; ++page) {
        const std::int64_t base = (*page)->base(stream);
        if (base >= end) continue;
        const std::int64_t number = std::max(base, start);
        if (end - base > (*page)->width()) throw py::index_error("a landmark that no page holds");
        spans.push_back({*page, number - base, end - base, number});
        end = number;
    }
    std::reverse(spans.begin(), spans.end());
    return spans;
}

const float* find(const std::vector<Codes*>& pages, std::int64_t stream, std::int64_t number) {
    for (auto page = pages.rbegin(); page != pages.rend(); ++page) {
        const std::int64_t row = number - (*page)->base(stream);
        if (row >= 0 && row < (*page)->width()) return (*page)->landmark(stream, row);
    }
    throw py::index_error("a landmark that no page holds");
}

class Search {
   public:
    Search(std::vector<Span> spans, std::int64_t stream, std::int64_t k, bool plain)
        : spans_(std::move(spans)), stream_(stream), k_(k), plain_(plain) {}

    void run(const Query& query, std::int64_t* numbers, float* scores) {
        Best best(k_);
        if (by_codes(query)) {
            for (const auto& [span, row] : candidates_) {
                prefetch(span->page->landmark(stream_, row), query.dim);
            }
            for (const auto& [span, row] : candidates_) add(*span, row, query, best);
        } else {
            for (const Span& span : spans_) {
                for (std::int64_t row = span.first; row < span.last; row++) {
                    add(span, row, query, best);
                }
            }
        }
        best.write(numbers, scores);
    }

   private:
    // Find the candidates; false if nothing can be said by the codes.
    bool by_codes(const Query& query) {
        std::int64_t landmarks = 0;
        double longest = 0, common = 0;
        for (const Span& span : spans_) {
            const Codes::Stream& of = span.page->stream(stream_);
            landmarks += span.last - span.first;
            double square = 0;
            for (double x : of.reference) square += x * x;
            common = std::max(common, std::sqrt(square));
            longest = std::max({longest, of.longest, common});
        }
        if (landmarks < WORTH * k_ || query.wide.size() > WIDEST ||
            std::max(query.length, 1 / LARGEST) * longest > LARGEST) {
            return false;
        }
        // What else rounding does: to the scores themselves, and to what is near zero.
        const float margin =
            static_cast<float>(2 * (1e-6 * query.length * common + 1e-36) * (1 + 1e-6));
        up_.resize(landmarks + 2 * LANES * static_cast<std::int64_t>(spans_.size()));
        low_.clear();
        std::int64_t at = 0;
        for (const Span& span : spans_) at += look(span, query, at);
        const float least = kth_largest(low_, k_) - margin;
        if (least == LOWEST) return false;
        candidates_.clear();
        at = 0;
        for (const Span& span : spans_) {
            const std::int64_t begin = span.first / LANES * LANES;
            const std::int64_t end = (span.last + LANES - 1) / LANES * LANES;
            const float* up = up_.data() + at;
            for (std::int64_t i = 0; i < end - begin; i += LANES) {
                float most = up[i];
                for (std::int64_t lane = 1; lane < LANES; lane++) {
                    most = std::max(most, up[i + lane]);
                }
                if (most < least) continue;
                for (std::int64_t lane = 0; lane < LANES; lane++) {
                    if (up[i + lane] < least) continue;
                    candidates_.emplace_back(&span, begin + i + lane);
                }
            }
            at += end - begin;
        }
        return true;
    }

    // Write the largest possible scores of a span's landmarks to up_, from `at` on, and the largest
    // of the smallest possible ones to low_; return how many were written.
    std::int64_t look(const Span& span, const Query& query, std::int64_t at) {
        const Codes& page = *span.page;
        const std::vector<double>& reference = page.stream(stream_).reference;
        double offset = 0;
        for (std::size_t d = 0; d < reference.size(); d++) offset += query.wide[d] * reference[d];
        const std::int64_t begin = span.first / LANES * LANES;
        const std::int64_t end = (span.last + LANES - 1) / LANES * LANES;
        const auto groups = [&](std::int64_t row, std::int64_t count, float* low) {
            const std::int64_t group = row / LANES;
            return Groups{page.codes(stream_) + group * page.fours() * LANES * Codes::FOUR,
                          page.scales(stream_) + row,
                          page.bounds(stream_) + group,
                          count / LANES,
                          page.fours(),
                          static_cast<float>(offset),
                          up_.data() + at + (row - begin),
                          low};
        };
        for (std::int64_t row = begin; row < end;) {
            const bool edge = row < span.first || row + LANES > span.last;
            const std::int64_t whole = (span.last - row) / LANES * LANES;
            const std::int64_t count = edge ? LANES : std::min(CHUNK, whole);
            low_.resize(low_.size() + LANES, LOWEST);
            float* low = low_.data() + low_.size() - LANES;
            scan(groups(row, count, low), query, plain_);
            if (edge) {
                float* up = up_.data() + at + (row - begin);
                for (std::int64_t lane = 0; lane < LANES; lane++) {
                    if (row + lane < span.first || row + lane >= span.last) {
                        up[lane] = low[lane] = LOWEST;
                    }
                }
            }
            row += count;
        }
        return end - begin;
    }

    static float kth_largest(const std::vector<float>& values, std::int64_t k) {
        if (static_cast<std::int64_t>(values.size()) < k) return LOWEST;
        std::vector<float> largest(k, LOWEST);  // a heap, the smallest first
        for (std::size_t i = 0; i < values.size(); i += LANES) {
            float most = values[i];
            for (std::int64_t lane = 1; lane < LANES; lane++) {
                most = std::max(most, values[i + lane]);
            }
            if (most <= largest.front()) continue;
            for (std::int64_t lane = 0; lane < LANES; lane++) {
                if (values[i + lane] <= largest.front()) continue;
                std::pop_heap(largest.begin(), largest.end(), std::greater<float>());
                largest.back() = values[i + lane];
                std::push_heap(largest.begin(), largest.end(), std::greater<float>());
            }
        }
        return largest.front();
    }

    void add(const Span& span, std::int64_t row, const Query& query, Best& best) const {
        const float found = score(span.page->landmark(stream_, row), query);
        if (found >= best.least()) best.add({found, span.number + row - span.first});
    }

    std::vector<Span> spans_;
    std::int64_t stream_, k_;
    bool plain_;
    // Kept between searches: fresh memory of this size costs page faults.
    static thread_local std::vector<float> up_, low_;
    std::vector<std::pair<const Span*, std::int64_t>> candidates_;
};

thread_local std::vector<float> Search::up_, Search::low_;

void check(const std::vector<Codes*>& pages, const Numbers& streams, const Numbers& counts,
           std::int64_t dim) {
    for (const Codes* page : pages) {
        if (page->dim() != dim) throw py::value_error("landmarks of another size");
        if (static_cast<std::int64_t>(counts.size()) != page->count()) {
            throw py::value_error("counts of other streams");
        }
    }
    for (const std::int64_t stream : streams) {
        if (stream < 0 || stream >= static_cast<std::int64_t>(counts.size())) {
            throw py::index_error("there is no stream " + std::to_string(stream));
        }
    }
}

// Where an array lies: for a tensor to say so is quicker than to become an array of numpy's.
using Address = std::uintptr_t;

using Before = std::optional<std::variant<Array<std::int64_t>, std::int64_t>>;

py::tuple top_k(const std::vector<Codes*>& pages, const Numbers& streams, const Numbers& counts,
                Address queries, std::int64_t m, std::int64_t dim, std::int64_t k,
                const Before& before, std::int64_t start, bool plain) {
    const std::int64_t s = streams.size();
    const auto* array = before ? std::get_if<Array<std::int64_t>>(&*before) : nullptr;
    if (m < 0 || k < 1 || start < 0 || (array && array->size() != m)) {
        throw py::value_error("before is int64 [m], k at least 1, start at least 0");
    }
    check(pages, streams, counts, dim);
    py::array_t<std::int64_t> numbers({s, m, k});
    py::array_t<float> scores({s, m, k});
    std::int64_t* number = numbers.mutable_data();
    float* score = scores.mutable_data();
    const float* at = reinterpret_cast<const float*>(queries);
    for (const std::int64_t stream : streams) {
        for (std::int64_t j = 0; j < m; j++, at += dim, number += k, score += k) {
            std::int64_t stop = counts[stream];
            if (before) {
                stop = std::min(stop, array ? array->data()[j] : std::get<std::int64_t>(*before));
            }
            Search search(spans_of(pages, stream, start, stop), stream, k, plain);
            search.run(Query(at, dim, (dim + Codes::FOUR - 1) / Codes::FOUR), number, score);
        }
    }
    return py::make_tuple(std::move(numbers), std::move(scores));
}

py::array gather(const std::vector<Codes*>& pages, const Numbers& streams, const Numbers& counts,
                 Address blocks, const std::vector<py::ssize_t>& shape, std::int64_t dim) {
    if (shape.empty() || shape[0] != static_cast<py::ssize_t>(streams.size())) {
        throw py::value_error("blocks are int64 [streams, ...]");
    }
    check(pages, streams, counts, dim);
    std::vector<py::ssize_t> full = shape;
    full.push_back(dim);
    py::array_t<float> found(full);
    std::int64_t n = 1;
    for (std::size_t i = 1; i < shape.size(); i++) n *= shape[i];
    const std::int64_t* number = reinterpret_cast<const std::int64_t*>(blocks);
    std::vector<const float*> from;  // null: of no block
    from.reserve(streams.size() * n);
    float* to = found.mutable_data();
    for (const std::int64_t stream : streams) {
        for (std::int64_t j = 0; j < n; j++) {
            const std::int64_t block = *number++;
            if (block < -1 || block >= counts[stream]) {
                throw py::key_error("stream " + std::to_string(stream) + " has no block " +
                                    std::to_string(block));
            }
            from.push_back(block < 0 ? nullptr : find(pages, stream, block));
            // All are on their way before the first is waited for.
            if (from.back()) prefetch(from.back(), dim);
        }
    }
    for (const float* landmark : from) {
        to = landmark ? std::copy_n(landmark, dim, to) : std::fill_n(to, dim, 0.0f);
    }
    return found;
}

bool finite(Address numbers, std::int64_t count) {
    const float* at = reinterpret_cast<const float*>(numbers);
    // The exponent of what is not finite is all ones.
    std::uint32_t most = 0;
    for (std::int64_t i = 0; i < count; i++) {
        std::uint32_t bits;
        std::memcpy(&bits, at + i, sizeof bits);
        most = std::max(most, bits & 0x7F800000u);
    }
    return most != 0x7F800000u;
}

}  // namespace

void bind_search(py::module_& module) {
    py::class_<Codes>(module, "Codes")
        .def(py::init([](const Array<float>& landmarks, Numbers bases) {
                 if (landmarks.ndim() != 3 ||
                     landmarks.shape(0) != static_cast<py::ssize_t>(bases.size())) {
                     throw py::value_error("landmarks are float32 [streams, width, dim]");
                 }
                 return std::make_unique<Codes>(landmarks.data(), std::move(bases),
                                                landmarks.shape(1), landmarks.shape(2));
             }),
             py::arg("landmarks").noconvert(), py::arg("bases"), py::keep_alive<1, 2>())
        .def("follow",
             [](Codes& self, const Codes& other) {
                 if (other.dim() != self.dim() || other.count() != self.count()) {
                     throw py::value_error("codes of other streams");
                 }
                 self.follow(other);
             },
             py::arg("other"))
        .def("encode",
             [](Codes& self, std::int64_t stream, std::int64_t first, std::int64_t last) {
                 if (stream < 0 || stream >= self.count() || first < 0 || last > self.width()) {
                     throw py::index_error("landmarks outside the page");
                 }
                 self.encode(stream, first, last);
             },
             py::arg("stream"), py::arg("first"), py::arg("last"))
        .def_property_readonly("nbytes", &Codes::nbytes);
    module.def("top_k", &top_k, py::arg("pages"), py::arg("streams"), py::arg("counts"),
               py::arg("queries"), py::arg("m"), py::arg("dim"), py::arg("k"), py::arg("before"),
               py::arg("start"), py::arg("plain") = false);
    module.def("gather", &gather, py::arg("pages"), py::arg("streams"), py::arg("counts"),
               py::arg("blocks"), py::arg("shape"), py::arg("dim"));
    module.def("finite", &finite, py::arg("numbers"), py::arg("count"));
}

}  // namespace kvstore

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
#include "share.h"

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
// Landmarks of a stream, on average, from which on streams are searched by several threads.
constexpr std::int64_t SHARED = 4096;
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

// Some queries over one stream, together, so that codes are read once for all of them.
class Search {
   public:
    Search(const std::vector<Codes*>& pages, std::int64_t stream, std::int64_t k, bool plain)
        : pages_(pages), stream_(stream), k_(k), plain_(plain) {}

    // Ask for the landmarks start..stop with the largest inner products with a query.
    void ask(Query query, std::int64_t start, std::int64_t stop) {
        if (asked_.empty()) start_ = start, stop_ = stop;
        stop_ = std::max(stop_, stop);
        asked_.push_back({std::move(query), stop, stop - start >= WORTH * k_, {}, {}});
    }

    // Write the k best for each query, one query behind the other.
    void answer(std::int64_t* numbers, float* scores) {
        find();
        for (const Asked& asked : asked_) {
            Best best(k_);
            if (asked.coded) {
                for (const Row& row : asked.candidates) prefetch(row.landmark, asked.query.dim);
                for (const Row& row : asked.candidates) add(row, asked.query, best);
            } else {
                for (const Span& span : spans_) {
                    for (std::int64_t row = span.first; row < end_of(span, asked); row++) {
                        add(row_of(span, row), asked.query, best);
                    }
                }
            }
            best.write(numbers, scores);
            numbers += k_;
            scores += k_;
        }
    }

    // How many landmarks are scored for the first query.
    std::int64_t candidates() {
        find();
        return asked_[0].coded ? asked_[0].candidates.size() : stop_ - start_;
    }

   private:
    struct Row {
        const float* landmark;
        std::int64_t number;
    };

    struct Asked {
        Query query;
        std::int64_t stop;
        bool coded;              // codes say something about this query
        std::vector<float> low;  // [chunks and edges, LANES]
        std::vector<Row> candidates;
    };

    // Find the candidates of each query that codes say something about.
    void find() {
        spans_ = spans_of(pages_, stream_, start_, stop_);
        double longest = 0;
        for (const Span& span : spans_) {
            const Codes::Stream& of = span.page->stream(stream_);
            const double common = length(of.reference);
            common_ = std::max(common_, common);
            longest = std::max({longest, of.longest, common});
        }
        width_ = stop_ - start_ + 2 * LANES * static_cast<std::int64_t>(spans_.size());
        up_.resize(width_ * asked_.size());
        bool some = false;
        for (Asked& asked : asked_) {
            const Query& query = asked.query;
            asked.coded = asked.coded && query.dim <= WIDEST &&
                          std::max(query.length, 1 / LARGEST) * longest <= LARGEST;
            some = some || asked.coded;
        }
        if (!some) return;
        std::int64_t at = 0;
        for (const Span& span : spans_) at += look(span, at);
        for (std::size_t i = 0; i < asked_.size(); i++) {
            if (asked_[i].coded) asked_[i].coded = choose(asked_[i], up_.data() + i * width_);
        }
    }

    // Write the largest possible scores of a span's landmarks to up_, from `at` on, and to each
    // query's `low` the largest of the smallest possible ones; return how many were written.
    std::int64_t look(const Span& span, std::int64_t at) {
        const Codes& page = *span.page;
        const std::vector<double>& reference = page.stream(stream_).reference;
        std::vector<float> offsets;
        for (const Asked& asked : asked_) {
            double offset = 0;
            for (std::size_t d = 0; d < reference.size(); d++) {
                offset += asked.query.wide[d] * reference[d];
            }
            offsets.push_back(static_cast<float>(offset));
        }
        const std::int64_t begin = span.first / LANES * LANES, end = rounded(span.last);
        for (std::int64_t chunk = begin; chunk < end; chunk += CHUNK) {
            for (std::size_t i = 0; i < asked_.size(); i++) {
                Asked& asked = asked_[i];
                if (!asked.coded) continue;
                const std::int64_t last = std::min(end_of(span, asked), chunk + CHUNK);
                for (std::int64_t row = chunk; row < last;) {
                    const bool edge = row < span.first || row + LANES > last;
                    const std::int64_t count = edge ? LANES : (last - row) / LANES * LANES;
                    asked.low.resize(asked.low.size() + LANES, LOWEST);
                    float* low = asked.low.data() + asked.low.size() - LANES;
                    float* up = up_.data() + i * width_ + at + (row - begin);
                    scan({page.codes(stream_) + row * page.fours() * Codes::FOUR,
                          page.scales(stream_) + row, page.bounds(stream_) + row / LANES,
                          count / LANES, page.fours(), offsets[i], up, low},
                         asked.query, plain_);
                    for (std::int64_t lane = 0; edge && lane < LANES; lane++) {
                        if (row + lane < span.first || row + lane >= last) {
                            up[lane] = low[lane] = LOWEST;
                        }
                    }
                    row += count;
                }
            }
        }
        return end - begin;
    }

    // Keep those that could be among the k best; false if all could.
    bool choose(Asked& asked, const float* up) const {
        // What else rounding does: to the scores themselves, and to what is near zero.
        const double margin = 2 * (1e-6 * asked.query.length * common_ + 1e-36) * (1 + 1e-6);
        const float least = kth_largest(asked.low, k_) - static_cast<float>(margin);
        if (least == LOWEST) return false;
        for (const Span& span : spans_) {
            const std::int64_t begin = span.first / LANES * LANES;
            const std::int64_t end = rounded(end_of(span, asked));
            for (std::int64_t i = 0; i < end - begin; i += LANES) {
                float most = up[i];
                for (std::int64_t lane = 1; lane < LANES; lane++) {
                    most = std::max(most, up[i + lane]);
                }
                if (most < least) continue;
                for (std::int64_t lane = 0; lane < LANES; lane++) {
                    if (up[i + lane] < least) continue;
                    asked.candidates.push_back(row_of(span, begin + i + lane));
                }
            }
            up += rounded(span.last) - begin;
        }
        return true;
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

    static std::int64_t rounded(std::int64_t row) { return (row + LANES - 1) / LANES * LANES; }

    static double length(const std::vector<double>& numbers) {
        double square = 0;
        for (const double x : numbers) square += x * x;
        return std::sqrt(square);
    }

    // The row of a span at which the landmarks end that count for a query; no less than its first.
    static std::int64_t end_of(const Span& span, const Asked& asked) {
        return std::max(span.first, std::min(span.last, asked.stop - span.number + span.first));
    }

    Row row_of(const Span& span, std::int64_t row) const {
        return {span.page->landmark(stream_, row), span.number + row - span.first};
    }

    static void add(const Row& row, const Query& query, Best& best) {
        const float found = score(row.landmark, query);
        if (found >= best.least()) best.add({found, row.number});
    }

    const std::vector<Codes*>& pages_;
    std::int64_t stream_, k_;
    bool plain_;
    std::int64_t start_ = 0, stop_ = 0;
    std::vector<Asked> asked_;
    std::vector<Span> spans_;
    double common_ = 0;       // the longest of the pages' references
    std::int64_t width_ = 0;  // of a query's part of up_
    // Kept between searches: fresh memory of this size costs page faults.
    static thread_local std::vector<float> up_;
};

thread_local std::vector<float> Search::up_;

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
                const Before& before, std::int64_t start, std::int64_t threads, bool plain) {
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
    const float* query = reinterpret_cast<const float*>(queries);
    const std::int64_t fours = (dim + Codes::FOUR - 1) / Codes::FOUR;
    const std::int64_t* bounds = array ? array->data() : nullptr;
    const std::int64_t bound =
        before && !array ? std::get<std::int64_t>(*before) : std::numeric_limits<std::int64_t>::max();
    std::int64_t looked = 0;
    for (const std::int64_t stream : streams) looked += std::min(bound, counts[stream]) - start;
    share(s, looked < s * SHARED ? 1 : threads, [&](std::int64_t i) {
        Search search(pages, streams[i], k, plain);
        for (std::int64_t j = i * m; j < (i + 1) * m; j++) {
            const std::int64_t stop = std::min(counts[streams[i]], bounds ? bounds[j - i * m] : bound);
            search.ask(Query(query + j * dim, dim, fours), start, std::max(start, stop));
        }
        if (m) search.answer(number + i * m * k, score + i * m * k);
    });
    return py::make_tuple(std::move(numbers), std::move(scores));
}

std::int64_t candidates(const std::vector<Codes*>& pages, std::int64_t stream,
                        const Numbers& counts, Address query, std::int64_t dim, std::int64_t k) {
    check(pages, {stream}, counts, dim);
    Search search(pages, stream, k, false);
    search.ask(Query(reinterpret_cast<const float*>(query), dim,
                     (dim + Codes::FOUR - 1) / Codes::FOUR),
               0, counts[stream]);
    return search.candidates();
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
               py::arg("start"), py::arg("threads") = 1, py::arg("plain") = false);
    module.def("candidates", &candidates, py::arg("pages"), py::arg("stream"), py::arg("counts"),
               py::arg("query"), py::arg("dim"), py::arg("k"));
    module.def("gather", &gather, py::arg("pages"), py::arg("streams"), py::arg("counts"),
               py::arg("blocks"), py::arg("shape"), py::arg("dim"));
    module.def("can_share", &can_share);
    module.def("finite", &finite, py::arg("numbers"), py::arg("count"));
}

}  // namespace kvstore

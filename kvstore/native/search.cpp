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
// Groups of landmarks that are looked at for one query after the other while they are in the cache.
constexpr std::int64_t BLOCK = 32;
// Groups that look best: the best of each is scored first. So many more than are wanted, and so
// many more where the codes of some numbers were not looked at.
constexpr std::size_t MORE = 4, MORE_OF_PARTS = 16;
// Groups that are on their way while another is looked at.
constexpr std::size_t AHEAD = 4;
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

    // Ask for the landmarks start..stop with the largest inner products with a query [dim].
    void ask(const float* query, std::int64_t dim, std::int64_t start, std::int64_t stop) {
        if (asked_.empty()) start_ = start, stop_ = stop;
        stop_ = std::max(stop_, stop);
        Asked asked{{query, query + dim}, 0, stop, stop - start >= WORTH * k_, {}, {}, {}};
        asked.length = length(asked.query);
        asked_.push_back(std::move(asked));
    }

    // Write the k best for each query, one query behind the other.
    void answer(std::int64_t* numbers, float* scores) {
        find();
        for (const Asked& asked : asked_) {
            Best best(k_);
            if (asked.coded) {
                score_all(asked.candidates, asked, best);
            } else {
                for (const Span& span : spans_) {
                    for (std::int64_t row = span.first; row < end_of(span, asked); row++) {
                        add(row_of(span, row), asked, best);
                    }
                }
            }
            best.write(numbers, scores);
            numbers += k_;
            scores += k_;
        }
    }

    // How many landmarks are scored for the first query, besides those that look best.
    std::int64_t candidates() {
        find();
        return asked_[0].coded ? asked_[0].candidates.size() : stop_ - start_;
    }

   private:
    struct Row {
        const float* landmark;
        std::int64_t number;
    };

    // A group of a span that has landmarks which count.
    struct Group {
        float most;  // the largest score that one of them can have
        std::size_t span;
        std::int64_t number;  // in the page
        bool operator>(const Group& other) const { return most > other.most; }
    };

    struct Asked {
        std::vector<double> query;
        double length;  // |q|
        std::int64_t stop;
        bool coded;                  // codes say something about this query
        std::vector<Turned> turned;  // along the axes of each span's page
        std::vector<float> most;     // of each group of the spans, the largest score it can have
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
        bool some = false;
        for (Asked& asked : asked_) {
            asked.coded = asked.coded && longest <= LARGEST && asked.length <= LARGEST &&
                          static_cast<std::int64_t>(asked.query.size()) <= WIDEST &&
                          std::max(asked.length, 1 / LARGEST) * longest <= LARGEST;
            some = some || asked.coded;
        }
        if (!some) return;
        for (const Span& span : spans_) scan_span(span);
        for (Asked& asked : asked_) {
            if (asked.coded) asked.coded = choose(asked);
        }
    }

    Turned turn(const std::vector<double>& query, const Codes& page) const {
        const Codes::Stream& of = page.stream(stream_);
        const std::int64_t dim = query.size();
        std::vector<double> turned = query;
        if (!of.axes.empty()) kvstore::turn(of.axes.data(), query.data(), dim, turned.data());
        const std::int64_t leading = std::min(dim, of.lead * Codes::FOUR);
        const double whole = length(query);
        return {Query(turned.data(), leading, of.lead, whole),
                Query(turned.data() + leading, dim - leading, page.fours() - of.lead, whole),
                static_cast<float>(inner(query, of.reference))};
    }

    // Find the largest scores that a span's groups can have, for each query.
    void scan_span(const Span& span) {
        const View view = this->view(span);
        const std::int64_t begin = span.first / LANES, end = groups(span.last);
        std::vector<float*> most;
        for (Asked& asked : asked_) {
            asked.turned.push_back(turn(asked.query, *span.page));
            asked.most.resize(asked.most.size() + end - begin, LOWEST);
            most.push_back(asked.most.data() + asked.most.size() - (end - begin));
        }
        for (std::int64_t g = begin; g < end; g += BLOCK) {
            const std::int64_t first = std::max(span.first, g * LANES);
            for (std::size_t i = 0; i < asked_.size(); i++) {
                const std::int64_t last = std::min(end_of(span, asked_[i]), (g + BLOCK) * LANES);
                if (!asked_[i].coded) continue;
                scan(view, first, last, asked_[i].turned.back(), most[i] + (g - begin), plain_);
            }
        }
    }

    View view(const Span& span) const {
        return {span.page->first(stream_), span.page->rest(stream_), span.page->lengths(stream_)};
    }

    // Keep those that could be among the k best; false if all could.
    bool choose(Asked& asked) const {
        // What else rounding does: to the scores themselves, and to what is near zero.
        const double margin = 2 * (1e-6 * asked.length * common_ + 1e-36) * (1 + 1e-6);
        const float least = least_of_promising(asked) - static_cast<float>(margin);
        if (least == LOWEST) return false;
        each(reaching(asked, least), asked, [&](const Group& group, const float* up) {
            for (std::int64_t lane = 0; lane < LANES; lane++) {
                if (up[lane] < least || !counts(group, lane, asked)) continue;
                asked.candidates.push_back(row_of(group, lane));
            }
        });
        return true;
    }

    // The k-th best score of some landmarks that look best, one of a group.
    float least_of_promising(const Asked& asked) const {
        std::vector<Group> groups;  // a heap, the smallest first
        const bool parted = !asked.turned.back().rest.codes.empty();
        const std::size_t wanted = k_ + (parted ? MORE_OF_PARTS : MORE);
        each_group(asked, [&](const Group& group) {
            if (groups.size() == wanted) {
                if (!(group > groups.front())) return;
                std::pop_heap(groups.begin(), groups.end(), std::greater<>());
                groups.pop_back();
            }
            groups.push_back(group);
            std::push_heap(groups.begin(), groups.end(), std::greater<>());
        });
        std::vector<Row> rows;
        each(groups, asked, [&](const Group& group, const float* up) {
            std::int64_t best = -1;
            for (std::int64_t lane = 0; lane < LANES; lane++) {
                if (counts(group, lane, asked) && (best < 0 || up[lane] > up[best])) best = lane;
            }
            if (best >= 0) rows.push_back(row_of(group, best));
        });
        Best best(k_);
        score_all(rows, asked, best);
        return best.least();
    }

    std::vector<Group> reaching(const Asked& asked, float least) const {
        std::vector<Group> found;
        each_group(asked, [&](const Group& group) {
            if (group.most >= least) found.push_back(group);
        });
        return found;
    }

    template <class Visit>
    void each_group(const Asked& asked, const Visit& visit) const {
        const float* most = asked.most.data();
        for (std::size_t i = 0; i < spans_.size(); i++) {
            for (std::int64_t g = spans_[i].first / LANES; g < groups(spans_[i].last); g++) {
                visit({*most++, i, g});
            }
        }
    }

    // Visit groups with the largest scores that their landmarks can have.
    template <class Visit>
    void each(const std::vector<Group>& groups, const Asked& asked, const Visit& visit) const {
        for (std::size_t i = 0; i < std::min(AHEAD, groups.size()); i++) prefetch(groups[i]);
        for (std::size_t i = 0; i < groups.size(); i++) {
            if (i + AHEAD < groups.size()) prefetch(groups[i + AHEAD]);
            const Group& group = groups[i];
            float up[LANES];
            look(view(spans_[group.span]), group.number, asked.turned[group.span], up, plain_);
            visit(group, up);
        }
    }

    void prefetch(const Group& group) const {
        const View view = this->view(spans_[group.span]);
        for (const Codes::Part& part : {view.first, view.rest}) {
            const std::int64_t size = part.fours * LANES * Codes::FOUR;
            for (std::int64_t i = 0; i < size; i += 64) {
                __builtin_prefetch(part.codes + group.number * size + i);
            }
        }
    }

    bool counts(const Group& group, std::int64_t lane, const Asked& asked) const {
        const Span& span = spans_[group.span];
        const std::int64_t row = group.number * LANES + lane;
        return row >= span.first && row < end_of(span, asked);
    }

    // So many groups have the rows before this one.
    static std::int64_t groups(std::int64_t row) { return (row + LANES - 1) / LANES; }

    static double inner(const std::vector<double>& numbers, const std::vector<double>& others) {
        double sum = 0;
        for (std::size_t d = 0; d < others.size(); d++) sum += numbers[d] * others[d];
        return sum;
    }

    static double length(const std::vector<double>& numbers) {
        return kvstore::length(numbers.data(), numbers.size());
    }

    // The row of a span at which the landmarks end that count for a query; no less than its first.
    static std::int64_t end_of(const Span& span, const Asked& asked) {
        return std::max(span.first, std::min(span.last, asked.stop - span.number + span.first));
    }

    Row row_of(const Span& span, std::int64_t row) const {
        return {span.page->landmark(stream_, row), span.number + row - span.first};
    }

    Row row_of(const Group& group, std::int64_t lane) const {
        return row_of(spans_[group.span], group.number * LANES + lane);
    }

    static void score_all(const std::vector<Row>& rows, const Asked& asked, Best& best) {
        const std::int64_t dim = asked.query.size();
        for (const Row& row : rows) kvstore::prefetch(row.landmark, dim);
        for (const Row& row : rows) add(row, asked, best);
    }

    static void add(const Row& row, const Asked& asked, Best& best) {
        const float found = score(row.landmark, asked.query.data(), asked.query.size());
        if (found >= best.least()) best.add({found, row.number});
    }

    const std::vector<Codes*>& pages_;
    std::int64_t stream_, k_;
    bool plain_;
    std::int64_t start_ = 0, stop_ = 0;
    std::vector<Asked> asked_;
    std::vector<Span> spans_;
    double common_ = 0;  // the longest of the pages' references
};

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
    const std::int64_t* bounds = array ? array->data() : nullptr;
    const std::int64_t bound =
        before && !array ? std::get<std::int64_t>(*before) : std::numeric_limits<std::int64_t>::max();
    std::int64_t looked = 0;
    for (const std::int64_t stream : streams) looked += std::min(bound, counts[stream]) - start;
    share(s, looked < s * SHARED ? 1 : threads, [&](std::int64_t i) {
        Search search(pages, streams[i], k, plain);
        for (std::int64_t j = i * m; j < (i + 1) * m; j++) {
            const std::int64_t stop = std::min(counts[streams[i]], bounds ? bounds[j - i * m] : bound);
            search.ask(query + j * dim, dim, start, std::max(start, stop));
        }
        if (m) search.answer(number + i * m * k, score + i * m * k);
    });
    return py::make_tuple(std::move(numbers), std::move(scores));
}

std::int64_t candidates(const std::vector<Codes*>& pages, std::int64_t stream,
                        const Numbers& counts, Address query, std::int64_t dim, std::int64_t k) {
    check(pages, {stream}, counts, dim);
    Search search(pages, stream, k, false);
    search.ask(reinterpret_cast<const float*>(query), dim, 0, counts[stream]);
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
        .def("refer",
             [](Codes& self, std::int64_t stream, const Array<double>& reference,
                const std::optional<Array<double>>& axes, std::int64_t lead) {
                 const std::int64_t dim = self.dim();
                 if (stream < 0 || stream >= self.count() || reference.size() != dim ||
                     (axes && axes->size() != dim * dim)) {
                     throw py::value_error("a stream's reference is [dim], its axes [dim, dim]");
                 }
                 self.refer(stream, reference.data(), axes ? axes->data() : nullptr, lead);
             },
             py::arg("stream"), py::arg("reference"), py::arg("axes"), py::arg("lead"))
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

// Many small reads and writes of tables at once. A batch is tens of blocks and a table is rarely in
// the cache, so what counts is how often it is gone through, and that one call does it.
#include "tables.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "array.h"

namespace kvstore {
namespace {

enum Tier : std::uint8_t { HOT, WARM, COLD, ABSENT };

void check_length(const py::array& array, py::ssize_t length) {
    if (array.ndim() != 1 || array.size() != length) {
        throw py::value_error("arrays that belong together differ in length");
    }
}

bool within(std::int64_t id, py::ssize_t end) {
    return static_cast<std::uint64_t>(id) < static_cast<std::uint64_t>(end);
}

std::int64_t pin_one(std::int64_t slot, std::int32_t* pins, bool* pinned) {
    pinned[slot] = true;
    return pins[slot]++ == 0;
}

void pin(const Int64s& slots, Int32s& pins, Bools& pinned, Int64s& count) {
    check_length(pinned, pins.size());
    check(slots, pins.size());
    std::int32_t* held = pins.mutable_data();
    bool* mask = pinned.mutable_data();
    for (py::ssize_t i = 0; i < slots.size(); i++) {
        *count.mutable_data() += pin_one(slots.data()[i], held, mask);
    }
}

void unpin(const Int64s& slots, Int32s& pins, Bools& pinned, Int64s& count) {
    check_length(pinned, pins.size());
    check(slots, pins.size());
    std::int32_t* held = pins.mutable_data();
    for (py::ssize_t i = 0; i < slots.size(); i++) {
        const std::int64_t slot = slots.data()[i];
        if (--held[slot] == 0) {
            pinned.mutable_data()[slot] = false;
            --*count.mutable_data();
        }
    }
}

// Each id's slot and the distinct slots, in order of first appearance, pinned; None, and nothing
// is pinned, unless all are there. place: [slots], whatever it holds.
py::object pin_present(const Int64s& ids, const Int32s& table, Int32s& pins, Bools& pinned,
                       Int64s& count, Int64s& place) {
    check_length(pinned, pins.size());
    check_length(place, pins.size());
    Int64s slots(ids.size());
    std::int64_t* found = slots.mutable_data();
    for (py::ssize_t i = 0; i < ids.size(); i++) {
        const std::int64_t id = ids.data()[i];
        if (!within(id, table.size()) || table.data()[id] < 0) return py::none();
        found[i] = table.data()[id];
    }
    check(slots, pins.size());
    std::int64_t* last = place.mutable_data();
    for (py::ssize_t i = ids.size(); i-- > 0;) last[found[i]] = i;
    std::vector<std::int64_t> distinct;
    distinct.reserve(ids.size());
    for (py::ssize_t i = 0; i < ids.size(); i++) {
        if (last[found[i]] != i) continue;
        distinct.push_back(found[i]);
        *count.mutable_data() += pin_one(found[i], pins.mutable_data(), pinned.mutable_data());
    }
    return py::make_tuple(slots, made_of(distinct));
}

// The distinct ids in order of first appearance, the highest tier of each, and how many lie in
// each tier. place: [ids], whatever it holds.
py::tuple find_tiers(const Int64s& ids, const Int32s& hot, const Int32s& warm, const Int64s& cold,
                     Int32s& place) {
    for (const py::array& table : {py::array(warm), py::array(cold), py::array(place)}) {
        check_length(table, hot.size());
    }
    std::vector<std::int64_t> distinct;
    std::vector<std::uint8_t> tiers;
    py::ssize_t counts[4] = {0, 0, 0, 0};
    std::int32_t* last = place.mutable_data();
    for (py::ssize_t i = ids.size(); i-- > 0;) {
        const std::int64_t id = ids.data()[i];
        if (within(id, hot.size())) last[id] = static_cast<std::int32_t>(i);
    }
    for (py::ssize_t i = 0; i < ids.size(); i++) {
        const std::int64_t id = ids.data()[i];
        std::uint8_t tier = ABSENT;
        if (within(id, hot.size())) {
            if (last[id] != i) continue;
            tier = hot.data()[id] >= 0    ? HOT
                   : warm.data()[id] >= 0 ? WARM
                   : cold.data()[id] >= 0 ? COLD
                                          : ABSENT;
        } else if (std::find(distinct.begin(), distinct.end(), id) != distinct.end()) {
            continue;
        }
        distinct.push_back(id);
        tiers.push_back(tier);
        counts[tier]++;
    }
    return py::make_tuple(made_of(distinct), made_of(tiers),
                          py::make_tuple(counts[HOT], counts[WARM], counts[COLD], counts[ABSENT]));
}

// The ids that have a place in the table, their places, and the other ids.
py::tuple split(const Int64s& ids, const Int32s& table) {
    check(ids, table.size());
    std::vector<std::int64_t> having, places, lacking;
    for (py::ssize_t i = 0; i < ids.size(); i++) {
        const std::int64_t id = ids.data()[i], place = table.data()[id];
        if (place < 0) {
            lacking.push_back(id);
        } else {
            having.push_back(id);
            places.push_back(place);
        }
    }
    return py::make_tuple(made_of(having), made_of(places), made_of(lacking));
}

// Blocks are in slots now.
void arrive(const Int64s& ids, const Int64s& slots, Int64s& block, Int32s& table) {
    check_length(slots, ids.size());
    check(ids, table.size());
    check(slots, block.size());
    for (py::ssize_t i = 0; i < ids.size(); i++) {
        block.mutable_data()[slots.data()[i]] = ids.data()[i];
        table.mutable_data()[ids.data()[i]] = static_cast<std::int32_t>(slots.data()[i]);
    }
}

// Slots hold no block any more, nor what is marked of it; returns the ids of those that they held.
Int64s leave(const Int64s& slots, Int64s& block, Int32s& table, Bools& spare, Bools& sole) {
    check_length(spare, block.size());
    check_length(sole, block.size());
    check(slots, block.size());
    Int64s ids(slots.size());
    for (py::ssize_t i = 0; i < slots.size(); i++) {
        ids.mutable_data()[i] = block.data()[slots.data()[i]];
    }
    check(ids, table.size());
    for (py::ssize_t i = 0; i < slots.size(); i++) {
        const std::int64_t slot = slots.data()[i];
        table.mutable_data()[ids.data()[i]] = -1;
        block.mutable_data()[slot] = -1;
        spare.mutable_data()[slot] = sole.mutable_data()[slot] = false;
    }
    return ids;
}

void mark(const Int64s& slots, Bools& mask, bool value) {
    check(slots, mask.size());
    for (py::ssize_t i = 0; i < slots.size(); i++) mask.mutable_data()[slots.data()[i]] = value;
}

bool any_marked(const Int64s& slots, const Bools& mask) {
    check(slots, mask.size());
    return std::any_of(slots.data(), slots.data() + slots.size(),
                       [&](std::int64_t slot) { return mask.data()[slot]; });
}

// Mark the slots whose blocks have no copy on disk.
void mark_sole(const Int64s& ids, const Int64s& slots, const Int64s& cold, Bools& sole) {
    check_length(slots, ids.size());
    check(ids, cold.size());
    check(slots, sole.size());
    for (py::ssize_t i = 0; i < ids.size(); i++) {
        sole.mutable_data()[slots.data()[i]] = cold.data()[ids.data()[i]] < 0;
    }
}

// The distinct slots, in order of first appearance, and the sum of the weights of each. place:
// [slots of the tier], whatever it holds.
py::tuple sum_by_slot(const Int64s& slots, const Array<float>& weights, Int64s& place) {
    check_length(weights, slots.size());
    check(slots, place.size());
    std::vector<std::int64_t> distinct;
    std::vector<double> sums;
    std::int64_t* where = place.mutable_data();
    for (py::ssize_t i = 0; i < slots.size(); i++) where[slots.data()[i]] = -1;
    for (py::ssize_t i = 0; i < slots.size(); i++) {
        std::int64_t& at = where[slots.data()[i]];
        if (at < 0) {
            at = static_cast<std::int64_t>(distinct.size());
            distinct.push_back(slots.data()[i]);
            sums.push_back(0);
        }
        sums[at] += weights.data()[i];
    }
    return py::make_tuple(made_of(distinct), made_of(std::vector<float>(sums.begin(), sums.end())));
}

// The ids of blocks [streams, ...]; None where one is not there. runs: of each the number of the
// block in its first column, [all streams], and a table of ids, [all streams, columns]; they follow
// each other. counts: the blocks of each stream.
py::object find_ids(const std::vector<std::int64_t>& streams, const Int64s& blocks,
                    const Int64s& counts, const std::vector<std::pair<Int64s, Int64s>>& runs) {
    const auto rows = static_cast<py::ssize_t>(streams.size());
    if (!rows || blocks.size() % rows || runs.empty()) return py::none();
    check(streams.data(), rows, counts.size());
    for (const auto& [base, table] : runs) {
        check_length(base, counts.size());
        if (table.ndim() != 2 || table.shape(0) != counts.size()) {
            throw py::value_error("a run has ids of some streams only");
        }
    }
    Int64s ids(std::vector<py::ssize_t>(blocks.shape(), blocks.shape() + blocks.ndim()));
    const py::ssize_t each = blocks.size() / rows;
    for (py::ssize_t i = 0; i < blocks.size(); i++) {
        const std::int64_t stream = streams[i / each], block = blocks.data()[i];
        if (!within(block, counts.data()[stream])) return py::none();
        auto run = runs.rbegin();
        while (run != runs.rend() && run->first.data()[stream] > block) ++run;
        if (run == runs.rend()) return py::none();
        const std::int64_t column = block - run->first.data()[stream];
        check(&column, 1, run->second.shape(1));
        ids.mutable_data()[i] = run->second.data()[run->second.shape(1) * stream + column];
    }
    return std::move(ids);
}

// Hot slots by what is left of their blocks without them: warm slots that have copies; and ids and
// slots, first of blocks that lie nowhere else, then of those on disk only.
py::tuple sort_victims(const Int64s& slots, const Int64s& block, const Int32s& warm,
                       const Int64s& cold) {
    check_length(cold, warm.size());
    check(slots, block.size());
    std::vector<std::int64_t> copies, sole_ids, sole, saved_ids, saved;
    for (py::ssize_t i = 0; i < slots.size(); i++) {
        const std::int64_t slot = slots.data()[i], id = block.data()[slot];
        check(&id, 1, warm.size());
        if (warm.data()[id] >= 0) {
            copies.push_back(warm.data()[id]);
        } else if (cold.data()[id] < 0) {
            sole_ids.push_back(id);
            sole.push_back(slot);
        } else {
            saved_ids.push_back(id);
            saved.push_back(slot);
        }
    }
    return py::make_tuple(made_of(copies), py::make_tuple(made_of(sole_ids), made_of(sole)),
                          py::make_tuple(made_of(saved_ids), made_of(saved)));
}

// At most n slots that are spare and not pinned, from `start` on and round, and where to go on.
py::tuple next_spare(const Bools& spare, const Bools& pinned, std::int64_t start, std::int64_t n) {
    check_length(pinned, spare.size());
    std::vector<std::int64_t> found;
    const std::int64_t slots = spare.size(), begin = slots ? start % slots : 0;
    std::int64_t slot = begin;
    // Where few are spare, as in a large tier, most of this is looking for the next one.
    const auto look = [&](std::int64_t from, std::int64_t to) {
        while (from < to && static_cast<std::int64_t>(found.size()) < n) {
            const void* next = std::memchr(spare.data() + from, true, to - from);
            if (!next) return;
            from = static_cast<const bool*>(next) - spare.data() + 1;
            if (!pinned.data()[from - 1]) found.push_back(from - 1), slot = from % slots;
        }
    };
    look(begin, slots);
    look(0, begin);
    if (static_cast<std::int64_t>(found.size()) < n) slot = begin;
    return py::make_tuple(made_of(found), slot);
}

}  // namespace

void bind_tables(py::module_& module) {
    module.def("pin", &pin, given("slots"), given("pins"), given("pinned"), given("count"));
    module.def("unpin", &unpin, given("slots"), given("pins"), given("pinned"), given("count"));
    module.def("pin_present", &pin_present, given("ids"), given("table"), given("pins"),
               given("pinned"), given("count"), given("place"));
    module.def("find_tiers", &find_tiers, given("ids"), given("hot"), given("warm"), given("cold"),
               given("place"));
    module.def("split", &split, given("ids"), given("table"));
    module.def("arrive", &arrive, given("ids"), given("slots"), given("block"), given("table"));
    module.def("leave", &leave, given("slots"), given("block"), given("table"), given("spare"),
               given("sole"));
    module.def("mark", &mark, given("slots"), given("mask"), py::arg("value"));
    module.def("any_marked", &any_marked, given("slots"), given("mask"));
    module.def("mark_sole", &mark_sole, given("ids"), given("slots"), given("cold"),
               given("sole"));
    module.def("sum_by_slot", &sum_by_slot, given("slots"), given("weights"), given("place"));
    module.def("find_ids", &find_ids, py::arg("streams"), given("blocks"), given("counts"),
               given("runs"));
    module.def("sort_victims", &sort_victims, given("slots"), given("block"), given("warm"),
               given("cold"));
    module.def("next_spare", &next_spare, given("spare"), given("pinned"), py::arg("start"),
               py::arg("n"));
}

}  // namespace kvstore

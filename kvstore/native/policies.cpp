// The textbooks' lists, over the slots of a tier: one link back and one on for each slot.
#include "policies.h"

#include <vector>

#include "array.h"

namespace kvstore {
namespace {

// A circular list of slots; place `slots` is its head, before the first and behind the last.
class List {
   public:
    explicit List(std::int64_t slots)
        : slots_(slots), next_(slots + 1, NONE), back_(slots + 1, NONE) {
        next_[slots] = back_[slots] = head();
    }

    std::int64_t slots() const { return slots_; }
    std::int32_t head() const { return static_cast<std::int32_t>(slots_); }
    bool has(std::int64_t slot) const { return next_[slot] != NONE; }
    std::int32_t next(std::int32_t slot) const { return next_[slot]; }

    void append(std::int32_t slot) {
        const std::int32_t last = back_[slots_];
        next_[last] = back_[slots_] = slot;
        back_[slot] = last;
        next_[slot] = head();
    }

    void remove(std::int32_t slot) {
        next_[back_[slot]] = next_[slot];
        back_[next_[slot]] = back_[slot];
        next_[slot] = back_[slot] = NONE;
    }

   private:
    static constexpr std::int32_t NONE = -1;
    std::int64_t slots_;
    std::vector<std::int32_t> next_, back_;
};

std::int64_t checked(std::int64_t slots) {
    if (slots < 0 || slots >= INT32_MAX) throw py::value_error("a tier has 0 to 2^31 - 2 slots");
    return slots;
}

void check_pinned(const Bools& pinned, const List& list) {
    if (pinned.size() != list.slots()) {
        throw py::value_error("pinned says nothing of some slots, or something of too many");
    }
}

class LRU {
   public:
    explicit LRU(std::int64_t slots) : list_(checked(slots)) {}

    void touch(const Int64s& slots) {
        check(slots, list_.slots());
        for (py::ssize_t i = 0; i < slots.size(); i++) {
            const auto slot = static_cast<std::int32_t>(slots.data()[i]);
            if (list_.has(slot)) list_.remove(slot);
            list_.append(slot);
        }
    }

    void release(const Int64s& slots) {
        check(slots, list_.slots());
        for (py::ssize_t i = 0; i < slots.size(); i++) {
            const auto slot = static_cast<std::int32_t>(slots.data()[i]);
            if (list_.has(slot)) list_.remove(slot);
        }
    }

    Int64s peek(std::int64_t count, const Bools& pinned) const {
        check_pinned(pinned, list_);
        std::vector<std::int64_t> chosen;
        std::int32_t slot = list_.next(list_.head());
        for (; slot != list_.head() && static_cast<std::int64_t>(chosen.size()) < count; slot = list_.next(slot)) {
            if (!pinned.data()[slot]) chosen.push_back(slot);
        }
        return made_of(chosen);
    }

    Int64s victims(std::int64_t count, const Bools& pinned) {
        Int64s chosen = peek(count, pinned);
        release(chosen);
        return chosen;
    }

   private:
    List list_;
};

class SIEVE {
   public:
    explicit SIEVE(std::int64_t slots)
        : list_(checked(slots)), visited_(slots, false), hand_(list_.head()) {}

    void admit(const Int64s& slots) {
        check(slots, list_.slots());
        for (py::ssize_t i = 0; i < slots.size(); i++) {
            const auto slot = static_cast<std::int32_t>(slots.data()[i]);
            if (list_.has(slot)) take(slot);
            list_.append(slot);
            visited_[slot] = false;
        }
    }

    void touch(const Int64s& slots) {
        check(slots, list_.slots());
        for (py::ssize_t i = 0; i < slots.size(); i++) visited_[slots.data()[i]] = true;
    }

    void release(const Int64s& slots) {
        check(slots, list_.slots());
        for (py::ssize_t i = 0; i < slots.size(); i++) {
            const auto slot = static_cast<std::int32_t>(slots.data()[i]);
            if (list_.has(slot)) take(slot);
        }
    }

    // In its first round the hand takes the unvisited; in a second one it finds the rest with their
    // bits cleared.
    Int64s peek(std::int64_t count, const Bools& pinned) const {
        check_pinned(pinned, list_);
        std::vector<std::int64_t> chosen;
        for (const bool visited : {false, true}) {
            std::int32_t slot = first();
            for (std::int32_t left = slot == list_.head() ? 0 : 1; left;) {
                if (static_cast<std::int64_t>(chosen.size()) == count) break;
                if (!pinned.data()[slot] && visited_[slot] == visited) chosen.push_back(slot);
                slot = after(slot);
                left = slot != first();
            }
        }
        return made_of(chosen);
    }

    Int64s victims(std::int64_t count, const Bools& pinned) {
        Int64s chosen = peek(count, pinned);
        for (py::ssize_t i = 0; i < chosen.size(); i++) {
            const auto victim = static_cast<std::int32_t>(chosen.data()[i]);
            std::int32_t slot = first();
            for (; slot != victim || visited_[slot]; slot = after(slot)) {
                if (!pinned.data()[slot]) visited_[slot] = false;
            }
            hand_ = victim;
            take(victim);
        }
        return chosen;
    }

   private:
    // Where the hand is; with none newer left it is back at the oldest.
    std::int32_t first() const { return hand_ == list_.head() ? list_.next(hand_) : hand_; }

    std::int32_t after(std::int32_t slot) const {
        const std::int32_t next = list_.next(slot);
        return next == list_.head() ? list_.next(next) : next;
    }

    void take(std::int32_t slot) {
        if (hand_ == slot) hand_ = list_.next(slot);
        list_.remove(slot);
    }

    List list_;
    std::vector<bool> visited_;
    std::int32_t hand_;  // at the list's head: at the oldest, whichever that will be
};

template <class Order>
py::class_<Order> bind_order(py::module_& module, const char* name) {
    return py::class_<Order>(module, name)
        .def(py::init<std::int64_t>(), py::arg("slots"))
        .def("touch", &Order::touch, given("slots"))
        .def("release", &Order::release, given("slots"))
        .def("victims", &Order::victims, py::arg("count"), given("pinned"))
        .def("peek", &Order::peek, py::arg("count"), given("pinned"));
}

}  // namespace

void bind_policies(py::module_& module) {
    bind_order<LRU>(module, "LRU").def("admit", &LRU::touch, given("slots"));
    bind_order<SIEVE>(module, "SIEVE").def("admit", &SIEVE::admit, given("slots"));
}

}  // namespace kvstore

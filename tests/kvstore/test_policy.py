"""One contract suite for every policy, each against a textbook of its own that goes slot by slot.

A new policy is one more entry in CASES: its factory, and a textbook with the methods of `Textbook`.
"""

from __future__ import annotations

import copy
import doctest
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

import kvstore.policy
from kvstore.policy import LRU, POLICIES, SIEVE, Policy, PolicyFactory, make_policy


class TextbookLRU:
    def __init__(self) -> None:
        self.order: OrderedDict[int, None] = OrderedDict()

    def admit(self, slot: int) -> None:
        self.order[slot] = None

    def touch(self, slot: int) -> None:
        self.order.move_to_end(slot)

    def weigh(self, slot: int, weight: float) -> None:
        pass

    def release(self, slot: int) -> None:
        del self.order[slot]

    def victim(self, pinned: set[int]) -> int | None:
        for slot in self.order:
            if slot not in pinned:
                del self.order[slot]
                return slot
        return None


class _Node:
    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.visited = False
        self.newer: _Node | None = None
        self.older: _Node | None = None


class TextbookSIEVE:
    """Algorithm 1 of the paper, with a linked list; pinned nodes are passed untouched."""

    def __init__(self) -> None:
        self.nodes: dict[int, _Node] = {}
        self.oldest: _Node | None = None
        self.newest: _Node | None = None
        self.hand: _Node | None = None

    def admit(self, slot: int) -> None:
        node = self.nodes[slot] = _Node(slot)
        node.older = self.newest
        if self.newest is not None:
            self.newest.newer = node
        self.newest = node
        if self.oldest is None:
            self.oldest = node

    def touch(self, slot: int) -> None:
        self.nodes[slot].visited = True

    def weigh(self, slot: int, weight: float) -> None:
        pass

    def release(self, slot: int) -> None:
        node = self.nodes.pop(slot)
        if self.hand is node:
            self.hand = node.newer
        if node.newer is None:
            self.newest = node.older
        else:
            node.newer.older = node.older
        if node.older is None:
            self.oldest = node.newer
        else:
            node.older.newer = node.newer

    def victim(self, pinned: set[int]) -> int | None:
        if all(slot in pinned for slot in self.nodes):
            return None
        node = self.hand or self.oldest
        assert node is not None
        while node.slot in pinned or node.visited:
            if node.slot not in pinned:
                node.visited = False
            node = node.newer or self.oldest
            assert node is not None
        self.hand = node
        self.release(node.slot)
        return node.slot


class TextbookLeastAttended:
    def __init__(self) -> None:
        self.weights: dict[int, float] = {}

    def admit(self, slot: int) -> None:
        self.weights[slot] = 0.0

    def touch(self, slot: int) -> None:
        pass

    def weigh(self, slot: int, weight: float) -> None:
        self.weights[slot] += weight

    def release(self, slot: int) -> None:
        del self.weights[slot]

    def victim(self, pinned: set[int]) -> int | None:
        free = [(weight, slot) for slot, weight in self.weights.items() if slot not in pinned]
        if not free:
            return None
        slot = min(free)[1]
        del self.weights[slot]
        return slot


def _the_documented_policy() -> PolicyFactory:
    """The class in the docstring of kvstore.policy, as a reader would copy it."""
    scope: dict[str, Any] = {}
    for example in doctest.DocTestParser().get_examples(kvstore.policy.__doc__ or ""):
        if example.source.startswith(("import", "class")):
            exec(example.source, scope)
    factory: PolicyFactory = scope["LeastAttended"]
    return factory


CASES: dict[str, tuple[PolicyFactory, Callable[[], Any]]] = {
    "lru": (LRU, TextbookLRU),
    "sieve": (SIEVE, TextbookSIEVE),
    "documented": (_the_documented_policy(), TextbookLeastAttended),
}
every_policy = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def _slots(numbers: list[int] | range) -> np.ndarray:
    return np.array(list(numbers), np.int64)


def _victims(textbook: Any, count: int, pinned: set[int]) -> list[int]:
    chosen = (textbook.victim(pinned) for _ in range(count))
    return [slot for slot in chosen if slot is not None]


class PolicyMachine(RuleBasedStateMachine):
    """Batches to the policy, the same accesses one by one to its textbook."""

    def __init__(self, factory: PolicyFactory, textbook: Callable[[], Any]) -> None:
        super().__init__()
        self.factory = factory
        self.textbook = textbook()

    @initialize(slots=st.sampled_from([1, 2, 5, 12, 40]))
    def open(self, slots: int) -> None:
        self.slots = slots
        self.policy = self.factory(slots)
        self.admitted: set[int] = set()
        self.pinned: set[int] = set()

    def _batch(self, data: st.DataObject, slots: set[int]) -> list[int]:
        if not slots:
            return []
        some = st.lists(st.sampled_from(sorted(slots)), unique=True, max_size=len(slots))
        return data.draw(st.one_of(some, st.permutations(sorted(slots))))

    def _counts(self) -> st.SearchStrategy[int]:
        return st.one_of(st.integers(0, 3), st.integers(0, self.slots + 2))

    def _mask(self) -> np.ndarray:
        mask = np.zeros(self.slots, bool)
        mask[sorted(self.pinned)] = True
        return mask

    @rule(data=st.data())
    def admit(self, data: st.DataObject) -> None:
        batch = self._batch(data, set(range(self.slots)) - self.admitted)
        self.policy.admit(_slots(batch))
        for slot in batch:
            self.textbook.admit(slot)
        self.admitted.update(batch)

    @rule()
    def admit_all(self) -> None:
        batch = sorted(set(range(self.slots)) - self.admitted)
        self.policy.admit(_slots(batch))
        for slot in batch:
            self.textbook.admit(slot)
        self.admitted.update(batch)

    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        batch = self._batch(data, self.admitted)
        self.policy.touch(_slots(batch))
        for slot in batch:
            self.textbook.touch(slot)

    @rule(data=st.data())
    def weigh(self, data: st.DataObject) -> None:
        batch = self._batch(data, self.admitted)
        weights = np.array(
            [data.draw(st.sampled_from([0.0, 0.125, 0.5, 1.0])) for _ in batch], np.float32
        )
        self.policy.weigh(_slots(batch), weights)
        for slot, weight in zip(batch, weights.tolist(), strict=True):
            self.textbook.weigh(slot, weight)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        batch = self._batch(data, self.admitted)
        self.policy.release(_slots(batch))
        for slot in batch:
            self.textbook.release(slot)
        self.admitted.difference_update(batch)
        self.pinned.difference_update(batch)

    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        # Not often all of them: then nothing could be evicted until the next pin.
        self.pinned = set(self._batch(data, self.admitted)[: max(1, self.slots // 2)])

    def _evict(self, count: int) -> list[int]:
        expected = _victims(self.textbook, count, self.pinned)
        chosen = self.policy.victims(count, self._mask())
        assert chosen.dtype == np.int64
        assert chosen.tolist() == expected
        assert len(expected) == min(count, len(self.admitted - self.pinned))
        self.admitted.difference_update(expected)
        return expected

    @rule(data=st.data())
    def victims(self, data: st.DataObject) -> None:
        self._evict(data.draw(self._counts()))

    @rule(count=st.integers(1, 4), times=st.integers(1, 3))
    def replace(self, count: int, times: int) -> None:
        """What a full tier does most: new blocks take the victims' slots."""
        for _ in range(times):
            batch = self._evict(count)
            self.policy.admit(_slots(batch))
            for slot in batch:
                self.textbook.admit(slot)
            self.admitted.update(batch)

    @rule(data=st.data())
    def peek(self, data: st.DataObject) -> None:
        count = data.draw(self._counts())
        expected = _victims(copy.deepcopy(self.textbook), count, self.pinned)
        for _ in range(2):
            peeked = self.policy.peek(count, self._mask())
            assert peeked.dtype == np.int64
            assert peeked.tolist() == expected

    def teardown(self) -> None:
        # Drain what is left one by one: the whole order must have been right.
        if hasattr(self, "policy"):
            mask = np.zeros(self.slots, bool)
            while self.admitted:
                slot = self.textbook.victim(set())
                assert self.policy.victims(1, mask).tolist() == [slot]
                self.admitted.remove(slot)
            assert self.policy.victims(1, mask).tolist() == []


def _run_machine(case: tuple[PolicyFactory, Callable[[], Any]], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        lambda: PolicyMachine(*case),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@every_policy
def test_batches_equal_the_textbook_one_by_one(
    case: tuple[PolicyFactory, Callable[[], Any]],
) -> None:
    _run_machine(case, examples=200, steps=40)


@pytest.mark.slow
@every_policy
def test_batches_equal_the_textbook_at_length(
    case: tuple[PolicyFactory, Callable[[], Any]],
) -> None:
    _run_machine(case, examples=1000, steps=50)


@every_policy
def test_long_streams_equal_the_textbook(case: tuple[PolicyFactory, Callable[[], Any]]) -> None:
    """A tier of 3,000 slots under a skewed stream."""
    factory, make_textbook = case
    rng = np.random.default_rng(2)
    slots = 3000 if factory in POLICIES.values() else 300  # the documented one's textbook is slow
    policy, textbook = factory(slots), make_textbook()
    policy.admit(_slots(range(slots)))
    for slot in range(slots):
        textbook.admit(slot)
    favourites = rng.permutation(slots)
    for _ in range(150):
        hit = favourites[np.unique((slots * rng.random(300) ** 3).astype(np.int64))]
        weights = rng.integers(0, 8, len(hit)).astype(np.float32)
        policy.touch(hit)
        policy.weigh(hit, weights)
        for slot, weight in zip(hit.tolist(), weights.tolist(), strict=True):
            textbook.touch(slot)
            textbook.weigh(slot, weight)
        pinned = np.zeros(slots, bool)
        pinned[hit] = True
        chosen = policy.victims(int(rng.integers(1, 200)), pinned)
        assert chosen.tolist() == _victims(textbook, len(chosen), set(hit.tolist()))
        policy.admit(chosen)
        for slot in chosen.tolist():
            textbook.admit(slot)


@every_policy
def test_arguments_are_left_alone_and_answers_are_the_callers(
    case: tuple[PolicyFactory, Callable[[], Any]],
) -> None:
    policy = case[0](8)
    given = _slots([5, 1, 3])
    pinned = np.zeros(8, bool)
    policy.admit(given)
    policy.touch(given)
    peeked = policy.peek(3, pinned)
    expected = peeked.tolist()
    peeked[:] = -1
    given[:] = 7
    assert policy.peek(3, pinned).tolist() == expected
    assert not pinned.any()
    pinned[:] = True  # the mask is the caller's: it may change after a call
    pinned[:] = False
    assert policy.victims(3, pinned).tolist() == expected


@every_policy
def test_a_reused_slot_starts_anew(case: tuple[PolicyFactory, Callable[[], Any]]) -> None:
    """What the old block in a slot had earned does not help the new one."""
    policy = case[0](3)
    none = np.zeros(3, bool)
    policy.admit(_slots([0, 1]))
    policy.touch(_slots([0, 1]))
    policy.weigh(_slots([0, 1]), np.ones(2, np.float32))
    policy.release(_slots([0, 1]))
    policy.admit(_slots([0, 1]))
    policy.admit(_slots([2]))
    policy.touch(_slots([1, 2]))
    policy.weigh(_slots([1, 2]), np.ones(2, np.float32))
    assert policy.victims(1, none).tolist() == [0]


def test_the_example_in_the_sieve_paper() -> None:
    """Figure 3 in spirit: hits stay in place, the hand clears bits and stays where it evicted."""
    policy = SIEVE(8)
    none = np.zeros(8, bool)
    policy.admit(_slots([0, 1, 2, 3, 4, 5, 6]))  # A to G, oldest first
    policy.touch(_slots([0, 1, 6]))
    assert policy.victims(1, none).tolist() == [2]  # passes A and B
    policy.admit(_slots([7]))
    policy.touch(_slots([0, 3]))
    assert policy.victims(1, none).tolist() == [4]  # from D on, not from the oldest
    # F, then past G to the newest; round to A, visited again and cleared; B is not any more.
    assert policy.victims(3, none).tolist() == [5, 7, 1]


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_made_by_name(name: str) -> None:
    assert type(make_policy(name, 4)) is POLICIES[name]


def test_a_policy_is_made_by_a_callable() -> None:
    made: list[int] = []

    def make(slots: int) -> Policy:
        made.append(slots)
        return LRU(slots)

    assert isinstance(make_policy(make, 7), LRU)
    assert made == [7]


def test_what_is_no_policy_is_named() -> None:
    with pytest.raises(ValueError, match=r"^'fifo' is not a policy; give one of lru, sieve$"):
        make_policy("fifo", 4)

    class Half:
        def __init__(self, slots: int) -> None:
            pass

        def admit(self, slots: np.ndarray) -> None:
            pass

    with pytest.raises(TypeError, match="Half is not a policy; it lacks touch, weigh, release"):
        make_policy(Half, 4)  # type: ignore[arg-type]


def test_the_docstring_runs() -> None:
    assert doctest.testmod(kvstore.policy).failed == 0

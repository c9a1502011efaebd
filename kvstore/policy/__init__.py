"""Eviction orders, one a file: which blocks leave a memory tier when another needs the room.

A policy sees slots as arrays and never touches a block. Each memory tier has its own. A store
takes one by name, `StoreConfig(policy="sieve")`, or as a callable that makes one for a number of
slots, `StoreConfig(policy=LeastAttended)`.

To write one's own, write the six methods of `Policy`. No base class is needed. This one evicts
what has received the least attention, and ignores everything else it hears:

>>> import numpy as np
>>> class LeastAttended:
...     def __init__(self, slots):
...         self.weight = np.full(slots, np.inf)  # infinite: free
...
...     def admit(self, slots):
...         self.weight[slots] = 0
...
...     def touch(self, slots):
...         pass
...
...     def weigh(self, slots, weights):
...         self.weight[slots] += weights
...
...     def release(self, slots):
...         self.weight[slots] = np.inf
...
...     def victims(self, count, pinned):
...         chosen = self.peek(count, pinned)
...         self.release(chosen)
...         return chosen
...
...     def peek(self, count, pinned):
...         weight = np.where(pinned, np.inf, self.weight)
...         order = np.argsort(weight, kind="stable")[:count]
...         return order[np.isfinite(weight[order])]

>>> policy = make_policy(LeastAttended, slots=4)
>>> policy.admit(np.array([0, 1, 2]))
>>> policy.weigh(np.array([0, 2]), np.array([0.7, 0.2], np.float32))
>>> pinned = np.zeros(4, bool)
>>> policy.victims(2, pinned)
array([1, 2])

What matters:

- Keep state in arrays indexed by slot, so that a batch is a few fancy indexes. A tier can have a
  million slots and is asked for victims several times a millisecond: the `argsort` above is fit
  for thousands. `lru` and `sieve` show two ways to pay a constant price for each victim.
- `victims` forgets what it returns; `peek` returns the same and changes nothing. The store peeks
  in order to write blocks to disk before they must leave.
- A pinned slot is in use right now. Returning one is an error that the store raises.
- A released or evicted slot is soon admitted again with another block: nothing of the old one may
  show through.
- Ties and clocks come from the calls alone, so that a recorded trace replays to the same victims.

The contract is in `Policy`; tests/kvstore/test_policy.py runs it on every policy, the one above
included, and takes yours as one more line in its list.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvstore.policy.lru import LRU
from kvstore.policy.protocol import Policy, PolicyFactory, Slots
from kvstore.policy.sieve import SIEVE

_METHODS = ("admit", "touch", "weigh", "release", "victims", "peek")

POLICIES: Mapping[str, PolicyFactory] = {"lru": LRU, "sieve": SIEVE}


def make_policy(policy: str | PolicyFactory, slots: int) -> Policy:
    """Make the policy of one tier with so many slots.

    policy: a name in POLICIES, or a callable that takes the number of slots. ValueError for another
    name, TypeError where what the callable makes lacks a method of `Policy`.
    """
    if isinstance(policy, str):
        if policy not in POLICIES:
            raise ValueError(f"{policy!r} is not a policy; give one of {', '.join(POLICIES)}")
        return POLICIES[policy](slots)
    made = policy(slots)
    missing = [name for name in _METHODS if not callable(getattr(made, name, None))]
    if missing:
        raise TypeError(f"{type(made).__name__} is not a policy; it lacks {', '.join(missing)}")
    return made


__all__ = ["LRU", "POLICIES", "SIEVE", "Policy", "PolicyFactory", "Slots", "make_policy"]

"""Eviction orders."""

from kvstore.policy.protocol import Policy, PolicyFactory, Slots

POLICIES = ("lru", "sieve")

__all__ = ["POLICIES", "Policy", "PolicyFactory", "Slots"]

"""The named failures of a store. Bad input raises ValueError, KeyError or TypeError instead."""


class KVStoreError(Exception):
    """Something could not be done: space ran out, data is damaged, a write failed."""


class StoreFullError(KVStoreError):
    """No tier has room for a block that must be kept."""


class HotTierTooSmallError(KVStoreError):
    """The blocks of one fetch do not fit into the hot tier together; it says how much would."""


class CorruptBlockError(KVStoreError):
    """A block read from disk is not the block that was written."""


class WriteFailedError(KVStoreError):
    """A write behind the caller's back failed; raised at the next call."""


class StoreClosedError(KVStoreError):
    """The store was used after it was closed."""

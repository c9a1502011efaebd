"""The named failures of a store. Bad input raises ValueError, KeyError or TypeError instead."""

_BRIEF = 200


def brief(said: object) -> str:
    """What foreign bytes say, which may be anything of any size, as part of one line."""
    try:
        text = " ".join(str(said).split())
    except ValueError:  # Python writes no number of more than some thousand digits
        text = "too large a number"
    shown = "".join(c if c.isprintable() else "?" for c in text[:_BRIEF])
    return shown if len(text) <= _BRIEF else f"{shown}…"


class KVStoreError(Exception):
    """Something could not be done: space ran out, data is damaged, a write failed."""


class StoreFullError(KVStoreError):
    """No tier has room for a block that must be kept."""


class HotTierTooSmallError(KVStoreError):
    """The blocks of one fetch do not fit into the hot tier together; it says how much would."""


class CorruptBlockError(KVStoreError):
    """What was read from disk is not what was written: a block, a record or a file.

    block: the id of the block, where it is one.
    """

    def __init__(self, message: str, block: int | None = None) -> None:
        super().__init__(message)
        self.block = block


class CorruptStoreError(CorruptBlockError):
    """The structure of a store's file is damaged, so that nothing can safely be read from it."""


class OtherFormatError(ValueError):
    """What is kept was written by another version of this program: no damage, but not readable."""


class OtherBlocksError(ValueError):
    """A store's blocks look otherwise than what is to be put into it."""


class WriteFailedError(KVStoreError):
    """A write behind the caller's back failed; raised at the next call."""


class StoreClosedError(KVStoreError):
    """The store was used after it was closed."""

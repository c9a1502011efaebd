"""Single values of the command line, read and refused."""

from __future__ import annotations

import argparse
import math

import pytest

from kvstore.cli import usage


def test_values_are_read() -> None:
    assert usage.whole(0, 5)("0") == 0
    assert usage.whole(0, 5)("5") == 5
    assert usage.share("0") == 0
    assert usage.share("1") == 1
    assert usage.number("-2.5") == -2.5
    assert usage.words("é") == "é"
    assert usage.text("") == ""


@pytest.mark.parametrize(
    ("read", "value"),
    [
        (usage.whole(1, 5), "0"),
        (usage.whole(1, 5), "6"),
        (usage.whole(1, 5), "2.0"),
        (usage.share, "-0.01"),
        (usage.share, "1.01"),
        (usage.share, "nan"),
        (usage.share, "half"),
        (usage.number, "inf"),
        (usage.number, "warm"),
        (usage.words, ""),
        (usage.text, "\udcff"),
    ],
)
def test_others_are_refused(read, value: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as refused:
        read(value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("too small"), "too small"),
        (KeyError("no such thing"), "no such thing"),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), "x.txt: No such file"),
        (ValueError(), "^$"),
    ],
)
def test_bad_input_becomes_wrong_usage(error: Exception, says: str) -> None:
    with pytest.raises(usage.UsageError, match=says), usage.checking_input():
        raise error


def test_a_bug_stays_a_bug() -> None:
    with pytest.raises(ZeroDivisionError), usage.checking_input():
        math.floor(1 / 0)

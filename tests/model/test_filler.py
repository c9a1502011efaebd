"""Made-up bytes: as many as are asked for, and what they are said to be."""

from __future__ import annotations

import numpy as np
import pytest

from model.filler import code, foreign, noise, sentences, words


@pytest.mark.parametrize("make", [words, noise, foreign, sentences, code])
@pytest.mark.parametrize("length", [1, 33, 5000])
def test_filler_has_the_length_asked_for_and_varies(make: object, length: int) -> None:
    assert callable(make)
    text = make(np.random.default_rng(1), length)
    assert text.dtype == np.uint8
    assert text.shape == (length,)
    assert np.array_equal(text, make(np.random.default_rng(1), length))
    assert length == 1 or not np.array_equal(text, make(np.random.default_rng(2), length))


def test_filler_is_what_it_says() -> None:
    rng = np.random.default_rng(0)
    assert set(words(rng, 3000).tobytes()) == set(b"abcdefghijklmnopqrstuvwxyz ")
    assert {len(set(noise(rng, 9000).tolist())) for _ in range(8)} == {256, 95}
    assert b"The grass is green. The sky is blue." in sentences(rng, 500).tobytes()
    letters = foreign(rng, 3000).tobytes().decode(errors="ignore")
    assert max(map(ord, letters)) > 0x370
    lines = code(rng, 9000).tobytes().decode().splitlines()
    assert any(line.startswith("        ") for line in lines)

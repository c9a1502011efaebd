from __future__ import annotations

from contextlib import ExitStack

import pytest
from twin import open_store


@pytest.fixture
def make_store():
    """Make stores, and close them after the test."""
    with ExitStack() as stack:
        yield lambda *a, **given: stack.enter_context(open_store(*a, **given))

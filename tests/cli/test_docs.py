"""What the documents say: their code runs, their links lead somewhere, their tree is the tree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def code_of(page: Path) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S))


def test_the_page_on_the_store_stores_and_fetches() -> None:
    page = ROOT / "docs" / "store.md"
    first = re.search(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S)
    assert first is not None
    assert len([line for line in first[1].splitlines() if line.strip()]) <= 10
    said: dict[str, Any] = {}
    exec(first[1], said)
    blocks = said["blocks"]
    assert blocks.shape == (4, 1, 8)
    own = said["keys"].unflatten(1, (-1, 32))
    for stream in range(4):
        assert torch.equal(said["k"][stream, 0], own[stream, blocks[stream, 0]])
    with pytest.raises(Exception, match="closed"):
        said["store"].usage()


def test_all_of_the_page_runs() -> None:
    said: dict[str, Any] = {}
    exec(code_of(ROOT / "docs" / "store.md"), said)
    assert said["block"].shape == (16, 32, 64)
    assert (said["block"] == 1).all()
    assert said["lengths"] == {"a": 640, "b": 320}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


def test_the_readme_names_every_file() -> None:
    named = set(re.findall(r"^[ │├└─]*([\w.]+\.py)\b", (ROOT / "README.md").read_text(), re.M))
    files = {
        path.name
        for room in ("kvstore", "model", "bench")
        for path in (ROOT / room).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert named == files


def test_the_readme_has_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert "\npip install -e . && kvstore demo\n" in text
    assert "\npip install -e '.[test]' && pytest\n" in text
    assert "C++ compiler" in text


def test_every_option_is_documented(kvstore: Any) -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    for command in ("run", "demo", "ask", "chat", "contexts", "verify"):
        assert f"## kvstore {command}\n" in text
        for option in re.findall(r"^  (--[\w-]+)", kvstore(command, "--help").out, re.M):
            assert f"`{option}" in text, option

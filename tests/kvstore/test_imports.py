"""The rules of import: one way between packages, one file for each medium."""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@cache
def nodes_of(path):
    return list(ast.walk(ast.parse(path.read_text())))


def imports_of(path):
    """Every module that a file imports, also inside functions, as dotted names."""
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(package):
    return sorted((ROOT / package).rglob("*.py"))


def importers(module, *packages):
    """The files that import a module or something in it."""
    return {
        str(path.relative_to(ROOT))
        for package in packages
        for path in files(package)
        if any(f"{name}.".startswith(f"{module}.") for name in imports_of(path))
    }


def test_there_is_something_to_look_at():
    assert len(files("kvstore")) > 20
    assert "kvstore/store.py" in importers("torch", "kvstore")


def test_only_the_command_line_knows_the_model():
    assert all(path.startswith("kvstore/cli/") for path in importers("model", "kvstore"))


def test_only_the_command_line_knows_the_command_line():
    found = importers("kvstore.cli", "kvstore", "model", "bench")
    # But the bench that feeds nonsense to all that is read from disk.
    assert all(path.startswith(("kvstore/cli/", "bench/fuzz")) for path in found)


def test_nothing_imports_the_benches_or_tests():
    assert importers("bench", "kvstore", "model") == set()
    assert importers("tests", "kvstore", "model", "bench") == set()


def test_one_file_for_each_medium():
    tiers = {f"kvstore/tiers/{name}.py" for name in ("disk", "lmdb_file", "reclaim")}
    assert importers("lmdb", "kvstore", "model") == tiers
    assert importers("zstandard", "kvstore", "model") == {"kvstore/codec.py"}
    assert len(importers("hnswlib", "kvstore", "model")) == 1


def test_nothing_is_pickled():
    for module in ("pickle", "marshal", "shelve", "dill"):
        assert importers(module, "kvstore", "model") == set()


def test_imports_within_the_store_point_one_way():
    """Each file imports only from what stands before it."""
    layers = [
        ["errors", "promises", "heap"],
        ["block"],
        ["policy", "trace", "stats"],
        ["config", "codec"],
        ["quantize"],
        ["mixed_codec"],
        ["tiers", "manifest"],
        ["residency", "streams"],
        ["index", "occupancy", "recorder", "jobs", "waves"],
        ["mover"],
        ["writer", "prefetch", "check"],
        ["guard"],
        ["lookups"],
        ["store"],
        ["block_map", "saved_contexts"],
        ["context"],
        ["verify"],
        ["salvage"],
        ["cli", "__init__", "__main__"],
    ]
    level = {name: i for i, names in enumerate(layers) for name in names}
    # Store.context makes a Context, which holds a Store: the one knot, tied at run time; and
    # Store.kept lists what of them is kept, and Store.check looks at all of it.
    allowed = {("store", "context"), ("store", "saved_contexts"), ("store", "verify")}
    for path in files("kvstore"):
        home = path.relative_to(ROOT / "kvstore").parts[0].removesuffix(".py")
        assert home in level, f"{path.name}: say where it stands"
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] == "kvstore" and len(parts) > 1 and parts[1] in level:
                target = parts[1]
                if target != home and (home, target) not in allowed:
                    assert level[target] < level[home], f"{path}: imports {name}"


def test_only_the_mover_copies_blocks():
    """Whoever calls these changes what lies in a tier."""
    for name in ("copy_slots", "scatter", "place", "land"):
        for path in files("kvstore"):
            calls = {
                node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
                for node in nodes_of(path)
                if isinstance(node, ast.Call) and isinstance(node.func, (ast.Attribute, ast.Name))
            }
            if name in calls and path.name != "mover.py":
                assert path.parent.name == "tiers" or (path.name, name) == ("prefetch.py", "land")

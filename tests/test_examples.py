"""The gallery runs; every public name has its place in the API pages."""

import importlib
import importlib.util
import re
import runpy
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import sknbln

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what an example writes, it writes here
    monkeypatch.setattr(plt, "show", lambda: None)  # with a display Agg would warn
    yield lambda path: runpy.run_path(str(path), run_name="__main__")
    plt.close("all")


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path, run):
    run(path)
    assert plt.get_fignums()


def test_examples_are_in_the_gallery():
    assert EXAMPLES
    for path in EXAMPLES:
        assert path.name.startswith("plot_"), f"{path.name}: the gallery runs plot_*.py only"


def documented_names():
    """Names in the autosummary tables of docs/api.rst, by module."""
    found, module = {}, None
    for line in (ROOT / "docs" / "api.rst").read_text(encoding="utf-8").splitlines():
        if line.startswith(".. currentmodule::"):
            module = line.split("::")[1].strip()
            found.setdefault(module, set())
        elif re.fullmatch(r"   \w+", line):
            found[module].add(line.strip())
    return found


SUBMODULES = [
    f"sknbln.{name}" for name in sknbln.__all__ if importlib.util.find_spec(f"sknbln.{name}")
]


@pytest.mark.parametrize("module", ["sknbln", *SUBMODULES])
def test_api_pages_list_the_public_names(module):
    public = set(importlib.import_module(module).__all__)
    # a submodule has a table of its own
    public -= {name.removeprefix("sknbln.") for name in SUBMODULES}
    assert documented_names()[module] == public

"""The examples of the public docstrings run as written."""

import doctest
import importlib
import pkgutil

import matplotlib.pyplot as plt
import pytest

import sknbln._base
import sknbln._nbln
import sknbln._nbvcp
import sknbln._pairs
import sknbln._thinning
import sknbln.datasets._real
import sknbln.datasets._simulate
import sknbln.exceptions
import sknbln.model_selection
import sknbln.network
import sknbln.plotting
import sknbln.predictive._checks
import sknbln.predictive._draws
import sknbln.tl

DISPLAYS = [
    importlib.import_module(f"sknbln.plotting.{module.name}")
    for module in pkgutil.iter_modules(sknbln.plotting.__path__)
    if module.name not in ("_common", "_log_axes")
]


@pytest.mark.parametrize(
    "module",
    [
        sknbln._base,
        sknbln._nbln,
        sknbln._nbvcp,
        sknbln._pairs,
        sknbln._thinning,
        sknbln.datasets._real,
        sknbln.datasets._simulate,
        sknbln.exceptions,
        sknbln.model_selection,
        sknbln.network,
        sknbln.predictive._checks,
        sknbln.predictive._draws,
        sknbln.tl,
        *DISPLAYS,
    ],
    ids=lambda module: module.__name__,
)
def test_examples_run(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0
    plt.close("all")

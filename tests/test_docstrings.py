"""The examples of the public docstrings run as written."""

import doctest

import pytest

import sknbln._nbln
import sknbln._nbvcp
import sknbln.datasets._real
import sknbln.datasets._simulate


@pytest.mark.parametrize(
    "module",
    [sknbln._nbln, sknbln._nbvcp, sknbln.datasets._real, sknbln.datasets._simulate],
    ids=lambda module: module.__name__,
)
def test_examples_run(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0

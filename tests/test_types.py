"""Every public function and method has hints, and they resolve at run time."""

import importlib
import inspect
import re
import typing
from pathlib import Path

import pytest

import sknbln

API = Path(__file__).parents[1] / "docs" / "api.rst"


def listed():
    """What docs/api.rst lists, as (module, name)."""
    module, found = None, []
    for line in API.read_text().splitlines():
        if current := re.match(r"\.\. currentmodule:: (\S+)", line):
            module = current[1]
        elif re.fullmatch(r"   [A-Za-z]\w*", line):
            found.append((module, line.strip()))
    return found


def functions():
    """Public functions, and public methods of public classes that are our own, by their names."""
    found = {}
    for module, name in listed():
        thing = getattr(importlib.import_module(module), name)
        if not inspect.isclass(thing):
            found[name] = thing
            continue
        for key in dir(thing):
            member = inspect.getattr_static(thing, key)
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            ours = inspect.isfunction(function) and function.__module__.startswith("sknbln")
            if ours and (key == "__init__" or not key.startswith("_")):
                found[f"{name}.{key}"] = function
    return found


FUNCTIONS = functions()


def test_api_is_read():
    names = {name for _, name in listed()}
    assert {*sknbln.tl.__all__, *sknbln.model_selection.__all__, "NBLNEstimator"} <= names
    assert {"NBLNEstimator.transform", "compare", "PPCDisplay.plot"} <= FUNCTIONS.keys()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_hints_are_complete(name):
    function = FUNCTIONS[name]
    parameters = list(inspect.signature(function).parameters)
    if "." in name:
        parameters = parameters[1:]  # self, cls
    hints = typing.get_type_hints(function)
    assert [p for p in [*parameters, "return"] if p not in hints] == []


def test_marker_ships():
    assert (Path(sknbln.__file__).parent / "py.typed").exists()

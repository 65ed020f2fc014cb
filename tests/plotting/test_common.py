"""What all displays have in common: drawn on the caller's axes, with matplotlib only then."""

import inspect
import subprocess
import sys
import textwrap

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator

from sknbln import NBLNEstimator, NBVCPEstimator, plotting
from sknbln.plotting import ConvergenceDisplay, PPCDisplay

from .displays import (
    DRAW,
    DRAW_ALL,
    NEED_COUNTS,
    NEED_LOADINGS,
    SHAPE,
    drawn_axes,
    every_display,
    every_picture,
)

# ------------------------------------------------------------------ what all have in common


def test_every_display_is_tested_here():
    assert len(plotting.__all__) == len(DRAW_ALL)
    assert all(name.endswith("Display") and hasattr(plotting, name) for name in plotting.__all__)


@every_picture
def test_a_new_figure_has_a_layout_and_nothing_global_changes(name, model, counts):
    before = matplotlib.rcParams.copy()
    display = DRAW_ALL[name](model, counts)
    assert type(display.figure_.get_layout_engine()).__name__ == "ConstrainedLayoutEngine"
    axes = drawn_axes(display)
    assert len(axes) == np.prod(SHAPE.get(name, 1))
    assert all(ax.figure is display.figure_ for ax in axes)
    lowest = axes[-SHAPE.get(name, (1, 1))[1] :]
    assert all(ax.get_xlabel() or ax.get_xticklabels()[0].get_text() for ax in lowest)
    assert plt.get_fignums() == [display.figure_.number]
    display.figure_.canvas.draw()
    assert matplotlib.rcParams == before


@every_picture
def test_draws_on_the_callers_axes(name, model, counts):
    figure, axes = plt.subplots(*SHAPE.get(name, (1, 2)))
    axes = axes if name in SHAPE else axes[1]
    display = DRAW_ALL[name](model, counts, ax=axes)
    assert display.figure_ is figure
    assert drawn_axes(display) == list(np.atleast_1d(axes).flat)
    assert plt.get_fignums() == [figure.number]
    figure.canvas.draw()
    # drawn again elsewhere, from the same numbers
    again = display.plot()
    assert again is display and display.figure_ is not figure
    elsewhere = plt.figure().subplots(*SHAPE.get(name, (1, 1)))
    assert display.plot(elsewhere).figure_ is plt.gcf()  # the first argument, as in scikit-learn


@every_picture
def test_says_how_to_get_matplotlib(name, model, counts, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install sknbln\[plot\]"):
        DRAW_ALL[name](model, counts)


@every_display
def test_refuses_what_is_not_fitted_or_not_ours(name, counts):
    with pytest.raises(NotFittedError):
        DRAW[name](NBLNEstimator(), counts)
    with pytest.raises(TypeError, match="found DataFrame"):
        DRAW[name](counts, counts)


@every_display
def test_takes_a_frozen_estimator(name, model, counts):
    assert DRAW[name](FrozenEstimator(model), counts).figure_ is not None


@pytest.mark.parametrize("name", NEED_LOADINGS)
def test_independent_genes_have_no_loadings(name, source, counts):
    with pytest.raises(TypeError, match="takes an NBLNEstimator; found NBVCPEstimator"):
        DRAW[name](source, counts)


@pytest.mark.parametrize("name", NEED_COUNTS)
def test_asks_for_the_counts(name, model):
    with pytest.raises(ValueError, match="needs X"):
        DRAW[name](model, None)


@every_display
def test_only_displays_that_draw_counts_take_them(name, model, counts):
    parameters = inspect.signature(type(DRAW[name](model, counts)).from_estimator).parameters
    assert ("X" in parameters) == (name in NEED_COUNTS)


def test_import_does_not_import_matplotlib():
    code = """
        import sys
        import sknbln.plotting as plotting
        assert not [m for m in sys.modules if m.split(".")[0] == "matplotlib"]
        sys.modules["matplotlib"] = None
        try:
            plotting.LoadingsSpectrumDisplay([1.0], 1, 4).plot()
        except ImportError as error:
            assert "pip install sknbln[plot]" in str(error), error
        else:
            raise AssertionError("drawn without matplotlib")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=300)


# ------------------------------------------------------------------ genes and grids


@pytest.mark.parametrize("name", ["calibration", "corner", "correlation", "counts", "grid", "ppc"])
def test_unknown_genes(name, model, counts):
    with pytest.raises(ValueError, match="unknown entries \\['nobody'\\]"):
        DRAW[name](model, counts, genes=["G03", "nobody"])
    with pytest.raises(ValueError, match="unknown entries \\[20\\]: expected positions 0 to 19"):
        DRAW[name](model, counts, genes=[3, 20])


def test_genes_without_names_are_named_by_position(counts):
    model = NBVCPEstimator(random_state=0).fit(counts.to_numpy())
    display = PPCDisplay.from_estimator(model, counts.to_numpy(), genes=[7], n_samples=2)
    assert display.axes_[0, 0].get_title().startswith("gene 7\nmean ")


def test_grids_take_a_figure_one_axes_or_as_many_as_needed(model):
    figure = plt.figure()
    display = ConvergenceDisplay.from_estimator(model, ax=figure)
    assert display.figure_ is figure and len(figure.axes) == 2

    half = plt.figure().subfigures(1, 2)[1]
    assert ConvergenceDisplay.from_estimator(model, ax=half).figure_ is half

    figure, (left, right) = plt.subplots(1, 2)
    display = ConvergenceDisplay.from_estimator(model, ax=right)
    assert not right.axison and left.axison
    assert len(figure.axes) == 4 and display.axes_.shape == (1, 2)
    edges = right.get_position()
    assert all(edges.x0 - 1e-9 <= ax.get_position().x0 for ax in display.axes_.flat)
    with pytest.raises(ValueError, match="cannot be divided"):
        ConvergenceDisplay.from_estimator(model, ax=right)

    with pytest.raises(ValueError, match="ax holds 3 axes, this picture needs 2"):
        ConvergenceDisplay.from_estimator(model, ax=plt.subplots(1, 3)[1])

"""Every display by name, and what its tests look for."""

import numpy as np
import pandas as pd
import pytest

from sknbln.model_selection import Comparison
from sknbln.network import sparse_network
from sknbln.plotting import (
    CalibrationDisplay,
    CaptureDisplay,
    ComparisonDisplay,
    CompositionalCornerDisplay,
    CompositionalGridDisplay,
    ConvergenceDisplay,
    CorrelationDisplay,
    CountCornerDisplay,
    EmbeddingDisplay,
    LoadingsSpectrumDisplay,
    NetworkDisplay,
    PPCDisplay,
    VolcanoDisplay,
)

N_CELLS, N_GENES = 120, 20


def legend_texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def line(ax, label):
    """The line whose label starts with this text."""
    (found,) = [each for each in ax.lines if str(each.get_label()).startswith(label)]
    return found


def comparison():
    """A comparison of three models, none of which was fitted."""
    columns = {"difference": [0.0, -1.5, -20.0], "difference_standard_error": [0.0, 0.5, 2.0]}
    names = ["negative binomial", "Poisson", "independent"]
    nothing = pd.DataFrame(np.zeros((0, 3)))
    return Comparison(pd.DataFrame(columns, index=names), nothing, nothing)


def network(model):
    """A network with edges."""
    return sparse_network(model, genes=range(12), select="ebic", gamma=0.0)


# name -> a function that draws the display from the small fits
DRAW = {
    "spectrum": lambda model, X, **k: LoadingsSpectrumDisplay.from_estimator(model, **k),
    "correlation": lambda model, X, **k: CorrelationDisplay.from_estimator(model, **k),
    "convergence": lambda model, X, **k: ConvergenceDisplay.from_estimator(model, **k),
    "embedding": lambda model, X, **k: EmbeddingDisplay.from_estimator(model, X, **k),
    "ppc": lambda model, X, **k: PPCDisplay.from_estimator(model, X, n_genes=4, n_samples=5, **k),
    "corner": lambda model, X, **k: CompositionalCornerDisplay.from_estimator(
        model, X, n_genes=2, n_samples=100, **k
    ),
    "grid": lambda model, X, **k: CompositionalGridDisplay.from_estimator(
        model, X, n_genes=4, n_samples=100, **k
    ),
    "counts": lambda model, X, **k: CountCornerDisplay.from_estimator(
        model, X, n_genes=2, n_samples=5, **k
    ),
    "capture": lambda model, X, **k: CaptureDisplay.from_estimator(model, **k),
    "calibration": lambda model, X, **k: CalibrationDisplay.from_estimator(
        model, X, n_samples=5, **k
    ),
}
SHAPE = {
    "convergence": (1, 2),
    "ppc": (2, 2),
    "corner": (2, 2),
    "grid": (2, 2),
    "counts": (2, 2),
    "calibration": (1, 3),
}
NEED_LOADINGS = ["spectrum", "correlation", "embedding"]
NEED_COUNTS = ["embedding", "ppc", "corner", "grid", "counts", "calibration"]
# and those that are drawn from a result, not from an estimator
DRAW_ALL = {
    **DRAW,
    "comparison": lambda model, X, **k: ComparisonDisplay.from_comparison(comparison(), **k),
    "network": lambda model, X, **k: NetworkDisplay.from_network(network(model), **k),
    "volcano": lambda model, X, **k: VolcanoDisplay.from_test(model.correlation_test(X), **k),
}
every_picture = pytest.mark.parametrize("name", sorted(DRAW_ALL))
every_display = pytest.mark.parametrize("name", sorted(DRAW))


def drawn_axes(display):
    return list(display.axes_.flat) if hasattr(display, "axes_") else [display.ax_]

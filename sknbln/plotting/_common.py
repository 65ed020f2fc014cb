"""What the displays share: matplotlib, checks, axes, colours and gene names."""

from numbers import Integral

import numpy as np
from sklearn.utils._param_validation import Interval

from .._nbln import NBLNEstimator
from ..predictive._arguments import fitted_model

#: Okabe and Ito's palette, which colour-blind readers can tell apart, without its yellow, too pale for points
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#000000", "#7F7F7F"
PALETTE = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION, BLACK)
#: what the number of columns of a grid may be
N_COLS = [Interval(Integral, 1, None, closed="left"), None]


def pyplot():
    """The module ``matplotlib.pyplot``.

    Raises
    ------
    ImportError
        When matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib, which is not installed: pip install sknbln[plot]"
        ) from error
    return plt


# ------------------------------------------------------------------ arguments


def fitted(display, estimator, *, needs_loadings=False):
    """The fitted estimator that a display is drawn from, out of its `FrozenEstimator`.

    Raises
    ------
    ImportError
        When matplotlib is not installed: now, and not after long computations.
    TypeError
        When it is not an estimator of this package, or has no loadings.
    NotFittedError
        When it is not fitted.
    """
    pyplot()
    model = fitted_model(estimator)
    if needs_loadings and not isinstance(model, NBLNEstimator):
        raise TypeError(
            f"{display.__name__} takes an NBLNEstimator; found {type(model).__name__}, which has no loadings."
        )
    return model


def needed(display, X):
    """Raise ValueError when there are no counts to draw."""
    if X is None:
        raise ValueError(
            f"{display.__name__} needs X, the counts that it draws; found None. Give "
            "from_estimator(estimator, X)."
        )


# ------------------------------------------------------------------ genes


def gene_names(estimator):
    """Names of all genes: ``feature_names_in_``, or ``gene 17`` by position."""
    names = getattr(estimator, "feature_names_in_", None)
    if names is None:
        names = [f"gene {i}" for i in range(estimator.n_features_in_)]
    return np.array([str(name) for name in names], dtype=object)


def readable_genes(estimator, counts, n_genes):
    """Positions of genes whose values can be read: counted in many cells, and varying most."""
    seen = np.asarray((counts > 0).mean(axis=0)).ravel()
    often = np.flatnonzero(seen >= 0.5)
    if often.size < n_genes:
        return np.argsort(-seen, kind="stable")[:n_genes]
    if isinstance(estimator, NBLNEstimator):
        worth = np.linalg.norm(estimator.components_, axis=0)
    else:
        worth = np.asarray(counts.mean(axis=0)).ravel()
    return often[np.argsort(-worth[often], kind="stable")[:n_genes]]


# ------------------------------------------------------------------ axes


def one_axes(ax, figsize):
    """The figure and the axes to draw on: the caller's, or new ones."""
    if ax is None:
        _, ax = pyplot().subplots(figsize=figsize, layout="constrained")
    return ax.figure, ax


def grid_of_axes(ax, n_rows, n_cols, figsize, *, n_panels=None):
    """The figure and an array of axes of shape (n_rows, n_cols).

    `ax` may be None (a new figure), a figure or subfigure (axes are added to it), one axes (it is
    divided and hidden), or as many axes as the picture needs; with `n_panels` at least so many, in
    their own shape.

    Raises
    ------
    ValueError
        When the number of axes differs, or when the single axes cannot be divided.
    """
    plt = pyplot()
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

    if ax is None:
        ax = plt.figure(figsize=figsize, layout="constrained")
    if isinstance(ax, FigureBase):
        return ax, ax.subplots(n_rows, n_cols, squeeze=False)
    if isinstance(ax, Axes) and n_rows * n_cols > 1:
        if ax.get_subplotspec() is None or not ax.axison:
            raise ValueError(
                "ax cannot be divided: it is not part of a grid of subplots, or something was drawn "
                "on it by such a display before. Give a figure, or the axes_ of that display."
            )
        ax.set_axis_off()
        grid = ax.get_subplotspec().subgridspec(n_rows, n_cols)
        return ax.figure, grid.subplots(squeeze=False)
    axes = np.atleast_2d(np.asarray(ax, dtype=object))
    if n_panels is None and axes.size == n_rows * n_cols:
        axes = axes.reshape(n_rows, n_cols)
    elif n_panels is None or axes.size < n_panels:
        needed = n_rows * n_cols if n_panels is None else n_panels
        raise ValueError(f"ax holds {axes.size} axes, this picture needs {needed}.")
    return axes.flat[0].figure, axes


def grid_of_panels(ax, n, n_cols, xlabel, ylabel):
    """The figure and the axes of n panels, labelled at the edges; axes beyond the last panel are hidden.

    `n_cols` None is for a grid that is nearly square; for `ax` see `grid_of_axes`.
    """
    n_cols = int(np.ceil(np.sqrt(n))) if n_cols is None else min(n_cols, n)
    n_rows = -(-n // n_cols)
    size = (max(2.6 * n_cols + 0.4, 4.8), 2.2 * n_rows + (1.3 if n_cols < 3 else 0.9))
    figure, axes = grid_of_axes(ax, n_rows, n_cols, size, n_panels=n)
    for place, each in enumerate(axes.flat):
        each.set_visible(place < n)
        if place % axes.shape[1] == 0:
            each.set_ylabel(ylabel)
        if place < n <= place + axes.shape[1]:
            each.set_xlabel(xlabel)
    return figure, axes


def at_least_a_decade(limits):
    """Limits that hold a power of ten, so that the axis has a label."""
    low, high = limits
    widen = max(np.sqrt(12 * low / high), 1.0)
    return low / widen, high * widen


def tidy(ax):
    """Remove the upper and the right edge."""
    ax.spines[["top", "right"]].set_visible(False)


def legend_beside(ax, **kwargs):
    """A legend to the right of the axes if the figure's layout makes room for it, else inside."""
    if ax.figure.get_layout_engine() is None:
        return ax.legend(**{"loc": "best", "framealpha": 0.8, **kwargs})
    place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "frameon": False}
    return ax.legend(**{**place, **kwargs})


def legend_inside(ax, **kwargs):
    """A translucent legend where it hides least."""
    style = {"loc": "best", "fontsize": "small", "framealpha": 0.8, "edgecolor": "none"}
    return ax.legend(**{**style, **kwargs})


def legend_entries(axes):
    """Handles and labels of several axes, each label once."""
    entries = {}
    for ax in axes:
        handles, labels = ax.get_legend_handles_labels()
        entries.update(zip(labels, handles, strict=True))
    return list(entries.values()), list(entries)


def legend_of_panels(figure, axes, *, below):
    """One legend for a grid of panels: below it, or in its first panel."""
    if below:
        style = dict(ncols=2 if axes.shape[1] < 3 else 4, fontsize="small", frameon=False)
        figure.legend(*legend_entries(axes.flat), loc="outside lower center", **style)
    else:
        legend_inside(axes.flat[0])


def show_markers(legend, size, alpha=1.0):
    """Points in a legend at a size that can be seen, whatever their size in the picture is."""
    for handle in legend.legend_handles:
        if hasattr(handle, "set_sizes"):
            handle.set_sizes([size])
            handle.set_alpha(alpha)


# ------------------------------------------------------------------ numbers


def central_range(values, mass):
    """Ends of the range that holds the central part of this mass, along the first axis."""
    return np.quantile(values, [0.5 - mass / 2, 0.5 + mass / 2], axis=0)

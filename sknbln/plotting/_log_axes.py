"""Values of genes on log10 axes: densities of one, contours of two, zeros in a strip at the edge."""

from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter

from ..predictive import compositional_samples
from ..predictive._arguments import gene_positions
from ._common import (
    BLACK,
    BLUE,
    GREY,
    VERMILLION,
    fitted,
    gene_names,
    grid_of_axes,
    legend_entries,
    needed,
    readable_genes,
    show_markers,
    tidy,
)

_GRID = 80
_HISTOGRAM = 30
_MASSES = (0.5, 0.9)
#: width of the strip for zeros, of the width of the axis
_STRIP = 0.08
#: fewest points of the model that have contours, of all of them
_LEAST_MASS = 0.01
_POINTS_ALPHA = 0.4


# ------------------------------------------------------------------ values


class Kind(NamedTuple):
    """What the values are, in the picture's words."""

    axis: str
    model: str
    cells: str
    counts: bool  # whole numbers, and the model has zeros too


SHARES = Kind("log10 share", "model before count noise", "cells, counts / total", counts=False)
COUNTS = Kind("log10 count", "replicates", "cells", counts=True)


def compositions(display, estimator, X, genes, n_genes, n_samples, random_state):
    """Shares in the model's compositions, in the cells and in the pseudobulk, and names of the genes."""
    estimator = fitted(display, estimator)
    needed(display, X)
    if genes is None:
        genes = readable_genes(estimator, estimator._validated(X), n_genes)
    genes = gene_positions(estimator, genes)
    shares = compositional_samples(
        estimator, X, n_samples=n_samples, genes=genes, random_state=random_state
    )
    return shares.model, shares.cells, shares.pseudobulk, gene_names(estimator)[genes]


class _Values(NamedTuple):
    log: np.ndarray  # log10; -inf for zeros
    zero: np.ndarray

    @property
    def positive(self):
        return self.log[~self.zero]


class LogAxis:
    """One gene's values in the model and in the cells on a log10 axis, and where its zeros go.

    A count n is spread out evenly between ``log10(n - 1/2)`` and ``log10(n + 1/2)``: as it is, small counts
    have no density. `seed` has to differ between genes, so that pairs of them are spread out
    independently. `line` is one more value, NaN for none.
    """

    def __init__(self, kind, name, model, cells, line=np.nan, *, seed):
        rng = np.random.default_rng(seed)
        self.kind, self.name = kind, name
        self.model, self.cells = (_logarithms(v, kind.counts, rng) for v in (model, cells))
        with np.errstate(divide="ignore"):
            self.line = np.log10(line)
        ends = self.cells.positive
        if self.model.positive.size:
            ends = np.append(ends, np.quantile(self.model.positive, [0.001, 0.999]))
        low, high = (ends.min(), ends.max()) if ends.size else (0.0, 1.0)
        margin = 0.04 * max(high - low, 0.1)
        low, high = low - margin, high + margin
        self.has_zeros = bool(self.cells.zero.any() or self.model.zero.any())
        edge = low - _STRIP * (high - low) * self.has_zeros
        self.bins = np.linspace(low, high, _HISTOGRAM + 1)
        if kind.counts:  # between whole counts
            self.bins = np.unique(np.append(low, np.log10(np.ceil(10**self.bins - 0.5) + 0.5)))
        self.strip, self.limits = (edge, low), (edge, self.bins[-1])
        in_strip = edge + (low - edge) * rng.uniform(0.15, 0.85, self.cells.zero.size)
        self.drawn = np.where(self.cells.zero, in_strip, self.cells.log)

    @property
    def title(self):
        """The name, and the percentages of zeros if there are any."""
        if not self.has_zeros:
            return self.name
        zeros = f"{self.cells.zero.mean():.1%} of cells"
        if self.kind.counts:
            zeros += f",\n{self.model.zero.mean():.1%} of {self.kind.model}"
        return f"{self.name}\n{zeros} are 0"


def share_axes(display):
    """The `LogAxis` of each gene of a display of shares."""
    shares = display.model, display.cells
    return [
        LogAxis(SHARES, name, *(values[:, j] for values in shares), display.pseudobulk[j], seed=j)
        for j, name in enumerate(display.names)
    ]


def _logarithms(values, counts, rng):
    values = np.asarray(values, float)
    zero = values == 0
    with np.errstate(divide="ignore"):
        log = np.log10(values)
        if counts:
            low = np.log10(np.maximum(values - 0.5, values / 2))  # some counts are fractions
            step = np.log10(values + 0.5)[~zero] - low[~zero]
            log[~zero] = low[~zero] + step * rng.uniform(size=step.size)
    return _Values(log, zero)


def _density(points, kind):
    """Smoothed density of points (n, dims) on a grid around them, and the grid's coordinates.

    Kernel of Scott's width, at least half a cell of the grid. Counts end abruptly, at 1/2: what their kernel
    would spread beyond their ends is reflected.
    """
    n, dims = points.shape
    width = np.maximum(points.std(0) * n ** (-1 / (dims + 4)), 1e-4)
    beyond = 1e-4 if kind.counts else 4 * width
    limits = np.stack([points.min(0) - beyond, points.max(0) + beyond], axis=1)
    counts, edges = np.histogramdd(points, bins=_GRID, range=limits)
    cell = (limits[:, 1] - limits[:, 0]) / _GRID
    smooth = gaussian_filter(counts, np.maximum(width / cell, 0.5), mode="reflect")
    middles = [edge[:-1] + step / 2 for edge, step in zip(edges, cell, strict=True)]
    return smooth / (n * np.prod(cell)), middles


def _mass_levels(density, masses):
    """Values of the density above which these fractions of its mass lie, rising."""
    ordered = np.sort(density, axis=None)[::-1]
    mass = np.cumsum(ordered) / ordered.sum()
    return np.unique([ordered[np.searchsorted(mass, m)] for m in masses])


# ------------------------------------------------------------------ drawing


def draw_one(ax, x):
    """Density of the model and histogram of the cells, each of what is not zero."""
    peak = 0.0
    if x.model.positive.size:
        density, (middles,) = _density(x.model.positive[:, None], x.kind)
        density *= 1 - x.model.zero.mean()
        peak = density.max()
        label = x.kind.model
        ax.fill_between(middles, density, color=BLUE, alpha=0.35, linewidth=0, label=label)
    n = x.cells.zero.size
    height = np.histogram(x.cells.positive, x.bins)[0] / (n * np.diff(x.bins))
    ax.stairs(height, x.bins, color=BLACK, linewidth=1.0, label=f"{x.kind.cells} ({n})")
    _draw_line(ax.axvline, x, linewidth=1.2)
    # a model much narrower than the cells would hide them
    ax.set_ylim(0, 1.05 * (max(height.max(), min(peak, 4 * height.max())) or peak or 1.0))
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.set_title(x.title, fontsize="small")
    ax.set_xlim(x.strip[1], x.limits[1])
    tidy(ax)


def draw_two(ax, x, y):
    """Contours of the model over the cells."""
    many = x.drawn.size
    style = dict(s=float(np.clip(3000 / many, 1.5, 10)), alpha=_POINTS_ALPHA, linewidths=0)
    label = f"{x.kind.cells} ({many})"
    ax.scatter(x.drawn, y.drawn, color=BLACK, label=label, rasterized=many > 5000, **style)
    both, x_alone = ~x.model.zero & ~y.model.zero, ~x.model.zero & y.model.zero
    for rows, axes in (
        (both, (x, y)),
        (x_alone, (x,)),
        (x.model.zero & ~y.model.zero, (y,)),
    ):
        if rows.mean() >= _LEAST_MASS:
            _draw_contours(ax, x, y, rows, axes)
    masses = ", ".join(f"{mass:.0%}" for mass in _MASSES)
    ax.plot([], [], color=BLUE, linewidth=1.4, label=f"{x.kind.model}, {masses}")
    _draw_line(ax.axvline, x, linewidth=0.9, alpha=0.8)
    _draw_line(ax.axhline, y, linewidth=0.9, alpha=0.8)
    _mark_strip(ax.axvspan, x)
    _mark_strip(ax.axhspan, y)
    ax.set(xlim=x.limits, ylim=y.limits)
    tidy(ax)


def _draw_contours(ax, x, y, rows, positive):
    """Contours of these points of the model, along the strip of an axis on which they are zero."""
    points = np.column_stack([axis.model.log[rows] for axis in positive])
    density, middles = _density(points, x.kind)
    levels = _mass_levels(density, _MASSES)
    grid = [middles[positive.index(axis)] if axis in positive else axis.strip for axis in (x, y)]
    shape = [_GRID if axis in positive else 1 for axis in (x, y)]
    density = np.broadcast_to(density.reshape(shape), [len(places) for places in grid])
    ax.contourf(*grid, density.T, levels=[*levels, np.inf], colors=BLUE, alpha=0.2)
    ax.contour(*grid, density.T, levels=levels, colors=BLUE, linewidths=1.4)


def _draw_line(line, axis, **style):
    if np.isfinite(axis.line):
        line(axis.line, color=VERMILLION, label="pseudobulk", **style)


def _mark_strip(span, axis):
    if axis.has_zeros:
        label = "zeros (strips at the edge)"
        span(*axis.strip, color=GREY, alpha=0.15, linewidth=0, label=label)


def draw_corner(ax, genes, title=None):
    """A corner grid of the `LogAxis` of two genes or more: its figure and axes."""
    n = len(genes)
    if n < 2:
        raise ValueError(f"A corner grid takes two genes or more; found {n}.")
    side = 1.9 * n + 0.8
    figure, axes = grid_of_axes(ax, n, n, (side, side))
    for row, col in np.ndindex(n, n):
        each, x, y = axes[row, col], genes[col], genes[row]
        if col > row:
            each.set_visible(False)
        elif col == row:
            draw_one(each, x)
            _mark_strip(each.axvspan, x)
            each.set_xlim(x.limits)
        else:
            draw_two(each, x, y)
        if row < n - 1:
            each.tick_params(labelbottom=False)
        else:
            each.set_xlabel(f"{x.name}\n{x.kind.axis}", fontsize="small")
        if col == 0 and row > 0:
            each.set_ylabel(f"{y.name}\n{y.kind.axis}", fontsize="small")
        elif col > 0:
            each.tick_params(labelleft=False)
    _draw_legend(figure, axes, title, outside=ax is None and n == 2)
    return figure, axes


def _draw_legend(figure, axes, title, outside):
    """The legend in the empty half of the grid, or below it where that is a single panel."""
    entries = legend_entries(axes[np.tril_indices(len(axes), -1)])
    style = dict(
        title=title, fontsize="small", title_fontsize="small", alignment="left", frameon=False
    )
    if outside:
        legend = figure.legend(*entries, loc="outside lower center", **style)
    else:
        corner = axes[0, -1]
        corner.set_visible(True)
        corner.set_axis_off()
        legend = corner.legend(*entries, loc="upper right", **style)
        legend.set_in_layout(False)
    show_markers(legend, 16, _POINTS_ALPHA)

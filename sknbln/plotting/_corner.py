"""Corner grid of compositions."""

from numbers import Integral

import numpy as np
from scipy.ndimage import gaussian_filter
from sklearn.utils._param_validation import Interval

from .._nbln import NBLNEstimator
from ..predictive import compositional_samples
from ..predictive._arguments import gene_positions, validated_options
from ._common import (
    BLACK,
    BLUE,
    GREY,
    VERMILLION,
    fitted,
    gene_names,
    grid_of_axes,
    needed,
    show_markers,
    tidy,
)

_GRID = 80
_HISTOGRAM = 30
_MASSES = (0.5, 0.9)
#: width of the strip for zeros, of the width of the axis
_STRIP = 0.08
_POINTS_ALPHA = 0.4


class CompositionalCornerDisplay:
    """Corner grid of compositions: the model's contours against cells and pseudobulk.

    Each axis is log10 of a gene's share of its cell's counts. Below the diagonal, contours hold 50 % and
    90 % of the model's points, which are compositions *before* count noise; points are the cells'
    ``counts / total``, which scatter more, by that noise; lines cross at the pseudobulk. The diagonal shows
    the densities of single genes; the model's is cut off at four times the height of the cells'.

    A share of zero has no logarithm: such cells are drawn in a strip at the low end of the axis, spread
    out within it. The diagonal states their percentage, and its density is that of the other cells,
    scaled by their fraction.

    Parameters
    ----------
    model : ndarray of shape (n_samples, n_genes)
        Shares of the genes in the model's compositions.
    cells : ndarray of shape (n_cells, n_genes)
        Shares of the genes in the cells' counts.
    pseudobulk : ndarray of shape (n_genes,)
        Shares of the genes in the sum of all counts.
    names : sequence of str
        Names of the genes.

    Attributes
    ----------
    axes_ : ndarray of shape (n_genes, n_genes)
        Axes of the picture; those above the diagonal are hidden.
    figure_ : matplotlib Figure
        Figure of the picture.

    See Also
    --------
    sknbln.predictive.compositional_samples : The numbers.

    Examples
    --------
    >>> from sknbln import NBLNEstimator
    >>> from sknbln.datasets import make_nbln_counts
    >>> from sknbln.plotting import CompositionalCornerDisplay
    >>> X = make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=0).data
    >>> model = NBLNEstimator(latent_dim=2, cascade="marginal", random_state=0).fit(X)
    >>> display = CompositionalCornerDisplay.from_estimator(model, X, n_genes=3, n_samples=500)
    >>> display.axes_.shape
    (3, 3)
    """

    def __init__(self, model, cells, pseudobulk, names):
        self.model = model
        self.cells = cells
        self.pseudobulk = pseudobulk
        self.names = names

    @classmethod
    @validated_options(n_genes=[Interval(Integral, 2, None, closed="left")])
    def from_estimator(
        cls,
        estimator,
        X,
        *,
        genes=None,
        n_genes=4,
        n_samples=2000,
        random_state=None,
        ax=None,
    ):
        """Draw the compositions of a model and of the rows of X.

        Parameters
        ----------
        estimator : NBLNEstimator or NBVCPEstimator
            Fitted estimator.
        X : {array-like, sparse matrix} of shape (n_cells, n_genes)
            Counts.
        genes : array-like or None, default=None
            Names or positions of genes. None for the `n_genes` with the longest loadings (the most abundant
            for an `NBVCPEstimator`) among the genes counted in at least half of the cells; where these
            are too few, those counted in most cells.
        n_genes : int, default=4
            Number of genes if `genes` is None.
        n_samples : int, default=2000
            Number of points of the model.
        random_state : int, RandomState instance or None, default=None
            None for the estimator's own.
        ax : Figure, Axes, array of Axes or None, default=None
            See :meth:`plot`.

        Returns
        -------
        CompositionalCornerDisplay
            The display that was drawn.

        Raises
        ------
        ValueError
            When X is None, for unknown genes or a single one, and when X has no counts.
        """
        estimator = fitted(cls, estimator)
        needed(cls, X)
        if genes is None:
            genes = _readable_genes(estimator, X, n_genes)
        genes = gene_positions(estimator, genes)
        compositions = compositional_samples(
            estimator, X, n_samples=n_samples, genes=genes, random_state=random_state
        )
        names = gene_names(estimator)[genes]
        return cls(compositions.model, compositions.cells, compositions.pseudobulk, names).plot(
            ax=ax
        )

    def plot(self, ax=None):
        """Draw the picture.

        Parameters
        ----------
        ax : Figure, Axes, array of Axes or None, default=None
            None for a new figure; a figure, to which axes are added; one axes, which is divided; or
            an array of n_genes x n_genes axes.

        Returns
        -------
        CompositionalCornerDisplay
            The display itself.
        """
        n = len(self.names)
        if n < 2:
            raise ValueError(f"A corner grid takes two genes or more; found {n}.")
        side = 1.9 * n + 0.8
        self.figure_, self.axes_ = figure, axes = grid_of_axes(ax, n, n, (side, side))
        logs = [
            _Coordinate(self.model[:, j], self.cells[:, j], self.pseudobulk[j]) for j in range(n)
        ]
        for row, col in np.ndindex(n, n):
            each = axes[row, col]
            if col > row:
                each.set_visible(False)
            elif col == row:
                _draw_one(each, logs[row], self.names[row])
            else:
                _draw_two(each, logs[col], logs[row])
            each.set_xlim(logs[col].limits)
            if row < n - 1:
                each.tick_params(labelbottom=False)
            else:
                each.set_xlabel(f"{self.names[col]}\nlog10 share", fontsize="small")
            if col == 0 and row > 0:
                each.set_ylabel(f"{self.names[row]}\nlog10 share", fontsize="small")
            elif col > 0:
                each.tick_params(labelleft=False)
        _draw_legend(figure, axes, outside=ax is None and n == 2)
        return self


class _Coordinate:
    """One gene's shares on the logarithmic axis, and where its zeros go."""

    def __init__(self, model, cells, pseudobulk):
        self.zero = cells == 0
        with np.errstate(divide="ignore"):
            self.model, self.cells = np.log10(model), np.log10(cells)
            self.pseudobulk = np.log10(pseudobulk)
        seen = self.cells[~self.zero]
        ends = [np.quantile(self.model, [0.001, 0.999])]
        if seen.size:
            ends.append([seen.min(), seen.max()])
        low, high = np.min(ends), np.max(ends)
        margin = 0.04 * max(high - low, 0.1)
        self.low, high = low - margin, high + margin
        strip = _STRIP * (high - self.low) if self.zero.any() else 0.0
        self.limits = (self.low - strip, high)
        # golden-ratio steps: even, and not random
        self.drawn = self.cells.copy()
        steps = (np.arange(self.zero.sum()) * 0.6180339887) % 1.0
        self.drawn[self.zero] = self.low - strip * (0.15 + 0.7 * steps)


def _density(points):
    """Smoothed density of points (n, dims) on a grid around them, and the grid's coordinates.

    Kernel of Scott's width, at least half a cell of the grid.
    """
    n, dims = points.shape
    width = np.maximum(points.std(0) * n ** (-1 / (dims + 4)), 1e-4)
    limits = np.stack([points.min(0) - 4 * width, points.max(0) + 4 * width], axis=1)
    counts, edges = np.histogramdd(points, bins=_GRID, range=limits)
    cell = (limits[:, 1] - limits[:, 0]) / _GRID
    smooth = gaussian_filter(counts, np.maximum(width / cell, 0.5), mode="constant")
    middles = [edge[:-1] + step / 2 for edge, step in zip(edges, cell, strict=True)]
    return smooth / (n * np.prod(cell)), middles


def _mass_levels(density, masses):
    """Values of the density above which these fractions of its mass lie, rising."""
    ordered = np.sort(density, axis=None)[::-1]
    mass = np.cumsum(ordered) / ordered.sum()
    return np.unique([ordered[np.searchsorted(mass, m)] for m in masses])


def _draw_one(ax, x, name):
    """Density of the model, histogram of the cells that are not zero."""
    density, (middles,) = _density(x.model[:, None])
    ax.fill_between(middles, density, color=BLUE, alpha=0.35, linewidth=0)
    n = x.zero.size
    seen = x.cells[~x.zero]
    height, edges = np.histogram(seen, bins=_HISTOGRAM, range=(x.low, x.limits[1]))
    ax.stairs(height / (n * np.diff(edges)), edges, color=BLACK, linewidth=1.0)
    if np.isfinite(x.pseudobulk):
        ax.axvline(x.pseudobulk, color=VERMILLION, linewidth=1.2)
    # a model much narrower than the cells would hide them
    tallest = height.max() / (n * (edges[1] - edges[0]))
    ax.set_ylim(0, 1.05 * (max(tallest, min(density.max(), 4 * tallest)) or density.max()))
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    zeros = f"\n{x.zero.mean():.1%} of cells are 0" if x.zero.any() else ""
    ax.set_title(f"{name}{zeros}", fontsize="small")
    _mark_strip(ax, x, None)
    tidy(ax)


def _draw_two(ax, x, y):
    """Contours of the model over the cells and the pseudobulk."""
    many = x.zero.size
    style = dict(s=float(np.clip(3000 / many, 1.5, 10)), alpha=_POINTS_ALPHA, linewidths=0)
    label = f"cells, counts / total ({many})"
    ax.scatter(x.drawn, y.drawn, color=BLACK, label=label, rasterized=many > 5000, **style)
    density, (u, v) = _density(np.column_stack([x.model, y.model]))
    levels = _mass_levels(density, _MASSES)
    ax.contourf(u, v, density.T, levels=[*levels, np.inf], colors=BLUE, alpha=0.2)
    ax.contour(u, v, density.T, levels=levels, colors=BLUE, linewidths=1.4)
    text = ", ".join(f"{mass:.0%}" for mass in _MASSES)
    ax.plot([], [], color=BLUE, linewidth=1.4, label=f"model before count noise, {text}")
    for value, line, label in (
        (x.pseudobulk, ax.axvline, "pseudobulk"),
        (y.pseudobulk, ax.axhline, None),
    ):
        if np.isfinite(value):
            line(value, color=VERMILLION, linewidth=0.9, alpha=0.8, label=label)
    _mark_strip(ax, x, y)
    if x.zero.any() or y.zero.any():
        ax.fill_between([], [], color=GREY, alpha=0.15, label="zeros (strips at the edge)")
    ax.set_ylim(y.limits)
    tidy(ax)


def _mark_strip(ax, x, y):
    """Shade where zeros are drawn."""
    if x.zero.any():
        ax.axvspan(x.limits[0], x.low, color=GREY, alpha=0.15, linewidth=0)
    if y is not None and y.zero.any():
        ax.axhspan(y.limits[0], y.low, color=GREY, alpha=0.15, linewidth=0)


def _draw_legend(figure, axes, outside):
    """The legend in the empty half of the grid, or below it where that is a single panel."""
    drawn = {}
    for row, col in zip(*np.tril_indices(len(axes), -1), strict=True):
        handles, labels = axes[row, col].get_legend_handles_labels()
        drawn.update(zip(labels, handles, strict=True))
    entries = list(drawn.values()), list(drawn)
    if outside:
        legend = figure.legend(*entries, fontsize="small", loc="outside lower center")
    else:
        corner = axes[0, -1]
        corner.set_visible(True)
        corner.set_axis_off()
        legend = corner.legend(*entries, fontsize="small", loc="upper right")
        legend.set_in_layout(False)
    legend.set_frame_on(False)
    show_markers(legend, 16, _POINTS_ALPHA)


def _readable_genes(estimator, X, n_genes):
    """Positions of genes whose shares can be read: counted in many cells, and varying most."""
    counts = estimator._validated(X)
    seen = np.asarray((counts > 0).mean(axis=0)).ravel()
    often = np.flatnonzero(seen >= 0.5)
    if often.size < n_genes:
        return np.argsort(-seen, kind="stable")[:n_genes]
    if isinstance(estimator, NBLNEstimator):
        worth = np.linalg.norm(estimator.components_, axis=0)
    else:
        worth = np.asarray(counts.mean(axis=0)).ravel()
    return often[np.argsort(-worth[often], kind="stable")[:n_genes]]

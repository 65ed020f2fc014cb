"""Quantile residuals against uniform ones, variances against means, observed against predicted means."""

from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binom
from sklearn.utils import Bunch, check_random_state

from .._typing import CountsLike, Covariates, Panels, Seed
from ..predictive import predictive_check, quantile_residuals
from ..predictive._interface import PredictiveModel
from ._common import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    at_least_a_decade,
    central_range,
    fitted,
    grid_of_axes,
    legend_inside,
    needed,
    show_markers,
    tidy,
)

_GRID = 64
_BAND = 0.95
_SIMULATIONS = 2000
_CURVE_BINS = 15
#: fewest genes per point of a running median
_PER_BIN = 10
#: half the length of a gene's bar, in standard deviations
_ERRORS = 2


class CalibrationDisplay:
    r"""Whether counts are distributed as the model says.

    Left: for each gene, the empirical distribution of its randomized quantile residuals less the
    uniform one, :math:`F_g(q) - q`, summarized over genes by its median and by the central 50 % and 90 % of
    genes. The dashed band holds 95 % of the curves of genes with uniform residuals [1]_, each curve as a
    whole, and the title says how many genes leave it: about 5 % under the model, fewer on the rows of the
    fit. A curve that rises above 0 and then falls below it shows counts spread wider than predicted, the
    reverse narrower ones; a curve that stays above 0 shows counts smaller than predicted.

    Middle: variance against mean of each gene's counts, observed and in library-anchored replicates, with
    the medians over genes of similar mean, and the Poisson line.

    Right: observed over replicated mean of each gene, with the medians over genes of similar mean. A gene's
    bar holds two standard deviations of its mean over the replicates to each side of 1, and the title says
    how many genes leave it: about 5 % under the model, fewer on the rows of the fit. Genes without counts,
    observed or replicated, are left out of the picture, not of the title.

    Parameters
    ----------
    residuals : ndarray of shape (n_cells, n_genes)
        Quantile residuals, in (0, 1).
    observed, predicted : Bunch
        ``mean`` and ``variance``, each (n_genes,), of the counts and of replicates.
    spread : Bunch
        ``mean`` (n_genes,), the standard deviation of the means over replicates.

    Attributes
    ----------
    fraction_outside_ : float
        Fraction of the genes whose curve leaves the band.
    fraction_means_outside_ : float
        Fraction of the genes whose observed mean is more than two standard deviations from the replicated.
    axes_ : ndarray of shape (1, 3)
        Axes of the picture.
    figure_ : matplotlib Figure
        Figure of the picture.

    See Also
    --------
    sknbln.predictive.quantile_residuals : The residuals.
    sknbln.predictive.predictive_check : p-values of each gene's mean and variance, and the numbers.

    References
    ----------
    .. [1] T. Säilynoja, P.-C. Bürkner and A. Vehtari, "Graphical test for discrete uniformity and its
       applications in goodness-of-fit evaluation and multiple sample comparison", Statistics and
       Computing 32 (2022) 32.

    Examples
    --------
    >>> from sknbln import NBLNEstimator
    >>> from sknbln.datasets import make_nbln_counts
    >>> from sknbln.plotting import CalibrationDisplay
    >>> X = make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=0).data
    >>> model = NBLNEstimator(latent_dim=2, cascade="marginal", random_state=0).fit(X)
    >>> display = CalibrationDisplay.from_estimator(model, X, n_samples=20, random_state=0)
    >>> display.residuals.shape
    (150, 24)
    """

    def __init__(
        self, residuals: np.ndarray, observed: Bunch, predicted: Bunch, spread: Bunch
    ) -> None:
        self.residuals = residuals
        self.observed = observed
        self.predicted = predicted
        self.spread = spread

    @classmethod
    def from_estimator(
        cls,
        estimator: PredictiveModel,
        X: CountsLike,
        *,
        genes: ArrayLike | None = None,
        n_samples: int = 100,
        random_state: Seed = None,
        covariates: Covariates | None = None,
        offset: ArrayLike | None = None,
        ax: Panels | None = None,
    ) -> Self:
        """Draw the calibration of a fitted estimator on the rows of X.

        Parameters
        ----------
        estimator : NBLNEstimator or NBVCPEstimator
            Fitted estimator.
        X : {array-like, sparse matrix} of shape (n_cells, n_genes)
            Counts, preferably rows that the fit has not seen.
        genes : array-like or None, default=None
            Names or positions of genes; None for all.
        n_samples : int, default=100
            Number of replicates, for the residuals and again for variances and means.
        random_state : int, RandomState instance or None, default=None
            None for the estimator's own.
        covariates, offset
            Of the rows of X, as in `fit`.
        ax : Figure, Axes, array of Axes or None, default=None
            See :meth:`plot`.

        Returns
        -------
        CalibrationDisplay
            The display that was drawn.

        Raises
        ------
        ValueError
            When X is None, and for unknown genes.
        """
        estimator = fitted(cls, estimator)
        needed(cls, X)
        if random_state is None:
            random_state = estimator.random_state
        rng = check_random_state(random_state)  # one stream for both
        known = dict(covariates=covariates, offset=offset)
        options = dict(n_samples=n_samples, genes=genes, random_state=rng, **known)
        residuals = quantile_residuals(estimator, X, **options)
        check = predictive_check(estimator, X, **options)
        return cls(residuals, check.observed, check.predicted, check.spread).plot(ax=ax)

    def plot(self, ax: Panels | None = None) -> Self:
        """Draw the picture.

        Parameters
        ----------
        ax : Figure, Axes, array of Axes or None, default=None
            None for a new figure; a figure, to which axes are added; one axes, which is divided; or
            three axes.

        Returns
        -------
        CalibrationDisplay
            The display itself.
        """
        self.figure_, self.axes_ = grid_of_axes(ax, 1, 3, (14.0, 4.0))
        self._draw_residuals(self.axes_[0, 0])
        _draw_variances(self.axes_[0, 1], self.observed, self.predicted)
        self._draw_means(self.axes_[0, 2])
        for each in self.axes_.flat:
            tidy(each)
        return self

    def _draw_residuals(self, ax):
        residuals = np.asarray(self.residuals)
        n_cells, n_genes = residuals.shape
        # steps of whole cells: a fraction of cells cannot follow q between them
        grid = np.unique(np.round(np.linspace(0, n_cells, _GRID + 1))) / n_cells
        below = np.stack([np.searchsorted(np.sort(q), grid, side="right") for q in residuals.T])
        low, high = _simultaneous_band(n_cells, grid)
        self.fraction_outside_ = float(np.mean(np.any((below < low) | (below > high), axis=1)))
        curves = below / n_cells - grid
        if n_genes >= 10:
            for level, alpha in ((0.9, 0.2), (0.5, 0.4)):
                ends = central_range(curves, level)
                ax.fill_between(
                    grid, *ends, color=BLUE, alpha=alpha, linewidth=0, label=f"{level:.0%} of genes"
                )
            ax.plot(grid, np.median(curves, axis=0), color=BLUE, label="median gene")
        else:
            for i, curve in enumerate(curves):
                ax.plot(grid, curve, color=BLUE, linewidth=1.0, label="" if i else "each gene")
        style = dict(color=BLACK, linestyle="--", linewidth=1.0)
        ax.plot(grid, low / n_cells - grid, label=f"{_BAND:.0%} band of a uniform gene", **style)
        ax.plot(grid, high / n_cells - grid, **style)
        ax.axhline(0, color=GREY, linewidth=0.8)
        ax.set_xlim(0, 1)
        ax.set(xlabel="quantile residual q", ylabel="F(q) - q")
        title = f"{self.fraction_outside_:.1%} of {n_genes} genes leave the band"
        ax.set_title(f"{title} ({1 - _BAND:.0%} expected)", fontsize="medium")
        # room for the legend above the curves
        reach = np.abs(ax.get_ylim()).max()
        ax.set_ylim(-reach, 1.65 * reach)
        legend_inside(ax, loc="upper center", ncols=2)

    def _draw_means(self, ax):
        error = _ERRORS * self.spread.mean
        outside = np.abs(self.observed.mean - self.predicted.mean) > error
        self.fraction_means_outside_ = float(np.mean(outside))
        positive = (self.observed.mean > 0) & (self.predicted.mean > 0)
        mean, error = self.predicted.mean[positive], error[positive]
        ratio = self.observed.mean[positive] / mean
        high = 1 + error / mean
        reach = 1.1 * max(
            np.max(ratio, initial=1), np.max(1 / ratio, initial=1), np.max(high, initial=1)
        )
        low = np.maximum(1 - error / mean, 1e-9)  # a logarithmic axis has no 0
        label = f"{_ERRORS} standard deviations of replicates"
        ax.vlines(mean, low, high, color=ORANGE, alpha=0.5, label=label)
        ax.axhline(1, color=GREY, linewidth=0.8)
        ax.scatter(mean, ratio, color=BLACK, label="each gene", **_point_style(mean.size))
        _draw_running_median(ax, mean, ratio, color=BLACK, marker="o", label="running median")
        ax.set(xscale="log", yscale="log", xlabel="mean count, replicated")
        ax.set(ylabel="observed / replicated mean count")
        # room for the legend above the genes
        ax.set(xlim=at_least_a_decade(ax.get_xlim()), ylim=(1 / reach, reach**1.65))
        _set_ticks(ax.yaxis, reach)
        title = f"{self.fraction_means_outside_:.1%} of {outside.size} genes leave their bar (5% expected)"
        ax.set_title(title, fontsize="medium")
        show_markers(legend_inside(ax, loc="upper center", ncols=2), 20)


def _simultaneous_band(n, grid):
    """Counts of n uniform variables below each grid point: limits that hold 95 % of whole curves.

    Binomial quantiles at one level for all points; the level comes from a simulation of fixed seed.
    """
    rng = np.random.default_rng(0)
    steps = np.diff(grid)
    below = np.cumsum(rng.multinomial(n, steps / steps.sum(), size=_SIMULATIONS), axis=1)[:, :-1]
    inner = grid[1:-1]
    tail = np.minimum(binom.cdf(below, n, inner), binom.sf(below - 1, n, inner))
    level = np.quantile(tail.min(axis=1), 1 - _BAND, method="lower")
    low, high = binom.ppf(level, n, inner), binom.isf(level, n, inner)
    return np.concatenate([[0], low, [n]]), np.concatenate([[0], high, [n]])


def _draw_variances(ax, observed, predicted):
    for what, colour, marker, name in (
        (observed, BLACK, "o", "observed"),
        (predicted, ORANGE, "D", "replicated"),
    ):
        positive = (what.mean > 0) & (what.variance > 0)
        mean, variance = what.mean[positive], what.variance[positive]
        style = dict(color=colour, marker=marker)
        points = _point_style(mean.size)
        ax.scatter(mean, variance, label=f"{name}, each gene", **points, **style)
        _draw_running_median(ax, mean, variance, label=f"{name}, running median", **style)
    ends = np.array(ax.get_xlim())
    ends[0] = max(ends[0], np.min(observed.mean[observed.mean > 0], initial=np.inf))
    ax.plot(ends, ends, color=GREY, linestyle="--", linewidth=1.0, label="Poisson, variance = mean")
    ax.set(xscale="log", yscale="log")
    ax.set(xlim=at_least_a_decade(ax.get_xlim()), ylim=at_least_a_decade(ax.get_ylim()))
    ax.set(xlabel="mean count", ylabel="variance of counts over cells")
    show_markers(legend_inside(ax, loc="upper left"), 20)


def _point_style(n):
    """Points that can be told apart, many or few."""
    few = 200 / max(n, 1)
    return dict(s=np.clip(10 * few, 4, 20), alpha=np.clip(few, 0.4, 0.9), linewidths=0)


def _set_ticks(axis, reach):
    """Ticks of a logarithmic axis of ratios, of which most are near 1, as plain numbers."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    steps = (1, 1.5, 2, 3, 5, 7) if reach < 10 else (1,)
    axis.set_major_locator(MaxNLocator(8) if reach < 1.4 else LogLocator(subs=steps))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def _draw_running_median(ax, x, y, **style):
    """Medians of groups of genes of similar x; nothing for few genes."""
    n_bins = min(_CURVE_BINS, x.size // _PER_BIN)
    if n_bins >= 3:
        groups = np.array_split(np.argsort(x), n_bins)
        medians = [[np.median(values[group]) for group in groups] for values in (x, y)]
        ax.plot(*medians, markersize=3, linewidth=1.6, zorder=3, **style)  # above all points

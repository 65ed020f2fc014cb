"""Quantile residuals against uniform ones, and the variance of counts against their mean."""

import numpy as np
from scipy.stats import binom
from sklearn.utils import check_random_state

from ..predictive import predictive_check, quantile_residuals
from ._common import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
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
#: fewest genes per point of the mean-variance curve
_PER_BIN = 10


class CalibrationDisplay:
    r"""Whether counts are distributed as the model says.

    Left: for each gene, the empirical distribution of its randomized quantile residuals less the
    uniform one, :math:`F_g(q) - q`, summarized over genes by its median and by the central 50 % and 90 % of
    genes. The dashed band holds 95 % of the curves of genes with uniform residuals [1]_, each curve as a
    whole, and the title says how many genes leave it: about 5 % under the model, fewer on the rows of the
    fit. A curve that rises above 0 and then falls below it shows counts spread wider than predicted, the
    reverse narrower ones; a curve that stays above 0 shows counts smaller than predicted.

    Right: variance against mean of each gene's counts, observed and in library-anchored replicates, with
    the medians over genes of similar mean, and the Poisson line.

    Parameters
    ----------
    residuals : ndarray of shape (n_cells, n_genes)
        Quantile residuals, in (0, 1).
    observed, predicted : Bunch
        ``mean`` and ``variance``, each (n_genes,), of the counts and of replicates.

    Attributes
    ----------
    fraction_outside_ : float
        Fraction of the genes whose curve leaves the band.
    axes_ : ndarray of shape (1, 2)
        Axes of the picture.
    figure_ : matplotlib Figure
        Figure of the picture.

    See Also
    --------
    sknbln.predictive.quantile_residuals : The residuals.
    sknbln.predictive.predictive_check : p-values of each gene's mean and variance.

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

    def __init__(self, residuals, observed, predicted):
        self.residuals = residuals
        self.observed = observed
        self.predicted = predicted

    @classmethod
    def from_estimator(
        cls,
        estimator,
        X,
        *,
        genes=None,
        n_samples=100,
        random_state=None,
        covariates=None,
        offset=None,
        ax=None,
    ):
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
            Number of replicates, for the residuals and again for the variances.
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
        return cls(residuals, check.observed, check.predicted).plot(ax=ax)

    def plot(self, ax=None):
        """Draw the picture.

        Parameters
        ----------
        ax : Figure, Axes, array of Axes or None, default=None
            None for a new figure; a figure, to which axes are added; one axes, which is divided; or
            two axes.

        Returns
        -------
        CalibrationDisplay
            The display itself.
        """
        self.figure_, self.axes_ = grid_of_axes(ax, 1, 2, (9.6, 4.0))
        self._draw_residuals(self.axes_[0, 0])
        _draw_variances(self.axes_[0, 1], self.observed, self.predicted)
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
        few = 200 / max(mean.size, 1)
        points = dict(s=np.clip(10 * few, 4, 20), alpha=np.clip(few, 0.4, 0.9), linewidths=0)
        ax.scatter(mean, variance, label=f"{name}, each gene", **points, **style)
        x, y = _running_median(mean, variance)
        if len(x):
            curve = dict(markersize=3, linewidth=1.6, zorder=3)  # above all points
            ax.plot(x, y, label=f"{name}, running median", **curve, **style)
    ends = np.array(ax.get_xlim())
    ends[0] = max(ends[0], np.min(observed.mean[observed.mean > 0], initial=np.inf))
    ax.plot(ends, ends, color=GREY, linestyle="--", linewidth=1.0, label="Poisson, variance = mean")
    ax.set(xscale="log", yscale="log")
    ax.set(xlim=_at_least_a_decade(ax.get_xlim()), ylim=_at_least_a_decade(ax.get_ylim()))
    ax.set(xlabel="mean count", ylabel="variance of counts over cells")
    show_markers(legend_inside(ax, loc="upper left"), 20)


def _at_least_a_decade(limits):
    """Limits that hold a power of ten, so that the axis has a label."""
    low, high = limits
    widen = max(np.sqrt(12 * low / high), 1.0)
    return low / widen, high * widen


def _running_median(x, y):
    """Medians of groups of genes of similar x; empty for few genes."""
    n_bins = min(_CURVE_BINS, x.size // _PER_BIN)
    if n_bins < 3:
        return [], []
    groups = np.array_split(np.argsort(x), n_bins)
    return [np.median(x[g]) for g in groups], [np.median(y[g]) for g in groups]

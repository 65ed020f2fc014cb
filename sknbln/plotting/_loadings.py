"""Norms of the components, and how their number was found."""

from typing import Any, Self

import numpy as np

from .._nbln import NBLNEstimator
from .._typing import Panels
from ..solver.gauge import RANK_FRACTION, SMALLEST_LOADING
from ._common import (
    BLUE,
    GREY,
    ORANGE,
    SKY,
    VERMILLION,
    fitted,
    grid_of_axes,
    legend_beside,
    legend_inside,
    tidy,
)

#: values below this fraction of the threshold are drawn on the lower edge
_LOWEST = 0.1
#: share of the axes above the data that is left to the legend
_FOR_LEGEND = 0.4
#: factor between the outermost values and the ends of the axis
_MARGIN = 1.2


class LoadingsSpectrumDisplay:
    r"""Norms of the components, with the effective rank, and how the number of factors was found.

    A component counts when its norm :math:`|W_{\perp k}|` exceeds 5 % of the largest, and 0.01 nats per gene
    (root mean square). The scales of a loadings prior are drawn as the norms that they stand for,
    :math:`\sigma_k \sqrt{G - 1}`.

    Where the fit looked for the number of factors, panels to the left show how it was found. The first is a
    scree plot: the eigenvalues of the scores at the source's fit, the band from the smallest to the largest
    of the permuted ones, and the threshold above which an eigenvalue counts as a factor. With 200 rows or
    more the second has the information of these factors' columns after a few sweeps, and the edge of the
    noise. A column below it was dropped, unless its few largest genes are above the noise of so few genes.

    Parameters
    ----------
    column_norms : ndarray of shape (n_components,)
        Norms of the rows of ``components_``, nats.
    effective_rank : int
        Number of components that count.
    n_genes : int
        Number of genes G.
    sigma_k : ndarray of shape (n_components,) or None, default=None
        Scales of the columns under the loadings prior, nats per gene.
    prior : str, default="none"
        Name of the loadings prior.
    rank_diagnostics : dict or None, default=None
        How the number of factors was found, as the attribute ``rank_diagnostics_`` has it; None where it
        was given.

    Attributes
    ----------
    threshold : float
        Norm above which a component counts, nats.
    axes_ : ndarray of shape (1, n_panels)
        Axes of the picture: scores, columns, norms; of the first two those that there are.
    ax_ : matplotlib Axes
        Axes of the norms, the last of `axes_`.
    figure_ : matplotlib Figure
        Figure of the picture.

    See Also
    --------
    NBLNEstimator : Its attributes ``w_prior_diagnostics_`` and ``rank_diagnostics_`` have the numbers.

    Examples
    --------
    >>> from sknbln import NBLNEstimator
    >>> from sknbln.datasets import make_nbln_counts
    >>> from sknbln.plotting import LoadingsSpectrumDisplay
    >>> X = make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=0).data
    >>> model = NBLNEstimator(random_state=0).fit(X)
    >>> display = LoadingsSpectrumDisplay.from_estimator(model)
    >>> display.column_norms.shape
    (2,)
    >>> display.axes_.shape  # scores and norms
    (1, 2)
    """

    def __init__(
        self,
        column_norms: np.ndarray,
        effective_rank: int,
        n_genes: int,
        *,
        sigma_k: np.ndarray | None = None,
        prior: str = "none",
        rank_diagnostics: dict[str, Any] | None = None,
    ) -> None:
        self.column_norms = column_norms
        self.effective_rank = effective_rank
        self.n_genes = n_genes
        self.sigma_k = sigma_k
        self.prior = prior
        self.rank_diagnostics = rank_diagnostics

    @property
    def threshold(self) -> float:
        """Norm above which a component counts, nats."""
        largest = RANK_FRACTION * np.max(self.column_norms, initial=0.0)
        return float(max(largest, SMALLEST_LOADING * np.sqrt(self.n_genes)))

    @classmethod
    def from_estimator(cls, estimator: NBLNEstimator, *, ax: Panels | None = None) -> Self:
        """Draw the spectrum of a fitted estimator.

        Parameters
        ----------
        estimator : NBLNEstimator
            Fitted estimator.
        ax : Figure, Axes, array of Axes or None, default=None
            Where to draw: see :meth:`plot`.

        Returns
        -------
        LoadingsSpectrumDisplay
            The display that was drawn.

        Raises
        ------
        TypeError
            When the estimator is not an NBLNEstimator.
        """
        estimator = fitted(cls, estimator, needs_loadings=True)
        diagnostics = estimator.w_prior_diagnostics_
        return cls(
            diagnostics["column_frobenius_compositional"],
            diagnostics["effective_rank"],
            estimator.n_features_in_,
            sigma_k=diagnostics.get("sigma_k"),
            prior=diagnostics["strategy_type"],
            rank_diagnostics=estimator.rank_diagnostics_,
        ).plot(ax=ax)

    def plot(self, ax: Panels | None = None) -> Self:
        """Draw the picture.

        Parameters
        ----------
        ax : Figure, Axes, array of Axes or None, default=None
            None for a new figure; a figure, to which axes are added; one axes, which is divided
            where more are needed; or as many axes as the picture needs: one where the number of factors was
            given, else two, or three where columns were looked at after a few sweeps.

        Returns
        -------
        LoadingsSpectrumDisplay
            The display itself.
        """
        panels, found = [], self.rank_diagnostics
        if found is not None:
            panels.append(_draw_scores)
            if found["column_information"] is not None:
                panels.append(_draw_information)
        n_panels = len(panels) + 1
        size = (3.3 * len(panels) + 6.8, 3.9)
        self.figure_, self.axes_ = grid_of_axes(ax, 1, n_panels, size)
        for each, draw in zip(self.axes_.flat, panels, strict=False):
            draw(each, found)
        self.ax_ = self.axes_.flat[-1]
        self._draw_norms(self.ax_)
        if panels:
            self.ax_.set_title("components of the fit", fontsize="medium")
        for each in self.axes_.flat:
            tidy(each)
        return self

    def _draw_norms(self, ax):
        """Norms of the components, their threshold, and the scales of the prior."""
        norms = np.asarray(self.column_norms)
        floor = _LOWEST * self.threshold
        counted = np.arange(norms.size) < self.effective_rank
        _draw_ordered(ax, norms, counted, floor, ("counted", "not counted"))
        scale = np.empty(0)
        if self.sigma_k is not None:
            scale = np.asarray(self.sigma_k) * np.sqrt(max(self.n_genes - 1, 1))
            label = rf"prior scale $\sigma_k\sqrt{{G-1}}$, {self.prior.replace('_', ' ')}"
            places = np.arange(1, norms.size + 1) + 0.25
            _points(ax, places, scale, floor, "x", label, color=ORANGE, markeredgewidth=1.8)
        relative = self.threshold > SMALLEST_LOADING * np.sqrt(self.n_genes)
        text = (
            f"{RANK_FRACTION:.0%} of the largest"
            if relative
            else f"{SMALLEST_LOADING} nats per gene"
        )
        ax.axhline(self.threshold, color=VERMILLION, linestyle="--", linewidth=1.2, label=text)
        rank = f"effective rank {self.effective_rank} of {norms.size}"
        ax.axvline(self.effective_rank + 0.5, color=GREY, linestyle=":", linewidth=1.4, label=rank)
        ax.set_ylim(bottom=floor)
        _finish_axis(ax, [*norms, *scale])
        ax.set(xlabel="component", ylabel="norm of the loadings over genes (nats)")
        legend_beside(ax)


def _draw_scores(ax, found):
    """Scree plot of the scores, with the band of the permuted ones and the threshold."""
    values, null = np.asarray(found["score_eigenvalues"]), np.asarray(found["null_eigenvalues"])
    threshold, rank = found["null_threshold"], found["score_rank"]
    # 1 is the mean of all eigenvalues; without counts in any gene all are 0, the threshold too
    floor = _set_limits(ax, [*values, *null, threshold], threshold or 1.0)
    _draw_ordered(ax, values, np.arange(values.size) < rank, floor, ("counted", "not counted"))
    label = f"largest of {null.size} permutations"
    ax.axhspan(null.min(), null.max(), color=SKY, alpha=0.4, linewidth=0, label=label)
    label = f"threshold {threshold:.3g}"
    ax.axhline(threshold, color=VERMILLION, linestyle="--", linewidth=1.2, label=label)
    label = f"{rank} factor{'s' * (rank != 1)}"
    ax.axvline(rank + 0.5, color=GREY, linestyle=":", linewidth=1.4, label=label)
    _finish_axis(ax, values)
    ax.set_title("scores at the source's fit", fontsize="medium")
    ax.set(xlabel="factor", ylabel="eigenvalue of the scores")
    legend_inside(ax, loc="upper right")


def _draw_information(ax, found):
    """Information of the columns after a few sweeps, with the edge of the noise."""
    values, edge = np.asarray(found["column_information"]), found["noise_edge"]
    floor = _set_limits(ax, [*values, edge], edge)
    _draw_ordered(ax, values, values > edge, floor, ("above the edge", "below the edge"))
    label = f"edge of the noise {edge:.3g}"
    ax.axhline(edge, color=VERMILLION, linestyle="--", linewidth=1.2, label=label)
    _finish_axis(ax, values)
    ax.set_title("columns after a few sweeps", fontsize="medium")
    ax.set(xlabel="column", ylabel=r"information, $w^\top B w$")
    legend_inside(ax, loc="upper right")


def _set_limits(ax, values, threshold):
    """Limits of a logarithmic axis that leave the upper part to the legend; the lower one.

    It is just below the values, but not far below the threshold.
    """
    low, high = max(min(values) / _MARGIN, _LOWEST * threshold), max(*values, threshold) * _MARGIN
    ax.set_yscale("log")
    ax.set_ylim(low, high * (high / low) ** (_FOR_LEGEND / (1.0 - _FOR_LEGEND)))
    return low


def _draw_ordered(ax, values, counted, floor, labels):
    """Descending values on a logarithmic axis, those that count as full points."""
    index = np.arange(1, values.size + 1)
    ax.plot(index, np.maximum(values, floor), color=BLUE, linewidth=0.8, alpha=0.4)
    for rows, face, label in zip((counted, ~counted), (BLUE, "white"), labels, strict=True):
        _points(ax, index[rows], values[rows], floor, "o", label, color=BLUE, markerfacecolor=face)
    ax.set_yscale("log")
    beside = max(0.6, 0.018 * values.size)  # half a point, also where there are many
    ax.set_xlim(1 - beside, values.size + beside + 0.1)
    ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def _finish_axis(ax, values):
    """Plain numbers on the logarithmic axis, and a legend's entry for values below it."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    if min(values, default=np.inf) < low:
        ax.plot([], [], "v", color=GREY, markersize=5, label="below the axis")


def _points(ax, x, y, floor, marker, label, **style):
    """Points, those below the floor as triangles on it."""
    inside = y >= floor
    if inside.any():
        ax.plot(x[inside], y[inside], marker, markersize=6, label=label, **style)
    if not inside.all():
        style = {**style, "markersize": 5, "clip_on": False, "zorder": 3}
        ax.plot(x[~inside], np.full(np.sum(~inside), floor), "v", **style)

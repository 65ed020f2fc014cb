"""Histograms of counts, observed and predicted."""

from numbers import Integral
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.utils import Bunch
from sklearn.utils._param_validation import Interval

from .._typing import Capture, CountsLike, Covariates, Latent, Level, Panels, Seed
from ..predictive._arguments import prepare, validated_options
from ..predictive._interface import PredictiveModel
from ._common import (
    BLACK,
    BLUE,
    N_COLS,
    central_range,
    fitted,
    gene_names,
    grid_of_panels,
    legend_of_panels,
    needed,
    tidy,
)

#: most bins; the last one is open
_MOST_BINS = 24
_LEVELS = (0.9, 0.5)
#: width of a letter of a tick's label, as a fraction of the axis
_LETTER = 0.035


class PPCDisplay:
    """Histograms of counts, observed and posterior-predictive, one panel for a gene.

    Points are the fractions of cells with that count; bands hold 50 % and 90 % of the same fractions over
    replicated data sets, and the line is their median. Bins are one count wide, or several where counts
    are large; the last one holds all larger counts. The vertical axis is a square root, on which small
    and large fractions have about the same spread (a rootogram [1]_).

    Parameters
    ----------
    panels : list of Bunch
        One for each gene: ``name``; ``mean``, observed; ``edges`` (n_bins + 1,), whole numbers, the last inf;
        ``observed`` (n_bins,) fractions of cells; ``predicted`` (n_samples, n_bins).
    level : str, default=""
        Level of the replicates, for the title.

    Attributes
    ----------
    axes_ : ndarray of shape (n_rows, n_cols)
        Axes of the picture; those beyond the last gene are hidden.
    figure_ : matplotlib Figure
        Figure of the picture.

    See Also
    --------
    sknbln.predictive.posterior_predictive : The replicates.

    References
    ----------
    .. [1] C. Kleiber and A. Zeileis, "Visualizing count data regressions using rootograms",
       The American Statistician 70 (2016) 296-303.

    Examples
    --------
    >>> from sknbln import NBLNEstimator
    >>> from sknbln.datasets import make_nbln_counts
    >>> from sknbln.plotting import PPCDisplay
    >>> X = make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=0).data
    >>> model = NBLNEstimator(latent_dim=2, cascade="marginal", random_state=0).fit(X)
    >>> display = PPCDisplay.from_estimator(model, X, n_genes=6, n_samples=20)
    >>> display.axes_.shape
    (2, 3)
    """

    def __init__(self, panels: list[Bunch], *, level: str = "") -> None:
        self.panels = panels
        self.level = level

    @classmethod
    @validated_options(
        n_genes=[Interval(Integral, 1, None, closed="left")],
        n_cols=N_COLS,
    )
    def from_estimator(
        cls,
        estimator: PredictiveModel,
        X: CountsLike,
        *,
        genes: ArrayLike | None = None,
        n_genes: int = 9,
        level: Level = "library_anchored",
        capture: Capture = "posterior",
        latent: Latent = "posterior",
        n_samples: int = 100,
        random_state: Seed = None,
        covariates: Covariates | None = None,
        offset: ArrayLike | None = None,
        n_cols: int | None = None,
        ax: Panels | None = None,
    ) -> Self:
        """Draw observed counts against replicated ones.

        Parameters
        ----------
        estimator : NBLNEstimator or NBVCPEstimator
            Fitted estimator.
        X : {array-like, sparse matrix} of shape (n_cells, n_genes)
            Counts.
        genes : array-like or None, default=None
            Names or positions of genes. None for `n_genes` of the genes that have counts, at even
            steps from the least to the most abundant.
        n_genes : int, default=9
            Number of genes if `genes` is None.
        level, capture, latent, n_samples, random_state
            See :func:`sknbln.predictive.posterior_predictive`.
        covariates, offset
            Of the rows of X, as in `fit`.
        n_cols, ax
            See :meth:`plot`.

        Returns
        -------
        PPCDisplay
            The display that was drawn.

        Raises
        ------
        ValueError
            When X is None, and for unknown genes.
        """
        estimator = fitted(cls, estimator)
        needed(cls, X)
        options: dict[str, Any] = dict(level=level, capture=capture, latent=latent)
        options |= dict(covariates=covariates, offset=offset)
        replicates, chosen = prepare(estimator, X, genes, n_samples, random_state, **options)
        counts = replicates.X
        mean = np.asarray(counts.mean(axis=0)).ravel()
        if genes is None:
            chosen = _spread(mean, n_genes)
        observed = counts[:, chosen].toarray()
        edges = [_edges(column) for column in observed.T]
        predicted: list[list[np.ndarray]] = [[] for _ in chosen]
        # one replicate at a time: only its histograms are kept
        for s in range(n_samples):
            replicate = replicates.counts(s, chosen)
            for j, fractions in enumerate(predicted):
                fractions.append(_fractions(replicate[:, j], edges[j]))
        names = gene_names(estimator)
        panels = [
            Bunch(
                name=names[g],
                mean=mean[g],
                edges=edges[j],
                observed=_fractions(observed[:, j], edges[j]),
                predicted=np.array(predicted[j]),
            )
            for j, g in enumerate(chosen)
        ]
        return cls(panels, level=level).plot(n_cols=n_cols, ax=ax)

    @validated_options(n_cols=N_COLS)
    def plot(self, ax: Panels | None = None, *, n_cols: int | None = None) -> Self:
        """Draw the picture.

        Parameters
        ----------
        ax : Figure, Axes, array of Axes or None, default=None
            None for a new figure; a figure, to which axes are added; one axes, which is divided; or
            an array of as many axes as there are genes, or more.
        n_cols : int or None, default=None
            Number of columns of the grid; None for a grid that is nearly square.

        Returns
        -------
        PPCDisplay
            The display itself.
        """
        n = len(self.panels)
        labels = "count", "fraction of cells"
        self.figure_, self.axes_ = figure, axes = grid_of_panels(ax, n, n_cols, *labels)
        for each, panel in zip(axes.flat, self.panels, strict=False):
            _draw_panel(each, panel)
        if ax is None:
            n_samples = len(self.panels[0].predicted)
            level = self.level.replace("_", " ")
            what = ", ".join(filter(None, ["Posterior predictive counts", level]))
            separator = "\n" if axes.shape[1] < 3 else ", "
            figure.suptitle(f"{what}{separator}{n_samples} replicates", fontsize="medium")
        legend_of_panels(figure, axes, below=ax is None)
        return self


def _spread(mean, n_genes):
    """Positions of genes at even steps of rank, from the least to the most abundant that were counted."""
    order = np.argsort(mean, kind="stable")
    order = order[mean[order] > 0]
    if order.size == 0:
        raise ValueError("X has no counts: there are no genes to choose. Name them by genes=.")
    return order[np.unique(np.linspace(0, order.size - 1, min(n_genes, order.size)).astype(int))]


def _edges(values):
    """Edges of bins of equal whole width that hold nearly all of the values; the last bin is open."""
    top = max(int(np.ceil(1.25 * np.quantile(values, 0.99, method="lower"))), 3)
    width = -(-(top + 1) // (_MOST_BINS - 1))
    last = width * -(-(top + 1) // width)
    return np.append(np.arange(0.0, last + width / 2, width), np.inf)


def _fractions(values, edges):
    """Fraction of the values in each bin."""
    place = np.searchsorted(edges, values, side="right") - 1
    return np.bincount(place, minlength=edges.size - 1) / values.size


def _draw_panel(ax, panel):
    starts = panel.edges[:-1]
    width = starts[1] - starts[0]
    # a bin of whole numbers is drawn half a unit to the left: a count sits in the middle of its bin
    drawn = np.append(starts, starts[-1] + width) - 0.5
    for level, alpha in zip(_LEVELS, (0.25, 0.45), strict=True):
        low, high = central_range(panel.predicted, level)
        label = f"predicted, {level:.0%} of replicates"
        ax.stairs(
            high, drawn, baseline=low, fill=True, color=BLUE, alpha=alpha, linewidth=0, label=label
        )
    median = np.median(panel.predicted, axis=0)
    ax.stairs(median, drawn, baseline=None, color=BLUE, linewidth=1.2, label="predicted, median")
    centres = (drawn[1:] + drawn[:-1]) / 2
    ax.plot(
        centres, panel.observed, "o", color=BLACK, markersize=3, clip_on=False, label="observed"
    )
    ax.set_yscale("function", functions=(lambda v: np.sqrt(np.maximum(v, 0)), np.square))
    ax.set_ylim(bottom=0)
    _set_ticks(ax, starts, width, centres[-1])
    ax.set_title(f"{panel.name}\nmean {panel.mean:.3g}", fontsize="small")
    tidy(ax)


def _set_ticks(ax, starts, width, overflow):
    """Ticks at a few whole numbers and at the open bin."""
    from matplotlib.ticker import MaxNLocator

    last = f"≥{_short(starts[-1])}"
    ticks = MaxNLocator(4, integer=True).tick_values(0, starts[-1])
    labels = {tick: _short(tick) for tick in ticks if tick >= 0}
    room = {tick: _LETTER * overflow * len(label + last) for tick, label in labels.items()}
    labels = {tick: label for tick, label in labels.items() if overflow - tick > room[tick]}
    ax.set_xticks([*labels, overflow], [*labels.values(), last])


def _short(count):
    """A whole number as text; large ones as 1.2e+06."""
    return f"{count:.0f}" if count < 1e5 else f"{count:.2g}"

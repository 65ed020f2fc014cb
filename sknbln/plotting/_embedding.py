"""Scatter of cells over two components."""

from typing import Any, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import chi2

from .._nbln import NBLNEstimator
from .._typing import Axes, Colormap, CountsLike, Covariates
from ._common import (
    BLACK,
    BLUE,
    GREY,
    PALETTE,
    fitted,
    legend_beside,
    needed,
    one_axes,
    show_markers,
    tidy,
)

_MARKERS = "osD^vPX"
#: whole numbers with more distinct values are a scale, not groups
_MOST_LEVELS = 20
#: most groups in the legend; the smallest of more are drawn together
_MOST_GROUPS = 30
_LEGEND_ROWS = 16
_DEFAULT_ELLIPSES = 100
_ELLIPSE_LEVEL = 0.9


class EmbeddingDisplay:
    """Scatter of cells over two components of ``transform(X)``.

    Parameters
    ----------
    embedding : ndarray of shape (n_cells, 2)
        Two columns of ``transform(X)``: principal coordinates in nats, or standardized scores where the
        estimator has ``whiten=True``.
    groups : array-like of shape (n_cells,) or None, default=None
        Groups (text, categories, truth values, or whole numbers with at most 20 distinct values), drawn by
        colour and marker, or a number per cell, drawn by colour. Missing values are drawn in grey.
    covariance : ndarray of shape (n_cells, 2, 2) or None, default=None
        Posterior covariances of the embedding, in its units squared.
    axis_labels : tuple of str, default=("component 1", "component 2")
        Labels of the axes.

    Attributes
    ----------
    scatters_ : list of matplotlib PathCollection
        One for each group, in the legend's order.
    ellipses_ : matplotlib EllipseCollection or None
        Posterior regions.
    legend_ : matplotlib Legend or None
        The legend, if there are groups, missing values or ellipses.
    colorbar_ : matplotlib Colorbar or None
        The scale of a number per cell.
    ax_ : matplotlib Axes
        Axes of the picture.
    figure_ : matplotlib Figure
        Figure of the picture.

    Examples
    --------
    >>> import numpy as np
    >>> from sknbln import NBLNEstimator
    >>> from sknbln.datasets import make_nbln_counts
    >>> from sknbln.plotting import EmbeddingDisplay
    >>> X = make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=0).data
    >>> model = NBLNEstimator(latent_dim=2, cascade="marginal", random_state=0).fit(X)
    >>> half = np.where(np.arange(150) < 75, "first", "second")
    >>> display = EmbeddingDisplay.from_estimator(model, X, groups=half)
    >>> display.embedding.shape, len(display.scatters_)
    ((150, 2), 2)
    """

    def __init__(
        self,
        embedding: np.ndarray,
        *,
        groups: ArrayLike | None = None,
        covariance: np.ndarray | None = None,
        axis_labels: tuple[str, str] = ("component 1", "component 2"),
    ) -> None:
        self.embedding = embedding
        self.groups = groups
        self.covariance = covariance
        self.axis_labels = axis_labels

    @classmethod
    def from_estimator(
        cls,
        estimator: NBLNEstimator,
        X: CountsLike,
        *,
        components: tuple[int, int] = (0, 1),
        groups: ArrayLike | None = None,
        ellipses: bool | int = False,
        covariates: Covariates | None = None,
        offset: ArrayLike | None = None,
        point_size: float | None = None,
        cmap: str | Colormap = "viridis",
        ax: Axes | None = None,
    ) -> Self:
        """Draw the embedding of the rows of X.

        Parameters
        ----------
        estimator : NBLNEstimator
            Fitted, with at least two components.
        X : {array-like, sparse matrix} of shape (n_cells, n_genes)
            Counts.
        components : tuple of two int, default=(0, 1)
            Columns of ``transform(X)``. The axes count from 1: column 0 is component 1.
        groups : array-like of shape (n_cells,) or None, default=None
            Groups, or a number per cell; a Series names the legend.
        ellipses : bool or int, default=False
            See :meth:`plot`.
        covariates, offset
            Of the rows of X, as in `fit`.
        point_size, cmap, ax
            See :meth:`plot`.

        Returns
        -------
        EmbeddingDisplay
            The display that was drawn.

        Raises
        ------
        TypeError
            When the estimator is not an NBLNEstimator.
        ValueError
            When X is None, for components that the estimator does not have, and for groups of another
            length.
        """
        estimator = fitted(cls, estimator, needs_loadings=True)
        needed(cls, X)
        pair = _two_components(components, estimator.latent_dim_)
        covariance, known = None, dict(covariates=covariates, offset=offset)
        if ellipses:
            embedding, covariance = estimator.posterior_scores(X, **known)
            covariance = covariance[:, pair][:, :, pair]
        else:
            embedding = estimator.transform(X, **known)
        unit = "standardized" if estimator.whiten else "nats"
        share = estimator.explained_variance_ratio_[pair]
        x, y = (
            f"component {i + 1}, {unit} ({s:.1%} of variance)"
            for i, s in zip(pair, share, strict=True)
        )
        display = cls(embedding[:, pair], groups=groups, covariance=covariance, axis_labels=(x, y))
        return display.plot(ellipses=ellipses, point_size=point_size, cmap=cmap, ax=ax)

    def plot(
        self,
        ax: Axes | None = None,
        *,
        ellipses: bool | int = False,
        point_size: float | None = None,
        cmap: str | Colormap = "viridis",
    ) -> Self:
        """Draw the picture.

        Parameters
        ----------
        ax : matplotlib Axes or None, default=None
            Where to draw; None for a new figure.
        ellipses : bool or int, default=False
            Number of cells, at even steps through the rows, with a region that holds 90 % of the posterior
            of the two coordinates; True for 100.
        point_size : float or None, default=None
            Area of a point in points squared; None for one that suits the number of cells.
        cmap : str or matplotlib Colormap, default="viridis"
            Colours of a number per cell.

        Returns
        -------
        EmbeddingDisplay
            The display itself.
        """
        n = len(self.embedding)
        groups = None if self.groups is None else pd.Series(self.groups).reset_index(drop=True)
        if groups is not None and len(groups) != n:
            raise ValueError(f"groups has {len(groups)} entries, the embedding has {n} cells.")
        scale = groups is not None and _is_scale(groups)
        levels = [] if groups is None or scale else _levels(groups)
        columns = -(-len(levels) // _LEGEND_ROWS)
        self.figure_, self.ax_ = _, ax = one_axes(ax, (5.2 + 1.3 * columns, 4.6))
        size = float(np.clip(6000 / max(n, 1), 3, 22)) if point_size is None else point_size
        style = dict(s=size, alpha=0.75, linewidths=0, rasterized=n > 5000)
        self.scatters_: list[Any] = []
        self.colorbar_ = self.legend_ = None
        if groups is None:
            self._scatter(np.ones(n, bool), color=BLUE, **style)
        elif scale:
            self._draw_scale(groups.astype(float), cmap, style)
        else:
            self._draw_groups(groups, levels, style)
        self.ellipses_ = self._draw_ellipses(ellipses)
        ax.set(xlabel=self.axis_labels[0], ylabel=self.axis_labels[1])
        tidy(ax)
        self._draw_legend(levels, columns)
        return self

    def _scatter(self, rows, **style):
        points = np.asarray(self.embedding)[rows]
        self.scatters_.append(self.ax_.scatter(points[:, 0], points[:, 1], **style))
        return self.scatters_[-1]

    def _draw_scale(self, values, cmap, style):
        missing = values.isna().to_numpy()
        if missing.any():
            self._scatter(missing, color=GREY, label=f"missing ({missing.sum()})", **style)
        drawn = self._scatter(~missing, c=values[~missing], cmap=cmap, **style)
        name = getattr(self.groups, "name", None)
        self.colorbar_ = self.figure_.colorbar(drawn, ax=self.ax_, label=name or "")
        self.colorbar_.solids.set_alpha(1)

    def _draw_groups(self, groups, levels, style):
        """One scatter per group, small groups over large ones; all other cells in grey below them."""
        counts = groups.value_counts()
        rank = {level: i for i, level in enumerate(counts.index)}
        for i, level in enumerate(levels):
            self._scatter(
                (groups == level).to_numpy(),
                color=PALETTE[i % len(PALETTE)],
                marker=_MARKERS[i // len(PALETTE) % len(_MARKERS)],
                label=f"{level} ({counts[level]})",
                zorder=2 + rank[level] / len(counts),
                **style,
            )
        missing = groups.isna()
        others = ~missing & ~groups.isin(levels)
        n_others = groups[others].nunique()
        for rows, what in ((others, f"{n_others} other groups"), (missing, "missing")):
            if rows.any():
                label = f"{what} ({rows.sum()})"
                self._scatter(rows.to_numpy(), color=GREY, label=label, zorder=1, **style)

    def _draw_legend(self, levels, columns):
        if not self.ax_.get_legend_handles_labels()[0]:
            return
        if levels:
            name = getattr(self.groups, "name", None)
            self.legend_ = legend_beside(self.ax_, title=name, fontsize="small", ncols=columns)
        else:
            above = dict(loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False, ncols=2)
            self.legend_ = self.ax_.legend(fontsize="small", **above)
        show_markers(self.legend_, 30)

    def _draw_ellipses(self, ellipses):
        if not ellipses:
            return None
        from matplotlib.collections import EllipseCollection

        if self.covariance is None:
            raise ValueError(
                "ellipses need the posterior covariances: from_estimator(..., ellipses=True)."
            )
        n = len(self.embedding)
        wanted = min(n, _DEFAULT_ELLIPSES if ellipses is True else int(ellipses))
        rows = np.unique(np.linspace(0, n - 1, wanted).astype(int))
        centres, covariance = np.asarray(self.embedding)[rows], np.asarray(self.covariance)[rows]
        values, vectors = np.linalg.eigh(covariance)
        radius2 = chi2.ppf(_ELLIPSE_LEVEL, 2)
        axes = 2 * np.sqrt(radius2 * np.maximum(values, 0))
        angles = np.degrees(np.arctan2(vectors[:, 1, 1], vectors[:, 0, 1]))
        regions = EllipseCollection(
            axes[:, 1],
            axes[:, 0],
            angles,
            units="xy",
            offsets=centres,
            offset_transform=self.ax_.transData,
            facecolors="none",
            edgecolors=BLACK,
            linewidths=0.6,
            alpha=0.5,
            zorder=4,
        )
        self.ax_.add_collection(regions)
        # matplotlib makes room for the centres alone
        reach = np.sqrt(radius2 * np.einsum("cii->ci", covariance))
        self.ax_.update_datalim(np.concatenate([centres - reach, centres + reach]))
        self.ax_.autoscale_view()
        label = f"{_ELLIPSE_LEVEL:.0%} of the posterior, {rows.size} cells"
        self.ax_.plot([], [], color=BLACK, linewidth=0.8, alpha=0.6, label=label)
        return regions


def _two_components(components, k):
    pair = np.asarray(components)
    ok = pair.shape == (2,) and pair.dtype.kind in "iu" and pair[0] != pair[1]
    if not ok or pair.min() < 0 or pair.max() >= k:
        raise ValueError(
            f"components={components!r}: expected two different columns of transform(X) out of 0 to {k - 1}."
        )
    return pair


def _levels(groups):
    """Groups that get a colour, in the order of the legend: the categories' own, else sorted."""
    counts = groups.value_counts()
    counts = counts[counts > 0]
    if len(counts) > _MOST_GROUPS:
        counts = counts.iloc[: _MOST_GROUPS - 1]
    if isinstance(groups.dtype, pd.CategoricalDtype):
        return [level for level in groups.cat.categories if level in counts.index]
    try:
        return sorted(counts.index)
    except TypeError:  # of mixed types
        return sorted(counts.index, key=str)


def _is_scale(groups):
    """Whether the values are numbers on a scale rather than groups."""
    if not pd.api.types.is_numeric_dtype(groups) or pd.api.types.is_bool_dtype(groups):
        return False
    values = groups.dropna()
    return bool((values != np.floor(values)).any() or values.nunique() > _MOST_LEVELS)

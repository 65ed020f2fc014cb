"""Heat map of correlations of genes."""

from numbers import Integral, Real
from typing import Literal, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from sklearn.utils._param_validation import Interval, StrOptions

from .._correlation import SCALES
from .._nbln import NBLNEstimator
from .._pairs import CorrelationTest
from .._typing import Axes, Colormap, Scale
from ..predictive._arguments import gene_positions, validated_options
from ._common import BLACK, fitted, gene_names, one_axes

#: smallest legible type, in points: where it does not fit, genes are not named
_SMALLEST_TYPE = 5.0
#: candidate ends of the colour scale
_SCALES = np.array([0.1, 0.2, 0.3, 0.5, 0.7, 1.0])
#: most genes whose leaves are ordered optimally: the cost grows at least with the square
_OPTIMAL = 300
_TITLES = {
    "compositional": "Compositional correlation of log-rates",
    "log_rate": "Correlation of log-rates",
    "expression": "Correlation of expression",
    "factors": "Compositional correlation of loadings",
}


class CorrelationDisplay:
    r"""Heat map of the correlations of genes, neighbours in a hierarchical clustering side by side.

    ``scale="compositional"``, ``"log_rate"`` and ``"expression"`` are those of
    :meth:`NBLNEstimator.get_correlation`, a gene's own variance d included. ``scale="factors"`` is the
    correlation of :math:`W_\perp W_\perp'`: the cosines between genes' loadings.

    The first is the default because it says how much of a gene's variance is shared. The cosines do
    not: with k factors all genes lie in k dimensions, so that a gene with hardly any loadings has
    cosines as large as any other (with one factor all are 1 or -1). Where d is near 0, as it may be when
    the dispersion is frozen at the source's (see :meth:`NBLNEstimator.get_dispersion_diagnostics`), the
    two coincide, and correlations near 1 or -1 say little in either. In both, genes that hardly vary
    still vary against the mean of all genes, and so with each other: the more, the fewer genes there are.

    Parameters
    ----------
    correlation : ndarray of shape (n_genes, n_genes)
        Correlations, the genes in the order of the picture.
    names : ndarray of shape (n_genes,)
        Names of the genes, in that order.
    title : str, default=""
        Title.
    marked : ndarray of shape (n_genes, n_genes) or None, default=None
        Pairs that are marked by a point, in the order of the picture.

    Attributes
    ----------
    genes : ndarray of shape (n_genes,)
        Positions of the genes in the estimator, in the order of the picture; None unless
        `from_estimator` made the display.
    im_ : matplotlib AxesImage
        The heat map.
    marks_ : matplotlib PathCollection or None
        The points of the pairs that are marked.
    colorbar_ : matplotlib Colorbar or None
        Its scale.
    ax_ : matplotlib Axes
        Axes of the picture.
    figure_ : matplotlib Figure
        Figure of the picture.

    Examples
    --------
    >>> from sknbln import NBLNEstimator
    >>> from sknbln.datasets import make_nbln_counts
    >>> from sknbln.plotting import CorrelationDisplay
    >>> X = make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=0).data
    >>> model = NBLNEstimator(latent_dim=2, cascade="marginal", random_state=0).fit(X)
    >>> display = CorrelationDisplay.from_estimator(model, n_genes=10)
    >>> display.correlation.shape
    (10, 10)
    """

    def __init__(
        self,
        correlation: np.ndarray,
        names: np.ndarray,
        *,
        title: str = "",
        genes: np.ndarray | None = None,
        marked: np.ndarray | None = None,
    ) -> None:
        self.marked = marked
        self.correlation = correlation
        self.names = names
        self.title = title
        self.genes = genes

    @classmethod
    @validated_options(
        scale=[StrOptions({*SCALES, "factors"})],
        q=[Interval(Real, 0, 1, closed="neither")],
        n_genes=[Interval(Integral, 1, None, closed="left"), None],
    )
    def from_estimator(
        cls,
        estimator: NBLNEstimator,
        *,
        scale: Scale | Literal["factors"] = "compositional",
        test: CorrelationTest | None = None,
        q: float = 0.05,
        genes: ArrayLike | None = None,
        n_genes: int | None = None,
        vmax: float | None = None,
        cmap: str | Colormap = "RdBu_r",
        colorbar: bool = True,
        ax: Axes | None = None,
    ) -> Self:
        """Draw the correlations of a fitted estimator.

        Parameters
        ----------
        estimator : NBLNEstimator
            Fitted estimator.
        scale : {"compositional", "log_rate", "expression", "factors"}, default="compositional"
            Scale of the correlations, explained at the class.
        test : CorrelationTest or None, default=None
            Test of all pairs, from ``estimator.correlation_test(X)``: pairs with q-values of at most `q`
            are marked.
        q : float, default=0.05
            Largest q-value of the pairs that are marked.
        genes : array-like or None, default=None
            Names or positions of the genes that are shown; None for all. The correlations are those of
            the whole model.
        n_genes : int or None, default=None
            Number of these to show: those with the largest sums of squared correlations with the others.
            None for all.
        vmax, cmap, colorbar, ax
            See :meth:`plot`.

        Returns
        -------
        CorrelationDisplay
            The display that was drawn.

        Raises
        ------
        TypeError
            When the estimator is not an NBLNEstimator.
        ValueError
            For unknown genes, and for a test of other genes or not of all pairs.
        """
        estimator = fitted(cls, estimator, needs_loadings=True)
        total = estimator.n_features_in_
        shown = gene_positions(estimator, genes)
        if scale == "factors":
            C = _cosines(estimator.components_)[np.ix_(shown, shown)]
        else:
            C = np.asarray(estimator.get_correlation(scale, genes=shown))
        chosen = np.arange(shown.size)
        how = "" if shown.size == total else f"\n{shown.size} of {total} genes"
        if n_genes is not None and n_genes < shown.size:
            connected = np.sum(C**2, 1) - np.diag(C) ** 2
            chosen = np.argsort(-connected, kind="stable")[:n_genes]
            how = f"\nthe {n_genes} most connected of {shown.size} genes"
        chosen = chosen[_seriation(C[np.ix_(chosen, chosen)])]
        marked = None
        if test is not None:
            marked = _below(test, q, total)[np.ix_(shown[chosen], shown[chosen])]
            how += f"\npoints: q of at most {q:g}"
        return cls(
            C[np.ix_(chosen, chosen)],
            gene_names(estimator)[shown[chosen]],
            title=f"{_TITLES[scale]}{how}",
            genes=shown[chosen],
            marked=marked,
        ).plot(vmax=vmax, cmap=cmap, colorbar=colorbar, ax=ax)

    def plot(
        self,
        ax: Axes | None = None,
        *,
        vmax: float | None = None,
        cmap: str | Colormap = "RdBu_r",
        colorbar: bool = True,
    ) -> Self:
        """Draw the picture.

        Parameters
        ----------
        ax : matplotlib Axes or None, default=None
            Where to draw; None for a new figure.
        vmax : float or None, default=None
            The colours run from -vmax to vmax. None: the next of 0.1, 0.2, 0.3, 0.5, 0.7 and 1 above the
            99 % quantile of the off-diagonals' magnitudes.
        cmap : str or matplotlib Colormap, default="RdBu_r"
            A diverging map.
        colorbar : bool, default=True
            Whether to draw the colour scale.

        Returns
        -------
        CorrelationDisplay
            The display itself.
        """
        C = np.asarray(self.correlation)
        n = C.shape[0]
        if vmax is None:
            magnitude = np.abs(C[~np.eye(n, dtype=bool)])
            wanted = np.quantile(magnitude, 0.99) if magnitude.size else 1.0
            vmax = _SCALES[np.searchsorted(_SCALES[:-1], wanted)]
        side = 4.2 + 0.06 * min(n, 60)
        self.figure_, self.ax_ = figure, ax = one_axes(ax, (side + 0.8, side))
        self.im_ = ax.imshow(C, cmap=cmap, vmin=-vmax, vmax=vmax, aspect="equal")
        self.colorbar_ = None
        if colorbar:
            extend = "neither" if vmax >= 1 else "both"
            self.colorbar_ = figure.colorbar(
                self.im_, ax=ax, label="correlation", shrink=0.8, extend=extend
            )
        # a name takes about the height of its type, an inch is 72 points
        size = 0.75 * 72 * ax.get_window_extent().height / figure.dpi / n
        if size >= _SMALLEST_TYPE:
            style = dict(fontsize=min(size, 10.0))
            ax.set_xticks(np.arange(n), self.names, rotation=90, **style)
            ax.set_yticks(np.arange(n), self.names, **style)
        else:
            ax.set(xticks=[], yticks=[], xlabel=f"{n} genes", ylabel=f"{n} genes")
        ax.tick_params(length=0)
        self.marks_ = None
        if self.marked is not None:
            i, j = np.nonzero(self.marked)
            # a point fills a third of its square
            side = 72 * ax.get_window_extent().height / figure.dpi / n
            area = min((side / 3) ** 2, 20.0)
            self.marks_ = ax.scatter(j, i, s=area, c=BLACK, marker="o", linewidths=0)
            ax.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5))
        ax.set_title(self.title, fontsize="medium")
        return self


def _below(test, q, n_genes):
    """Pairs of all genes whose q-value is at most q."""
    if test.q_value.shape != (n_genes, n_genes):
        raise ValueError(
            f"test is of {test.q_value.shape} pairs, the estimator has {n_genes} genes: give the test of all "
            "pairs, estimator.correlation_test(X)."
        )
    return test.q_value <= q


def _cosines(components):
    """Cosines between the columns; 0 with a gene that has no loadings."""
    length = np.maximum(np.linalg.norm(components, axis=0), 1e-300)
    unit = components / length
    cosines = np.clip(unit.T @ unit, -1.0, 1.0)
    np.fill_diagonal(cosines, 1.0)
    return cosines


def _seriation(correlation):
    """Order of the genes: the leaves of average linkage on the distances ``1 - correlation``."""
    n = correlation.shape[0]
    if n < 3:
        return np.arange(n)
    distance = np.maximum(1.0 - (correlation + correlation.T) / 2, 0.0)
    np.fill_diagonal(distance, 0.0)
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=n <= _OPTIMAL)
    return leaves_list(tree)

"""Pairs of genes: estimates against p-values, and networks."""

from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
from sklearn.utils._param_validation import Interval

from .._pairs import CorrelationTest
from .._typing import Axes
from ..predictive._arguments import validated_options
from ._common import BLUE, GREY, VERMILLION, one_axes, pyplot, tidy

if TYPE_CHECKING:
    from ..network import GeneNetwork
else:  # it imports regressions of scikit-learn, which pictures do not need
    GeneNetwork = Any

#: smallest p-value that is drawn
_LEAST_P = 1e-300


class VolcanoDisplay:
    """Estimates of the correlations of pairs against the p-values of their test.

    Far above are pairs of genes that independent genes could not look like; far to the sides, those that
    move together, or against each other, strongly. Weak correlations of genes with many counts are far above
    and not to the sides; strong ones of genes with few counts are the reverse.

    Parameters
    ----------
    table : DataFrame
        Pairs, as `CorrelationTest.to_frame` returns them, with ``gene_1``, ``gene_2``, ``p_value``,
        ``q_value`` and the column that is the estimate.
    estimate : str, default="correlation"
        Name of that column: "correlation", or of a test between groups "difference".
    q : float, default=0.05
        Pairs with a q-value of at most this are coloured.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes of the picture.
    figure_ : matplotlib Figure
        Figure of the picture.

    Examples
    --------
    >>> from sknbln import NBLNEstimator
    >>> from sknbln.datasets import make_nbln_counts
    >>> from sknbln.plotting import VolcanoDisplay
    >>> X = make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=0).data
    >>> model = NBLNEstimator(latent_dim=2, random_state=0).fit(X)
    >>> display = VolcanoDisplay.from_test(model.correlation_test(X))
    >>> len(display.table)
    276
    """

    def __init__(
        self, table: pd.DataFrame, *, estimate: str = "correlation", q: float = 0.05
    ) -> None:
        self.table = table
        self.estimate = estimate
        self.q = q

    @classmethod
    @validated_options(
        q=[Interval(Real, 0, 1, closed="neither")],
        n_named=[Interval(Integral, 0, None, closed="left")],
    )
    def from_test(
        cls, test: CorrelationTest, *, q: float = 0.05, n_named: int = 5, ax: Axes | None = None
    ) -> Self:
        """Draw the pairs of a test.

        Parameters
        ----------
        test : CorrelationTest
            From ``NBLNEstimator.correlation_test`` or ``correlation_difference_test``.
        q : float, default=0.05
            Pairs with a q-value of at most this are coloured.
        n_named : int, default=5
            Number of pairs that are named, those with the smallest p-values.
        ax : matplotlib Axes or None, default=None
            Where to draw; None for a new figure.

        Returns
        -------
        VolcanoDisplay
            The display that was drawn.

        Raises
        ------
        ValueError
            If the test has no estimates, as that of an NBVCPEstimator.
        """
        pyplot()
        if test.correlation is None and test.difference is None:
            raise ValueError(
                "The test has no estimates to draw: those of an NBVCPEstimator have no correlations. Test "
                "with an NBLNEstimator."
            )
        estimate = "correlation" if test.difference is None else "difference"
        table = test.to_frame().dropna()
        return cls(table, estimate=estimate, q=q).plot(ax, n_named=n_named)

    def plot(self, ax: Axes | None = None, *, n_named: int = 5) -> Self:
        """Draw the picture.

        Parameters
        ----------
        ax : matplotlib Axes or None, default=None
            Where to draw; None for a new figure.
        n_named : int, default=5
            Number of pairs that are named.

        Returns
        -------
        VolcanoDisplay
            The display itself.
        """
        self.figure_, self.ax_ = _, ax = one_axes(ax, (6.4, 4.4))
        table = self.table.sort_values("p_value", kind="stable")
        x = table[self.estimate].to_numpy()
        y = -np.log10(np.maximum(table["p_value"].to_numpy(), _LEAST_P))
        below = table["q_value"].to_numpy() <= self.q
        style: dict[str, Any] = dict(s=9, linewidths=0, rasterized=len(table) > 5000)
        for mask, colour, alpha, label in (
            (~below, GREY, 0.4, "other pairs"),
            (below & (x > 0), VERMILLION, 0.7, f"q ≤ {self.q:g}, above 0"),
            (below & (x <= 0), BLUE, 0.7, f"q ≤ {self.q:g}, below 0"),
        ):
            if mask.any():
                label = f"{label} ({mask.sum():,})"
                ax.scatter(x[mask], y[mask], c=colour, alpha=alpha, label=label, **style)
        self._name(table[:n_named], x, y)
        what = (
            "correlation" if self.estimate == "correlation" else "difference of covariance, nats²"
        )
        ax.set(xlabel=what, ylabel="$-\\log_{10}$ p-value")
        ax.margins(y=0.12)
        ax.set_ylim(bottom=0.0)
        ax.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize="small", frameon=False
        )
        tidy(ax)
        return self

    def _name(self, named, x, y):
        """Write names of pairs beside their points, none over another."""
        last = np.inf
        least = 0.045 * max(y.max(initial=1.0), 1e-9)
        for row, at, height in zip(named.itertuples(), x, y, strict=False):
            place = min(height, last - least)
            last = place
            side = "left" if at < 0 else "right"
            self.ax_.annotate(
                f"{row.gene_1}, {row.gene_2}",
                (at, height),
                xytext=(self._beside(x, at), place),
                ha=side,
                va="center",
                fontsize="x-small",
                arrowprops=dict(arrowstyle="-", color=GREY, linewidth=0.5),
            )

    @staticmethod
    def _beside(x, at):
        """Where the name of a point stands: towards the middle of the picture."""
        width = max(np.ptp(x), 1e-9)
        return at - 0.06 * width if at > 0 else at + 0.06 * width


class NetworkDisplay:
    """Network of up to some 60 genes: wide lines are strong partial correlations.

    Parameters
    ----------
    network : GeneNetwork
        From :func:`sknbln.network.sparse_network`.

    Attributes
    ----------
    positions_ : dict
        Place of each gene that is drawn.
    ax_ : matplotlib Axes
        Axes of the picture.
    figure_ : matplotlib Figure
        Figure of the picture.

    Examples
    --------
    >>> from sknbln import NBLNEstimator
    >>> from sknbln.datasets import make_nbln_counts
    >>> from sknbln.network import sparse_network
    >>> from sknbln.plotting import NetworkDisplay
    >>> X = make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=0).data
    >>> model = NBLNEstimator(latent_dim=2, random_state=0).fit(X)
    >>> network = sparse_network(model, genes=range(8), select="ebic", gamma=0.0)
    >>> display = NetworkDisplay.from_network(network)
    >>> len(display.positions_) <= 8
    True
    """

    def __init__(self, network: GeneNetwork) -> None:
        self.network = network

    @classmethod
    def from_network(
        cls,
        network: GeneNetwork,
        *,
        max_genes: int = 60,
        random_state: int = 0,
        ax: Axes | None = None,
    ) -> Self:
        """Draw a network.

        Parameters
        ----------
        network : GeneNetwork
            From :func:`sknbln.network.sparse_network`.
        max_genes, random_state, ax
            See :meth:`plot`.

        Returns
        -------
        NetworkDisplay
            The display that was drawn.

        Raises
        ------
        ImportError
            When networkx or matplotlib is not installed.
        """
        return cls(network).plot(ax, max_genes=max_genes, random_state=random_state)

    @validated_options(max_genes=[Interval(Integral, 1, None, closed="left")])
    def plot(self, ax: Axes | None = None, *, max_genes: int = 60, random_state: int = 0) -> Self:
        """Draw the picture.

        Parameters
        ----------
        ax : matplotlib Axes or None, default=None
            Where to draw; None for a new figure.
        max_genes : int, default=60
            Most genes that are drawn: those with the most edges. Genes without edges are not drawn.
        random_state : int, default=0
            Seed of the layout, networkx's spring layout.

        Returns
        -------
        NetworkDisplay
            The display itself.
        """
        graph = self.network.to_networkx()
        import networkx

        self.figure_, self.ax_ = _, ax = one_axes(ax, (6.4, 5.6))
        degree = dict(graph.degree())
        linked = sorted((g for g in graph if degree[g]), key=lambda g: -degree[g])[:max_genes]
        graph = graph.subgraph(linked)
        lengths = networkx.Graph()
        for *pair, attributes in graph.edges(data=True):
            lengths.add_edge(*pair, weight=np.sqrt(abs(attributes["partial_correlation"])))
        self.positions_ = networkx.spring_layout(
            lengths, k=2.0 / np.sqrt(max(len(lengths), 1)), iterations=200, seed=random_state
        )
        for *pair, attributes in graph.edges(data=True):
            value = attributes["partial_correlation"]
            (x0, y0), (x1, y1) = (self.positions_[gene] for gene in pair)
            colour = VERMILLION if value > 0 else BLUE
            ax.plot([x0, x1], [y0, y1], c=colour, lw=0.5 + 6 * abs(value), alpha=0.5, zorder=1)
        for gene, (x, y) in self.positions_.items():
            box = dict(boxstyle="round,pad=0.2", fc="white", ec=GREY, lw=0.5)
            ax.text(
                x, y, str(gene), ha="center", va="center", fontsize="x-small", bbox=box, zorder=2
            )
        for value, colour in (("above 0", VERMILLION), ("below 0", BLUE)):
            ax.plot([], [], c=colour, lw=2, alpha=0.5, label=f"partial correlation {value}")
        n_all = len(self.network.genes)
        shown, edges = graph.number_of_nodes(), graph.number_of_edges()
        ax.set_title(f"{shown} of {n_all} genes, {edges} edges", fontsize="medium")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=2, frameon=False)
        ax.set_axis_off()
        ax.margins(0.1)
        return self

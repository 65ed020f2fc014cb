"""Norms of the components."""

import numpy as np

from ..solver.gauge import RANK_FRACTION, SMALLEST_LOADING
from ._common import (
    BLUE,
    GREY,
    ORANGE,
    VERMILLION,
    fitted,
    legend_beside,
    one_axes,
    tidy,
)

#: norms below this fraction of the threshold are drawn on the lower edge
_LOWEST = 0.1


class LoadingsSpectrumDisplay:
    r"""Norms of the components on a logarithmic axis, with the effective rank.

    A component counts when its norm :math:`|W_{\perp k}|` exceeds 5 % of the largest, and 0.01 nats per gene
    (root mean square). The scales of a loadings prior are drawn as the norms that they stand for,
    :math:`\sigma_k \sqrt{G - 1}`.

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

    Attributes
    ----------
    threshold : float
        Norm above which a component counts, nats.
    ax_ : matplotlib Axes
        Axes of the picture.
    figure_ : matplotlib Figure
        Figure of the picture.

    See Also
    --------
    NBLNEstimator : Its attribute ``w_prior_diagnostics_`` has the numbers.

    Examples
    --------
    >>> from sknbln import NBLNEstimator
    >>> from sknbln.datasets import make_nbln_counts
    >>> from sknbln.plotting import LoadingsSpectrumDisplay
    >>> X = make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=0).data
    >>> model = NBLNEstimator(latent_dim=2, cascade="marginal", random_state=0).fit(X)
    >>> display = LoadingsSpectrumDisplay.from_estimator(model)
    >>> display.column_norms.shape
    (2,)
    """

    def __init__(self, column_norms, effective_rank, n_genes, *, sigma_k=None, prior="none"):
        self.column_norms = column_norms
        self.effective_rank = effective_rank
        self.n_genes = n_genes
        self.sigma_k = sigma_k
        self.prior = prior

    @property
    def threshold(self):
        """Norm above which a component counts, nats."""
        largest = RANK_FRACTION * np.max(self.column_norms, initial=0.0)
        return float(max(largest, SMALLEST_LOADING * np.sqrt(self.n_genes)))

    @classmethod
    def from_estimator(cls, estimator, *, ax=None):
        """Draw the spectrum of a fitted estimator.

        Parameters
        ----------
        estimator : NBLNEstimator
            Fitted estimator.
        ax : matplotlib Axes or None, default=None
            Where to draw; None for a new figure.

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
        ).plot(ax=ax)

    def plot(self, ax=None):
        """Draw the picture.

        Parameters
        ----------
        ax : matplotlib Axes or None, default=None
            Where to draw; None for a new figure.

        Returns
        -------
        LoadingsSpectrumDisplay
            The display itself.
        """
        self.figure_, self.ax_ = _, ax = one_axes(ax, (6.8, 3.9))
        norms = np.asarray(self.column_norms)
        index = np.arange(1, norms.size + 1)
        counted = index <= self.effective_rank
        floor = _LOWEST * self.threshold
        ax.plot(index, np.maximum(norms, floor), color=BLUE, linewidth=0.8, alpha=0.4)
        for rows, face, label in ((counted, BLUE, "counted"), (~counted, "white", "not counted")):
            style = dict(color=BLUE, markerfacecolor=face)
            _points(ax, index[rows], norms[rows], floor, "o", label, **style)
        below = norms.min(initial=np.inf) < floor
        if self.sigma_k is not None:
            scale = np.asarray(self.sigma_k) * np.sqrt(max(self.n_genes - 1, 1))
            label = rf"prior scale $\sigma_k\sqrt{{G-1}}$, {self.prior.replace('_', ' ')}"
            _points(ax, index + 0.25, scale, floor, "x", label, color=ORANGE, markeredgewidth=1.8)
            below |= scale.min(initial=np.inf) < floor
        relative = self.threshold > SMALLEST_LOADING * np.sqrt(self.n_genes)
        text = (
            f"{RANK_FRACTION:.0%} of the largest"
            if relative
            else f"{SMALLEST_LOADING} nats per gene"
        )
        ax.axhline(self.threshold, color=VERMILLION, linestyle="--", linewidth=1.2, label=text)
        rank = f"effective rank {self.effective_rank} of {norms.size}"
        ax.axvline(self.effective_rank + 0.5, color=GREY, linestyle=":", linewidth=1.4, label=rank)
        if below:
            ax.plot([], [], "v", color=GREY, markersize=5, label="below the axis")
        ax.set_yscale("log")
        ax.set_ylim(bottom=floor)
        ax.set_xlim(0.4, norms.size + 0.7)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set(xlabel="component", ylabel="norm of the loadings over genes (nats)")
        tidy(ax)
        legend_beside(ax)
        return self


def _points(ax, x, y, floor, marker, label, **style):
    """Points, those below the floor as triangles on it."""
    inside = y >= floor
    if inside.any():
        ax.plot(x[inside], y[inside], marker, markersize=6, label=label, **style)
    if not inside.all():
        style = {**style, "markersize": 5, "clip_on": False, "zorder": 3}
        ax.plot(x[~inside], np.full(np.sum(~inside), floor), "v", **style)

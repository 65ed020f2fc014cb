"""Corner grid of counts."""

from collections.abc import Sequence
from numbers import Integral
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.utils._param_validation import Interval

from .._typing import Capture, CountsLike, Covariates, Latent, Level, Panels, Seed
from ..predictive._arguments import prepare, validated_options
from ..predictive._interface import PredictiveModel
from ._common import fitted, gene_names, needed, readable_genes
from ._log_axes import COUNTS, LogAxis, draw_corner


class CountCornerDisplay:
    """Corner grid of counts: contours of posterior predictive replicates against the cells.

    Each axis is log10 of a gene's counts. Below the diagonal, points are cells, and contours hold 50 % and
    90 % of the replicated cells. The diagonal shows single genes: the filled density is that of the
    replicates, cut off at four times the height of the histogram, that of the cells. Contours and
    histograms agree where the model is right, count noise included.

    Zeros are drawn in a strip at the low end of the axis, spread out within it. Contours in a strip are
    those of the replicates that are zero there, if they are 1 % or more of all, and the other contours those
    of replicates without zeros. The diagonal states the percentages of zeros, and its densities are of what
    is not zero, scaled by its fraction. A count n is spread out over n - 1/2 to n + 1/2, the same at every
    call.

    Parameters
    ----------
    replicates : ndarray of shape (n_replicated_cells, n_genes)
        Replicated counts, those of all replicates.
    cells : ndarray of shape (n_cells, n_genes)
        Counts.
    names : sequence of str
        Names of the genes.
    level : str, default=""
        Level of the replicates, for the legend.

    Attributes
    ----------
    axes_ : ndarray of shape (n_genes, n_genes)
        Axes of the picture; those above the diagonal are hidden.
    figure_ : matplotlib Figure
        Figure of the picture.

    See Also
    --------
    CompositionalCornerDisplay : Compositions before count noise.
    sknbln.predictive.posterior_predictive : The replicates.

    Examples
    --------
    >>> from sknbln import NBLNEstimator
    >>> from sknbln.datasets import make_nbln_counts
    >>> from sknbln.plotting import CountCornerDisplay
    >>> X = make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=0).data
    >>> model = NBLNEstimator(latent_dim=2, cascade="marginal", random_state=0).fit(X)
    >>> display = CountCornerDisplay.from_estimator(model, X, n_genes=3, n_samples=10)
    >>> display.replicates.shape
    (1500, 3)
    """

    def __init__(
        self, replicates: np.ndarray, cells: np.ndarray, names: Sequence[str], *, level: str = ""
    ) -> None:
        self.replicates = replicates
        self.cells = cells
        self.names = names
        self.level = level

    @classmethod
    @validated_options(n_genes=[Interval(Integral, 2, None, closed="left")])
    def from_estimator(
        cls,
        estimator: PredictiveModel,
        X: CountsLike,
        *,
        genes: ArrayLike | None = None,
        n_genes: int = 4,
        level: Level = "library_anchored",
        capture: Capture = "posterior",
        latent: Latent = "posterior",
        n_samples: int = 20,
        random_state: Seed = None,
        covariates: Covariates | None = None,
        offset: ArrayLike | None = None,
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
            Names or positions of genes. None for `n_genes` genes, chosen as for a
            :class:`CompositionalCornerDisplay`.
        n_genes : int, default=4
            Number of genes if `genes` is None.
        level, capture, latent, random_state
            See :func:`sknbln.predictive.posterior_predictive`.
        n_samples : int, default=20
            Number of replicates of X. The contours are of all of their rows.
        covariates, offset
            Of the rows of X, as in `fit`.
        ax : Figure, Axes, array of Axes or None, default=None
            See :meth:`plot`.

        Returns
        -------
        CountCornerDisplay
            The display that was drawn.

        Raises
        ------
        ValueError
            When X is None, and for unknown genes or a single one.
        """
        estimator = fitted(cls, estimator)
        needed(cls, X)
        known = dict(covariates=covariates, offset=offset)
        draws = dict(level=level, capture=capture, latent=latent)
        replicates, chosen = prepare(estimator, X, genes, n_samples, random_state, **draws, **known)
        if genes is None:
            chosen = readable_genes(estimator, replicates.X, n_genes)
        drawn = np.concatenate([replicates.counts(s, chosen) for s in range(n_samples)])
        cells = replicates.X[:, chosen].toarray()
        return cls(drawn, cells, gene_names(estimator)[chosen], level=level).plot(ax=ax)

    def plot(self, ax: Panels | None = None) -> Self:
        """Draw the picture.

        Parameters
        ----------
        ax : Figure, Axes, array of Axes or None, default=None
            None for a new figure; a figure, to which axes are added; one axes, which is divided; or
            an array of n_genes x n_genes axes.

        Returns
        -------
        CountCornerDisplay
            The display itself.
        """
        genes = [
            LogAxis(COUNTS, name, self.replicates[:, j], self.cells[:, j], seed=j)
            for j, name in enumerate(self.names)
        ]
        title = ", ".join(filter(None, ["Counts", self.level.replace("_", " ")]))
        self.figure_, self.axes_ = draw_corner(ax, genes, title)
        return self

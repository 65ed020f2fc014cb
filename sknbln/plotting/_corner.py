"""Corner grid of compositions."""

from collections.abc import Sequence
from numbers import Integral
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.utils._param_validation import Interval

from .._typing import CountsLike, Panels, Seed
from ..predictive._arguments import validated_options
from ..predictive._interface import PredictiveModel
from ._log_axes import compositions, draw_corner, share_axes


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
    CompositionalGridDisplay : The same of more genes, one by one.
    CountCornerDisplay : Counts, observed and replicated.
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

    def __init__(
        self, model: np.ndarray, cells: np.ndarray, pseudobulk: np.ndarray, names: Sequence[str]
    ) -> None:
        self.model = model
        self.cells = cells
        self.pseudobulk = pseudobulk
        self.names = names

    @classmethod
    @validated_options(n_genes=[Interval(Integral, 2, None, closed="left")])
    def from_estimator(
        cls,
        estimator: PredictiveModel,
        X: CountsLike,
        *,
        genes: ArrayLike | None = None,
        n_genes: int = 4,
        n_samples: int = 2000,
        random_state: Seed = None,
        ax: Panels | None = None,
    ) -> Self:
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
        options = (genes, n_genes, n_samples, random_state)
        return cls(*compositions(cls, estimator, X, *options)).plot(ax=ax)

    def plot(self, ax: Panels | None = None) -> Self:
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
        self.figure_, self.axes_ = draw_corner(ax, share_axes(self))
        return self

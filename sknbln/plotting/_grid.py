"""Densities of compositions, gene by gene."""

from collections.abc import Sequence
from numbers import Integral
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.utils._param_validation import Interval

from .._typing import CountsLike, Panels, Seed
from ..predictive._arguments import validated_options
from ..predictive._interface import PredictiveModel
from ._common import N_COLS, grid_of_panels, legend_of_panels
from ._log_axes import compositions, draw_one, share_axes


class CompositionalGridDisplay:
    """Densities of compositions, the model's against cells and pseudobulk, one panel for a gene.

    Each axis is log10 of a gene's share of its cell's counts. The filled curve is the density of the model's
    compositions *before* count noise, cut off at four times the height of the cells'. The histogram is that
    of the cells' ``counts / total``, which scatter more, by that noise. The line is the pseudobulk.

    A share of zero has no logarithm: the title states the percentage of such cells, and the histogram is
    that of the other cells, scaled by their fraction.

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
    axes_ : ndarray of shape (n_rows, n_cols)
        Axes of the picture; those beyond the last gene are hidden.
    figure_ : matplotlib Figure
        Figure of the picture.

    See Also
    --------
    CompositionalCornerDisplay : The same of a few genes in pairs.
    sknbln.predictive.compositional_samples : The numbers.

    Examples
    --------
    >>> from sknbln import NBLNEstimator
    >>> from sknbln.datasets import make_nbln_counts
    >>> from sknbln.plotting import CompositionalGridDisplay
    >>> X = make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=0).data
    >>> model = NBLNEstimator(latent_dim=2, cascade="marginal", random_state=0).fit(X)
    >>> display = CompositionalGridDisplay.from_estimator(model, X, n_genes=6, n_samples=500)
    >>> display.axes_.shape
    (2, 3)
    """

    def __init__(
        self, model: np.ndarray, cells: np.ndarray, pseudobulk: np.ndarray, names: Sequence[str]
    ) -> None:
        self.model = model
        self.cells = cells
        self.pseudobulk = pseudobulk
        self.names = names

    @classmethod
    @validated_options(n_genes=[Interval(Integral, 1, None, closed="left")], n_cols=N_COLS)
    def from_estimator(
        cls,
        estimator: PredictiveModel,
        X: CountsLike,
        *,
        genes: ArrayLike | None = None,
        n_genes: int = 9,
        n_samples: int = 2000,
        random_state: Seed = None,
        n_cols: int | None = None,
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
            Names or positions of genes. None for `n_genes` genes, chosen as for a
            :class:`CompositionalCornerDisplay`.
        n_genes : int, default=9
            Number of genes if `genes` is None.
        n_samples : int, default=2000
            Number of points of the model.
        random_state : int, RandomState instance or None, default=None
            None for the estimator's own.
        n_cols, ax
            See :meth:`plot`.

        Returns
        -------
        CompositionalGridDisplay
            The display that was drawn.

        Raises
        ------
        ValueError
            When X is None, for unknown genes, and when X has no counts.
        """
        options = (genes, n_genes, n_samples, random_state)
        return cls(*compositions(cls, estimator, X, *options)).plot(n_cols=n_cols, ax=ax)

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
        CompositionalGridDisplay
            The display itself.
        """
        genes = share_axes(self)
        self.figure_, self.axes_ = grid_of_panels(
            ax, len(genes), n_cols, genes[0].kind.axis, "density"
        )
        for each, gene in zip(self.axes_.flat, genes, strict=False):
            draw_one(each, gene)
        legend_of_panels(self.figure_, self.axes_, below=ax is None)
        return self

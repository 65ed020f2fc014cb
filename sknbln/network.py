"""Sparse networks of genes: partial correlations from the covariance of an NBLN fit."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.covariance import graphical_lasso
from sklearn.exceptions import ConvergenceWarning
from sklearn.frozen import FrozenEstimator
from sklearn.utils import _safe_indexing, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions

from ._correlation import SCALES
from ._counts import user_stacklevel
from ._nbln import NBLNEstimator
from ._typing import AnnData, CountsLike, Covariates, Graph, Scale, Seed
from .predictive._arguments import fitted_model, gene_positions, validated_options

__all__ = ["GeneNetwork", "sparse_network"]

#: the smallest penalty of the path, as a fraction of that at which the first edge comes
_LEAST = 0.02
#: most mean instability of the edges of a network that is chosen by stability
_INSTABILITY = 0.05
_ENET_TOL = 1e-6  # of the regression of each gene, relative
#: the end of a ConvergenceWarning that is none
_NO_GAP = r"(?s).*Duality gap: 0\.0(0*e\+00)?, tolerance: 0\.0(0*e\+00)?$"


@dataclass(frozen=True, eq=False)
class GeneNetwork:
    """A sparse network of genes, and the path of penalties that it was chosen from.

    Attributes
    ----------
    genes : ndarray of shape (n_genes,)
        Names of the genes; their positions where the fit has no names.
    partial_correlation : ndarray of shape (n_genes, n_genes)
        Partial correlations, 0 where there is no edge, 1 on the diagonal.
    penalty : float
        Penalty of the network.
    penalties : ndarray of shape (n_penalties,)
        The path, from large to small.
    n_edges : ndarray of shape (n_penalties,)
        Number of edges at each.
    criterion : ndarray of shape (n_penalties,)
        EBIC, the smallest of which is chosen, or the mean instability of edges, which is at most .05 at
        the penalty that is chosen.
    first_edge_penalty : float
        Penalty below which the first edge comes: the largest correlation in magnitude.
    stability : ndarray of shape (n_genes, n_genes) or None
        Of a network chosen by stability, the share of half samples in which two genes have an edge.
    """

    genes: np.ndarray
    partial_correlation: np.ndarray
    penalty: float
    penalties: np.ndarray
    n_edges: np.ndarray
    criterion: np.ndarray
    first_edge_penalty: float
    stability: np.ndarray | None = None

    def __repr__(self) -> str:
        """One line."""
        at = np.argmin(np.abs(self.penalties - self.penalty))
        return (
            f"{type(self).__name__}({len(self.genes)} genes, {self.n_edges[at]} edges, "
            f"penalty={self.penalty:.3g})"
        )

    def edges(self) -> pd.DataFrame:
        """Edges as a table, strongest first.

        Returns
        -------
        DataFrame
            ``gene_1``, ``gene_2``, ``partial_correlation`` and, where the network has it, ``stability``. It
            is what ``networkx.from_pandas_edgelist(table, "gene_1", "gene_2", edge_attr=True)`` takes.
        """
        i, j = np.nonzero(np.triu(self.partial_correlation, 1))
        order = np.argsort(-np.abs(self.partial_correlation[i, j]), kind="stable")
        i, j = i[order], j[order]
        columns = {"gene_1": self.genes[i], "gene_2": self.genes[j]}
        columns["partial_correlation"] = self.partial_correlation[i, j]
        if self.stability is not None:
            columns["stability"] = self.stability[i, j]
        return pd.DataFrame(columns)

    def to_networkx(self) -> Graph:
        """The network as a graph of networkx: all genes are nodes, edges have ``partial_correlation``.

        Returns
        -------
        networkx.Graph

        Raises
        ------
        ImportError
            When networkx is not installed.
        """
        try:
            import networkx
        except ImportError as error:
            raise ImportError(
                "Graphs need networkx, which is not installed: pip install sknbln[network]"
            ) from error
        graph = networkx.from_pandas_edgelist(self.edges(), "gene_1", "gene_2", edge_attr=True)
        graph.add_nodes_from(self.genes)
        return graph

    def to_varp(self, adata: AnnData, key: str = "partial_correlation") -> None:
        """Write the edges to ``adata.varp[key]`` of an AnnData, by the names of its variables.

        Parameters
        ----------
        adata : AnnData
            Its ``var_names`` have the genes of the network; other variables have no edges.
        key : str, default="partial_correlation"
            Name in ``varp``. The value is a csr_matrix of shape (n_vars, n_vars), 0 on the diagonal.

        Raises
        ------
        ValueError
            If genes are missing from ``var_names``.
        """
        where = pd.Index(adata.var_names).get_indexer(self.genes)
        missing = self.genes[where < 0]
        if missing.size:
            raise ValueError(
                f"{missing.size} genes of the network are missing from adata.var_names: "
                f"{', '.join(map(str, missing[:10]))}. Fit to adata.to_df(), or to a DataFrame with these "
                "names as columns."
            )
        i, j = np.nonzero(self.partial_correlation - np.eye(len(self.genes)))
        values = self.partial_correlation[i, j]
        shape = (adata.n_vars, adata.n_vars)
        adata.varp[key] = csr_matrix((values, (where[i], where[j])), shape=shape)


@validated_options(
    scale=[StrOptions(set(SCALES))],
    select=[StrOptions({"ebic", "stability"})],
    gamma=[Interval(Real, 0, 1, closed="both")],
    n_penalties=[Interval(Integral, 2, None, closed="left")],
    n_halves=[Interval(Integral, 2, None, closed="left")],
)
def sparse_network(
    estimator: NBLNEstimator,
    X: CountsLike | None = None,
    genes: Iterable[int] | Iterable[str] | None = None,
    *,
    scale: Scale = "log_rate",
    select: Literal["stability", "ebic"] = "stability",
    gamma: float = 0.5,
    n_penalties: int = 20,
    n_halves: int = 10,
    random_state: Seed = None,
    covariates: Covariates | None = None,
    offset: ArrayLike | None = None,
) -> GeneNetwork:
    r"""Sparse network of genes: partial correlations by the graphical lasso on a fit's correlations.

    .. math:: \max_\Theta\; \log\det\Theta - \mathrm{tr}(R\Theta) - \lambda \sum_{j \ne k} |\Theta_{jk}|

    with R the correlations of the fit, over a path of penalties lambda that starts where the first edge
    comes [1]_. Correlations of capture and noise of counting are not in R, and so not in the network.

    Parameters
    ----------
    estimator : NBLNEstimator
        Fitted estimator.
    X : {array-like, sparse matrix} of shape (n_cells, n_genes) or None, default=None
        Counts of the fit; not needed with ``select="ebic"``.
    genes : array-like or None, default=None
        Names or positions of the genes of the network; None for all.
    scale : {"compositional", "log_rate", "expression"}, default="log_rate"
        Scale of the correlations, see :meth:`NBLNEstimator.get_correlation`.
    select : {"stability", "ebic"}, default="stability"
        How the penalty is chosen. ``"stability"``: the smallest at which the edges of fits to random halves
        of the rows have a mean instability of at most .05 [2]_; a fit for each half. ``"ebic"``: that with
        the smallest extended Bayesian information criterion [3]_, without further fits.
    gamma : float, default=0.5
        Parameter of the EBIC, from 0 (BIC) to 1 (the sparsest networks).
    n_penalties : int, default=20
        Number of penalties.
    n_halves : int, default=10
        Number of random halves of the rows.
    random_state : int, RandomState instance or None, default=None
        Seed of the halves; None takes the estimator's.
    covariates, offset
        Of the rows of X, as in `fit`.

    Returns
    -------
    GeneNetwork
        With ``partial_correlation``, ``edges()``, ``to_networkx()`` and ``to_varp()``.

    Raises
    ------
    TypeError
        If the estimator has no correlations.
    ValueError
        If X is missing where it is needed, or a gene is unknown.

    Warns
    -----
    UserWarning
        If the network that is chosen has no edges; with the penalty at which the first edge comes.

    Notes
    -----
    A step of the path costs ``n_genes^3`` operations some ten times: choose some hundred genes. Cells show
    counts and not log-rates, so that the number of cells in the EBIC is the one with which correlations of
    known log-rates would have the standard errors of the fit's, in the median over pairs. Correlations of few
    factors have no sparse precision matrix: the EBIC then often chooses a dense network, or an empty one.

    References
    ----------
    .. [1] Friedman, J., Hastie, T. and Tibshirani, R. (2008). Sparse inverse covariance estimation with the
       graphical lasso. Biostatistics 9, 432-441.
    .. [2] Liu, H., Roeder, K. and Wasserman, L. (2010). Stability approach to regularization selection
       (StARS) for high dimensional graphical models. Advances in Neural Information Processing Systems 23,
       1432-1440.
    .. [3] Foygel, R. and Drton, M. (2010). Extended Bayesian information criteria for Gaussian graphical
       models. Advances in Neural Information Processing Systems 23, 604-612.

    Examples
    --------
    >>> from sknbln import NBLNEstimator
    >>> from sknbln.datasets import make_nbln_counts
    >>> from sknbln.network import sparse_network
    >>> X = make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=0).data
    >>> model = NBLNEstimator(2, random_state=0).fit(X)
    >>> network = sparse_network(model, genes=range(8), select="ebic", gamma=0.0)
    >>> network.edges().columns.tolist()
    ['gene_1', 'gene_2', 'partial_correlation']
    """
    model = fitted_model(estimator)
    if not hasattr(model, "get_correlation"):
        raise TypeError(
            f"{type(model).__name__} has no correlations: its genes are independent. Give an NBLNEstimator."
        )
    positions = gene_positions(model, None if genes is None else list(genes))
    found = model.get_correlation_interval(scale, genes=positions)
    R = np.asarray(found.correlation)
    first = float(np.abs(R - np.eye(len(R))).max())
    penalties = first * np.geomspace(1.0, _LEAST, n_penalties)
    precisions, stability = _path(R, penalties), None
    if select == "ebic":
        n = _effective_cells(R, np.asarray(found.standard_error), model._known.total_weight)
        criterion = np.array([_ebic(R, precision, n, gamma) for precision in precisions])
        chosen = int(np.argmin(criterion))
    else:
        rng = check_random_state(model.random_state if random_state is None else random_state)
        known = dict(covariates=covariates, offset=offset)
        halves = _halves(model, X, n_halves, rng, known)
        shares = [_edges_of_path(half, scale, positions, penalties) for half in halves]
        shortest = min(len(path) for path in (precisions, *shares))
        precisions = precisions[:shortest]
        share = np.mean([path[:shortest] for path in shares], axis=0)
        pairs = np.triu_indices(len(R), 1)
        criterion = np.maximum.accumulate(np.mean((2 * share * (1 - share))[:, *pairs], axis=1))
        chosen = int(np.flatnonzero(criterion <= _INSTABILITY).max(initial=0))
        stability = share[chosen]
    penalties, edges = penalties[: len(precisions)], np.array([*map(_edges, precisions)])
    n_edges = edges.sum((1, 2)) // 2
    penalty = float(penalties[chosen])
    if not n_edges[chosen]:
        warnings.warn(
            f"The network has no edges at the penalty {penalty:.3g} that {select} chose; the first comes "
            f"below {first:.3g}, the largest correlation of two genes.",
            UserWarning,
            stacklevel=user_stacklevel(),
        )
    if chosen == len(penalties) - 1 and len(penalties) < n_penalties:
        warnings.warn(
            f"The network is the last of a path that ends at the penalty {penalty:.3g}: below it the "
            "correlations are too ill-conditioned for the graphical lasso. Take fewer genes.",
            UserWarning,
            stacklevel=user_stacklevel(),
        )
    root = np.sqrt(np.diag(precisions[chosen]))
    partial = np.where(edges[chosen], -precisions[chosen] / np.outer(root, root), np.eye(len(R)))
    names = getattr(model, "feature_names_in_", np.arange(model.n_features_in_))[positions]
    return GeneNetwork(
        names, partial, penalty, penalties, n_edges, criterion, first, stability=stability
    )


def _path(R, penalties):
    """Precision matrices of the graphical lasso at each penalty, up to where R is too ill-conditioned."""
    found = []
    with warnings.catch_warnings():
        # what older releases of scikit-learn say of genes without an edge
        warnings.filterwarnings("ignore", _NO_GAP, ConvergenceWarning)
        for penalty in penalties:
            try:
                found.append(graphical_lasso(R, penalty, max_iter=500, enet_tol=_ENET_TOL)[1])
            except FloatingPointError:
                break
    return found


def _edges(precision):
    """Whether two genes have an edge."""
    return (precision != 0) & ~np.eye(len(precision), dtype=bool)


def _effective_cells(R, standard_error, n_cells):
    """Number of cells with log-rates known exactly whose correlations had such standard errors (median)."""
    pairs = np.triu_indices(len(R), 1)
    variance = np.maximum(standard_error[pairs] ** 2, 1e-300)
    return min(float(np.median((1.0 - R[pairs] ** 2) ** 2 / variance)), n_cells)


def _ebic(R, precision, n_cells, gamma):
    """Extended Bayesian information criterion of a network, smaller is better."""
    n_edges = _edges(precision).sum() / 2
    value = n_cells * (np.sum(R * precision) - np.linalg.slogdet(precision)[1])
    return value + n_edges * (np.log(n_cells) + 4 * gamma * np.log(len(R)))


def _edges_of_path(model, scale, positions, penalties):
    """Edges at each penalty, (n_penalties, n_genes, n_genes)."""
    R = np.asarray(model.get_correlation(scale, genes=positions))
    return np.array([*map(_edges, _path(R, penalties))])


def _halves(model, X, n_halves, rng, known):
    """Fits to random halves of the rows, with the source and the number of factors of a fit."""
    if X is None:
        raise ValueError(
            'select="stability" fits halves of the rows, and an estimator does not keep the counts of its '
            "fit: give them as X."
        )
    estimator = clone(model).set_params(
        latent_dim=max(model.latent_dim_, 1),
        informative_prior_estimator=FrozenEstimator(model.informative_prior_estimator_),
    )
    n_cells = np.shape(X)[0]
    for _ in range(n_halves):
        rows = np.sort(rng.choice(n_cells, n_cells // 2, replace=False))
        of_half = {name: _safe_indexing(a, rows) for name, a in known.items() if a is not None}
        yield clone(estimator).fit(_safe_indexing(X, rows), **of_half)

"""Replicates of counts, and compositions."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.utils import Bunch

from .. import _capture
from .._typing import Capture, CountsLike, Covariates, Latent, Level, Seed
from ..predictive._interface import PredictiveModel
from ._arguments import prepare, validated_options
from ._replicates import softmax


@validated_options()
def posterior_predictive(
    estimator: PredictiveModel,
    X: CountsLike | None = None,
    *,
    level: Level = "library_anchored",
    capture: Capture = "posterior",
    latent: Latent = "posterior",
    n_samples: int = 100,
    genes: ArrayLike | None = None,
    random_state: Seed = None,
    covariates: Covariates | None = None,
    offset: ArrayLike | None = None,
) -> np.ndarray:
    r"""Draw counts from a fitted model: replicates of the rows of X.

    Each replicate takes one joint draw of r, mu and eta from the posterior, as `sample_posterior` does:
    frozen parameters come from the source's posterior. W and d are the fitted ones, scaled under
    ``cascade="marginal"`` to the share of the overdispersion that the draw of r leaves to Sigma. Then
    it draws the counts, with ``NB(mean, r) = Poisson(mean * gamma)``, ``gamma ~ Gamma(r, 1/r)`` (1 for
    Poisson channels):

    ``"marginal"``
        Fresh log-rates and totals of cells of the same depths: ``x ~ N(mu, Sigma)``,
        ``u ~ Poisson(exp(x - eta) * gamma)``. The row's capture offset is drawn from its posterior given
        its counts: the source's where it is frozen, the model's own where it is free. With
        ``capture="prior"`` it is ``eta_c ~ TruncNormal(log M0 - log L_c, sigma_M, low=0)``, with ``L_c`` the
        row's observed total: totals then scatter by sigma_M nats more.
    ``"library_anchored"``
        Fresh compositions, observed totals: ``u_c ~ Multinomial(L_c, p_c)``, ``p_c`` proportional to
        ``exp(x_c) * gamma_c``, so that overdispersion is kept. The capture offset drops out.
    ``"per_cell"``
        ``y = x - eta`` from the row's own Laplace posterior ``N(y*, (-H)^{-1})`` given its counts and
        the draw of the parameters, then ``u ~ Poisson(exp(y) * gamma)``. A frozen offset is the draw
        of the source's posterior; a free one is integrated. For `NBVCPEstimator`, whose log-rates
        do not vary, ``y = log m - eta``. With ``observation="multinomial"`` the totals are the observed
        ones.

    Parameters
    ----------
    estimator : fitted NBVCPEstimator or NBLNEstimator
        The model.
    X : {array-like, sparse matrix} of shape (n_rows, n_genes) or None, default=None
        Rows to replicate. None stands for the training rows; ``"per_cell"`` needs the counts.
        Fractional totals are rounded.
    level : {"marginal", "library_anchored", "per_cell"}, default="library_anchored"
        What is drawn afresh.
    capture : {"posterior", "prior"}, default="posterior"
        Where ``level="marginal"`` takes the rows' capture offsets from: their posterior given their
        counts, or the capture prior, for cells that are still to come.
    latent : {"posterior", "mode"}, default="posterior"
        Where ``level="per_cell"`` takes the rows' own log-rates from: draws of their posterior, or its mode,
        so that what scatters is the count noise and the parameters alone.
    n_samples : int, default=100
        Replicates.
    genes : array-like of int or str, or None, default=None
        Positions or names (in ``feature_names_in_``) of the genes to return, in this order; None for
        all. A gene's draws do not depend on the selection.
    random_state : int, RandomState instance or None, default=None
        None for the estimator's own. The same seed gives the same draws.
    covariates, offset
        Covariates and log-exposures of the rows of X, as in `fit`; the training rows have theirs.

    Returns
    -------
    ndarray of shape (n_samples, n_rows, n_genes_selected), int64
        Counts.

    Raises
    ------
    ValueError
        For unknown or repeated genes, for ``"per_cell"`` without X, for ``"marginal"`` with
        ``observation="multinomial"`` (it has no distribution of totals), for ``capture="prior"`` or
        ``latent="mode"`` with another level, and when a drawn rate is beyond 64-bit counts.
    TypeError
        When `estimator` is not one of the two.

    See Also
    --------
    iter_posterior_predictive : The same, one replicate at a time.
    predictive_check : Predictive p-values of genes, in bounded memory.

    Notes
    -----
    The result takes ``8 n_samples n_rows n_genes_selected`` bytes, besides a few chunks of rows and the
    draws of the parameters. All genes are drawn whatever `genes` is, since compositions need them:
    a selection saves memory, not time. ``"per_cell"`` of an `NBLNEstimator` finds the
    mode of every row once per replicate.

    Examples
    --------
    >>> from sknbln import NBVCPEstimator
    >>> from sknbln.datasets import make_nbvcp_counts
    >>> from sknbln.predictive import posterior_predictive
    >>> X = make_nbvcp_counts(n_cells=150, n_genes=24, random_state=0).data
    >>> model = NBVCPEstimator(random_state=0).fit(X)
    >>> draws = posterior_predictive(model, X, n_samples=5, random_state=0)
    >>> draws.shape
    (5, 150, 24)
    >>> bool((draws.sum(axis=2) == X.sum(axis=1)).all())
    True
    """
    options: dict[str, Any] = dict(level=level, capture=capture, latent=latent)
    options |= dict(covariates=covariates, offset=offset)
    replicates, positions = prepare(estimator, X, genes, n_samples, random_state, **options)
    out = np.empty((n_samples, replicates.n_rows, positions.size), np.int64)
    for s in range(n_samples):
        replicates.counts(s, positions, out=out[s])
    return out


@validated_options()
def iter_posterior_predictive(
    estimator: PredictiveModel,
    X: CountsLike | None = None,
    *,
    level: Level = "library_anchored",
    capture: Capture = "posterior",
    latent: Latent = "posterior",
    n_samples: int = 100,
    genes: ArrayLike | None = None,
    random_state: Seed = None,
    covariates: Covariates | None = None,
    offset: ArrayLike | None = None,
) -> Iterator[np.ndarray]:
    """Iterate over the replicates that :func:`posterior_predictive` stacks, one at a time.

    Memory holds one replicate, a few chunks of rows and the draws of the parameters. Arguments are
    checked at the call, not at the first replicate.

    Parameters
    ----------
    estimator, X, level, capture, latent, n_samples, genes, random_state, covariates, offset
        See :func:`posterior_predictive`.

    Returns
    -------
    iterator of ndarray of shape (n_rows, n_genes_selected), int64
        `n_samples` replicates.

    Raises
    ------
    ValueError, TypeError
        As :func:`posterior_predictive`.

    Examples
    --------
    >>> from sknbln import NBVCPEstimator
    >>> from sknbln.datasets import make_nbvcp_counts
    >>> from sknbln.predictive import iter_posterior_predictive
    >>> X = make_nbvcp_counts(n_cells=150, n_genes=24, random_state=0).data
    >>> model = NBVCPEstimator(random_state=0).fit(X)
    >>> largest = [u.max() for u in iter_posterior_predictive(model, X, n_samples=5)]
    >>> len(largest)
    5
    """
    options: dict[str, Any] = dict(level=level, capture=capture, latent=latent)
    options |= dict(covariates=covariates, offset=offset)
    replicates, positions = prepare(estimator, X, genes, n_samples, random_state, **options)
    return (replicates.counts(s, positions) for s in range(n_samples))


@validated_options()
def compositional_samples(
    estimator: PredictiveModel,
    X: CountsLike | None = None,
    *,
    n_samples: int = 1000,
    genes: ArrayLike | None = None,
    random_state: Seed = None,
) -> Bunch:
    """Draw compositions of cells from the model, before count noise, beside the empirical ones.

    The model's points on the simplex are ``softmax(x)``, one fresh ``x ~ N(mu, Sigma)`` per posterior
    draw, at the mean of the covariates. They do not depend on the level of the log-rates, nor on capture. The
    gamma noise of the
    counts belongs to the observation and is left out: the points of an `NBVCPEstimator` are its mean
    composition ``m / sum(m)`` per posterior draw, the limit Sigma -> 0. In that model all cells have the
    same composition, and the points spread by the uncertainty of the posterior alone. Empirical
    compositions scatter more than the model's, by count noise.

    Parameters
    ----------
    estimator : fitted NBVCPEstimator or NBLNEstimator
        The model.
    X : {array-like, sparse matrix} of shape (n_rows, n_genes) or None, default=None
        Counts whose compositions are returned too.
    n_samples : int, default=1000
        Points of the model.
    genes : array-like of int or str, or None, default=None
        Positions or names of the genes to return; shares are of the counts of all genes.
    random_state : int, RandomState instance or None, default=None
        None for the estimator's own.

    Returns
    -------
    Bunch
        ``model`` (n_samples, n_genes_selected). With X also ``cells`` (n_rows_with_counts,
        n_genes_selected), each row divided by its total, without rows that have no counts, and
        ``pseudobulk`` (n_genes_selected,), the column totals divided by the total of X.

    Raises
    ------
    ValueError
        For unknown or repeated genes, and when X has no counts at all.

    Examples
    --------
    >>> from sknbln import NBVCPEstimator
    >>> from sknbln.datasets import make_nbvcp_counts
    >>> from sknbln.predictive import compositional_samples
    >>> X = make_nbvcp_counts(n_cells=150, n_genes=24, random_state=0).data
    >>> model = NBVCPEstimator(random_state=0).fit(X)
    >>> shares = compositional_samples(model, X, n_samples=50, genes=[3, 1, 2])
    >>> shares.model.shape, shares.cells.shape, shares.pseudobulk.shape
    ((50, 3), (150, 3), (3,))
    """
    replicates, positions = prepare(estimator, None, genes, n_samples, random_state)
    points = np.empty((n_samples, positions.size))
    for s in range(n_samples):
        points[s] = softmax(replicates.fresh_rates(replicates.params(s), 1))[0, positions]
    compositions = Bunch(model=points)
    if X is not None:
        counts = replicates.model._validated(X)
        totals = _capture.library_sizes(counts)
        if not totals.any():
            raise ValueError("X has no counts: compositions of its rows are not defined.")
        has_counts = totals > 0
        compositions.cells = counts[has_counts][:, positions].toarray() / totals[has_counts, None]
        columns = np.asarray(counts.sum(axis=0), float).ravel()
        compositions.pseudobulk = columns[positions] / totals.sum()
    return compositions

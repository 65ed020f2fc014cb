"""Checks of counts against their replicates: p-values of genes, residuals of entries."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse
from scipy.stats import kstest
from sklearn.utils import Bunch
from sklearn.utils.validation import column_or_1d

from .._typing import Capture, CountsLike, Covariates, Latent, Level, Seed
from ..predictive._interface import PredictiveModel
from ._arguments import prepare, validated_options

STATISTICS = ("mean", "variance", "zero_fraction", "maximum")


@validated_options()
def predictive_check(
    estimator: PredictiveModel,
    X: CountsLike,
    *,
    level: Level = "library_anchored",
    capture: Capture = "posterior",
    latent: Latent = "posterior",
    n_samples: int = 100,
    genes: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    random_state: Seed = None,
    covariates: Covariates | None = None,
    offset: ArrayLike | None = None,
) -> Bunch:
    r"""Posterior predictive p-values of every gene: mean, variance, zero fraction, maximum.

    Each statistic T of a gene over the rows of X is compared with that of replicated rows:

    .. math:: p = \frac{\#\{T_s > T\} + (\#\{T_s = T\} + 1) / 2}{n_{samples} + 1}

    the mid-p value, the observation ranked among the replicates with ties halved. Small p: observed
    larger than predicted; p near 1: smaller.

    Parameters
    ----------
    estimator : fitted NBVCPEstimator or NBLNEstimator
        The model.
    X : {array-like, sparse matrix} of shape (n_rows, n_genes)
        Counts, at least two rows. Only rows that the fit has not seen make a test; see Notes.
    level, capture, latent, random_state, covariates, offset
        See :func:`posterior_predictive`.
    n_samples : int, default=100
        Number of replicates. p-values are ``0.5 / (n_samples + 1)`` or more from 0 and 1.
    genes : array-like of int or str, or None, default=None
        Positions or names of the genes to check; None for all.
    groups : array-like of shape (n_rows,) or None, default=None
        Labels of groups of rows, such as cell types or batches, each of which is checked on its own: which
        of them the model does not describe.

    Returns
    -------
    Bunch
        ``p_values``, ``observed``, ``predicted`` and ``spread`` (mean and standard deviation over the
        replicates), each a Bunch of ``mean``, ``variance`` (divisor n_rows - 1), ``zero_fraction`` and
        ``maximum``, all (n_genes_selected,), or
        (n_groups, n_genes_selected) with `groups`; ``genes``, the positions of the genes; ``groups``, the
        labels in the order of the rows of these arrays, or None; ``totals``, a Bunch of the same four
        Bunches for the rows' totals over all genes, floats or (n_groups,), or None where replicates have
        the observed totals; ``summary``, a dict of
        floats: per statistic ``"<statistic>_outside"``, the fraction of genes (and groups) with p outside
        [0.025, 0.975] (0.05 when all is right), and ``"<statistic>_ks"``, the largest distance of the
        p-values' distribution from the uniform one.

    Raises
    ------
    ValueError
        As :func:`posterior_predictive`; for fewer than two rows, in X or in a group; if `groups` has not a
        label for every row.

    Notes
    -----
    The p-values are uniform, up to the ties of discrete statistics, when X was drawn from the level's
    predictive distribution at the parameters. Otherwise:

    * On the rows of the fit they are conservative, nearer to 1/2 than uniform ones: the parameters
      were fitted to these counts, most of all the means.
    * ``"library_anchored"`` takes the total of a row as no evidence on its composition: exact for a flat
      capture prior, and close where capture varies more between rows than the sum of the rates. Where a
      few genes make up the totals it rejects the true model: at the true parameters of
      300 rows of ``make_nbln_counts`` (five seeds), 7 % of the genes' variances were outside
      [0.025, 0.975] with 200 genes, 20 % with 30.
    * ``"marginal"`` is exact without a capture model. With one, the offsets depend on the rows' totals and
      little else: at the true parameters of 500 rows of 200 genes of ``make_nbln_counts`` (three seeds) 5 %
      of the means, 6 % of the variances, 5 % of the zero fractions and 6 % of the maxima were outside. An
      offset that is frozen at a source of independent genes absorbs what the log-rates of a cell share,
      and totals scatter a little too much. With ``capture="prior"`` the prior is centred on the observed
      totals: replicated ones scatter around them, and their mean is larger, by about
      ``exp(sigma_M**2 / 2)``.
    * ``"per_cell"`` uses the rows' counts twice, on new rows too. It shows misfit of the count noise
      but is no test: under the true model 2 to 4 % are outside instead of 5.

    Genes share rows: the p-values of correlated genes are not independent.

    Memory holds a chunk of rows; replicates are never stored.

    Examples
    --------
    >>> from sknbln import NBVCPEstimator
    >>> from sknbln.datasets import make_nbvcp_counts
    >>> from sknbln.predictive import predictive_check
    >>> X = make_nbvcp_counts(n_cells=300, n_genes=24, random_state=0).data
    >>> model = NBVCPEstimator(random_state=0).fit(X[:150])
    >>> check = predictive_check(model, X[150:], n_samples=50, random_state=0)
    >>> check.p_values.variance.shape
    (24,)
    >>> sorted(check.summary)[:2]
    ['maximum_ks', 'maximum_outside']
    """
    options: dict[str, Any] = dict(level=level, capture=capture, latent=latent)
    options |= dict(covariates=covariates, offset=offset)
    replicates, positions = prepare(
        estimator, X, genes, n_samples, random_state, needs_counts=True, **options
    )
    labels, members = _members(groups, replicates.n_rows)
    observed = _observed_statistics(replicates, positions, members)
    above, ties, total, squares = np.zeros((4, *observed.shape))
    for s in range(n_samples):
        drawn = _replicated_statistics(replicates, s, positions, members)
        above += drawn > observed
        ties += drawn == observed
        total += drawn
        squares += (drawn - observed) ** 2
    predicted = total / n_samples
    squares -= n_samples * (predicted - observed) ** 2
    spread = np.sqrt(np.maximum(squares, 0.0) / max(n_samples - 1, 1))
    p = (above + (ties + 1) / 2) / (n_samples + 1)
    found = {"p_values": p, "observed": observed, "predicted": predicted, "spread": spread}
    if labels is None:
        found = {name: values[:, 0] for name, values in found.items()}
    summary = {}
    for name, values in zip(STATISTICS, found["p_values"][..., :-1], strict=True):
        summary[f"{name}_outside"] = float(np.mean((values < 0.025) | (values > 0.975)))
        summary[f"{name}_ks"] = float(kstest(values.ravel(), "uniform").statistic)
    totals = None
    if not replicates.given_totals:
        totals = Bunch(**{name: _named(values[..., -1]) for name, values in found.items()})
    return Bunch(
        **{name: _named(values[..., :-1]) for name, values in found.items()},
        genes=positions,
        groups=labels,
        totals=totals,
        summary=summary,
    )


def _members(groups, n_rows):
    """Labels of the groups, None without any, and an indicator matrix (n_groups, n_rows) of their rows."""
    labels, place = None, np.zeros(n_rows, int)
    if groups is not None:
        groups = column_or_1d(groups, dtype=None)
        if groups.size != n_rows:
            raise ValueError(
                f"groups has {groups.size} labels, X has {n_rows} rows: give one for each."
            )
        labels, place = np.unique(groups, return_inverse=True)
    n_members = np.bincount(place, minlength=1)
    if n_members.min() < 2:
        what = "X" if labels is None else f"The group {str(labels[np.argmin(n_members)])!r}"
        raise ValueError(f"{what} has {n_members.min()} row: a check needs at least two.")
    indicator = sparse.csr_array((np.ones(n_rows), (place, np.arange(n_rows))))
    return labels, indicator


def _named(statistics):
    return Bunch(**dict(zip(STATISTICS, statistics, strict=True)))


def _statistics(n, total, squares, zeros, largest):
    """Statistics from sums over n rows; equal sums give equal statistics, so that ties are exact."""
    variance = np.maximum(squares - total * (total / n), 0.0) / (n - 1)
    return np.stack([total / n, variance, zeros / n, largest])


def _observed_statistics(replicates, positions, members):
    """Statistics (4, n_groups, n_genes_selected + 1) of the counts, those of the rows' totals last."""
    chunks = (
        (
            rows,
            _with_totals(replicates.X[rows][:, positions].toarray(), replicates.library_size[rows]),
        )
        for rows in replicates.row_chunks()
    )
    return _statistics_of_chunks(chunks, members, positions.size + 1)


def _replicated_statistics(replicates, s, positions, members):
    """The same of replicate s."""
    chunks = (
        (rows, _with_totals(counts[:, positions], counts.sum(axis=1)))
        for rows, counts in replicates.chunks(s)
    )
    return _statistics_of_chunks(chunks, members, positions.size + 1)


def _with_totals(counts, totals):
    return np.column_stack([counts, totals]).astype(float)


def _statistics_of_chunks(chunks, members, n_columns):
    n = members.sum(axis=1)[:, None]
    total, squares, zeros, largest = np.zeros((4, n.size, n_columns))
    for rows, counts in chunks:
        own = members[:, rows]
        total += own @ counts
        squares += own @ counts**2
        zeros += own @ (counts == 0.0)
        for g in range(n.size):
            chosen = counts[own.indices[own.indptr[g] : own.indptr[g + 1]]]
            largest[g] = np.maximum(largest[g], chosen.max(axis=0, initial=0.0))
    return _statistics(n, total, squares, zeros, largest)


@validated_options()
def quantile_residuals(
    estimator: PredictiveModel,
    X: CountsLike,
    *,
    n_samples: int = 100,
    genes: ArrayLike | None = None,
    random_state: Seed = None,
    covariates: Covariates | None = None,
    offset: ArrayLike | None = None,
) -> np.ndarray:
    r"""Randomized quantile residuals of every count, uniform on (0, 1) under the model.

    The rank of a count among its library-anchored replicates, with ties broken at random:

    .. math:: q_{cg} = \frac{\#\{u_s < u\} + v\, (\#\{u_s = u\} + 1)}{n_{samples} + 1}, \qquad
              v \sim U(0, 1)

    the sum over replicates s of the same entry. A count that is drawn like its replicates gives
    exactly uniform q, whatever `n_samples` is.

    Parameters
    ----------
    estimator : fitted NBVCPEstimator or NBLNEstimator
        The model.
    X : {array-like, sparse matrix} of shape (n_rows, n_genes)
        Counts. On the rows of the fit residuals are a little nearer to 1/2 than uniform ones.
    n_samples : int, default=100
        Number of replicates.
    genes, random_state, covariates, offset
        See :func:`posterior_predictive`.

    Returns
    -------
    ndarray of shape (n_rows, n_genes_selected)
        In (0, 1), NaN for missing counts; ``scipy.stats.norm.ppf`` makes normal residuals of them.

    Raises
    ------
    ValueError
        As :func:`posterior_predictive`.

    Notes
    -----
    A row's total is taken as no evidence on its composition; the notes of :func:`predictive_check` say
    when that is exact. Residuals of a row share its scores and its total, and are
    not independent; those of a gene are, over rows. Residuals of rows without counts are random
    numbers. Memory holds twice the size of the result.

    References
    ----------
    Dunn and Smyth (1996), Randomized quantile residuals, J. Comput. Graph. Stat. 5(3).

    Examples
    --------
    >>> from sknbln import NBVCPEstimator
    >>> from sknbln.datasets import make_nbvcp_counts
    >>> from sknbln.predictive import quantile_residuals
    >>> X = make_nbvcp_counts(n_cells=150, n_genes=24, random_state=0).data
    >>> model = NBVCPEstimator(random_state=0).fit(X)
    >>> quantile_residuals(model, X, n_samples=50, genes=[0, 1], random_state=0).shape
    (150, 2)
    """
    known = dict(covariates=covariates, offset=offset)
    replicates, positions = prepare(
        estimator, X, genes, n_samples, random_state, needs_counts=True, **known
    )
    observed = replicates.X[:, positions].toarray()
    below, ties = np.zeros((2, *observed.shape), np.int32)
    for s in range(n_samples):
        for rows, counts in replicates.chunks(s):
            drawn = counts[:, positions]
            below[rows] += drawn < observed[rows]
            ties[rows] += drawn == observed[rows]
    residuals = observed
    for rows in replicates.row_chunks():
        # drawn for all genes, so that a gene's residuals do not depend on the selection
        uniform = replicates.rng.uniform(size=(rows.stop - rows.start, replicates.n_genes))[
            :, positions
        ]
        residuals[rows] = (below[rows] + uniform * (ties[rows] + 1)) / (n_samples + 1)
    if replicates.known.missing is not None:
        residuals[replicates.known.missing[:, positions].toarray()] = np.nan
    return np.clip(residuals, np.finfo(float).tiny, 1 - np.finfo(float).epsneg, out=residuals)

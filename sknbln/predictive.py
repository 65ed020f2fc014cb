"""Posterior predictive draws of counts, and checks of a fit against them.

Everything here takes a fitted `NBVCPEstimator` or `NBLNEstimator`.
"""

from numbers import Integral, Real

import numpy as np
from scipy.stats import kstest
from sklearn.utils import Bunch, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions, validate_params
from sklearn.utils.validation import check_is_fitted

from . import _capture
from ._moments import count_moments
from ._replicates import LEVELS, Replicates, softmax

__all__ = [
    "compositional_samples",
    "iter_posterior_predictive",
    "posterior_predictive",
    "predictive_check",
    "quantile_residuals",
]

_CONSTRAINTS = {
    "level": [StrOptions(set(LEVELS))],
    "n_samples": [Interval(Integral, 1, None, closed="left")],
    "random_state": ["random_state"],
}
_WITHOUT_LEVEL = {name: _CONSTRAINTS[name] for name in ("n_samples", "random_state")}
STATISTICS = ("mean", "variance", "zero_fraction", "maximum")


class PredictiveMixin:
    """Replicated counts and moments as methods of an estimator."""

    def posterior_predictive(
        self, X=None, *, level="library_anchored", n_samples=100, genes=None, random_state=None
    ):
        """Counts drawn from the fitted model: :func:`sknbln.predictive.posterior_predictive`.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_rows, n_genes) or None, default=None
            Rows to replicate; None for the training rows (not with ``level="per_cell"``).
        level : {"marginal", "library_anchored", "per_cell"}, default="library_anchored"
            What is drawn afresh.
        n_samples : int, default=100
            Replicates, each with a posterior draw of its own.
        genes : array-like of int or str, or None, default=None
            Positions or names of the genes to return.
        random_state : int, RandomState instance or None, default=None
            None takes the estimator's.

        Returns
        -------
        ndarray of shape (n_samples, n_rows, n_genes_selected), int64
        """
        return posterior_predictive(
            self, X, level=level, n_samples=n_samples, genes=genes, random_state=random_state
        )

    def moments(self, *, offset=0.0):
        r"""Mean, variance and covariance of the counts of a cell, in closed form.

        At the fitted parameters, with ``S = Sigma`` (0 for `NBVCPEstimator`, where ``mu = log m``):

        .. math:: E u_g &= e^{\mu_g + S_{gg}/2 - \eta} \\
                  Var\, u_g &= E u_g + (E u_g)^2 (e^{S_{gg}} - 1) + e^{2\mu_g + 2 S_{gg} - 2\eta} / r_g \\
                  Cov(u_g, u_h) &= E u_g\, E u_h\, (e^{S_{gh}} - 1)

        The last term of the variance is ``E[rate^2] / r_g``, by the law of total variance. It is
        sometimes written ``(E u_g)^2 / r_g``, which is its value at ``S_gg = 0`` and too small by
        ``exp(S_gg)`` elsewhere.

        Parameters
        ----------
        offset : float, default=0.0
            Capture offset eta of the cell, nats; 0 is full capture.

        Returns
        -------
        Bunch
            ``mean`` (n_genes,), ``variance`` (n_genes,) and ``covariance`` (n_genes, n_genes), whose
            diagonal is ``variance``.

        Raises
        ------
        ValueError
            When `offset` is not a finite number, and for ``observation="multinomial"``, which has no
            distribution of totals.

        Warns
        -----
        RuntimeWarning
            When moments are beyond floating point; they are inf.
        """
        check_is_fitted(self)
        _refuse_multinomial(self, "moments()")
        if not isinstance(offset, Real) or not np.isfinite(offset):
            raise ValueError(f"offset={offset!r}: expected a finite number, in nats.")
        return count_moments(*self._globals(), float(offset))


@validate_params(_CONSTRAINTS, prefer_skip_nested_validation=True)
def posterior_predictive(
    estimator,
    X=None,
    *,
    level="library_anchored",
    n_samples=100,
    genes=None,
    random_state=None,
):
    r"""Draw counts from a fitted model: replicates of the rows of X.

    Each replicate takes one joint draw of the parameters from the posterior (`sample_posterior`: what
    is frozen comes from the source's own posterior), then draws the counts, with ``NB(mean, r) =
    Poisson(mean * gamma)``, ``gamma ~ Gamma(r, 1/r)`` (1 for Poisson channels):

    ``"marginal"``
        Everything is fresh: ``x ~ N(mu, Sigma)``, ``eta_c ~ TruncNormal(log M0 - log L_c, sigma_M, low=0)``,
        ``u ~ Poisson(exp(x - eta) * gamma)``. The capture prior of a row depends on its library size
        ``L_c``, which is a design here: that of the rows given, as observed. Totals therefore scatter
        around the observed ones, by sigma_M nats and by the model's own variation.
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
    n_samples : int, default=100
        Replicates.
    genes : array-like of int or str, or None, default=None
        Positions or names (of ``feature_names_in_``) of the genes to return, in this order; None for
        all. A gene's draws do not depend on the selection.
    random_state : int, RandomState instance or None, default=None
        None takes the estimator's. The same seed gives the same draws.

    Returns
    -------
    ndarray of shape (n_samples, n_rows, n_genes_selected), int64
        Counts.

    Raises
    ------
    ValueError
        For unknown or repeated genes, for ``"per_cell"`` without X, for ``"marginal"`` with
        ``observation="multinomial"`` (it has no distribution of totals), and when a drawn rate is
        beyond 64-bit counts.
    TypeError
        When `estimator` is neither of the two.

    See Also
    --------
    iter_posterior_predictive : The same, one replicate at a time.
    predictive_check : Predictive p-values of genes, in bounded memory.

    Notes
    -----
    The result takes ``8 n_samples n_rows n_genes_selected`` bytes; besides it there are a few chunks
    of rows and the parameters' draws. All genes are drawn whatever `genes` is (compositions need
    them): the selection saves memory, not time. ``"per_cell"`` of an `NBLNEstimator` finds the
    mode of every row once per replicate.

    Examples
    --------
    >>> from sknbln import NBVCPEstimator
    >>> from sknbln.datasets import make_nbvcp_counts
    >>> from sknbln.predictive import posterior_predictive
    >>> X = make_nbvcp_counts(n_cells=100, n_genes=20, random_state=0).data
    >>> model = NBVCPEstimator(random_state=0).fit(X)
    >>> draws = posterior_predictive(model, X, n_samples=5, random_state=0)
    >>> draws.shape
    (5, 100, 20)
    >>> bool((draws.sum(axis=2) == X.sum(axis=1)).all())
    True
    """
    positions = _gene_positions(estimator, genes)
    replicates = _replicates(estimator, X, level, n_samples, random_state)
    out = np.empty((n_samples, replicates.n_rows, positions.size), np.int64)
    for s in range(n_samples):
        for rows, counts in replicates.chunks(s):
            out[s, rows] = counts[:, positions]
    return out


@validate_params(_CONSTRAINTS, prefer_skip_nested_validation=True)
def iter_posterior_predictive(
    estimator,
    X=None,
    *,
    level="library_anchored",
    n_samples=100,
    genes=None,
    random_state=None,
):
    """Iterate over replicates: what :func:`posterior_predictive` stacks, one at a time.

    Memory is that of one replicate, a few chunks of rows and the parameters' draws. Arguments are
    checked at the call, not at the first replicate.

    Parameters
    ----------
    estimator : fitted NBVCPEstimator or NBLNEstimator
        The model.
    X : {array-like, sparse matrix} of shape (n_rows, n_genes) or None, default=None
        Rows to replicate; None for the training rows.
    level : {"marginal", "library_anchored", "per_cell"}, default="library_anchored"
        What is drawn afresh.
    n_samples : int, default=100
        Replicates.
    genes : array-like of int or str, or None, default=None
        Positions or names of the genes to return.
    random_state : int, RandomState instance or None, default=None
        None takes the estimator's.

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
    >>> X = make_nbvcp_counts(n_cells=100, n_genes=20, random_state=0).data
    >>> model = NBVCPEstimator(random_state=0).fit(X)
    >>> largest = [u.max() for u in iter_posterior_predictive(model, X, n_samples=5)]
    >>> len(largest)
    5
    """
    positions = _gene_positions(estimator, genes)
    replicates = _replicates(estimator, X, level, n_samples, random_state)
    return _stacked_chunks(replicates, positions)


def _stacked_chunks(replicates, positions):
    for s in range(replicates.n_samples):
        out = np.empty((replicates.n_rows, positions.size), np.int64)
        for rows, counts in replicates.chunks(s):
            out[rows] = counts[:, positions]
        yield out


@validate_params(_WITHOUT_LEVEL, prefer_skip_nested_validation=True)
def compositional_samples(estimator, X=None, *, n_samples=1000, genes=None, random_state=None):
    """Compositions of cells before observation noise, and the empirical ones beside them.

    The model's points on the simplex are ``softmax(x)``, one fresh ``x ~ N(mu, Sigma)`` per posterior
    draw. They are invariant under the exchange of log-rate level and capture. The gamma noise of the
    counts belongs to the observation and is left out, in both models: the points of
    an `NBVCPEstimator` are its mean composition ``m / sum(m)`` per posterior draw, the limit Sigma -> 0.
    By that model the compositions of cells do not differ, and the spread of its points is what the
    posterior does not know. Empirical compositions scatter more than the model's by their observation noise.

    Parameters
    ----------
    estimator : fitted NBVCPEstimator or NBLNEstimator
        The model.
    X : {array-like, sparse matrix} of shape (n_rows, n_genes) or None, default=None
        Counts whose compositions are returned too.
    n_samples : int, default=1000
        Points of the model.
    genes : array-like of int or str, or None, default=None
        Positions or names of the genes to return: coordinates of the composition of all genes.
    random_state : int, RandomState instance or None, default=None
        None takes the estimator's.

    Returns
    -------
    Bunch
        ``model`` (n_samples, n_genes_selected); and if X is given ``cells`` (n_rows_with_counts,
        n_genes_selected), each row by its total, rows without counts left out, and ``pseudobulk``
        (n_genes_selected,), the column totals by the total of X.

    Raises
    ------
    ValueError
        For unknown or repeated genes, and when X has no counts at all.

    Examples
    --------
    >>> from sknbln import NBVCPEstimator
    >>> from sknbln.datasets import make_nbvcp_counts
    >>> from sknbln.predictive import compositional_samples
    >>> X = make_nbvcp_counts(n_cells=100, n_genes=20, random_state=0).data
    >>> model = NBVCPEstimator(random_state=0).fit(X)
    >>> found = compositional_samples(model, X, n_samples=50, genes=[3, 1, 2])
    >>> found.model.shape, found.cells.shape, found.pseudobulk.shape
    ((50, 3), (100, 3), (3,))
    """
    positions = _gene_positions(estimator, genes)
    replicates = _replicates(estimator, None, "library_anchored", n_samples, random_state)
    points = np.empty((n_samples, positions.size))
    for s, model in enumerate(replicates.models()):
        points[s] = softmax(replicates.fresh_rates(model, 1))[0, positions]
    found = Bunch(model=points)
    if X is not None:
        X = estimator._validated(X)
        totals = _capture.library_sizes(X)
        if not totals.any():
            raise ValueError("X has no counts: compositions of its rows are not defined.")
        some = totals > 0
        found.cells = X[some][:, positions].toarray() / totals[some, None]
        columns = np.asarray(X.sum(axis=0), float).ravel()
        found.pseudobulk = columns[positions] / totals.sum()
    return found


@validate_params(_CONSTRAINTS, prefer_skip_nested_validation=True)
def predictive_check(
    estimator,
    X,
    *,
    level="library_anchored",
    n_samples=100,
    genes=None,
    random_state=None,
):
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
        Counts, at least two rows. Rows that the fit has not seen make a test; see Notes.
    level : {"marginal", "library_anchored", "per_cell"}, default="library_anchored"
        See :func:`posterior_predictive`.
    n_samples : int, default=100
        Replicates. p-values lie within ``0.5 / (n_samples + 1)`` of 0 and 1.
    genes : array-like of int or str, or None, default=None
        Positions or names of the genes to check.
    random_state : int, RandomState instance or None, default=None
        None takes the estimator's.

    Returns
    -------
    Bunch
        ``p_values``, ``observed`` and ``predicted`` (mean over the replicates), each a Bunch of ``mean``,
        ``variance`` (divisor n_rows - 1), ``zero_fraction`` and ``maximum``, all (n_genes_selected,);
        ``genes``, the positions of the genes; ``summary``, a dict of floats: per statistic
        ``"<statistic>_outside"``, the fraction of genes with p outside [0.025, 0.975] (0.05 when all is
        right), and ``"<statistic>_ks"``, the largest distance of the p-values' distribution from the
        uniform one.

    Raises
    ------
    ValueError
        As :func:`posterior_predictive`, and for fewer than two rows.

    Notes
    -----
    The p-values are uniform, up to the ties of discrete statistics, when X was drawn from the level's
    predictive. On the rows of the fit they are conservative, nearer to 1/2 than uniform ones: the
    parameters have seen the counts, most of all the means. ``"per_cell"`` uses the rows' counts twice, on
    new rows too; it shows misfit of the count noise and is no test. ``"library_anchored"``
    takes the total of a row as no evidence on its composition, which is exact for a flat
    capture prior. ``"marginal"`` centres the capture prior on the observed library size and scatters the
    totals around it once more, so that what depends on totals is conservative unless there
    is no capture model. Genes share rows: the p-values of correlated genes are not
    independent.

    Memory is that of a chunk of rows; the replicates are never held.

    Examples
    --------
    >>> from sknbln import NBVCPEstimator
    >>> from sknbln.datasets import make_nbvcp_counts
    >>> from sknbln.predictive import predictive_check
    >>> X = make_nbvcp_counts(n_cells=200, n_genes=20, random_state=0).data
    >>> model = NBVCPEstimator(random_state=0).fit(X[:100])
    >>> check = predictive_check(model, X[100:], n_samples=50, random_state=0)
    >>> check.p_values.variance.shape
    (20,)
    >>> sorted(check.summary)[:2]
    ['maximum_ks', 'maximum_outside']
    """
    positions = _gene_positions(estimator, genes)
    replicates = _replicates(estimator, X, level, n_samples, random_state, needs_counts=True)
    if replicates.n_rows < 2:
        raise ValueError(f"X has {replicates.n_rows} row: a check needs at least two.")
    observed = _observed_statistics(replicates.X[:, positions])
    above, ties, total = np.zeros((3, *observed.shape))
    for s in range(n_samples):
        drawn = _replicated_statistics(replicates, s, positions)
        above += drawn > observed
        ties += drawn == observed
        total += drawn
    p = (above + (ties + 1) / 2) / (n_samples + 1)
    summary = {}
    for name, values in zip(STATISTICS, p, strict=True):
        summary[f"{name}_outside"] = float(np.mean((values < 0.025) | (values > 0.975)))
        summary[f"{name}_ks"] = float(kstest(values, "uniform").statistic)
    return Bunch(
        p_values=_named(p),
        observed=_named(observed),
        predicted=_named(total / n_samples),
        genes=positions,
        summary=summary,
    )


def _named(statistics):
    return Bunch(**dict(zip(STATISTICS, statistics, strict=True)))


def _statistics(n, total, squares, zeros, largest):
    """From sums over n rows; equal sums give equal statistics, so that ties are seen."""
    variance = np.maximum(squares - total * (total / n), 0.0) / (n - 1)
    return np.stack([total / n, variance, zeros / n, largest])


def _observed_statistics(X):
    n = X.shape[0]
    columns = X.tocsc()
    total = np.asarray(columns.sum(axis=0), float).ravel()
    squares = np.asarray(columns.multiply(columns).sum(axis=0), float).ravel()
    zeros = n - np.diff(columns.indptr).astype(float)
    largest = columns.max(axis=0).toarray().ravel().astype(float)
    return _statistics(n, total, squares, zeros, largest)


def _replicated_statistics(replicates, s, positions):
    total, squares, zeros, largest = np.zeros((4, positions.size))
    for _, counts in replicates.chunks(s):
        counts = counts[:, positions].astype(float)
        total += counts.sum(axis=0)
        squares += np.sum(counts**2, axis=0)
        zeros += np.sum(counts == 0, axis=0)
        largest = np.maximum(largest, counts.max(axis=0))
    return _statistics(replicates.n_rows, total, squares, zeros, largest)


@validate_params(_WITHOUT_LEVEL, prefer_skip_nested_validation=True)
def quantile_residuals(estimator, X, *, n_samples=100, genes=None, random_state=None):
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
        Replicates.
    genes : array-like of int or str, or None, default=None
        Positions or names of the genes.
    random_state : int, RandomState instance or None, default=None
        None takes the estimator's.

    Returns
    -------
    ndarray of shape (n_rows, n_genes_selected)
        In (0, 1); ``scipy.stats.norm.ppf`` makes normal residuals of them.

    Raises
    ------
    ValueError
        As :func:`posterior_predictive`.

    Notes
    -----
    Conditioning on the totals leaves capture out, the part of the model that the data of a row
    determine by themselves; it is exact for a flat capture prior. Rows without counts have residuals
    that are random numbers. Residuals are uniform over rows; those of one row share its scores and its total,
    and are not independent. Memory is that of the result, three times.

    References
    ----------
    Dunn and Smyth (1996), Randomized quantile residuals, J. Comput. Graph. Stat. 5(3).

    Examples
    --------
    >>> from sknbln import NBVCPEstimator
    >>> from sknbln.datasets import make_nbvcp_counts
    >>> from sknbln.predictive import quantile_residuals
    >>> X = make_nbvcp_counts(n_cells=100, n_genes=20, random_state=0).data
    >>> model = NBVCPEstimator(random_state=0).fit(X)
    >>> quantile_residuals(model, X, n_samples=50, genes=[0, 1], random_state=0).shape
    (100, 2)
    """
    positions = _gene_positions(estimator, genes)
    rng = check_random_state(estimator.random_state if random_state is None else random_state)
    replicates = _replicates(estimator, X, "library_anchored", n_samples, rng, needs_counts=True)
    # drawn for all genes, so that a gene's residuals do not depend on the selection
    jitter = rng.uniform(size=(replicates.n_rows, replicates.n_genes))[:, positions]
    below = np.zeros(jitter.shape)
    ties = np.zeros(jitter.shape)
    for s in range(n_samples):
        for rows, counts in replicates.chunks(s):
            drawn = counts[:, positions]
            observed = replicates.X[rows][:, positions].toarray()
            below[rows] += drawn < observed
            ties[rows] += drawn == observed
    residuals = (below + jitter * (ties + 1)) / (n_samples + 1)
    return np.clip(residuals, np.finfo(float).tiny, 1 - np.finfo(float).epsneg)


# ------------------------------------------------------------------ arguments


def _check_estimator(estimator):
    if not isinstance(estimator, PredictiveMixin):
        raise TypeError(
            "estimator has to be a fitted NBVCPEstimator or NBLNEstimator; found "
            f"{type(estimator).__name__}. Of a search give best_estimator_, of a pipeline its last step."
        )
    check_is_fitted(estimator)


def _refuse_multinomial(estimator, what):
    if getattr(estimator, "observation", "nb") == "multinomial":
        raise ValueError(
            f"{what} needs a distribution of totals, which observation='multinomial' does not have: it is "
            "conditional on them. Use level='library_anchored' draws."
        )


def _replicates(estimator, X, level, n_samples, random_state, *, needs_counts=False):
    if level == "marginal":
        _refuse_multinomial(estimator, "level='marginal'")
    if X is None and needs_counts:
        raise ValueError("X is None: the check compares with counts, give them as X.")
    if X is None and level == "per_cell":
        raise ValueError(
            "level='per_cell' draws from each row's posterior given its counts, and an estimator does not "
            "keep the counts of its fit: give them as X."
        )
    X = None if X is None else estimator._validated(X)
    return Replicates(estimator, X, level, n_samples, random_state)


def _gene_positions(estimator, genes):
    """Positions of the selected genes, ndarray of int."""
    _check_estimator(estimator)
    n_genes = estimator.n_features_in_
    if genes is None:
        return np.arange(n_genes)
    given = np.asarray(genes)
    if given.ndim != 1 or given.size == 0:
        raise ValueError(
            f"genes={genes!r}: expected a list of positions or names, one or more, or None for all."
        )
    if np.issubdtype(given.dtype, np.integer):
        unknown = given[(given < 0) | (given >= n_genes)]
        known, positions = f"positions 0 to {n_genes - 1}", given.astype(np.intp)
    elif all(isinstance(name, str) for name in given.tolist()):
        names = getattr(estimator, "feature_names_in_", None)
        if names is None:
            raise ValueError(
                "genes are given by name, but the estimator was fitted without names: give positions, or "
                "fit on a DataFrame."
            )
        place = {name: i for i, name in enumerate(names)}
        unknown = np.array([name for name in given if name not in place])
        known = f"the {n_genes} names of feature_names_in_"
        positions = np.array([place.get(name, -1) for name in given], np.intp)
    else:
        raise ValueError(
            f"genes has entries of dtype {given.dtype}: expected integer positions or names. Of a boolean "
            "mask give np.flatnonzero(mask)."
        )
    if unknown.size:
        raise ValueError(f"genes has unknown entries {unknown[:10].tolist()}: expected {known}.")
    values, times = np.unique(given, return_counts=True)
    if np.any(times > 1):
        raise ValueError(
            f"genes names {values[times > 1][:10].tolist()} more than once: name each once."
        )
    return positions

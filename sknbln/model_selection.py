"""Comparing models by held-out log-likelihood, row by row, and thinning of counts."""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, clone
from sklearn.model_selection import GroupKFold, KFold, check_cv
from sklearn.utils import _safe_indexing, indexable
from sklearn.utils.validation import _num_features, _num_samples

from ._counts import user_stacklevel
from ._source import unwrapped
from ._thinning import ThinningSplit
from ._typing import CountsLike, Covariates, Seed, Splitter
from .predictive._arguments import validated_options
from .predictive._interface import PredictiveModel

__all__ = ["Comparison", "ThinningSplit", "compare"]

#: stacking ends when no other weights gain more than this, nats per row
_STACKING_TOL = 1e-7
_STACKING_MAX_ITER = 10_000


@dataclass(frozen=True)
class Comparison:
    """Held-out log-likelihoods of several models on the same rows: the result of :func:`compare`.

    Attributes
    ----------
    table : DataFrame
        A row per model, the best first: ``score``, the mean log-likelihood per row in nats;
        ``standard_error`` of it; ``difference``, score minus that of the best; ``difference_standard_error``,
        from the paired differences; ``weight``, the stacking weight; and ``latent_dim``, the number of
        factors or components, as a mean over the splits (NaN for a model without; no column if all are).
    log_likelihood : DataFrame of shape (n_rows, n_models)
        Held-out log-likelihood of every row that was in a test set, nats; the index is the row's position
        in X, the columns are in the order of the estimators.
    gene_scores : DataFrame of shape (n_genes, n_models)
        Held-out mean log-density of each gene's counts given the other genes of the row, nats per cell, from
        `score_genes`: which genes a model predicts better than another. NaN for models without. With genes'
        names where X has names.
    """

    table: pd.DataFrame
    log_likelihood: pd.DataFrame
    gene_scores: pd.DataFrame


@validated_options(given_totals=["boolean"])
def compare(
    estimators: Mapping[str, BaseEstimator] | Sequence[BaseEstimator],
    X: CountsLike,
    *,
    cv: int | Splitter | Iterable[tuple[ArrayLike, ArrayLike]] | None = 5,
    groups: ArrayLike | None = None,
    covariates: Covariates | Mapping[str, Covariates] | None = None,
    offset: ArrayLike | Mapping[str, ArrayLike] | None = None,
    given_totals: bool = False,
    random_state: Seed = None,
) -> Comparison:
    r"""Compare models by the log-likelihood of held-out rows, with paired standard errors.

    Every model is fitted to the training rows and scored on the test rows of the same splits. With ``l_ck``
    the log-likelihood of row c under model k, from `score_samples`, and b the model of the largest mean,

    .. math:: \Delta_k = \frac 1n \sum_c (l_{ck} - l_{cb}), \qquad
              w = \arg\max_w \sum_c \log \sum_k w_k e^{l_{ck}}

    the differences and, over the simplex, the stacking weights [1]_.

    Parameters
    ----------
    estimators : dict of str to estimator, or list of estimators
        Models with `fit` and `score_samples`; clones of them are fitted. Those of a list are named by their
        classes.
    X : {array-like, sparse matrix} of shape (n_cells, n_genes)
        Counts.
    cv : int, splitter, iterable of (train, test) or None, default=5
        A number of folds (None is 5) of rows in random order; with `groups`, of whole groups. Or a
        splitter of scikit-learn, or splits. A row in several test sets has the mean of its log-likelihoods.
    groups : array-like of shape (n_cells,) or None, default=None
        Groups of rows, such as donors, for the splitter; the standard errors are then clustered by group.
    covariates, offset : as in `fit`, or dict of str to them, default=None
        Of the rows. A dict by the models' names gives every model its own, and none where a name is missing.
    given_totals : bool, default=False
        True for log-likelihoods given each row's total, which count models of different
        `capture_efficiency` need, and a comparison with ``observation="multinomial"``.
    random_state : int, RandomState instance or None, default=None
        Seed of the folds, where `cv` is a number. Estimators have their own.

    Returns
    -------
    Comparison
        With ``table``, ``log_likelihood`` and ``gene_scores``.

    Raises
    ------
    TypeError
        "... has no score_samples ...".
    ValueError
        "There is no estimator ..."; if some models score given totals only and others do not; if a model
        returns log-likelihoods that are not finite, or not one per row.

    Warns
    -----
    UserWarning
        If the fitted capture priors of models differ: see `given_totals`.

    See Also
    --------
    sknbln.plotting.ComparisonDisplay : A picture of the differences.

    Notes
    -----
    The standard errors are over rows, or groups, with the fits as they are: they do not include that
    other training rows would give other fits. A difference of two of them is no proof [2]_. Weights
    are not probabilities that a model is true: the best mixture may need a model that is worse by itself.

    All models must see the same genes, and log-probabilities of counts cannot be compared with log-densities
    of continuous variables. A nested source is cloned, hence fitted to the training rows.

    The cost is a fit of each model per split.

    References
    ----------
    .. [1] Yao, Y., Vehtari, A., Simpson, D. and Gelman, A. (2018). Using stacking to average Bayesian
       predictive distributions. Bayesian Analysis 13, 917-1007.
    .. [2] Sivula, T., Magnusson, M., Matamoros, A. A. and Vehtari, A. (2020). Uncertainty in Bayesian
       leave-one-out cross-validation based model comparison. arXiv:2008.10296.

    Examples
    --------
    >>> from sknbln import NBLNEstimator, NBVCPEstimator
    >>> from sknbln.datasets import make_nbln_counts
    >>> from sknbln.model_selection import compare
    >>> X = make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=0).data
    >>> models = {
    ...     "independent": NBVCPEstimator(random_state=0),
    ...     "factors": NBLNEstimator(2, random_state=0),
    ... }
    >>> result = compare(models, X, cv=2, random_state=0)
    >>> list(result.table.index)
    ['factors', 'independent']
    >>> result.log_likelihood.shape
    (150, 2)
    """
    models = _named(estimators, given_totals)
    X, groups = indexable(X, groups)
    known = {name: _of_model(name, covariates=covariates, offset=offset) for name in models}
    n_rows = _num_samples(X)
    total, times = np.zeros((n_rows, len(models))), np.zeros(n_rows)
    genes = np.zeros((_num_features(X), len(models)))
    dims: dict[str, list[float]] = {name: [] for name in models}
    for train, test in list(_splitter(cv, groups, random_state).split(X, None, groups)):
        times[test] += 1
        fits = {}
        for k, (name, model) in enumerate(models.items()):
            own = {key: _safe_indexing(a, train) for key, a in known[name].items()}
            fits[name] = clone(model).fit(_safe_indexing(X, train), None, **own)
            own = {key: _safe_indexing(a, test) for key, a in known[name].items()}
            held_out = _safe_indexing(X, test)
            genes[:, k] += len(test) * _gene_scores(fits[name], held_out, own)
            if given_totals:
                own["given_totals"] = True
            scores = fits[name].score_samples(held_out, **own)
            total[test, k] += _checked(name, scores, len(test))
            dims[name].append(_latent_dim(fits[name]))
        if not given_totals:
            _warn_about_capture(fits)
    rows = np.flatnonzero(times)
    log_likelihood = pd.DataFrame(total[rows] / times[rows, None], index=rows, columns=list(models))
    if groups is not None:
        groups = np.asarray(_safe_indexing(groups, rows))
    table = _table(log_likelihood, groups)
    dim = pd.Series({name: np.mean(of_splits) for name, of_splits in dims.items()})
    if dim.notna().any():
        table["latent_dim"] = dim
    names = getattr(X, "columns", None)
    gene_scores = pd.DataFrame(genes / times.sum(), index=names, columns=list(models))
    return Comparison(table, log_likelihood, gene_scores)


def stacking_weights(log_likelihood):
    """Weights on the simplex that maximize the sum over rows of the mixture's log-likelihood, by EM.

    The slope along the line to the best single model bounds what is left to gain, and ends the iteration.
    """
    density = np.exp(log_likelihood - log_likelihood.max(axis=1, keepdims=True))
    weight = np.full(density.shape[1], 1 / density.shape[1])
    for _ in range(_STACKING_MAX_ITER):
        slope = np.mean(density / (density @ weight)[:, None], axis=0)
        weight = weight * slope
        if slope.max() - 1 < _STACKING_TOL:
            break
    return weight / weight.sum()


def standard_error(values, groups=None):
    """Standard error of the mean over rows, shape (n_models,); of rows in groups, clustered by them."""
    deviations = values - values.mean(axis=0)
    if groups is not None:
        deviations = pd.DataFrame(deviations).groupby(np.asarray(groups)).sum().to_numpy()
    n = len(deviations)
    if n < 2:
        return np.full(values.shape[1], np.nan)
    return np.sqrt(n / (n - 1) * np.sum(deviations**2, axis=0)) / len(values)


def _table(log_likelihood, groups):
    values = log_likelihood.to_numpy()
    score = values.mean(axis=0)
    difference = values - values[:, [np.argmax(score)]]
    columns = {
        "score": score,
        "standard_error": standard_error(values, groups),
        "difference": difference.mean(axis=0),
        "difference_standard_error": standard_error(difference, groups),
        "weight": stacking_weights(values),
    }
    table = pd.DataFrame(columns, index=pd.Index(log_likelihood.columns, name="model"))
    return table.sort_values("score", ascending=False, kind="stable")


def _splitter(cv, groups, random_state):
    """Folds of rows, or of groups, in random order where `cv` is a number."""
    cv = 5 if cv is None else cv
    if isinstance(cv, Integral):
        folds = KFold if groups is None else GroupKFold
        return folds(cv, shuffle=True, random_state=random_state)
    return check_cv(cv)


def _named(estimators, given_totals):
    """The estimators by name, all of which can be scored on one scale."""
    if isinstance(estimators, Mapping):
        models = dict(estimators)
    else:
        names = [type(unwrapped(model)).__name__ for model in estimators]
        repeated = [name for name, times in Counter(names).items() if times > 1]
        if repeated:
            raise ValueError(
                f"Two estimators are named {repeated[0]}: give a dict with a name for each, such as "
                '{"8 factors": NBLNEstimator(8), "16 factors": NBLNEstimator(16)}.'
            )
        models = dict(zip(names, estimators, strict=True))
    if not models:
        raise ValueError("There is no estimator to compare: give a dict of name to estimator.")
    for name, model in models.items():
        if not hasattr(unwrapped(model), "score_samples"):
            raise TypeError(
                f"The estimator {name!r} ({type(model).__name__}) has no score_samples, the log-likelihood "
                "of every row: models are compared by it."
            )
    conditional = {name for name, model in models.items() if _given_totals_only(model)}
    if conditional and len(conditional) < len(models) and not given_totals:
        raise ValueError(
            f"The log-likelihood of {min(conditional)!r} is given each row's total, as observation="
            "'multinomial' has no other; those of the others are not. Pass given_totals=True."
        )
    return models


def _given_totals_only(model):
    model = unwrapped(model)
    return isinstance(model, PredictiveModel) and model._given_totals


def _of_model(name, **known):
    """What is known of the rows for the model of this name."""
    own = {
        key: value.get(name) if isinstance(value, Mapping) else value
        for key, value in known.items()
    }
    return {key: value for key, value in own.items() if value is not None}


def _checked(name, scores, n_rows):
    scores = np.asarray(scores, float)
    if scores.shape != (n_rows,) or not np.all(np.isfinite(scores)):
        raise ValueError(
            f"score_samples of {name!r} returned an array of shape {scores.shape} with "
            f"{np.sum(~np.isfinite(scores))} values that are not finite; expected {n_rows} log-likelihoods."
        )
    return scores


def _gene_scores(model, X, known):
    """What `score_genes` returns; NaN for a model that has none."""
    if not hasattr(unwrapped(model), "score_genes") or _given_totals_only(model):
        return np.nan
    return unwrapped(model).score_genes(X, **known)


def _latent_dim(model):
    model = unwrapped(model)
    found = getattr(model, "latent_dim_", getattr(model, "n_components", None))
    return np.nan if found is None else float(found)


def _warn_about_capture(fits):
    fits = {name: unwrapped(model) for name, model in fits.items()}
    priors = {n: f.capture_prior_ for n, f in fits.items() if isinstance(f, PredictiveModel)}
    first = next(iter(priors.values()), None)
    for name, prior in priors.items():
        if (prior is None) != (first is None) or (prior and not np.allclose(prior, first)):
            warnings.warn(
                f"The capture prior of {name!r} differs from that of {next(iter(priors))!r}: their "
                "log-likelihoods cannot be compared. Pass given_totals=True.",
                UserWarning,
                stacklevel=user_stacklevel(),
            )
            return

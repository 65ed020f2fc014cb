"""Arguments of the public functions: checks, and every message about them."""

from collections.abc import Callable
from numbers import Integral
from typing import Any

import numpy as np
from sklearn.utils._param_validation import Interval, StrOptions, validate_params
from sklearn.utils.validation import check_is_fitted

from .._source import unwrapped
from .._typing import F, keeping_hints
from ._interface import PredictiveModel
from ._replicates import CAPTURE, LATENT, LEVELS, Replicates

#: options that mean the same wherever they are taken
_CONSTRAINTS = {
    "level": [StrOptions(set(LEVELS))],
    "capture": [StrOptions(set(CAPTURE))],
    "latent": [StrOptions(set(LATENT))],
    "n_samples": [Interval(Integral, 1, None, closed="left")],
    "random_state": ["random_state"],
}


def validated_options(**constraints: Any) -> Callable[[F], F]:
    """Decorator that checks the options of a function, in scikit-learn's words.

    `constraints` describe the options that are the function's own; the shared ones are checked where the
    function has them.
    """
    checks = {**_CONSTRAINTS, **constraints}
    return keeping_hints(validate_params(checks, prefer_skip_nested_validation=True))


def fitted_model(estimator):
    """The fitted estimator, out of its `FrozenEstimator` if it is in one."""
    model = unwrapped(estimator)
    if not isinstance(model, PredictiveModel):
        raise TypeError(
            "estimator has to be a fitted NBVCPEstimator or NBLNEstimator; found "
            f"{type(model).__name__}. For a search pass best_estimator_, for a pipeline its last step."
        )
    check_is_fitted(model)
    return model


def refuse_given_totals(model, what):
    """Raise ValueError for a model that is conditional on totals."""
    if model._given_totals:
        raise ValueError(
            f"{what} needs a distribution of totals, which observation='multinomial' does not have: it is "
            "conditional on them. Use level='library_anchored' draws."
        )


def prepare(
    estimator,
    X,
    genes,
    n_samples,
    random_state,
    *,
    level="library_anchored",
    capture="posterior",
    latent="posterior",
    needs_counts=False,
    covariates=None,
    offset=None,
):
    """Replicates of the rows of X and the positions of the selected genes, all arguments checked."""
    model = fitted_model(estimator)
    positions = gene_positions(model, genes)
    if capture == "prior" and level != "marginal":
        raise ValueError(
            f"capture='prior' draws totals afresh, found level={level!r}: give level='marginal' with it."
        )
    if latent == "mode" and level != "per_cell":
        raise ValueError(
            f"latent='mode' takes the rows' own log-rates at their mode, found level={level!r}, which draws "
            "fresh ones: give level='per_cell' with it."
        )
    if level == "marginal":
        refuse_given_totals(model, "level='marginal'")
    if X is None and needs_counts:
        raise ValueError("X is None: the check compares with counts, give them as X.")
    if X is None and level == "per_cell":
        raise ValueError(
            "level='per_cell' draws from each row's posterior given its counts, and an estimator does not "
            "keep the counts of its fit: give them as X."
        )
    known = model._known
    if X is not None:
        prior = model._offset_prior() if LEVELS[level] else None
        X, known = model._given(X, covariates, offset, prior)
    elif covariates is not None or offset is not None:
        raise ValueError(
            "covariates and offset are of the rows of X, and X is None: the training rows have those of the "
            "fit. Leave them out, or give X."
        )
    return Replicates(model, X, level, n_samples, random_state, capture, latent, known), positions


def gene_positions(model, genes):
    """Positions of the selected genes of a fitted model, ndarray of int."""
    n_genes = model.n_features_in_
    if genes is None:
        return np.arange(n_genes)
    selected = np.asarray(genes)
    if selected.ndim != 1 or selected.size == 0:
        raise ValueError(
            f"genes={genes!r}: expected a list of positions or names, one or more, or None for all."
        )
    if np.issubdtype(selected.dtype, np.integer):
        unknown = selected[(selected < 0) | (selected >= n_genes)]
        expected, positions = f"positions 0 to {n_genes - 1}", selected.astype(np.intp)
    elif all(isinstance(name, str) for name in selected.tolist()):
        names = getattr(model, "feature_names_in_", None)
        if names is None:
            raise ValueError(
                "genes are given by name, but the estimator was fitted without names: give positions, or "
                "fit on a DataFrame."
            )
        place = {name: i for i, name in enumerate(names)}
        unknown = np.array([name for name in selected if name not in place])
        expected = f"the {n_genes} names of feature_names_in_"
        positions = np.array([place.get(name, -1) for name in selected], np.intp)
    else:
        raise ValueError(
            f"genes has entries of dtype {selected.dtype}: expected integer positions or names. For a "
            "boolean mask pass np.flatnonzero(mask)."
        )
    if unknown.size:
        raise ValueError(f"genes has unknown entries {unknown[:10].tolist()}: expected {expected}.")
    values, times = np.unique(selected, return_counts=True)
    if np.any(times > 1):
        raise ValueError(
            f"genes names {values[times > 1][:10].tolist()} more than once: name each once."
        )
    return positions

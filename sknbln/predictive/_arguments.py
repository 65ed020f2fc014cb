"""What the public functions accept, and every message about it."""

from numbers import Integral

import numpy as np
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted

from ._replicates import CAPTURE, LEVELS, Replicates

CONSTRAINTS = {
    "level": [StrOptions(set(LEVELS))],
    "capture": [StrOptions(set(CAPTURE))],
    "n_samples": [Interval(Integral, 1, None, closed="left")],
    "random_state": ["random_state"],
}
WITHOUT_LEVEL = {name: CONSTRAINTS[name] for name in ("n_samples", "random_state")}


def _check_estimator(estimator):
    if not hasattr(estimator, "_posterior_draws"):
        raise TypeError(
            "estimator has to be a fitted NBVCPEstimator or NBLNEstimator; found "
            f"{type(estimator).__name__}. Of a search give best_estimator_, of a pipeline its last step."
        )
    check_is_fitted(estimator)


def refuse_multinomial(estimator, what):
    if getattr(estimator, "observation", "nb") == "multinomial":
        raise ValueError(
            f"{what} needs a distribution of totals, which observation='multinomial' does not have: it is "
            "conditional on them. Use level='library_anchored' draws."
        )


def replicates_of(
    estimator, X, level, n_samples, random_state, *, capture="posterior", needs_counts=False
):
    if capture == "prior" and level != "marginal":
        raise ValueError(
            f"capture='prior' draws totals afresh, found level={level!r}: give level='marginal' with it."
        )
    if level == "marginal":
        refuse_multinomial(estimator, "level='marginal'")
    if X is None and needs_counts:
        raise ValueError("X is None: the check compares with counts, give them as X.")
    if X is None and level == "per_cell":
        raise ValueError(
            "level='per_cell' draws from each row's posterior given its counts, and an estimator does not "
            "keep the counts of its fit: give them as X."
        )
    if X is not None:
        X = estimator._validated(X, estimator._offset_prior() if LEVELS[level] else None)
    return Replicates(estimator, X, level, n_samples, random_state, capture)


def gene_positions(estimator, genes):
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

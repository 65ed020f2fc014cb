"""Counts in, canonical CSR out: every message that a user sees about input."""

import warnings

import numpy as np
import scipy.sparse as sp
from sklearn.utils.validation import validate_data


def validate_counts(estimator, X, *, reset, warn_fractional=True):
    """Check a count matrix and return it as float64 CSR, sorted, without duplicates or zeros.

    The caller's matrix is never modified.

    Parameters
    ----------
    estimator : estimator instance
        Receives ``n_features_in_`` and ``feature_names_in_`` when `reset`.
    X : array-like, sparse matrix, sparse array or DataFrame of shape (n_cells, n_genes)
    reset : bool
        True in fit.
    warn_fractional : bool, default=True

    Returns
    -------
    csr_matrix of shape (n_cells, n_genes), float64

    Raises
    ------
    ValueError
        "Negative values in data ..." for negative counts; scikit-learn's messages for NaN, inf,
        shapes and numbers of features.

    Warns
    -----
    UserWarning
        When counts are not whole numbers.
    """
    name = type(estimator).__name__
    X = validate_data(
        estimator, X, reset=reset, accept_sparse=["csr", "csc", "coo"], dtype=np.float64, copy=False
    )
    # a copy: what follows works in place
    X = sp.csr_matrix(X, copy=True)
    X.sum_duplicates()
    X.eliminate_zeros()
    if X.nnz and X.data.min() < 0:
        row, col = (int(a[0]) for a in np.nonzero(X < 0))
        raise ValueError(
            f"Negative values in data passed to {name}: expected counts >= 0, found "
            f"{X[row, col]:g} at row {row}, column {col}. Give raw counts, not "
            "normalized, centred or log-transformed values."
        )
    if warn_fractional and X.nnz and np.any(X.data != np.floor(X.data)):
        share = float(np.mean(X.data != np.floor(X.data)))
        warnings.warn(
            f"{name} expects counts, found values that are not whole numbers ({share:.1%} of the "
            "non-zero entries). They are used as they are; give raw counts if you have them.",
            UserWarning,
            stacklevel=4,
        )
    return X

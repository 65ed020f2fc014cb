"""Counts in, canonical CSR out: every message that a user sees about input."""

import os
import sys
import warnings
from numbers import Integral

import joblib
import numpy as np
import scipy.sparse as sp
import sklearn
from sklearn.utils import check_scalar
from sklearn.utils.validation import validate_data

from ._laplace.likelihood import n_fractional

#: where a warning's line is not the user's
_NOT_THE_USERS = tuple(
    os.path.dirname(file) + os.sep for file in (__file__, sklearn.__file__, joblib.__file__)
)
_RAW = "Give raw counts, not normalized, centred or log-transformed values."


def user_stacklevel():
    """``stacklevel`` of ``warnings.warn`` in the calling function that names the user's own line.

    The nearest frame outside sknbln, scikit-learn and joblib.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame, level = frame.f_back, level + 1
    return level


def validate_counts(estimator, X, *, reset, warn=True):
    """Check a count matrix and return it as float64 CSR, sorted, without duplicates or zeros.

    The caller's matrix is never modified.

    Parameters
    ----------
    estimator : estimator instance
        Receives ``n_features_in_`` and ``feature_names_in_`` when `reset`.
    X : array-like, sparse matrix, sparse array or DataFrame of shape (n_cells, n_genes)
    reset : bool
        True in fit.
    warn : bool, default=True
        False where another estimator warns of the same matrix.

    Returns
    -------
    csr_matrix of shape (n_cells, n_genes), float64

    Raises
    ------
    ValueError
        "Negative values in data ...", "NaN in data ...", "inf in data ...", "Text in data ...", "Dates in
        data ...", "Complex data not supported ..." with what was found where; "Masked entries in data ...";
        scikit-learn's messages for shapes, numbers of features and names of features.

    Warns
    -----
    UserWarning
        When counts are not whole numbers, or (in fit) when there are none.
    """
    name = type(estimator).__name__
    if isinstance(X, (list, tuple)):
        X = np.asarray(X)
    _refuse_kinds(name, X)
    X = validate_data(
        estimator,
        X,
        reset=reset,
        accept_sparse=["csr", "csc", "coo"],
        dtype=np.float64,
        ensure_all_finite=False,
        copy=False,
    )
    X = sp.csr_matrix(X)
    if not X.has_canonical_format or not X.data.all():
        X = X.copy()  # what follows works in place, maybe on the caller's arrays
        X.sum_duplicates()
        X.eliminate_zeros()
    _refuse_values(name, X, getattr(estimator, "feature_names_in_", None))
    if warn:
        _warn_about_values(name, X, reset)
    return X


def _refuse_kinds(name, X):
    """What NumPy would make numbers of though it is no count, or drop in silence."""
    if np.ma.is_masked(X):
        raise ValueError(
            f"Masked entries in data passed to {name}: found {np.ma.count_masked(X)} of {X.size}, and there "
            "is no model of missing counts. Drop those rows or genes, or fill the mask with counts."
        )
    frame = hasattr(X, "dtypes") and hasattr(X, "iloc") and X.ndim == 2
    dtypes = X.dtypes if frame else [getattr(X, "dtype", None)]
    for j, dtype in enumerate(dtypes):
        kind = getattr(dtype, "kind", None)
        if kind == "c":
            _refuse_complex(name)
        if kind in ("m", "M"):
            where = f" in column {j}" if frame else ""
            raise ValueError(
                f"Dates in data passed to {name}: expected counts, found {dtype}{where}. "
                "Leave out columns that are no counts."
            )
        if kind in ("O", "S", "U", "T") and not sp.issparse(X):
            _refuse_objects(name, np.asarray(X.iloc[:, j])[:, None] if frame else X, j)


def _refuse_complex(name):
    raise ValueError(f"Complex data not supported: {name} expects counts. {_RAW}")


def _refuse_objects(name, values, first_column):
    if values.ndim != 2:  # refused below
        return
    for (row, column), value in np.ndenumerate(values):
        if isinstance(value, (complex, np.complexfloating)):
            _refuse_complex(name)
        if isinstance(value, (str, bytes)):
            raise ValueError(
                f"Text in data passed to {name}: expected counts, found {str(value)!r} at row {row}, column "
                f"{column + first_column}. Leave out columns of names and labels; turn numbers that were "
                "read as text into numbers, e.g. by X.astype(float)."
            )


def checked_n_samples(n_samples):
    """A number of draws.

    Raises
    ------
    TypeError, ValueError
        Where it is not a whole number >= 1.
    """
    return check_scalar(n_samples, "n_samples", Integral, min_val=1)


def _refuse_values(name, X, genes):
    """NaN, inf and negative values of a canonical CSR matrix, with the first one's place."""
    for what, bad, advice in (
        (
            "NaN",
            np.isnan,
            "Drop those rows or genes; a count that was looked for and not seen is 0.",
        ),
        ("inf", np.isinf, _RAW),
        ("Negative values", lambda a: a < 0, _RAW),
    ):
        found = bad(X.data)
        if not found.any():
            continue
        at = int(np.flatnonzero(found)[0])
        row, column = int(np.searchsorted(X.indptr, at, side="right")) - 1, int(X.indices[at])
        gene = "" if genes is None else f" ({genes[column]!r})"
        raise ValueError(
            f"{what} in data passed to {name}: expected counts, finite and >= 0, found {X.data[at]:g} at "
            f"row {row}, column {column}{gene}, {found.sum()} such in all. {advice}"
        )


def _warn_about_values(name, X, fitting):
    fractional = n_fractional(X.data)
    if fractional:
        warnings.warn(
            f"{name} expects counts, found values that are not whole numbers ({fractional / X.nnz:.1%} of "
            "the non-zero entries). They are used as they are; give raw counts if you have them.",
            UserWarning,
            stacklevel=user_stacklevel(),
        )
    if fitting and X.nnz == 0:
        warnings.warn(
            f"{name} is fitted to a matrix without a single count, shape {X.shape}: what it returns are "
            "its priors. Look at what X holds.",
            UserWarning,
            stacklevel=user_stacklevel(),
        )

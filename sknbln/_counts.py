"""Validation of counts: canonical CSR, every message about input, and the distinct counts of genes."""

import datetime
import os
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from numbers import Complex, Integral, Real

import joblib
import numpy as np
import pandas as pd
import scipy.sparse as sp
import sklearn
from scipy.stats import chi2
from sklearn.utils import check_scalar
from sklearn.utils.validation import validate_data

from ._known import without_missing
from .solver.channel import log_factorial, log_rising, log_rising_derivatives

#: directories of frames that are not the user's own code
_NOT_THE_USERS = tuple(
    os.path.dirname(file) + os.sep for file in (__file__, sklearn.__file__, joblib.__file__)
)
_RAW = "Give raw counts, not normalized, centred or log-transformed values."
#: types of objects that count as numbers; missing values become NaN
_NUMBERS = (Real, Decimal, np.bool_, type(None), type(pd.NA))
_DATES = (
    *(datetime.date, datetime.time, datetime.timedelta),
    *(np.datetime64, np.timedelta64, pd.Period, type(pd.NaT)),
)
#: objects that hold counts but are not a matrix in memory: an attribute of the class -> advice to the user
_HOLDERS = {
    "X": "Give its matrix of raw counts: adata.X, adata.layers['counts'] or adata.raw.X.",
    "dask": "Its values are not computed yet: give X.compute().",
    "collect": "Its values are not computed yet: give X.collect().",
    "to_memory": "Its values are in a file: give X.to_memory(), or the rows that you need, as X[:1000].",
}
#: relative and absolute distance from a whole number that is treated as rounding error
_ROUNDING = 1e-6, 1e-8
#: least number of non-zero counts for which a common divisor is not chance: 20 large counts are all even
#: with probability 1e-6
_NOT_TINY = 20


def user_stacklevel():
    """``stacklevel`` with which ``warnings.warn`` in the calling function points to the user's own line.

    That is the nearest frame outside sknbln, scikit-learn and joblib.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame, level = frame.f_back, level + 1
    return level


def validate_counts(estimator, X, *, reset, warn=True, missing=False):
    """Check a count matrix and return it as float64 CSR, sorted, without duplicates or zeros.

    Values within 1e-8, or within a relative 1e-6, of a whole number are rounded to it. The caller's matrix
    is never modified.

    Parameters
    ----------
    estimator : estimator instance
        Receives ``n_features_in_`` and ``feature_names_in_`` when `reset`.
    X : array-like, sparse matrix, sparse array or DataFrame of shape (n_cells, n_genes)
        Counts.
    reset : bool
        True in `fit`, False afterwards.
    warn : bool, default=True
        False if another estimator issues the warnings about the same matrix.
    missing : bool, default=False
        Whether NaN is a count that was not seen, and not an error.

    Returns
    -------
    csr_matrix of shape (n_cells, n_genes), float64
        With ``missing=True`` a tuple of it, with 0 for missing counts, and of a csr_matrix that is True
        there, None where none is missing.

    Raises
    ------
    ValueError
        "Negative values in data ...", "NaN in data ...", "inf in data ...", "Text in data ...", "Dates in
        data ...", "Complex data not supported ...", with the value and its place; "Masked entries in data
        ..."; "Columns of the same name in data ..."; scikit-learn's messages about shapes, numbers of
        features and names of features.
    TypeError
        "... expects a matrix of counts ..." for an object that holds a matrix, or whose values are not
        computed yet or not in memory; "Objects in data ..." with the type and its place.

    Warns
    -----
    UserWarning
        If counts are not whole numbers; in `fit` also if all counts are zero, if most rows have a common
        divisor, and if all rows have the same total.
    """
    name = type(estimator).__name__
    X = _numbers(name, X)
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
        X = X.copy()  # the next lines work in place, and the arrays may be the caller's
        X.sum_duplicates()
        X.eliminate_zeros()
    not_seen = None
    if missing:
        X, not_seen = without_missing(X)
    X = _rounded(X)
    _refuse_values(name, X, getattr(estimator, "feature_names_in_", None))
    if warn:
        _warn_about_values(name, X, reset)
    return (X, not_seen) if missing else X


def _numbers(name, X):
    """X as an array, a sparse matrix or a pandas DataFrame of numbers.

    It refuses what NumPy would convert to numbers that are not counts (dates), drop silently (masks,
    imaginary parts) or spend minutes on (holders of matrices).
    """
    _refuse_holders(name, X)
    if hasattr(type(X), "column_names") or hasattr(type(X), "columns"):
        return _numbers_of_frame(name, X)
    if isinstance(X, Sequence):
        X = np.asarray(X)
    if np.ma.is_masked(X):
        raise ValueError(
            f"Masked entries in data passed to {name}: found {np.ma.count_masked(X)} of {X.size}. If these "
            "counts were not seen, give X.astype(float).filled(numpy.nan); else fill the mask with counts."
        )
    kind = getattr(getattr(X, "dtype", None), "kind", None)
    if kind == "c":
        _refuse_complex(name)
    if kind in ("m", "M"):
        _refuse_dates(name, X.dtype)
    if kind in ("O", "S", "U", "T") and not sp.issparse(X) and X.ndim == 2:
        return _numbers_of_objects(name, np.asarray(X))
    return X


def _refuse_holders(name, X):
    """Refuse objects that hold a matrix, recognized by attributes of their class, without any import."""
    array_like = hasattr(type(X), "__array__") or isinstance(X, Sequence) or sp.issparse(X)
    if array_like and not hasattr(type(X), "dask"):
        return
    advice = (advice for attribute, advice in _HOLDERS.items() if hasattr(type(X), attribute))
    raise TypeError(
        f"{name} expects a matrix of counts: an array, a SciPy sparse matrix or a DataFrame, all in memory; "
        f"found {type(X).__module__}.{type(X).__qualname__}. {next(advice, '')}".rstrip()
    )


def _numbers_of_frame(name, X):
    """A pandas DataFrame with the columns of a frame (pandas, polars, pyarrow); missing values become NaN.

    Columns are converted one by one, each from its own type. Sparse columns stay sparse.
    """
    columns = list(X.column_names if hasattr(type(X), "column_names") else X.columns)
    repeated = [str(column) for column, times in Counter(columns).items() if times > 1]
    if repeated:
        raise ValueError(
            f"Columns of the same name in data passed to {name}: {', '.join(repeated[:5])}"
            f"{', ...' if len(repeated) > 5 else ''}, {len(repeated)} such names in all. Genes are matched "
            "by name: rename them or add their counts up, so that every name stands once."
        )
    if isinstance(X, pd.DataFrame) and all(
        isinstance(dtype, np.dtype) and dtype.kind in "biuf" for dtype in X.dtypes
    ):
        return X  # without a copy
    return pd.DataFrame(
        {column: _numbers_of_column(name, X[column], j, column) for j, column in enumerate(columns)}
    )


def _numbers_of_column(name, values, j, label):
    dtype = values.dtype if hasattr(values, "dtype") else values.type
    if isinstance(dtype, pd.SparseDtype) and dtype.subtype.kind in "biuf":
        return values.array.astype(pd.SparseDtype(float, float(dtype.fill_value)))
    where = f"column {j}" if label == j else f"column {j} ({label!r})"
    values = np.asarray(values)
    kind = values.dtype.kind
    if kind == "c":
        _refuse_complex(name)
    if kind in ("m", "M"):
        _refuse_dates(name, dtype, f" in {where}")
    if values.ndim != 1 or kind == "V":
        _refuse_objects(name, dtype, f" in {where}")
    if kind in ("O", "S", "U", "T"):
        return _numbers_of_objects(name, values[:, None], where)[:, 0]
    return values


def _refuse_complex(name):
    raise ValueError(f"Complex data not supported: {name} expects counts. {_RAW}")


def _refuse_objects(name, found, where):
    raise TypeError(  # scikit-learn's checks look for Python's words in the last brackets
        f"Objects in data passed to {name}: expected counts, found {found}{where}. Leave out columns that "
        "are no counts (float() argument must be a string or a real number)."
    )


def _refuse_dates(name, found, where=""):
    raise ValueError(
        f"Dates in data passed to {name}: expected counts, found {found}{where}. "
        "Leave out columns that are no counts."
    )


def _numbers_of_objects(name, values, where=None):
    """float64 array of a 2-D array of objects; text, dates and other values that are not numbers are refused.

    ``where`` names the column in messages.
    """
    others = [
        kind
        for kind in set(map(type, values.flat))
        if not issubclass(kind, _NUMBERS) or issubclass(kind, _DATES)  # np.timedelta64 is both
    ]
    if others:
        (row, column), first = next(
            (at, value) for at, value in np.ndenumerate(values) if type(value) in others
        )
        place = f" at row {row}, {where or f'column {column}'}"
        if isinstance(first, _DATES):
            _refuse_dates(name, repr(first), place)
        if isinstance(first, Complex):
            _refuse_complex(name)
        if isinstance(first, (str, bytes)):
            raise ValueError(
                f"Text in data passed to {name}: expected counts, found {str(first)!r}{place}. Leave out "
                "columns of names and labels; turn numbers that were read as text into numbers, e.g. by "
                "X.astype(float)."
            )
        _refuse_objects(name, type(first).__name__, place)
    return np.where(pd.isna(values), np.nan, values).astype(float)


def checked_n_samples(n_samples):
    """The number of draws, validated.

    Raises
    ------
    TypeError, ValueError
        If it is not a whole number >= 1.
    """
    return check_scalar(n_samples, "n_samples", Integral, min_val=1)


def _rounded(X):
    """X, or a copy with values close to whole numbers rounded to them, without explicit zeros."""
    if not n_fractional(X.data):
        return X
    X = X.copy()
    relative, absolute = _ROUNDING
    for part in in_parts(X.data):
        whole = np.round(part)
        with np.errstate(invalid="ignore"):  # inf - inf
            near = np.abs(part - whole) <= absolute + relative * np.abs(whole)
        part[near] = whole[near]
    X.eliminate_zeros()
    return X


def _refuse_values(name, X, genes):
    """Refuse NaN, inf and negative values in canonical CSR; the message names the place of the first."""
    for what, is_bad, advice in (
        (
            "NaN",
            np.isnan,
            "Drop those rows or genes; a count that was looked for and not seen is 0.",
        ),
        ("inf", np.isinf, _RAW),
        ("Negative values", lambda a: a < 0, _RAW),
    ):
        bad = is_bad(X.data)
        if not bad.any():
            continue
        at = int(np.flatnonzero(bad)[0])
        row, column = int(np.searchsorted(X.indptr, at, side="right")) - 1, int(X.indices[at])
        gene = "" if genes is None else f" ({genes[column]!r})"
        raise ValueError(
            f"{what} in data passed to {name}: expected counts, finite and >= 0, found {X.data[at]:g} at "
            f"row {row}, column {column}{gene}, {bad.sum()} such in all. {advice}"
        )


def _warn_about_values(name, X, fitting):
    fractional = n_fractional(X.data)
    if fractional:
        message = (
            f"{name} expects counts, found values that are not whole numbers ({fractional / X.nnz:.1%} of "
            "the non-zero entries). They are used as they are; give raw counts if you have them."
        )
    elif fitting and X.nnz == 0:
        message = (
            f"{name} is fitted to a matrix without a single count, shape {X.shape}: what it returns are "
            "its priors. Look at what X holds."
        )
    elif fitting:
        message = _scaled(name, X) or same_depth(name, X)
    else:
        message = None
    if message:
        warnings.warn(message, UserWarning, stacklevel=user_stacklevel())


def _scaled(name, X):
    """Message about rows with a common divisor, as counts times a constant have; None if there are few."""
    size = np.diff(X.indptr)
    starts, size = X.indptr[:-1][size > 0], size[size > 0]
    if size.max() < _NOT_TINY:  # short rows: treat the whole matrix as one row
        starts, size = X.indptr[:1], np.array([X.nnz])
    large = size >= _NOT_TINY
    half = large.sum() / 2
    # most rows of real counts contain a 1
    above_one = large & (np.minimum.reduceat(X.data, starts) > 1)
    # above 2^53 float64 represents even numbers only
    if np.count_nonzero(above_one) <= half or X.data.max() > 2**53:
        return None
    divisor = np.gcd.reduceat(X.data.astype(np.int64), starts)
    divisible = np.flatnonzero(large & (divisor > 1))
    if divisible.size <= half:
        return None
    rows = f"of {divisible.size} of {large.sum()} rows" if large.size > 1 else "of all rows"
    return (
        f"{name} expects counts, found whole numbers that look like counts times a constant: the values "
        f"{rows} have a common divisor ({divisor[divisible[0]]} in the first). Their dispersion is not that "
        "of counts: give the counts themselves."
    )


def same_depth(name, X):
    """Message about rows whose totals are equal but for rounding; None if they are not.

    Totals of counts have at least the variance of Poisson variables, which is their mean. Totals are called
    equal if their standard deviation is below 0.2 % of the mean, and their variance, plus 1/12 for rounding,
    is below a quarter of the mean and below the 1e-6 quantile of the sample variance of Poisson variables.
    With very few rows the last condition is never met.
    """
    totals = np.asarray(X.sum(axis=1)).ravel()
    totals = totals[totals > 0]
    mean, df = totals.mean(), totals.size - 1
    if df == 0 or mean < _NOT_TINY:  # a few counts per row, as in one-hot or very shallow rows
        return None
    variance = totals.var(ddof=1)
    if variance > (0.002 * mean) ** 2 or variance + 1 / 12 > mean * min(
        0.25, chi2.ppf(1e-6, df) / df
    ):
        return None
    return (
        f"{name} expects counts, found rows whose totals are equal but for rounding ({totals.min():.0f} to "
        f"{totals.max():.0f}). A table that was rarefied, subsampled to one depth, has such totals, and "
        "nothing is wrong. Rounded counts per million have them too, but not the dispersion of counts: "
        "give raw counts."
    )


# ------------------------------------------------------------------ distinct counts

#: largest number of multiplicities that are counted in one array, 8 bytes each
_COUNTED_KEYS = 2**22
#: number of counts that are processed at a time
_COUNTED_AT_ONCE = 2**18


def in_parts(a, size=_COUNTED_AT_ONCE):
    """Views of about ``size`` entries each, which bound the size of temporary arrays."""
    return np.array_split(a, max(a.size // size, 1))


def n_fractional(values):
    """Number of values that are not whole numbers."""
    return sum(np.count_nonzero(part != np.floor(part)) for part in in_parts(values))


class CountHistogram:
    """Distinct non-zero counts of every gene with their multiplicities.

    A sum over cells of a function of (count, dispersion) then costs one evaluation per distinct count.

    Parameters
    ----------
    X : csr_matrix of shape (n_cells, n_genes)
        Canonical (sorted, no duplicates, no explicit zeros).
    weight : ndarray of shape (n_cells,) or None
        How often each row counts; None is once. ``n_cells`` is their sum.
    """

    def __init__(self, X, weight=None):
        self.n_cells, self.n_genes = X.shape
        if weight is not None:
            self.n_cells = float(weight.sum())
            weight = np.repeat(weight, np.diff(X.indptr))
        values, code = X.data, X.data
        if values.size == 0 or values.max() >= 2**31 or n_fractional(values):
            values, code = np.unique(X.data, return_inverse=True)
        # one integer key per pair of gene and count; with few possible keys, counting is faster than sorting
        width = int(code.max(initial=0)) + 1
        n_keys = self.n_genes * width
        if n_keys <= max(_COUNTED_KEYS, code.size):
            times = np.zeros(n_keys, np.int64 if weight is None else float)
            size = max(_COUNTED_AT_ONCE, n_keys)
            weights = [None] * len(in_parts(code, size))
            weights = weights if weight is None else in_parts(weight, size)
            parts = zip(in_parts(X.indices, size), in_parts(code, size), weights, strict=True)
            for gene, part, own in parts:
                key = gene * np.int64(width) + part.astype(np.int64)
                times += np.bincount(key, own, minlength=n_keys)
            key = np.flatnonzero(times)
            self.times = times[key]
        else:
            key = X.indices * np.int64(width) + code.astype(np.int64)
            key, at, times = np.unique(key, return_inverse=True, return_counts=True)
            self.times = times if weight is None else np.bincount(at.ravel(), weight)
        self.gene, code = (key // width).astype(np.intp), key % width
        self.count = code.astype(float) if values is X.data else values[code]
        self.times = self.times.astype(float)
        self.log_factorials = float(np.sum(self.times * log_factorial(self.count)))

    def _sum(self, values):
        return np.bincount(self.gene, self.times * values, minlength=self.n_genes)

    def constants(self, r):
        """Per gene ``sum_cells log_rising(u, r)``, shape (n_genes,)."""
        return self._sum(log_rising(self.count, r[self.gene]))

    def constant_derivatives(self, r):
        """First and second derivatives of the constants with respect to ``log r``, two arrays (n_genes,)."""
        first, second = log_rising_derivatives(self.count, r, self.gene)
        return self._sum(first), self._sum(second)


def row_constants(X, r):
    """Per cell ``sum_genes [log_rising(u, r) - log u!]``, shape (n_cells,)."""
    values = log_rising(X.data, r[X.indices]) - log_factorial(X.data)
    rows = np.repeat(np.arange(X.shape[0]), np.diff(X.indptr))
    return np.bincount(rows, values, minlength=X.shape[0])

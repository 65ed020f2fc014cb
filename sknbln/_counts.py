"""Counts in: canonical rows in memory or in blocks, every message about input, distinct counts of genes."""

import datetime
import functools
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
from sklearn.utils import check_scalar
from sklearn.utils.validation import validate_data

from ._blocks import CSRRows, as_rows
from ._stored import described, how_to_read, is_stored, stored_rows
from ._values import RAW, Values, canonical, in_parts, n_fractional
from .solver.channel import log_factorial, log_rising, log_rising_derivatives

#: directories of frames that are not the user's own code
_NOT_THE_USERS = tuple(
    os.path.dirname(file) + os.sep for file in (__file__, sklearn.__file__, joblib.__file__)
)
#: types of numbers in which counts are kept, in memory; others become the first
_TYPES = [np.dtype(t) for t in ("f8", "f4", *(f"{k}{size}" for k in "iu" for size in (1, 2, 4, 8)))]
#: types of objects that count as numbers; missing values become NaN
_NUMBERS = (Real, Decimal, np.bool_, type(None), type(pd.NA))
_DATES = (
    *(datetime.date, datetime.time, datetime.timedelta),
    *(np.datetime64, np.timedelta64, pd.Period, type(pd.NaT)),
)
#: objects that hold counts but are not a matrix in memory: an attribute of the class -> advice to the user
_HOLDERS = {
    "X": (
        "Call sknbln.tl.nbln(adata) or sknbln.tl.nbvcp(adata), or give its matrix of raw counts: adata.X, "
        "adata.layers['counts'] or adata.raw.X."
    ),
    "dask": "Its values are not computed yet: give X.compute(), or a Dask array.",
    "collect": "Its values are not computed yet: give X.collect().",
    "to_memory": "Its values are in a file: give X.to_memory(), or the rows that you need, as X[:1000].",
}


def user_stacklevel():
    """``stacklevel`` with which ``warnings.warn`` in the calling function points to the user's own line.

    That is the nearest frame outside sknbln, scikit-learn and joblib.
    """
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame, level = frame.f_back, level + 1
    return level


def validated_rows(estimator, X, *, reset, warn=True, missing=False):
    """Check a count matrix and return it as `Rows`: canonical CSR in memory, or read block by block.

    Values within 1e-8, or within a relative 1e-6, of a whole number are rounded to it. The caller's matrix
    is never modified. One that is not in memory is read once, a block at a time.

    Parameters
    ----------
    estimator : estimator instance
        Receives ``n_features_in_`` and ``feature_names_in_`` when `reset`.
    X : array-like, sparse matrix, sparse array or DataFrame of shape (n_cells, n_genes)
        Counts. Also a Dask array in chunks of rows, or what has ``shape``, ``dtype`` and slices of rows, as
        datasets of h5py, zarr and AnnData have.
    reset : bool
        True in `fit`, False afterwards.
    warn : bool, default=True
        False if another estimator issues the warnings about the same matrix.
    missing : bool, default=False
        Whether NaN is a count that was not seen, and not an error.

    Returns
    -------
    rows : Rows
        With 0 for missing counts.
    mask : csr_matrix of shape (n_cells, n_genes) or None
        True where a count is missing; None where none is.

    Raises
    ------
    ValueError
        "Negative values in data ...", "NaN in data ...", "inf in data ...", "Text in data ...", "Dates in
        data ...", "Complex data not supported ...", with the value and its place; "Masked entries in data
        ..."; "Columns of the same name in data ..."; "... chunks of columns ..."; scikit-learn's messages
        about shapes, numbers of features and names of features.
    TypeError
        "... expects a matrix of counts ..." for an object that holds a matrix, or has no slices of rows;
        "Objects in data ..." with the type and its place.

    Warns
    -----
    UserWarning
        If counts are not whole numbers; in `fit` also if all counts are zero, if most rows have a common
        divisor, and if all rows have the same total.
    """
    name = type(estimator).__name__
    as_numbers = functools.partial(
        validate_data,
        estimator,
        reset=reset,
        accept_sparse=["csr", "csc", "coo"],
        dtype=_TYPES,
        ensure_all_finite=False,
        copy=False,
    )
    if is_stored(X):
        _refuse_type(name, np.dtype(X.dtype))
        rows, mask = stored_rows(name, X, missing), None
        as_numbers(np.broadcast_to(0.0, X.shape))  # the messages about shapes; nothing is read
    else:
        X, mask = canonical(sp.csr_matrix(as_numbers(_numbers(name, X))), missing)
        rows = CSRRows(X)
    values, masks = Values(name, warn and reset), []
    for part in rows.slices():
        block, of_block = rows.with_missing(part)
        values.add(block)
        masks.append(sp.csr_matrix(block.shape, dtype=bool) if of_block is None else of_block)
    values.refuse(getattr(estimator, "feature_names_in_", None))
    if warn:
        message = values.warning(rows.shape[1])
        if message:
            warnings.warn(message, UserWarning, stacklevel=user_stacklevel())
    rows.totals = np.concatenate(values.totals)
    if mask is None and any(m.nnz for m in masks):
        mask = sp.vstack(masks, format="csr")
    return rows, mask


def validate_counts(estimator, X, *, reset, warn=True, missing=False):
    """Check a count matrix in memory and return it as float64 CSR, sorted, without duplicates or zeros.

    For what is not done block by block. See :func:`validated_rows` for parameters, errors and warnings.

    Returns
    -------
    csr_matrix of shape (n_cells, n_genes), float64
        With ``missing=True`` a tuple of it, with 0 for missing counts, and of a csr_matrix that is True
        there, None where none is missing.

    Raises
    ------
    TypeError
        "... counts in memory ..." for counts in a file or a Dask array.
    """
    if is_stored(X):
        raise TypeError(
            f"{type(estimator).__name__} needs counts in memory here, found {described(X)}: give "
            f"{how_to_read(X)}, or the rows that you need. fit, transform, score and score_samples read "
            "counts block by block."
        )
    rows, mask = validated_rows(estimator, X, reset=reset, warn=warn, missing=missing)
    X = rows.block(slice(0, rows.shape[0]))
    return (X, mask) if missing else X


# ------------------------------------------------------------------ numbers of any kind


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
    if kind in ("c", "m", "M"):
        _refuse_type(name, X.dtype)
    if kind in ("O", "S", "U", "T") and not sp.issparse(X) and X.ndim == 2:
        return _numbers_of_objects(name, np.asarray(X))
    return X


def _refuse_holders(name, X):
    """Refuse objects that hold a matrix, recognized by attributes of their class, without any import."""
    array_like = hasattr(type(X), "__array__") or isinstance(X, Sequence) or sp.issparse(X)
    if array_like and not hasattr(type(X), "dask"):
        return
    advice = (advice for attribute, advice in _HOLDERS.items() if hasattr(type(X), attribute))
    message = (
        f"{name} expects a matrix of counts: an array, a SciPy sparse matrix, a DataFrame, or what has "
        f"shape, dtype and slices of rows; found {type(X).__module__}.{type(X).__qualname__}. "
        f"{next(advice, '')}"
    )
    raise TypeError(message.rstrip())


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


def _refuse_type(name, dtype):
    """Refuse types of values that are not numbers, of which counts could be read."""
    if dtype.kind == "c":
        _refuse_complex(name)
    if dtype.kind in ("m", "M"):
        _refuse_dates(name, dtype)
    if dtype.kind not in "biuf":
        _refuse_objects(name, dtype, "")


def _refuse_complex(name):
    raise ValueError(f"Complex data not supported: {name} expects counts. {RAW}")


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


# ------------------------------------------------------------------ distinct counts

#: largest number of multiplicities that are counted in one array, 8 bytes each
_COUNTED_KEYS = 2**22
#: number of counts that are processed at a time: counted, or sorted
_COUNTED_AT_ONCE, _SORTED_AT_ONCE = 2**18, 2**20


class CountHistogram:
    """Distinct non-zero counts of every gene with their multiplicities.

    A sum over cells of a function of (count, dispersion) then costs one evaluation per distinct count.

    Parameters
    ----------
    X : csr_matrix of shape (n_cells, n_genes) or Rows
        Canonical (sorted, no duplicates, no explicit zeros).
    weight : ndarray of shape (n_cells,) or None
        How often each row counts; None is once. ``n_cells`` is their sum.
    """

    def __init__(self, X, weight=None):
        self.n_cells, self.n_genes = X.shape
        if weight is not None:
            self.n_cells = float(weight.sum())
        self.gene, self.count, self.times = functools.reduce(
            _merged,
            (
                _distinct(X, None if weight is None else weight[rows])
                for rows, X in as_rows(X).of_any_type()
            ),
        )
        self.log_factorials = float(np.sum(self.times * log_factorial(self.count)))

    def _sum(self, values):
        return np.bincount(self.gene, self.times * values, minlength=self.n_genes)

    def constants(self, r):
        """Per gene ``sum_cells log_rising(u, r)``, shape (n_genes,)."""
        return self._sum(log_rising(self.count, r[self.gene]))

    def log_constants(self, r):
        """Per gene ``sum_cells [log_rising(u, r) - log u!]``, shape (n_genes,)."""
        return self.constants(r) - self._sum(log_factorial(self.count))

    def constant_derivatives(self, r):
        """First and second derivatives of the constants with respect to ``log r``, two arrays (n_genes,)."""
        first, second = log_rising_derivatives(self.count, r, self.gene)
        return self._sum(first), self._sum(second)


def _distinct(X, weight):
    """Distinct pairs of gene and count in CSR, sorted, and how often each occurs: three arrays."""
    if weight is not None:
        weight = np.repeat(weight, np.diff(X.indptr))
    values, code = X.data, X.data
    if values.size == 0 or values.max() >= 2**31 or n_fractional(values):
        values, code = np.unique(X.data, return_inverse=True)
    # one integer key per pair of gene and count; with few possible keys, counting is faster than sorting
    width = int(code.max(initial=0)) + 1
    n_keys = X.shape[1] * width
    are_few = n_keys <= max(_COUNTED_KEYS, code.size)
    size = max(_COUNTED_AT_ONCE, n_keys) if are_few else _SORTED_AT_ONCE
    weights = [None] * len(in_parts(code, size)) if weight is None else in_parts(weight, size)
    parts = zip(in_parts(X.indices, size), in_parts(code, size), weights, strict=True)
    keys = ((gene * np.int64(width) + part.astype(np.int64), own) for gene, part, own in parts)
    if are_few:
        times = np.zeros(n_keys, np.int64 if weight is None else float)
        for key, own in keys:
            times += np.bincount(key, own, minlength=n_keys)
        key = np.flatnonzero(times)
        tallies = [(key, times[key])]
    else:
        tallies = (_sorted(*part) for part in keys)

    def unpacked(key, times):
        count = key % width if values is X.data else values[key % width]
        return (key // width).astype(np.intp), count.astype(float), times.astype(float)

    return functools.reduce(_merged, (unpacked(*tally) for tally in tallies))


def _sorted(key, weight):
    """Distinct keys, and how often each occurs."""
    if weight is None:
        return np.unique(key, return_counts=True)
    key, at = np.unique(key, return_inverse=True)
    return key, np.bincount(at.ravel(), weight)


def _merged(one, other):
    """The distinct counts of both, see :func:`_distinct`."""
    gene, count, times = (np.concatenate(pair) for pair in zip(one, other, strict=True))
    order = np.lexsort((count, gene))
    gene, count = gene[order], count[order]
    if not gene.size:
        return gene, count, times
    first = np.flatnonzero(np.r_[True, (np.diff(gene) != 0) | (np.diff(count) != 0)])
    return gene[first], count[first], np.add.reduceat(times[order], first)


def row_constants(X, r):
    """Per cell ``sum_genes [log_rising(u, r) - log u!]``, shape (n_cells,)."""

    def of_block(rows, X):
        values = log_rising(X.data, r[X.indices]) - log_factorial(X.data)
        of = np.repeat(np.arange(X.shape[0]), np.diff(X.indptr))
        return np.bincount(of, values, minlength=X.shape[0])

    return as_rows(X).of_rows(of_block)

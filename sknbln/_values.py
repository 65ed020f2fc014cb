"""The values of counts, a block of rows at a time: rounded, refused, or warned about."""

import numpy as np
from scipy.stats import chi2

from ._known import without_missing

RAW = "Give raw counts, not normalized, centred or log-transformed values."
#: relative and absolute distance from a whole number that is treated as rounding error
_ROUNDING = 1e-6, 1e-8
#: least number of non-zero counts for which a common divisor is not chance: 20 large counts are all even
#: with probability 1e-6
_NOT_TINY = 20
#: above it float64 represents even numbers only
_LARGEST_EXACT = 2**53
#: number of counts that are processed at a time
_AT_ONCE = 2**18

_BAD = {
    "NaN": (
        np.isnan,
        "Drop those rows or genes; a count that was looked for and not seen is 0.",
    ),
    "inf": (np.isinf, RAW),
    "Negative values": (lambda a: a < 0, RAW),
}


def in_parts(a, size=_AT_ONCE):
    """Views of about ``size`` entries each, which bound the size of temporary arrays."""
    return np.array_split(a, max(a.size // size, 1))


def n_fractional(values):
    """Number of values that are not whole numbers."""
    if values.dtype.kind in "iu":
        return 0
    return sum(np.count_nonzero(part != np.floor(part)) for part in in_parts(values))


def canonical(X, missing=False):
    """CSR, sorted, without duplicates or zeros, near-whole numbers rounded; and a mask of missing counts.

    The mask is None where no count is missing. The matrix that is given is not modified.
    """
    if X.dtype.kind == "b" or not X.has_canonical_format or not X.data.all():
        # the next lines work in place, and the arrays may be the caller's; small integers might overflow
        X = X.astype(np.float64, copy=True)
        X.sum_duplicates()
        X.eliminate_zeros()
    mask = None
    if missing:
        X, mask = without_missing(X)
    return _rounded(X), mask


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


class Values:
    """What the values of canonical blocks say; memory is a few numbers per row.

    Parameters
    ----------
    name : str
        Of the estimator, for messages.
    fitting : bool
        Whether a fit is to be warned about rows that do not look like counts.
    """

    def __init__(self, name, fitting):
        self._name, self._fitting = name, fitting
        self._bad = {}  # what -> the first value, its row and column, and how many there are
        self._fractional = self._nnz = self._n_rows = 0
        self._largest = 0.0
        #: of rows with counts: their number, the least, and a common divisor (1 if the least is 1)
        self._rows = []
        self.totals = []

    def add(self, X):
        """Take in the next block of rows, float64."""
        self._look_for_bad(X)
        self._fractional += n_fractional(X.data)
        self._nnz += X.nnz
        if X.nnz:
            self._largest = max(self._largest, X.data.max())
        self.totals.append(np.asarray(X.sum(axis=1)).ravel())
        is_whole = not (self._bad or self._fractional) and self._largest <= _LARGEST_EXACT
        if self._fitting and is_whole:
            self._rows.append(_of_rows(X))
        self._n_rows += X.shape[0]

    def _look_for_bad(self, X):
        for what, (is_bad, _) in _BAD.items():
            bad = is_bad(X.data)
            if not bad.any():
                continue
            at = int(np.flatnonzero(bad)[0])
            row = self._n_rows + int(np.searchsorted(X.indptr, at, side="right")) - 1
            *first, times = self._bad.get(what, (X.data[at], row, int(X.indices[at]), 0))
            self._bad[what] = *first, times + bad.sum()

    def refuse(self, genes):
        """Raise ValueError about NaN, inf and negative values; the message names the place of the first."""
        for what, (_, advice) in _BAD.items():
            if what not in self._bad:
                continue
            value, row, column, times = self._bad[what]
            gene = "" if genes is None else f" ({genes[column]!r})"
            raise ValueError(
                f"{what} in data passed to {self._name}: expected counts, finite and >= 0, found {value:g} "
                f"at row {row}, column {column}{gene}, {times} such in all. {advice}"
            )

    def warning(self, n_genes):
        """The message of a warning about values that do not look like counts; None without."""
        if self._fractional:
            return (
                f"{self._name} expects counts, found values that are not whole numbers "
                f"({self._fractional / self._nnz:.1%} of the non-zero entries). They are used as they are; "
                "give raw counts if you have them."
            )
        if not self._fitting:
            return None
        if not self._nnz:
            return (
                f"{self._name} is fitted to a matrix without a single count, shape "
                f"{(self._n_rows, n_genes)}: what it returns are its priors. Look at what X holds."
            )
        return self._scaled() or self.same_depth()

    def _scaled(self):
        """Message about rows with a common divisor, as counts times a constant have; None if few have one."""
        if self._largest > _LARGEST_EXACT:
            return None
        size, least, divisor = (np.concatenate(a) for a in zip(*self._rows, strict=True))
        if size.max() < _NOT_TINY:  # short rows: treat the whole matrix as one row
            size, least = np.array([self._nnz]), np.array([least.min()])
            divisor = np.array([np.gcd.reduce(divisor)])
        large = size >= _NOT_TINY
        half = large.sum() / 2
        # most rows of real counts contain a 1
        divisible = np.flatnonzero(large & (divisor > 1))
        if np.count_nonzero(large & (least > 1)) <= half or divisible.size <= half:
            return None
        rows = f"of {divisible.size} of {large.sum()} rows" if large.size > 1 else "of all rows"
        return (
            f"{self._name} expects counts, found whole numbers that look like counts times a constant: the "
            f"values {rows} have a common divisor ({divisor[divisible[0]]} in the first). Their dispersion "
            "is not that of counts: give the counts themselves."
        )

    def same_depth(self):
        """Message about rows whose totals are equal but for rounding; None if they are not.

        Totals of counts have at least the variance of Poisson variables, which is their mean. Totals are
        called equal if their standard deviation is below 0.2 % of the mean, and their variance, plus 1/12
        for rounding, is below a quarter of the mean and below the 1e-6 quantile of the sample variance of
        Poisson variables. With very few rows the last condition is never met.
        """
        totals = np.concatenate(self.totals)
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
            f"{self._name} expects counts, found rows whose totals are equal but for rounding "
            f"({totals.min():.0f} to {totals.max():.0f}). A table that was rarefied, subsampled to one "
            "depth, has such totals, and nothing is wrong. Rounded counts per million have them too, but not "
            "the dispersion of counts: give raw counts."
        )


def _of_rows(X):
    """Of the rows with counts: their number, the least, a common divisor (1 where the least is 1)."""
    size = np.diff(X.indptr)
    starts, size = X.indptr[:-1][size > 0], size[size > 0]
    if not size.size:
        return size, np.zeros(0), np.zeros(0, np.int64)
    least, divisor = np.minimum.reduceat(X.data, starts), np.ones(size.size, np.int64)
    above_one = least > 1
    if above_one.any():
        starts = np.cumsum(size[above_one]) - size[above_one]
        counts = X.data[np.repeat(above_one, size)].astype(np.int64)
        divisor[above_one] = np.gcd.reduceat(counts, starts)
    return size, least, divisor

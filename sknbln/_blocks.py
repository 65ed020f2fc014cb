"""Where rows come from: counts in memory, or read block by block from a file or a Dask array."""

import functools
import itertools
import threading
from abc import ABC, abstractmethod

import numpy as np
import scipy.sparse as sp

from ._values import canonical

#: counts of a block that is read at a time, zeros included, about: 8 bytes each where they are dense
BLOCK_ENTRIES = 2**22
#: counts of rows at random places that are read at a time, in one pass over all blocks, zeros included
_CHOSEN_ENTRIES = 2**24
#: non-zero counts that are converted to double precision at a time
_CONVERTED_AT_ONCE = 2**20
#: blocks that are kept: neighbouring batches, solved at the same time, may lie in two of them
_KEPT_BLOCKS = 2


class Rows(ABC):
    """Rows of a count matrix, wherever they are. All code takes counts through this class.

    Attributes
    ----------
    shape : tuple (n_cells, n_genes)
    chosen_at_once : int
        Number of rows at random places that are best taken together.
    """

    chosen_at_once = 1

    @abstractmethod
    def slices(self):
        """Slices of consecutive rows, in order, which are best taken together."""

    @abstractmethod
    def block(self, rows):
        """The rows of a slice as canonical CSR, float64."""

    @abstractmethod
    def chosen(self, positions):
        """`Rows` at these positions, in this order."""

    def in_memory(self):
        """The same as `CSRRows`."""
        return CSRRows(self.block(slice(0, self.shape[0])))

    def cluster(self):
        """Where parts of the rows are solved, other than here; None where there is no such place."""
        return None

    def __iter__(self):
        """Yield (slice of rows, their counts)."""
        for rows in self.slices():
            yield rows, self.block(rows)

    def of_any_type(self):
        """Yield (slice of rows, their counts) where any type of number will do."""
        yield from self

    def of_rows(self, function):
        """``function(rows, counts)`` of each block, an array with a row for each, put together."""
        out = None
        for rows, X in self:
            part = function(rows, X)
            if part.shape[0] == self.shape[0]:
                return part
            if out is None:
                out = np.empty((self.shape[0], *part.shape[1:]), part.dtype)
            out[rows] = part
        return out

    @functools.cached_property
    def on_accelerator(self):
        """Dense batches that were put on an accelerator, by their place and shape; see `RowBatches`."""
        return {}

    @functools.cached_property
    def totals(self):
        """Row totals, (n_cells,)."""
        return self.of_rows(lambda rows, X: np.asarray(X.sum(axis=1)).ravel())


def as_rows(X):
    """Canonical CSR as `Rows`; `Rows` are returned as they are."""
    return X if isinstance(X, Rows) else CSRRows(X)


def as_csr(X):
    """CSR of an array or sparse matrix, of a type of numbers that SciPy knows."""
    X = X if sp.issparse(X) else np.asarray(X)
    if X.dtype.kind == "f" and X.dtype not in (np.float32, np.float64):
        X = X.astype(np.float64)
    return sp.csr_matrix(X)


def _between(borders):
    return [slice(*pair) for pair in itertools.pairwise(borders)]


def _part(X, rows):
    """The rows of a slice of CSR, a view of the same memory."""
    inside = slice(X.indptr[rows.start], X.indptr[rows.stop])
    indptr = X.indptr[rows.start : rows.stop + 1] - X.indptr[rows.start]
    shape = rows.stop - rows.start, X.shape[1]
    return type(X)((X.data[inside], X.indices[inside], indptr), shape=shape, copy=False)


class CSRRows(Rows):
    """Rows of a count matrix in memory.

    Parameters
    ----------
    X : csr_matrix of shape (n_cells, n_genes)
        Canonical counts of any type of number. Those that are not float64 are converted block by block.
    """

    def __init__(self, X):
        self.X, self.shape = X, X.shape

    def slices(self):
        """One slice of all rows; where counts have to be converted, slices of about `_CONVERTED_AT_ONCE`."""
        n = self.shape[0]
        if self.X.dtype == np.float64:
            return [slice(0, n)]
        first = np.searchsorted(self.X.indptr, np.arange(0, self.X.nnz, _CONVERTED_AT_ONCE))
        borders = np.unique(np.r_[0, first.clip(0, n), n])
        return _between(borders.tolist())

    def of_any_type(self):
        """Yield all rows, without converting them."""
        yield slice(0, self.shape[0]), self.X

    def block(self, rows):
        """The rows of a slice, a view of the same memory where they are float64."""
        return _part(self.X, rows).astype(np.float64, copy=False)

    def with_missing(self, rows):
        """The rows of a slice, and None: what is missing is known where they were made."""
        return self.block(rows), None

    def chosen(self, positions):
        """`CSRRows` at these positions."""
        return CSRRows(self.X[positions])

    def in_memory(self):
        """Itself."""
        return self


class StoredRows(Rows):
    """Rows that are read when they are needed.

    Parameters
    ----------
    read : callable
        ``read(start, stop)`` returns rows as a 2-D array or a sparse matrix.
    shape : tuple (n_cells, n_genes)
    borders : list of int
        0, where the second block starts, ..., n_cells: blocks are read whole, the last few are kept.
    missing : bool
        Whether NaN is a count that was not seen. It is 0 in the blocks.
    """

    def __init__(self, read, shape, borders, missing=False):
        self.shape, self.borders, self._read, self.missing = shape, borders, read, missing
        self._kept, self._reading = {}, threading.Lock()
        self.chosen_at_once = max(_CHOSEN_ENTRIES // max(shape[1], 1), 1)

    def slices(self):
        """The blocks that are read."""
        return _between(self.borders)

    def with_missing(self, rows):
        """The rows of a slice as canonical CSR, and a mask of missing counts, None where there are none."""
        X, mask = canonical(as_csr(self._read(rows.start, rows.stop)), self.missing)
        return X.astype(np.float64, copy=False), mask

    def _stored(self, i):
        """The block of this number."""
        with self._reading:
            if i not in self._kept:
                X, _ = self.with_missing(slice(self.borders[i], self.borders[i + 1]))
                while len(self._kept) >= _KEPT_BLOCKS:
                    del self._kept[next(iter(self._kept))]
                self._kept[i] = X
            return self._kept[i]

    def block(self, rows):
        """The rows of a slice, from the blocks that they lie in."""
        at = (
            np.searchsorted(self.borders, [rows.start, max(rows.stop - 1, rows.start)], "right") - 1
        )
        parts = []
        for i in range(at[0], at[1] + 1):
            start, stop = self.borders[i], self.borders[i + 1]
            inside = slice(max(rows.start, start) - start, min(rows.stop, stop) - start)
            parts.append(_part(self._stored(i), inside))
        return parts[0] if len(parts) == 1 else sp.vstack(parts, format="csr")

    def chosen(self, positions):
        """`ChosenRows`, which are read when they are needed too."""
        return ChosenRows(self, positions)

    def at(self, positions):
        """CSR of the rows at these positions, each block that has some read once."""
        order = np.argsort(positions, kind="stable")
        number = np.searchsorted(self.borders, positions[order], "right") - 1
        parts = [
            self._stored(i)[positions[order[number == i]] - self.borders[i]]
            for i in np.unique(number)
        ]
        if not parts:
            return sp.csr_matrix((0, self.shape[1]))
        X = sp.vstack(parts, format="csr")
        return X if np.all(np.diff(order) == 1) else X[np.argsort(order)]


class ChosenRows(Rows):
    """Some of the rows of `StoredRows`, in a given order."""

    def __init__(self, whole, positions):
        self._whole, self._positions = whole, positions
        self.shape = positions.size, whole.shape[1]

    def slices(self):
        """As many rows as the largest block of the whole has."""
        size, n = max(np.diff(self._whole.borders)), self.shape[0]
        return [slice(start, min(start + size, n)) for start in range(0, max(n, 1), size)]

    def block(self, rows):
        """The rows of a slice."""
        return self._whole.at(self._positions[rows])

    def chosen(self, positions):
        """Those at positions among these."""
        return ChosenRows(self._whole, self._positions[positions])

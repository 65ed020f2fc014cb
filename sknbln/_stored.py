"""Counts that are not in memory: what can be read block by block, and how."""

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

from ._blocks import BLOCK_ENTRIES, StoredRows
from ._dask import DaskRows, chunks_of_rows, is_dask


def is_stored(X):
    """Whether X has slices of rows, and is neither in memory nor an object that holds a matrix."""
    in_memory = isinstance(X, (np.ndarray, Sequence)) or sp.issparse(X)
    if in_memory or any(hasattr(type(X), name) for name in ("X", "columns", "__dlpack__")):
        return False
    return hasattr(type(X), "__getitem__") and all(hasattr(X, name) for name in ("shape", "dtype"))


def described(X):
    """The type and shape of X, for messages."""
    return f"{type(X).__module__}.{type(X).__qualname__} of shape {X.shape}"


def how_to_read(X):
    """How a user reads all of it."""
    if is_dask(X):
        return "X.compute()"
    return "X.to_memory()" if hasattr(type(X), "to_memory") else "X[:]"


def stored_rows(name, X, missing):
    """`StoredRows` of an object that :func:`is_stored`."""
    if len(X.shape) != 2:
        raise ValueError(
            f"Expected 2D array, a row per cell and a column per gene, found {described(X)}."
        )
    if getattr(X, "format", "csr") != "csr":
        raise ValueError(
            f"{name} reads blocks of rows, found {described(X)} stored by columns ({X.format}): each block "
            "would read the whole file. Write it again as CSR, or give X.to_memory() if it fits in memory."
        )
    if is_dask(X):
        return DaskRows(chunks_of_rows(name, X), X.shape, missing)
    n, n_genes = X.shape
    size = max(BLOCK_ENTRIES // max(n_genes, 1), 1)
    chunk = (getattr(X, "chunks", None) or (1,))[0]
    # a chunk of more rows than a block is read more than once
    if isinstance(chunk, int) and chunk <= size:
        size = size // chunk * chunk
    return StoredRows(lambda start, stop: X[start:stop], X.shape, [*range(0, n, size), n], missing)

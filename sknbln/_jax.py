"""Where the library meets JAX: precision, batches of rows, padding. NumPy in, NumPy out.

The solver runs in float64 inside a local scope; the user's global JAX configuration is never
changed, and no JAX array leaves this file's callers (a pickled float64 JAX array would come back as
float32).
"""

import copy
import ctypes
import functools
import re
import warnings

import jax
import jaxlib
import numpy as np

from ._laplace.likelihood import log_rising_slope
from ._laplace.marginal import BatchSums, no_sums, score_products, solve_cells
from ._laplace.mode import Cells, Globals

# jaxlib releases that can hang for ever on 2-core CPUs on batched solvers like this one.
_HANGING_JAXLIB = re.compile(r"0\.10\.\d+|0\.11\.[01]")
_ROW_BUCKET = 64  # rows of a batch are padded to a multiple of this
_LEAST_ROWS = 32  # of an automatic batch: every batch has sums over its rows for every gene
_RANK_BUCKET = 4  # latent dimensions are padded to a multiple of this
# Automatic batches hold about this many counts: the arrays of a batch (1 MB each) then stay in the
# processor's caches and in memory that the allocator already has.
_BATCH_ENTRIES = 2**17


def warn_about_jaxlib(version=jaxlib.__version__):
    """Warn when the installed jaxlib is known to hang on this kind of computation."""
    if _HANGING_JAXLIB.fullmatch(version):
        warnings.warn(
            f"jaxlib {version} can hang for ever on CPUs with two cores in computations of the kind "
            "that sknbln runs. Install another release, e.g. `pip install 'jax>=0.11.2'` or "
            "`pip install 'jax<0.10'`.",
            RuntimeWarning,
            stacklevel=3,
        )


def float64(function):
    """Run `function` with 64-bit JAX types, whatever the caller's setting; a local scope."""

    @functools.wraps(function)
    def scoped(*args, **kwargs):
        with jax.enable_x64(True):
            return function(*args, **kwargs)

    return scoped


def _malloc_trim():
    """glibc's, which gives freed memory back to the system; None where there is another allocator."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


_TRIM = _malloc_trim()


def tidy(kernel):
    """A jitted function that gives back what its compilation freed.

    The compiler's memory comes in small pieces all over the heap. glibc keeps what is free between them,
    which for a pair of fits is more than all that they need.
    """
    if _TRIM is None:
        return kernel

    @functools.wraps(kernel)
    def called(*args):
        known = kernel._cache_size()
        found = kernel(*args)
        if kernel._cache_size() > known:
            _TRIM(0)
        return found

    called._cache_size = kernel._cache_size
    return called


solve_cells, score_products = tidy(solve_cells), tidy(score_products)


def padded_rank(k):
    """Latent dimension of the compiled kernel. A zero column of W stays zero through a sweep."""
    return -(-k // _RANK_BUCKET) * _RANK_BUCKET


def pad_columns(a, k):
    """Append zero columns to `a` until it has `k`."""
    return np.concatenate([a, np.zeros((a.shape[0], k - a.shape[1]))], 1)


class RowBatches:
    """Rows of a count matrix as padded dense batches of one shape, with their capture data.

    Parameters
    ----------
    X : csr_matrix of shape (n_cells, n_genes)
    offset, scale : ndarray of shape (n_cells,)
        Prior location and scale of the capture offset; scale 0 is a known offset.
    precision : ndarray of shape (n_cells,), optional
        1 (default) for a proper prior on the offset, 0 for a flat one.
    batch_size : int or None
        Rows per batch, rounded up so that matrices of other numbers of rows share a compiled kernel.
        None chooses by the number of genes.
    """

    def __init__(self, X, offset, scale, precision=None, *, batch_size=None):
        self.X = X
        n, n_genes = X.shape
        precision = np.ones(n) if precision is None else precision
        self.capture = np.stack([offset, scale, precision], 1).astype(float)
        if batch_size is None:
            batch_size = max(_BATCH_ENTRIES // max(n_genes, 1), _LEAST_ROWS)
        rows = min(batch_size, max(n, 1))
        bucket = min(_ROW_BUCKET, 8 * -(-rows // 8))
        self.rows = -(-rows // bucket) * bucket
        self.starts = range(0, max(n, 1), self.rows)  # of no rows too, one batch of padding

    def without_capture(self, rows):
        """Some of the rows with their offset held at 0, in batches of the same shape."""
        other = copy.copy(self)
        other.X = self.X[rows]
        other.capture = np.tile([0.0, 0.0, 1.0], (rows.size, 1))
        other.starts = range(0, rows.size, self.rows)
        return other

    def padded(self, a, value=0.0):
        """Rows of `a` filled up to the rows of a batch."""
        return np.concatenate([a, np.full((self.rows - a.shape[0], *a.shape[1:]), value)], 0)

    def block(self, rows):
        """A slice of the rows as CSR that shares their memory."""
        X, start = self.X, self.X.indptr[rows.start]
        inside = slice(start, X.indptr[rows.stop])
        indptr = X.indptr[rows.start : rows.stop + 1] - start
        shape = rows.stop - rows.start, X.shape[1]
        return type(X)((X.data[inside], X.indices[inside], indptr), shape=shape, copy=False)

    def __iter__(self):
        """Yield (slice of rows, `Cells`)."""
        n = self.X.shape[0]
        for start in self.starts:
            rows = slice(start, min(start + self.rows, n))
            counts = np.zeros((self.rows, self.X.shape[1]))
            self.block(rows).toarray(out=counts[: rows.stop - start])
            offset, scale, precision = self.capture[rows].T
            padded = self.padded(offset), self.padded(scale), self.padded(precision, 1.0)
            yield rows, Cells(counts, *padded, self.padded(np.ones(rows.stop - start)))


def _globals(mean, loadings, noise, phi):
    k = padded_rank(loadings.shape[1])
    return jax.device_put(Globals(mean, pad_columns(loadings, k), noise, phi))


@float64
def solve_rows(batches, mean, loadings, noise, phi, start=None):
    """Solve every row given the globals, from the scores of a sweep where they are given.

    Returns
    -------
    dict of ndarray
        ``log_marginal`` (n,) without the constants of the counts, ``scores`` (n, k), ``score_covariance``
        (n, k, k), ``offset`` (n,) and ``offset_variance`` (n,) of the posterior of the capture
        offset (not truncated), ``offset_slope``, ``offset_curvature``, ``converged`` and
        ``decrement`` (n,) of Newton, ``score_offset_covariance`` (n, k).
    """
    params = _globals(mean, loadings, noise, phi)
    k, padded = loadings.shape[1], params.loadings.shape[1]
    zeta, nothing = np.zeros((batches.rows, padded + 1)), jax.device_put(no_sums(mean.size, padded))
    out = {}
    for rows, cells in batches:
        if start is not None:
            zeta = batches.padded(start[rows])
        _, result, _ = solve_cells(cells, params, zeta, nothing)
        _fill(out, rows, cells, result, k, batches.X.shape[0])
    return out


def _fill(out, rows, cells, result, k, n_cells):
    """Write a batch's `CellResults` to its rows of the arrays that `solve_rows` returns."""
    result = jax.tree.map(np.asarray, result)
    offset, scale = cells.offset, cells.scale
    covariance = result.covariance
    found = dict(
        log_marginal=result.log_marginal,
        scores=result.zeta[:, :k],
        score_covariance=covariance[:, :k, :k],
        offset=offset - scale * result.zeta[:, -1],
        offset_variance=scale**2 * covariance[:, -1, -1],
        score_offset_covariance=-scale[:, None] * covariance[:, :k, -1],
        offset_slope=result.offset_slope,
        offset_curvature=result.offset_curvature,
        converged=result.converged,
        decrement=result.decrement,
    )
    for name, value in found.items():
        if name not in out:
            out[name] = np.empty((n_cells, *value.shape[1:]), value.dtype)
        out[name][rows] = value[: rows.stop - rows.start]


@float64
def gene_score_products(batches, mean, loadings, noise, phi, start, free_dispersion):
    """Outer products of each gene's scores in (mu, w, log d, log r), ``sum_c b``, and the rows.

    Shapes (n_genes, k + 3, k + 3) and (n_genes,), and what `solve_rows` returns. Where log r is not free, its
    scores lack the part that does not depend on the log-rates.
    """
    params = _globals(mean, loadings, noise, phi)
    k, padded = loadings.shape[1], params.loadings.shape[1]
    r = 1.0 / phi if free_dispersion else None
    total, out, nothing = None, {}, jax.device_put(no_sums(mean.size, padded))
    for rows, cells in batches:
        constants = np.zeros_like(cells.counts)
        if free_dispersion:
            at, genes = np.nonzero(cells.counts)
            constants[at, genes] = log_rising_slope(cells.counts[at, genes], r[genes])
        on_device = jax.device_put(cells)
        mode, result, _ = solve_cells(on_device, params, batches.padded(start[rows]), nothing)
        found = score_products(on_device, params, mode, result, constants)
        part = [np.asarray(a) for a in found]
        total = part if total is None else [np.add(a, b) for a, b in zip(total, part, strict=True)]
        _fill(out, rows, cells, result, k, batches.X.shape[0])
    keep = np.r_[0 : k + 1, padded + 1, padded + 2]
    return total[0][:, keep][:, :, keep], total[1], out


def sum_over_batches(batches, mean, phi):
    """A function that sums ``function(cells, mean, phi, *args)`` over the batches."""

    @float64
    def summed(function, *args):
        total = None
        for _, cells in batches:
            part = jax.tree.map(np.asarray, function(cells, mean, phi, *args))
            total = part if total is None else jax.tree.map(np.add, total, part)
        return total

    return summed


class Sweeper:
    """Runs sweeps over the batches, keeping each row's scores as the next sweep's start."""

    def __init__(self, batches, k):
        self.batches = batches
        self.scores = np.zeros((batches.X.shape[0], padded_rank(k) + 1))

    def rotate(self, rotation):
        """Follow a rotation (k, k) of the loadings."""
        k = rotation.shape[0]
        self.scores[:, :k] = self.scores[:, :k] @ rotation

    @float64
    def __call__(self, mean, loadings, noise, phi):
        """One pass over all rows: `BatchSums` of NumPy arrays for the unpadded latent dimension."""
        params = _globals(mean, loadings, noise, phi)
        total = no_sums(mean.size, params.loadings.shape[1])
        running = None  # the batch before, still being computed while this one is made dense
        for rows, cells in self.batches:
            start = self.batches.padded(self.scores[rows])
            mode, _, total = solve_cells(cells, params, start, total)
            if running is not None:
                self._keep(*running)
            running = rows, mode.zeta
        self._keep(*running)
        return _unpad(jax.tree.map(np.asarray, total), loadings.shape[1])

    def _keep(self, rows, zeta):
        found = np.asarray(zeta)[: rows.stop - rows.start]
        # a trial may overflow; the next sweep starts from the last finite scores
        good = np.isfinite(found).all(axis=1)
        self.scores[rows][good] = found[good]


def _unpad(sums: BatchSums, k):
    genes = sums.genes
    padded = genes.gradient_loadings.shape[1]
    i, j = np.triu_indices(padded)
    keep = np.r_[True, np.arange(padded) < k, (i < k) & (j < k)]
    return sums._replace(
        genes=genes._replace(
            gradient_loadings=genes.gradient_loadings[:, :k], moments=genes.moments[:, keep]
        )
    )

"""Rows of a count matrix in batches: made dense, padded, solved, summed. NumPy in, NumPy out.

No JAX array leaves this file's callers (a pickled float64 JAX array would come back as float32).
"""

import copy
import functools
import math

import jax
import numpy as np

from ._jax import compiled_once, float64, in_order, n_workers, on_cpu, tidy
from ._laplace.driver import magnitude
from ._laplace.likelihood import log_rising_slope
from ._laplace.marginal import BatchSums, no_sums, score_products, solve_cells
from ._laplace.mode import LAST_STEP, Cells, Globals

_ROW_BUCKET = 64  # rows of a batch are padded to a multiple of this
_LEAST_ROWS = 64  # of an automatic batch: every batch has sums over its rows for every gene
_RANK_BUCKET = 4  # latent dimensions are padded to a multiple of this
# Automatic batches hold about this many counts, 8 bytes each in a few arrays
_BATCH_ENTRIES = 2**17
_BATCH_ENTRIES_OF_ACCELERATOR = 2**22
# of which so many are worked on at a time that the dozen arrays of a Newton iteration stay in a
# processor's own cache.
_BLOCK_ENTRIES = 2**14
_LEAST_BLOCK = 8  # rows
# The modes of a fit's rows: what is left of a Newton decrement changes the objective by less than its
# square root. That may be this share of what the fit's tol asks for
_MODE_SHARE = 1e-4
# but the decrement is never left above this.
_LARGEST_LAST_STEP = 1e-6

solve_cells, score_products = (compiled_once(tidy(k)) for k in (solve_cells, score_products))


def padded_rank(k):
    """Latent dimension of the compiled kernel. A zero column of W stays zero through a sweep."""
    return -(-k // _RANK_BUCKET) * _RANK_BUCKET


def pad_columns(a, k):
    """Append zero columns to `a` until it has `k`."""
    return np.concatenate([a, np.zeros((a.shape[0], k - a.shape[1]))], 1)


def _solved_at_once(rows, n_genes):
    """Rows of a batch that are solved together, a divisor of their number."""
    if not on_cpu():
        return rows
    wanted = _BLOCK_ENTRIES // max(n_genes, 1)
    # where the cache holds not even a few rows, more of them share what is read of every gene
    wanted = max(wanted, _LEAST_BLOCK) if wanted >= _LEAST_BLOCK // 2 else 2 * _LEAST_BLOCK
    return rows if rows <= wanted else math.gcd(rows, 2 ** int(math.log2(wanted)))


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
            entries = _BATCH_ENTRIES if on_cpu() else _BATCH_ENTRIES_OF_ACCELERATOR
            batch_size = max(entries // max(n_genes, 1), _LEAST_ROWS)
        rows = min(batch_size, max(n, 1))
        bucket = min(_ROW_BUCKET, 8 * -(-rows // 8))
        self.rows = -(-rows // bucket) * bucket
        self.starts = range(0, max(n, 1), self.rows)  # of no rows too, one batch of padding
        self.solved_at_once = _solved_at_once(self.rows, n_genes)

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

    def slices(self):
        """Of the rows of each batch."""
        n = self.X.shape[0]
        return [slice(start, min(start + self.rows, n)) for start in self.starts]

    def cells(self, rows):
        """The `Cells` of a batch."""
        n = rows.stop - rows.start
        counts = np.zeros((self.rows, self.X.shape[1]))
        self.block(rows).toarray(out=counts[:n])
        offset, scale, precision = self.capture[rows].T
        padded = self.padded(offset), self.padded(scale), self.padded(precision, 1.0)
        return Cells(counts, *padded, self.padded(np.ones(n)))

    def __iter__(self):
        """Yield (slice of rows, `Cells`)."""
        for rows in self.slices():
            yield rows, self.cells(rows)

    def map(self, function):
        """``function(rows, cells)`` of each batch, in their order; several are worked on at a time."""
        slices = self.slices()
        workers = min(n_workers(), len(slices))
        return in_order(lambda rows: function(rows, self.cells(rows)), slices, workers)

    def solve(self, cells, params, zeta, last_step=LAST_STEP):
        """:func:`solve_cells`, a block of cells at a time."""
        return solve_cells(cells, params, zeta, last_step, block=self.solved_at_once)


def _added(total, part):
    """Sums over two batches' rows, from those over each."""
    return jax.tree.map(np.add, total, part)


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
    start = np.zeros((batches.X.shape[0], padded + 1)) if start is None else start

    def solved(rows, cells):
        results = batches.solve(cells, params, batches.padded(start[rows]))[1]
        return rows, cells, jax.tree.map(np.asarray, results)

    out = {}
    for part in batches.map(solved):
        _fill(out, *part, k, batches.X.shape[0])
    return out


def _fill(out, rows, cells, result, k, n_cells):
    """Write a batch's `CellResults` to its rows of the arrays that `solve_rows` returns."""
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

    def products(rows, cells):
        constants = np.zeros_like(cells.counts)
        if free_dispersion:
            at, genes = np.nonzero(cells.counts)
            constants[at, genes] = log_rising_slope(cells.counts[at, genes], r[genes])
        on_device = jax.device_put(cells)
        alpha, results, _ = batches.solve(on_device, params, batches.padded(start[rows]))
        found = score_products(on_device, params, alpha, results, constants)
        return rows, cells, *jax.tree.map(np.asarray, (results, found))

    total, out = None, {}
    for rows, cells, results, part in batches.map(products):
        total = part if total is None else _added(total, part)
        _fill(out, rows, cells, results, k, batches.X.shape[0])
    keep = np.r_[0 : k + 1, padded + 1, padded + 2]
    return total[0][:, keep][:, :, keep], total[1], out


def sum_over_batches(batches, mean, phi):
    """A function that sums ``function(cells, mean, phi, *args)`` over the batches."""

    @float64
    def summed(function, *args):
        kernel = compiled_once(function)

        def part(rows, cells):
            return jax.tree.map(np.asarray, kernel(cells, mean, phi, *args))

        return functools.reduce(_added, batches.map(part))

    return summed


class Sweeper:
    """Runs sweeps over the batches, keeping each row's scores as the next sweep's start.

    Parameters
    ----------
    batches : RowBatches
    k : int

    Attributes
    ----------
    scores : ndarray of shape (n_cells, padded k + 1)
    tol : float
        Fraction of the objective's magnitude that matters to who asks: the rows' modes are found to so much
        that the objective is known far better. 0, to rounding, unless it is set.
    """

    def __init__(self, batches, k):
        self.batches = batches
        self.scores = np.zeros((batches.X.shape[0], padded_rank(k) + 1))
        self.tol = 0.0
        self._last_step = LAST_STEP

    def rotate(self, rotation):
        """Follow a rotation (k, k) of the loadings."""
        k = rotation.shape[0]
        self.scores[:, :k] = self.scores[:, :k] @ rotation

    @float64
    def __call__(self, mean, loadings, noise, phi):
        """One pass over all rows: `BatchSums` of NumPy arrays for the unpadded latent dimension."""
        params = _globals(mean, loadings, noise, phi)

        def solved(rows, cells):
            start = self.batches.padded(self.scores[rows])
            _, results, sums = self.batches.solve(cells, params, start, self._last_step)
            found = np.asarray(results.zeta)[: rows.stop - rows.start]
            # a trial may overflow; the next sweep starts from the last finite scores
            good = np.isfinite(found).all(axis=1)
            self.scores[rows][good] = found[good]
            return jax.tree.map(np.asarray, sums)

        total = no_sums(mean.size, params.loadings.shape[1])
        for sums in self.batches.map(solved):
            total = _added(total, sums)
        # of the first sweep nobody knows the magnitude: it is solved to rounding
        size = magnitude(float(total.log_marginal), max(self.batches.X.shape[0], 1))
        if np.isfinite(size):
            self._last_step = min(
                max(LAST_STEP, (_MODE_SHARE * self.tol * size) ** 2), _LARGEST_LAST_STEP
            )
        return _unpad(total, loadings.shape[1])


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

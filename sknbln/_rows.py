"""Rows of a count matrix in batches: made dense, padded, solved, here or where they are."""

import copy
import functools
import math

import jax
import numpy as np

from ._blocks import CSRRows, as_csr, as_rows
from ._dask import tuned_worker
from ._jax import compiled_once, float64, in_order, n_workers, on_cpu
from ._known import Known
from ._values import canonical
from .solver.marginal import solve_cells
from .solver.mode import LAST_STEP
from .solver.params import Cells

_ROW_BUCKET = 64  # rows of a batch are padded to a multiple of this
_LEAST_ROWS = 64  # minimum of an automatic batch: each batch costs a set of sums for every gene
# Latent dimensions are padded to a multiple of the first. Where there are fewer counts than `FEW_ENTRIES`, of
# the second, 0 too: one kernel then serves independent genes and up to 8 factors, and columns of zeros cost
# less than the two seconds in which another is compiled
_RANK_BUCKET, _RANK_BUCKET_OF_FEW = 4, 8
# on an accelerator, where compiling takes as long as a fit
_RANK_BUCKET_OF_ACCELERATOR = 16
FEW_ENTRIES = 2**20
# Of more genes than these the latent dimension is not padded: two more columns, whose products leave the
# caches, cost a tenth to a fifth of every pass, which is more than a compilation
MANY_GENES = 2**13
# Counts in an automatic batch, about; 8 bytes each in a few arrays
_BATCH_ENTRIES = 2**17
# The same on an accelerator, and rows at most: of a sample of many rows and of all of them the batches are
# then of one shape
_BATCH_ENTRIES_OF_ACCELERATOR, _MOST_ROWS_OF_ACCELERATOR = 2**24, 2**14
# Counts that stay on an accelerator, zeros included, 8 bytes each; more go there in every pass
_MOST_ENTRIES_OF_ACCELERATOR = 2**31
# Counts that are solved at a time: the dozen arrays of a Newton iteration then stay in the cache of a
# processor. With factors at least some rows: fewer would read the products of the loadings too often
_BLOCK_ENTRIES = 2**14
_LEAST_BLOCK, _LEAST_BLOCK_WITH_FACTORS = 2, 8  # rows
#: of more rows than `MANY_ROWS` a sample of `SAMPLE_ROWS` is fitted before all rows
MANY_ROWS, SAMPLE_ROWS = 30_000, 20_000

solve_cells = compiled_once(solve_cells)


def padded_rank(k, n_cells, n_genes):
    """Latent dimension of the compiled kernel.

    A zero column of W stays zero in a sweep.
    """
    if not on_cpu():
        return -(-max(k, 1) // _RANK_BUCKET_OF_ACCELERATOR) * _RANK_BUCKET_OF_ACCELERATOR
    if n_cells * n_genes < FEW_ENTRIES:
        return -(-max(k, 1) // _RANK_BUCKET_OF_FEW) * _RANK_BUCKET_OF_FEW
    if n_genes > MANY_GENES:
        return k
    return -(-k // _RANK_BUCKET) * _RANK_BUCKET


def in_single(n_cells, n_genes):
    """Whether what need not be accurate is computed in single precision.

    That pays where a pass over many counts waits for memory. On an accelerator compiling it takes longer.
    """
    return on_cpu() and n_cells * n_genes > FEW_ENTRIES


def pad_columns(a, k):
    """Append zero columns to `a` until it has `k`."""
    return np.concatenate([a, np.zeros((a.shape[0], k - a.shape[1]))], 1)


def sample_of_rows(n_cells, rng):
    """Positions of a random sample of many rows, in their order; None where there are few."""
    return random_rows(n_cells, SAMPLE_ROWS, rng) if n_cells > MANY_ROWS else None


def random_rows(n_cells, size, rng):
    """Positions of a random sample, in their order."""
    return np.sort(rng.choice(n_cells, size, replace=False))


def _solved_at_once(rows, n_genes, k):
    """Number of rows of a batch that are solved together, a divisor of ``rows``."""
    if not on_cpu():
        return rows
    wanted = max(
        _BLOCK_ENTRIES // max(n_genes, 1), _LEAST_BLOCK_WITH_FACTORS if k else _LEAST_BLOCK
    )
    return rows if rows <= wanted else math.gcd(rows, 2 ** int(math.log2(wanted)))


def _automatic_batch(n_genes):
    """Number of rows of a batch, by the number of genes."""
    n_genes = max(n_genes, 1)
    if on_cpu():
        return max(_BATCH_ENTRIES // n_genes, _LEAST_ROWS)
    most = min(_BATCH_ENTRIES_OF_ACCELERATOR // n_genes, _MOST_ROWS_OF_ACCELERATOR)
    return max(most, _LEAST_ROWS)


class RowBatches:
    """Rows of a count matrix as padded dense batches of one shape, with the priors of their offsets.

    Parameters
    ----------
    X : csr_matrix of shape (n_cells, n_genes) or Rows
        Counts.
    offset, scale : ndarray of shape (n_cells,)
        Prior location and scale of the capture offset, nats; scale 0 fixes the offset.
    precision : ndarray of shape (n_cells,), optional
        1 (default) for a proper prior on the offset, 0 for a flat one.
    batch_size : int or None
        Rows per batch, rounded up so that matrices with different numbers of rows share a compiled kernel.
        None chooses by the number of genes.
    known : Known or None
        Covariates and log-exposures of the rows; None without any.
    """

    def __init__(self, X, offset, scale, precision=None, *, batch_size=None, known=None):
        self.counts = as_rows(X)
        n, n_genes = self.counts.shape
        precision = np.ones(n) if precision is None else precision
        self.capture = np.stack([offset, scale, precision], 1).astype(float)
        self.known = Known.nothing(n) if known is None else known
        if batch_size is None:
            batch_size = _automatic_batch(n_genes)
        rows = min(batch_size, max(n, 1))
        bucket = min(_ROW_BUCKET, 8 * -(-rows // 8))
        self.rows = -(-rows // bucket) * bucket
        self.starts = range(0, max(n, 1), self.rows)  # without rows, one batch of padding
        self.workers = None  # threads; by default the processors

    def without_capture(self, rows):
        """The rows at these positions with their offset held at 0, in batches of the same shape."""
        other = self._of(rows, rows.size)
        other.counts = self.counts.chosen(rows)
        other.capture = np.tile([0.0, 0.0, 1.0], (rows.size, 1))
        return other

    def _of(self, rows, n):
        """Batches of the same shape of these rows, n in all, to be given their counts."""
        other = copy.copy(self)
        other.counts, other.known = None, self.known.chosen(rows)
        other.capture = self.capture[rows]
        other.starts = range(0, max(n, 1), self.rows)
        return other

    def run(self, operation, *common, of_rows):
        """``operation(batches, *common, of_rows)``; on a cluster of each chunk of rows, where it is.

        An operation returns results of rows, a tree of arrays with a row for each, and sums over the rows.
        The sums of chunks are added in order: where they are computed changes results by rounding only.
        """
        cluster = self.counts.cluster()
        if cluster is None:
            return operation(self, *common, of_rows)
        total, results = None, None
        tasks = (
            ((chunk, rows), (self._of(rows, rows.stop - rows.start), of_rows[rows]))
            for chunk, rows in cluster.chunks
        )
        common = operation, self.counts.missing, common
        for rows, (part, sums) in cluster.in_order(_on_worker, common, tasks):
            if results is None:
                total = sums
                results = jax.tree.map(
                    lambda a: np.empty((self.n_cells, *a.shape[1:]), a.dtype), part
                )
            else:
                total = added(total, sums)
            jax.tree.map(functools.partial(_put, rows), results, part)
        return results, total

    def padded(self, a, value=0.0):
        """The array `a`, padded with `value` to the number of rows of a batch."""
        return np.concatenate([a, np.full((self.rows - a.shape[0], *a.shape[1:]), value, a.dtype)])

    def padded_rank(self, k):
        """Latent dimension of the compiled kernel."""
        return padded_rank(k, *self.counts.shape)

    @property
    def n_cells(self):
        """Number of rows."""
        return self.counts.shape[0]

    def slices(self):
        """The slice of rows of each batch."""
        return [slice(start, min(start + self.rows, self.n_cells)) for start in self.starts]

    def cells(self, rows, dtype=float):
        """The rows of a batch as `Cells` of this precision, whose counts stay on an accelerator."""
        n = rows.stop - rows.start
        offset, scale, precision = self.capture[rows].T
        padded = self.padded(offset), self.padded(scale), self.padded(precision, 1.0)
        design, exposure, weight, _ = self.known.chosen(rows).dense()
        weight = np.ones(n) if weight is None else weight
        known = map(self.padded, (weight, design, exposure))
        of_rows = (a.astype(dtype, copy=False) for a in (*padded, *known))
        return Cells(self._kept_counts(rows, np.dtype(dtype)), *of_rows)

    def _kept_counts(self, rows, dtype):
        """The dense counts of a batch; on an accelerator, where all counts fit, they are put there once."""
        if on_cpu() or math.prod(self.counts.shape) > _MOST_ENTRIES_OF_ACCELERATOR:
            return self._dense(rows, dtype)
        kept, key = self.counts.on_accelerator, (rows.start, self.rows, dtype)
        if key not in kept:
            kept[key] = jax.device_put(self._dense(rows, dtype))
        return kept[key]

    def _dense(self, rows, dtype):
        n = rows.stop - rows.start
        counts = np.zeros((self.rows, self.counts.shape[1]), dtype)
        self.counts.block(rows).astype(dtype, copy=False).toarray(out=counts[:n])
        return counts

    def __iter__(self):
        """Yield (slice of rows, `Cells`)."""
        for rows in self.slices():
            yield rows, self.cells(rows)

    def map(self, function, dtype=float):
        """Iterator of ``function(rows, cells)`` over the batches, in order; several run at the same time."""
        slices = self.slices()
        workers = min(self.workers or n_workers(), len(slices))
        return in_order(lambda rows: function(rows, self.cells(rows, dtype)), slices, workers)

    def solve(self, cells, params, zeta, last_step=LAST_STEP):
        """Solve the cells by :func:`solve_cells`, a block of cells at a time."""
        return solve_cells(cells, params, zeta, last_step, block=self.block(params))

    def block(self, params):
        """Number of rows of a batch that are solved at a time."""
        return _solved_at_once(self.rows, *params.loadings.shape)


@float64
def _on_worker(chunk, common, batches, of_rows):
    """An operation on a chunk of rows, in a thread of a worker; see `RowBatches.run`."""
    operation, missing, common = common
    of_rows = np.array(of_rows)  # what came from elsewhere is read-only
    with tuned_worker():
        counts, _ = canonical(as_csr(chunk), missing)
        batches.counts, batches.workers = CSRRows(counts), 1
        return operation(batches, *common, of_rows)


def _put(rows, whole, part):
    whole[rows] = part


def added(total, part):
    """Add the sums of one batch to the total."""
    return jax.tree.map(np.add, total, part)


def with_padded_rank(params, batches):
    """The parameters with zero columns of loadings up to the latent dimension of the compiled kernel."""
    k = batches.padded_rank(params.loadings.shape[1])
    return params._replace(loadings=pad_columns(params.loadings, k))

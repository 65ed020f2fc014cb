"""Rows of a count matrix in batches: made dense, padded, solved, summed. NumPy in, NumPy out.

Results are converted to NumPy here: a pickled float64 JAX array would be loaded as float32.
"""

import copy
import functools
import math
from typing import NamedTuple

import jax
import numpy as np

from ._blocks import CSRRows, as_csr, as_rows
from ._jax import compiled_once, float64, in_order, n_workers, on_cpu
from ._known import Known
from ._values import canonical
from .solver.ascent import magnitude
from .solver.left_out import LOG_WEIGHTS, NODES, left_out_density
from .solver.marginal import BatchSums, no_sums, score_products, solve_cells
from .solver.mode import LAST_STEP
from .solver.params import Cells, Params

_ROW_BUCKET = 64  # rows of a batch are padded to a multiple of this
_LEAST_ROWS = 64  # minimum of an automatic batch: each batch costs a set of sums for every gene
# Latent dimensions are padded to a multiple of the first. Where there are fewer counts than `FEW_ENTRIES`, of
# the second, 0 too: one kernel then serves independent genes and up to 8 factors, and columns of zeros cost
# less than the two seconds in which another is compiled
_RANK_BUCKET, _RANK_BUCKET_OF_FEW = 4, 8
# on an accelerator, where compiling takes as long as a fit
_RANK_BUCKET_OF_ACCELERATOR = 16
FEW_ENTRIES = 2**20
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
# Accuracy of the modes in a sweep. The error of the objective is less than the square root of the remaining
# Newton decrement; that root may be this share of the fit's tolerance
_MODE_SHARE = 1e-4
# upper bound of the remaining Newton decrement, nats
_LARGEST_LAST_STEP = 1e-6
# the same in single precision, whose rounding it is above
_LAST_STEP_SINGLE = 1e-4
# relative rounding errors of a sum over the cells: a few units in the last place of its terms
_ROUNDING, _ROUNDING_SINGLE = 1e-15, 3e-8

solve_cells, score_products, left_out_density = (
    compiled_once(k) for k in (solve_cells, score_products, left_out_density)
)


def padded_rank(k, entries):
    """Latent dimension of the compiled kernel for a number of counts.

    A zero column of W stays zero in a sweep.
    """
    if not on_cpu():
        return -(-max(k, 1) // _RANK_BUCKET_OF_ACCELERATOR) * _RANK_BUCKET_OF_ACCELERATOR
    if entries < FEW_ENTRIES:
        return -(-max(k, 1) // _RANK_BUCKET_OF_FEW) * _RANK_BUCKET_OF_FEW
    return -(-k // _RANK_BUCKET) * _RANK_BUCKET


def in_single(n_cells, n_genes):
    """Whether what need not be accurate is computed in single precision.

    That pays where a pass over many counts waits for memory. On an accelerator compiling it takes longer.
    """
    return on_cpu() and n_cells * n_genes > FEW_ENTRIES


def pad_columns(a, k):
    """Append zero columns to `a` until it has `k`."""
    return np.concatenate([a, np.zeros((a.shape[0], k - a.shape[1]))], 1)


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
                total = _added(total, sums)
            jax.tree.map(functools.partial(_put, rows), results, part)
        return results, total

    def padded(self, a, value=0.0):
        """The array `a`, padded with `value` to the number of rows of a batch."""
        return np.concatenate([a, np.full((self.rows - a.shape[0], *a.shape[1:]), value, a.dtype)])

    def padded_rank(self, k):
        """Latent dimension of the compiled kernel."""
        return padded_rank(k, math.prod(self.counts.shape))

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
        block = _solved_at_once(self.rows, *params.loadings.shape)
        return solve_cells(cells, params, zeta, last_step, block=block)


@float64
def _on_worker(chunk, common, batches, of_rows):
    """An operation on a chunk of rows, in a thread of a worker; see `RowBatches.run`."""
    operation, missing, common = common
    counts, _ = canonical(as_csr(chunk), missing)
    batches.counts, batches.workers = CSRRows(counts), 1
    return operation(batches, *common, np.array(of_rows))  # what came from elsewhere is read-only


def _put(rows, whole, part):
    whole[rows] = part


class RowPosterior(NamedTuple):
    """Gaussian posterior of the scores and the capture offset of each row, given the parameters."""

    log_marginal: np.ndarray  # (n_rows,) log-likelihood, without the constants of the counts
    scores: np.ndarray  # (n_rows, k), standardized: their prior is standard normal
    score_covariance: np.ndarray  # (n_rows, k, k)
    offset: np.ndarray  # (n_rows,) mode before truncation at 0
    offset_variance: np.ndarray  # (n_rows,)
    score_offset_covariance: np.ndarray  # (n_rows, k)
    offset_slope: np.ndarray  # (n_rows,) d log_marginal / d offset, with the mode fixed
    offset_curvature: np.ndarray  # (n_rows,) -d^2 log_marginal / d offset^2, curvature fixed
    converged: np.ndarray  # (n_rows,)
    decrement: np.ndarray  # (n_rows,) Newton decrement, nats

    @property
    def offset_scale(self):
        """Standard deviations of the offsets, (n_rows,)."""
        return np.sqrt(self.offset_variance)

    @classmethod
    def empty(cls, n, k):
        """Uninitialized arrays for n rows and k factors, to be written by :meth:`fill`."""
        shapes = ((), (k,), (k, k), (), (), (k,), (), (), (), ())
        kinds = [bool if name == "converged" else float for name in cls._fields]
        return cls(*(np.empty((n, *s), kind) for s, kind in zip(shapes, kinds, strict=True)))

    def fill(self, rows, cells, results):
        """Write the `CellResults` of a batch to its rows."""
        k, covariance = self.scores.shape[1], results.covariance
        offset, scale = np.asarray(cells.offset), np.asarray(cells.scale)
        parts = (
            results.log_marginal,
            results.zeta[:, :k],
            covariance[:, :k, :k],
            offset - scale * results.zeta[:, -1],
            scale**2 * covariance[:, -1, -1],
            -scale[:, None] * covariance[:, :k, -1],
            results.offset_slope,
            results.offset_curvature,
            results.converged,
            results.decrement,
        )
        for whole, part in zip(self, parts, strict=True):
            whole[rows] = part[: rows.stop - rows.start]


def _added(total, part):
    """Add the sums of one batch to the total."""
    return jax.tree.map(np.add, total, part)


def with_padded_rank(params, batches):
    """The parameters with zero columns of loadings up to the latent dimension of the compiled kernel."""
    k = batches.padded_rank(params.loadings.shape[1])
    return params._replace(loadings=pad_columns(params.loadings, k))


@float64
def solve_rows(batches, params, start=None):
    """Solve every row given the parameters; ``start`` has start values of the scores, from a sweep.

    Returns
    -------
    RowPosterior
    """
    k, wide = params.loadings.shape[1], with_padded_rank(params, batches)
    if start is None:
        start = np.zeros((batches.n_cells, wide.loadings.shape[1] + 1))
    return batches.run(_solve_rows, wide, k, of_rows=start)[0]


def _solve_rows(batches, wide, k, start):
    on_device = jax.device_put(wide)

    def solved(rows, cells):
        results = batches.solve(cells, on_device, batches.padded(start[rows]))[1]
        return rows, cells, jax.device_get(results)

    out = RowPosterior.empty(batches.n_cells, k)
    for part in batches.map(solved):
        out.fill(*part)
    return out, None


@float64
def gene_score_products(batches, params, start, free_dispersion):
    """Outer products of each gene's gradients in (mu, b, w, log d, log r), ``sum_c b``, the rows' posterior.

    Shapes are (n_genes, p + k + 3, p + k + 3) and (n_genes,); the posterior is a `RowPosterior`. If log r is
    not free, its gradients omit the part that does not depend on the log-rates.
    """
    k, wide = params.loadings.shape[1], with_padded_rank(params, batches)
    solved, sums = batches.run(_score_products, wide, k, free_dispersion, of_rows=start)
    return *sums, solved


def _score_products(batches, wide, k, free_dispersion, start):
    p, k_padded = wide.coef.shape[1], wide.loadings.shape[1]
    params, free = jax.device_put((wide, np.bool_(free_dispersion)))

    def products(rows, cells):
        on_device = jax.device_put(cells)
        alpha, results, _ = batches.solve(on_device, params, batches.padded(start[rows]))
        gene_sums = score_products(on_device, params, alpha, results, free)
        return rows, cells, *jax.device_get((results, gene_sums))

    total, solved = None, RowPosterior.empty(batches.n_cells, k)
    for *batch, part in batches.map(products):
        total = part if total is None else _added(total, part)
        solved.fill(*batch)
    keep = np.r_[0 : p + k + 1, p + k_padded + 1, p + k_padded + 2]
    return solved, (total[0][:, keep][:, :, keep], total[1])


@float64
def left_out_densities(batches, params):
    """``sum_c w_c log p(u_cg | the other counts of c)``, (n_genes,), without the constants of the counts."""
    wide = with_padded_rank(params, batches)
    start = np.zeros((batches.n_cells, wide.loadings.shape[1] + 1))
    return batches.run(_left_out_densities, wide, of_rows=start)[1]


def _left_out_densities(batches, wide, start):
    params, nodes, log_weights = jax.device_put((wide, NODES, LOG_WEIGHTS))

    def density(rows, cells):
        on_device = jax.device_put(cells)
        alpha, results, _ = batches.solve(on_device, params, batches.padded(start[rows]))
        of_rows = results.zeta, alpha, results.covariance
        return np.asarray(left_out_density(on_device, params, *of_rows, nodes, log_weights))

    return None, functools.reduce(np.add, batches.map(density))


def sum_over_batches(batches, params, dtype=float):
    """A function that returns the sum of ``function(cells, params, *args)`` over the batches.

    The function is computed in this precision, and its results are added up in double.
    """

    def cast(args):
        return jax.tree.map(lambda a: a.astype(dtype, copy=False), args)

    @float64
    def summed(function, *args):
        kernel, on_device = compiled_once(function), jax.device_put(cast((params, *args)))

        def part(rows, cells):
            return jax.tree.map(lambda a: np.asarray(a, float), kernel(cells, *on_device))

        return functools.reduce(_added, batches.map(part, dtype))

    return summed


class Sweeper:
    """Run sweeps over the batches; each row's scores are the start values of the next sweep.

    Parameters
    ----------
    batches : RowBatches
        Rows of the counts.
    k : int
        Latent dimension.
    tol : float, default=0.0
        Relative tolerance of the fit. The modes of the rows are solved so accurately that the error of the
        objective is far below it; 0 solves them to rounding.
    single : bool, default=False
        Begin in single precision, in half of the time, until `refine` is called.

    Attributes
    ----------
    scores : ndarray of shape (n_cells, padded k + 1)
        Modes of the last sweep: scores, and the standardized deviation of the offset from its prior.
    """

    def __init__(self, batches, k, tol=0.0, single=False):
        self.batches, self.tol, self._single = batches, tol, single
        self.scores = np.zeros((batches.n_cells, batches.padded_rank(k) + 1))
        self._last_step = LAST_STEP

    @property
    def rounding(self):
        """Relative rounding error of the log-marginal."""
        return _ROUNDING_SINGLE if self._single else _ROUNDING

    def refine(self):
        """Sweep in double precision from now on; whether it was single before."""
        was, self._single = self._single, False
        return was

    def rotate(self, rotation):
        """Rotate the scores by that of the loadings, (k, k); one with fewer columns drops the others."""
        k, kept = rotation.shape
        scores = pad_columns(self.scores[:, :k] @ rotation, self.batches.padded_rank(kept))
        self.scores = np.concatenate([scores, self.scores[:, -1:]], 1)

    @float64
    def __call__(self, params):
        """One pass over all rows: `BatchSums` of NumPy arrays for the unpadded latent dimension."""
        wide = with_padded_rank(params, self.batches)
        last_step = self._last_step
        if self._single:
            last_step = max(last_step, _LAST_STEP_SINGLE)
            with np.errstate(over="ignore"):  # what overflows in single precision is found below
                wide = Params(*(a.astype(np.float32) for a in wide))
        self.scores, total = self.batches.run(_sweep, wide, last_step, of_rows=self.scores)
        # the first sweep, before which the magnitude is unknown, is solved to rounding
        size = magnitude(float(total.log_marginal), max(self.batches.known.total_weight, 1))
        if not np.isfinite(size) and not np.any(self.scores) and self.refine():
            return self(params)  # the start overflows in single precision
        if np.isfinite(size):
            self._last_step = min(
                max(LAST_STEP, (_MODE_SHARE * self.tol * size) ** 2), _LARGEST_LAST_STEP
            )
        return _unpad(total, params.loadings.shape[1])


def _sweep(batches, params, last_step, scores):
    """The modes of the rows, written to their start values, and the sums of a pass over them."""
    on_device, dtype = jax.device_put(params), params.loadings.dtype

    def solved(rows, cells):
        start = batches.padded(scores[rows].astype(dtype, copy=False))
        _, results, sums = batches.solve(cells, on_device, start, last_step)
        mode = np.asarray(results.zeta)[: rows.stop - rows.start]
        # trial parameters may overflow; the next sweep starts from the last finite scores
        is_finite = np.isfinite(mode).all(axis=1)
        scores[rows][is_finite] = mode[is_finite]
        return jax.device_get(sums)

    total = no_sums(*params.loadings.shape, params.coef.shape[1])
    for sums in batches.map(solved, dtype):
        total = _added(total, sums)
    return scores, total


def _unpad(sums: BatchSums, k: int) -> BatchSums:
    """The sums without the padding of the latent dimension."""
    genes = sums.genes
    p, padded = genes.gradient_coef.shape[1], genes.gradient_loadings.shape[1]
    i, j = np.triu_indices(p + padded)
    n = p + k
    keep = np.r_[True, np.arange(p + padded) < n, (i < n) & (j < n)]
    return sums._replace(
        genes=genes._replace(
            gradient_loadings=genes.gradient_loadings[:, :k], moments=genes.moments[:, keep]
        )
    )

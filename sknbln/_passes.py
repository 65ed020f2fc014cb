"""Passes over all rows: their posterior, sweeps of a fit, sums for standard errors. NumPy in, NumPy out.

Results are converted to NumPy here: a pickled float64 JAX array would be loaded as float32.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np

from ._jax import compiled_once, float64
from ._rows import added, pad_columns, with_padded_rank
from .solver.ascent import magnitude
from .solver.left_out import LOG_WEIGHTS, NODES, left_out_density
from .solver.marginal import BatchSums, no_sums, score_products
from .solver.mode import LAST_STEP
from .solver.params import Params

# Accuracy of the modes in a sweep. The error of the objective is less than the square root of the remaining
# Newton decrement; that root may be this share of the fit's tolerance
_MODE_SHARE = 1e-4
# upper bound of the remaining Newton decrement, nats
_LARGEST_LAST_STEP = 1e-6
# the same in single precision, whose rounding it is above
_LAST_STEP_SINGLE = 1e-4
# relative rounding errors of a sum over the cells: a few units in the last place of its terms
_ROUNDING, _ROUNDING_SINGLE = 1e-15, 3e-8

score_products, left_out_density = (compiled_once(k) for k in (score_products, left_out_density))


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
    offset_pull: np.ndarray  # (n_rows,) added to the slope by the genes' own integrals
    converged: np.ndarray  # (n_rows,)
    decrement: np.ndarray  # (n_rows,) Newton decrement, nats

    @property
    def offset_scale(self):
        """Standard deviations of the offsets, (n_rows,)."""
        return np.sqrt(self.offset_variance)

    @classmethod
    def empty(cls, n, k):
        """Uninitialized arrays for n rows and k factors, to be written by :meth:`fill`."""
        shapes = ((), (k,), (k, k), (), (), (k,), (), (), (), (), ())
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
            results.offset_pull,
            results.converged,
            results.decrement,
        )
        for whole, part in zip(self, parts, strict=True):
            whole[rows] = part[: rows.stop - rows.start]


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
        block = batches.block(params)
        gene_sums = score_products(on_device, params, alpha, results, free, block=block)
        return rows, cells, *jax.device_get((results, gene_sums))

    total, solved = None, RowPosterior.empty(batches.n_cells, k)
    for *batch, part in batches.map(products):
        total = part if total is None else added(total, part)
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

        return functools.reduce(added, batches.map(part, dtype))

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
        total = added(total, sums)
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

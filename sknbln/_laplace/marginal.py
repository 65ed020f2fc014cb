r"""Laplace marginal likelihood of cells, its exact gradient, and the sums that update the globals.

.. math:: \log p(u_c) \approx \sum_g \log p(u \mid y^*) - \tfrac12 (\zeta' P \zeta + \alpha' D \alpha)
          - \tfrac12 (\textstyle\sum_g \log(1 + d_g a_g) + \log\det M)

The mode moves with the globals, and the curvature at the mode with it. Differentiating the marginal
after one live Newton step from the mode gives that implicit term exactly; here it is written out.
With the posterior covariance ``V = (Sigma^{-1} + A)^{-1}``, ``h = -diag(V) a' / 2`` (a' the third
derivative), ``q = V h`` and ``beta = Sigma^{-1} q``:

* location: ``alpha + beta``
* covariance: ``(alpha alpha' - K)/2 + sym(alpha beta')``, with ``K = (A^{-1} + Sigma)^{-1}``
* ``log r``: partial derivative ``- diag(V) (da/dlog r)/2 + q (dg/dlog r)``

All are low-rank algebra with the Cholesky factor that the Newton step has made already. The twin
that lets JAX differentiate through the live step is in ``tests/reference``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import lowrank
from .likelihood import dispersion_terms, log_likelihood_terms, third_derivative
from .mode import Globals, find_mode, lift, linearization_at

GENE_BLOCK = 64


class CellResults(NamedTuple):
    """What the solver says of each cell of a batch."""

    log_marginal: jnp.ndarray  # (n_cells,) without the y-free constants
    zeta: jnp.ndarray  # (n_cells, k + 1) posterior mean of scores and capture deviation
    covariance: jnp.ndarray  # (n_cells, k + 1, k + 1) their posterior covariance
    offset_slope: jnp.ndarray  # (n_cells,) d log_marginal / d offset, mode held
    offset_curvature: jnp.ndarray  # (n_cells,) -d^2 log_marginal / d offset^2, curvature held
    decrement: jnp.ndarray  # (n_cells,)
    converged: jnp.ndarray  # (n_cells,)
    n_newton: jnp.ndarray  # ()


class GeneSums(NamedTuple):
    """Sums over cells, one row per gene. They add up over batches, devices and machines."""

    gradient_mean: jnp.ndarray  # (n_genes,)
    gradient_loadings: jnp.ndarray  # (n_genes, k)
    gradient_noise: jnp.ndarray  # (n_genes,) in d
    gradient_log_r: jnp.ndarray  # (n_genes,) without the constant's part
    moments: jnp.ndarray  # (n_genes, T) sum_c b [1 z][1 z]', packed upper triangle
    information_noise: jnp.ndarray  # (n_genes,) sum_c K_gg^2 / 2 + K_gg / 4
    information_log_r: jnp.ndarray  # (n_genes,) at fixed y, without the constant's part
    missing_log_r: jnp.ndarray  # (n_genes,) how much of it is lost because y is not known


class BatchSums(NamedTuple):
    """Sums over a batch of cells."""

    log_marginal: jnp.ndarray  # ()
    n_unconverged: jnp.ndarray  # ()
    information_shift: jnp.ndarray  # () sum_c 1' K_c 1, of a common shift of the log-rates
    genes: GeneSums


def _log_marginal(cells, params, mode, lin):
    d = params.noise[None, :]
    likelihood = log_likelihood_terms(cells.counts, mode.y, lin.terms)
    genes = lowrank.row_sums(likelihood - 0.5 * d * mode.alpha**2)
    prior = jnp.sum(lin.prior_precision * mode.zeta**2, 1)
    return genes - 0.5 * (prior + lowrank.sum_of_logs(lin.den) + lowrank.log_det(lin.L))


def _offset_curvature(params, lin):
    """``1' K_c 1``, shape (n_cells,)."""
    pull = (lin.b @ lowrank.with_capture(params.loadings)) * lin.scales
    return lowrank.row_sums(lin.b) - jnp.sum(pull * lowrank.solve(lin.L, pull), 1)


def _cell_results(cells, params, mode, lin):
    return CellResults(
        _log_marginal(cells, params, mode, lin),
        mode.zeta,
        lowrank.inverse(lin.L),
        -lowrank.row_sums(mode.alpha),
        _offset_curvature(params, lin),
        mode.decrement,
        mode.converged,
        mode.n_iter,
    )


@jax.jit
def solve_cells(cells, params, zeta, before):
    """Mode, scores and Laplace marginal of each cell of a batch, and sums over the cells.

    One kernel for fits and for new rows: the sums cost a quarter of it, and another kernel would have to
    be compiled.

    Parameters
    ----------
    cells : Cells
    params : Globals
    zeta : array of shape (n_cells, k + 1)
        Scores from which the modes are looked for.
    before : BatchSums
        Of other cells, to which the sums over these are added.

    Returns
    -------
    mode : Mode
        At which the other kernels work.
    results : CellResults
    sums : BatchSums
    """
    mode = find_mode(cells, params, zeta)
    lin = linearization_at(cells, params, mode)
    results = _cell_results(cells, params, mode, lin)
    live = cells.weight > 0
    sums = BatchSums(
        jnp.sum(cells.weight * results.log_marginal),
        jnp.sum(jnp.where(live & ~mode.converged, 1, 0)),
        jnp.sum(cells.weight * results.offset_curvature),
        _gene_sums(cells, params, mode, lin, results.covariance),
    )
    return mode, results, jax.tree.map(jnp.add, before, sums)


def no_sums(n_genes, k):
    """Zero :class:`BatchSums`, on the host."""
    genes, T = np.zeros(n_genes), (k + 1) * (k + 2) // 2
    return BatchSums(
        np.zeros(()),
        np.zeros((), np.int64),
        np.zeros(()),
        GeneSums(
            genes, np.zeros((n_genes, k)), genes, genes, np.zeros((n_genes, T)), genes, genes, genes
        ),
    )


def rotated(genes, rotation):
    """`GeneSums` in the coordinates of loadings that are rotated, on the host."""
    k = rotation.shape[0]
    i, j, back = lowrank.triangle(k)
    zz = rotation.T @ genes.moments[:, 1 + k :][:, back] @ rotation
    moments = [genes.moments[:, :1], genes.moments[:, 1 : 1 + k] @ rotation, zz[:, i, j]]
    return genes._replace(
        gradient_loadings=genes.gradient_loadings @ rotation, moments=np.concatenate(moments, 1)
    )


class _GeneScores(NamedTuple):
    """Exact gradient of each cell's marginal in the parameters of each gene, (n_cells, n_genes)."""

    mean: jnp.ndarray
    noise: jnp.ndarray  # in d
    log_r: jnp.ndarray  # without the constant's part
    information_log_r: jnp.ndarray  # at fixed y, without the constant's part
    missing_log_r: jnp.ndarray  # how much of it is lost because y is not known
    K: jnp.ndarray  # diagonal of (A^{-1} + Sigma)^{-1}
    beta: jnp.ndarray
    xi: jnp.ndarray  # (n_cells, k + 1)


def _gene_scores(cells, params, mode, lin, covariance):
    d, phi = params.noise[None, :], params.phi[None, :]
    F = lowrank.with_capture(params.loadings)
    terms, den, b = lin.terms, lin.den, lin.b

    scaled = covariance * lin.scales[:, :, None] * lin.scales[:, None, :]
    spread = lowrank.quadratic_diagonal(scaled, lowrank.pair_products(F))  # diag F C F'
    variance = d / den + spread / den**2  # diag V
    K = b - b**2 * spread

    # the implicit term
    h = -0.5 * variance * third_derivative(terms)
    x = h / den
    xi = lowrank.solve(lin.L, (x @ F) * lin.scales)
    lifted = lift(params, lin.scales, xi)
    beta = x - b * lifted
    q = d * x + lifted / den

    alpha = mode.alpha
    dispersion = dispersion_terms(cells.counts, phi, terms)
    return _GeneScores(
        alpha + beta,
        0.5 * (alpha**2 - K) + alpha * beta,
        dispersion.score - 0.5 * variance * dispersion.d_curvature + q * dispersion.d_gradient,
        -dispersion.second,
        variance * dispersion.d_gradient**2,
        K,
        beta,
        xi,
    )


def _gene_sums(cells, params, mode, lin, covariance):
    k = params.loadings.shape[1]
    weight = cells.weight[:, None]
    scores = _gene_scores(cells, params, mode, lin, covariance)
    alpha, zeta = mode.alpha, mode.zeta
    z = zeta[:, :k]

    v = alpha + lin.b * lift(params, lin.scales, zeta)  # the working response times b

    # Loadings: (alpha alpha' - K + beta alpha' + alpha beta') F without a cells x genes x k array.
    # F' alpha = P zeta and F' beta = P xi; alpha zeta' - K F = v zeta' - b F E[zeta zeta'].
    second = zeta[:, :, None] * zeta[:, None, :] + covariance
    with_capture = lin.scales[:, k][:, None] * second[:, k, :k]  # (n_cells, k)
    i, j, back = lowrank.triangle(k)
    features = jnp.concatenate([jnp.ones_like(zeta[:, :1]), z, second[:, i, j], with_capture], 1)
    sums = (weight * lin.b).T @ features
    moments, capture_part = sums[:, : 1 + k + i.size], sums[:, 1 + k + i.size :]
    zz = moments[:, 1 + k :][:, back]  # (n_genes, k, k)
    gradient_loadings = (
        (weight * (v + scores.beta)).T @ z
        + (weight * alpha).T @ scores.xi[:, :k]
        - jnp.sum(zz * params.loadings[:, None, :], 2)
        - capture_part
    )
    return GeneSums(
        cells.weight @ scores.mean,
        gradient_loadings,
        cells.weight @ scores.noise,
        cells.weight @ scores.log_r,
        moments,
        # variance of the score of d: of Gaussian responses, and a quarter of a count's fourth cumulant
        cells.weight @ (0.5 * scores.K**2 + 0.25 * scores.K),
        cells.weight @ scores.information_log_r,
        cells.weight @ scores.missing_log_r,
    )


def _gene_blocks(a):
    """Rows of ``a``, one a gene, filled up with zeros: (n_blocks, GENE_BLOCK, ...)."""
    short = -a.shape[0] % GENE_BLOCK
    return jnp.pad(a, ((0, short), (0, 0))).reshape(-1, GENE_BLOCK, a.shape[1])


@jax.jit
def score_products(cells, params, mode, results, constant_scores):
    """Sums over cells of outer products of each gene's scores in (mu, w_1..w_k, log d, log r).

    ``constant_scores`` (n_cells, n_genes) is the y-free constant's derivative in log r. Returns the products,
    (n_genes, k + 3, k + 3), and ``sum_c b``, (n_genes,).
    """
    n_genes, k = params.loadings.shape
    zeta, alpha, lin = mode.zeta, mode.alpha, linearization_at(cells, params, mode)
    scores = _gene_scores(cells, params, mode, lin, results.covariance)
    second = zeta[:, :, None] * zeta[:, None, :] + results.covariance
    second = (second[:, :k, :] * lin.scales[:, None, :]).reshape(-1, k + 1)
    z, xi = zeta[:, :k, None], scores.xi[:, :k, None]
    v = alpha + lin.b * lift(params, lin.scales, zeta)

    def products(block):
        mean, v_beta, own, b, noise, log_r, F = block
        regression = (second @ F.T).reshape(-1, k, F.shape[0])
        loadings = v_beta[:, None, :] * z + own[:, None, :] * xi - b[:, None, :] * regression
        others = mean[:, None, :], noise[:, None, :], log_r[:, None, :]
        stacked = jnp.concatenate([others[0], loadings, *others[1:]], 1)
        # the barrier keeps XLA from contracting the strided axis in place, which is twice as slow
        by_gene = jax.lax.optimization_barrier(jnp.transpose(stacked, (2, 1, 0)))
        return by_gene @ jnp.swapaxes(by_gene, 1, 2)

    parts = (
        scores.mean,
        v + scores.beta,
        alpha,
        lin.b,
        params.noise[None, :] * scores.noise,
        scores.log_r + constant_scores,
    )
    # a block of genes at a time: what it needs stays in the processor's caches
    weight = cells.weight[:, None]
    blocks = [_gene_blocks((weight * a).T).swapaxes(1, 2) for a in parts]
    F = _gene_blocks(lowrank.with_capture(params.loadings))
    products = jax.lax.map(products, (*blocks, F)).reshape(-1, k + 3, k + 3)[:n_genes]
    return products, jnp.sum(weight * lin.b, 0)


__all__ = [
    "BatchSums",
    "CellResults",
    "GeneSums",
    "Globals",
    "no_sums",
    "score_products",
    "solve_cells",
]

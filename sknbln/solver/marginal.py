r"""Laplace marginal likelihood of cells, its exact gradient, and the sums over cells for the global steps.

.. math:: \log p(u_c) \approx \sum_g \log p(u \mid y^*) - \tfrac12 (\zeta' P \zeta + \alpha' D \alpha)
          - \tfrac12 (\textstyle\sum_g \log(1 + d_g a_g) + \log\det M) + \epsilon

with part of the next term of the expansion, ``epsilon`` (`second_order`). The mode moves with the global
parameters, and the curvature at the mode with it. That implicit term of the gradient is written here. With
the posterior covariance ``V = (Sigma^{-1} + A)^{-1}``, ``h = -diag(V) a' / 2 + depsilon/dy`` (a' the third
derivative), ``q = V h`` and ``beta = Sigma^{-1} q``:

* location: ``alpha + beta``
* covariance: ``(alpha alpha' - K)/2 + sym(alpha beta')``, with ``K = (A^{-1} + Sigma)^{-1}``, and epsilon's
* ``log r``: partial derivative ``- diag(V) (da/dlog r)/2 + q (dg/dlog r) + depsilon/dlog r``

All are low-rank algebra with the Cholesky factor of the last Newton step. In ``tests/reference`` JAX
differentiates through one Newton step from the mode, which gives the same gradient.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import lowrank
from .channel import (
    dispersion_terms,
    log_likelihood_terms,
    log_odds_terms,
    log_rising_slope,
    third_derivative,
)
from .mode import LAST_STEP, find_mode, linearization_at, linearize, log_rates
from .second_order import second_order

GENE_BLOCK = 64  # genes at a time in `score_products`


class CellResults(NamedTuple):
    """Results for each cell of a batch."""

    log_marginal: jnp.ndarray  # (n_cells,) without the constants, which do not depend on y
    zeta: jnp.ndarray  # (n_cells, k + 1) posterior mean of scores and capture deviation
    covariance: jnp.ndarray  # (n_cells, k + 1, k + 1) their posterior covariance
    offset_slope: jnp.ndarray  # (n_cells,) d log_marginal / d offset at fixed mode
    offset_curvature: jnp.ndarray  # (n_cells,) -d^2 log_marginal / d offset^2 at fixed curvature
    offset_pull: jnp.ndarray  # (n_cells,) what the genes' integrals add to the slope
    decrement: jnp.ndarray  # (n_cells,)
    converged: jnp.ndarray  # (n_cells,)
    n_newton: jnp.ndarray  # ()


class GeneSums(NamedTuple):
    """Sums over cells, one row per gene; those of batches add up."""

    gradient_mean: jnp.ndarray  # (n_genes,)
    gradient_loadings: jnp.ndarray  # (n_genes, k)
    gradient_noise: jnp.ndarray  # (n_genes,) in d
    gradient_log_r: jnp.ndarray  # (n_genes,) without that of the constants
    gradient_coef: jnp.ndarray  # (n_genes, p)
    #: (n_genes, T) sum_c b [1 c z][1 c z]', c the covariates, packed upper triangle
    moments: jnp.ndarray
    information_noise: jnp.ndarray  # (n_genes,) sum_c K_gg^2 / 2 + K_gg / 4
    information_log_r: jnp.ndarray  # (n_genes,) at fixed y, without that of the constants
    missing_log_r: jnp.ndarray  # (n_genes,) the part of it that is lost because y is not observed


#: sums that are one matrix product over all cells of a batch, not added up block by block
_OF_THE_WHOLE_BATCH = dict(gradient_loadings=None, moments=None)


class BatchSums(NamedTuple):
    """Sums over a batch of cells."""

    log_marginal: jnp.ndarray  # ()
    n_unconverged: jnp.ndarray  # () number of cells
    information_shift: jnp.ndarray  # () sum_c 1' K_c 1, of a common shift of the log-rates
    information_coef_shift: jnp.ndarray  # (p, p) sum_c 1' K_c 1 c c', of one of the coefficients
    genes: GeneSums


def _beyond(cells, params, factors, lin):
    return second_order(
        cells.counts, params.dispersion[None, :], params.noise[None, :], factors, lin
    )


def _log_marginal(cells, params, mode, lin, logs):
    """That of Laplace's method, without the next term."""
    likelihood = log_likelihood_terms(cells.counts, mode.y, logs)
    genes = lowrank.row_sums(likelihood - 0.5 * params.noise[None, :] * mode.alpha**2)
    prior = jnp.sum(lin.prior_precision * mode.zeta**2, 1)
    return genes - 0.5 * (prior + lowrank.sum_of_logs(lin.den) + lowrank.log_det(lin.L))


def _offset_curvature(factors, lin):
    """``1' K_c 1``, shape (n_cells,)."""
    pull = factors.project(lin.b) * lin.scales
    return lowrank.row_sums(lin.b) - jnp.sum(pull * lowrank.solve(lin.L, pull), 1)


def _cell_results(cells, params, factors, mode, lin, logs, beyond):
    return CellResults(
        _log_marginal(cells, params, mode, lin, logs) + beyond.value,
        mode.zeta,
        lowrank.inverse(lin.L),
        -lowrank.row_sums(mode.alpha),
        _offset_curvature(factors, lin),
        -lowrank.row_sums(beyond.beta),
        mode.decrement,
        mode.converged,
        mode.n_iter,
    )


@partial(jax.jit, static_argnames="block")
def solve_cells(cells, params, zeta, last_step=LAST_STEP, *, block=None):
    """Mode, scores and Laplace marginal of each cell of a batch, and sums over the cells.

    Fits and new rows share this one kernel. The sums are about half of its work, but a kernel without them
    would take seconds more to compile for each number of genes.

    The precision is that of the arrays. In single precision sums over blocks are added up in double.

    Parameters
    ----------
    cells : Cells
    params : Params
        In the model's own units.
    zeta : array of shape (n_cells, k + 1)
        Scores from which the Newton iteration starts.
    last_step : float
        Tolerance of the Newton decrement, nats.
    block : int or None
        Number of cells solved at a time, a divisor of n_cells, so that intermediate results stay in the
        processor's cache. None solves all cells together.

    Returns
    -------
    alpha : array of shape (n_cells, n_genes)
        Gradient of the likelihood at the modes, which with the scores gives the log-rates; 0 for padding.
    results : CellResults
    sums : BatchSums
    """
    n_cells, (n_genes, k) = zeta.shape[0], params.loadings.shape
    block = n_cells if block is None else block
    factors = lowrank.Factors.of(params.loadings)
    n_blocks = n_cells // block
    blocks = jax.tree.map(lambda a: a.reshape(n_blocks, block, *a.shape[1:]), (cells, zeta))

    def solve(sums, part):
        own, *by_cell = _solve_block(part[0], params, factors, part[1], last_step)
        own = jax.tree.map(lambda a, total: a.astype(total.dtype), own, sums)
        return jax.tree.map(jnp.add, sums, own), by_cell

    nothing = jax.tree.map(jnp.asarray, no_sums(n_genes, k, cells.design.shape[1]))
    nothing = nothing._replace(genes=nothing.genes._replace(**_OF_THE_WHOLE_BATCH))
    sums, by_cell = jax.lax.scan(solve, nothing, blocks)
    results, regression = jax.tree.map(
        lambda a: a.reshape(n_cells, *a.shape[2:]) if a.ndim > 1 else a.max(), by_cell
    )
    gradient, moments = _regression_sums(params, cells.design, **regression)
    genes = sums.genes._replace(gradient_loadings=gradient, moments=moments)
    return regression["alpha"], results, sums._replace(genes=genes)


def _solve_block(cells, params, factors, zeta, last_step):
    mode = find_mode(cells, params, zeta, last_step, factors)
    lin = linearization_at(cells, params, mode)
    logs = log_odds_terms(params.dispersion[None, :], lin.terms)
    beyond = _beyond(cells, params, factors, lin)
    results = _cell_results(cells, params, factors, mode, lin, logs, beyond)
    live = cells.weight > 0
    covariance = results.covariance
    genes, regression = _gene_sums(cells, params, factors, mode, lin, logs, beyond, covariance)
    sums = BatchSums(
        jnp.sum(cells.weight * results.log_marginal),
        jnp.sum(jnp.where(live & ~mode.converged, 1, 0)),
        jnp.sum(cells.weight * results.offset_curvature),
        (cells.weight * results.offset_curvature)[None, :] * cells.design.T @ cells.design,
        genes,
    )
    return sums, results, regression


def no_sums(n_genes, k, p=0):
    """Zero :class:`BatchSums` of k factors and p covariates, on the host."""
    T = (p + k + 1) * (p + k + 2) // 2
    genes = GeneSums(*[np.zeros(n_genes)] * len(GeneSums._fields))._replace(
        gradient_loadings=np.zeros((n_genes, k)),
        gradient_coef=np.zeros((n_genes, p)),
        moments=np.zeros((n_genes, T)),
    )
    return BatchSums(np.zeros(()), np.zeros((), np.int64), np.zeros(()), np.zeros((p, p)), genes)


def rotated(genes, rotation):
    """`GeneSums` after a rotation (k, k) of the loadings, on the host."""
    gradient = genes.gradient_loadings @ rotation
    p, k = genes.gradient_coef.shape[1], rotation.shape[0]
    if p:  # the covariates stay as they are
        whole = np.eye(p + k)
        whole[p:, p:] = rotation
        rotation, k = whole, p + k
    i, j, back = lowrank.triangle(k)
    zz = rotation.T @ genes.moments[:, 1 + k :][:, back] @ rotation
    moments = [genes.moments[:, :1], genes.moments[:, 1 : 1 + k] @ rotation, zz[:, i, j]]
    return genes._replace(gradient_loadings=gradient, moments=np.concatenate(moments, 1))


def variances(params, factors, lin, covariance):
    """``diag(F C F')`` and the posterior variances of the log-rates, ``diag(V)``, (n_cells, n_genes) each."""
    scaled = covariance * lin.scales[:, :, None] * lin.scales[:, None, :]
    spread = factors.quadratic_diagonal(scaled)
    return spread, params.noise[None, :] * lin.rest + spread * lin.rest**2


def _gene_scores(cells, params, factors, alpha, lin, logs, beyond, covariance):
    """The terms of `GeneSums`, each (n_cells, n_genes), and ``beta`` and ``xi``.

    The gradients are exact, of each cell's marginal in each gene's mean, d and log r. Of ``F' beta = P xi``,
    beta is (n_cells, n_genes) and xi (n_cells, k + 1).
    """
    d, phi = params.noise[None, :], params.dispersion[None, :]
    terms, rest, b = lin.terms, lin.rest, lin.b

    spread, variance = variances(params, factors, lin, covariance)
    K = b - b**2 * spread

    # the implicit term
    h = -0.5 * variance * third_derivative(terms) + beyond.in_log_rate
    x = h * rest
    xi = lowrank.solve(lin.L, factors.project(x) * lin.scales)
    lifted = factors.lift(xi * lin.scales)
    beta = x - b * lifted
    q = d * x + lifted * rest

    score, second, d_gradient, d_curvature = dispersion_terms(cells.counts, phi, terms, logs)
    terms = GeneSums(
        gradient_mean=alpha + beta,
        gradient_noise=0.5 * (alpha**2 - K) + alpha * beta + beyond.in_noise,
        gradient_log_r=score - 0.5 * variance * d_curvature + q * d_gradient + beyond.in_log_r,
        # variance of the score of d: of Gaussian responses, and a quarter of a count's fourth cumulant
        information_noise=0.5 * K**2 + 0.25 * K,
        information_log_r=-second,
        missing_log_r=variance * d_gradient**2,
        gradient_coef=None,
        **_OF_THE_WHOLE_BATCH,
    )
    return terms, beta, xi


def _gene_sums(cells, params, factors, mode, lin, logs, beyond, covariance):
    """`GeneSums` but for those of the whole batch, and the arguments of `_regression_sums` for these."""
    k = params.loadings.shape[1]
    weight = cells.weight[:, None]
    alpha, zeta = mode.alpha, mode.zeta
    scores, beta, xi = _gene_scores(cells, params, factors, alpha, lin, logs, beyond, covariance)
    v = alpha + lin.b * factors.lift(zeta * lin.scales)  # the working response times b
    second = zeta[:, :, None] * zeta[:, None, :] + covariance

    def total(x):  # without the barrier XLA fuses the sum with its terms, and does not vectorize it
        return cells.weight @ jax.lax.optimization_barrier(x)

    regression = dict(
        b=weight * lin.b,
        v_beta=weight * (v + beta),
        alpha=jnp.where(weight > 0, alpha, 0.0),
        z=zeta[:, :k],
        xi=weight * xi[:, :k],
        beyond=beyond.beta,
        beyond_xi=weight * beyond.xi[:, :k],
        second=second,
        scale=lin.scales[:, k],
    )
    of_coef = scores.gradient_mean.T @ (weight * cells.design)
    return jax.tree.map(total, scores)._replace(gradient_coef=of_coef), regression


def _regression_sums(params, design, b, v_beta, alpha, z, xi, beyond, beyond_xi, second, scale):
    """Gradient of the loadings, and ``sum_c b [1 c z][1 c z]'``; covariates c are scores that are known.

    ``b``, ``alpha``, ``beyond`` (the beta of `SecondOrder`) and ``v_beta`` (weighted working responses, and
    beta) are (n_cells, n_genes); ``z``, ``xi`` and ``beyond_xi`` (n_cells, k) are of the factors alone,
    ``second`` (n_cells, k + 1, k + 1) is the second moment of the scores and ``scale`` (n_cells,) that of the
    capture column. The rows' weights are in ``b``, ``v_beta`` and the xi.

    ``(alpha alpha' - K + beta alpha' + alpha beta' + beyond beyond') F`` without a cells x genes x k array:
    ``F' alpha = P zeta`` and ``F' beta = P xi``, and ``alpha zeta' - K F = v zeta' - b F E[zeta zeta']``.
    """
    k, p = params.loadings.shape[1], design.shape[1]
    with_capture = scale[:, None] * second[:, k, :k]
    scores, second = jnp.concatenate([design, z], 1), second[:, :k, :k]
    if p:
        products = scores[:, :, None] * scores[:, None, :]
        second = products.at[:, p:, p:].set(second)
    i, j, back = lowrank.triangle(p + k)
    features = jnp.concatenate([jnp.ones_like(b[:, :1]), scores, second[:, i, j], with_capture], 1)
    sums = b.T @ features
    moments, capture_part = sums[:, : 1 + p + k + i.size], sums[:, 1 + p + k + i.size :]
    zz = moments[:, 1 + p + k :][:, back[p:, p:]]  # (n_genes, k, k)
    outer = v_beta.T @ z + alpha.T @ xi + beyond.T @ beyond_xi
    return outer - jnp.sum(zz * params.loadings[:, None, :], 2) - capture_part, moments


def _gene_blocks(a):
    """Blocks of the rows of ``a`` (n_genes, n), padded with zeros: (n_blocks, GENE_BLOCK, n)."""
    short = -a.shape[0] % GENE_BLOCK
    return jnp.pad(a, ((0, short), (0, 0))).reshape(-1, GENE_BLOCK, a.shape[1])


@partial(jax.jit, static_argnames="block")
def score_products(cells, params, alpha, results, free_dispersion, *, block=None):
    """Sums over cells of outer products of each gene's scores in (mu, b_1..b_p, w_1..w_k, log d, log r).

    Where log r is not free, its scores are without those of the constants, which do not depend on y. A block
    of cells is expanded at a time, as in `solve_cells`, and then a block of genes is multiplied at a time.
    Returns the products, (n_genes, p + k + 3, p + k + 3), and ``sum_c b``, (n_genes,).
    """
    n_genes, k = params.loadings.shape
    n_scores = cells.design.shape[1] + k + 3
    factors = lowrank.Factors.of(params.loadings)
    of_cells = (cells, alpha, results.zeta, results.covariance)
    n_cells = alpha.shape[0]
    shape = (1, n_cells) if block is None else (n_cells // block, block)
    blocks = jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:]), of_cells)
    by_gene, by_cell = jax.tree.map(
        lambda a: a.reshape(n_cells, *a.shape[2:]),
        jax.lax.map(lambda part: _score_parts(params, factors, free_dispersion, *part), blocks),
    )
    z, xi, beyond_xi, second = (jnp.moveaxis(a, 0, -1)[None] for a in by_cell)
    design = cells.design.T[None]

    def products(block):
        mean, v_beta, own, shared, b, noise, log_r, F = (a[:, None, :] for a in block)
        regression = (F[:, 0] @ second.reshape(k + 1, -1)).reshape(-1, *z.shape[1:])
        loadings = v_beta * z + own * xi + shared * beyond_xi - b * regression
        stacked = jnp.concatenate([mean, mean * design, loadings, noise, log_r], 1)
        # the barrier keeps XLA from fusing this with the product
        stacked = jax.lax.optimization_barrier(stacked)
        return stacked @ jnp.swapaxes(stacked, 1, 2)

    # a block of genes at a time, so that intermediate results stay in the processor's caches
    genes = *(_gene_blocks(a.T) for a in by_gene), _gene_blocks(factors.columns)
    found = jax.lax.map(products, genes).reshape(-1, n_scores, n_scores)[:n_genes]
    return found, jnp.sqrt(cells.weight) @ by_gene[4]  # b times one root of the weight already


def _score_parts(params, factors, free_dispersion, cells, alpha, zeta, covariance):
    """What the scores of genes are made of: arrays (n_cells, n_genes), and those of each cell."""
    k = params.loadings.shape[1]
    lin = linearize(cells, params, log_rates(cells, params, factors, zeta, alpha), factors)
    logs = log_odds_terms(params.dispersion[None, :], lin.terms)
    constants = log_rising_slope(cells.counts, 1.0 / params.dispersion[None, :])
    beyond = _beyond(cells, params, factors, lin)
    scores, beta, xi = _gene_scores(cells, params, factors, alpha, lin, logs, beyond, covariance)
    by_gene = (
        scores.gradient_mean,
        alpha + lin.b * factors.lift(zeta * lin.scales) + beta,
        alpha,
        beyond.beta,
        lin.b,
        params.noise[None, :] * scores.gradient_noise,
        scores.gradient_log_r + jnp.where(free_dispersion, constants, 0.0),
    )
    second = zeta[:, :, None] * zeta[:, None, :] + covariance
    second = jnp.swapaxes(second[:, :k, :] * lin.scales[:, None, :], 1, 2)
    by_cell = zeta[:, :k], xi[:, :k], beyond.xi[:, :k], second
    root = jnp.sqrt(cells.weight)[:, None]
    return tuple(root * a for a in by_gene), by_cell

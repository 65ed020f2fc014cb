r"""Start values of the loadings from the moments of the scores at the independent-gene fit.

With the score ``g_cg = u - (u + r) p`` and the expected information ``i_cg = m r / (m + r)`` at the
fitted means, and ``q_g = sqrt(mean_c i_cg^2)``, the off-diagonal entries of ``B' B / n`` with
``B = g / q`` estimate those of ``Sigma``. Its leading eigenpairs, each eigenvalue less its share of the
noise, are the start of the loadings.
"""

import jax
import jax.numpy as jnp
import numpy as np

from .channel import channel_terms
from .mode import location
from .params import Params, noise_coordinate

# of the randomized eigendecomposition: extra columns, multiple of the number of columns, iterations
_OVERSAMPLING = 8
_COLUMN_BUCKET = 4
_POWER_ITERATIONS = 4
_LARGEST_SD = 2.0  # nats; largest norm of a gene's loadings at the start


def _scores_and_information(cells, params):
    terms = channel_terms(cells.counts, location(cells, params), params.dispersion[None, :])
    weight = cells.weight[:, None]
    return weight * terms.gradient, weight * terms.rate / (1.0 + terms.odds)


@jax.jit
def information_sums(cells, params):
    """Sums over cells of the expected information and of its square, (n_genes,) each."""
    _, information = _scores_and_information(cells, params)
    return jnp.sum(information, 0), jnp.sum(information**2, 0)


@jax.jit
def score_product(cells, params, q, omega):
    """``B' B omega`` summed over the batch, (n_genes, n_columns)."""
    gradient, _ = _scores_and_information(cells, params)
    B = gradient / q[None, :]
    return B.T @ (B @ omega)


def loadings_from_scores(sum_over_batches, n_cells, n_genes, k, rng):
    """Loadings at the start, (n_genes, k), with columns of descending norm.

    Parameters
    ----------
    sum_over_batches : callable
        ``sum_over_batches(function, *args)`` sums ``function(cells, params, *args)`` over the
        batches; ``cells.offset`` are the capture offsets, taken as known.
    n_cells, n_genes, k : int
    rng : RandomState
        Seeds the range finder of the randomized eigendecomposition.
    """
    if k == 0:
        return np.zeros((n_genes, 0))
    total, squares = sum_over_batches(information_sums)
    q = np.sqrt(np.maximum(squares / n_cells, 1e-12))
    noise = total / n_cells / q**2
    # rounded up, so that a grid over k shares the compiled products
    columns = min(_COLUMN_BUCKET * -(-k // _COLUMN_BUCKET) + _OVERSAMPLING, n_genes)
    basis = np.linalg.qr(rng.standard_normal((n_genes, columns)))[0]
    for _ in range(_POWER_ITERATIONS):
        basis = np.linalg.qr(sum_over_batches(score_product, q, basis))[0]
    small = basis.T @ sum_over_batches(score_product, q, basis) / n_cells
    values, vectors = np.linalg.eigh((small + small.T) / 2)
    values, vectors = values[::-1][:k], basis @ vectors[:, ::-1][:, :k]
    share = (vectors**2).T @ noise
    size = np.sqrt(np.maximum(values - share, np.maximum(values, 0.0) / 20.0))
    loadings = vectors * size[None, :]
    norms = np.linalg.norm(loadings, axis=1, keepdims=True)
    return loadings * np.minimum(1.0, _LARGEST_SD / np.maximum(norms, 1e-300))


START_NOISE = 0.05  # d of every gene at the start, nats squared


import os
def less_overdispersion(log_r, variance, total):
    """Log r after log-rates of this variance have taken their share of the overdispersion.

    At least a tenth of the overdispersion is left. This is the start where r is free.
    """
    level = total(log_r)
    return total.inverse(np.maximum(level - variance, 0.1 * level))


def start_coordinates(log_mean, log_r, loadings, free, coupled, total):
    """Coordinates at the start of a fit, from log m and log r of independent genes, and loadings."""
    d = np.full(log_mean.size, START_NOISE)
    W2 = np.sum(loadings**2, 1)
    share = float(os.environ.get("START", "0"))
    if share:
        level = total(log_r)
        d = np.maximum(share*(level - W2), 0.05)
    variance = W2 + d
    if share:
        log_r = total.inverse(np.maximum((1-share)*(level-W2), .05*level))
    else:
        log_r = less_overdispersion(log_r, variance, total) if free.dispersion else log_r
    return Params(
        log_mean - variance / 2 if free.mean and not coupled else log_mean,
        loadings,
        noise_coordinate(d),
        log_r,
    )


def resumed(start, previous, free):
    """The start, with the coordinates of a previous fit where they are free."""
    finite = np.isfinite(previous.dispersion)  # it is not after a fit with Poisson counts
    return start._replace(
        mean=previous.mean if free.mean else start.mean,
        noise=previous.noise,
        dispersion=np.where(finite & free.dispersion, previous.dispersion, start.dispersion),
    )

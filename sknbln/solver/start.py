r"""Start values of the loadings from the scores at the independent-gene fit.

With the score ``g_cg = u - (u + r) p``, the expected information ``i_cg = m r / (m + r)`` at the fitted
means and ``I_g = sum_c i_cg``, every entry of ``A = g / sqrt(I)`` has noise of variance ``1/n``, and a
factor with loadings w adds a spike of size ``l = w' diag(I / n) w`` to ``A' A``. The leading eigenvalue of
a spike is ``(1 + l)(1 + G/(n l))``, and the squared cosine between its eigenvector and ``sqrt(I) w`` is
``(1 - G/(n l^2)) / (1 + G/(n l))`` (Baik, Ben Arous & Peche 2005; Paul 2007). Both are inverted here.
"""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit

from .channel import channel_terms
from .mode import location
from .params import LOG_DISPERSION_RANGE, NOISE_RANGE, Params, noise_coordinate

# of the randomized eigendecomposition: extra columns, multiple of the number of columns, iterations
_OVERSAMPLING = 8
_COLUMN_BUCKET = 4
_POWER_ITERATIONS = 4
_ABOVE_EDGE = 0.1  # of an eigenvalue that is not above the edge, relative
_LARGEST_SD = 2.0  # nats; largest norm of a gene's loadings at the start


def _scores_and_information(cells, params):
    terms = channel_terms(cells.counts, location(cells, params), params.dispersion[None, :])
    weight = cells.weight[:, None]
    # the scores enter by their products
    return jnp.sqrt(weight) * terms.gradient, weight * terms.rate / (1.0 + terms.odds)


@jax.jit
def information_sums(cells, params):
    """Sum over cells of the expected information, (n_genes,)."""
    return jnp.sum(_scores_and_information(cells, params)[1], 0)


@jax.jit
def score_product(cells, params, scale, omega):
    """``A' A omega`` summed over the batch, (n_genes, n_columns), with ``A = g / scale``."""
    gradient, _ = _scores_and_information(cells, params)
    A = gradient / scale[None, :]
    return A.T @ (A @ omega)


def spikes(eigenvalues, ratio):
    """Size of the spikes with these leading eigenvalues, and their squared cosines; ratio is ``G / n``.

    An eigenvalue below the edge of the noise is taken as that of the smallest spike that shows.
    """
    excess = np.maximum(eigenvalues - 1.0 - ratio, (2.0 + _ABOVE_EDGE) * np.sqrt(ratio))
    size = (excess + np.sqrt(excess**2 - 4.0 * ratio)) / 2.0
    return size, (1.0 - ratio / size**2) / (1.0 + ratio / size)


def loadings_from_scores(sum_over_batches, n_cells, n_genes, k, rng):
    """Loadings at the start, (n_genes, k), of descending size.

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
    information = np.maximum(sum_over_batches(information_sums), 1e-12)
    scale = np.sqrt(information)
    # rounded up, so that a grid over k shares the compiled products
    columns = min(_COLUMN_BUCKET * -(-k // _COLUMN_BUCKET) + _OVERSAMPLING, n_genes)
    basis = np.linalg.qr(rng.standard_normal((n_genes, columns)))[0]
    for _ in range(_POWER_ITERATIONS):
        basis = np.linalg.qr(sum_over_batches(score_product, scale, basis))[0]
    small = basis.T @ sum_over_batches(score_product, scale, basis)
    values, vectors = np.linalg.eigh((small + small.T) / 2)
    values, vectors = values[::-1][:k], basis @ vectors[:, ::-1][:, :k]
    size, cosine = spikes(values, n_genes / n_cells)
    # a gene with less information than a tenth of the average gets short loadings
    precision = information + 0.1 * information.mean()
    loadings = (
        vectors
        * np.sqrt(size * cosine)
        * np.sqrt(n_cells * information)[:, None]
        / precision[:, None]
    )
    norms = np.linalg.norm(loadings, axis=1, keepdims=True)
    return loadings * np.minimum(1.0, _LARGEST_SD / np.maximum(norms, 1e-300))


START_NOISE = 0.05  # d of every gene at the start where no split is given, nats squared
#: least share of the overdispersion that the loadings leave at the start
_LEAST_LEFT = 0.1
#: d at the start is at most this times log(1 + overdispersion): T(r) of a log-normal count is far above its d
_LARGEST_NOISE = 3.0


def start_coordinates(log_mean, log_r, loadings, free, coupled, total, split, coef=None):
    """Coordinates at the start of a fit.

    Parameters
    ----------
    log_mean, log_r : ndarray of shape (n_genes,)
        Of independent genes.
    loadings : ndarray of shape (n_genes, k)
    free : Params of bool
    coupled : bool
        Whether the coordinate of the mean is the marginal log-mean.
    total : TotalOverdispersion
    split : float or None
        ``log d - log T(r)`` at the start, of the overdispersion that the loadings leave; inf for Poisson
        counts, without dispersion. None for d = `START_NOISE`; a free dispersion takes the rest.
    coef : ndarray of shape (n_genes, p), optional
        Coefficients of independent genes.
    """
    explained = np.sum(loadings**2, 1)
    level, d = total(log_r), np.full(log_mean.size, START_NOISE)
    if split is None and free.dispersion:
        rest = np.maximum(level - explained - d, _LEAST_LEFT * level)
        log_r = np.clip(total.inverse(rest), *LOG_DISPERSION_RANGE)
    if split is not None:
        rest = np.maximum(level - explained, _LEAST_LEFT * level)
        share = expit(split)
        d = np.minimum(share * rest, _LARGEST_NOISE * np.log1p(share * rest))
        log_r = np.full_like(log_r, np.inf)
        if share < 1.0:
            log_r = np.clip(total.inverse((1.0 - share) * rest), *LOG_DISPERSION_RANGE)
    return Params(
        log_mean if coupled or not free.mean else log_mean - (explained + d) / 2,
        loadings,
        np.clip(noise_coordinate(d), *NOISE_RANGE),
        log_r,
        coef,
    )


def resumed(start, previous, free):
    """The start, with the coordinates of a previous fit where they are free."""
    finite = np.isfinite(previous.dispersion)  # it is not after a fit with Poisson counts
    return start._replace(
        mean=previous.mean if free.mean else start.mean,
        coef=previous.coef if free.coef else start.coef,
        noise=previous.noise,
        dispersion=np.where(finite & free.dispersion, previous.dispersion, start.dispersion),
    )

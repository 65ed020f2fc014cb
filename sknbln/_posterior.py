r"""Posterior of an NBLN fit: distributions, draws and standard deviations of r, mu and eta.

Frozen parameters keep the source's posterior. Under the marginal-preserving cascade it is transformed by
the coupling (``solver.coupling``).

Free parameters have a Gaussian posterior from the curvature of the profiled objective. For mu this is the
information in the Gaussian model behind the Laplace approximation: given the offsets, ``mu_g`` is
estimated from working responses of variance ``1/b`` around ``W z``, and the mean of z over n cells has
covariance ``I/n``:

.. math:: V = \mathrm{diag}(1 / \textstyle\sum_c b_{cg}) + W W' / n, \qquad
          \mathrm{Cov}(\mu) = (V^{-1} + \Lambda)^{-1}

with ``Lambda`` the precision of the soft prior. It is positive by construction. The variance of mu_g is
then increased by the uncertainty of the gene's other free parameters (the data determine the marginal mean,
``mu_g + Sigma_gg/2``, better than mu_g). The variance of log r comes from the joint information of the
gene's free parameters. Both use the outer products of the cells' exact gradients.

Coefficients of covariates are estimated from the same working responses. With centred covariates C and
``A_g = sum_c b_cg [1 c][1 c]'``,

.. math:: \mathrm{Var}(B_{gj}) = (A_g + \Lambda)^{-1}_{jj} + (C'C)^{-1}_{jj} \lVert w_g \rVert^2

where ``Lambda`` is the weak prior alone: the source's posterior comes from the same counts.
"""

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions.transforms import Transform
from scipy.stats import truncnorm

from ._passes import gene_score_products
from .solver.coupling import marginal_level, remaining_level, remaining_level_slopes
from .solver.metric import least_squares_matrix
from .solver.objective import COEF_PRIOR_SCALE
from .solver.overdispersion import TotalOverdispersion
from .solver.params import Params


class CoupledDispersion(Transform):
    """Transform of the source's (marginal) dispersion to the dispersion of the model.

    ``variance`` is ``S = |w|^2 + d`` of each gene, in the coordinates of the ascent, (n_genes,); ``total`` is
    their `TotalOverdispersion`.
    """

    domain = dist.constraints.positive
    codomain = dist.constraints.positive

    def __init__(self, variance, total):
        self.variance, self.weight = variance, total.weight

    @property
    def total(self):
        """The genes' `TotalOverdispersion`."""
        return TotalOverdispersion(self.weight)

    def __call__(self, r):
        level = remaining_level(self.total(jnp.log(r)), self.variance, jnp)
        return jnp.exp(self.total.inverse(level))

    def _inverse(self, r):
        t = marginal_level(self.total(np.log(np.asarray(r, float))), self.variance)
        return jnp.asarray(np.exp(self.total.inverse(t)))

    def log_abs_det_jacobian(self, x, y, intermediates=None):
        log_x, log_y = jnp.log(x), jnp.log(y)
        slope, _ = remaining_level_slopes(self.total(log_x), self.variance, jnp)
        by_log = slope * self.total.slope(log_x) / self.total.slope(log_y)
        return log_y - log_x + jnp.log(by_log)

    def tree_flatten(self):
        """Parameters of the transform as a pytree, the interface that NumPyro requires."""
        return (self.variance, self.weight), (("variance", "weight"), {})

    def __eq__(self, other):
        return (
            isinstance(other, CoupledDispersion)
            and np.array_equal(self.variance, other.variance)
            and np.array_equal(self.weight, other.weight)
        )


def mean_covariance_diagonal(information, loadings, n_cells, prior_precision):
    """Diagonal of ``(V^{-1} + Lambda)^{-1}``, ``V = diag(1/information) + W W'/n_cells``."""
    information = np.maximum(information, 1e-300)
    total = information + prior_precision
    # V^{-1} = D - D W (n I + W' D W)^{-1} W' D with D = diag(information)
    scaled = information[:, None] * loadings
    inner = n_cells * np.eye(loadings.shape[1]) + loadings.T @ scaled
    # Woodbury's identity once more: total takes the place of D
    correction = inner - scaled.T @ (scaled / total[:, None])
    back = scaled / total[:, None]
    return 1.0 / total + np.einsum("gi,gi->g", back @ np.linalg.inv(correction), back)


def coef_standard_deviations(moments, loadings, known):
    """Standard deviations of the coefficients, (n_genes, p), from the sums of b [1 c z][1 c z]'.

    ``known`` is the `Known` of the rows of the fit.
    """
    design, p = known.design, known.design.shape[1]
    A = least_squares_matrix(moments)[:, : 1 + p, : 1 + p]
    np.einsum("gii->gi", A)[:, 1:] += COEF_PRIOR_SCALE**-2.0
    of_counts = np.einsum("gii->gi", np.linalg.inv(A))[:, 1:]
    of_scores = np.diag(np.linalg.inv(design.T @ known.weighted(design)))
    return np.sqrt(of_counts + of_scores * np.sum(loadings**2, 1)[:, None])


def standard_deviations(
    batches, scores, params, free, prior_mean, prior_log_r, prior_loadings, prior_coef
):
    """Standard deviations of mu, W, log d and log r, their covariance, and the rows' posterior, in one pass.

    The standard deviations are `Params`, 0 where frozen; the covariance is that of each gene's w, log d and
    log r, (n_genes, k + 2, k + 2); the posterior is a `RowPosterior`. ``batches`` are `RowBatches`,
    ``scores`` start values of the rows' modes, ``prior_*`` the precisions of the priors. The information of
    a gene's parameters, taken together, is the sum of outer products of the cells' exact gradients.
    """
    (n_genes, k), p = params.loadings.shape, params.coef.shape[1]
    n_cells = batches.known.total_weight
    products, information, rows = gene_score_products(batches, params, scores, free.dispersion)
    mean_sd, log_r_sd = np.zeros(n_genes), np.zeros(n_genes)
    sizes = 1, p, k, 1, 1
    free_blocks = free.mean, free.coef, free.loadings, free.noise, free.dispersion
    keep = np.flatnonzero(np.repeat(free_blocks, sizes))
    mean, coef, columns, noise, log_r = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    precision = np.full((n_genes, sum(sizes)), 1e-6)  # keeps the information matrix regular
    precision[:, mean] += np.reshape(prior_mean, (-1, 1))
    precision[:, coef] += prior_coef
    precision[:, columns] += prior_loadings
    precision[:, noise] = 0.0
    precision[:, log_r] += np.reshape(prior_log_r, (-1, 1))
    J = products[:, keep][:, :, keep]
    diagonal = np.einsum("gii->gi", J)
    diagonal += precision[:, keep]
    conditional = 1.0 / np.maximum(diagonal, 1e-100)  # variances given the gene's other parameters
    # In units of these standard deviations the matrix is well scaled, for log d too, whose gradient is tiny
    # where d is at its floor.
    unit = np.sqrt(conditional)
    J = J * unit[:, :, None] * unit[:, None, :] + 1e-9 * np.eye(keep.size)
    inverse = np.linalg.inv(J) * unit[:, :, None] * unit[:, None, :]
    covariance = np.zeros((n_genes, sum(sizes), sum(sizes)))
    covariance[:, keep[:, None], keep] = inverse
    variance = np.maximum(np.einsum("gii->gi", covariance), 0.0)
    sd = np.sqrt(variance)
    if free.mean:
        mean_variance = mean_covariance_diagonal(information, params.loadings, n_cells, prior_mean)
        # mu decreases as the gene's Sigma_gg increases: the data determine the marginal mean
        mean_sd = np.sqrt(mean_variance + np.maximum(variance[:, 0] - conditional[:, 0], 0.0))
    if free.dispersion:
        log_r_sd = sd[:, log_r[0]]
    # Uncertainty shared by the genes: W absorbs the square root of the scores' sample covariance, whose
    # sampling variance is 1/2n in the length of a column and 1/4n between each pair of columns.
    squares = params.loadings**2
    shared = (squares + squares.sum(1, keepdims=True)) / (4 * n_cells)
    loadings_sd = np.sqrt(sd[:, columns] ** 2 + shared) * np.any(params.loadings, axis=0)
    of_variances = covariance[:, 1 + p :, 1 + p :].copy()
    sds = Params(mean_sd, loadings_sd, sd[:, noise[0]], log_r_sd, np.zeros((n_genes, p)))
    return sds, of_variances, rows


def source_dispersion(guide, coupling=None):
    """Distribution of a frozen r, from the source's guide; transformed by the `CoupledDispersion`, if any."""
    r = dist.LogNormal(guide.log_dispersion[0], guide.log_dispersion_scale)
    return r if coupling is None else dist.TransformedDistribution(r, coupling)


def source_offsets(guide, capture_prior, offsets):
    """Distribution of frozen capture offsets, from the source's guide; ``offsets`` itself if it has none."""
    if guide.capture_offset is None:
        return dist.Delta(offsets)
    loc = guide.capture_offset[0]
    return truncated(loc, guide.capture_offset_scale(capture_prior.sigma), offsets)


def truncated(loc, scale, offsets):
    """Distribution of capture offsets, Gaussians truncated at 0; fixed at ``offsets`` if a scale is 0."""
    return dist.TruncatedNormal(loc, scale, low=0.0) if np.all(scale > 0) else dist.Delta(offsets)


def coupled_draws(r, variance, total):
    """Draws of the model's r and Sigma_gg, from draws of the source's r and the variance S of each gene."""
    t = total(np.log(r))
    remaining = remaining_level(t, variance)
    return np.exp(total.inverse(remaining)), t - remaining


def offset_draws(loc, scale, n_samples, rng):
    """Draws of offsets, (n_samples, n_rows), from Gaussians truncated at 0; an offset of scale 0 is fixed."""
    is_random = scale > 0
    eta = np.broadcast_to(np.maximum(loc, 0.0), (n_samples, loc.size)).copy()
    eta[:, is_random] = truncnorm.rvs(
        -loc[is_random] / scale[is_random],
        np.inf,
        loc[is_random],
        scale[is_random],
        size=(n_samples, int(is_random.sum())),
        random_state=rng,
    )
    return eta

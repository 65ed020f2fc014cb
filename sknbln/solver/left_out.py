r"""The density of each count given the other counts of its cell, for all genes at once.

At the mode ``y*`` with posterior variance ``V`` the gene's own count contributes the gradient ``g`` and the
curvature ``a`` of its log-likelihood. Without that contribution (the cavity of expectation propagation) the
log-rate is normal with mean ``y* - g V / (1 - a V)`` and variance ``V / (1 - a V)``; ``1 - a V > 0``. The
density of the count is the mean of its likelihood under it, here by Gauss-Hermite quadrature at ``N(y*, V)``,
where the integrand lies. With ``y = y* + delta``

.. math:: \log \frac{N(y; cavity)}{N(y; y^*, V)} = \tfrac12 \log(1 - a V) - \frac{g^2 V}{2 (1 - a V)}
          - g\, \delta + \tfrac12 a\, \delta^2

has no division by ``V``, which may be 0.
"""

import jax
import jax.numpy as jnp
import numpy as np

from . import lowrank
from .channel import channel_terms, log_likelihood_terms, log_odds_terms
from .marginal import variances
from .mode import linearize, log_rates

NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(9)
LOG_WEIGHTS = np.log(_WEIGHTS / _WEIGHTS.sum())


@jax.jit
def left_out_density(cells, params, zeta, alpha, covariance, nodes, log_weights):
    """``sum_c w_c log p(u_cg | the other counts of c)``, (n_genes,), without the constants of the counts.

    ``zeta``, ``alpha`` and ``covariance`` are those of `solve_cells`; w are the weights of the cells.
    """
    factors, phi = lowrank.Factors.of(params.loadings), params.dispersion[None, :]
    y = log_rates(cells, params, factors, zeta, alpha)
    lin = linearize(cells, params, y, factors)
    _, variance = variances(params, factors, lin, covariance)
    g, a = lin.terms.gradient, lin.terms.curvature
    left = jnp.maximum(1.0 - a * variance, jnp.finfo(y.dtype).eps)

    def at(node):
        delta = jnp.sqrt(variance) * node
        terms = channel_terms(cells.counts, y + delta, phi)
        likelihood = log_likelihood_terms(cells.counts, y + delta, log_odds_terms(phi, terms))
        return likelihood - g * delta + 0.5 * a * delta**2

    values = jax.lax.map(at, nodes) + log_weights[:, None, None]
    density = jax.scipy.special.logsumexp(values, axis=0)
    density = density + 0.5 * jnp.log(left) - 0.5 * g**2 * variance / left
    return cells.weight @ density

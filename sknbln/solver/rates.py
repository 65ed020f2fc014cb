r"""Draws of cells' log-rates from their Laplace posterior, without a genes x genes matrix.

At the mode ``y*`` the posterior covariance is ``V = (Sigma^{-1} + A)^{-1}``. At fixed scores the genes
are independent: ``y`` has variance ``d / den``, ``den = 1 + d a``, and its mean moves with the scores by
``F zeta / den``; the scores themselves have covariance ``C = M^{-1}``, ``M = I + F' diag(a / den) F``. So

.. math:: V = \mathrm{diag}(d / den) + \mathrm{diag}(1 / den)\, F C F'\, \mathrm{diag}(1 / den)

and with ``M = L L'`` and standard normal ``e1`` (k + 1), ``e2`` (genes)

.. math:: y = y^* + \frac{F L^{-T} e_1}{den} + \sqrt{d / den}\; e_2

is an exact draw from ``N(y*, V)``. No division by ``d`` or ``a`` occurs.
"""

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from . import lowrank
from .mode import linearize, log_rates


@jax.jit
def draw_rates(cells, params, zeta, alpha, score_noise, gene_noise):
    """One draw of y = x - eta for each cell of a batch, (n_cells, n_genes), from its Laplace posterior.

    ``zeta`` and ``alpha`` are those of the modes, from `solve_cells`; ``score_noise`` (n_cells, k + 1) and
    ``gene_noise`` (n_cells, n_genes) are standard normal.
    """
    factors = lowrank.Factors.of(params.loadings)
    y = log_rates(cells, params, factors, zeta, alpha)
    lin = linearize(cells, params, y, factors)
    deviation = solve_triangular(lin.L, score_noise[..., None], trans=1, lower=True)[..., 0]
    lifted = factors.lift(deviation * lin.scales)
    noise = jnp.sqrt(params.noise[None, :] * lin.rest) * gene_noise
    return y + lifted * lin.rest + noise

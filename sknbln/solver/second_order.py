r"""The leading part of what Laplace's method leaves out of a cell's log-marginal, and its derivatives.

.. math:: \epsilon = \sum_g t_g \bigl(\tfrac{5}{24} a_g'^2 v_g^3 - \tfrac18 a_g'' v_g^2\bigr)
          + \tfrac12 h' (V - \mathrm{diag}(v)) h, \qquad h_g = -\tfrac12 t_g a_g' v_g

with ``a`` the curvature of the likelihood at the mode, a' and a'' its derivatives in the log-rate, V the
posterior covariance of the log-rates and ``v = d / (1 + d a)`` the part of it that is each gene's own. The
first sum is the next term of each gene's own integral given the scores. Without it genes with few counts get
far too large a d, and genes with many one too small. The second is what moving the scores to the maximum of
the genes' integrals gains: ``a' v / 2`` is the slope of ``log(1 + d a) / 2``, and each gene pulls at the
scores of all. What is left of the expansion shrinks in proportion to the number of genes per factor.

Where v is large the expansion ends: both parts would grow with d for ever, and the likelihood with them. The
factor ``t = 1 / sqrt(1 + (v / REACH)^2)`` bounds them.

Which terms matter where dimensions are many: Shun and McCullagh 1995, Laplace approximation of high
dimensional integrals, J. R. Stat. Soc. B 57, 749.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import lowrank

_CUBIC, _QUARTIC = 5 / 24, 1 / 8
#: nats squared; the posterior variance of a log-rate up to which the expansion holds
REACH = 6.0


class SecondOrder(NamedTuple):
    """The term for each cell, its partial derivatives, and the pull of the genes at the scores."""

    value: jnp.ndarray  # (n_cells,)
    in_log_rate: jnp.ndarray  # (n_cells, n_genes)
    in_noise: jnp.ndarray  # (n_cells, n_genes) in d at fixed log-rates
    in_log_r: jnp.ndarray  # (n_cells, n_genes) the same
    #: (n_cells, n_genes) Sigma^{-1} V h; the derivative in Sigma is beta beta' / 2
    beta: jnp.ndarray
    xi: jnp.ndarray  # (n_cells, k + 1) P^{-1} F' beta


def second_order(u, phi, d, factors, lin):
    """`SecondOrder` of counts u (n_cells, n_genes), at the `Linearization` at their modes.

    ``phi`` and ``d`` are (1, n_genes).
    """
    a, rest, prob = lin.terms.curvature, lin.rest, lin.terms.odds * lin.terms.keep
    v = d * rest
    w = a * v  # below 1
    s = 1.0 - 2.0 * prob  # a' / a
    turn = 0.5 * (1.0 - s**2)  # derivative of s in log r, and minus that in y
    inner = _CUBIC * s**2 * w - _QUARTIC * (s**2 - turn)
    share = jax.lax.rsqrt(1.0 + (v / REACH) ** 2)
    within = share**2  # derivative of the logarithm of the bounded v in log v
    own = share * v * w * inner

    h = -0.5 * s * w * share
    x = h * rest
    pull = factors.project(x) * lin.scales
    xi = lowrank.solve(lin.L, pull)
    lifted = factors.lift(xi * lin.scales)
    beta = x - lin.b * lifted
    q = lifted * rest  # (V - diag(v)) h

    of_scale = share * v * w * (inner * (rest - within * w) + _CUBIC * s**2 * w * rest)
    of_shape = share * v * w * s * (2.0 * _CUBIC * w - 3.0 * _QUARTIC)

    def slope(of_log_a, of_s):
        """Derivative along a change that changes log a and s by this much."""
        of_h = h * (rest - within * w) * of_log_a - 0.5 * share * w * of_s
        shared = q * of_h - 0.5 * q**2 * a * of_log_a
        return of_scale * of_log_a + of_shape * of_s + shared

    of_own = share * rest**2 * w * (inner * (1.0 + within) + _CUBIC * s**2 * w)
    of_shared = 0.5 * (beta**2 - x**2 - q * a * s * rest**2 * share * within)
    return SecondOrder(
        value=lowrank.row_sums(own) + 0.5 * jnp.sum(pull * xi, 1),
        in_log_rate=slope(s, -turn),
        in_noise=of_own + of_shared,
        in_log_r=slope(1.0 - s - u * phi / (1.0 + u * phi), turn),
        beta=beta,
        xi=xi,
    )

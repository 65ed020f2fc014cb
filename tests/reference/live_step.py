"""The exact gradient by automatic differentiation through one live Newton step.

At the mode the gradient is stopped; one Newton step from there is taken with live globals, and the
Laplace marginal is evaluated where it lands. Its derivative contains the motion of the mode and of
the curvature with it. Slow (it differentiates Cholesky factorizations), and with no formula of its own.
"""

import jax
import jax.numpy as jnp

from sknbln._laplace import lowrank
from sknbln._laplace.likelihood import log_likelihood_terms
from sknbln._laplace.mode import Globals, find_mode, linearize


def total_log_marginal(mean, loadings, noise, log_r, cells, zeta):
    """Sum over cells of the Laplace marginal, without the constants; differentiable in the globals."""
    params = Globals(mean, loadings, noise, jnp.exp(-log_r))
    fixed = jax.tree.map(jax.lax.stop_gradient, params)
    at = jax.lax.stop_gradient(find_mode(cells, fixed, zeta).y)
    step = linearize(cells, params, at)
    there = linearize(cells, params, step.y)
    likelihood = jnp.sum(log_likelihood_terms(cells.counts, step.y, there.terms), 1)
    prior = jnp.sum(there.prior_precision * step.zeta**2, 1) + jnp.sum(
        noise[None, :] * step.alpha**2, 1
    )
    log_det = jnp.sum(jnp.log(there.den), 1) + lowrank.log_det(there.L)
    return jnp.sum(cells.weight * (likelihood - 0.5 * (prior + log_det)))


gradient = jax.jit(jax.grad(total_log_marginal, argnums=(0, 1, 2, 3)))

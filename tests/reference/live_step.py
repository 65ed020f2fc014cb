"""The exact gradient by automatic differentiation through one Newton step.

The mode itself is held fixed. One Newton step is taken from it with the global parameters as variables, and
the Laplace marginal is evaluated at its end, so that the derivative contains the motion of the mode and of
the curvature. It is slow (it differentiates Cholesky factorizations), but needs no formula for the gradient.
"""

import jax
import jax.numpy as jnp

from sknbln.solver import lowrank
from sknbln.solver.channel import log_likelihood_terms, log_odds_terms
from sknbln.solver.mode import find_mode, linearize, location, log_rates
from sknbln.solver.params import Params
from sknbln.solver.second_order import second_order


def newton_step(cells, params, y):
    """Scores and alpha that solve the Newton system expanded at any ``y``."""
    lin = linearize(cells, params, y)
    v = (lin.terms.curvature * (y - location(cells, params)) + lin.terms.gradient) / lin.den
    factors = lowrank.Factors.of(params.loadings)
    rhs = factors.project(v) * lin.scales
    zeta = lowrank.solve(lin.L, rhs)
    return zeta, v - lin.b * factors.lift(zeta * lin.scales)


def total_log_marginal(mean, loadings, noise, log_r, cells, zeta):
    """Sum over cells of the Laplace marginal, without the constants; differentiable in the globals."""
    params = Params(mean, loadings, noise, jnp.exp(-log_r))
    fixed = jax.tree.map(jax.lax.stop_gradient, params)
    mode = find_mode(cells, fixed, zeta)
    zeta, alpha = newton_step(cells, params, jax.lax.stop_gradient(mode.y))
    factors = lowrank.Factors.of(loadings)
    y = log_rates(cells, params, factors, zeta, alpha)
    there = linearize(cells, params, y)
    logs = log_odds_terms(params.dispersion[None, :], there.terms)
    likelihood = jnp.sum(log_likelihood_terms(cells.counts, y, logs), 1)
    prior = jnp.sum(there.prior_precision * zeta**2, 1) + jnp.sum(noise[None, :] * alpha**2, 1)
    log_det = jnp.sum(jnp.log(there.den), 1) + lowrank.log_det(there.L)
    phi = params.dispersion[None, :]
    beyond = second_order(cells.counts, phi, noise[None, :], factors, there).value
    return jnp.sum(cells.weight * (likelihood - 0.5 * (prior + log_det) + beyond))


gradient = jax.jit(jax.grad(total_log_marginal, argnums=(0, 1, 2, 3)))

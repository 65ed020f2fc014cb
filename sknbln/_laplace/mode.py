r"""The mode of one cell's log-rates: damped Newton, all cells of a batch together.

With ``y = x - eta`` and capture as one more factor, cell c has the prior

.. math:: y_c \sim N(\mu - m_c 1,\; W W' + s_c^2 1 1' + \mathrm{diag}(d))

The iterate is kept as ``y = loc + F zeta + d alpha``, linear in the state ``(zeta, alpha)``; no
division by ``d`` or by the curvature occurs, so both may be zero. At the mode ``zeta`` is the
posterior mean of the factor scores (and of the standardized capture deviation) and ``alpha =
Sigma^{-1} (y - loc)`` the gradient of the likelihood.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import lowrank
from .likelihood import channel_terms

#: a cell has converged when its Newton decrement (twice the expected gain, in nats) is below this
DECREMENT_TOL = 1e-9
MAX_NEWTON = 100


class Cells(NamedTuple):
    """What a batch of cells brings to the kernel. Everything here is data.

    ``scale = 0`` is a known offset, ``scale > 0`` a Gaussian prior on it; ``precision`` is 1 for a
    proper prior and 0 for a flat offset (then ``scale`` is 1). ``weight`` is 0 for padding.
    """

    counts: jnp.ndarray  # (n_cells, n_genes)
    offset: jnp.ndarray  # (n_cells,) prior location m_c of the capture offset
    scale: jnp.ndarray  # (n_cells,) prior scale s_c of the capture offset
    precision: jnp.ndarray  # (n_cells,)
    weight: jnp.ndarray  # (n_cells,)


class Globals(NamedTuple):
    """Global parameters: ``phi = 1/r`` is 0 for Poisson counts."""

    mean: jnp.ndarray  # (n_genes,) mu
    loadings: jnp.ndarray  # (n_genes, k) W
    noise: jnp.ndarray  # (n_genes,) d
    phi: jnp.ndarray  # (n_genes,)


class Linearization(NamedTuple):
    """The Newton system at one point: its solution and what it was made of."""

    zeta: jnp.ndarray
    alpha: jnp.ndarray
    y: jnp.ndarray
    terms: tuple
    den: jnp.ndarray  # 1 + d a
    b: jnp.ndarray  # a / den
    v: jnp.ndarray
    L: jnp.ndarray  # Cholesky factor of M
    scales: jnp.ndarray
    prior_precision: jnp.ndarray


class Mode(NamedTuple):
    """Modes of a batch of cells."""

    zeta: jnp.ndarray  # (n_cells, k + 1)
    alpha: jnp.ndarray  # (n_cells, n_genes)
    y: jnp.ndarray  # (n_cells, n_genes)
    decrement: jnp.ndarray  # (n_cells,)
    converged: jnp.ndarray  # (n_cells,) bool
    n_iter: jnp.ndarray  # () iterations of the batch


def location(cells, params):
    """Prior mean of y, (n_cells, n_genes)."""
    return params.mean[None, :] - cells.offset[:, None]


def linearize(cells, params, y):
    """Solve the Newton system with the likelihood expanded at ``y``."""
    F = lowrank.with_capture(params.loadings)
    k = params.loadings.shape[1]
    scales = lowrank.column_scale(cells.scale, k)
    prior_precision = lowrank.column_scale(cells.precision, k)
    terms = channel_terms(cells.counts, y, params.phi[None, :])
    loc = location(cells, params)
    a, d = terms.curvature, params.noise[None, :]
    den = 1.0 + d * a
    b = a / den
    v = (a * (y - loc) + terms.gradient) / den
    M = lowrank.precision_matrix(b, lowrank.pair_products(F), scales, prior_precision)
    L = lowrank.cholesky(M)
    zeta = lowrank.solve(L, (v @ F) * scales)
    lifted = (zeta * scales) @ F.T
    alpha = v - b * lifted
    return Linearization(
        zeta, alpha, loc + lifted + d * alpha, terms, den, b, v, L, scales, prior_precision
    )


class _State(NamedTuple):
    zeta: jnp.ndarray
    alpha: jnp.ndarray
    y: jnp.ndarray
    dzeta: jnp.ndarray  # Newton direction, in the three coordinates
    dalpha: jnp.ndarray
    dy: jnp.ndarray
    slope: jnp.ndarray  # directional derivative at the iterate
    step: jnp.ndarray
    done: jnp.ndarray
    n_iter: jnp.ndarray


def _slope(zeta, alpha, gradient, precision, d, dzeta, dalpha, dy):
    """Derivative of the log-posterior at (zeta, alpha) along a direction."""
    return (
        jnp.sum(gradient * dy, 1)
        - jnp.sum(precision * zeta * dzeta, 1)
        - jnp.sum(d * alpha * dalpha, 1)
    )


def _first_point(cells, params, zeta):
    """Where to expand first: at the given scores, but never below an observed count.

    From below, Newton on an exponential overshoots; from above it takes unit steps. So a count
    that the scores do not explain starts at its own logarithm.
    """
    k = params.loadings.shape[1]
    F = lowrank.with_capture(params.loadings)
    y = location(cells, params) + (zeta * lowrank.column_scale(cells.scale, k)) @ F.T
    terms = channel_terms(cells.counts, y, params.phi[None, :])
    d = params.noise[None, :]
    y = y + jnp.clip(d * terms.gradient / (1.0 + d * terms.curvature), -2.0, 2.0)
    log_u = jnp.log(jnp.maximum(cells.counts, 1e-300))
    return jnp.where((cells.counts > 0) & (y < log_u - 3.0), log_u, y)


def find_mode(cells, params, zeta):
    """Damped Newton from the scores ``zeta`` (n_cells, k + 1), one `while_loop` for the batch.

    A step is accepted when the slope along it has not turned below minus a quarter of what it was
    (the objective is concave, so along the step it rises while the slope is positive); otherwise
    the step is cut by the secant rule. The decision uses gradients only: no cancellation, no
    logarithms. Cells stop one by one and do not influence each other.
    """
    d = params.noise[None, :]
    first = linearize(cells, params, _first_point(cells, params, zeta))
    zero = jnp.zeros_like(cells.offset)
    state = _State(
        first.zeta,
        first.alpha,
        first.y,
        jnp.zeros_like(first.zeta),
        jnp.zeros_like(first.alpha),
        jnp.zeros_like(first.y),
        zero + 1e300,
        zero,
        cells.weight <= 0,
        jnp.zeros((), jnp.int32),
    )

    def body(state):
        t = jnp.where(state.done, 0.0, state.step)
        zeta = state.zeta + t[:, None] * state.dzeta
        alpha = state.alpha + t[:, None] * state.dalpha
        y = state.y + t[:, None] * state.dy
        new = linearize(cells, params, y)
        slope = _slope(
            zeta,
            alpha,
            new.terms.gradient,
            new.prior_precision,
            d,
            state.dzeta,
            state.dalpha,
            state.dy,
        )
        accept = slope >= -0.25 * state.slope
        secant = state.step * state.slope / jnp.maximum(state.slope - slope, 1e-300)
        cut = jnp.clip(secant, 0.1 * state.step, 0.7 * state.step)
        dzeta, dalpha, dy = new.zeta - zeta, new.alpha - alpha, new.y - y
        next_slope = _slope(
            zeta, alpha, new.terms.gradient, new.prior_precision, d, dzeta, dalpha, dy
        )
        live = ~state.done
        moved = live & accept
        finished = moved & (next_slope <= DECREMENT_TOL)
        # the last, tiny Newton step is taken: it squares what is left of the error
        last = jnp.where(finished, 1.0, 0.0)[:, None]

        def pick(a, b):
            return jnp.where(moved[:, None], a, b)

        return _State(
            pick(zeta + last * dzeta, state.zeta),
            pick(alpha + last * dalpha, state.alpha),
            pick(y + last * dy, state.y),
            pick(dzeta, state.dzeta),
            pick(dalpha, state.dalpha),
            pick(dy, state.dy),
            jnp.where(moved, jnp.maximum(next_slope, 0.0), state.slope),
            jnp.where(moved, 1.0, jnp.where(live, cut, state.step)),
            state.done | finished,
            state.n_iter + 1,
        )

    state = jax.lax.while_loop(lambda s: jnp.any(~s.done) & (s.n_iter < MAX_NEWTON), body, state)
    return Mode(state.zeta, state.alpha, state.y, state.slope, state.done, state.n_iter)

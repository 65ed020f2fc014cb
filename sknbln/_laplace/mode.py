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

#: a cell takes its last step when the Newton decrement (twice the expected gain, nats) is sure to be below
#: this after it
LAST_STEP = 1e-18
#: and has converged when the decrement that is found there is below this
DECREMENT_TOL = 1e-9
MAX_NEWTON = 100
#: no step changes a log-rate by more than this, nats: where the curvature is next to nothing, the quadratic
#: model has its maximum thousands of nats away, and the way back is long
FARTHEST = 10.0
GENE_STEPS = 2  # of each gene given the scores, before the first step of all


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
    """The Newton system at one point."""

    terms: tuple
    den: jnp.ndarray  # 1 + d a
    b: jnp.ndarray  # a / den
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
    """Expand the likelihood at ``y``."""
    k = params.loadings.shape[1]
    scales = lowrank.column_scale(cells.scale, k)
    prior_precision = lowrank.column_scale(cells.precision, k)
    terms = channel_terms(cells.counts, y, params.phi[None, :])
    den = 1.0 + params.noise[None, :] * terms.curvature
    b = terms.curvature / den
    pairs = lowrank.pair_products(lowrank.with_capture(params.loadings))
    M = lowrank.precision_matrix(b, pairs, scales, prior_precision)
    return Linearization(terms, den, b, lowrank.cholesky(M), scales, prior_precision)


def lift(params, scales, zeta):
    """``F zeta``: what scores and capture deviation do to the log-rates, (n_cells, n_genes)."""
    return (zeta * scales) @ lowrank.with_capture(params.loadings).T


def _project(lin, params, x):
    """``F' x`` in the units of zeta, (n_cells, k + 1)."""
    return (x @ lowrank.with_capture(params.loadings)) * lin.scales


class _State(NamedTuple):
    zeta: jnp.ndarray
    alpha: jnp.ndarray
    dzeta: jnp.ndarray  # Newton direction
    dalpha: jnp.ndarray
    slope: jnp.ndarray  # directional derivative at the iterate
    step: jnp.ndarray
    done: jnp.ndarray
    n_iter: jnp.ndarray


def _first_solution(cells, params, y):
    """Zeta and alpha that solve the system expanded at any ``y``."""
    lin = linearize(cells, params, y)
    h = y - location(cells, params)
    v = (lin.terms.curvature * h + lin.terms.gradient) / lin.den
    zeta = lowrank.solve(lin.L, _project(lin, params, v))
    return zeta, v - lin.b * lift(params, lin.scales, zeta)


def _direction(cells, params, lin, zeta, alpha):
    """Newton direction at (zeta, alpha), where ``lin`` was made, the slope along it and its change of y.

    With ``e = (g - alpha) / den``, what is missing of the genes' own equations: ``M dzeta = F' (alpha + e)
    - P zeta`` and ``dalpha = e - b F dzeta``; the slope is ``dzeta' M dzeta + sum d den e^2``.
    """
    e = (lin.terms.gradient - alpha) / lin.den
    rhs = _project(lin, params, alpha + e) - lin.prior_precision * zeta
    dzeta = lowrank.solve(lin.L, rhs)
    lifted = lift(params, lin.scales, dzeta)
    dalpha = e - lin.b * lifted
    slope = jnp.sum(dzeta * rhs, 1) + jnp.sum(params.noise[None, :] * lin.den * e**2, 1)
    return dzeta, dalpha, slope, lifted + params.noise[None, :] * dalpha


def _first_point(cells, params, zeta):
    """Where to expand first: near each gene's own mode given the scores.

    Given the scores the genes are independent: a step of each costs less than one of all together.
    """
    k = params.loadings.shape[1]
    F = lowrank.with_capture(params.loadings)
    centre = location(cells, params) + (zeta * lowrank.column_scale(cells.scale, k)) @ F.T
    d, y = params.noise[None, :], centre
    for _ in range(GENE_STEPS):
        terms = channel_terms(cells.counts, y, params.phi[None, :])
        step = (d * terms.gradient - (y - centre)) / (1.0 + d * terms.curvature)
        y = y + jnp.clip(step, -2.0, 2.0)
    return y


def _reach(move):
    """The largest change of a log-rate by a step, and the share of it that stays below `FARTHEST`."""
    largest = jnp.max(jnp.abs(move), 1)
    return largest, FARTHEST / jnp.maximum(largest, FARTHEST)


def _left_after(decrement, largest):
    """An upper bound of the decrement after a full Newton step.

    The curvature's derivative is at most the curvature itself. So what a step of ``m`` nats leaves of
    a gene's gradient is at most ``a m^2 e^m / 2``, and of the decrement at most ``(m e^{1.5 m} / 2)^2``.
    """
    m = jnp.minimum(largest, FARTHEST)
    return decrement * (0.5 * m * jnp.exp(1.5 * m)) ** 2


def find_mode(cells, params, zeta):
    """Damped Newton from the scores ``zeta`` (n_cells, k + 1), one `while_loop` for the batch.

    A step is accepted when the slope along it has not turned below minus a quarter of what it was
    (the objective is concave, so along the step it rises while the slope is positive); otherwise
    the step is cut by the secant rule. The decision uses gradients only: no cancellation, no
    logarithms. No step changes a log-rate by more than `FARTHEST`. Cells stop one by one and do not
    influence each other.

    Returns the :class:`Mode` and the :class:`Linearization` there.
    """
    d = params.noise[None, :]
    loc, scales = location(cells, params), lowrank.column_scale(cells.scale, zeta.shape[1] - 1)
    start = zeta
    zeta, alpha = _first_solution(cells, params, _first_point(cells, params, start))
    move = lift(params, scales, zeta - start) + d * alpha
    share = _reach(move)[1][:, None]
    zeta, alpha = start + share * (zeta - start), share * alpha
    zero = jnp.zeros_like(cells.offset)
    state = _State(
        zeta,
        alpha,
        jnp.zeros_like(zeta),
        jnp.zeros_like(alpha),
        zero + 1e300,
        zero,
        cells.weight <= 0,
        jnp.zeros((), jnp.int32),
    )

    def body(state):
        t = jnp.where(state.done, 0.0, state.step)[:, None]
        zeta = state.zeta + t * state.dzeta
        alpha = state.alpha + t * state.dalpha
        lin = linearize(cells, params, loc + lift(params, scales, zeta) + d * alpha)
        gradient = lin.terms.gradient
        slope = jnp.sum(d * (gradient - alpha) * state.dalpha, 1) + jnp.sum(
            (_project(lin, params, gradient) - lin.prior_precision * zeta) * state.dzeta, 1
        )
        accept = slope >= -0.25 * state.slope
        secant = state.step * state.slope / jnp.maximum(state.slope - slope, 1e-300)
        cut = jnp.clip(secant, 0.1 * state.step, 0.7 * state.step)
        dzeta, dalpha, next_slope, move = _direction(cells, params, lin, zeta, alpha)
        largest, full = _reach(move)
        live = ~state.done
        moved = live & accept
        finished = moved & (_left_after(next_slope, largest) <= LAST_STEP)
        last = jnp.where(finished, 1.0, 0.0)[:, None]

        def pick(a, b):
            return jnp.where(moved[:, None], a, b)

        return _State(
            pick(zeta + last * dzeta, state.zeta),
            pick(alpha + last * dalpha, state.alpha),
            pick(dzeta, state.dzeta),
            pick(dalpha, state.dalpha),
            jnp.where(moved, next_slope, state.slope),
            jnp.where(moved, full, jnp.where(live, cut, state.step)),
            state.done | finished,
            state.n_iter + 1,
        )

    state = jax.lax.while_loop(lambda s: jnp.any(~s.done) & (s.n_iter < MAX_NEWTON), body, state)
    y = loc + lift(params, scales, state.zeta) + d * state.alpha
    lin = linearize(cells, params, y)
    _, _, decrement, _ = _direction(cells, params, lin, state.zeta, state.alpha)
    decrement = jnp.where(cells.weight > 0, decrement, 0.0)  # padding is not solved
    converged = state.done & (decrement <= DECREMENT_TOL)
    return Mode(state.zeta, state.alpha, y, decrement, converged, state.n_iter), lin

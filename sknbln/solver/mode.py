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
from .channel import channel_terms, terms_at

#: nothing is left of a Newton decrement below this, nats: what a mode is found to unless less is asked for
LAST_STEP = 1e-18
#: and has converged when the decrement that is found there is below this
DECREMENT_TOL = 1e-9
MAX_NEWTON = 100
#: no step changes a log-rate by more than this, nats: where the curvature is next to nothing, the quadratic
#: model has its maximum thousands of nats away, and the way back is long
FARTHEST = 10.0
GENE_STEPS = 4  # of each gene given the scores, before the first step of all
GENE_REACH = 2.0  # nats, at most by one of them
GENE_HIGHEST = 60.0  # log-rate in them, whose exponential is finite in single precision


class Linearization(NamedTuple):
    """The Newton system at one point."""

    terms: tuple
    den: jnp.ndarray  # 1 + d a
    rest: jnp.ndarray  # 1 / den
    b: jnp.ndarray  # a / den
    L: jnp.ndarray  # Cholesky factor of M
    scales: jnp.ndarray
    prior_precision: jnp.ndarray


class Mode(NamedTuple):
    """Modes of a batch of cells."""

    zeta: jnp.ndarray  # (n_cells, k + 1)
    alpha: jnp.ndarray  # (n_cells, n_genes)
    y: jnp.ndarray  # (n_cells, n_genes)
    rate: jnp.ndarray  # (n_cells, n_genes) its exponential
    L: jnp.ndarray  # (n_cells, k + 1, k + 1) Cholesky factor of M there
    decrement: jnp.ndarray  # (n_cells,)
    converged: jnp.ndarray  # (n_cells,) bool
    n_iter: jnp.ndarray  # () steps of the batch


def location(cells, params):
    """Prior mean of y, (n_cells, n_genes)."""
    return params.mean[None, :] - cells.offset[:, None]


def log_rates(cells, params, factors, zeta, alpha):
    """``y = loc + F zeta + d alpha``, (n_cells, n_genes)."""
    scales = lowrank.column_scale(cells.scale, params.loadings.shape[1])
    lifted = factors.lift(zeta * scales)
    return location(cells, params) + lifted + params.noise[None, :] * alpha


def linearize(cells, params, y, factors=None):
    """Expand the likelihood at ``y``; ``factors`` are those of the loadings, if they are known."""
    factors = lowrank.Factors.of(params.loadings) if factors is None else factors
    lin = _expansion(cells, params, channel_terms(cells.counts, y, params.dispersion[None, :]))
    M = lowrank.precision_matrix(lin.b, factors, lin.scales, lin.prior_precision)
    return lin._replace(L=lowrank.cholesky(M))


def linearization_at(cells, params, mode):
    """What `linearize` says at a `Mode`, without what is known there."""
    terms = terms_at(cells.counts, mode.rate, params.dispersion[None, :])
    return _expansion(cells, params, terms)._replace(L=mode.L)


def _expansion(cells, params, terms):
    """The Newton system but for its Cholesky factor."""
    k = params.loadings.shape[1]
    den = 1.0 + params.noise[None, :] * terms.curvature
    scales, precision = (lowrank.column_scale(a, k) for a in (cells.scale, cells.precision))
    b = terms.curvature / den
    return Linearization(terms, den, 1.0 / den, b, None, scales, precision)


def _direction(params, factors, lin, zeta, alpha):
    """Newton direction at (zeta, alpha), where ``lin`` was made, the slope along it and its change of y.

    With ``e = (g - alpha) / den``, what is missing of the genes' own equations: ``M dzeta = F' (alpha + e)
    - P zeta`` and ``dalpha = e - b F dzeta``; the slope is ``dzeta' M dzeta + sum d den e^2``.
    """
    target = alpha + (lin.terms.gradient - alpha) / lin.den
    rhs = factors.project(target) * lin.scales - lin.prior_precision * zeta
    dzeta = lowrank.solve(lin.L, rhs)
    lifted = factors.lift(dzeta * lin.scales)
    e = target - alpha
    dalpha = e - lin.b * lifted
    slope = jnp.sum(dzeta * rhs, 1) + lowrank.row_sums(params.noise[None, :] * lin.den * e**2)
    return dzeta, dalpha, slope, lifted + params.noise[None, :] * dalpha


def _genes_alone(cells, params, centre):
    """Alpha near each gene's own mode given the scores, which put the log-rates at ``centre``.

    Given the scores the genes are independent: a step of each costs a tenth of one of all together. A start
    needs no more than single precision.
    """
    # the barrier has the conversions made once
    u, d, phi, centre = jax.lax.optimization_barrier(
        tuple(
            a.astype(jnp.float32)
            for a in (cells.counts, params.noise[None, :], params.dispersion[None, :], centre)
        )
    )
    alpha = jnp.zeros_like(centre)
    for _ in range(GENE_STEPS):
        terms = channel_terms(u, jnp.minimum(centre + d * alpha, GENE_HIGHEST), phi)
        step = (terms.gradient - alpha) / (1.0 + d * terms.curvature)
        alpha = alpha + step * (GENE_REACH / jnp.maximum(jnp.abs(d * step), GENE_REACH))
    return jnp.where(jnp.isfinite(alpha), alpha, 0.0).astype(cells.counts.dtype)


def _largest(move):
    """A bound of the largest change of a log-rate by a step, (n_cells,).

    The norm of order 16, at most 1.6 times the largest of 2,000: its sum is a product with ones, which takes
    a tenth of the time of a maximum.
    """
    return lowrank.row_sums((move**2) ** 8) ** (1 / 16)


def _left_after(decrement, largest):
    """An upper bound of the decrement after a full Newton step.

    The curvature's derivative is at most the curvature itself. So what a step of ``m`` nats leaves of
    a gene's gradient is at most ``a m^2 e^m / 2``, and of the decrement at most ``(m e^{1.5 m} / 2)^2``.
    """
    m = jnp.minimum(largest, FARTHEST)
    return decrement * (0.5 * m * jnp.exp(1.5 * m)) ** 2


def _start(cells, params, factors, zeta):
    """A `Mode` at the start of the iteration, of which no system is made yet, and the state of its search.

    Until the end of the iteration ``converged`` says which cells are done.
    """
    centre = log_rates(cells, params, factors, zeta, jnp.zeros_like(cells.counts))
    alpha = _genes_alone(cells, params, centre)
    zero, nowhere = jnp.zeros_like(cells.offset), jnp.zeros_like(centre)
    n, size = zeta.shape
    mode = Mode(
        zeta=zeta,
        alpha=alpha,
        y=centre + params.noise[None, :] * alpha,
        rate=nowhere,
        L=jnp.zeros((n, size, size)),
        decrement=zero,
        converged=cells.weight <= 0,
        n_iter=jnp.full((), -1, jnp.int32),  # the first iteration takes no step
    )
    search = dict(
        dzeta=jnp.zeros_like(zeta),  # Newton direction, from where the last step was accepted
        dalpha=nowhere,
        dy=nowhere,
        slope=zero,  # derivative of the objective along the direction, there
        length=zero,  # how far along the direction the cell is
        step=zero,  # how much further it goes next; below 0 it goes back
        reach=zero + FARTHEST,  # largest change of a log-rate by the next step, nats
        last=jnp.zeros(n, bool),  # whether the next step is the last
    )
    return mode, search


def _iterate(cells, params, factors, last_step, mode, search):
    """One step of every cell that is not done, and what it does next."""
    d = params.noise[None, :]
    t = jnp.where(mode.converged, 0.0, search["step"])[:, None]
    zeta = mode.zeta + t * search["dzeta"]
    alpha = mode.alpha + t * search["dalpha"]
    y = mode.y + t * search["dy"]
    lin = linearize(cells, params, y, factors)
    slope = lowrank.row_sums(lin.terms.gradient * search["dy"] - d * alpha * search["dalpha"])
    slope = slope - jnp.sum(lin.prior_precision * zeta * search["dzeta"], 1)
    before = search["slope"]
    accept = search["last"] | (slope >= -0.25 * before)
    length = search["length"] + t[:, 0]
    secant = length * before / jnp.maximum(before - slope, 1e-300)
    cut = jnp.clip(secant, 0.1 * length, 0.7 * length)
    dzeta, dalpha, decrement, dy = _direction(params, factors, lin, zeta, alpha)
    largest = _largest(dy)
    far = (mode.n_iter >= 0) & (slope >= 0.5 * before)
    reach = jnp.where(far, 2.0 * search["reach"], FARTHEST)
    there = accept[:, None]
    done = mode.converged | search["last"]
    n_iter = mode.n_iter + 1
    mode = Mode(zeta, alpha, y, lin.terms.rate, lin.L, decrement, done, n_iter)
    search = dict(
        dzeta=jnp.where(there, dzeta, search["dzeta"]),
        dalpha=jnp.where(there, dalpha, search["dalpha"]),
        dy=jnp.where(there, dy, search["dy"]),
        slope=jnp.where(accept, decrement, before),
        length=jnp.where(accept, 0.0, length),
        step=jnp.where(accept, reach / jnp.maximum(largest, reach), cut - length),
        reach=reach,
        last=accept & (_left_after(decrement, largest) <= last_step),
    )
    return mode, search


def find_mode(cells, params, zeta, last_step=LAST_STEP, factors=None):
    """Damped Newton from the scores ``zeta`` (n_cells, k + 1), one `while_loop` for the batch.

    A cell is done when its Newton decrement (twice what there is to gain, nats) is sure to be below
    ``last_step``.

    A step is accepted when the slope along it has not turned below minus a quarter of what it was
    (the objective is concave, so along the step it rises while the slope is positive); otherwise
    the step is cut by the secant rule. The decision uses gradients only: no differences of
    objectives, no logarithms. No step changes a log-rate by more than `FARTHEST`, nor by more than twice
    the last one where that had half of its slope left. Cells stop one by one and do not influence each
    other; where the loop ends, the system is that of the point where each cell is.

    Returns the :class:`Mode`.
    """
    factors = lowrank.Factors.of(params.loadings) if factors is None else factors

    def unfinished(state):
        mode, _ = state
        return (mode.n_iter < 0) | jnp.any(~mode.converged) & (mode.n_iter < MAX_NEWTON)

    def body(state):
        return _iterate(cells, params, factors, last_step, *state)

    mode, _ = jax.lax.while_loop(unfinished, body, _start(cells, params, factors, zeta))
    decrement = jnp.where(cells.weight > 0, mode.decrement, 0.0)  # padding is not solved
    converged = mode.converged & (decrement <= jnp.maximum(DECREMENT_TOL, last_step))
    return mode._replace(decrement=decrement, converged=converged)

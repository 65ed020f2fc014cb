r"""The mode of one cell's log-rates: damped Newton, all cells of a batch together.

With ``y = x - eta`` and capture as one more factor, cell c has the prior

.. math:: y_c \sim N(\mu + B c_c + o_c - m_c 1,\; W W' + s_c^2 1 1' + \mathrm{diag}(d))

where the covariates ``c_c`` and the log-exposures ``o_c`` of the cell are known.

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

#: default tolerance of the Newton decrement, nats: nothing is left to gain below it
LAST_STEP = 1e-18
#: a cell has converged when its Newton decrement at the end is below this, nats
DECREMENT_TOL = 1e-9
MAX_NEWTON = 100  # steps of a batch
#: largest change of a log-rate by the first step, nats: where the curvature is next to nothing, the quadratic
#: model has its maximum thousands of nats away, and the way back is long
FARTHEST = 10.0
_LARGEST_SINGLE = 100.0  # nats
GENE_STEPS = 4  # steps of each gene alone, at fixed scores, before the first Newton step
GENE_REACH = 2.0  # largest change of a log-rate by one of them, nats


class Linearization(NamedTuple):
    """The Newton system of each cell, from the likelihood expanded at its log-rates."""

    terms: tuple  # `ChannelTerms`
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
    rate: jnp.ndarray  # (n_cells, n_genes) exp(y)
    L: jnp.ndarray  # (n_cells, k + 1, k + 1) Cholesky factor of M at y
    decrement: jnp.ndarray  # (n_cells,) Newton decrement at y, nats
    converged: jnp.ndarray  # (n_cells,) bool
    n_iter: jnp.ndarray  # () number of steps of the batch


def location(cells, params):
    """Prior mean of y, (n_cells, n_genes)."""
    loc = params.mean[None, :] - cells.offset[:, None]
    if cells.design.shape[1]:
        loc = loc + cells.design @ params.coef.T
    return loc + cells.exposure if cells.exposure.shape[1] else loc


def log_rates(cells, params, factors, zeta, alpha):
    """``y = loc + F zeta + d alpha``, (n_cells, n_genes)."""
    scales = lowrank.column_scale(cells.scale, params.loadings.shape[1])
    lifted = factors.lift(zeta * scales)
    return location(cells, params) + lifted + params.noise[None, :] * alpha


def linearize(cells, params, y, factors=None):
    """The `Linearization` at log-rates ``y``; ``factors`` saves computing those of the loadings again."""
    factors = lowrank.Factors.of(params.loadings) if factors is None else factors
    lin = _expansion(cells, params, channel_terms(cells.counts, y, params.dispersion[None, :]))
    M = lowrank.precision_matrix(lin.b, factors, lin.scales, lin.prior_precision)
    return lin._replace(L=lowrank.cholesky(M))


def linearization_at(cells, params, mode):
    """The `Linearization` at a `Mode`, from the rate and the Cholesky factor that it holds."""
    terms = terms_at(cells.counts, mode.rate, params.dispersion[None, :])
    return _expansion(cells, params, terms)._replace(L=mode.L)


def _expansion(cells, params, terms):
    """The `Linearization` without its Cholesky factor."""
    k = params.loadings.shape[1]
    den = 1.0 + params.noise[None, :] * terms.curvature
    scales, precision = (lowrank.column_scale(a, k) for a in (cells.scale, cells.precision))
    b = terms.curvature / den
    return Linearization(terms, den, 1.0 / den, b, None, scales, precision)


def _direction(params, factors, lin, zeta, alpha):
    """Newton direction at (zeta, alpha): in both, the slope along it, and its change of y.

    ``lin`` is the `Linearization` there. With ``e = (g - alpha) / den``, the residual of the genes' own
    equations: ``M dzeta = F' (alpha + e)
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
    """Alpha near each gene's own mode at fixed scores; ``centre`` are the log-rates with alpha 0.

    At fixed scores the genes are independent, and a step costs a tenth of a step of all parameters. Single
    precision is enough for a start.
    """
    # the barrier makes XLA convert once, and not in every step
    u, d, phi, centre = jax.lax.optimization_barrier(
        tuple(
            a.astype(jnp.float32)
            for a in (cells.counts, params.noise[None, :], params.dispersion[None, :], centre)
        )
    )
    alpha = jnp.zeros_like(centre)
    for _ in range(GENE_STEPS):
        terms = channel_terms(u, centre + d * alpha, phi)
        step = (terms.gradient - alpha) / (1.0 + d * terms.curvature)
        alpha = alpha + step * (GENE_REACH / jnp.maximum(jnp.abs(d * step), GENE_REACH))
    return jnp.where(jnp.isfinite(alpha), alpha, 0.0).astype(cells.counts.dtype)


def _largest(move):
    """An upper bound of each cell's largest change of a log-rate, (n_cells,).

    It is the norm of order 16, at most 1.6 times the maximum over 2,000 genes. Its sum is a matrix product,
    which takes a tenth of the time of a maximum. In single precision a change counts as at most
    `_LARGEST_SINGLE`, whose power is finite.
    """
    if move.dtype == jnp.float32:
        move = jnp.clip(move, -_LARGEST_SINGLE, _LARGEST_SINGLE)
    return lowrank.row_sums((move**2) ** 8) ** (1 / 16)


def _left_after(decrement, largest):
    """An upper bound of the Newton decrement after a full step whose largest change is ``largest``.

    The derivative of the curvature a is at most the curvature itself. So after a step of ``m`` nats a gene's
    gradient is at most ``a m^2 e^m / 2``, and the decrement at most ``(m e^{1.5 m} / 2)^2`` of what it was.
    """
    m = jnp.minimum(largest, FARTHEST)
    return decrement * (0.5 * m * jnp.exp(1.5 * m)) ** 2


def _start(cells, params, factors, zeta):
    """The `Mode` and the line search with which the iteration starts.

    No Newton system has been solved yet. During the iteration ``converged`` marks the cells that are done.
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
        L=jnp.zeros((n, size, size), zeta.dtype),
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
    """One step of every cell that is not done: its new `Mode` and line search."""
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
    secant = length * before / jnp.maximum(before - slope, jnp.finfo(slope.dtype).tiny)
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
    """The `Mode` of each cell, by damped Newton steps of the whole batch in one `while_loop`.

    The iteration starts from the scores ``zeta`` (n_cells, k + 1). A cell is done when its Newton decrement
    (twice the gain still possible, nats) is sure to be below ``last_step``.

    A step is accepted unless the slope along it has turned below minus a quarter of its value at the start
    (the objective is concave, so it rises while the slope is positive); otherwise the step is cut by the
    secant rule. The decision uses gradients only: no differences of objectives, no logarithms. A step
    changes a log-rate by at most `FARTHEST`, and this bound doubles after each step that ends with half of
    its slope left. Cells do not influence each other, and stop one by one. The Cholesky factor is that of
    the cell's last point.
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

r"""Variational posterior of the NBVCP model: the NumPyro model, its guide, the loop.

The model is

.. math:: \log m_g \sim N(a_g, b_g^2), \quad \log r_g \sim N(a'_g, b_g'^2), \quad
          B_{gj} \sim N(0, s_B^2), \quad
          \eta_c \sim \mathrm{TruncNormal}(\mathrm{loc}_c, s_c, 0), \quad
          u_{cg} \sim NB(m_g e^{B_g c_c + o_{cg} - \eta_c}, r_g)

with the covariates ``c_c`` and log-exposures ``o`` of a row. The log-likelihood is split. The terms linear in
the counts and the gamma functions are sums over the whole matrix, exact from row totals, column totals and
the distinct counts of each gene; only ``(u + r) log(1 + m e^{B c + o - eta} / r)`` is from a minibatch.
That removes most of the noise and nearly all gamma functions. ``tests/test_svi.py`` compares the result with
NumPyro's own ``NegativeBinomial2``.

In the guide all parameters are independent but for one direction. A common shift of all log m and all eta
leaves the likelihood unchanged: only the priors determine it, so that its standard deviation ``sigma`` is
large beside the conditional ones of single parameters. With ``f`` the likelihood's share of a parameter's
precision,

.. math:: \log m \sim N(l, \mathrm{diag}(s_g^2) + \sigma^2 f f'), \quad
          \eta_c \mid \log m \sim \mathrm{TruncNormal}(l_c + f_c t, s_c, 0), \quad
          t = \frac{\sum_g f_g (\log m_g - l_g) / s_g^2}{\sum_g f_g^2 / s_g^2}

and log r is normal. This is exact for a Gaussian posterior whose information factorizes over cells and
genes. ``sigma`` and ``f`` come from the curvature at the maximum and stay fixed. Locations and scales are
optimized in units of the standard deviations from the curvature, so that one learning rate suits all.

The resulting scale of log r is conditional on the offsets. The information in log r that is lost because the
offsets are unknown, with posterior variances ``v_c``, is computed at the maximum (Louis 1982),

.. math:: \sum_c v_c \left( \frac{\partial^2 \log p(u_{cg})}
          {\partial \eta_c \, \partial \log r_g} \right)^2

and the marginal scale is wider by the square root of the share that is left. So are the scales of the
coefficients B, by the shares of their information that are left where the gene's mean and its other
coefficients are unknown.
"""

import threading
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax.scipy.special import gammaln
from numpyro.infer.util import log_density

from ._blocks import as_rows
from ._jax import compiled_once, float64
from ._known import NO_WEIGHT
from .solver.channel import log1p_of_positive
from .solver.objective import COEF_PRIOR_SCALE

#: rows per step; independent of the estimator's batch_size, which only sets memory
MINIBATCH = 256
WINDOW = 50  # steps over which losses and iterates are averaged
#: parts of the guide that are optimized
_MOVING = "log_mean", "log_dispersion", "coef", "capture_offset"
_MOST_TRUNCATED = 30.0  # standard deviations by which a location may lie below the bound 0
_ADAM = optax.scale_by_adam()
#: held while NumPyro traces: its stack of effect handlers is one list for all threads
_TRACING = threading.Lock()


class Problem(NamedTuple):
    """Priors and sums of the counts: everything that is the same in every step."""

    mean_prior: tuple  # loc, scale of log m, (n_genes,) each
    dispersion_prior: tuple  # loc, scale of log r, (n_genes,) each
    row_prior: tuple  # loc, scale of the capture offset, (n_cells,) each
    row_totals: np.ndarray  # (n_cells,)
    column_totals: np.ndarray  # (n_genes,)
    gene: np.ndarray  # (n_distinct,) of each distinct count of a gene: the gene,
    value: np.ndarray  # its value,
    times: np.ndarray  # and how often it occurs
    log_factorials: float
    n_cells: float
    coef_totals: np.ndarray | None = None  # (n_genes, p) sums of counts times covariates
    exposure_total: float = 0.0  # sum of counts times log-exposures


class Guide(NamedTuple):
    """Parameters of the guide; scales are conditional on the common shift, offsets are truncated at 0."""

    log_mean: tuple  # loc, scale, (n_genes,) each
    log_dispersion: tuple
    capture_offset: tuple | None  # loc, scale, (n_cells,) each; None without a capture model
    common_shift: tuple  # f of each log m, (n_genes,), and sigma
    dispersion_known: np.ndarray  # (n_genes,) share of the information in log r that is left
    #: loc, scale of the coefficients, (n_genes, p) each; None without covariates
    coef: tuple | None = None
    #: (n_genes, p) share of the information in them that is left; None without covariates
    coef_known: np.ndarray | None = None

    @property
    def coef_mean(self):
        """Locations of the coefficients, (n_genes, p)."""
        return np.zeros((self.log_mean[0].size, 0)) if self.coef is None else self.coef[0]

    @property
    def coef_scale(self):
        """Marginal standard deviations of the coefficients, (n_genes, p)."""
        return self.coef_mean if self.coef is None else self.coef[1] / np.sqrt(self.coef_known)

    @property
    def log_mean_scale(self):
        """Marginal standard deviations of log m, (n_genes,)."""
        share, sigma = self.common_shift
        return np.sqrt(self.log_mean[1] ** 2 + (sigma * share) ** 2)

    @property
    def log_dispersion_scale(self):
        """Marginal standard deviations of log r, (n_genes,)."""
        return self.log_dispersion[1] / np.sqrt(self.dispersion_known)

    def capture_offset_scale(self, prior_scale):
        """Marginal standard deviations of the offsets before truncation, (n_cells,)."""
        share, sigma = self.common_shift
        variance = sigma**2 + 1.0 / np.sum((share / self.log_mean[1]) ** 2)
        scale = self.capture_offset[1]
        return np.sqrt(scale**2 + variance * likelihood_share(scale, prior_scale) ** 2)


def random_numbers(rng, n_genes, n_rows, p=0):
    """Random numbers for one draw of the guide, by site: standard normal, uniform for the offsets.

    From a RandomState: JAX's generators in the compiled step would take longer than the rest of it.
    """
    normal = rng.standard_normal((2 + p) * n_genes + 1)
    uniform = np.maximum(rng.random_sample(n_rows), np.finfo(float).tiny)  # above 0 and below 1
    return {
        "common_shift": normal[0],
        "log_mean": normal[1 : n_genes + 1],
        "log_dispersion": normal[n_genes + 1 : 2 * n_genes + 1],
        "coef": normal[2 * n_genes + 1 :].reshape(n_genes, p),
        "capture_offset": uniform,
    }


def likelihood_share(scale, prior_scale):
    """Share of the likelihood in the precision of a normal posterior, between 0 and 1."""
    return (1.0 - (scale / prior_scale) ** 2).clip(0.0)


def shift_of(deviation, scale, share):
    """The common shift by least squares, from deviations of log m (..., n_genes) from their locations."""
    weight = share / scale**2
    return (deviation @ weight) / (share @ weight)


def model(problem, start, rows, counts, weight, noise, has_capture, known=None):
    """NumPyro model of a minibatch: rows, their dense counts, weights (0 for padding), and what is known.

    ``known`` are the covariates and log-exposures of the minibatch, a `Known`; None without any.
    """
    log_mean = numpyro.sample("log_mean", dist.Normal(*problem.mean_prior).to_event(1))
    log_r = numpyro.sample("log_dispersion", dist.Normal(*problem.dispersion_prior).to_event(1))
    scale = problem.n_cells / jnp.sum(weight)  # n_cells is the sum of the rows' weights
    linear = jnp.sum(problem.column_totals * log_mean)
    capture = jnp.ones_like(weight)
    if has_capture:
        loc, sd = (p[rows] for p in problem.row_prior)
        with _of_rows(scale, weight), numpyro.plate("cells", rows.shape[0]):
            eta = numpyro.sample("capture_offset", dist.TruncatedNormal(loc, sd, low=0.0))
        capture = jnp.exp(-eta)
        linear = linear - scale * jnp.sum(weight * problem.row_totals[rows] * eta)
    r = jnp.exp(log_r)
    odds = capture[:, None] * jnp.exp(log_mean - log_r)[None, :]
    if known is not None:
        shift = known.exposure if known.exposure.shape[1] else jnp.zeros_like(weight)[:, None]
        if start.coef is not None:
            prior = dist.Normal(jnp.zeros_like(start.coef[0]), COEF_PRIOR_SCALE)
            coef = numpyro.sample("coef", prior.to_event(2))
            linear = linear + jnp.sum(problem.coef_totals * coef)
            shift = shift + known.design @ coef.T
        linear = linear + problem.exposure_total
        odds = odds * jnp.exp(shift)
    batch = scale * jnp.sum(weight[:, None] * (counts + r[None, :]) * log1p_of_positive(odds))
    size = r[problem.gene]
    rising = gammaln(problem.value + size) - gammaln(size) - problem.value * log_r[problem.gene]
    constants = jnp.sum(problem.times * rising) - problem.log_factorials
    numpyro.factor("counts", linear - batch + constants)


def guide(problem, start, rows, counts, weight, noise, has_capture, known=None):
    """The guide in standardized coordinates around ``start`` (a `Guide`), with draws made of ``noise``."""
    mean, scale = _moved("log_mean", start.log_mean)
    share, sigma = start.common_shift
    normal = dist.LowRankMultivariateNormal(mean, (sigma * share)[:, None], scale**2)
    deviation = scale * noise["log_mean"] + sigma * share * noise["common_shift"]
    _draw("log_mean", normal, mean + deviation)
    shift = shift_of(deviation, scale, share)
    loc, scale = _moved("log_dispersion", start.log_dispersion)
    normal = dist.Normal(loc, scale).to_event(1)
    _draw("log_dispersion", normal, loc + scale * noise["log_dispersion"])
    if start.coef is not None:
        loc, scale = _moved("coef", start.coef)
        _draw("coef", dist.Normal(loc, scale).to_event(2), loc + scale * noise["coef"])
    if has_capture:
        loc, scale = (p[rows] for p in _moved("capture_offset", start.capture_offset))
        loc = loc + shift * likelihood_share(start.capture_offset[1], problem.row_prior[1])[rows]
        mini = weight.shape[0]
        factor = problem.n_cells / jnp.sum(weight)
        with _of_rows(factor, weight), numpyro.plate("cells", mini):
            truncated = dist.TruncatedNormal(loc, scale, low=0.0)
            _draw("capture_offset", truncated, truncated.icdf(noise["capture_offset"]))


@contextmanager
def _of_rows(scale, weight):
    """Sites of the rows of a minibatch, each ``scale`` times its weight in the objective."""
    there = weight > 0
    each = scale * jnp.where(there, weight, 1.0)
    with numpyro.handlers.scale(scale=each), numpyro.handlers.mask(mask=there):
        yield


def _draw(name, distribution, value):
    """A sample site with a fixed value."""
    with numpyro.handlers.substitute(data={name: value}):
        numpyro.sample(name, distribution)


def _moved(name, start):
    loc, scale = start
    shift = numpyro.param(f"{name}_shift", jnp.zeros_like(loc))
    log_scale = numpyro.param(f"{name}_log_scale", jnp.zeros_like(loc))
    return loc + scale * shift, scale * jnp.exp(log_scale)


@compiled_once
@jax.jit
def _step(params, average, state, learning_rate, decay, problem, start, batch, known):
    has_capture = start.capture_offset is not None

    def loss(p):
        # not by NumPyro's Trace_ELBO, which adds up a set of names, in an order that differs between
        # processes: last digits would differ, and JAX's cache would not find the compiled step
        args = problem, start, *batch, has_capture, known
        with _TRACING:
            of_guide, trace = log_density(guide, args, {}, p)
            of_model, _ = log_density(numpyro.handlers.replay(model, trace), args, {}, p)
        return of_guide - of_model

    value, grads = jax.value_and_grad(loss)(params)
    updates, state = _ADAM.update(grads, state, params)
    params = jax.tree.map(lambda p, u: p - learning_rate * u, params, updates)
    average = jax.tree.map(lambda a, p: a + decay * (p - a), average, params)
    return params, average, state, value / problem.n_cells


def _minibatches(X, rng, weights=None):
    """Minibatches without end, each row at most once in an epoch: (rows, dense counts, weight).

    Rows of weight 0 are in none.
    """
    X, weights = as_rows(X), np.ones(X.shape[0]) if weights is None else weights
    used = np.flatnonzero(weights > NO_WEIGHT)
    n = used.size
    size = min(MINIBATCH, -(-n // 64) * 64)
    pool = size * max(X.chosen_at_once // size, 1)
    while True:
        order = used[rng.permutation(n)]
        for start in range(0, n, size):
            rows = order[start : start + size]
            if rows.size < size and start:
                break  # an incomplete minibatch is left out
            at = start % pool
            if at == 0:
                ahead = X.chosen(order[start : start + pool]).in_memory()
            counts = np.zeros((size, X.shape[1]))
            ahead.block(slice(at, at + rows.size)).toarray(out=counts[: rows.size])
            weight = np.zeros(size)
            weight[: rows.size] = weights[rows]
            yield np.concatenate([rows, np.zeros(size - rows.size, rows.dtype)]), counts, weight


def _bucketed(problem, start):
    """Problem and start with array lengths rounded up, so that folds share one compiled step.

    Padding rows are in no minibatch, padding counts occur 0 times.
    """
    distinct = 4096 * -(-max(problem.value.size, 1) // 4096)
    rows = 64 * -(-problem.row_totals.size // 64)

    def longer(a, size, value):
        return np.concatenate([a, np.full(size - a.size, value, a.dtype)])

    def offsets(loc, scale):
        # NumPyro's truncated normal underflows where the bound is 38 standard deviations away; at 30 all
        # its mass is at the bound already
        loc = np.maximum(loc, -_MOST_TRUNCATED * scale)
        return longer(loc, rows, 1.0), longer(scale, rows, 1.0)

    problem = problem._replace(
        row_prior=offsets(*problem.row_prior),
        row_totals=longer(problem.row_totals, rows, 0.0),
        gene=longer(problem.gene, distinct, 0),
        value=longer(problem.value, distinct, 1.0),
        times=longer(problem.times, distinct, 0.0),
    )
    if start.capture_offset is not None:
        start = start._replace(capture_offset=offsets(*start.capture_offset))
    return problem, start


def resumed(start, previous):
    """``start``, with log m and log r of a previous guide for genes where they are still near.

    A gene whose maximum has moved by more than 3 standard deviations, because the rows or the prior have
    changed, starts anew. So do all offsets, which belong to rows.
    """
    kept = {}
    for name in ("log_mean", "log_dispersion", "coef"):
        if getattr(start, name) is None:
            continue
        (loc, scale), (old_loc, old_scale) = getattr(start, name), getattr(previous, name)
        near = np.abs(old_loc - loc) <= 3.0 * np.minimum(scale, old_scale)
        kept[name] = np.where(near, old_loc, loc), np.where(near, old_scale, scale)
    return start._replace(**kept)


def _sum(losses, shifts):
    """Losses plus shifts, on the host; adding to each loss as it comes would wait for every step."""
    n = min(len(losses), len(shifts))
    return np.asarray(losses[:n], float) + np.asarray(shifts[:n], float)


class Fit(NamedTuple):
    """Result of the loop."""

    guide: Guide
    losses: np.ndarray  # minus the ELBO in nats per cell, one per step
    converged: bool
    reason: str  # why the loop ended
    interrupted: bool  # by Ctrl-C; `guide` is that of the last complete step
    stopped: bool  # by what watched


@float64
def fit(X, problem, start, baseline, *, n_steps, learning_rate, tol, rng, watch=None, known=None):
    """Maximize the ELBO from `start` by Adam; the posterior is the average of the last iterates.

    ``baseline`` (n_cells,) are the log-likelihoods of the rows at the start, a control variate that removes
    the choice of rows from the reported losses. The loop stops when the mean loss of a window of steps is
    below that of the window before by less than ``tol`` nats per cell, or by less than the standard error of
    the difference. ``watch.begin()`` is called before each window, ``watch.end(step, loss, guide)`` after it,
    with its mean loss and a function that makes the guide; where that is true, the loop stops. ``known`` are
    the covariates, log-exposures and weights of the rows, a `Known`; None without any.
    """
    n_cells = X.shape[0]
    weights = np.ones(n_cells) if known is None or known.weight is None else known.weight
    baseline_mean = np.average(baseline, weights=weights)
    known = None if known is None or known.is_nothing else known._replace(weight=None)
    problem, start = _bucketed(problem, start)
    moving = [name for name in _MOVING if getattr(start, name) is not None]
    p = start.coef_mean.shape[1]
    params = {}
    for name in moving:
        zero = np.zeros_like(getattr(start, name)[0])
        params |= {f"{name}_shift": zero, f"{name}_log_scale": zero}
    average, state = params, _ADAM.init(params)
    batches = _minibatches(X, rng, weights)
    losses, shifts, converged, interrupted, stopped = [], [], False, False, False
    reason = f"n_steps={n_steps} steps were done"
    try:
        for step in range(n_steps):
            if watch is not None and step % WINDOW == 0:
                watch.begin()
            decay = max(1.0 / (1.0 + step), 1.0 / WINDOW)
            rows, counts, weight = next(batches)
            params, average, state, loss = _step(
                params,
                average,
                state,
                learning_rate,
                decay,
                problem,
                start,
                (rows, counts, weight, random_numbers(rng, X.shape[1], rows.size, p)),
                None if known is None else known.chosen(rows).dense(),
            )
            own = weight[weight > 0]
            chosen = baseline[rows[weight > 0]] * (own / own.mean())
            losses.append(loss)
            if step:  # a step that waits holds its counts in memory: at most one does
                losses[-2].block_until_ready()
            shifts.append(chosen.mean() - baseline_mean)
            done = step + 1
            if done % WINDOW and done < n_steps:
                continue
            recent = _sum(losses[-2 * WINDOW :], shifts[-2 * WINDOW :])
            stop = watch is not None and watch.end(
                done, recent[-WINDOW:].mean(), partial(_at, start, moving, average, n_cells)
            )
            if done % WINDOW == 0 and done >= 2 * WINDOW:
                before, last = recent[:WINDOW], recent[WINDOW:]
                gain = before.mean() - last.mean()
                noise = np.sqrt((before.var(ddof=1) + last.var(ddof=1)) / WINDOW)
                if gain < max(tol, noise):
                    converged = True
                    reason = (
                        f"the smoothed ELBO rose by {gain:.2g} nats per cell in {WINDOW} steps, which is "
                        f"below tol={tol:g} or its noise ({noise:.2g})"
                    )
                    break
            if stop:
                stopped, reason = True, "a callback stopped it"
                break
    except KeyboardInterrupt:
        converged, interrupted, reason = False, True, "it was interrupted"
    guide = _at(start, moving, average, n_cells)
    return Fit(guide, _sum(losses, shifts), converged, reason, interrupted, stopped)


def _at(start, moving, params, n_cells):
    """The `Guide` at standardized parameters, without the padding of the rows."""
    fitted = {}
    for name in moving:
        loc, scale = getattr(start, name)
        shift, log_scale = (np.asarray(params[f"{name}_{what}"]) for what in ("shift", "log_scale"))
        fitted[name] = (loc + scale * shift, scale * np.exp(log_scale))
    if "capture_offset" in fitted:
        fitted["capture_offset"] = tuple(a[:n_cells] for a in fitted["capture_offset"])
    return start._replace(**fitted)

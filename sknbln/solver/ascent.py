"""The loop over sweeps: preconditioned quasi-Newton ascent that never lowers the objective.

The direction is that of limited-memory BFGS, by the two-loop recursion, with `metric.direction` as the
initial metric; with an empty memory it is that direction itself. A step that would lower the objective is
shortened until it does not. Where two trials of a quasi-Newton step are not enough, the memory is dropped.
"""

from functools import partial
from typing import NamedTuple

import numpy as np

from .column_priors import ColumnScales, next_scales
from .gauge import above_noise, column_information
from .line_search import change, search
from .metric import direction, product
from .objective import Objective, Point
from .params import Params

PLAIN_SWEEPS = (
    4  # sweeps that are not remembered: first steps say little of the curvature at the maximum
)
#: sweeps from each of several starts before one is chosen
LOOK_SWEEPS = 12
MEMORY = 8  # largest number of pairs
MAX_CUTS = 12  # trials of a step
MEMORY_CUTS = 2  # trials of a quasi-Newton step
#: a pair with less curvature than this fraction of the metric's is mixed with the metric's
LEAST_CURVATURE = 0.1
#: nats, of each gene: by the metric alone or without loadings, and by the memory, which knows little of the
#: curvature of few counts along many columns
LARGEST_STEP, LARGEST_MEMORY_STEP = 1.5, 0.75
SURE = 0.5  # most sweeps gain between half and twice their promise


class Outcome(NamedTuple):
    """The ascent after its last sweep."""

    objective: Objective  # the candidate that was kept
    point: Point
    #: values at the start and after each sweep of each stage (sweeps under one objective), nats per cell
    stages: list
    gain: float  # of the last sweep, nats per cell
    promised: float  # gain that the next sweep promises, nats per cell
    tol: float  # the least gain of a sweep, by the objective's magnitude
    converged: bool
    reason: str  # why the ascent ended; "" where it goes on
    columns: ColumnScales | None  # None without a prior of the loadings
    information: np.ndarray | None  # (k,) of the columns when they were selected, descending
    interrupted: bool = False  # by Ctrl-C
    stopped: bool = False  # by what watched

    @property
    def history(self):
        """Values at the start and after each sweep, nats per cell."""
        return self.stages[0] + [value for stage in self.stages[1:] for value in stage[1:]]

    def with_columns(self, k):
        """With columns of zeros up to k, where there are fewer."""
        x, missing = self.point.x, k - self.point.x.loadings.shape[1]
        if not missing:
            return self
        self.objective.rotate(np.eye(k - missing, k))
        x = x._replace(loadings=np.pad(x.loadings, ((0, 0), (0, missing))))
        return self._replace(point=self.point._replace(x=x))

    @property
    def n_iter(self):
        """Number of sweeps."""
        return sum(len(stage) - 1 for stage in self.stages)


class Tolerance(NamedTuple):
    """What a sweep must gain: the larger of a share of the objective and an amount for each parameter."""

    share: float  # of the objective's magnitude
    #: nats. Where counts are few and parameters many, the share alone asks for more than the rows can tell
    per_parameter: float = 0.0

    def relative(self, point, free, n_cells):
        """The least gain by the objective's magnitude, never below the rounding error of the objective."""
        n = sum(block.size for block, f in zip(point.gradient, free, strict=True) if f)
        nats = max(self.per_parameter * n, point.rounding)
        return max(self.share, nats / n_cells / magnitude(point.value, n_cells))


class _Stopped(Exception):
    """What watches the ascent asked it to stop."""


def magnitude(value, n_cells):
    """Magnitude of an objective, nats per cell, at least 1; `tol` is a fraction of it."""
    return max(abs(value) / n_cells, 1.0)


def _flat(blocks, free):
    return np.concatenate(
        [b.ravel() for b, f in zip(blocks, free, strict=True) if f] or [np.zeros(0)]
    )


def _unflat(x, like, free):
    out, start = [], 0
    for block, f in zip(like, free, strict=True):
        size = block.size if f else 0
        out.append(x[start : start + size].reshape(block.shape) if f else np.zeros_like(block))
        start += size
    return Params(*out)


class _Memory:
    """Pairs of a step and the change of the gradient (of minus the objective) along it."""

    def __init__(self):
        self.pairs = []

    def add(self, s, y, expected):
        """Remember a step s and the change y of the gradient; the metric expected the change ``expected``.

        Powell's damping: a y with next to no curvature along s, or negative curvature, would make the next
        step far too long, and is mixed with ``expected``.
        """
        least = LEAST_CURVATURE * float(s @ expected)
        sy = float(s @ y)
        if not least > 0:
            return
        if sy < least:
            share = (1.0 - LEAST_CURVATURE) * float(s @ expected) / float(s @ (expected - y))
            y = share * y + (1.0 - share) * expected
            sy = float(s @ y)
        self.pairs = [*self.pairs[-(MEMORY - 1) :], (s, y, sy)]

    def forget(self):
        """Drop all pairs."""
        self.pairs = []

    def rotate(self, rotation, like, free):
        """Rotate the pairs with the loadings, by a rotation (k, k)."""

        def rotated(a):
            blocks = _unflat(a, like, free)
            return _flat(blocks._replace(loadings=blocks.loadings @ rotation), free)

        self.pairs = [(rotated(s), rotated(y), sy) for s, y, sy in self.pairs]

    def direction(self, g, precondition):
        """Quasi-Newton direction by the two-loop recursion; ``precondition`` maps a gradient to a step."""
        q, alphas = g.copy(), []
        for s, y, sy in reversed(self.pairs):
            a = float(s @ q) / sy
            alphas.append(a)
            q -= a * y
        z = precondition(q)
        for (s, y, sy), a in zip(self.pairs, reversed(alphas), strict=True):
            z += (a - float(y @ z) / sy) * s
        return z


def ascend(candidates, free, *, n_cells, tol, max_iter, edges=None, column_prior=None, watch=None):
    """Maximize the objective.

    The ascent opens with a few sweeps where there is something to decide. Of several candidates that with the
    highest log-likelihood after `LOOK_SWEEPS` is kept: the priors do not count, which would decide between
    overdispersion in d and in r. Columns of the loadings that are noise are dropped after `PLAIN_SWEEPS`.

    Under a prior of the columns of the loadings every sweep is a stage of its own: before each the loadings
    are rotated to their singular basis, and the scales of the columns are updated there.

    Parameters
    ----------
    candidates : list of tuple (Objective, Params)
        Objectives, and coordinates of the start under each. An objective maps coordinates, and the penalty of
        the loadings if there is one, to a `Point`.
    free : Params of bool
        Which blocks are estimated.
    n_cells : int
        Number of cells, for values per cell.
    tol : float or Tolerance
        Relative tolerance. The ascent stops when two sweeps in a row gained less than this fraction of the
        objective's magnitude (at least one nat per cell), or when the next quasi-Newton step promises less
        than `SURE` times that. The tolerance is never below the rounding error of the objective.
    max_iter : int
        Largest number of sweeps.
    edges : ndarray of shape (n_genes,) or None
        See ``gauge.noise_edges``: columns of the loadings below them are dropped. None keeps all columns.
    column_prior : callable or None
        Update of the scales of the columns, see ``column_priors``; None without a prior.
    watch : object or None
        Its ``begin()`` is called before each sweep, its ``end(outcome)`` after it, with the `Outcome` so far.
        Where that is true, the ascent stops.

    Returns
    -------
    Outcome
        With ``interrupted`` set after a KeyboardInterrupt. One before the end of the first sweep is raised.
    """
    outcome, stages, columns, information = None, [], None, None
    (objective, x), plain = candidates[0], PLAIN_SWEEPS

    def sweep(climb):
        if watch is not None:
            watch.begin()
        climb.sweep()

    def note(objective, climb, ended=(False, "")):
        nonlocal outcome
        outcome = Outcome(
            objective,
            climb.point,
            [*stages, [value / n_cells for value in climb.values]],
            climb.gain / n_cells,
            climb.promised / n_cells,
            climb.relative,
            *ended,
            columns,
            information,
        )
        if watch is not None and watch.end(outcome) and not ended[1]:
            raise _Stopped

    try:
        if len(candidates) > 1 or edges is not None:
            most = min(PLAIN_SWEEPS if len(candidates) == 1 else LOOK_SWEEPS, max_iter - 1)
            objective, climb = _best(candidates, free, n_cells, tol, most, sweep, note)
            x, plain = climb.point.x, 0
            stages.append([value / n_cells for value in climb.values])
            if edges is not None:
                x, free, information = _real_columns(objective, climb.point, free, edges, n_cells)
                objective.refine()  # the sums have to be taken anew in any case
        has_columns = column_prior is not None and free.loadings
        climb = None if has_columns else _Climb(objective, x, free, n_cells, tol, plain)
        while outcome is None or not outcome.reason:
            if has_columns:
                x = x if climb is None else climb.point.x
                x, columns, rotation = next_scales(objective, x, column_prior, columns, n_cells)
                evaluate = partial(objective, penalty=columns.penalty)
                if climb is None:
                    climb = _Climb(evaluate, x, free, n_cells, tol, plain)
                else:
                    stages.append([value / n_cells for value in climb.values])
                    climb.go_on_under(evaluate, x, rotation)
            sweep(climb)
            done = sum(len(stage) - 1 for stage in [*stages, climb.values])
            ended = _ended(climb, columns, done == max_iter, max_iter)
            if (ended[1] or done == max_iter - 1) and done < max_iter and objective.refine():
                note(objective, climb)
                if not has_columns:
                    stages.append([value / n_cells for value in climb.values])
                    climb.go_on_under(
                        objective, climb.point.x, np.eye(climb.point.x.loadings.shape[1])
                    )
                continue
            note(objective, climb, ended)
    except KeyboardInterrupt:
        if outcome is None:
            raise
        outcome = outcome._replace(converged=False, reason="it was interrupted", interrupted=True)
    except _Stopped:
        outcome = outcome._replace(converged=False, reason="a callback stopped it", stopped=True)
    return outcome


def _best(candidates, free, n_cells, tol, n_sweeps, sweep, note):
    """Of the candidates that with the highest log-likelihood after some sweeps: its objective, its climb."""
    looks = []
    for objective, x in candidates:
        climb = _Climb(objective, x, free, n_cells, tol)
        for _ in range(n_sweeps):
            if not climb.reason:
                sweep(climb)
                note(objective, climb)
        looks.append((climb.point.log_likelihood, objective, climb))
    return max(looks, key=lambda look: look[0])[1:]


def _real_columns(objective, point, free, edges, n_cells):
    """Coordinates without the columns of noise, what is free then, and the columns' information.

    Without real columns one of zeros is left, which is not free.
    """
    weight = point.sums.genes.moments[:, 0] / n_cells
    loadings = objective.coupling.expand(point.x).loadings
    contributions, basis = column_information(loadings, weight)
    real = above_noise(contributions, edges)
    rotation = basis[:, real]
    if not real.any():
        rotation, free = np.zeros((real.size, 1)), free._replace(loadings=False)
    objective.rotate(rotation)
    x = point.x._replace(loadings=point.x.loadings @ rotation)
    return x, free, contributions.sum(0)


def _ended(climb, columns, no_more, max_iter):
    """Whether the ascent has converged, and the reason why it ends, "" if it goes on."""
    over = bool(climb.reason)
    if over and columns is not None:
        # neither the coordinates nor the scales have moved: the next sweep would be the same
        stuck = climb.gain == 0.0 and columns.unchanged
        over = (climb.converged and columns.settled) or stuck
    converged = climb.converged and (columns is None or columns.settled)
    if over:
        return converged, climb.reason
    return converged, f"max_iter={max_iter} sweeps were done" if no_more else ""


class _Climb:
    """Sweeps under one objective: the current point, the next step, and the gain that it promises.

    The first ``plain`` sweeps are not remembered.
    """

    def __init__(self, evaluate, x, free, n_cells, tol, plain=PLAIN_SWEEPS):
        self.evaluate, self.free, self.n_cells = evaluate, free, n_cells
        self.tol = tol if isinstance(tol, Tolerance) else Tolerance(tol)
        self.plain = plain
        self.point = evaluate(x)
        if not np.isfinite(self.point.value):
            raise FloatingPointError(
                f"The objective at the start is {self.point.value}, not a finite number."
            )
        self.memory, self.small, self.gains = _Memory(), 0, []
        self.values = [self.point.value]  # at the start and after each sweep, nats
        self.converged, self.reason = False, ""
        self.step, self.promised = _next_step(self.point, self.memory, free)

    def go_on_under(self, evaluate, x, rotation):
        """Go on under another objective, at coordinates with rotated loadings; the rotation is (k, k)."""
        self.evaluate, self.point = evaluate, evaluate(x)
        self.values = [self.point.value]
        self.memory.rotate(rotation, x, self.free)
        self.converged, self.reason = False, ""
        self.step, self.promised = _next_step(self.point, self.memory, self.free)

    @property
    def relative(self):
        """Least gain of a sweep, by the objective's magnitude."""
        return self.tol.relative(self.point, self.free, self.n_cells)

    @property
    def gain(self):
        """Gain of the last sweep, nats."""
        return self.gains[-1]

    def sweep(self):
        """Take the next step, shortened if it has to be, and prepare the one after."""
        point, memory, free = self.point, self.memory, self.free
        cuts = MEMORY_CUTS if memory.pairs else MAX_CUTS
        trial, move = search(self.evaluate, point, self.step, cuts)
        if trial is None and memory.pairs:
            memory.forget()
            self.step, self.promised = _next_step(point, memory, free)
            trial, move = search(self.evaluate, point, self.step, MAX_CUTS)
        tol = self.relative
        least = tol * magnitude(point.value, self.n_cells) * self.n_cells
        if trial is None:
            self.gains.append(0.0)
            self.values.append(point.value)
            self.converged = self.promised < least
            self.reason = (
                "no damped step raises the objective (the full one promised "
                f"{self.promised / self.n_cells:.2g} nats per cell)"
            )
            return
        if len(self.gains) >= self.plain:
            memory.add(
                _flat(move, free),
                _flat(point.gradient, free) - _flat(trial.gradient, free),
                _flat(product(point.gradient, point.metric, move, free), free),
            )
        self.gains.append(trial.value - point.value)
        self.values.append(trial.value)
        self.point = trial
        self.step, self.promised = _next_step(trial, memory, free)
        self.small = self.small + 1 if self.gain < least else 0
        self._look_for_the_end(tol, least)

    def _look_for_the_end(self, tol, least):
        promises_little = self.memory.pairs and self.promised < SURE * least
        if promises_little:  # the memory may miss what is left: ask the metric alone too
            plain = _next_step(self.point, _Memory(), self.free)[1]
            self.promised = max(self.promised, plain)
        # without a memory a small promise is not enough: the metric overestimates the curvature of slow moves
        promises_little = bool(self.memory.pairs) and self.promised < SURE * least
        self.converged = self.small >= 2 or promises_little
        if self.small >= 2:
            self.reason = f"the last two sweeps gained less than tol={tol:g} of the objective"
        elif promises_little:
            self.reason = f"the next sweep promises less than {SURE:g} tol={tol:g} of the objective"


def _within_reach(step, point, largest):
    """Cut each gene's step to ``largest`` nats: a gene without counts has next to no curvature."""
    least = np.maximum(point.metric.least_noise - point.x.noise, -largest)
    size = np.sqrt(step.mean**2 + np.sum(step.coef**2, 1) + np.sum(step.loadings**2, 1))
    cut = np.minimum(1.0, largest / np.maximum(size, 1e-300))
    return Params(
        step.mean * cut,
        step.loadings * cut[:, None],
        np.clip(step.noise, least, largest),
        np.clip(step.dispersion, -largest, largest),
        step.coef * cut[:, None],
    )


def _next_step(point, memory, free):
    """The next step, and the gain that it promises: half the slope along its move inside the ranges, nats."""
    g = _flat(point.gradient, free)

    def precondition(q):
        return _flat(direction(_unflat(q, point.x, free), point.metric, free), free)

    step = memory.direction(g, precondition)
    if memory.pairs and not (np.all(np.isfinite(step)) and float(step @ g) > 0):
        memory.forget()
        step = precondition(g)
    largest = LARGEST_MEMORY_STEP if memory.pairs and free.loadings else LARGEST_STEP
    step = _within_reach(_unflat(step, point.x, free), point, largest)
    return step, 0.5 * float(_flat(change(point.x, step)[1], free) @ g)

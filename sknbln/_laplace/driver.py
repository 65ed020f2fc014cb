"""The loop over sweeps: preconditioned quasi-Newton ascent with a monotone guard.

The direction is the limited-memory BFGS two-loop recursion whose initial metric is the step of
``sweeps`` (so with an empty memory it *is* that step). A trial that would lower the objective is
damped until it does not; where two cuts of a quasi-Newton step do not suffice, the memory is dropped.
"""

from typing import NamedTuple

import numpy as np

from .sweeps import (
    Gradients,
    Parameters,
    column_step,
    curvature_product,
    regression_step,
    scale_step,
    shift_step,
)

PLAIN_SWEEPS = 4  # the first steps are long: they say little of the curvature at the maximum
MEMORY = 8
MAX_CUTS = 12
MEMORY_CUTS = 2  # of a quasi-Newton step
#: a pair of the memory that shows less curvature than this fraction of the metric's is mixed with it
LEAST_CURVATURE = 0.1
LARGEST_STEP = 1.5  # nats
SURE = 0.5  # a sweep gains between half and twice what it promises, mostly


class Free(NamedTuple):
    """Which blocks of the parameters are estimated."""

    mean: bool
    loadings: bool
    log_noise: bool
    log_r: bool


class Point(NamedTuple):
    """Parameters with the objective and its gradient there."""

    params: Parameters
    value: float
    #: rounding error of the value, nats: a smaller fall is not a fall, a smaller promise promises nothing
    rounding: float
    grad: Gradients
    n_unconverged: int
    moments: np.ndarray  # sums over cells of b [1 z][1 z]', packed; (n_genes, T)
    gradient_log_r: np.ndarray  # of the log-likelihood, in the model's own log r; (n_genes,)


class Outcome(NamedTuple):
    """How a fit ended; `reason` is a sentence."""

    point: Point
    converged: bool
    reason: str
    history: list
    n_iter: int
    gain: float
    promised: float  # by the next sweep, nats per cell
    interrupted: bool = False

    def stopped(self):
        """The same, ended by Ctrl-C after its last complete sweep."""
        return self._replace(
            converged=False,
            reason="it was interrupted",
            history=self.history[: self.n_iter + 1],
            interrupted=True,
        )


def magnitude(value, n_cells):
    """Of an objective, nats per cell: what `tol` is a fraction of; at least 1."""
    return max(abs(value) / n_cells, 1.0)


def direction_from(grad, free):
    """The preconditioned gradient as a `Parameters` step."""
    mean, loadings = regression_step(grad, free.mean, free.loadings)
    if free.mean:
        mean = mean + shift_step(grad)
    if free.loadings:
        loadings = loadings + column_step(grad)
    zero = np.zeros_like(grad.log_noise)
    noise = scale_step(grad.log_noise, grad.information_log_noise) if free.log_noise else zero
    log_r = scale_step(grad.log_r, grad.information_log_r) if free.log_r else zero
    return Parameters(mean, loadings, noise, log_r)


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
    return Parameters(*out)


def _blocks(grad):
    return grad.mean, grad.loadings, grad.log_noise, grad.log_r


class _Memory:
    """Pairs of steps and changes of the gradient (of minus the objective)."""

    def __init__(self):
        self.pairs = []

    def add(self, s, y, expected):
        """Remember that the step s changed the gradient by y; the metric expected another change.

        Powell's damping: a change that shows next to no curvature along s, or a negative one, would
        make the next step far too long.
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
        """All pairs."""
        self.pairs = []

    def direction(self, g, precondition):
        """Two-loop recursion; ``precondition`` maps a gradient to a step."""
        q, alphas = g.copy(), []
        for s, y, sy in reversed(self.pairs):
            a = float(s @ q) / sy
            alphas.append(a)
            q -= a * y
        z = precondition(q)
        for (s, y, sy), a in zip(self.pairs, reversed(alphas), strict=True):
            z += (a - float(y @ z) / sy) * s
        return z


def ascend(evaluate, params, free, *, n_cells, tol, max_iter, report=None):
    """Maximize the objective.

    Parameters
    ----------
    evaluate : callable
        Maps `Parameters` to a `Point`.
    params : Parameters
        Start.
    free : Free
    n_cells : int
        The history is per cell.
    tol : float
        Stop when the next sweep, of a quasi-Newton step, promises less than `SURE` times this fraction
        of the objective's magnitude (at least of one nat per cell), or two in a row gained less than it.
        What is less than the objective's rounding error is not told from it.
    max_iter : int
        Sweeps at most.
    report : callable or None
        Called with (iteration, Point) after each accepted sweep.

    Returns
    -------
    Outcome
        ``interrupted`` after a KeyboardInterrupt that came after the first complete sweep; an
        earlier one is raised.
    """
    found = None
    try:
        for outcome in _sweeps(evaluate, params, free, n_cells, tol, max_iter, report):
            found = outcome
    except KeyboardInterrupt:
        if found is None or found.n_iter == 0:
            raise
        return found._replace(history=found.history[: found.n_iter + 1]).stopped()
    return found


def _sweeps(evaluate, params, free, n_cells, tol, max_iter, report):
    """Yield the `Outcome` at the start and after each sweep, as if it were the last."""
    point = evaluate(params)
    if not np.isfinite(point.value):
        raise FloatingPointError(
            f"The objective at the start is {point.value}, not a finite number."
        )
    history, memory, small, gain = [point.value / n_cells], _Memory(), 0, np.inf
    free_flags = tuple(free)
    enough = f"max_iter={max_iter} sweeps were done"
    step, promised = _next_step(point, memory, free)
    yield Outcome(point, False, enough, history, 0, gain, promised / n_cells)

    for iteration in range(1, max_iter + 1):
        trial, moved = _search(evaluate, point, step, MEMORY_CUTS if memory.pairs else MAX_CUTS)
        if trial is None and memory.pairs:
            memory.forget()
            step, promised = _next_step(point, memory, free)
            trial, moved = _search(evaluate, point, step, MAX_CUTS)
        least = max(tol * magnitude(point.value, n_cells) * n_cells, point.rounding)
        if trial is None:
            history.append(point.value / n_cells)
            per_cell = promised / n_cells
            reason = (
                "no damped step raises the objective (the full one promised "
                f"{per_cell:.2g} nats per cell)"
            )
            yield Outcome(point, promised < least, reason, history, iteration, 0.0, per_cell)
            return
        if iteration > PLAIN_SWEEPS:
            memory.add(
                _flat(moved, free_flags),
                _flat(_blocks(point.grad), free_flags) - _flat(_blocks(trial.grad), free_flags),
                _flat(curvature_product(point.grad, moved, free), free_flags),
            )
        gain = trial.value - point.value
        point = trial
        history.append(point.value / n_cells)
        step, promised = _next_step(point, memory, free)
        small = small + 1 if gain < least else 0
        least *= SURE
        if memory.pairs and promised < least:  # a memory may have lost sight of what is left
            promised = max(promised, _next_step(point, _Memory(), free)[1])
        # the metric alone overestimates the curvature of what moves slowly: it is not enough
        little = bool(memory.pairs) and promised < least
        reason = enough
        if small == 2:
            reason = f"the last two sweeps gained less than tol={tol:g} of the objective"
        elif little:
            reason = f"the next sweep promises less than {SURE:g} tol={tol:g} of the objective"
        done = small == 2 or little
        yield Outcome(point, done, reason, history, iteration, gain / n_cells, promised / n_cells)
        if report is not None:
            report(iteration, point)
        if done:
            return


def _within_reach(step):
    """Cut each gene's step to a nat or two: a gene without counts has next to no curvature."""
    size = np.sqrt(step.mean**2 + np.sum(step.loadings**2, 1))
    cut = np.minimum(1.0, LARGEST_STEP / np.maximum(size, 1e-300))
    return Parameters(
        step.mean * cut,
        step.loadings * cut[:, None],
        np.clip(step.log_noise, -LARGEST_STEP, LARGEST_STEP),
        np.clip(step.log_r, -LARGEST_STEP, LARGEST_STEP),
    )


def _next_step(point, memory, free):
    """The step to try first, and what it promises: half the slope along what the ranges let it move, nats."""
    flags = tuple(free)
    g = _flat(_blocks(point.grad), flags)

    def precondition(q):
        blocks = _unflat(q, point.params, flags)
        grad = point.grad._replace(
            mean=blocks.mean,
            loadings=blocks.loadings,
            log_noise=blocks.log_noise,
            log_r=blocks.log_r,
        )
        return _flat(direction_from(grad, free), flags)

    x = memory.direction(g, precondition)
    if memory.pairs and not (np.all(np.isfinite(x)) and float(x @ g) > 0):
        memory.forget()
        x = precondition(g)
    step = _within_reach(_unflat(x, point.params, flags))
    return step, 0.5 * float(_flat(_change(point.params, step, 1.0)[1], flags) @ g)


def _change(params, step, length):
    """Parameters after ``length`` times a step, and by how much each of them moved."""
    new = params.moved(step, length)
    with np.errstate(invalid="ignore"):  # inf - inf of blocks that are not free
        return new, Parameters(*(a - b for a, b in zip(new, params, strict=True)))


def _search(evaluate, point, step, cuts):
    """The first damped trial that does not lower the objective, and the move to it; or None twice."""
    length = 1.0
    for _ in range(cuts):
        params, moved = _change(point.params, step, length)
        trial = evaluate(params)
        if np.isfinite(trial.value) and trial.value >= point.value - point.rounding:
            return trial, moved
        length *= 0.35
    return None, None

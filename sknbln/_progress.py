"""What a fit tells while it runs: lines by Python's logging, and scikit-learn's callbacks."""

import contextlib
import copy
import logging
import time

import numpy as np

from ._jax import setting_of_now

try:
    from sklearn.callback import CallbackSupportMixin
except ImportError:  # scikit-learn before 1.9 has no callbacks

    class CallbackSupportMixin:  # type: ignore[no-redef]  # a stand-in for what is missing
        """Without callbacks there is nothing to set."""


LOG = logging.getLogger("sknbln")


class Progress:
    """Tell what a fit of an estimator does, through the logger "sknbln" and to the callbacks that are set.

    Lines are INFO, or DEBUG if the estimator's ``verbose`` is 0. Where no logging is set up, ``verbose``
    prints them.

    Parameters
    ----------
    estimator : estimator
        With ``verbose``: 1 for a line per sweep, 2 for more of each. Its class names the lines.
    stages : int
        Number of stages that will follow, at most.
    X, y, **metadata
        What `fit` was given, for callbacks; metadata that is None was not given.
    """

    def __init__(self, estimator, stages, X=None, y=None, **metadata):
        self.estimator, self._start, self._task = estimator, time.perf_counter(), None
        given = {name: value for name, value in metadata.items() if value is not None}
        self.data = dict(estimator=estimator, X=X, y=y, metadata=given)
        if hasattr(estimator, "_init_callback_context"):
            self._task = estimator._init_callback_context(max_subtasks=stages)
            self._task.call_on_fit_task_begin(**self.data)

    def end(self):
        """Tell the callbacks that the fit has ended."""
        if self._task is not None:
            self._task.call_on_fit_task_end(
                **self.data, reconstruction_attributes=lambda: vars(self.estimator)
            )

    def say(self, message):
        """One line."""
        verbose = self.estimator.verbose
        seconds = time.perf_counter() - self._start
        line = f"[{type(self.estimator).__name__}] {message}, {seconds:.1f} s"
        level = logging.INFO if verbose else logging.DEBUG
        if LOG.hasHandlers() and LOG.isEnabledFor(level):
            LOG.log(level, line)
        elif verbose:
            print(line, flush=True)

    @contextlib.contextmanager
    def stage(self, name, line, update=None):
        """A stage of the fit, a `Stage`.

        Parameters
        ----------
        name : str
            Of the stage's task.
        line : callable
            Words for what `Stage.end` is given, the seconds since the stage began, and ``verbose``.
        update : callable or None
            Of an estimator and what `Stage.end` is given: sets the attributes that `score` and `transform`
            need, for callbacks that ask for a fitted estimator. None: they get none.
        """
        if self._task is None:
            yield Stage(self, None, line, update)
            return
        task = self._task.subcontext(name, max_subtasks=None)
        task.call_on_fit_task_begin(**self.data)
        yield Stage(self, task, line, update)
        task.call_on_fit_task_end(**self.data)

    def nested(self, name):
        """A stage that fits another estimator: a context manager of it, in which callbacks see its fit."""

        @contextlib.contextmanager
        def around(estimator):
            if self._task is None:
                yield
                return
            task = self._task.subcontext(name)
            with task.propagate_callback_context(estimator):
                task.call_on_fit_task_begin(**self.data)
                yield
                task.call_on_fit_task_end(**self.data)

        return around

    def attributes(self, update, found):
        """What a copy of the estimator has after an update."""
        if update is None:
            return None
        model = copy.copy(self.estimator)
        update(model, *found)
        return vars(model)


class Stage:
    """A stage of a fit. Its steps call `begin`, then `end`, which is true where a callback asks to stop."""

    def __init__(self, progress, task, line, update):
        self._progress, self._task, self._line, self._update = progress, task, line, update
        self._start, self._step = time.perf_counter(), None
        self._users_setting = setting_of_now()  # a stage may end its steps with another

    def begin(self):
        """A step begins."""
        if self._task is not None:
            self._step = self._task.subcontext("step")
            with self._users_setting():
                self._step.call_on_fit_task_begin(**self._progress.data)

    def end(self, *found):
        """A step has ended, with what it found."""
        seconds = time.perf_counter() - self._start
        self._progress.say(self._line(*found, seconds, self._progress.estimator.verbose))
        if self._step is None:
            return False
        with self._users_setting():
            return self._step.call_on_fit_task_end(
                **self._progress.data,
                reconstruction_attributes=lambda: self._progress.attributes(self._update, found),
            )


def of_sweep(outcome, seconds, verbose):
    """A line about a sweep: objective, what the next sweep promises, number of factors."""
    x, value = outcome.point.x, outcome.history[-1]
    parts = [f"sweep {outcome.n_iter}: {value:.4f} nats per cell"]
    parts.append(f"the next promises {outcome.promised:.2g}")
    if x.loadings.shape[1]:
        parts.append(f"{np.count_nonzero(np.any(x.loadings, axis=0))} factors")
    if verbose > 1:
        parts.append(f"gained {outcome.gain:.2g}")
        parts.append(f"{int(outcome.point.sums.n_unconverged)} cells without a mode")
    return ", ".join(parts)


def of_steps(n_steps):
    """A line about variational steps, of ``n_steps`` at most: minus their loss, and the time left at most."""

    def line(step, loss, guide, seconds, verbose):
        left = (n_steps - step) * seconds / step
        return f"ELBO step {step}: {-loss:.4f} nats per cell, at most {left:.0f} s left"

    return line

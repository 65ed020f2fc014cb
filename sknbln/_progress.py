"""Lines about a fit while it runs, by Python's logging."""

import logging
import time

import numpy as np

LOG = logging.getLogger("sknbln")


class Progress:
    """Say what a fit of an estimator does, through the logger "sknbln".

    Lines are INFO, or DEBUG if ``verbose`` is 0. Where no logging is set up, ``verbose`` prints them.

    Parameters
    ----------
    estimator : object
        Its class names the lines.
    verbose : int
        1 for a line per sweep, 2 for more of each.
    """

    def __init__(self, estimator, verbose):
        self._name, self._verbose, self._start = (
            type(estimator).__name__,
            verbose,
            time.perf_counter(),
        )

    def say(self, message):
        """One line."""
        seconds = time.perf_counter() - self._start
        line = f"[{self._name}] {message}, {seconds:.1f} s"
        level = logging.INFO if self._verbose else logging.DEBUG
        if LOG.hasHandlers() and LOG.isEnabledFor(level):
            LOG.log(level, line)
        elif self._verbose:
            print(line, flush=True)

    def sweeps(self, what="sweep"):
        """A report for `ascend`: objective, what the next sweep promises, number of factors."""

        def report(outcome):
            x, value = outcome.point.x, outcome.history[-1]
            parts = [f"{what} {outcome.n_iter}: {value:.4f} nats per cell"]
            parts.append(f"the next promises {outcome.promised:.2g}")
            if x.loadings.shape[1]:
                parts.append(f"{np.count_nonzero(np.any(x.loadings, axis=0))} factors")
            if self._verbose > 1:
                parts.append(f"gained {outcome.gain:.2g}")
                parts.append(f"{int(outcome.point.sums.n_unconverged)} cells without a mode")
            self.say(", ".join(parts))

        return report

    def steps(self, what, n_steps):
        """A report for a loop of ``n_steps`` steps at most: minus its loss, and the time left at most."""
        start = time.perf_counter()

        def report(step, loss):
            left = (n_steps - step) * (time.perf_counter() - start) / step
            self.say(f"{what} {step}: {-loss:.4f} nats per cell, at most {left:.0f} s left")

        return report

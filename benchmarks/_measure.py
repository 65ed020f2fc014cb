"""What one method takes and finds on one set: runs in a worker process, for compare.py and revisions.py."""

import importlib
import sys
import time
import warnings

import numpy as np
from _common import canonical_correlations, load, off_diagonals
from _methods import METHODS
from _process import PeakMemory

#: what a fit takes, by column of the tables: seconds and MB
TIMES = {
    "cold s": "cold_s",
    "warm s": "warm_s",
    "NBVCP s": "nbvcp_s",
    "NBLN s": "nbln_s",
    "transform s": "transform_s",
    "MB": "memory_mb",
    "MB warm": "memory_warm_mb",
}
#: what it finds
RESULTS = {
    "corr": "correlation",
    "slope": "slope",
    "scores new": "canonical_new",
    "scores fitted": "canonical_fitted",
    "held-out": "score",
    "sweeps": "iterations",
}
_DECIMALS = {"held-out": 1, "sweeps": 0, "MB": 0, "MB warm": 0}


def shown(label, value):
    """A number of column `label` as the tables show it, None where there is none."""
    if value is None:
        return None
    if label in TIMES and label not in _DECIMALS:
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return f"{value:,.{_DECIMALS.get(label, 3)}f}"


def measure(request):
    """Fit twice, with two seeds, and judge the second fit.

    ``request``: ``data`` (file of `_common.save`), ``method``, ``latent_dim``, ``seeds`` (two) and
    ``started``. All seconds are of wall clock.
    """
    began = time.monotonic()
    data = load(request["data"])
    train, test = data.counts[data.train], data.counts[data.test]
    reading = time.monotonic() - began

    method = METHODS[request["method"]]
    for name in method.modules:
        importlib.import_module(name)
    memory = PeakMemory()
    given = request["latent_dim"], data.capture_prior
    cold, fit, seconds = _timed(method, train, request["seeds"][0], *given)
    result = {
        "cold_s": time.monotonic() - request["started"] - reading,
        "first_fit_s": seconds,
        "memory_mb": memory.over_baseline(),
        **{f"first_{name}": v for name, v in cold.items() if name.endswith("_s")},
    }
    second = PeakMemory()
    numbers, fit, result["warm_s"] = _timed(method, train, request["seeds"][1], *given)
    result |= numbers | {
        "memory_mb": max(result["memory_mb"], second.peak() - memory.baseline),
        "memory_warm_mb": second.over_baseline(),
        "memory_baseline_mb": memory.baseline,
        "memory_exact": memory.exact,
    }
    if "sknbln" in sys.modules:
        result["package"] = sys.modules["sknbln"].__file__
    return result | _judged(fit, data, train, test)


def _timed(method, counts, seed, latent_dim, capture_prior):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `converged` says so for ours, peers warn of other things
        start = time.perf_counter()
        fit = method.fit(counts, latent_dim, seed, capture_prior)
        seconds = time.perf_counter() - start
    return fit.numbers, fit, seconds


def _judged(fit, data, train, test):
    """Quality of a fit, and the seconds of the second transform of the held-out rows."""
    truth = data.truth
    correlation, slope = off_diagonals(np.asarray(fit.loadings, float), truth["loadings"])
    result = {"correlation": correlation, "slope": slope}
    scores = fit.scores
    if fit.transform is not None:
        held_out = np.asarray(fit.transform(test), float)
        start = time.perf_counter()
        fit.transform(test)
        result["transform_s"] = time.perf_counter() - start
        found = canonical_correlations(held_out, truth["scores"][data.test])
        result["canonical_new"] = found.mean()
        scores = fit.transform(train) if scores is None else scores
    found = canonical_correlations(np.asarray(scores, float), truth["scores"][data.train])
    result["canonical_fitted"] = found.mean()
    if fit.score is not None:
        result["score"] = fit.score(test)
    return result

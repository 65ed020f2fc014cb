"""Small problems of wildly different kinds, each fitted: does anything break, and what does not converge.

    python benchmarks/divergence.py [--seeds 0 200] [--max-iter 200]

Each seed is a problem: 5 to 120 cells, 2 to 40 genes, depths over six decades, dispersions over ten,
with and without factors, capture, excess zeros and spoilt entries. The settings of the fit are spread
over the seeds by a design (`setting`): every freeze level (at tau 1 and inf) with every loadings prior,
and cascade, observation and capture model in balance across them. Of both estimators it is checked that

* `fit` raises nothing,
* every fitted number is finite, and so are `transform` and `score_samples`,
* the objective never falls within a stage; a stage ends where a loadings prior is updated,
* what did not converge says so by a `ConvergenceWarning`.

Printed are one line per finding with its seed, and how many did not converge within ``max_iter`` and why.
"""

import argparse
import contextlib
import traceback
import warnings
from collections import Counter
from typing import NamedTuple
from unittest import mock

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from sknbln import NBLNEstimator, NBVCPEstimator, _maximum, _nbvcp

# few widths and buckets of rows: what is compiled is shared
WIDTHS = (2, 12, 40)
ROWS = ((5, 8), (33, 40), (65, 120))
FREEZE = ((), ("r",), ("r", "eta"), ("r", "mu", "eta"))
TAU = (1.0, np.inf)
PRIORS = ("none", "gaussian", "horseshoe_columnwise", "neg_columnwise", "ard")
CASCADES = ("parameter", "marginal")
OBSERVATIONS = ("nb", "nb", "poisson", "multinomial")
CAPTURE = ("auto", None, (8.0, 0.5), (14.0, 2.0))
SPOILT = ("nothing", "outlier", "duplicates", "constant", "groups", "empty")
LARGEST_RATE = 1e8


class Problem(NamedTuple):
    """Counts, and a line that says of what kind."""

    counts: np.ndarray
    kind: str


def problem(seed):
    """Counts of one seed."""
    rng = np.random.RandomState(seed)
    n_genes = WIDTHS[rng.randint(len(WIDTHS))]
    low, high = ROWS[rng.randint(len(ROWS))]
    n_cells = rng.randint(low, high + 1)
    rank = rng.randint(0, 4)
    depth, r = 10 ** rng.uniform(-3, 3), 10 ** rng.uniform(-2, 8)
    mean = depth * np.exp(rng.normal(0.0, rng.uniform(0.0, 3.0), n_genes))
    loadings = rng.uniform(0.0, 1.5) * rng.standard_normal((n_genes, rank))
    noise = rng.choice([0.0, 0.1, 1.0])
    capture = rng.choice([0.0, 0.3, 2.0])
    zeros = rng.choice([0.0, 0.5, 0.9])
    x = rng.standard_normal((n_cells, rank)) @ loadings.T
    x += np.sqrt(noise) * rng.standard_normal((n_cells, n_genes))
    x += np.log(mean) - capture * rng.standard_normal((n_cells, 1))
    gamma = np.maximum(rng.gamma(r, 1 / r, x.shape), 1e-300)
    counts = rng.poisson(np.minimum(np.exp(x) * gamma, LARGEST_RATE)).astype(float)
    counts *= rng.uniform(size=counts.shape) >= zeros
    spoilt = SPOILT[rng.randint(len(SPOILT))]
    kind = (
        f"{n_cells}x{n_genes} rank={rank} depth={depth:.1e} r={r:.1e} noise={noise:g} "
        f"capture={capture:g} zeros={zeros:g} {spoilt}"
    )
    return Problem(spoil(counts, spoilt, rng), kind)


def spoil(counts, how, rng):
    """Change counts in place; returns them."""
    n_cells, n_genes = counts.shape
    gene = rng.randint(n_genes)
    if how == "outlier":
        median = max(np.median(counts.sum(1)), 1.0)
        counts[0, gene] = np.round(90 * median)
    elif how == "duplicates":
        counts[:, -1] = counts[:, 0]
    elif how == "constant":
        counts[:, gene] = counts[0, gene] + 3
    elif how == "groups":
        half = n_cells // 2
        counts[:half, : n_genes // 2] = 0
        counts[half:, n_genes // 2 :] = 0
    elif how == "empty":
        counts[rng.randint(n_cells)] = 0
        counts[:, gene] = 0
    return counts


def setting(seed):
    """Parameters of the NBLN fit of one seed.

    The eight freeze levels and the five priors run through all their pairs every 40 seeds; the others
    are drawn in balance.
    """
    freeze, tau = FREEZE[seed % 4], TAU[seed // 4 % 2]
    prior = PRIORS[seed // 8 % 5]
    block, place = divmod(seed, 8)
    rng = np.random.RandomState(10_000 + block)
    observation = np.tile(OBSERVATIONS, 2)[rng.permutation(8)[place]]
    cascade = CASCADES[rng.permutation(8)[place] % 2]
    capture = CAPTURE[rng.permutation(8)[place] % 4]
    if observation != "nb":
        absent = ("r",) if observation == "poisson" else ("r", "eta")
        freeze = tuple(name for name in freeze if name not in absent)
    return dict(
        latent_dim=1 + seed % 4,
        informative_priors_freeze=freeze,
        informative_priors_tau=tau,
        loadings_prior=prior,
        observation=str(observation),
        cascade=cascade,
        capture_efficiency=capture,
    )


class Stages:
    """Objective histories of the stages of a fit, each with its rounding error, nats per cell."""

    def __init__(self):
        self.histories = []

    @contextlib.contextmanager
    def recorded(self):
        """Record every ascent: of NBVCP's maximum a posteriori, of NBLN, of each of a prior's stages."""

        def recording(original):
            def ascend(*args, **kwargs):
                outcome = original(*args, **kwargs)
                rounding = outcome.point.rounding / kwargs["n_cells"]
                self.histories += [(stage, rounding) for stage in outcome.stages]
                return outcome

            return ascend

        with contextlib.ExitStack() as stack:
            for module in (_nbvcp, _maximum):
                stack.enter_context(mock.patch.object(module, "ascend", recording(module.ascend)))
            yield

    def falls(self):
        """Largest fall of the objective within a stage, beyond rounding; 0 where there is none."""
        worst = 0.0
        for history, rounding in self.histories:
            history = np.asarray(history)
            if history.size > 1:
                worst = max(worst, float(np.max(history[:-1] - history[1:] - 2 * rounding)))
        return worst


def not_finite(model, X, infinite=()):
    """Names of fitted numbers, and of methods' results, that are not finite."""
    found = []
    for name, value in vars(model).items():
        if name in infinite or not name.endswith("_") or name.startswith("_"):
            continue
        values = value.values() if isinstance(value, dict) else [value]
        for v in values:
            if isinstance(v, (float, np.ndarray)) and np.asarray(v).dtype.kind == "f":
                if not np.all(np.isfinite(v)):
                    found.append(name)
    empty = np.zeros((1, X.shape[1]))
    for method in ("transform", "score_samples"):
        for rows in (X, empty):
            with warnings.catch_warnings():
                # as in fit: rows deeper than M0 are among the problems
                warnings.simplefilter("ignore", UserWarning)
                values = getattr(model, method)(rows)
            if not np.all(np.isfinite(values)):
                found.append(method)
    return found


class Finding(NamedTuple):
    """What one estimator's fit of one seed did."""

    seed: int
    estimator: str
    wrong: tuple  # sentences; empty where nothing is
    unconverged: tuple  # the ConvergenceWarnings
    n_iter: int


def fitted(model, X):
    """Fit; returns the model, the ConvergenceWarnings and the other warnings, or raises."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(X)
    said = tuple(str(w.message) for w in caught if issubclass(w.category, ConvergenceWarning))
    others = [w for w in caught if not issubclass(w.category, (ConvergenceWarning, UserWarning))]
    return model, said, tuple(f"{w.category.__name__}: {w.message}" for w in others)


def checked(model, X, seed=None):
    """Fit and check: the model, None where `fit` raised, and the `Finding`."""
    name, stages = type(model).__name__, Stages()
    try:
        with stages.recorded():
            model, said, wrong = fitted(model, X)
        poisson = getattr(model, "observation", "nb") != "nb"
        names = not_finite(model, X, ("dispersion_",) if poisson else ())
    except Exception:
        return None, Finding(seed, name, (traceback.format_exc(limit=-3),), (), 0)
    wrong += tuple(f"not finite: {n}" for n in names)
    fall = stages.falls()
    if fall > 0:
        wrong += (f"the objective fell by {fall:.3g} nats per cell",)
    if model.converged_ == bool(said):
        wrong += (f"converged_ is {model.converged_}, ConvergenceWarnings: {said}",)
    return model, Finding(seed, name, wrong, said, model.n_iter_)


def run(seed, max_iter=200):
    """Fit one seed by both estimators: a list of `Finding`."""
    X, options = problem(seed).counts, setting(seed)
    capture = options["capture_efficiency"]
    source, found = checked(NBVCPEstimator(capture_efficiency=capture, random_state=seed), X, seed)
    if source is None:
        return [found]
    model = NBLNEstimator(
        informative_prior_estimator=source, random_state=seed, max_iter=max_iter, **options
    )
    return [found, checked(model, X, seed)[1]]


def reason(said):
    """A short class of a ConvergenceWarning."""
    for text, name in (
        ("no damped step", "no damped step raises the objective"),
        ("max_iter", "max_iter"),
        ("mode of", "cells whose mode was not found"),
        ("maximum a posteriori", "maximum a posteriori of the source"),
        ("variational", "variational fit of the source"),
    ):
        if text in said:
            return name
    return said


def report(findings):
    """Print the table."""
    print("\n| estimator | fits | wrong | not converged | why |")
    print("|---|---|---|---|---|")
    for name in ("NBVCPEstimator", "NBLNEstimator"):
        some = [f for f in findings if f.estimator == name]
        why = Counter(reason(s) for f in some for s in f.unconverged)
        print(
            f"| {name} | {len(some)} | {sum(bool(f.wrong) for f in some)} "
            f"| {sum(bool(f.unconverged) for f in some)} "
            f"| {'; '.join(f'{w}: {c}' for w, c in why.most_common())} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 200), help="first, and last + 1")
    parser.add_argument("--max-iter", type=int, default=200)
    given = parser.parse_args()
    all_findings = []
    for each in range(*given.seeds):
        found = run(each, given.max_iter)
        all_findings += found
        if any(f.wrong or f.unconverged for f in found):
            print(f"\nseed {each}: {problem(each).kind}\n  {setting(each)}")
        for f in found:
            for sentence in f.wrong:
                print(f"  WRONG, {f.estimator}: {sentence}")
            for sentence in f.unconverged:
                print(f"  {f.estimator}, {f.n_iter} iterations: {sentence}", flush=True)
    report(all_findings)

"""Ctrl-C and exceptions during fit: a whole state or the one from before; warm_start goes on."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted

import sknbln
from sknbln import NBLNEstimator, NBVCPEstimator, _svi
from sknbln._passes import Sweeper
from sknbln.datasets import make_nbln_counts
from sknbln.exceptions import FitInterrupted

from .reference.watched import Watched

N, G, K = 40, 12, 2


@pytest.fixture(autouse=True)
def heard():
    """Hear SIGINT: what a shell starts in the background is born with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def counts():
    return make_nbln_counts(n_cells=N, n_genes=G, n_factors=K, random_state=0).data


@pytest.fixture(scope="module")
def nbvcp(counts):
    return NBVCPEstimator(random_state=0).fit(counts)


def estimator(source, **options):
    return NBLNEstimator(K, informative_prior_estimator=source, random_state=0, **options)


@pytest.fixture
def interrupt_pass(monkeypatch):
    """A function that makes the n-th pass over the rows from now on get a SIGINT."""
    original = Sweeper.__call__

    def arm(n):
        left = [n]

        def interrupted(self, *args):
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(signal.SIGINT)
            return original(self, *args)

        monkeypatch.setattr(Sweeper, "__call__", interrupted)

    yield arm


def assert_whole(model, X):
    """Every attribute of a fit is there, finite and of one fit."""
    check_is_fitted(model)
    for name, value in vars(model).items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            assert np.all(np.isfinite(value)), name
    assert np.all(np.isfinite(model.transform(X)))
    assert np.all(np.isfinite(model.score_samples(X)))
    assert model.sample_posterior(2).eta.shape == (2, X.shape[0])
    if isinstance(model, NBLNEstimator):
        assert_allclose(model.components_.T, model.loadings_ - model.loadings_.mean(0), atol=1e-12)
        assert model.objective_history_.shape == (model.n_iter_ + 1,)
        assert model.newton_decrement_.shape == (X.shape[0],)
    else:
        assert model.loss_curve_.shape == (model.n_iter_,)


# ------------------------------------------------------------------ NBLN


# A pass at the start, then one per sweep.
@pytest.mark.parametrize(
    "options, passes, sweeps",
    [
        ({}, 3, 1),
        ({}, 6, 4),
        ({"loadings_prior": "ard"}, 6, 4),
        (
            {"loadings_prior": "gaussian"},
            8,
            6,
        ),  # "ard" drops all columns of these data at the start
    ],
)
def test_the_last_complete_sweep_is_kept(counts, nbvcp, interrupt_pass, options, passes, sweeps):
    model = estimator(nbvcp, **options)
    interrupt_pass(passes)
    with pytest.raises(FitInterrupted, match=r"NBLNEstimator\.fit was interrupted") as caught:
        model.fit(counts)
    assert caught.value.estimator is model
    assert model.converged_ is False
    assert model.n_iter_ == sweeps
    assert_whole(model, counts)
    # the same as a fit of that many sweeps
    with pytest.warns(ConvergenceWarning, match=f"max_iter={sweeps} sweeps were done"):
        short = estimator(nbvcp, max_iter=sweeps, **options).fit(counts)
    assert_array_equal(model.objective_history_, short.objective_history_)
    assert_allclose(model.components_, short.components_, rtol=1e-9, atol=1e-12)
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize("passes", [1, 2])
def test_before_the_first_sweep_there_is_nothing_to_keep(counts, nbvcp, interrupt_pass, passes):
    model = estimator(nbvcp)
    before = dict(vars(model))
    interrupt_pass(passes)
    with pytest.raises(KeyboardInterrupt) as caught:
        model.fit(counts)
    assert not isinstance(caught.value, FitInterrupted)
    assert vars(model) == before


def test_what_watches_may_interrupt(counts, nbvcp, monkeypatch):
    def stop(outcome):
        if outcome.n_iter == 3:
            raise KeyboardInterrupt

    from sknbln import _maximum

    ascend = _maximum.ascend
    monkeypatch.setattr(
        _maximum, "ascend", lambda *a, **options: ascend(*a, **{**options, "watch": Watched(stop)})
    )
    model = estimator(nbvcp)
    with pytest.raises(FitInterrupted):
        model.fit(counts)
    assert model.n_iter_ == 3
    assert_whole(model, counts)


def test_the_previous_fit_is_kept_when_a_later_one_does_not_begin(counts, nbvcp, interrupt_pass):
    model = estimator(nbvcp).fit(counts)
    before = dict(vars(model))
    interrupt_pass(1)
    model.set_params(informative_prior_estimator=None)
    with pytest.raises(KeyboardInterrupt, match=r"NBLNEstimator is as it was before|^$"):
        model.fit(counts[:, :8])
    assert model.n_features_in_ == G
    before["informative_prior_estimator"] = None
    assert {k: id(v) for k, v in vars(model).items()} == {k: id(v) for k, v in before.items()}
    assert_whole(model, counts)


def test_an_interrupted_source_leaves_the_model_unfitted(counts, interrupt_pass):
    model = estimator(NBVCPEstimator(random_state=0))
    before = dict(vars(model))
    interrupt_pass(4)
    with pytest.raises(KeyboardInterrupt, match="fitted its NBVCPEstimator") as caught:
        model.fit(counts)
    assert not isinstance(caught.value, FitInterrupted)
    assert vars(model) == before


def test_a_failed_fit_leaves_the_estimator_as_it_was(counts, nbvcp):
    for model in (estimator(nbvcp).fit(counts), clone(nbvcp).fit(counts), NBVCPEstimator()):
        before = dict(vars(model))
        bad = counts[:, :8].toarray()
        bad[0, 0] = -1
        with pytest.raises(ValueError, match="Negative"):
            model.fit(bad)
        assert {k: id(v) for k, v in vars(model).items()} == {k: id(v) for k, v in before.items()}


def interrupt_at_line(number):
    """Trace function that raises KeyboardInterrupt before the number-th line of sknbln's code.

    Not in the function that holds the float64 scope: an exception after the body of a ``with`` and
    before its exit skips the exit, in anybody's code.
    """
    package = os.path.dirname(sknbln.__file__) + os.sep
    seen = [0]

    def trace(frame, event, arg):
        if not frame.f_code.co_filename.startswith(package):
            return None
        if event == "line" and frame.f_code.co_name != "scoped":
            seen[0] += 1
            if seen[0] == number:
                raise KeyboardInterrupt
        return trace

    return trace, seen


@pytest.mark.parametrize("kind", ["nbln", "ard", "nbvcp"])
def test_never_half_written_wherever_it_stops(counts, nbvcp, kind):
    made = {
        "nbln": lambda: estimator(nbvcp, tol=1e-3),
        "ard": lambda: estimator(nbvcp, tol=1e-3, loadings_prior="ard"),
        "nbvcp": lambda: NBVCPEstimator(n_steps=400, tol=1.0, random_state=0),
    }[kind]
    expected = made().fit(counts).score_samples(counts)  # compiles, which runs lines too
    trace, seen = interrupt_at_line(0)
    model, before = made(), sys.gettrace()
    sys.settrace(trace)
    try:
        model.fit(counts)
    finally:
        sys.settrace(before)
    # spread over the fit, and closer together at its end, where the attributes are written
    spread = np.random.default_rng(1).integers(1, seen[0], 25)
    kept, lines = 0, np.r_[spread, seen[0] - np.arange(0, 100, 4)]
    for line in lines:
        model = made()
        start = dict(vars(model))
        sys.settrace(interrupt_at_line(line)[0])
        try:
            model.fit(counts)
        except FitInterrupted:
            kept += 1
            assert model.converged_ is False
            assert_whole(model, counts)
        except KeyboardInterrupt:
            assert vars(model) == start
        else:
            pytest.fail(f"line {line} of {seen[0]} was not interrupted")
        finally:
            sys.settrace(before)
        assert not jax.config.jax_enable_x64
    assert 0 < kept < lines.size
    # nothing of it stays behind in JAX or NumPyro
    assert_array_equal(made().fit(counts).score_samples(counts), expected)


CHILD = """
import json, sys, time
import numpy as np
from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln._passes import Sweeper
from sknbln.datasets import make_nbln_counts

X = make_nbln_counts(n_cells=40, n_genes=12, n_factors=2, random_state=0).data
source = NBVCPEstimator(random_state=0).fit(X)
original, calls = Sweeper.__call__, [0]

def waits(self, *args):
    calls[0] += 1
    if calls[0] == 5:
        print("in a sweep", flush=True)
        time.sleep(60)  # until the signal comes
    return original(self, *args)

Sweeper.__call__ = waits
model = NBLNEstimator(2, informative_prior_estimator=source, random_state=0)
try:
    model.fit(X)
except KeyboardInterrupt as error:
    first = type(error).__name__, model.n_iter_, model.converged_
    model.set_params(warm_start=True).fit(X)
    print(json.dumps([*first, model.converged_, model.score(X)]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to one process there")
def test_a_signal_from_outside(counts, nbvcp):
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "in a sweep\n"
        child.send_signal(signal.SIGINT)
        found = json.loads(child.communicate()[0])
    finally:
        child.kill()
    assert child.returncode == 0
    assert found[:4] == ["FitInterrupted", 3, False, True]
    assert found[4] == pytest.approx(estimator(nbvcp).fit(counts).score(counts), abs=0.01)


# ------------------------------------------------------------------ NBVCP


def test_nbvcp_keeps_its_maximum(counts, interrupt_pass):
    model = NBVCPEstimator(random_state=0)
    interrupt_pass(5)
    with pytest.raises(FitInterrupted, match=r"NBVCPEstimator\.fit was interrupted"):
        model.fit(counts)
    assert model.converged_ is False and model.n_iter_ == 0
    assert_whole(model, counts)


def test_nbvcp_keeps_its_last_step(counts, nbvcp, monkeypatch):
    original, calls = _svi._step, [0]

    def step(*args):
        calls[0] += 1
        if calls[0] == 71:
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(_svi, "_step", step)
    model = NBVCPEstimator(random_state=0)
    with pytest.raises(FitInterrupted):
        model.fit(counts)
    assert model.converged_ is False
    # the loss of the step during which the signal came may be lost
    assert model.n_iter_ in (70, 71)
    assert_allclose(model.loss_curve_, nbvcp.loss_curve_[: model.n_iter_], rtol=1e-12)
    assert_whole(model, counts)
    model.set_params(warm_start=True).fit(counts)
    assert model.converged_
    assert_allclose(model.score(counts), nbvcp.score(counts), atol=0.01)


# ------------------------------------------------------------------ warm_start


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"informative_priors_freeze": ("r", "eta")},
        {"cascade": "parameter"},
        {"loadings_prior": "gaussian"},
        {"observation": "poisson"},
    ],
)
def test_warm_start_goes_on_where_it_was(counts, nbvcp, options):
    cold = estimator(nbvcp, **options).fit(counts)
    model = estimator(nbvcp, max_iter=3, warm_start=True, **options)
    with pytest.warns(ConvergenceWarning):
        model.fit(counts)
    reached = model.objective_history_[-1]
    model.set_params(max_iter=200).fit(counts)
    assert model.converged_
    # a prior's scales start anew and take the objective with them; the loadings are kept
    if "loadings_prior" not in options:
        assert model.objective_history_[0] == pytest.approx(reached, rel=1e-10)
    # both stop where a sweep gains less than tol = 1e-3 of the objective, which is about 12 here
    assert model.objective_history_[-1] == pytest.approx(cold.objective_history_[-1], abs=0.05)
    # from where it has converged there is next to nothing to do
    assert model.fit(counts).n_iter_ < cold.n_iter_


def test_warm_start_is_off_by_default_and_needs_no_previous_fit(counts, nbvcp):
    model = estimator(nbvcp).fit(counts)
    cold = model.objective_history_
    assert_array_equal(model.fit(counts).objective_history_, cold)
    warm = estimator(nbvcp, warm_start=True).fit(counts)
    assert_array_equal(warm.objective_history_, cold)
    assert not hasattr(clone(warm), "components_")


def test_warm_start_takes_other_rows_and_other_parameters(counts, nbvcp):
    model = estimator(nbvcp, cascade="parameter", warm_start=True).fit(counts)
    frozen = ("r", "mu", "eta")
    model.set_params(informative_priors_freeze=frozen).fit(counts[::-1])
    assert model.frozen_params_ == frozen
    assert_array_equal(model.dispersion_, nbvcp.dispersion_)
    assert_array_equal(model.mean_, np.log(nbvcp.mean_))
    assert_whole(model, counts[::-1])
    model.set_params(observation="poisson", informative_priors_freeze=("eta",)).fit(counts)
    assert np.all(np.isinf(model.dispersion_))
    model.set_params(observation="nb", informative_priors_freeze=("eta",)).fit(counts)
    assert_whole(model, counts)


def test_warm_start_of_other_genes_or_factors_is_refused(counts, nbvcp):
    model = estimator(nbvcp, warm_start=True).fit(counts)
    before = dict(vars(model))
    with pytest.raises(ValueError, match="12 genes with 2 factors, found X of 8 genes and 2"):
        model.fit(counts[:, :8])
    assert vars(model) == before
    with pytest.raises(ValueError, match="found X of 12 genes and 3 factors asked for"):
        model.set_params(latent_dim=3).fit(counts)
    genes = NBVCPEstimator(warm_start=True, random_state=0).fit(counts)
    with pytest.raises(ValueError, match="a fit of 12 genes, X has 8"):
        genes.fit(counts[:, :8])
    assert genes.n_features_in_ == G


def test_warm_start_of_a_model_that_fits_its_own_source(counts):
    model = NBLNEstimator(K, random_state=0).fit(counts)
    first = model.informative_prior_estimator_
    before = first.mean_.copy()
    model.set_params(warm_start=True).fit(counts)
    second = model.informative_prior_estimator_
    assert second is not first
    assert_array_equal(first.mean_, before)
    assert second.n_iter_ <= first.n_iter_
    assert_allclose(np.log(second.mean_), np.log(first.mean_), atol=0.1)
    assert model.informative_prior_estimator is None
    assert_whole(model, counts)


def test_warm_start_of_nbvcp_under_another_prior_is_a_fit_like_any_other(counts):
    """log M0 + 3 moves every mean by some 40 standard deviations: those start anew."""
    prior = (float(np.log(counts.sum(axis=1).max())) + 1.5, 0.5)
    moved = (prior[0] + 3.0, 0.5)
    model = NBVCPEstimator(capture_efficiency=prior, random_state=0, warm_start=True).fit(counts)
    model.set_params(capture_efficiency=moved).fit(counts)
    cold = NBVCPEstimator(capture_efficiency=moved, random_state=0).fit(counts)
    sd = cold._guide.log_mean[1]
    assert np.max(np.abs(np.log(model.mean_ / cold.mean_)) / sd) < 1.0
    assert_allclose(model.score(counts), cold.score(counts), atol=0.02)

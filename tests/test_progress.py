"""What a fit tells: lines to the logger, or printed where no logging is set up; scikit-learn's callbacks."""

import logging
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln._progress import Progress, of_steps, of_sweep
from sknbln.datasets import make_nbln_counts


class Model:
    """An estimator."""

    def __init__(self, verbose):
        self.verbose = verbose


@pytest.fixture
def outcome():
    loadings = np.ones((5, 3))
    loadings[:, 2] = 0.0
    point = SimpleNamespace(
        x=SimpleNamespace(loadings=loadings), sums=SimpleNamespace(n_unconverged=np.int64(1))
    )
    return SimpleNamespace(n_iter=3, history=[-12.0, -10.25], promised=0.5, gain=1.75, point=point)


@pytest.mark.parametrize("verbose", [0, 1, 2])
def test_a_line_per_sweep_is_printed_if_asked_for(outcome, verbose, capsys):
    with Progress(Model(verbose), 1).stage("maximum", of_sweep) as stage:
        assert not stage.end(outcome)
    line = capsys.readouterr().out
    if not verbose:
        assert line == ""
        return
    start = "[Model] sweep 3: -10.2500 nats per cell, the next promises 0.5, 2 factors, "
    assert line.startswith(start) and line.endswith(" s\n")
    assert ("gained 1.8, 1 cells without a mode" in line) == (verbose == 2)


def test_where_logging_is_set_up_lines_go_there(caplog, capsys):
    with caplog.at_level(logging.INFO, logger="sknbln"):
        Progress(Model(1), 1).say("loud")
        Progress(Model(0), 1).say("silent")
    assert capsys.readouterr().out == ""
    assert "[Model] loud, 0" in caplog.text and "silent" not in caplog.text
    with caplog.at_level(logging.DEBUG, logger="sknbln"):
        Progress(Model(0), 1).say("silent")
    assert "silent" in caplog.text


def test_the_time_left_is_that_of_the_steps_so_far(monkeypatch, capsys):
    clock = iter([0.0, 10.0, 14.0, 14.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    with Progress(Model(1), 1).stage("steps", of_steps(100)) as stage:
        stage.end(20, 3.0, None)
    assert capsys.readouterr().out == (
        "[Model] ELBO step 20: -3.0000 nats per cell, at most 16 s left, 14.0 s\n"
    )


# ------------------------------------------------------------------ scikit-learn's callbacks


class Recorder:
    """A callback: the tasks that end, scores of the fitted estimator; asks to stop after some steps."""

    max_propagation_depth = None

    def __init__(self, stop_after=np.inf):
        self.begun, self.ended, self.scores, self.stop_after = [], [], {}, stop_after
        self.events = []

    def setup(self, estimator, context):
        self.events.append("setup")

    def teardown(self, estimator, context):
        self.events.append("teardown")

    def on_fit_task_begin(self, estimator, context):
        self.begun.append(self.name(context))

    def on_fit_task_end(self, estimator, context, *, X=None, metadata=None, fitted_estimator=None):
        assert jnp.zeros(1).dtype == jnp.float32  # the user's setting, not ours
        name = self.name(context)
        self.ended.append(name)
        if hasattr(fitted_estimator, "score"):
            known = {n: v for n, v in metadata.items() if n != "sample_weight"}
            self.scores.setdefault(name, []).append(fitted_estimator.score(X, **known))
        return self.ended.count(name) >= self.stop_after

    @staticmethod
    def name(context):
        stage = "" if context.parent is None else context.parent.task_name
        return context.estimator_name, stage, context.task_name


@pytest.fixture(scope="module")
def counts():
    return make_nbln_counts(n_cells=120, n_genes=16, n_factors=2, random_state=0).data


@pytest.fixture(scope="module")
def callbacks():
    return pytest.importorskip("sklearn.callback")


NBLN_STEP = ("NBLNEstimator", "maximum", "step")
NBVCP_STEP = ("NBVCPEstimator", "variational fit", "step")


def test_callbacks_see_every_sweep_with_its_score(callbacks, counts):
    watch = Recorder()
    source = NBVCPEstimator(random_state=0).set_callbacks(watch).fit(counts)
    assert watch.scores[NBVCP_STEP][-1] == source.score(counts)
    assert watch.ended.count(NBVCP_STEP) == source.n_iter_ // 50
    assert watch.events == ["setup", "teardown"]
    watch = Recorder()
    model = NBLNEstimator(informative_prior_estimator=source, random_state=0)
    silent = model.fit(counts).score(counts)
    model.set_callbacks(watch).fit(counts)
    assert model.score(counts) == silent  # watching changes nothing
    assert sorted(watch.begun) == sorted(watch.ended)
    assert watch.ended[-2:] == [("NBLNEstimator", "fit", "maximum"), ("NBLNEstimator", "", "fit")]
    assert watch.ended.count(NBLN_STEP) == model.n_iter_
    assert_allclose(watch.scores[NBLN_STEP][-1], silent, rtol=1e-12)
    assert watch.scores[NBLN_STEP][0] < silent
    assert watch.scores["NBLNEstimator", "", "fit"] == [silent]
    assert not [name for name in vars(model) if "callback" in name and name != "_skl_callbacks"]


def test_callbacks_are_given_what_is_known_of_the_rows(callbacks, counts):
    watch = Recorder()
    known = dict(covariates=np.arange(120) % 2, sample_weight=np.ones(120))
    model = NBLNEstimator(random_state=0, latent_dim=1).set_callbacks(watch).fit(counts, **known)
    last = model.score(counts, covariates=known["covariates"])
    assert_allclose(watch.scores[NBLN_STEP][-1], last, rtol=1e-12)


@pytest.mark.parametrize("memory", [False, True])
def test_callbacks_see_the_fit_of_the_source(callbacks, counts, memory, tmp_path):
    watch = Recorder()
    model = NBLNEstimator(memory=str(tmp_path) if memory else None, random_state=0)
    model.set_callbacks(watch).fit(counts)
    assert watch.ended.count(NBVCP_STEP) == 2
    assert watch.events == ["setup", "teardown"]
    assert sorted(watch.begun) == sorted(watch.ended)
    assert not hasattr(model.informative_prior_estimator_, "_parent_callback_ctx")
    n = watch.ended.count(NBVCP_STEP)
    again = NBLNEstimator(**model.get_params()).set_callbacks(watch).fit(counts)
    # a source out of the cache has no steps
    assert watch.ended.count(NBVCP_STEP) == (n if memory else 2 * n)
    assert again.score(counts) == model.score(counts)


def test_a_callback_may_stop_a_fit(callbacks, counts, recwarn):
    model = NBLNEstimator(random_state=0).set_callbacks(Recorder(stop_after=1)).fit(counts)
    assert model.n_iter_ == 1 and not model.converged_
    assert model.informative_prior_estimator_.n_iter_ == 50
    assert not recwarn.list  # it is what was asked for
    assert np.isfinite(model.score(counts))


@pytest.mark.parametrize("estimator", [NBVCPEstimator, NBLNEstimator])
def test_callbacks_are_told_of_the_end_of_a_fit_that_fails(callbacks, counts, estimator):
    watch = Recorder()
    model = estimator().set_callbacks(watch)
    with pytest.raises(ValueError, match="Negative values"):
        model.fit(-counts)
    assert watch.events == ["setup", "teardown"]
    assert vars(model) == vars(estimator().set_callbacks(watch))


def test_callbacks_of_a_search_and_a_pipeline_see_our_sweeps(callbacks, counts):
    watch = Recorder()
    search = GridSearchCV(NBLNEstimator(random_state=0), {"latent_dim": [1, 2]}, cv=2)
    search.set_callbacks(watch).fit(counts)
    assert watch.ended.count(("NBLNEstimator", "fit", "maximum")) >= 4
    watch = Recorder()
    pipeline = make_pipeline(NBLNEstimator(random_state=0, latent_dim=2), StandardScaler())
    pipeline.set_callbacks(watch).fit(counts)
    assert watch.ended.count(NBLN_STEP) == pipeline[0].n_iter_

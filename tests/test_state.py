"""Pickles across processes, threads, workers, ambient settings: the same bits, nothing of the user's changed.

Elsewhere: same seed, same bits, other batch_size, clones and frozen sources, two-process grid searches
(test_sklearn_api.py, test_nbvcp.py); the float64 scope, import and JAX's flags (test_jax.py).
"""

import copy
import json
import os
import pickle
import random
import subprocess
import sys
import threading
import warnings

import jax
import jax.numpy as jnp
import joblib
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from sklearn.base import clone

import sknbln
from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln.datasets import make_nbln_counts
from sknbln.exceptions import FitInterrupted, InconsistentVersionWarning

N, G, K = 40, 12, 2


@pytest.fixture(scope="module")
def counts():
    return make_nbln_counts(n_cells=N, n_genes=G, n_factors=K, random_state=0).data


def fit_both(X, seed=0, **options):
    source = NBVCPEstimator(random_state=seed).fit(X)
    model = NBLNEstimator(K, informative_prior_estimator=source, random_state=seed, **options)
    return source, model.fit(X)


def results(source, model, X):
    """Everything that has to be the same to the last bit."""
    return {
        "mean": source.mean_,
        "losses": source.loss_curve_,
        "log_expression": source.transform(X),
        "nbvcp_scores": source.score_samples(X),
        "components": model.components_,
        "errors": model.components_standard_error_,
        "history": model.objective_history_,
        "scores": model.transform(X),
        "nbln_scores": model.score_samples(X),
        "draws": model.sample_posterior(3, random_state=0).mu,
    }


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype == np.float64
        assert found[name].tobytes() == value.tobytes(), name


@pytest.fixture(scope="module")
def fitted(counts):
    return fit_both(counts)


@pytest.fixture(scope="module")
def expected(counts, fitted):
    return results(*fitted, counts)


# ------------------------------------------------------------------ persistence

LOAD = """
import sys, warnings
warnings.simplefilter("error")
import joblib, numpy as np, pickle
import jax.numpy as jnp
jnp.sin(jnp.ones(3))  # JAX has been used in float32
from tests.test_state import results
folder = sys.argv[1]
loaded = dict(joblib=joblib.load(folder + "/model.joblib"))
with open(folder + "/model.pickle", "rb") as f:
    loaded["pickle"] = pickle.load(f)
for name, (source, model, X) in loaded.items():
    np.savez(folder + "/" + name, **results(source, model, X))
"""


def run_child(code, *arguments):
    """Run code in a new process that can import the tests; its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_another_process_reads_the_same_bits(counts, fitted, expected, tmp_path):
    """joblib and pickle; the child computes transform, score and draws again."""
    joblib.dump((*fitted, counts), tmp_path / "model.joblib", compress=3)
    with open(tmp_path / "model.pickle", "wb") as f:
        pickle.dump((*fitted, counts), f)
    run_child(LOAD, str(tmp_path))
    for name in ("joblib", "pickle"):
        assert_same_bits(dict(np.load(tmp_path / f"{name}.npz")), expected)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol(counts, fitted, expected, protocol):
    again = pickle.loads(pickle.dumps(fitted, protocol))
    assert_same_bits(results(*again, counts), expected)


def test_copies_and_unfitted_estimators(counts, fitted, expected):
    assert_same_bits(results(*copy.deepcopy(fitted), counts), expected)
    for estimator in (NBVCPEstimator(tol=0.5), NBLNEstimator(3, loadings_prior={"type": "ard"})):
        again = pickle.loads(pickle.dumps(estimator))
        assert again.get_params() == estimator.get_params()
        assert vars(again) == vars(estimator)


def test_a_pickle_of_another_version_warns(fitted, monkeypatch):
    monkeypatch.setattr(sknbln, "__version__", "0.0.1")
    written = pickle.dumps(fitted[0])
    monkeypatch.undo()
    message = f"NBVCPEstimator was pickled by sknbln 0.0.1 and is loaded by {sknbln.__version__}"
    with pytest.warns(InconsistentVersionWarning, match=message) as caught:
        again = pickle.loads(written)
    assert caught[0].message.original_version == "0.0.1"
    assert_array_equal(again.mean_, fitted[0].mean_)
    # loaded and written again it is of this version
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pickle.loads(pickle.dumps(again))


def test_a_pickle_without_a_version_warns(fitted):
    estimator = clone(fitted[0])
    estimator.__setstate__(estimator.__getstate__())
    state = estimator.__getstate__()
    del state["_sknbln_version"]
    with pytest.warns(InconsistentVersionWarning, match="of an unknown version"):
        estimator.__setstate__(state)
    assert "_sknbln_version" not in vars(estimator)


@pytest.mark.parametrize(
    "message",
    [FitInterrupted(NBVCPEstimator()), InconsistentVersionWarning("NBVCPEstimator", "1", "2")],
)
def test_exceptions_survive_a_pickle(message):
    """As workers send them to the parent."""
    again = pickle.loads(pickle.dumps(message))
    assert type(again) is type(message) and str(again) == str(message)


# ------------------------------------------------------------------ threads and workers


def in_threads(work, n):
    """Results of ``work(i)`` for i < n, all started at once, switching often."""
    found, start = [None] * n, threading.Barrier(n)

    def run(i):
        start.wait()
        try:
            found[i] = work(i)
        except BaseException as error:  # it would be lost with its thread
            found[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found


def test_threads_that_fit_at_the_same_time(counts):
    def work(i):
        return results(*fit_both(counts, seed=i), counts)

    for i, found in enumerate(in_threads(work, 4)):
        assert_same_bits(found, work(i))


def test_threads_that_compile_at_the_same_time(counts):
    """NumPyro's stack of effect handlers is one for all threads: tracing needs a lock."""
    widths = (8, 9)

    def work(i):
        return vars(NBVCPEstimator(n_steps=20, tol=1e3, random_state=i).fit(counts[:, : widths[i]]))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together = in_threads(work, len(widths))
        for i, found in enumerate(together):
            alone = work(i)
            for name in ("mean_", "dispersion_", "capture_offset_", "loss_curve_"):
                assert_array_equal(found[name], alone[name])


@pytest.mark.slow
def test_loky_workers_give_the_same_bits(counts, expected):
    """After JAX has been used in this process; the matrix arrives memory-mapped."""
    with joblib.Parallel(n_jobs=2, max_nbytes=1) as parallel:
        found = parallel(joblib.delayed(_fit_in_worker)(counts.toarray()) for _ in range(2))
    for one in found:
        assert_same_bits(one, expected)


def _fit_in_worker(X):
    assert not X.flags.writeable
    return results(*fit_both(X), X)


# ------------------------------------------------------------------ ambient settings


@pytest.mark.parametrize("ambient", [False, True])
def test_ambient_precision_changes_nothing(counts, expected, ambient):
    with jax.enable_x64(ambient):
        assert jnp.sin(jnp.ones(3)).dtype == (jnp.float64 if ambient else jnp.float32)
        assert_same_bits(results(*fit_both(counts), counts), expected)
        assert jax.config.jax_enable_x64 is ambient
        assert jnp.ones(3).dtype == (jnp.float64 if ambient else jnp.float32)


CHILD = """
import json, sys
import numpy as np, jax, jax.numpy as jnp
{settings}
import warnings
warnings.simplefilter("error")
from tests.test_state import fit_both, make_nbln_counts, results
X = make_nbln_counts(n_cells=40, n_genes=12, n_factors=2, random_state=0).data
found = results(*fit_both(X), X)
hard = X.toarray()
hard[0], hard[:, 3], hard[5, 5] = 0, 0, 10**7
warnings.simplefilter("ignore")
for options in (dict(), dict(loadings_prior="ard"), dict(observation="poisson")):
    source, model = fit_both(hard, **options)
    assert np.all(np.isfinite(model.score_samples(hard)))
print(json.dumps({{name: value.tobytes().hex() for name, value in found.items()}}))
"""


SETTINGS = {
    "x64 and debug_nans": "jax.config.update('jax_enable_x64', True); "
    "jax.config.update('jax_debug_nans', True)",
    "NumPy's errors raised": "np.seterr(all='raise')",
    "checks of JAX": "jax.config.update('jax_check_tracer_leaks', True); "
    "jax.config.update('jax_debug_infs', True); jax.config.update('jax_numpy_rank_promotion', 'raise')",
}


@pytest.mark.parametrize(
    "name",
    ["x64 and debug_nans", *(pytest.param(n, marks=pytest.mark.slow) for n in [*SETTINGS][1:])],
)
def test_settings_of_the_whole_process_change_nothing(expected, name):
    """A child process: such settings are in place before anything is compiled.

    Another process has another order of sets too: sums may not run over one.
    """
    found = json.loads(run_child(CHILD.format(settings=SETTINGS[name])))
    assert found == {name: value.tobytes().hex() for name, value in expected.items()}


def ambient_state():
    """The user's global state."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "jax": {name: repr(value) for name, value in jax.config.values.items()},
        "jax scope": (jax.config.jax_enable_x64, jax.config.jax_debug_nans),
        "random": (kind, keys.tobytes(), rest),
        "Python's random": random.getstate(),
        "errstate": np.geterr(),
        "filters": list(warnings.filters),
        "environment": dict(os.environ),
        "print options": np.get_printoptions(),
        "recursion": sys.getrecursionlimit(),
    }


def use_everything(X):
    source, model = fit_both(X, loadings_prior="ard", informative_priors_freeze=("eta",))
    for fitted in (source, model):
        fitted.transform(X)
        fitted.score(X)
        fitted.sample_posterior(2)
        fitted.sample_posterior(2, X)
    model.posterior_scores(X)
    model.get_distributions()


def fails(X):
    """An exception out of the middle of a sweep."""

    def broken(self, *args):
        raise MemoryError("in a sweep")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sknbln._passes.Sweeper.__call__", broken)
        with pytest.raises(MemoryError, match="in a sweep"):
            fit_both(X)


@pytest.mark.parametrize("work", [use_everything, fails], ids=["success", "exception"])
def test_the_users_state_is_unchanged(counts, work):
    before = ambient_state()
    work(counts)
    after = ambient_state()
    for name, value in before.items():
        assert after[name] == value, name


def test_global_seeds_are_neither_used_nor_moved(counts, expected):
    np.random.seed(1)  # noqa: NPY002
    assert_same_bits(results(*fit_both(counts), counts), expected)
    first = np.random.standard_normal()  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    assert first == np.random.standard_normal()  # noqa: NPY002


# ------------------------------------------------------------------ other batches


@pytest.mark.slow
def test_batch_size_is_memory_only(counts, expected):
    """NBVCP's minibatches do not depend on it; what is left is the order of the sums."""
    batch_size = 7
    source = NBVCPEstimator(batch_size=batch_size, random_state=0).fit(counts)
    model = NBLNEstimator(
        K, informative_prior_estimator=source, batch_size=batch_size, random_state=0
    ).fit(counts)
    found = results(source, model, counts)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-8, atol=1e-8, err_msg=name)

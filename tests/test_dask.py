"""Dask arrays: lazy results, and blocks that are solved on the workers of a cluster on this machine."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import joblib
import numpy as np
import pytest
import scipy.sparse as sp
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.model_selection import GridSearchCV

from sknbln import NBLNEstimator, NBVCPEstimator, _dask, _rows
from sknbln.datasets import make_nbln_counts

da = pytest.importorskip("dask.array")
distributed = pytest.importorskip("distributed")

#: a shape whose kernels other tests compile too
N, G = 150, 24
HERE = dict(n_workers=2, threads_per_worker=1, dashboard_address=None)


@pytest.fixture(scope="module")
def counts():
    return make_nbln_counts(N, G, n_factors=2, random_state=3).data.toarray()


@pytest.fixture(scope="module")
def model(counts):
    return NBLNEstimator(random_state=0).fit(counts)


@pytest.fixture
def client():
    """Two workers, threads of this process."""
    with distributed.Client(processes=False, **HERE) as client:
        yield client


#: chunks of sizes that are padded to the same
SIZES = 38, 37, 0, 39, 36


def lazy(X, sizes=SIZES):
    return da.from_array(X, chunks=(sizes, X.shape[1]))


def assert_same_fit(found, expected, tolerance=1e-8):
    for name, value in vars(expected).items():
        if (
            isinstance(value, np.ndarray)
            and value.dtype.kind == "f"
            and name != "newton_decrement_"
        ):
            least = tolerance * np.max(np.abs(value), initial=1.0)
            assert_allclose(getattr(found, name), value, rtol=tolerance, atol=least, err_msg=name)


# ------------------------------------------------------------------ transform


@pytest.mark.parametrize("kind", ["nbln", "nbvcp"])
def test_transform_of_a_dask_array_is_lazy(counts, model, kind):
    model = model if kind == "nbln" else model.informative_prior_estimator_
    computed = []

    def watched(chunk):
        computed.append(chunk.shape)
        return sp.csr_matrix(chunk)

    X = lazy(counts).map_blocks(watched, meta=sp.csr_matrix((0, 0)))
    computed.clear()
    found = model.transform(X)
    assert isinstance(found, da.Array) and not computed
    expected = model.transform(counts)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert found.chunks[0] == (38, 37, 39, 36)
    assert_array_equal(found.compute(), expected)
    assert_array_equal(found[31:33].compute(), expected[31:33])


def test_what_goes_to_the_workers_is_without_training_rows(model):
    for one in (model, model.informative_prior_estimator_):
        lean = one._for_new_rows()
        assert N not in _lengths(lean) and N in _lengths(one)
        assert_array_equal(one.capture_offset_.shape, (N,))  # the model itself is as it was


def _lengths(thing):
    """Lengths of all arrays in it."""
    if isinstance(thing, np.ndarray):
        return set(thing.shape)
    if isinstance(thing, (tuple, list)):
        return set().union(*map(_lengths, thing))
    if hasattr(thing, "__dict__"):
        return _lengths(list(vars(thing).values()))
    return set()


@pytest.mark.slow
def test_transform_with_covariates_and_offsets(counts):
    rng = np.random.default_rng(0)
    known = dict(
        covariates=rng.standard_normal((N, 1)), offset=rng.uniform(-0.1, 0.1, (N, 1)).ravel()
    )
    model = NBVCPEstimator(capture_efficiency=None, n_steps=1, tol=1e9, random_state=0)
    with pytest.warns(Warning):
        model.fit(counts, **known)
    found = model.transform(lazy(counts), **known)
    assert_array_equal(found.compute(), model.transform(counts, **known))
    with pytest.raises(ValueError, match="covariates"):
        model.transform(lazy(counts), offset=known["offset"])
    with pytest.raises(ValueError, match="features"):
        model.transform(lazy(counts[:, 1:]), **known)


def test_an_error_in_a_chunk_says_where_the_chunk_begins(counts, model):
    X = counts.astype(float)
    X[85, 2] = -1
    with pytest.raises(ValueError, match=r"Negative values .* at row 10, column 2") as error:
        model.transform(lazy(X)).compute()
    assert error.value.__notes__ == [
        "Rows are counted from row 75, the first of a chunk of the Dask array."
    ]


# ------------------------------------------------------------------ a cluster


def test_a_fit_on_workers_is_that_in_memory(counts, model, client, monkeypatch):
    parts, on_worker = [], _dask.Cluster.in_order

    def counted(self, *args):
        for rows, part in on_worker(self, *args):
            parts.append(rows)
            yield rows, part

    monkeypatch.setattr(_dask.Cluster, "in_order", counted)
    X = lazy(counts).map_blocks(sp.csr_array)
    found = NBLNEstimator(random_state=0).fit(X)
    assert len(parts) > 40
    assert parts[:4] == [slice(0, 38), slice(38, 75), slice(75, 114), slice(114, 150)]
    assert_same_fit(found, model)
    assert_allclose(found.score_samples(X), model.score_samples(counts), rtol=1e-9)
    assert_allclose(found.score(X), model.score(counts), rtol=1e-9)
    assert_allclose(found.transform(X).compute(), model.transform(counts), atol=1e-7)


def test_an_error_on_a_worker_is_raised_here_and_leaves_the_estimator(counts, client, monkeypatch):
    from sknbln import _passes

    def fails(*args):
        raise RuntimeError("a worker's own")

    monkeypatch.setattr(_passes, "_sweep", fails)
    model = NBLNEstimator(random_state=0)
    with pytest.raises(RuntimeError, match="a worker's own"):
        model.fit(lazy(counts))
    assert not hasattr(model, "n_features_in_")


# ------------------------------------------------------------------ what a task on a worker runs in


@pytest.fixture
def worker(monkeypatch):
    """A worker of 3 threads, as Dask starts them; what malloc is told, and what JAX starts with."""
    calls, start = SimpleNamespace(malloc=[], threads=[]), _dask.jax.local_devices

    def local_devices():
        calls.threads.append(os.environ.get("NPROC"))
        return start()

    one = SimpleNamespace(nanny="tcp://127.0.0.1:1", state=SimpleNamespace(nthreads=3))
    monkeypatch.setattr(distributed, "get_worker", lambda: one)
    monkeypatch.setattr(_dask, "_MALLOPT", lambda *option: calls.malloc.append(option))
    monkeypatch.setattr(_dask, "_STARTED", [])
    monkeypatch.setattr(_dask.jax, "local_devices", local_devices)
    for name in ("NPROC", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_jax_has_the_threads_of_its_worker(worker, monkeypatch):
    for _ in range(2):
        with _dask.tuned_worker():
            pass
    assert worker.threads == ["3"] and "NPROC" not in os.environ
    monkeypatch.setattr(_dask, "_STARTED", [])
    monkeypatch.setenv("NPROC", "5")  # a user's own number
    with _dask.tuned_worker():
        pass
    assert worker.threads == ["3"] and os.environ["NPROC"] == "5"


def test_tasks_that_begin_together_start_jax_once(worker, monkeypatch):
    start, together = _dask.jax.local_devices, threading.Barrier(4)
    monkeypatch.setattr(_dask.jax, "local_devices", lambda: (time.sleep(0.05), start())[1])

    def task(_):
        together.wait()
        with _dask.tuned_worker():
            return len(worker.threads)

    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(task, range(4))] == [1, 1, 1, 1]
    assert worker.threads == ["3"] and "NPROC" not in os.environ


def test_malloc_of_a_worker_keeps_what_a_task_frees(worker, monkeypatch):
    with _dask.tuned_worker():
        pass
    assert worker.malloc == []  # by its own defaults it does
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    with pytest.raises(ZeroDivisionError), _dask.tuned_worker():
        assert worker.malloc == [(-1, 2**30), (-3, 2**25)]
        raise ZeroDivisionError
    assert worker.malloc[2:] == [(-1, 65536), (-3, 2**17)]
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", str(2**70))
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000")
    with _dask.tuned_worker():
        pass
    assert worker.malloc[-2:] == [(-1, 2**31 - 1), (-3, 1000)]


def test_a_process_that_is_not_only_a_workers_stays_as_it_is(worker, monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    monkeypatch.setattr(distributed, "get_worker", lambda: SimpleNamespace(nanny=None))
    with _dask.tuned_worker():
        pass

    def nowhere():
        raise ValueError("No worker found")

    monkeypatch.setattr(distributed, "get_worker", nowhere)
    with _dask.tuned_worker():
        pass
    assert worker.malloc == worker.threads == []


def test_blocks_and_transforms_run_in_it(worker, counts, model, monkeypatch):
    def operation(batches, of_rows):
        return [*worker.threads], of_rows

    batches = _rows.RowBatches(sp.csr_matrix(counts), np.zeros(N), np.ones(N))
    found, _ = _rows._on_worker(counts, (operation, False, ()), batches, np.zeros((N, 1)))
    assert found == ["3"]
    monkeypatch.setattr(_dask, "_STARTED", [])
    model.transform(lazy(counts)).compute()
    assert worker.threads.count("3") == 2


COUNT = """
import os
from sknbln import _dask
_dask._start_jax(%d)
print(len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are counted in /proc")
def test_jax_starts_as_many_threads_as_it_is_told(monkeypatch):
    monkeypatch.delenv("NPROC", raising=False)
    found = [
        int(
            subprocess.run(
                [sys.executable, "-c", COUNT % n], check=True, stdout=subprocess.PIPE
            ).stdout
        )
        for n in (1, 5)
    ]
    assert found[1] >= found[0] + 4


@pytest.mark.slow
def test_grid_search_on_a_cluster(counts, client):
    source = NBVCPEstimator(random_state=0)
    search = GridSearchCV(
        NBLNEstimator(informative_prior_estimator=source, random_state=0),
        {"latent_dim": [1, 2]},
        cv=2,
        refit=False,
    )
    with joblib.parallel_config(backend="dask"):
        found = search.fit(counts).cv_results_["mean_test_score"]
    expected = search.set_params(n_jobs=1).fit(counts).cv_results_["mean_test_score"]
    assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.slow
def test_a_worker_that_dies_costs_its_blocks_only(counts, model, monkeypatch):
    with (
        distributed.LocalCluster(host="127.0.0.1", processes=True, **HERE) as cluster,
        distributed.Client(cluster) as client,
    ):
        X, in_order, killed = lazy(counts), _dask.Cluster.in_order, []
        pids = client.run(os.getpid)

        def interrupted(self, *args):
            for i, part in enumerate(in_order(self, *args)):
                calls.append(i)
                if len(calls) == 10 and not killed:
                    killed.extend(pids.popitem())
                    os.kill(killed[1], signal.SIGKILL)
                yield part

        calls = []
        monkeypatch.setattr(_dask.Cluster, "in_order", interrupted)
        found = NBLNEstimator(random_state=0).fit(X)
        assert killed and len(calls) > 40
    assert_same_fit(found, model)

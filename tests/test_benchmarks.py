"""Helpers of the benchmark programs: how fits are judged, worker processes, the memory meter."""

import importlib.util
import os
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def module(name):
    """A module of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"benchmarks{name}", BENCHMARKS / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


common = module("_common")
process = module("_process")


# ------------------------------------------------------------------ how fits are judged


def test_off_diagonals_of_the_truth_rotated_and_scaled():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(40, 3))
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    correlation, slope = common.off_diagonals(2.0 * truth @ rotation, truth)
    assert_allclose([correlation, slope], [1.0, 0.25], rtol=1e-12)


def test_off_diagonals_do_not_see_what_all_genes_share():
    rng = np.random.default_rng(1)
    truth = rng.normal(size=(40, 3))
    assert_allclose(common.off_diagonals(truth + [5.0, 0.0, -2.0], truth), [1.0, 1.0], rtol=1e-12)


def test_off_diagonals_do_not_see_the_diagonal():
    """The rows' own variances are no gene-gene structure: a reference by loops."""
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 9, 2))
    p, q = (w - w.mean(0) for w in (a, b))
    pairs = [(p[i] @ p[j], q[i] @ q[j]) for i in range(9) for j in range(i)]
    x, y = np.array(pairs).T
    expected = np.corrcoef(x, y)[0, 1], (x @ y) / (x @ x)
    assert_allclose(common.off_diagonals(a, b), expected, rtol=1e-10)


def test_off_diagonals_of_no_loadings():
    assert np.isnan(common.off_diagonals(np.zeros((5, 2)), np.eye(5)[:, :2])).all()


def test_canonical_correlations_of_a_linear_image_are_one():
    rng = np.random.default_rng(3)
    b = rng.normal(size=(200, 3))
    a = np.column_stack([b @ rng.normal(size=(3, 3)) + 7.0, rng.normal(size=200)])
    assert_allclose(common.canonical_correlations(a, b), 1.0, rtol=1e-10)


def test_canonical_correlations_of_one_column_are_its_correlation():
    a, b = np.random.default_rng(4).normal(size=(2, 100, 1))
    expected = abs(np.corrcoef(a[:, 0], b[:, 0])[0, 1])
    assert_allclose(common.canonical_correlations(a, b), [expected], rtol=1e-10)


@pytest.mark.parametrize("columns", [0, 1])
def test_directions_that_are_missing_count_as_zero(columns):
    b = np.random.default_rng(5).normal(size=(100, 2))
    a = np.column_stack([b[:, :columns], np.zeros(100)])
    assert_allclose(
        common.canonical_correlations(a, b), [1.0] * columns + [0.0] * (2 - columns), atol=1e-10
    )


def test_unit_scores_keep_the_covariance_of_the_log_rates():
    rng = np.random.default_rng(6)
    loadings = rng.normal(size=(8, 3))
    scores = rng.normal(size=(50, 3)) @ rng.normal(size=(3, 3)) + 4.0
    found = common.unit_scores(loadings, scores)
    assert_allclose(found @ found.T, np.cov((scores @ loadings.T).T), rtol=1e-10, atol=1e-12)


def test_a_simulated_set_and_its_file(tmp_path):
    data = common.simulated("50x20_shallow")
    assert data.counts.shape == (50, 20) and data.depth == 0.1
    assert data.truth["loadings"].shape == (20, 4) and data.truth["scores"].shape == (50, 4)
    assert_array_equal(np.sort(np.r_[data.train, data.test]), np.arange(50))
    assert data.train.size == 40
    common.save(tmp_path / "data.npz", data)
    again = common.load(tmp_path / "data.npz")
    assert_array_equal(again.counts.toarray(), data.counts.toarray())
    assert set(again.truth) == set(data.truth)
    assert again.capture_prior == data.capture_prior


def test_medians_leave_out_what_a_round_does_not_have():
    rounds = [{"a": 1.0, "b": None}, {"a": 3.0, "b": 5.0, "name": "x"}, {"a": 8.0}]
    assert common.medians(rounds) == {"a": 3.0, "b": 5.0}


def test_a_table():
    text = common.table(["", "s"], [["one", 0.12345], ["two", 1234.5], ["three", None]])
    assert text.splitlines() == [
        "|  | s |",
        "| --- | --- |",
        "| one | 0.123 |",
        "| two | 1234 |",
        "| three | - |",
    ]


# ------------------------------------------------------------------ processes and memory


def test_the_peak_is_seen_after_the_memory_is_free_again():
    meter = process.PeakMemory()
    if not meter.exact:
        pytest.skip("no high-water mark that may be set back on this system")
    block = np.ones(8_000_000)  # 64 MB, all of it touched
    del block
    # the process may keep a few MB more or less resident than at the start
    assert 55 < meter.over_baseline() < 80
    assert process.PeakMemory().over_baseline() < 20


WORKER = """
import os, sys
sys.path.insert(0, {folder!r})
import _process

def measure(request):
    if request["fail"]:
        raise ValueError("on purpose")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    names = ("OMP_NUM_THREADS", "JAX_COMPILATION_CACHE_DIR", "EXTRA")
    return {{"started": request["started"], "cores": cores, **{{n: os.environ.get(n) for n in names}}}}

_process.main(measure, lambda: None)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "worker.py"
    path.write_text(WORKER.format(folder=str(BENCHMARKS)))
    return path


def test_a_worker_on_one_core(script, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "somewhere")
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    now = time.monotonic()
    found = process.run(script, {"fail": False}, cores=1, env={"EXTRA": "yes"})
    assert now <= found["started"] <= time.monotonic()
    assert found["OMP_NUM_THREADS"] == "1" and found["EXTRA"] == "yes"
    assert found["JAX_COMPILATION_CACHE_DIR"] is None  # it would make a cold process warm
    if before is not None:
        assert found["cores"] == 1
        assert os.sched_getaffinity(0) == before


def test_a_worker_that_fails_says_why(script):
    with pytest.raises(process.WorkerError, match="exit status 1: ValueError: on purpose"):
        process.run(script, {"fail": True})


def test_a_worker_that_runs_past_its_time(script):
    with pytest.raises(process.WorkerError, match=r"ran past 0\.001 s"):
        process.run(script, {"fail": False}, timeout=1e-3)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_more_cores_than_there_are():
    n = len(os.sched_getaffinity(0))
    with pytest.raises(SystemExit, match=f"--cores {n + 1}: this process may use {n}"):
        with process.on_cores(n + 1):
            pass


def test_the_programs_import_no_peer_and_not_us(script):
    """A worker is timed from its start: what every worker imports must be light."""
    script.write_text(
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r})\n"
        "import _process, compare, revisions, scale, grid\n"
        "heavy = {'sknbln', 'jax', 'torch', 'sklearn', 'pandas'} & set(sys.modules)\n"
        "_process.main(lambda request: sorted(heavy), lambda: None)\n"
    )
    assert process.run(script, {}) == []

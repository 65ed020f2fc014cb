"""Of many rows a sample is fitted first, and all rows go on from there."""

import signal

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sknbln import NBLNEstimator, NBVCPEstimator, _opening, _rows
from sknbln._passes import Sweeper
from sknbln.datasets import make_nbln_counts
from sknbln.solver.ascent import LOOK_SWEEPS

N, SAMPLE, G, BATCH = 900, 600, 24, 192


@pytest.fixture(scope="module")
def counts():
    return make_nbln_counts(n_cells=N, n_genes=G, n_factors=2, random_state=0).data


@pytest.fixture(scope="module")
def source(counts):
    return NBVCPEstimator(batch_size=BATCH, random_state=0).fit(counts)


@pytest.fixture
def sampled(monkeypatch):
    """Fits of more than SAMPLE rows sample, and list the number of rows of every pass."""
    monkeypatch.setattr(_rows, "MANY_ROWS", SAMPLE)
    monkeypatch.setattr(_rows, "SAMPLE_ROWS", SAMPLE)
    passes, original = [], Sweeper.__call__

    def counted(self, params):
        passes.append(self.batches.n_cells)
        return original(self, params)

    monkeypatch.setattr(Sweeper, "__call__", counted)
    return passes


def estimator(source, **options):
    return NBLNEstimator(
        informative_prior_estimator=source, batch_size=BATCH, random_state=0, **options
    )


def test_a_sample_saves_passes_over_all_rows_and_the_optimum_is_the_same(counts, source, sampled):
    model = estimator(source).fit(counts)
    assert set(sampled) == {SAMPLE, N} and sampled == sorted(sampled)
    assert sampled.count(N) <= 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_rows, "MANY_ROWS", N)
        sampled.clear()
        plain = estimator(source).fit(counts)
    assert sampled.count(N) > 5
    assert model.latent_dim_ == plain.latent_dim_ == 2
    assert model.converged_ and plain.converged_
    found, expected = (m.objective_history_[-1] for m in (model, plain))
    assert_allclose(found, expected, atol=5 * model.tol_ * abs(expected))
    assert_allclose(model.components_, plain.components_, atol=0.1)
    assert model.n_iter_ == model.objective_history_.size - 1
    assert model.rank_diagnostics_["column_information"].size >= 2


def test_independent_genes_start_from_a_sample_too(counts, sampled):
    fitted = NBVCPEstimator(batch_size=BATCH, random_state=0).fit(counts)
    assert set(sampled) == {SAMPLE, N} and sampled == sorted(sampled)
    few = sampled.count(N)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_rows, "MANY_ROWS", N)
        sampled.clear()
        plain = NBVCPEstimator(batch_size=BATCH, random_state=0).fit(counts)
    assert set(sampled) == {N} and few < sampled.count(N)
    # the rest of the fit has other minibatches: equal but for a part of the standard deviations
    (loc, scale), (expected, _) = fitted._guide.log_mean, plain._guide.log_mean
    assert np.all(np.abs(loc - expected) < 0.3 * scale)


def test_an_interrupted_sample_of_independent_genes_leaves_nothing(counts, sampled, monkeypatch):
    calls, original = [], Sweeper.__call__

    def third(self, params):
        calls.append(self.batches.n_cells)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, params)

    monkeypatch.setattr(Sweeper, "__call__", third)
    model = NBVCPEstimator(batch_size=BATCH, random_state=0)
    state = dict(vars(model))
    with pytest.raises(KeyboardInterrupt):
        model.fit(counts)
    assert set(calls) == {SAMPLE}
    assert vars(model) == state


def test_the_same_seed_takes_the_same_rows(counts, source, sampled):
    once, again = (estimator(source, latent_dim=2).fit(counts) for _ in range(2))
    assert_array_equal(once.components_, again.components_)


def test_independent_genes_are_the_same_twice_and_from_a_file(counts, sampled, tmp_path):
    """The sample of rows that are read block by block is that of rows in memory."""
    h5py = pytest.importorskip("h5py")
    options = dict(batch_size=BATCH, random_state=3)
    once, again = (NBVCPEstimator(**options).fit(counts) for _ in range(2))
    with h5py.File(tmp_path / "X.h5", "w") as file:
        X = file.create_dataset("X", data=counts.toarray(), chunks=(100, G))
        stored = NBVCPEstimator(**options).fit(X)
    for other in (again, stored):
        assert_array_equal(once.mean_, other.mean_)
        assert_array_equal(once.dispersion_, other.dispersion_)
    assert SAMPLE in sampled


@pytest.fixture
def looked_at(monkeypatch):
    """Fits look at two starts, by a third of the rows."""
    monkeypatch.setattr(_opening, "SMALL_OVERDISPERSION", -1.0)
    monkeypatch.setattr(_opening, "LOOK_ENTRIES", N // 3 * G)


def test_some_rows_tell_the_better_of_two_starts(counts, source, sampled, looked_at, monkeypatch):
    monkeypatch.setattr(_rows, "MANY_ROWS", N)
    model = estimator(source).fit(counts)
    assert 2 * LOOK_SWEEPS + 4 > sampled.count(N // 3) > 8 and sampled == sorted(sampled)
    monkeypatch.setattr(_opening, "LOOK_ENTRIES", N * G)
    sampled.clear()
    plain = estimator(source).fit(counts)
    assert set(sampled) == {N}
    assert model._split == plain._split
    assert model.latent_dim_ == plain.latent_dim_ == 2
    assert model.converged_ and plain.converged_
    found, expected = (m.objective_history_[-1] for m in (model, plain))
    assert_allclose(found, expected, atol=5 * model.tol_ * abs(expected))


@pytest.mark.parametrize(
    ("n_cells", "n_genes", "size"),
    [(3874, 16_791, 500), (3000, 2000, None), (100_000, 1000, 8389), (8, 20_000, None)],
)
def test_few_rows_look_at_all(n_cells, n_genes, size):
    rows = _opening.rows_to_look_at(n_cells, n_genes, np.random.RandomState(0))
    assert rows is None if size is None else rows.shape == (size,) and np.all(np.diff(rows) > 0)


@pytest.mark.parametrize("of", ["sample", "look"])
def test_an_interrupted_sample_leaves_the_estimator_as_it_was(
    counts, source, sampled, looked_at, monkeypatch, of
):
    if of == "look":
        monkeypatch.setattr(_rows, "MANY_ROWS", N)
    else:
        monkeypatch.setattr(_opening, "LOOK_ENTRIES", N * G)
    counted = Sweeper.__call__

    def interrupted(self, params):
        if len(sampled) == 4:
            signal.raise_signal(signal.SIGINT)
        return counted(self, params)

    monkeypatch.setattr(Sweeper, "__call__", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    model = estimator(source)
    state = dict(vars(model))
    try:
        with pytest.raises(KeyboardInterrupt):
            model.fit(counts)
    finally:
        signal.signal(signal.SIGINT, before)
    assert set(sampled) == {SAMPLE if of == "sample" else N // 3}
    assert vars(model) == state


@pytest.mark.parametrize(("n", "n_sample"), [(30_000, None), (30_001, 20_000)])
def test_few_rows_are_all_taken(n, n_sample):
    sample = _rows.sample_of_rows(n, np.random.RandomState(0))
    if n_sample is None:
        assert sample is None
    else:
        assert sample.shape == (n_sample,) and np.all(np.diff(sample) > 0)

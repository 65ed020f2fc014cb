"""Start values of the loadings, against dense moments of the scores and against the truth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.linalg import subspace_angles

from sknbln._rows import RowBatches, sum_over_batches
from sknbln.datasets import make_nbln_counts
from sknbln.solver import start as start_module
from sknbln.solver.params import Params
from sknbln.solver.start import less_overdispersion, loadings_from_scores

from .reference import small
from .reference.csr import csr

K = 3


def dense(counts, offset, log_mean, r, k):
    """Loadings from the dense ``B' B / n``: eigenpairs, less the noise's share of each."""
    m = np.exp(log_mean - offset[:, None])
    poisson = np.isinf(r)
    size = np.where(poisson, 1.0, r)
    p = np.where(poisson, 0.0, m / (m + size))
    g = np.where(poisson, counts - m, counts - (counts + size) * p)
    information = np.where(poisson, m, m * size / (m + size))
    q = np.sqrt(np.mean(information**2, 0))
    B = g / q
    values, vectors = np.linalg.eigh(B.T @ B / len(counts))
    values, vectors = values[::-1][:k], vectors[:, ::-1][:, :k]
    share = (vectors**2).T @ (information.mean(0) / q**2)
    return vectors * np.sqrt(np.maximum(values - share, values / 20))


def small_data(poisson=False):
    cells, _, r = small.problem(50, poisson=poisson, capture="fixed")
    # away from the independent-gene fit: the formula holds anywhere
    log_mean = np.log(cells.counts.mean(0) + 0.5) + 0.8
    return cells, log_mean, r


def independent(log_mean, r):
    """Parameters of independent genes."""
    return Params(log_mean, np.zeros((len(log_mean), 0)), np.zeros(len(log_mean)), 1.0 / r)


def loadings(cells, log_mean, r, k, *, batch_size=None, seed=0):
    X = csr(cells.counts)
    batches = RowBatches(X, cells.offset, np.zeros(X.shape[0]), batch_size=batch_size)
    summed = sum_over_batches(batches, independent(log_mean, r))
    return loadings_from_scores(summed, *X.shape, k, np.random.RandomState(seed))


@pytest.mark.parametrize("poisson", [False, True], ids=["nb", "poisson"])
def test_equals_a_dense_eigendecomposition(poisson, monkeypatch):
    monkeypatch.setattr(start_module, "_LARGEST_SD", np.inf)
    cells, log_mean, r = small_data(poisson)
    found = loadings(cells, log_mean, r, K)
    expected = dense(cells.counts, cells.offset, log_mean, r, K)
    # the sign of an eigenvector is arbitrary
    assert_allclose(found @ found.T, expected @ expected.T, rtol=1e-8, atol=1e-10)
    assert_allclose(np.abs(found), np.abs(expected), rtol=1e-6, atol=1e-8)
    assert np.all(np.diff(np.linalg.norm(expected, axis=0)) < 0)


def test_large_loadings_are_cut_at_the_start(monkeypatch):
    monkeypatch.setattr(start_module, "_LARGEST_SD", 0.5)
    cells, log_mean, r = small_data()
    free = dense(cells.counts, cells.offset, log_mean, r, K)
    norms = np.linalg.norm(free, axis=1)
    found = loadings(cells, log_mean, r, K)
    assert norms.max() > 0.5 > norms.min()
    assert_allclose(np.linalg.norm(found, axis=1), np.minimum(norms, 0.5), rtol=1e-6)
    # and the direction of every row is kept
    shrunk = free * np.minimum(1.0, 0.5 / norms)[:, None]
    assert_allclose(found @ found.T, shrunk @ shrunk.T, rtol=1e-6, atol=1e-10)


def test_batches_and_seeds_do_not_matter():
    """More than one batch, and another range finder, which spans all genes here."""
    cells, log_mean, r = small_data()
    double = type(cells)(*(np.concatenate([a, a]) for a in cells))
    whole = loadings(double, log_mean, r, K, batch_size=16)
    parts = loadings(double, log_mean, r, K, batch_size=8, seed=1)
    assert_allclose(parts @ parts.T, whole @ whole.T, rtol=1e-9, atol=1e-10)
    # twice the same cells have the same moments
    once = loadings(cells, log_mean, r, K)
    assert_allclose(whole @ whole.T, once @ once.T, rtol=1e-9, atol=1e-10)


def test_no_latent_dimension():
    cells, log_mean, r = small_data()
    assert loadings(cells, log_mean, r, 0).shape == (small.N_GENES, 0)


def test_as_many_dimensions_as_genes():
    cells, log_mean, r = small_data()
    found = loadings(cells, log_mean, r, small.N_GENES)
    assert found.shape == (small.N_GENES, small.N_GENES)
    assert np.all(np.isfinite(found))


def test_a_gene_without_counts_gets_no_loadings():
    cells, log_mean, r = small_data()
    counts = cells.counts.copy()
    counts[:, 4] = 0.0
    log_mean[4] = -40.0
    found = loadings(cells._replace(counts=counts), log_mean, r, K)
    assert np.all(np.isfinite(found))
    assert_array_equal(np.abs(found[4]) < 1e-6, True)


def test_recovers_the_span_of_the_factors():
    """800 cells, 40 genes, 2 factors: the truth's span within 25 degrees, the size within a third.

    Over eight seeds the larger angle was 8 to 19 degrees, the correlation of the off-diagonals 0.96 to
    0.985 and their slope 0.79 to 1.06.
    """
    sim = make_nbln_counts(
        n_cells=800, n_genes=40, n_factors=2, mean_range=(1.0, 30.0), random_state=0
    )
    X = csr(sim.data.toarray())
    log_mean = sim.mean + 0.5 * (np.sum(sim.loadings**2, 1) + sim.noise_variance)
    batches = RowBatches(X, sim.capture_offset, np.zeros(800))
    # the marginal dispersion of the independent-gene model at the truth
    phi = (1 + 1 / sim.dispersion) * np.exp(np.sum(sim.loadings**2, 1) + sim.noise_variance) - 1
    summed = sum_over_batches(batches, independent(log_mean, 1.0 / phi))
    found = loadings_from_scores(summed, *X.shape, 2, np.random.RandomState(0))
    assert np.degrees(subspace_angles(found, sim.loadings)).max() < 25
    off = ~np.eye(40, dtype=bool)
    estimate, truth = (found @ found.T)[off], (sim.loadings @ sim.loadings.T)[off]
    assert np.corrcoef(estimate, truth)[0, 1] > 0.94
    assert 2 / 3 < (estimate @ truth) / (truth @ truth) < 4 / 3


# ------------------------------------------------------------------ where a free dispersion starts

LOG_R = np.log(np.array([1e-4, 0.1, 1.0, 10.0, 1e4]))


def test_without_variance_the_dispersion_does_not_change():
    # phi is computed from 1 + phi: a rounding error of 1 / phi
    assert_allclose(less_overdispersion(LOG_R, np.zeros(5)), LOG_R, rtol=0, atol=1e-11)


def test_a_large_variance_leaves_a_tenth_of_the_overdispersion():
    variance = np.log1p(np.exp(-LOG_R))  # all of it
    for factor in (1.0, 2.0, 1e3):
        found = less_overdispersion(LOG_R, factor * variance)
        assert_allclose(found, LOG_R + np.log(10.0), rtol=0, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(st.floats(-9.0, 9.0), st.floats(0.0, 20.0), st.floats(0.0, 1.0))
def test_marginal_overdispersion_is_kept_down_to_a_tenth(log_r, variance, more):
    """``(1 + phi) exp(variance)`` does not change; more variance never leaves more overdispersion."""
    log_r, variance = np.array([log_r]), np.array([variance])
    found = less_overdispersion(log_r, variance)
    before, left = np.exp(-log_r), np.exp(-found)
    assert np.all(left >= 0.1 * before * (1 - 1e-12))
    if left > 0.1001 * before:
        assert_allclose((1 + left) * np.exp(variance), 1 + before, rtol=1e-12)
    else:
        assert np.all((1 + 0.1001 * before) * np.exp(variance) >= 1 + before)
    assert np.all(less_overdispersion(log_r, variance + more) >= found)

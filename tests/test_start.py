"""Start values of the loadings, against dense moments of the scores and against the truth."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.linalg import subspace_angles

from sknbln._passes import sum_over_batches
from sknbln._rows import RowBatches
from sknbln.datasets import make_nbln_counts
from sknbln.solver import start as start_module
from sknbln.solver.params import Params, noise_coordinate, noise_variance
from sknbln.solver.start import (
    START_NOISE,
    loadings_from_scores,
    resumed,
    spikes,
    start_coordinates,
)

from .reference import small
from .reference.coupling import total
from .reference.csr import csr

K = 3


def moments(counts, offset, log_mean, r):
    """The dense scores over their standard deviation, (n_cells, n_genes), and the genes' information."""
    m = np.exp(log_mean - offset[:, None])
    poisson = np.isinf(r)
    size = np.where(poisson, 1.0, r)
    p = np.where(poisson, 0.0, m / (m + size))
    g = np.where(poisson, counts - m, counts - (counts + size) * p)
    information = np.where(poisson, m, m * size / (m + size)).sum(0)
    return g / np.sqrt(information), information


def dense(counts, offset, log_mean, r, k):
    """Loadings from the dense ``A' A``: eigenpairs, each with the size and the cosine of a spike."""
    A, information = moments(counts, offset, log_mean, r)
    values, vectors = np.linalg.eigh(A.T @ A)
    size, cosine = spikes(values[::-1][:k], counts.shape[1] / len(counts))
    scaled = vectors[:, ::-1][:, :k] * np.sqrt(size * cosine)
    precision = information + 0.1 * information.mean()
    return scaled * (np.sqrt(len(counts) * information) / precision)[:, None]


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
    """800 cells, 40 genes, 2 factors: the truth's span within 15 degrees.

    Over eight seeds the larger angle was 8 to 13 degrees, the correlation of the off-diagonals 0.97 to 0.985
    and their slope 0.63 to 0.82: scores are linear in the counts, and are short for factors of this size.
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
    assert np.degrees(subspace_angles(found, sim.loadings)).max() < 15
    off = ~np.eye(40, dtype=bool)
    estimate, truth = (found @ found.T)[off], (sim.loadings @ sim.loadings.T)[off]
    assert np.corrcoef(estimate, truth)[0, 1] > 0.96
    assert 0.6 < (estimate @ truth) / (truth @ truth) < 1.0


# ------------------------------------------------------------------ spikes above noise


@settings(max_examples=100, deadline=None)
@given(st.floats(0.01, 30.0), st.floats(1.2, 50.0))
def test_a_spike_is_what_its_eigenvalue_came_from(ratio, above):
    """Baik, Ben Arous & Peche's eigenvalue and Paul's cosine of a spike of a given size, and back."""
    size = above * np.sqrt(ratio)
    found, cosine = spikes(np.array([(1 + size) * (1 + ratio / size)]), ratio)
    if size + ratio / size > (2.0 + start_module._ABOVE_EDGE) * np.sqrt(ratio):
        assert_allclose(found, size, rtol=1e-6)
        assert_allclose(cosine, (1 - ratio / size**2) / (1 + ratio / size), rtol=1e-6)


def test_an_eigenvalue_of_noise_is_the_smallest_spike_that_shows():
    edge = (1 + np.sqrt(0.5)) ** 2
    size, cosine = spikes(np.array([edge, 0.5 * edge, 0.0, -1.0]), 0.5)
    assert_allclose(size, size[0])
    assert np.sqrt(0.5) < size[0] < 2 * np.sqrt(0.5)
    assert np.all((cosine > 0) & (cosine < 0.5))


def test_spikes_of_a_gaussian_sample():
    """An eigenvalue and an eigenvector of 2,000 rows of 500 columns with one spike, over ten seeds."""
    n, G, true = 2000, 500, 1.2
    sizes, cosines = [], []
    for seed in range(10):
        A = np.random.default_rng(seed).standard_normal((n, G)) / np.sqrt(n)
        A[:, 0] *= np.sqrt(1 + true)
        values, vectors = np.linalg.eigh(A.T @ A)
        size, cosine = spikes(values[-1:], G / n)
        sizes.append(size[0])
        cosines.append((cosine[0], vectors[0, -1] ** 2))
    assert_allclose(np.mean(sizes), true, rtol=0.04)
    assert_allclose(*np.mean(cosines, 0), atol=0.02)


# ------------------------------------------------------------------ the coordinates

G = small.N_GENES
FREE = Params(True, True, True, True)
LOG_MEAN, LOG_R = np.linspace(-3.0, 5.0, G), np.linspace(-3.0, 5.0, G)[::-1].copy()


def start(split, W=None, free=FREE, coupled=True):
    W = np.zeros((G, K)) if W is None else W
    return start_coordinates(LOG_MEAN, LOG_R, W, free, coupled, total(), split)


@pytest.mark.parametrize("split", [-2.0, 0.0])
def test_overdispersion_that_the_loadings_leave_is_split_between_d_and_r(split):
    W = np.random.default_rng(0).standard_normal((G, K)) * 0.3
    x = start(split, W)
    assert x.loadings is W
    T = total()
    level, explained = T(LOG_R), np.sum(W**2, 1)
    left = np.maximum(level - explained, 0.1 * level)
    some, most = explained < 0.9 * level, explained > 0.9 * level
    assert some.any() and most.any()
    share = 1 / (1 + np.exp(-split))
    assert_allclose(T(x.dispersion), (1 - share) * left, rtol=1e-9)
    # T of a log-normal count is far above its d, where that is large
    d, log_normal = noise_variance(x), 3.0 * np.log1p(share * left)
    assert_allclose(d, np.minimum(share * left, log_normal), rtol=1e-9)
    assert np.any(d < 0.99 * share * left) or split < 0
    assert np.any(d > 0.99 * share * left)


def test_counts_without_dispersion_have_all_overdispersion_in_d():
    x = start(np.inf)
    assert_array_equal(x.dispersion, np.inf)
    level = total()(LOG_R)
    assert_allclose(noise_variance(x), np.minimum(level, 3.0 * np.log1p(level)), rtol=1e-9)


def test_a_frozen_dispersion_is_kept():
    x = start(None, free=FREE._replace(dispersion=False))
    assert x.dispersion is LOG_R
    assert_allclose(noise_variance(x), START_NOISE)


def test_without_a_split_the_dispersion_takes_what_the_loadings_and_the_noise_leave():
    W = 0.2 * np.random.default_rng(0).standard_normal((G, K))
    x, T = start(None, W), total()
    assert_allclose(noise_variance(x), START_NOISE)
    rest = T(LOG_R) - np.sum(W**2, 1) - START_NOISE
    assert_allclose(T(x.dispersion), np.maximum(rest, 0.1 * T(LOG_R)), rtol=1e-6)
    assert np.any(rest < 0.1 * T(LOG_R)) and np.any(rest > 0.1 * T(LOG_R))


def test_the_mean_is_the_marginal_one_where_it_is_a_coordinate_or_frozen():
    W = np.random.default_rng(0).standard_normal((G, K))
    assert start(0.0, W).mean is LOG_MEAN
    assert start(0.0, W, FREE._replace(mean=False), coupled=False).mean is LOG_MEAN
    x = start(0.0, W, coupled=False)
    assert_allclose(x.mean + (np.sum(W**2, 1) + noise_variance(x)) / 2, LOG_MEAN, atol=1e-12)


def test_a_warm_start_takes_what_is_free():
    rng = np.random.default_rng(0)
    previous = Params(
        rng.standard_normal(G),
        rng.standard_normal((G, K)),
        noise_coordinate(np.full(G, 0.3)),
        np.where(np.arange(G) % 2, np.inf, 0.5),
    )
    fresh = start(0.0)
    x = resumed(fresh, previous, FREE)
    assert x.mean is previous.mean and x.noise is previous.noise
    assert x.loadings is fresh.loadings
    expected = np.where(np.isfinite(previous.dispersion), previous.dispersion, fresh.dispersion)
    assert_array_equal(x.dispersion, expected)
    held = resumed(fresh, previous, Params(False, True, True, False))
    assert held.mean is fresh.mean
    assert_array_equal(held.dispersion, fresh.dispersion)

"""How many factors the spectrum of the scores shows, and its null band."""

import numpy as np
import pytest
import scipy.sparse as sp
from numpy.testing import assert_allclose, assert_array_equal

from sknbln import NBLNEstimator, _spectrum
from sknbln._blocks import CSRRows
from sknbln._known import Known
from sknbln._spectrum import LEAST_ROWS, N_PERMUTATIONS, ScoreSpectrum, score_spectrum

from .reference.csr import csr

N, G = 150, 24


def counts(rank, seed=0, n=N, n_genes=G, r=5.0, mean=4.0, size=0.3):
    """Counts with factors of all genes, capture offsets, and the offsets; (n, n_genes)."""
    rng = np.random.default_rng(seed)
    loadings = size * rng.standard_normal((n_genes, rank))
    offset = rng.uniform(0.2, 1.0, n)
    log_mean = np.log(mean) + rng.uniform(-1.0, 1.0, n_genes)
    x = log_mean + rng.standard_normal((n, rank)) @ loadings.T - offset[:, None]
    return rng.poisson(np.exp(x) * rng.gamma(r, 1 / r, x.shape)).astype(float), offset


def spectrum(U, offset, seed=0):
    """The spectrum at moments of independent genes: means at full capture, sizes of the variance."""
    level = np.exp(-offset)
    mean = np.maximum(U.sum(0), 0.5) / level.sum()
    fitted = mean * level[:, None]
    extra = np.maximum(np.mean((U - fitted) ** 2 - fitted, 0), 1e-3)
    r = np.mean(fitted**2, 0) / extra
    return score_spectrum(CSRRows(csr(U)), mean, r, offset, np.random.RandomState(seed))


@pytest.mark.parametrize("shape", [(60, 200), (100, 20), (150, 24), (30, 400)], ids=str)
def test_no_factor_in_counts_without_any(shape):
    """In 2 of 20 sets at most: over 60 seeds and two r it was 0 to 8 %, where 4 % are asked for."""
    found = [spectrum(*counts(0, seed, *shape, r=1.0)).n_factors for seed in range(20)]
    assert np.sum(np.array(found) > 0) <= 2, found


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_clear_factors_are_all_found(rank):
    found = [spectrum(*counts(rank, seed, N, 80)).n_factors for seed in range(5)]
    assert found == [rank] * 5


def test_strong_factors_leave_echoes_that_the_fit_drops():
    """Scores are linear in the counts, which are exponential in a factor: the spectrum shows more of them.

    The edge of the noise after a few sweeps of the model does not.
    """
    rank, (U, offset) = 2, counts(2, 0, 240, 80, size=0.7)
    assert rank < spectrum(U, offset).n_factors <= 2 * rank + 1
    model = NBLNEstimator(random_state=0).fit(U)
    found = model.rank_diagnostics_
    assert model.latent_dim_ == rank < found["score_rank"]
    information = found["column_information"]
    assert information.size == found["score_rank"] + found["n_groups"]
    assert_array_equal(information > found["noise_edge"], np.arange(information.size) < rank)


def test_structural_zeros_are_no_factor():
    """The permutations keep each gene's own distribution, which is not negative binomial here."""
    found = []
    for seed in range(10):
        U, offset = counts(0, seed, r=0.5)
        U *= np.random.default_rng(seed).uniform(size=U.shape) > 0.7
        found.append(spectrum(U, offset).n_factors)
    assert np.sum(found) <= 1, found


def known(kind):
    """What is known of the rows, and the coefficients of their covariates."""
    rng, nothing = np.random.default_rng(4), Known.nothing(N)
    if kind == "weights":
        return nothing._replace(weight=rng.uniform(0.2, 3.0, N)), None
    if kind == "covariates":
        return nothing._replace(design=rng.standard_normal((N, 2))), 0.3 * rng.standard_normal(
            (G, 2)
        )
    if kind == "exposure":
        return nothing._replace(exposure=rng.uniform(-0.5, 0.5, (N, 1))), None
    if kind == "exposures":
        exposure, weight = rng.uniform(-0.5, 0.5, (N, G)), rng.uniform(0.2, 3.0, N)
        return nothing._replace(exposure=exposure, weight=weight), None
    return nothing, None


@pytest.mark.parametrize("at_once", [2**18, 200], ids=["", "in parts"])
@pytest.mark.parametrize("kind", ["nothing", "weights", "covariates", "exposure", "exposures"])
def test_eigenvalues_are_those_of_the_dense_scores(kind, at_once, monkeypatch):
    """By their formulas in double precision: ``g``, less what rows' levels and genes' means take."""
    monkeypatch.setattr(_spectrum, "_AT_ONCE", at_once)
    U, offset = counts(2)
    U[:, 3] = 0.0  # a gene that is left out
    U[0, 3] = 1.0
    mean, r, (of_rows, coef) = U.mean(0) + 0.5, np.linspace(0.5, 8.0, G), known(kind)
    rng = np.random.RandomState(0)
    found = score_spectrum(CSRRows(csr(U)), mean, r, offset, rng, of_rows, coef)
    m = mean * np.exp(of_rows.log_scale(coef) - offset[:, None])
    root = 1.0 if of_rows.weight is None else np.sqrt(of_rows.weight)[:, None]
    g, i = (root * a for a in ((U - m) * r / (r + m), m * r / (m + r)))
    g, i = (np.delete(a, 3, axis=1) for a in (g, i))
    g = g - i * (g.sum(1) / i.sum(1))[:, None]
    g = g - i * (g.sum(0) / i.sum(0))
    assert_allclose(g.sum(0), 0.0, atol=1e-10)
    if coef is not None:
        for j in range(G - 1):
            x = np.column_stack([np.ones(N), of_rows.design])
            g[:, j] -= i[:, j] * (x @ np.linalg.solve((i[:, j] * x.T) @ x, x.T @ g[:, j]))
    A = g / np.sqrt(np.sum(g**2, 0))
    assert_allclose(np.sum(found.eigenvalues), G - 1, rtol=1e-5)  # of a correlation matrix
    assert_allclose(found.eigenvalues, np.linalg.eigvalsh(A.T @ A)[::-1], rtol=1e-4, atol=1e-4)
    assert found.null.shape == (N_PERMUTATIONS,)


def test_the_number_of_factors_is_that_of_leading_eigenvalues_above_the_null():
    null = np.array([1.0, 1.2, 0.8])
    threshold = 1.0 + _spectrum.DEVIATIONS * 0.2
    found = ScoreSpectrum(np.array([9.0, 2.0, 1.4, 0.5]), null, np.zeros((4, 0)))
    assert_allclose(found.threshold, threshold)
    assert found.n_factors == 2
    assert ScoreSpectrum(np.array([1.4, 0.5]), null, np.zeros((2, 0))).n_factors == 0


def test_the_spread_of_the_edge_is_that_of_random_matrices():
    n, p = 400, 100
    rng = np.random.default_rng(0)
    largest = [np.linalg.norm(rng.standard_normal((p, n)) / np.sqrt(n), 2) ** 2 for _ in range(200)]
    # 200 values have their standard deviation to 5 %
    assert_allclose(_spectrum._edge_sd(p, n), np.std(largest, ddof=1), rtol=0.15)


def test_many_scores_are_permuted_a_few_times(monkeypatch):
    """Their threshold is as far from the mean as the edge of noise spreads, and the factors are the same."""
    monkeypatch.setattr(_spectrum, "MANY_SCORES", 0)
    for rank in (0, 2):
        for seed in range(5):
            found = spectrum(*counts(rank, seed, N, 80))
            assert found.null.size == _spectrum.FEW_PERMUTATIONS < N_PERMUTATIONS
            above = found.threshold - found.null.mean()
            assert above >= _spectrum.DEVIATIONS * _spectrum._edge_sd(80, N) * (1 - 1e-9)
            assert found.n_factors == rank


@pytest.mark.parametrize("shape", [(150, 130), (130, 150)], ids=str)
def test_lanczos_is_the_direct_decomposition(shape, monkeypatch):
    U, offset = counts(2, 0, *shape)
    assert min(shape) > _spectrum._LARGEST_DIRECT
    found = spectrum(U, offset)
    monkeypatch.setattr(_spectrum, "_LARGEST_DIRECT", 1000)
    direct = spectrum(U, offset)
    k = found.n_factors
    assert k == direct.n_factors == 2
    assert_allclose(found.eigenvalues[: k + 1], direct.eigenvalues[: k + 1], rtol=2e-3)
    assert_allclose(found.null, direct.null, rtol=2e-3)


def with_a_group(n_genes, size, seed, n=400):
    """Counts of a broad factor, and of `size` genes that a third of the cells express 30-fold."""
    rng = np.random.default_rng(seed)
    on = rng.random(n) < 0.3
    x = rng.normal(0, 1, n_genes) + rng.standard_normal((n, 1)) * 0.4 * rng.standard_normal(n_genes)
    x[:, :size] = np.log(0.2) + np.log(30) * on[:, None]
    return rng.poisson(np.exp(x) * rng.gamma(5, 0.2, x.shape)).astype(float), np.zeros(n)


@pytest.mark.parametrize("n_genes", [150, 700])
def test_a_pair_of_genes_is_found_below_the_edge_of_all_genes(n_genes):
    """Its eigenvalue, 1 + rho, is below those of noise. Of many genes those with most counts are used.

    The true loadings are 1.6, the standard deviation of log(30) in a third of the cells.
    """
    for seed in range(3):
        found = spectrum(*with_a_group(n_genes, 2, seed))
        (pair,) = found.groups.T
        assert_array_equal(np.flatnonzero(pair), [0, 1])
        assert np.all(np.abs(pair[:2]) > 0.8) and pair[0] * pair[1] > 0


def test_independent_genes_have_no_groups():
    for seed in range(10):
        assert spectrum(*counts(0, seed, 300, 80, r=0.5)).groups.shape == (80, 0)


def test_a_permutation_keeps_every_gene_and_no_pair():
    """Also of more genes than there are orders of the rows."""
    rng = np.random.default_rng(0)
    a = np.tile(rng.standard_normal(300), (2 * _spectrum._ORDERS, 1))
    out = _spectrum._permuted(a, np.empty_like(a), rng)
    assert_array_equal(np.sort(out, 1), np.sort(a, 1))
    same = np.corrcoef(out)[np.triu_indices(len(a), 1)]
    assert np.abs(same).max() < 0.3 and np.std(same) == pytest.approx(300**-0.5, rel=0.1)


def test_it_is_seeded():
    U, offset = counts(1)
    once, again, other = (spectrum(U, offset, seed) for seed in (1, 1, 2))
    assert_array_equal(once.null, again.null)
    assert_array_equal(once.eigenvalues, again.eigenvalues)
    assert_array_equal(once.eigenvalues, other.eigenvalues)  # all rows are used
    assert np.all(once.null != other.null)


def test_genes_in_few_rows_are_left_out():
    """A gene whose counts lie in the deepest rows would make a factor of its own with others like it."""
    U, offset = counts(1)
    rare = np.zeros((N, 6))
    rare[: LEAST_ROWS - 1] = 50.0
    found = spectrum(np.concatenate([U, rare], 1), offset)
    assert_array_equal(found.eigenvalues, spectrum(U, offset).eigenvalues)
    rare[LEAST_ROWS - 1] = 50.0
    found = spectrum(np.concatenate([U, rare], 1), offset)
    assert found.eigenvalues.size == G + 6
    assert found.n_factors > 1


def test_of_a_few_rows_half_have_to_have_counts():
    U, offset = counts(0, n=6, mean=20.0)
    U[:, 0] = [3, 4, 0, 0, 0, 0]
    U[:, 1] = [3, 4, 5, 0, 0, 0]
    block = U[:, [0]]
    assert spectrum(np.concatenate([block, block], 1), offset).eigenvalues.tolist() == [0.0]
    assert spectrum(U[:, :2], offset).eigenvalues.size == 1


@pytest.mark.parametrize(
    "U", [np.zeros((20, 4)), np.ones((20, 4)), np.ones((1, 4)), np.ones((20, 1))]
)
def test_nothing_to_find(U):
    found = spectrum(U, np.zeros(len(U)))
    assert found.n_factors == 0
    assert np.isfinite(found.threshold)


@pytest.mark.parametrize("limit", [("MOST_ROWS", 100), ("MOST_ENTRIES", 100 * G + 3)], ids=str)
def test_of_many_rows_some_are_chosen_at_random(limit, monkeypatch):
    U, offset = counts(1, n=300)
    monkeypatch.setattr(_spectrum, *limit)
    made = []

    class Recorded(CSRRows):
        def chosen(self, rows):
            made.append(rows)
            return super().chosen(rows)

    mean, r = U.mean(0) / np.exp(-offset).mean(), np.full(G, 5.0)
    found = [
        score_spectrum(Recorded(csr(U)), mean, r, offset, np.random.RandomState(seed))
        for seed in (0, 0, 1)
    ]
    assert [rows.size for rows in made] == [100] * 3
    assert np.all(np.diff(made[0]) > 0)
    assert_array_equal(made[0], made[1])
    assert not np.array_equal(made[0], made[2])
    assert [s.n_factors for s in found] == [1] * 3
    # the rows come with their offsets
    rows = made[0]
    part = score_spectrum(CSRRows(csr(U[rows])), mean, r, offset[rows], np.random.RandomState(0))
    assert_array_equal(found[0].eigenvalues, part.eigenvalues)


def test_it_does_not_change_the_counts():
    U, offset = counts(1)
    X = csr(U)
    before = X.copy()
    score_spectrum(CSRRows(X), U.mean(0), np.ones(G), offset, np.random.RandomState(0))
    assert_array_equal(X.data, before.data)
    assert sp.issparse(X)

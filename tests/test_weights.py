"""Weights of rows: as often as a row is repeated; 0 is a row that is left out."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone

from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln._counts import CountHistogram
from sknbln._known import Known
from sknbln._nbvcp import _problem
from sknbln._passes import Sweeper, gene_score_products, sum_over_batches
from sknbln._rows import RowBatches
from sknbln._svi import _minibatches
from sknbln.datasets import make_nbln_counts
from sknbln.solver.start import information_sums, score_product

from .reference import small

N, G = 150, 14
CAPTURE = (np.log(3000.0), 0.5)


@pytest.fixture(scope="module")
def data():
    """Counts, weights of 0, 1 and 2, and the positions of the rows when they are repeated: N again."""
    X = make_nbln_counts(N, G, n_factors=2, random_state=1).data.astype(float)
    weight = np.random.default_rng(0).permutation(np.repeat([0.0, 1.0, 2.0], [20, N - 40, 20]))
    return X, weight, np.repeat(np.arange(N), weight.astype(int))


@pytest.fixture(scope="module")
def source(data):
    X, weight, _ = data
    fresh = NBVCPEstimator(capture_efficiency=CAPTURE, random_state=0)
    return fresh.fit(X, sample_weight=weight)


# ------------------------------------------------------------------ sums


@pytest.mark.parametrize("batch_size", [None, 3])
def test_sums_over_weighted_rows_are_those_over_repeated_ones(batch_size):
    X, *capture, params = small.rows(small.N_CELLS)
    rng = np.random.default_rng(0)
    times = rng.permutation(np.r_[0, 0, 3, 2, 1, 1, 1, 0])
    at = np.repeat(np.arange(times.size), times)
    params = params._replace(coef=0.3 * rng.standard_normal((small.N_GENES, 1)))
    design, exposure = rng.standard_normal((times.size, 1)), np.zeros((times.size, 0))
    known = Known(design, exposure, np.maximum(times, 1e-300))
    weighted = RowBatches(X, *capture, batch_size=batch_size, known=known)
    known = Known(design[at], exposure[at])
    repeated = RowBatches(X[at], *(a[at] for a in capture), batch_size=batch_size, known=known)
    found, expected = [], []
    for batches, all_of_it in ((weighted, found), (repeated, expected)):
        sweeper = Sweeper(batches, small.K_ROWS)
        all_of_it += jax.tree.leaves(sweeper(params))
        all_of_it += gene_score_products(batches, params, sweeper.scores, True)[:2]
        sums = sum_over_batches(batches, params)
        basis = np.random.default_rng(1).standard_normal((small.N_GENES, 2))
        all_of_it += [sums(information_sums), sums(score_product, np.ones(small.N_GENES), basis)]
        all_of_it.append(
            batches.known.sum_of_scales(np.ones(len(batches.known.design)), params.coef)
        )
        assert batches.known.total_weight == small.N_CELLS
    for a, b in zip(found, expected, strict=True):
        assert_allclose(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("largest", [3.0, 2.0**40])  # counted in an array, and sorted
def test_histogram_of_weighted_rows_is_that_of_repeated_ones(data, largest):
    X, weight, at = data
    X = X.copy()
    X.data[0] = largest
    r = np.linspace(0.5, 30.0, G)
    found, expected = CountHistogram(X, weight), CountHistogram(X[at])
    assert found.n_cells == expected.n_cells == N
    assert_allclose(found.constants(r), expected.constants(r), rtol=1e-12)
    assert_allclose(found.log_factorials, expected.log_factorials, rtol=1e-12)
    for a, b in zip(found.constant_derivatives(r), expected.constant_derivatives(r), strict=True):
        assert_allclose(a, b, rtol=1e-12)


def test_rows_without_a_weight_are_in_no_minibatch(data):
    X, weight, _ = data
    batches = _minibatches(X, np.random.RandomState(0), np.maximum(weight, 1e-300))
    for _ in range(3):
        rows, _, found = next(batches)
        assert_array_equal(found[found > 0], weight[rows[found > 0]])
        assert np.unique(rows[found > 0]).size == np.sum(weight > 0)


# ------------------------------------------------------------------ fits


def test_weights_of_independent_genes(data, source):
    """The maximum is that of repeated rows, and the stochastic variational fit agrees within its noise."""
    X, weight, at = data
    maxima = []
    for counts, known in (
        (X, Known.nothing(N)._replace(weight=np.maximum(weight, 1e-300))),
        (X[at], Known.nothing(N)),
    ):
        prior, histogram = source.capture_prior_, CountHistogram(counts, known.weight)
        problem = _problem(counts, prior, histogram, known)
        outcome, _ = source._maximum(counts, problem, histogram, None, known)
        maxima.append(outcome.point)
    assert_allclose(maxima[0].value, maxima[1].value, rtol=1e-9)
    assert_allclose(maxima[0].x.mean, maxima[1].x.mean, rtol=1e-6, atol=1e-6)
    assert_allclose(maxima[0].x.dispersion, maxima[1].x.dispersion, rtol=1e-6, atol=1e-6)
    repeated = clone(source).fit(X[at])
    for name in ("log_mean", "log_dispersion"):
        (loc, scale), (other, _) = getattr(source._guide, name), getattr(repeated._guide, name)
        assert np.max(np.abs(loc - other) / scale) < 0.3
    # every row has its offset, with a weight or without
    assert source.capture_offset_.shape == (N,)
    expected = source._posterior().offsets(X).loc
    assert_allclose(source.capture_offset_, expected, rtol=1e-9)
    assert source.sample_posterior(3).eta.shape == (3, N)


@pytest.mark.parametrize("options", [{}, {"loadings_prior": "ard"}, {"cascade": "parameter"}])
def test_weights_of_rows_are_repetitions(data, source, options):
    X, weight, at = data
    model = NBLNEstimator(2, informative_prior_estimator=source, random_state=0, **options)
    weighted = clone(model).set_params(informative_prior_estimator=source)
    weighted.fit(X, sample_weight=weight)
    repeated = model.fit(X[at])
    assert weighted.n_iter_ == repeated.n_iter_
    for name in (
        *("mean_", "components_", "noise_variance_", "dispersion_", "objective_history_"),
        *("components_standard_error_", "explained_variance_ratio_", "dispersion_gradient_"),
    ):
        found, expected = getattr(weighted, name), getattr(repeated, name)
        assert_allclose(found, expected, rtol=1e-6, atol=1e-6, err_msg=name)
    assert_allclose(weighted.capture_offset_[at], repeated.capture_offset_, rtol=1e-6)
    score = weighted.score(X, sample_weight=weight)
    assert_allclose(score, repeated.score(X[at]), rtol=1e-6)
    draws = weighted.sample_posterior(20, random_state=0)
    assert_allclose(draws.mu, repeated.sample_posterior(20, random_state=0).mu, rtol=1e-5)


def test_a_weight_of_0_leaves_a_row_out(data):
    """With the same random numbers: a fit to the other rows alone, factors looked for included."""
    X, weight, _ = data
    used = weight > 0
    options = dict(capture_efficiency="auto", random_state=0)
    found = NBVCPEstimator(**options).fit(X, sample_weight=used.astype(float))
    expected = NBVCPEstimator(**options).fit(X[used])
    assert_allclose(found.mean_, expected.mean_, rtol=1e-8)
    assert_allclose(found.loss_curve_, expected.loss_curve_, rtol=1e-8)
    assert found.capture_prior_ == expected.capture_prior_
    found = NBLNEstimator(random_state=0, informative_prior_estimator=found)
    found.fit(X, sample_weight=used.astype(float))
    expected = NBLNEstimator(random_state=0, informative_prior_estimator=expected).fit(X[used])
    assert_allclose(found.components_, expected.components_, rtol=1e-5, atol=1e-6)
    for name in ("score_eigenvalues", "null_eigenvalues"):
        values = (m.rank_diagnostics_[name] for m in (found, expected))
        assert_allclose(*values, rtol=1e-4)


@pytest.mark.parametrize(
    "weight, message",
    [
        (np.zeros(N), "All weights in sample_weight are zero"),
        (-np.ones(N), "Negative values in sample_weight: 150"),
        (np.ones(N - 1), r"sample_weight of shape \(149,\): expected \(150,\)"),
        (np.full(N, np.nan), "NaN"),
    ],
)
def test_weights_that_are_none(data, source, weight, message):
    X = data[0]
    for call in (
        NBVCPEstimator().fit,
        NBLNEstimator(2, informative_prior_estimator=source).fit,
        source.score,
    ):
        with pytest.raises(ValueError, match=message):
            call(X, sample_weight=weight)

"""Missing counts: NaN is a count that was not seen, and the rest of the row is as it is."""

import numpy as np
import pytest
import scipy.sparse as sp
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats
from sklearn.utils import get_tags

from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln.datasets import make_nbln_counts
from sknbln.predictive import quantile_residuals

from .reference import truth

N, G = 150, 14
CAPTURE = (np.log(3000.0), 0.5)


@pytest.fixture(scope="module")
def data():
    """Complete counts, and the same with a fifth of them missing."""
    sim = make_nbln_counts(N, G, n_factors=2, mean_range=(2.0, 30.0), random_state=1)
    complete = sim.data.toarray().astype(float)
    missing = np.random.default_rng(0).uniform(size=complete.shape) < 0.2
    return complete, np.where(missing, np.nan, complete), sim


@pytest.fixture(scope="module")
def source(data):
    return NBVCPEstimator(capture_efficiency=CAPTURE, random_state=0).fit(data[1])


@pytest.fixture(scope="module")
def model(data, source):
    fresh = NBLNEstimator(2, informative_prior_estimator=source, random_state=0)
    return fresh.fit(data[1])


def true_models(sim, genes, capture):
    """Both models with the true parameters of some genes."""
    mean, r = sim.mean[genes], sim.dispersion[genes]
    prior = dict(capture_prior=CAPTURE) if capture else {}
    options = dict(library_size=np.full(N, 100.0), **prior)
    return (
        truth.nbvcp(np.exp(mean), r, **options),
        truth.nbln(mean, sim.loadings[genes], sim.noise_variance[genes], r, frozen=(), **options),
    )


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("given_totals", [False, True])
def test_genes_that_are_missing_are_integrated_out(data, capture, given_totals):
    """Rows without some of the genes are rows of a model that does not have them."""
    complete, _, sim = data
    seen = np.arange(G) % 3 > 0
    X = np.where(seen, complete, np.nan)
    options = dict(given_totals=given_totals)
    whole, part = (true_models(sim, genes, capture) for genes in (np.arange(G), seen))
    for all_genes, few in zip(whole, part, strict=True):
        expected = few.score_samples(complete[:, seen], **options)
        assert_allclose(all_genes.score_samples(X, **options), expected, rtol=1e-8)
        found = all_genes.score_samples(sp.csr_array(X), **options)
        assert_allclose(found, expected, rtol=1e-8)
    found = whole[1]._solve(*whole[1]._given(X, None, None))
    expected = part[1]._solve(*part[1]._given(complete[:, seen], None, None))
    assert_allclose(found.scores, expected.scores, rtol=1e-7, atol=1e-9)
    assert_allclose(found.score_covariance, expected.score_covariance, rtol=1e-7, atol=1e-9)


def test_a_row_that_was_not_seen_scores_and_embeds_at_0(data, source, model):
    X = data[1].copy()
    X[3] = np.nan
    for fitted in (source, model):
        score = fitted.score_samples(X)
        assert_allclose(score[3], 0.0, atol=1e-9)
        assert np.all(score[np.arange(N) != 3] < -10)
    assert_allclose(model.transform(X)[3], 0.0, atol=1e-9)


def test_fits_with_missing_counts_are_near_those_to_all_counts(data, source, model):
    complete, X, _ = data
    for fitted in (source, model):
        other = NBVCPEstimator(capture_efficiency=CAPTURE, random_state=0).fit(complete)
        if fitted is model:
            other = NBLNEstimator(2, informative_prior_estimator=other, random_state=0)
            other.fit(complete)
        shift = (
            np.log(fitted.mean_ / other.mean_) if fitted is source else fitted.mean_ - other.mean_
        )
        # the offsets' prior is centred by the counts that were seen: means and offsets rise together
        level = shift.mean() - (fitted.capture_offset_ - other.capture_offset_).mean()
        # were missing counts zeros, it would be log .8
        assert abs(level) < 0.08 and shift.std() < 0.15
        ratio = np.log(fitted.dispersion_ / other.dispersion_)
        assert np.abs(np.median(ratio)) < 0.3
    found, expected = (m.components_.T @ m.components_ for m in (model, other))
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.9
    again = NBVCPEstimator(capture_efficiency=CAPTURE, random_state=0).fit(sp.csr_matrix(X))
    assert_array_equal(again.mean_, source.mean_)


def test_a_source_is_fitted_to_the_same_counts(data, source):
    X = data[1]
    fresh = NBVCPEstimator(capture_efficiency=CAPTURE, random_state=0)
    model = NBLNEstimator(2, informative_prior_estimator=fresh, random_state=0).fit(X)
    assert_array_equal(model.informative_prior_estimator_.mean_, source.mean_)


def test_counts_are_imputed_from_the_others(data, source, model):
    complete, X, _ = data
    missing = np.isnan(X)
    error = {}
    for name, fitted in (("independent", source), ("factors", model)):
        filled = fitted.impute(X)
        assert_array_equal(filled[~missing], X[~missing])
        expected = filled[missing]
        assert abs(np.log(expected.mean() / complete[missing].mean())) < 0.1
        error[name] = np.mean((np.log1p(expected) - np.log1p(complete[missing])) ** 2)
    assert error["factors"] < error["independent"]
    assert_array_equal(model.impute(complete), complete)


def test_imputed_counts_are_posterior_means():
    """One gene given another, by numerical integration over the factor and the seen gene's noise."""
    mean, W = np.array([3.0, 2.0]), np.array([[0.6], [0.5]])
    d, r, u = np.array([0.1, 0.2]), np.array([20.0, 5.0]), 60.0
    model = truth.nbln(mean, W, d, r, frozen=(), library_size=np.ones(1))
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    z, e = np.meshgrid(nodes, nodes, indexing="ij")
    rate = np.exp(mean[0] + W[0, 0] * z + np.sqrt(d[0]) * e)
    posterior = np.outer(weights, weights) * stats.nbinom.pmf(u, r[0], r[0] / (r[0] + rate))
    expected = np.sum(posterior * np.exp(mean[1] + W[1, 0] * z + d[1] / 2)) / posterior.sum()
    # Laplace's method; without the seen gene it is 8.6
    assert_allclose(model.impute([[u, np.nan]])[0], [u, expected], rtol=0.01)
    assert expected > 12


def test_replicates_and_residuals_of_missing_counts(data, model):
    X = data[1]
    missing = np.isnan(X)
    for level in ("marginal", "per_cell", "library_anchored"):
        u = model.posterior_predictive(X, level=level, n_samples=3, random_state=0)
        assert not u[:, missing].any() and u[:, ~missing].mean() > 1
    residuals = quantile_residuals(model, X, n_samples=20, random_state=0)
    assert_array_equal(np.isnan(residuals), missing)


def test_a_gene_that_was_never_seen(data, source):
    X = data[1].copy()
    X[:, [2, 5]] = np.nan
    for fit in (
        NBVCPEstimator(capture_efficiency=CAPTURE).fit,
        NBLNEstimator(2, informative_prior_estimator=source).fit,
    ):
        with pytest.raises(ValueError, match=r"All counts of 2 genes .*: 2, 5\. .* leave them out"):
            fit(X)
        X[0, [2, 5]] = 1.0  # in a row of weight 0
        with pytest.raises(ValueError, match="All counts of 2 genes"):
            fit(X, sample_weight=np.r_[0.0, np.ones(N - 1)])
        X[0, [2, 5]] = np.nan


def test_tags():
    for estimator in (NBVCPEstimator(), NBLNEstimator()):
        assert get_tags(estimator).input_tags.allow_nan

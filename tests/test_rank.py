"""How many factors a fit has: found, given, and none at all."""

import pickle

import numpy as np
import pytest
from scipy.stats import nbinom

from sknbln import NBLNEstimator, NBVCPEstimator, _opening
from sknbln.datasets import make_nbln_counts
from sknbln.solver.gene_priors import NEARLY_ALL_IN_R

NO_FACTOR = 'latent_dim="auto" found no factor'


@pytest.fixture(scope="module")
def sim():
    return make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=3)


@pytest.fixture(scope="module")
def source(sim):
    return NBVCPEstimator(random_state=0).fit(sim.data)


@pytest.fixture(scope="module")
def null(sim):
    """The same counts, each gene permuted by itself: no factor."""
    return np.random.default_rng(0).permuted(sim.data.toarray(), axis=0)


@pytest.fixture(scope="module")
def null_source(null):
    return NBVCPEstimator(random_state=0).fit(null)


@pytest.fixture(scope="module")
def no_factor(null, null_source):
    with pytest.warns(UserWarning, match=NO_FACTOR) as caught:
        model = NBLNEstimator(informative_prior_estimator=null_source, random_state=0).fit(null)
    assert len(caught) == 1
    return model


# ------------------------------------------------------------------ found


@pytest.mark.parametrize("cascade", ["marginal", "parameter"])
def test_the_number_of_factors_is_found(sim, source, cascade):
    model = NBLNEstimator(informative_prior_estimator=source, cascade=cascade, random_state=0).fit(
        sim.data
    )
    assert model.latent_dim == "auto" and model.latent_dim_ == 2
    assert model.components_.shape == (2, 24)
    assert model.transform(sim.data).shape == (150, 2)
    assert list(model.get_feature_names_out()) == ["nblnestimator0", "nblnestimator1"]
    assert model.w_prior_diagnostics_["effective_rank"] == 2
    found = model.rank_diagnostics_
    assert found["score_rank"] == 2
    null, values = found["null_eigenvalues"], found["score_eigenvalues"]
    assert np.all(np.diff(values) <= 0)
    assert null.max() < 1.5 * null.min()
    assert null.mean() < found["null_threshold"]
    assert np.sum(values > found["null_threshold"]) == 2
    # of fewer than 200 rows the edge of noise is not known
    assert found["column_information"] is None and found["noise_edge"] is None


def test_columns_of_noise_are_dropped_after_a_few_sweeps(monkeypatch):
    """Three columns more than there are factors at the start."""
    sim = make_nbln_counts(n_cells=250, n_genes=24, n_factors=2, random_state=3)
    source = NBVCPEstimator(random_state=0).fit(sim.data)
    options = dict(informative_prior_estimator=source, random_state=0)
    expected = NBLNEstimator(**options).fit(sim.data)
    original = _opening.number_of_factors

    def three_more(*args):
        found, groups, diagnostics = original(*args)
        return found + 3, groups, diagnostics

    monkeypatch.setattr(_opening, "number_of_factors", three_more)
    model = NBLNEstimator(**options).fit(sim.data)
    found = model.rank_diagnostics_
    assert model.latent_dim_ == 2 == expected.latent_dim_
    assert found["column_information"].shape == (5,)
    assert np.all(np.diff(found["column_information"]) <= 0)
    assert np.all(found["column_information"][:2] > found["noise_edge"])
    assert np.all(found["column_information"][2:] < found["noise_edge"])
    assert model.score(sim.data) == pytest.approx(expected.score(sim.data), abs=0.01)


@pytest.mark.slow
def test_a_factor_of_two_genes_is_found():
    rng = np.random.default_rng(0)
    on = rng.random(400) < 0.3
    x = rng.normal(0, 1, 60) + rng.standard_normal((400, 1)) * 0.5 * rng.standard_normal(60)
    x[:, :2] = np.log(0.2) + np.log(30) * on[:, None]
    model = NBLNEstimator(random_state=0).fit(rng.poisson(np.exp(x) * rng.gamma(5, 0.2, x.shape)))
    assert model.rank_diagnostics_["n_groups"] == 1 and model.latent_dim_ == 2
    strongest = np.sort(np.abs(model.components_), 1)[:, ::-1]
    loads = np.abs(model.components_[:, :2]).min(1)
    assert loads.max() > 1.2  # of log(30) sd(on) = 1.6
    assert strongest[np.argmax(loads), 2] < 0.4


def test_a_given_number_is_taken_as_it_is(sim, source):
    model = NBLNEstimator(4, informative_prior_estimator=source, random_state=0).fit(sim.data)
    assert model.latent_dim_ == 4
    assert model.rank_diagnostics_ is None
    assert np.all(np.linalg.norm(model.components_, axis=1) > 0.01)


@pytest.mark.parametrize("prior", ["ard", "horseshoe_columnwise", "neg_columnwise"])
def test_columns_that_are_not_real_are_zero_under_a_shrinking_prior(sim, source, prior):
    model = NBLNEstimator(
        4, informative_prior_estimator=source, loadings_prior=prior, random_state=0
    ).fit(sim.data)
    assert model.latent_dim_ == 4
    assert np.all(np.linalg.norm(model.components_[:2], axis=1) > 0.1)
    assert not model.components_[2:].any() and not model.loadings_[:, 2:].any()
    assert not model.transform(sim.data)[:, 2:].any()
    assert model.w_prior_diagnostics_["effective_rank"] == 2
    assert model.w_prior_diagnostics_["sigma_k"].shape == (4,)
    assert np.all(np.isfinite(model.components_standard_error_))
    assert model.get_distributions()["z"].event_shape == (4,)


def test_null_data_have_columns_of_zeros_under_ard(null, null_source, no_factor):
    model = NBLNEstimator(
        2, informative_prior_estimator=null_source, loadings_prior="ard", random_state=0
    ).fit(null)
    assert model.latent_dim_ == 2
    assert model.rank_diagnostics_["score_rank"] == 0
    assert not model.components_.any() and not model.loadings_.any()
    assert not model.transform(null).any()
    assert model.w_prior_diagnostics_["effective_rank"] == 0
    assert model.score(null) == pytest.approx(no_factor.score(null), abs=0.01)


# ------------------------------------------------------------------ none


def test_without_factors_there_is_one_component_of_zeros(no_factor, null):
    model = no_factor
    assert model.converged_
    assert model.latent_dim_ == 0
    assert model.rank_diagnostics_["score_rank"] == 0
    assert model.w_prior_diagnostics_["effective_rank"] == 0
    np.testing.assert_array_equal(model.components_, np.zeros((1, 24)))
    np.testing.assert_array_equal(model.loadings_, np.zeros((24, 1)))
    np.testing.assert_array_equal(model.explained_variance_, [0.0])
    np.testing.assert_array_equal(model.transform(null), np.zeros((150, 1)))
    np.testing.assert_array_equal(model.get_covariance(), np.diag(model.noise_variance_))
    assert list(model.get_feature_names_out()) == ["nblnestimator0"]
    mean, covariance = model.posterior_scores(null)
    assert mean.shape == (150, 1) and not mean.any() and not covariance.any()
    rates = model.inverse_transform(model.transform(null))
    np.testing.assert_array_equal(rates, np.tile(model.mean_, (150, 1)))
    assert model.sample_posterior(3, random_state=0).mu.shape == (3, 24)
    assert model.get_distributions()["z"].event_shape == (1,)


def test_its_score_is_that_of_independent_log_normal_genes(no_factor, null, null_source):
    """Without capture offset the score is a sum over genes of one-dimensional integrals."""
    source = NBVCPEstimator(capture_efficiency=None, random_state=0).fit(null)
    with pytest.warns(UserWarning, match=NO_FACTOR):
        model = NBLNEstimator(informative_prior_estimator=source, random_state=0).fit(null)
    nodes, weights = np.polynomial.hermite_e.hermegauss(101)
    x = model.mean_[:, None] + np.sqrt(model.noise_variance_)[:, None] * nodes
    r = model.dispersion_[:, None]
    pmf = nbinom.pmf(null[:, :, None], r, r / (r + np.exp(x)))
    exact = np.log(pmf @ (weights / weights.sum())).sum(1)
    # Laplace's method, 24 genes
    assert np.abs(model.score_samples(null) - exact).mean() < 0.1
    # no worse than genes without log-normal variance
    assert no_factor.score(null) > null_source.score(null) - 0.05


def test_it_pickles_and_continues(no_factor, null):
    again = pickle.loads(pickle.dumps(no_factor))
    np.testing.assert_array_equal(again.score_samples(null), no_factor.score_samples(null))
    with pytest.warns(UserWarning, match=NO_FACTOR):
        again.set_params(warm_start=True).fit(null)
    assert again.latent_dim_ == 0
    assert not again.components_.any()
    assert again.n_iter_ <= no_factor.n_iter_
    assert again.score(null) == pytest.approx(no_factor.score(null), abs=1e-3)


def test_a_fit_that_found_its_factors_continues_with_them(sim, source):
    model = NBLNEstimator(informative_prior_estimator=source, warm_start=True, random_state=0).fit(
        sim.data
    )
    first, value = model.rank_diagnostics_, model.objective_history_[-1]
    model.fit(sim.data)
    assert model.latent_dim_ == 2
    assert model.rank_diagnostics_ is first
    assert model.objective_history_[0] == pytest.approx(value, rel=1e-9)


def test_a_fit_of_large_overdispersion_continues_where_it_was():
    """Of gamma counts the start with overdispersion in r is kept."""
    rng = np.random.default_rng(0)
    X = rng.poisson(100.0 * rng.gamma(0.3, 1 / 0.3, (150, 24)))
    source = NBVCPEstimator(capture_efficiency=None, random_state=0).fit(X)
    model = NBLNEstimator(
        2, informative_prior_estimator=source, warm_start=True, random_state=0
    ).fit(X)
    assert model._split == NEARLY_ALL_IN_R
    value = model.objective_history_[-1]
    model.fit(X)
    assert model._split == NEARLY_ALL_IN_R
    assert model.objective_history_[0] == pytest.approx(value, rel=1e-9)


def test_a_fit_does_not_lose_to_its_own_poisson_limit():
    """Log-normal counts with variances of 10 to 20, more than 90 % zeros: the default contains them."""
    rng = np.random.default_rng(1)
    variance, mean = rng.uniform(10, 20, 24), np.exp(rng.uniform(np.log(0.05), 0.0, 24))
    x = np.log(mean) - variance / 2 + np.sqrt(variance) * rng.standard_normal((450, 24))
    X = rng.poisson(np.exp(x) * rng.gamma(20, 1 / 20, x.shape))
    train, rows = X[:300], X[300:]
    source = NBVCPEstimator(capture_efficiency=None, random_state=0).fit(train)
    scores = {}
    for channel in ("nb", "poisson"):
        model = NBLNEstimator(
            1, informative_prior_estimator=source, observation=channel, random_state=0
        ).fit(train)
        scores[channel] = model.score(rows)
    assert scores["nb"] > scores["poisson"] - 0.5
    assert scores["nb"] > source.score(rows) + 0.2

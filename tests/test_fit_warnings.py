"""What a fit says of itself when it ends: each sentence where it is due, and no other."""

import warnings

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

from sknbln import NBLNEstimator, NBVCPEstimator, _fit_warnings, _opening
from sknbln._spectrum import MOST_FACTORS
from sknbln.datasets import load_immune_cells, make_nbln_counts

FREE = dict(cascade="parameter", informative_priors_freeze=("eta",), informative_priors_tau=np.inf)
#: the beginnings of the sentences
TAILS, SCORES, BOUND, TWICE, NO_FACTOR, MANY = (
    "The log-rates of",
    "The mean square of the scores",
    "All . columns of the loadings are real",
    "Overdispersion is counted twice",
    'latent_dim="auto" found no factor',
    "The scores show more than",
)


@pytest.fixture(scope="module")
def sim():
    return make_nbln_counts(n_cells=200, n_genes=30, n_factors=2, random_state=0)


@pytest.fixture(scope="module")
def source(sim):
    return NBVCPEstimator(random_state=0).fit(sim.data)


@pytest.fixture
def fitted(sim, source):
    def fit(latent_dim=2, **options):
        return NBLNEstimator(
            latent_dim, informative_prior_estimator=source, random_state=0, **options
        ).fit(sim.data)

    return fit


def said(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    return [str(w.message) for w in caught]


def eight_samples(n_genes):
    """Bulk RNA: 8 samples of two conditions with known log fold changes."""
    g = np.random.default_rng(0)
    change = g.normal(0, 1.5, n_genes) * (g.random(n_genes) < 0.1)
    mean = np.exp(g.normal(7, 2, n_genes) + np.outer(np.arange(8) % 2, change))
    return g.poisson(mean * g.gamma(20, 0.05, (8, n_genes)))


# ------------------------------------------------------------------ each sentence


def test_heavy_tails_name_the_genes_largest_first():
    variance = np.full(30, 1.0)
    assert _fit_warnings.heavy_tails(variance, np.arange(30)) is None
    variance[[4, 7, 9]] = 60.0, 3879.0, _fit_warnings.LARGEST_VARIANCE
    sentence = _fit_warnings.heavy_tails(variance, np.array([f"G{i}" for i in range(30)]))
    assert "2 of 30 genes" in sentence and "3879 (G7, G4)" in sentence
    many = _fit_warnings.heavy_tails(np.full(30, 60.0), np.arange(30))
    assert "30 of 30 genes" in many and "8, 9, ...)" in many


@pytest.mark.parametrize(
    "loadings, variance, n", [("mean", 0.0, 0), ("weak", 0.9, 0), ("short", 0, 1)]
)
def test_scores_count_with_their_posterior_variance(loadings, variance, n):
    """A weak real factor has scores of mean square .1, and the rest of 1 in their posterior variance."""
    z = np.random.default_rng(0).standard_normal((500, 2))
    z /= np.sqrt(np.mean(z**2, 0))
    z[:, 1] *= {"mean": 1.0, "weak": np.sqrt(0.1), "short": 3.0}[loadings]
    covariance = np.zeros((500, 2, 2))
    covariance[:, 1, 1] = variance
    sentence = _fit_warnings.scores_off_scale(z, covariance)
    assert (sentence is not None) == bool(n)
    if n:
        assert "is 9 in the components 1:" in sentence
    assert _fit_warnings.scores_off_scale(z[:, :0], covariance[:, :0, :0]) is None


def test_dispersion_is_said_to_be_counted_twice_where_it_matters():
    gradient = np.r_[np.full(19, 2.0), -1.0]
    assert "95 % of the genes" in _fit_warnings.dispersion_counted_twice(gradient, 30)
    assert _fit_warnings.dispersion_counted_twice(gradient, 40) is None  # .93 nats per cell
    gradient[0] = -1.0
    assert _fit_warnings.dispersion_counted_twice(gradient, 30) is None  # 90 %


def test_no_larger_rank_is_possible():
    assert "All 8 columns" in _fit_warnings.rank_is_a_bound(8, 8, 9)
    assert _fit_warnings.rank_is_a_bound(8, 8, 8) is None
    assert _fit_warnings.rank_is_a_bound(7, 8, 9) is None


def test_no_factor_is_said():
    assert _fit_warnings.no_factor(0).startswith(NO_FACTOR)
    assert _fit_warnings.no_factor(1) is None


def test_more_factors_than_a_fit_looks_for_are_said():
    most = MOST_FACTORS
    assert f"more than {most} factors" in _fit_warnings.more_factors_than_looked_for(
        {"score_rank": most + 1}
    )
    assert _fit_warnings.more_factors_than_looked_for({"score_rank": most}) is None
    assert _fit_warnings.more_factors_than_looked_for(None) is None


# ------------------------------------------------------------------ in fits


@pytest.mark.parametrize("prior", ["ard", "horseshoe_columnwise", "neg_columnwise"])
def test_a_rank_that_equals_latent_dim_is_said(fitted, prior):
    with pytest.warns(UserWarning, match=BOUND) as caught:
        model = fitted(1, loadings_prior=prior, **FREE)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert "the scores show 2 factors" in str(caught[0].message)
    assert model.w_prior_diagnostics_["effective_rank"] == 1 == model.latent_dim_
    for latent_dim in (2, 4):  # silent: the scores show no more
        model = fitted(latent_dim, loadings_prior=prior, **FREE)
        assert model.w_prior_diagnostics_["effective_rank"] == 2
        assert model.latent_dim_ == latent_dim


def test_a_literal_freeze_names_the_setting_to_use(fitted):
    with pytest.warns(UserWarning, match=TWICE) as caught:
        model = fitted(cascade="parameter")
    assert len(caught) == 1
    found = model.get_dispersion_diagnostics()
    assert f"{100 * found['fraction_positive']:.0f} % of the genes" in str(caught[0].message)
    literal = dict(cascade="parameter")
    for setting in ({}, FREE, dict(literal, **FREE), dict(literal, observation="poisson")):
        fitted(**setting)  # a warning is an error


def test_no_factor_is_said_at_fit(sim):
    X = np.random.default_rng(0).permuted(sim.data.toarray(), axis=0)
    with pytest.warns(UserWarning, match=NO_FACTOR) as caught:
        NBLNEstimator(random_state=0).fit(X)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_more_factors_than_a_fit_looks_for_are_said_at_fit(fitted, monkeypatch):
    monkeypatch.setattr(_fit_warnings, "MOST_FACTORS", 1)  # these data show two
    monkeypatch.setattr(_opening, "MOST_FACTORS", 1)
    with pytest.warns(UserWarning, match=MANY) as caught:
        model = fitted("auto")
    assert len(caught) == 1
    assert model.latent_dim_ == 1 and model.rank_diagnostics_["score_rank"] == 2
    fitted(1)  # silent: a number is taken as it is


def test_loadings_that_a_prior_holds_too_short_are_said(fitted):
    with pytest.warns(UserWarning, match=SCORES):
        fitted(loadings_prior={"type": "gaussian", "sigma": 0.05}, **FREE)


def test_large_variances_are_said_at_fit(fitted, monkeypatch):
    monkeypatch.setattr(_fit_warnings, "LARGEST_VARIANCE", 0.5)  # of these data
    with pytest.warns(UserWarning, match=TAILS) as caught:
        model = fitted(**FREE)
    assert len(caught) == 1
    variance = np.diag(model.get_covariance())
    assert f"{np.sum(variance > 0.5)} of 30 genes" in str(caught[0].message)
    assert f"({np.argmax(variance)}" in str(caught[0].message)


@pytest.mark.slow
def test_heavy_tails_are_said_at_fit():
    """Few rows, strongly overdispersed, 70 % structural zeros."""
    g = np.random.default_rng(1)
    share = np.exp(np.random.default_rng(0).normal(0, 2, 100))
    depth = np.exp(g.uniform(np.log(1e3), np.log(1e5), 60))[:, None]
    rate = share / share.sum() * depth * g.gamma(0.1, 10, (60, 100))
    X = g.poisson(rate * (g.random((60, 100)) < 0.3))
    literal = NBLNEstimator(3, cascade="parameter", random_state=0, tol=1e-3)
    assert any(word.startswith(TAILS) for word in said(lambda: literal.fit(X)))


def test_a_fit_that_stops_on_the_way_says_that_alone(fitted):
    with pytest.warns(ConvergenceWarning) as caught:
        model = fitted(max_iter=1)
    assert not model.converged_
    assert len(caught) == 1


@pytest.mark.slow
def test_fits_of_real_cells_are_silent():
    X = load_immune_cells().data
    source = NBVCPEstimator(random_state=0).fit(X)
    for latent_dim, options in ((8, FREE), (24, dict(loadings_prior="ard", **FREE))):
        NBLNEstimator(
            latent_dim, informative_prior_estimator=source, random_state=0, **options
        ).fit(X)  # a warning is an error


@pytest.mark.slow
def test_eight_samples_under_ard_are_said():
    """The prior takes the only factor to zero; without it the factor is there."""
    X = eight_samples(1500)
    words = said(lambda: NBLNEstimator(2, loadings_prior="ard", random_state=0, **FREE).fit(X))
    assert any(word.startswith("The loadings_prior took 1 of 1 columns to zero") for word in words)
    for model in (NBLNEstimator(2, random_state=0, **FREE), NBLNEstimator(random_state=0)):
        assert said(lambda model=model: model.fit(X)) == []

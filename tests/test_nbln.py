"""NBLNEstimator: recovery of the truth, channels, covariance, posteriors, diagnostics."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.special import gammaln
from scipy.stats import nbinom
from sklearn.exceptions import ConvergenceWarning

from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln._capture import CapturePrior, score_rows
from sknbln._passes import solve_rows
from sknbln._rows import RowBatches
from sknbln.datasets import make_nbln_counts
from sknbln.solver.overdispersion import TotalOverdispersion
from sknbln.solver.params import Params

from .reference.importance import log_marginal


@pytest.fixture(scope="module")
def small():
    return make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=3)


@pytest.fixture(scope="module")
def source(small):
    return NBVCPEstimator(random_state=0).fit(small.data)


def fit(small, source, k=2, **options):
    return NBLNEstimator(k, informative_prior_estimator=source, random_state=0, **options).fit(
        small.data
    )


LITERAL = {"cascade": "parameter"}


def literal_freeze():
    """The literal fit of these data says that overdispersion is counted twice."""
    return pytest.warns(UserWarning, match="Overdispersion is counted twice")


def off_diagonal_correlation(components, loadings):
    upper = np.triu_indices(loadings.shape[0], 1)
    return np.corrcoef((components.T @ components)[upper], (loadings @ loadings.T)[upper])[0, 1]


def gap_closed(model, independent, test, truth, prior):
    """Fraction of the way from independent genes to the true parameters, held-out rows."""
    params = Params(truth.mean, truth.loadings, truth.noise_variance, 1 / truth.dispersion)
    oracle = score_rows(test, params, prior).mean()
    base = independent.score(test)
    return (model.score(test) - base) / (oracle - base)


# ------------------------------------------------------------------ recovery


@pytest.fixture(scope="module")
def medium():
    sim = make_nbln_counts(n_cells=625, n_genes=200, random_state=1)
    train = np.arange(500)
    sizes = np.asarray(sim.data.sum(axis=1)).ravel()
    prior = CapturePrior(3.0 + np.log(np.median(sizes[train])), 0.35)
    independent = NBVCPEstimator(capture_efficiency=tuple(prior), random_state=0).fit(
        sim.data[train]
    )
    return sim, prior, independent


# Planning measured 0.84 (500 x 200) for the correlation under the literal freeze with 8 columns, and 70 % of
# the gap; under the hard coupling 0.86 and 90 %. The defaults, with the number of factors found, reach more.
# the literal freeze is said where it is clear (the next test)
@pytest.mark.filterwarnings("ignore:Overdispersion is counted twice")
@pytest.mark.parametrize(
    ("options", "correlation", "fraction"),
    [
        ({}, 0.90, 0.93),
        (LITERAL, 0.82, 0.68),
        ({"latent_dim": 8, "informative_priors_freeze": ("r", "eta")}, 0.84, 0.88),
        ({"latent_dim": 8, "informative_priors_tau": np.inf}, 0.82, 0.88),
    ],
    ids=str,
)
def test_recovers_structure_and_held_out_score(medium, options, correlation, fraction):
    sim, prior, independent = medium
    model = NBLNEstimator(informative_prior_estimator=independent, random_state=0, **options).fit(
        sim.data[:500]
    )
    assert off_diagonal_correlation(model.components_, sim.loadings) > correlation
    test = sim.data[500:].astype(float).tocsr()
    assert gap_closed(model, independent, test, sim, prior) > fraction
    assert np.all(np.diff(model.objective_history_) > -1e-9)


def test_marginal_cascade_finds_the_dispersion_where_the_literal_freeze_does_not(medium):
    sim, _, independent = medium
    options = dict(informative_prior_estimator=independent, random_state=0)
    with literal_freeze():
        raw = NBLNEstimator(8, **LITERAL, **options).fit(sim.data[:500])
    marginal = NBLNEstimator(8, **options).fit(sim.data[:500])
    truth = np.median(sim.dispersion)
    assert np.median(raw.dispersion_) < truth / 2
    # the split between d and 1/r is weakly determined per gene; the median over genes is not
    assert 0.5 < np.median(marginal.dispersion_) / truth < 2.0
    double_counted = raw.get_dispersion_diagnostics()
    assert double_counted["per_cell"] > 5 * abs(marginal.get_dispersion_diagnostics()["per_cell"])
    assert double_counted["fraction_positive"] > 0.9


def test_components_are_in_their_singular_basis(small, source):
    model = fit(small, source, 3)
    gram = model.components_ @ model.components_.T
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-9 * gram.max())
    assert np.all(np.diff(np.diag(gram)) <= 0)
    assert np.all(model.components_.max(1) == np.abs(model.components_).max(1))
    np.testing.assert_allclose(model.components_.sum(1), 0, atol=1e-9)
    np.testing.assert_array_equal(model.get_W_compositional(), model.components_.T)
    assert model.cascade_source is model.informative_prior_estimator_
    assert model.w_prior_diagnostics is model.w_prior_diagnostics_
    centred = model.loadings_ - model.loadings_.mean(0)
    np.testing.assert_allclose(centred, model.components_.T, atol=1e-12)


def test_covariance_precision_correlation(small, source):
    model = fit(small, source)
    covariance = model.get_covariance()
    np.testing.assert_allclose(
        covariance, model.loadings_ @ model.loadings_.T + np.diag(model.noise_variance_)
    )
    np.testing.assert_allclose(
        model.get_precision() @ covariance, np.eye(covariance.shape[0]), atol=1e-7
    )
    n = covariance.shape[0]
    P = np.eye(n) - 1 / n
    expected = P @ covariance @ P
    sd = np.sqrt(np.diag(expected))
    np.testing.assert_allclose(model.get_correlation(), expected / np.outer(sd, sd), atol=1e-10)


def test_fewer_rows_than_factors_clips_latent_dim(small):
    model = NBLNEstimator(20, random_state=0).fit(small.data[:6])
    assert model.latent_dim_ == 6
    assert model.transform(small.data[:6]).shape == (6, 6)


def test_gauge_diagnostics(small, source):
    model = fit(small, source)
    found = model.get_gauge_diagnostics()
    whole = np.linalg.norm(model.loadings_) ** 2
    assert whole == pytest.approx(found["compositional_norm"] ** 2 + found["ones_norm"] ** 2)
    assert found["ratio"] == pytest.approx(found["ones_norm"] / found["compositional_norm"])


# ------------------------------------------------------------------ limits and channels


def test_sigma_to_zero_scores_as_nbvcp(small, source):
    model = fit(small, source, **LITERAL)  # r is the source's
    model.loadings_ = np.zeros_like(model.loadings_)
    model.noise_variance_ = np.zeros_like(model.noise_variance_)
    model.mean_ = np.log(source.mean_)
    np.testing.assert_allclose(
        model.score_samples(small.data), source.score_samples(small.data), rtol=1e-10
    )


def test_large_r_scores_as_poisson(small, source):
    model = fit(small, source, observation="poisson")
    poisson = model.score_samples(small.data)
    assert np.all(np.isinf(model.dispersion_))
    model.dispersion_ = np.full_like(model.dispersion_, 1e8)
    np.testing.assert_allclose(model.score_samples(small.data), poisson, rtol=0, atol=1e-4)


def test_score_without_capture_and_sigma_is_the_negative_binomial(small):
    source = NBVCPEstimator(capture_efficiency=None, random_state=0).fit(small.data)
    r, m = source.dispersion_, source.mean_
    expected = nbinom.logpmf(small.data.toarray(), r, r / (r + m)).sum(1)
    np.testing.assert_allclose(source.score_samples(small.data), expected, rtol=1e-9)


def standardized(posterior, scale, i):
    """Posterior covariance of the scores and of the standardized capture deviation of row i."""
    covariance = np.empty((3, 3))
    covariance[:2, :2] = posterior.score_covariance[i]
    covariance[2, :2] = covariance[:2, 2] = -posterior.score_offset_covariance[i] / scale[i]
    covariance[2, 2] = posterior.offset_variance[i] / scale[i] ** 2
    return covariance


@pytest.mark.parametrize("observation", ["nb", "poisson"])
def test_score_against_importance_sampling(small, source, observation):
    """24 genes, 2 factors and capture: Laplace lies within 0.3 nats of the exact value."""
    model = fit(small, source, observation=observation)
    rows = small.data[:6]
    laplace = model.score_samples(rows)
    prior = model.capture_prior_
    sizes = np.asarray(rows.sum(axis=1)).ravel()
    offset, scale = prior.rows(sizes)
    posterior = solve_rows(RowBatches(rows.astype(float).tocsr(), offset, scale), model._params())
    rng = np.random.default_rng(0)
    for i in range(6):
        exact, error = log_marginal(
            rows[[i]].toarray()[0].astype(float),
            model.mean_,
            model.loadings_,
            model.noise_variance_,
            model.dispersion_,
            offset[i],
            scale[i],
            posterior_mean=np.r_[posterior.scores[i], (offset[i] - posterior.offset[i]) / scale[i]],
            posterior_cov=standardized(posterior, scale, i),
            n_draws=4000,
            rng=rng,
        )
        assert error < 0.05
        assert abs(laplace[i] - exact) < 0.3 + 4 * error


def test_multinomial_score_is_exact_as_sigma_vanishes(small, source):
    model = fit(small, source, observation="multinomial")
    model.loadings_ = np.zeros_like(model.loadings_)
    model.noise_variance_ = np.zeros_like(model.noise_variance_)
    counts = small.data.toarray().astype(float)
    share = np.exp(model.mean_) / np.exp(model.mean_).sum()
    expected = (
        gammaln(counts.sum(1) + 1) - gammaln(counts + 1).sum(1) + (counts * np.log(share)).sum(1)
    )
    np.testing.assert_allclose(model.score_samples(counts), expected, rtol=1e-8)


def test_multinomial_score_against_numerical_integration():
    """Two genes: a binomial with a normal logit. The Laplace error is below 0.02 nats here."""
    rng = np.random.default_rng(0)
    logit = 0.3 + 0.6 * rng.standard_normal(200)
    first = rng.binomial(30, 1 / (1 + np.exp(-logit)))
    counts = np.column_stack([first, 30 - first])
    counts[0] = 0
    with pytest.warns(UserWarning, match="totals are equal but for rounding"):  # by design
        model = NBLNEstimator(1, observation="multinomial", random_state=0).fit(counts)
    variance = np.array([1, -1]) @ model.get_covariance() @ np.array([1, -1])
    loc = model.mean_[0] - model.mean_[1]
    nodes, weights = np.polynomial.hermite_e.hermegauss(201)
    p = 1 / (1 + np.exp(-(loc + np.sqrt(variance) * nodes)))
    weights = weights / weights.sum()
    u, n = counts[:, [0]], counts.sum(1, keepdims=True)
    pmf = np.exp(gammaln(n + 1) - gammaln(u + 1) - gammaln(n - u + 1)) * p**u * (1 - p) ** (n - u)
    np.testing.assert_allclose(model.score_samples(counts), np.log(pmf @ weights), atol=0.02)
    assert model.score_samples(counts)[0] == pytest.approx(0.0, abs=1e-9)
    assert np.all(model.transform(counts)[0] == pytest.approx(0.0, abs=1e-9))


def test_channels_without_dispersion_refuse_to_freeze_it(small, source):
    with pytest.raises(ValueError, match="does not have"):
        fit(small, source, observation="poisson", informative_priors_freeze=("r",))
    with pytest.raises(ValueError, match="does not have"):
        fit(small, source, observation="multinomial", informative_priors_freeze=("eta",))
    assert fit(small, source, observation="poisson").frozen_params_ == ("eta",)
    assert fit(small, source, observation="multinomial").frozen_params_ == ()


def test_an_all_zero_row_has_a_finite_score_and_embedding(small, source):
    for observation in ("nb", "poisson", "multinomial"):
        model = fit(small, source, observation=observation)
        rows = np.zeros((2, small.data.shape[1]))
        assert np.all(np.isfinite(model.transform(rows)))
        assert np.all(np.isfinite(model.score_samples(rows)))


# ------------------------------------------------------------------ posteriors


@pytest.mark.parametrize("freeze", [(), ("r", "eta"), ("r", "mu", "eta")])
@pytest.mark.parametrize("cascade", ["parameter", "marginal"])
def test_distributions_agree_with_draws(small, source, freeze, cascade):
    model = fit(small, source, informative_priors_freeze=freeze, cascade=cascade)
    with jax.enable_x64(True):
        found = model.get_distributions()
        drawn = {
            name: np.asarray(d.sample(jax.random.key(0), (2000,))) for name, d in found.items()
        }
        for name, d in found.items():
            assert np.all(np.isfinite(np.asarray(d.log_prob(drawn[name][:5])))), name
    samples = model.sample_posterior(2000, random_state=1)
    for name in ("r", "mu", "eta"):
        a, b = drawn[name], samples[name]
        spread = b.std(0)
        # medians of 2,000 draws differ by a twentieth of the spread or so
        assert np.all(np.abs(np.median(a, 0) - np.median(b, 0)) < 0.25 * spread + 1e-12), name
    assert np.all(samples.eta >= 0)
    assert np.all(samples.r > 0)
    model.set_params(whiten=True)  # "z" are standardized
    np.testing.assert_allclose(drawn["z"].mean(0), model.transform(small.data), atol=0.15)


def test_frozen_parameters_keep_the_source_s_posterior(small, source):
    model = fit(small, source, informative_priors_freeze=("r", "mu", "eta"), **LITERAL)
    ours = model.sample_posterior(50, random_state=3)
    theirs = source.sample_posterior(50, random_state=3)
    np.testing.assert_array_equal(ours.r, theirs.r)
    np.testing.assert_array_equal(ours.eta, theirs.eta)
    np.testing.assert_array_equal(ours.mu, np.log(theirs.mu))
    np.testing.assert_array_equal(model.mean_, np.log(source.mean_))


def test_coupled_draws_keep_each_draw_s_marginal_moments(small, source):
    model = fit(small, source, informative_priors_freeze=("r", "mu", "eta"))
    ours = model.sample_posterior(50, random_state=3)
    theirs = source.sample_posterior(50, random_state=3)
    variance = 2 * (np.log(theirs.mu) - ours.mu)  # Sigma_gg of the draw
    total = TotalOverdispersion.at(
        source.mean_ * np.mean(np.exp(-source.capture_offset_)), source.dispersion_
    )
    np.testing.assert_allclose(variance + total(np.log(ours.r)), total(np.log(theirs.r)), rtol=1e-8)


def test_coupled_dispersion_transform_inverts():
    from sknbln._posterior import CoupledDispersion

    with jax.enable_x64(True):
        r = np.geomspace(0.05, 20, 30)
        change = CoupledDispersion(
            np.linspace(2.0, 0.0, 30), TotalOverdispersion(np.linspace(0.0, 1.0, 30))
        )
        y = change(r)
        np.testing.assert_allclose(change._inverse(y), r, rtol=1e-6)
        step = 1e-6 * r
        slope = (np.asarray(change(r + step)) - np.asarray(change(r - step))) / (2 * step)
        np.testing.assert_allclose(change.log_abs_det_jacobian(r, y), np.log(slope), atol=1e-6)


@pytest.mark.slow
def test_curvature_of_mu_matches_a_parametric_bootstrap():
    """Standard deviations of free mu against 40 refits to data simulated from the fit."""
    sim = make_nbln_counts(n_cells=400, n_genes=40, n_factors=2, random_state=0)
    options = dict(
        latent_dim=2,
        **LITERAL,
        informative_priors_tau=np.inf,
        capture_efficiency=None,
        random_state=0,
        tol=1e-7,  # all refits start from one source: those that stop early are alike
    )
    source = NBVCPEstimator(capture_efficiency=None, random_state=0).fit(sim.data)
    model = NBLNEstimator(informative_prior_estimator=source, **options).fit(sim.data)
    rng = np.random.default_rng(0)
    refits = []
    for _ in range(40):
        x = (
            model.mean_
            + rng.standard_normal((400, 2)) @ model.loadings_.T
            + np.sqrt(model.noise_variance_) * rng.standard_normal((400, 40))
        )
        r = model.dispersion_
        counts = rng.poisson(np.exp(x) * rng.gamma(r, 1 / r, x.shape))
        refits.append(
            NBLNEstimator(informative_prior_estimator=source, **options).fit(counts).mean_
        )
    ratio = model._standard_deviation.mean / np.std(refits, axis=0, ddof=1)
    assert 0.8 < np.median(ratio) < 1.2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (LITERAL, 1e-4),
        ({"loadings_prior": "ard", "informative_priors_freeze": ("r", "eta")}, 1e-6),
        ({"loadings_prior": "ard", "tol": 0.01}, 0.01),
    ],
    ids=str,
)
def test_tolerance_is_the_settings_unless_given(small, source, options, expected):
    with pytest.warns(ConvergenceWarning, match="max_iter=1 sweeps were done"):
        model = fit(small, source, max_iter=1, **options)
    assert_allclose(model.tol_, expected, rtol=1e-12)


@pytest.mark.parametrize("depth", [10.0, 0.01])
def test_default_tolerance_is_no_less_than_what_parameters_tell(depth):
    """.002 nats for each parameter; of shallow counts that is more than a share of the log-posterior."""
    counts = make_nbln_counts(150, 10, n_factors=2, depth=depth, random_state=0).data
    source = NBVCPEstimator(random_state=0).fit(counts)
    model = NBLNEstimator(2, informative_prior_estimator=source, random_state=0).fit(counts)
    n_parameters = 10 * (3 + model.w_prior_diagnostics_["effective_rank"])
    each = 0.002 * n_parameters / (150 * max(abs(model.objective_history_[-1]), 1.0))
    assert_allclose(model.tol_, max(each, 1e-5), rtol=1e-6)
    assert model.converged_


def test_genes_with_few_counts_keep_a_small_noise_variance():
    """Laplace's method without its next term overstates zeros where d is large; d went to 5.3 here."""
    sim = make_nbln_counts(6000, 60, n_factors=2, depth=0.1, random_state=0)
    model = NBLNEstimator(2, random_state=0).fit(sim.data)
    assert model.converged_
    assert np.median(sim.data.mean(axis=0)) < 0.1
    assert 0.05 < np.median(model.noise_variance_) < 0.25  # true: 0.05 to 0.2; 1.4 without
    assert model.noise_variance_.max() < 1.0

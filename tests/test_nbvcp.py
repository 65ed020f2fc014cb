"""NBVCPEstimator: recovery, scores, draws, rows, and what it says while and after it fits."""

import copy
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import gammaln
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError

from sknbln import NBVCPEstimator, _nbvcp
from sknbln._capture import CapturePrior
from sknbln._counts import CountHistogram
from sknbln._passes import solve_rows
from sknbln._rows import RowBatches
from sknbln.datasets import make_nbvcp_counts
from sknbln.solver.params import in_model_units

from .reference.csr import csr

N, G = 300, 20
EMPTY = 7  # a gene without counts, in the data of `zeros`


@pytest.fixture(scope="module")
def sim():
    return make_nbvcp_counts(n_cells=N, n_genes=G, mean_range=(0.3, 30.0), random_state=1)


@pytest.fixture(scope="module")
def capture(sim):
    """The prior total mRNA of a cell is the truth, so that offsets and means have their true level."""
    return (float(np.log(sim.mean.sum())), 0.5)


@pytest.fixture(scope="module")
def model(sim, capture):
    return NBVCPEstimator(capture_efficiency=capture, random_state=0).fit(sim.data)


@pytest.fixture(scope="module")
def without(sim):
    """No capture model."""
    return NBVCPEstimator(capture_efficiency=None, random_state=0).fit(sim.data)


@pytest.fixture(scope="module")
def zeros(sim):
    """One gene and one cell have no counts at all."""
    X = sim.data.toarray()
    X[:, EMPTY] = 0
    X[3] = 0
    return X


# ------------------------------------------------------------------ recovery


def test_recovers_the_means(sim, model):
    """Within four standard errors, ``sqrt((1/count + 1/r) / n)``; the level within 0.05.

    The level is known to 0.5 / sqrt(n) = 0.03 through the capture prior. Over five seeds (400 x 30) the
    largest of the errors was 2.1 to 3.2 standard errors, the median shift at most 0.014.
    """
    error = np.log(model.mean_ / sim.mean)
    se = np.sqrt((1 / sim.expected_counts + 1 / sim.dispersion) / N)
    assert np.max(np.abs(error / se)) < 4
    assert abs(np.median(error)) < 0.05


def test_recovers_the_dispersions(sim, model):
    """Where a gene has more than three counts per cell: rms error of log r below 0.25.

    The standard error there is some sqrt(2 / n) (1 + r / count), 0.1 to 0.3. Over five seeds (400 x 30) the
    rms error was 0.10 to 0.24. Genes with less are pulled to the prior, normal(2, 1).
    """
    known = sim.expected_counts > 3
    error = np.log(model.dispersion_ / sim.dispersion)
    assert known.sum() >= 5
    assert np.sqrt(np.mean(error[known] ** 2)) < 0.25
    assert np.max(np.abs(error)) < 3
    assert np.sqrt(np.mean(error[known] ** 2)) < 0.8 * np.std(np.log(sim.dispersion[known]))


def test_recovers_the_offsets(sim, model):
    error = model.capture_offset_ - sim.capture_offset
    # over five seeds (400 x 30) 0.11 to 0.20, where the prior alone has 0.5
    assert np.sqrt(np.mean(error**2)) < 0.25
    assert np.corrcoef(model.capture_offset_, sim.capture_offset)[0, 1] > 0.8
    assert abs(error.mean()) < 0.06


def test_beats_the_model_without_capture(sim, model, without):
    assert model.score(sim.data) > without.score(sim.data)


def test_attributes(sim, model, capture):
    assert model.mean_.shape == model.dispersion_.shape == (G,)
    assert model.capture_offset_.shape == (N,)
    for a in (model.mean_, model.dispersion_, model.capture_offset_, model.loss_curve_):
        assert type(a) is np.ndarray and a.dtype == np.float64
    assert model.capture_prior_ == capture
    assert model.n_features_in_ == G
    assert model.converged_ is True
    assert model.loss_curve_.shape == (model.n_iter_,)
    assert model.n_iter_ <= model.n_steps
    # minus the ELBO bounds minus the log-likelihood, per cell
    assert model.loss_curve_[-50:].mean() > -model.score(sim.data)


# ------------------------------------------------------------------ capture_efficiency


def test_without_capture_there_are_no_offsets(sim, without):
    assert without.capture_prior_ is None
    assert_array_equal(without.capture_offset_, np.zeros(N))
    # the mean of a gene is its average count: the NB's maximum of m, up to a weak prior
    average = sim.data.toarray().mean(0)
    assert_allclose(np.log(without.mean_), np.log(average), atol=0.05)


@pytest.mark.parametrize("organism, total", [("human", 2e5), ("ecoli", 3e3)])
def test_organism(sim, organism, total):
    model = NBVCPEstimator(capture_efficiency=organism, random_state=0).fit(sim.data)
    assert model.capture_prior_ == (np.log(total), 0.5)
    # means are at the level of the organism's total, whatever the libraries are
    assert abs(np.log(model.mean_.sum() / total)) < 0.2


def test_auto_never_meets_the_bound(sim):
    model = NBVCPEstimator(random_state=0).fit(sim.data)
    largest = sim.data.sum(axis=1).max()
    assert model.capture_prior_ == pytest.approx((np.log(largest) + 1.5, 0.5))
    assert np.all(model.capture_offset_ > 0)


def test_level_of_the_prior_moves_means_and_offsets_together(sim, model, capture):
    """log M0 + 2 adds 2 to every log mean and every offset, far from the bound; the scores stay."""
    other = NBVCPEstimator(capture_efficiency=(capture[0] + 2, 0.5), random_state=0).fit(sim.data)
    assert_allclose(np.log(other.mean_), np.log(model.mean_) + 2, atol=0.02)
    assert_allclose(other.capture_offset_, model.capture_offset_ + 2, atol=0.02)
    assert_allclose(other.score_samples(sim.data), model.score_samples(sim.data), atol=0.02)


def test_cells_above_the_prior_total_are_warned_of_and_held_at_zero(sim):
    M0 = float(np.median(sim.data.sum(axis=1)))
    model = NBVCPEstimator(capture_efficiency=(np.log(M0), 0.5), random_state=0)
    with pytest.warns(UserWarning, match="cells have more counts than the prior total mRNA"):
        model.fit(sim.data)
    with pytest.warns(UserWarning, match="cells have more counts than the prior total mRNA"):
        scores = model.score_samples(sim.data)
    assert np.all(model.capture_offset_ >= 0)
    assert 10 < np.sum(model.capture_offset_ == 0) < N
    assert np.all(np.isfinite(model.mean_)) and np.all(np.isfinite(scores))


def test_maximum_with_every_cell_at_the_bound_is_that_without_capture(sim):
    """A prior far below every library: all offsets are held at 0 before the means are final."""
    X, totals = csr(sim.data.toarray()), []
    for prior in (CapturePrior(np.log(sim.data.sum(axis=1).min()) - 2.0, 0.05), None):
        histogram = CountHistogram(X)
        problem = _nbvcp._problem(X, prior, histogram)
        point = NBVCPEstimator()._maximum(X, problem, histogram)[0].point
        totals.append(point.x)
    # the weak prior of log m, of scale 4, is centred elsewhere
    assert_allclose(totals[0].mean, totals[1].mean, atol=0.01)
    assert_allclose(totals[0].dispersion, totals[1].dispersion, atol=0.01)


def test_a_prior_far_below_every_library_gives_finite_numbers(sim):
    M0 = float(sim.data.sum(axis=1).mean()) / 50
    model = NBVCPEstimator(capture_efficiency=(np.log(M0), 0.05), n_steps=2, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = model.fit(sim.data).score_samples(sim.data)
    assert_array_equal(model.capture_offset_, 0.0)
    assert np.all(np.isfinite(model.mean_)) and np.all(np.isfinite(scores))


def test_bad_pairs_are_refused(sim):
    with pytest.raises(ValueError, match="expected two finite numbers"):
        NBVCPEstimator(capture_efficiency=(3.0, -1.0)).fit(sim.data)
    with pytest.raises(ValueError, match="capture_efficiency"):
        NBVCPEstimator(capture_efficiency="rat").fit(sim.data)


# ------------------------------------------------------------------ degenerate rows and genes


def test_genes_and_cells_without_counts_stay_finite(zeros, capture):
    model = NBVCPEstimator(capture_efficiency=capture, random_state=0).fit(zeros)
    for a in (
        np.log(model.mean_),
        np.log(model.dispersion_),
        model.capture_offset_,
        model.loss_curve_,
        model.transform(zeros),
        model.score_samples(zeros),
        *model.sample_posterior(5, random_state=0).values(),
    ):
        assert np.all(np.isfinite(a))
    assert model.mean_[EMPTY] < np.delete(model.mean_, EMPTY).min()
    # a cell without counts has the largest offset: above its prior's, which takes its library for 1
    assert np.argmax(model.capture_offset_) == 3
    assert model.capture_offset_[3] > model.capture_prior_.log_m0


def test_all_zero_rows_of_a_fitted_model_are_finite(model):
    empty = np.zeros((N, G))
    assert np.all(np.isfinite(model.transform(empty)))
    scores = model.score_samples(empty)
    assert np.all(np.isfinite(scores)) and np.all(scores < 0)


# ------------------------------------------------------------------ transform


def test_transform_is_the_mean_of_the_gamma_posterior(without):
    """Prior times likelihood on a fine grid of log-rates, for a few counts; no capture: eta = 0."""
    counts = np.array([0.0, 1.0, 13.0])
    found = without.transform(np.repeat(np.tile(counts[:, None], (1, G)), 100, axis=0))[::100]
    t = np.linspace(-60, 12, 200_001)
    rate = np.exp(t)
    for g in range(3):
        m, r = without.mean_[g], without.dispersion_[g]
        for row, u in enumerate(counts):
            joint = stats.gamma.logpdf(rate, r, scale=m / r) + stats.poisson.logpmf(u, rate) + t
            joint = np.exp(joint - joint.max())
            assert_allclose(found[row, g], np.log(joint @ rate / joint.sum()), rtol=0, atol=1e-6)


def test_transform_formula(sim, model):
    offsets = model.capture_offset_  # training rows and new rows are treated alike
    U = sim.data.toarray()
    r, m = model.dispersion_, model.mean_
    expected = np.log((r + U) / (r / m + np.exp(-offsets)[:, None]))
    found = model.transform(sim.data)
    assert_allclose(found, expected, rtol=0, atol=1e-8)
    # between the prior's mean and the count over the capture probability
    raw = U * np.exp(offsets)[:, None]
    assert np.all(np.exp(found) <= np.maximum(raw, m) * (1 + 1e-9))
    assert np.all(np.exp(found) >= np.minimum(raw, m) * (1 - 1e-9))


def test_rows_are_independent(sim, model):
    order = np.random.default_rng(0).permutation(N)
    for method in (model.transform, model.score_samples):
        whole = method(sim.data)
        assert_allclose(method(sim.data[order]), whole[order], rtol=1e-9, atol=1e-9)
        assert_allclose(method(sim.data[:8]), whole[:8], rtol=1e-9, atol=1e-9)


def test_batch_size_sets_no_result(sim, capture, model):
    small = clone(model).set_params(batch_size=64).fit(sim.data)
    assert_allclose(small.mean_, model.mean_, rtol=1e-6)
    assert_allclose(small.dispersion_, model.dispersion_, rtol=1e-6)
    assert_allclose(small.loss_curve_, model.loss_curve_, rtol=1e-6)
    for method in ("transform", "score_samples"):
        assert_allclose(
            getattr(small, method)(sim.data), getattr(model, method)(sim.data), rtol=0, atol=1e-5
        )


# ------------------------------------------------------------------ scores


def test_score_samples_without_capture_is_scipys_log_pmf(sim, without):
    r, m = without.dispersion_, without.mean_
    expected = stats.nbinom.logpmf(sim.data.toarray(), r, 1 / (1 + m / r)).sum(1)
    assert_allclose(without.score_samples(sim.data), expected, rtol=1e-10)
    assert_allclose(without.score(sim.data), expected.mean(), rtol=1e-12)


def test_score_of_new_rows_is_near_the_truths(sim, model):
    """Fitted parameters cost about ``n_parameters / 2 n`` = 40 / 600 = 0.07 nats per cell on new rows."""
    rng = np.random.default_rng(5)
    rate = sim.mean * np.exp(-sim.capture_offset)[:, None]
    U = rng.poisson(rate * rng.gamma(sim.dispersion, 1 / sim.dispersion, rate.shape))
    truth = copy.copy(model)
    truth.mean_, truth.dispersion_ = sim.mean, sim.dispersion
    difference = truth.score_samples(U) - model.score_samples(U)
    assert -0.1 < difference.mean() < 0.3


# ------------------------------------------------------------------ uncertainty


def whole_posterior_sd(guide, fixed, U):
    """Standard deviations of (log m, log r, eta) by the whole Hessian of the joint density."""
    n_genes = U.shape[1]

    def log_joint(v):
        log_mean, log_r, eta = v[:n_genes], v[n_genes : 2 * n_genes], v[2 * n_genes :]
        r, y = jnp.exp(log_r), log_mean - eta[:, None]
        counts = U * y - (U + r) * jnp.log(r + jnp.exp(y)) + r * log_r + gammaln(U + r) - gammaln(r)
        priors = (fixed.mean_prior, fixed.dispersion_prior, fixed.row_prior)
        residuals = [
            (x - loc) / scale
            for x, (loc, scale) in zip((log_mean, log_r, eta), priors, strict=True)
        ]
        return jnp.sum(counts) - 0.5 * sum(jnp.sum(e**2) for e in residuals)

    at = np.concatenate([guide.log_mean[0], guide.log_dispersion[0], guide.capture_offset[0]])
    with jax.enable_x64(True):
        H = np.asarray(jax.hessian(log_joint)(at))
    sd = np.sqrt(np.diag(np.linalg.inv(-H)))
    return sd[:n_genes], sd[n_genes : 2 * n_genes], sd[2 * n_genes :]


@pytest.mark.parametrize("mean_range", [(3.0, 30.0), (30.0, 300.0)])
def test_marginal_scales_of_the_start_are_those_of_the_whole_posterior(mean_range):
    """Few genes, so that the offsets are poorly known; none of them is near its bound."""
    X = make_nbvcp_counts(n_cells=150, n_genes=8, mean_range=mean_range, random_state=1).data
    X = X.astype(float)
    prior = CapturePrior(float(np.log(X.sum(1).max()) + 1.5), 0.5)
    fixed = _nbvcp._problem(X, prior, CountHistogram(X))
    estimator = NBVCPEstimator()
    outcome, scores = estimator._maximum(X, fixed, CountHistogram(X))
    rows = solve_rows(RowBatches(X, *fixed.row_prior), in_model_units(outcome.point.x), scores)
    guide = estimator._curvature_guide(X, prior, outcome.point, rows)
    assert guide.capture_offset[0].min() > 1.5
    sd = whole_posterior_sd(guide, fixed, X.toarray())
    assert_allclose(guide.log_mean_scale, sd[0], rtol=0.02)
    assert_allclose(guide.log_dispersion_scale, sd[1], rtol=0.04)
    assert_allclose(guide.capture_offset_scale(prior.sigma), sd[2], rtol=0.04)
    assert np.min(guide.log_dispersion[1] / sd[1]) < 0.87  # given the offsets they are too narrow


# ------------------------------------------------------------------ draws


def test_sample_posterior_of_the_training_rows(model):
    draws = model.sample_posterior(4000, random_state=0)
    assert set(draws) == {"r", "mu", "eta"}
    assert draws.r.shape == draws.mu.shape == (4000, G) and draws.eta.shape == (4000, N)
    guide = model._guide
    marginal = {
        "mu": (guide.log_mean[0], guide.log_mean_scale),
        "r": (guide.log_dispersion[0], guide.log_dispersion_scale),
    }
    for name, (loc, scale) in marginal.items():
        log = np.log(draws[name])
        # 4 standard errors of mean and standard deviation of 4,000 draws
        assert_allclose(((log.mean(0) - loc) / scale), 0.0, atol=4 / np.sqrt(4000))
        assert_allclose(log.std(0) / scale, 1.0, atol=4 / np.sqrt(8000))
    loc = guide.capture_offset[0]
    scale = guide.capture_offset_scale(model.capture_prior_.sigma)
    exact = stats.truncnorm(-loc / scale, np.inf, loc, scale)
    assert np.all(draws.eta >= 0)
    assert_allclose((draws.eta.mean(0) - exact.mean()) / exact.std(), 0.0, atol=5 / np.sqrt(4000))
    # medians of the globals are the attributes
    assert_allclose(np.log(model.mean_), guide.log_mean[0])
    assert_allclose(np.log(model.dispersion_), guide.log_dispersion[0])


def test_sample_posterior_of_given_rows(sim, model):
    rows = csr(sim.data[:8].toarray())
    draws = model.sample_posterior(4000, rows, random_state=0)
    assert draws.eta.shape == (4000, 8) and draws.mu.shape == (4000, G)
    found = model._posterior().offsets(rows)
    own = model._guide._replace(capture_offset=(found.raw_loc, found.scale))
    scale = own.capture_offset_scale(model.capture_prior_.sigma)
    exact = stats.truncnorm(-found.raw_loc / scale, np.inf, found.raw_loc, scale)
    assert_allclose((draws.eta.mean(0) - exact.mean()) / exact.std(), 0.0, atol=5 / np.sqrt(4000))
    assert_allclose(draws.eta.std(0) / exact.std(), 1.0, atol=5 / np.sqrt(8000))
    # the variational posterior of the same rows is not far
    training = model.sample_posterior(4000, random_state=0).eta[:, :8]
    assert_allclose((training.mean(0) - draws.eta.mean(0)) / exact.std(), 0.0, atol=0.6)


def test_draws_have_the_covariance_of_the_joint_gaussian(sim, capture):
    """Means and offsets together, against the inverse of the dense information matrix at the fit.

    The level of the means and that of the offsets are known through the prior alone, 0.5 / sqrt(n): the
    genes' scales given the offsets would make that of the means half as large.
    """
    prior = (capture[0] + 1.0, capture[1])  # away from the bound
    model = NBVCPEstimator(capture_efficiency=prior, random_state=0).fit(sim.data)
    rate = model.mean_ * np.exp(-model.capture_offset_)[:, None]
    p = rate / (rate + model.dispersion_)
    information = (sim.data.toarray() + model.dispersion_) * p * (1 - p)
    joint = np.zeros((G + N, G + N))
    joint[:G, :G] = np.diag(information.sum(0) + _nbvcp.LOG_MEAN_PRIOR_SCALE**-2)
    joint[G:, G:] = np.diag(information.sum(1) + prior[1] ** -2)
    joint[:G, G:], joint[G:, :G] = -information.T, -information
    expected = np.linalg.inv(joint)
    draws = model.sample_posterior(4000, random_state=0)
    found = np.cov(np.hstack([np.log(draws.mu), draws.eta]).T)
    ratio = np.sqrt(np.diag(found) / np.diag(expected))
    # the steps leave the scales of single parameters 10 to 20 % off (tests/test_svi.py), one offset 33 %
    assert_allclose(ratio[:G], 1.0, atol=0.25)
    assert abs(np.median(ratio[:G]) - 1) < 0.08 and abs(np.median(ratio[G:]) - 1) < 0.08
    means, offsets = np.zeros((2, G + N))
    means[:G], offsets[G:] = 1 / G, 1 / N
    for a, b in ((means, means), (offsets, offsets), (means, offsets)):
        assert a @ found @ b == pytest.approx(a @ expected @ b, rel=0.1)
    conditional = (model._guide.log_mean[1] ** 2).sum() / G**2
    assert means @ found @ means > 3 * conditional


def test_sample_posterior_defaults_and_seeds(without):
    draws = without.sample_posterior()
    assert draws.mu.shape == (without.n_posterior_samples, G)
    assert_array_equal(draws.eta, np.zeros((without.n_posterior_samples, N)))
    assert without.sample_posterior(3, np.zeros((8, G))).eta.shape == (3, 8)
    first, again, other = (without.sample_posterior(3, random_state=s).mu for s in (1, 1, 2))
    assert_array_equal(first, again)
    assert np.all(first != other)
    # the estimator's own seed where none is given
    assert_array_equal(without.sample_posterior(3).mu, without.sample_posterior(3).mu)


def test_not_fitted_is_said():
    for call in ("transform", "score_samples", "score"):
        with pytest.raises(NotFittedError):
            getattr(NBVCPEstimator(), call)(np.ones((2, 2)))
    with pytest.raises(NotFittedError):
        NBVCPEstimator().sample_posterior()


# ------------------------------------------------------------------ the loop


def test_one_step_does_not_converge_and_says_so(sim, capture):
    model = NBVCPEstimator(capture_efficiency=capture, n_steps=1, random_state=0)
    with pytest.warns(ConvergenceWarning, match="variational fit .* n_steps=1 steps were done"):
        model.fit(sim.data)
    assert model.converged_ is False
    assert model.n_iter_ == 1 and model.loss_curve_.shape == (1,)


@pytest.mark.parametrize("overdispersed", [False, True])
def test_a_maximum_that_rounding_hides_is_found(overdispersed):
    """Counts around 1e8: log-factorials of 1e12 nats in all, rounded by more than the tolerance."""
    rng = np.random.default_rng(3)
    rate = 1e8 * np.exp(rng.normal(0, 1, 24)) * np.exp(rng.normal(0, 0.3, (150, 1)))
    if overdispersed:
        rate = rate * rng.gamma(5, 0.2, (150, 24))
    fitted = NBVCPEstimator(random_state=0).fit(rng.poisson(rate))  # a warning is an error
    assert fitted.converged_


def test_another_matrix_of_the_same_shape_compiles_nothing(compiled, sim, model):
    """As the folds of a cross-validation are; the step's compilation takes twenty times its fit."""
    X = sim.data.toarray()
    X[0, :2] = [101, 102]
    compiled()
    with pytest.warns(ConvergenceWarning):
        clone(model).set_params(n_steps=2).fit(X)
    assert compiled() == 0


def test_verbose_reports_both_stages(sim, capture, capsys):
    model = NBVCPEstimator(capture_efficiency=capture, random_state=0)
    model.fit(sim.data)
    assert capsys.readouterr().out == ""
    model.set_params(verbose=1).fit(sim.data)
    out = capsys.readouterr().out.splitlines()
    assert all(line.startswith("[NBVCPEstimator] ") for line in out)
    assert any("sweep 1: -" in line for line in out)
    assert any("ELBO step 100: " in line and "nats per cell" in line for line in out)
    assert all(line.endswith(" s") for line in out)


def test_same_seed_same_bits(sim, capture, model):
    again = clone(model).fit(sim.data)
    assert_array_equal(again.mean_, model.mean_)
    assert_array_equal(again.loss_curve_, model.loss_curve_)
    other = clone(model).set_params(random_state=1).fit(sim.data)
    assert np.all(other.mean_ != model.mean_)
    # another seed is another variational fit of the same posterior
    scale = model._guide.log_mean[1]
    assert np.max(np.abs(np.log(other.mean_ / model.mean_)) / scale) < 1.0


def test_fractional_counts_are_said_once_and_used(sim, model):
    X = sim.data.toarray() + 0.0
    before = model.score_samples(X)
    X[0, 0] += 0.5
    with pytest.warns(UserWarning, match="not whole numbers") as caught:
        after = model.score_samples(X)
    assert len(caught) == 1
    assert after[0] != before[0]
    assert_allclose(after[1:], before[1:], rtol=1e-12)


@pytest.mark.parametrize("value, message", [(-1.0, "Negative values in data"), (np.inf, "inf")])
def test_bad_counts_are_refused(sim, model, value, message):
    X = sim.data.toarray() + 0.0
    X[2, 3] = value
    for call in (NBVCPEstimator().fit, model.transform, model.score_samples):
        with pytest.raises(ValueError, match=message):
            call(X)

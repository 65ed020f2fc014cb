"""The capture model: its parameter, offsets at and above 0, scores with the offset integrated."""

import warnings

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import optimize, stats
from scipy.special import logsumexp
from sklearn.base import clone

from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln._capture import (
    ORGANISMS,
    CapturePrior,
    OffsetPosterior,
    library_sizes,
    offset_posterior,
    refined,
    resolve,
    row_prior,
    score_rows,
    score_rows_given_totals,
    warn_about_truncation,
)
from sknbln._passes import solve_rows
from sknbln._rows import RowBatches
from sknbln.datasets import make_nbln_counts
from sknbln.solver.params import Params

from .reference import direct, small
from .reference.csr import csr
from .reference.importance import nb_log_pmf

N = small.N_CELLS


# ------------------------------------------------------------------ the parameter


def test_none_is_no_capture():
    X = csr(np.eye(3))
    assert resolve(None, X) is None
    for a in row_prior(None, X):
        assert_array_equal(a, np.zeros(3))


@pytest.mark.parametrize("name, total", sorted(ORGANISMS.items()))
def test_organisms(name, total):
    expected = dict(human=200_000, mouse=200_000, yeast=60_000, ecoli=3_000)
    assert total == expected[name]
    assert resolve(name, csr(np.eye(3))) == (np.log(total), 0.5)


def test_auto_leaves_every_training_row_below_the_bound():
    X = csr([[1, 2, 3], [0, 500, 0], [0, 0, 0]])
    prior = resolve("auto", X)
    assert prior == pytest.approx((np.log(500) + 1.5, 0.5))
    loc, scale = row_prior(prior, X)
    assert np.all(loc >= 3 * scale)
    assert resolve("auto", csr(np.zeros((2, 3)))) == pytest.approx((1.5, 0.5))


@pytest.mark.parametrize("pair", [(np.log(1e5), 0.5), [11, 1], (np.float32(2.0), np.int64(1))])
def test_pairs(pair):
    prior = resolve(pair, csr(np.eye(3)))
    assert prior == (float(pair[0]), float(pair[1]))
    assert all(type(v) is float for v in prior)


def test_a_resolved_prior_is_a_pair():
    prior = resolve("yeast", csr(np.eye(3)))
    assert resolve(prior, csr(np.eye(3))) == prior


@pytest.mark.parametrize(
    "pair",
    [(1.0,), (1.0, 2.0, 3.0), (1.0, 0.0), (1.0, -0.5), (np.nan, 0.5), (np.inf, 0.5), (1.0, np.inf)]
    + [("1", 0.5), (1.0, None), ()],
    ids=str,
)
def test_bad_pairs_are_refused(pair):
    with pytest.raises(ValueError, match="expected two finite numbers"):
        resolve(pair, csr(np.eye(3)))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"'rat' is not known.*'human'"):
        resolve("rat", csr(np.eye(3)))


def test_row_prior_is_by_library_size():
    X = csr([[1, 2, 3], [0, 0, 0], [0, 50, 50]])
    assert_array_equal(library_sizes(X), [6.0, 0.0, 100.0])
    loc, scale = row_prior(CapturePrior(5.0, 0.7), X)
    # a row without counts counts as one
    assert_allclose(loc, 5.0 - np.log([6.0, 1.0, 100.0]))
    assert_array_equal(scale, 0.7)


def test_truncation_warns_from_the_fourth_cell_on():
    X = csr(np.diag([10.0, 20, 30, 40, 1, 1, 1]))
    with pytest.warns(UserWarning, match=r"4 of 7 cells .*, 5 \(the largest has 40\)"):
        warn_about_truncation(CapturePrior(np.log(5.0), 0.5), X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_about_truncation(CapturePrior(np.log(15.0), 0.5), X)
        warn_about_truncation(None, X)
        # of a thousand cells ten are a few
        many = csr(np.repeat([[10.0], [1.0]], [10, 990], axis=0))
        warn_about_truncation(CapturePrior(np.log(5.0), 0.5), many)


@pytest.mark.parametrize(("above", "of"), [(1, 1), (2, 2), (2, 3)])
def test_truncation_warns_when_most_of_few_cells_are_above(above, of):
    X = csr(np.diag([10.0] * above + [1.0] * (of - above)))
    with pytest.warns(UserWarning, match=f"{above} of {of} cells"):
        warn_about_truncation(CapturePrior(np.log(5.0), 0.5), X)


def test_a_long_array_is_not_printed_whole():
    with pytest.raises(ValueError, match="of length 5000: expected two") as caught:
        NBVCPEstimator(capture_efficiency=np.arange(5000.0)).fit(np.eye(3))
    assert len(str(caught.value)) < 300


def test_deeper_rows_are_said_wherever_rows_come_in():
    """Once per call, with their number and M0."""
    X = make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=0).data
    source = NBVCPEstimator(random_state=0).fit(X)
    model = NBLNEstimator(2, informative_prior_estimator=source, random_state=0).fit(X)
    deep = 100 * X.toarray()
    quick = NBVCPEstimator(capture_efficiency=source.capture_prior_, n_steps=2, random_state=0)
    m0 = np.exp(source.capture_prior_.log_m0)
    calls = [
        lambda: source.transform(deep),
        lambda: source.score(deep),
        lambda: source.score_samples(deep),
        lambda: source.sample_posterior(2, deep),
        lambda: model.transform(deep),
        lambda: model.posterior_scores(deep),
        lambda: model.score(deep),
        lambda: model.score_samples(deep),
        lambda: model.sample_posterior(2, deep),
        lambda: model.posterior_predictive(deep, level="per_cell", n_samples=1),
        lambda: clone(quick).fit(deep),
        lambda: clone(model).set_params(informative_prior_estimator=source, max_iter=2).fit(deep),
        lambda: clone(model).set_params(informative_prior_estimator=quick, max_iter=2).fit(deep),
    ]
    for call in calls:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        said = [
            str(w.message)
            for w in caught
            if "more counts than the prior total mRNA" in str(w.message)
        ]
        assert len(said) == 1
        assert said[0].startswith("150 of 150 cells") and f"{m0:.4g}" in said[0]
        assert "larger log_M0" in said[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.score(deep, given_totals=True)
        model.transform(X)


# ------------------------------------------------------------------ data


def independent(n_genes, location, sd=0.5, seed=0):
    """Counts of independent genes and a capture prior that lies `location` above the mean library."""
    rng = np.random.default_rng(seed)
    r = np.exp(rng.uniform(0, 3, n_genes))
    mean = np.log(rng.uniform(1, 30, n_genes)) + 1.0
    eta = np.abs(sd * rng.standard_normal(N) + max(location, 0.0))
    rate = np.exp(mean - eta[:, None])
    X = csr(rng.poisson(rate * rng.gamma(r, 1 / r, rate.shape)))
    prior = CapturePrior(np.log(library_sizes(X).mean()) + location, sd)
    return X, mean, np.zeros((n_genes, 0)), np.zeros(n_genes), r, prior


def correlated(n_genes, location, sd=0.5, seed=0):
    """The same with a factor and noise; the first row has no counts."""
    rng = np.random.default_rng(seed)
    r = np.exp(rng.uniform(0, 3, n_genes))
    mean = np.log(rng.uniform(1, 30, n_genes)) + 1.0
    loadings, noise = 0.5 * rng.standard_normal((n_genes, 1)), rng.uniform(0.05, 0.3, n_genes)
    eta = np.abs(sd * rng.standard_normal(N) + max(location, 0.0))
    y = mean - eta[:, None] + rng.standard_normal((N, 1)) @ loadings.T
    rate = np.exp(y + np.sqrt(noise) * rng.standard_normal(y.shape))
    counts = rng.poisson(rate * rng.gamma(r, 1 / r, rate.shape))
    counts[0] = 0
    X = csr(counts)
    prior = CapturePrior(np.log(library_sizes(X).mean()) + location, sd)
    return X, mean, loadings, noise, r, prior


# ------------------------------------------------------------------ offsets


@pytest.mark.parametrize("location", [-4.0, -1.0, 0.0, 0.5, 3.0])
def test_offset_is_the_mode_of_its_one_dimensional_posterior(location):
    X, mean, loadings, noise, r, prior = independent(small.N_GENES, location)
    found = offset_posterior(X, Params(mean, loadings, noise, 1 / r), prior)
    loc, scale = row_prior(prior, X)
    U = X.toarray()
    for c in range(N):

        def value(eta, c=c):
            prior_part = 0.5 * ((eta - loc[c]) / scale[c]) ** 2
            return prior_part - np.sum(nb_log_pmf(U[c], mean - eta, r))

        best = optimize.minimize_scalar(
            value, bounds=(0.0, 10.0), method="bounded", options=dict(xatol=1e-10)
        ).x
        assert_allclose(found.loc[c], best, atol=1e-6)
        h = 1e-3
        at = max(best, h)  # the second difference stays inside the bound
        curvature = (value(at + h) - 2 * value(at) + value(at - h)) / h**2
        assert_allclose(found.scale[c], curvature**-0.5, rtol=3e-3)


@pytest.mark.parametrize("location", [-4.0, -1.0, 0.0, 0.5, 3.0])
@pytest.mark.parametrize("make", [independent, correlated])
def test_offsets_are_never_negative(make, location):
    X, mean, loadings, noise, r, prior = make(small.N_GENES, location)
    found = offset_posterior(X, Params(mean, loadings, noise, 1 / r), prior)
    assert np.all(found.loc >= 0) and np.all(found.scale > 0)
    assert np.all(np.isfinite(found.raw_loc))
    assert_array_equal(found.loc, np.maximum(found.raw_loc, 0.0))
    assert np.all(found.scale <= prior.sigma)
    if location < 0:
        assert np.any(found.raw_loc < 0)
    if location == 3.0:
        assert np.all(found.loc > 0)


def test_no_capture_has_no_offsets():
    X, mean, loadings, noise, r, _ = independent(small.N_GENES, 0.0)
    for a in offset_posterior(X, Params(mean, loadings, noise, 1 / r), None):
        assert_array_equal(a, np.zeros(N))


def test_offsets_of_a_row_do_not_depend_on_the_others():
    X, mean, loadings, noise, r, prior = independent(small.N_GENES, 0.0)
    together = offset_posterior(X, Params(mean, loadings, noise, 1 / r), prior)
    assert 0 < np.sum(together.raw_loc < 0) < N
    for c in range(N):
        alone = offset_posterior(X[c], Params(mean, loadings, noise, 1 / r), prior)
        for a, b in zip(alone, together, strict=True):
            assert_allclose(a[0], b[c], rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------ offsets that are refined


@pytest.fixture
def informed():
    """A source's posterior of some offsets, its capture prior, and another one."""
    X, mean, loadings, noise, r, prior = independent(small.N_GENES, 1.5)
    found = offset_posterior(X, Params(mean, loadings, noise, 1 / r), prior)
    assert np.all(found.raw_loc > 0)
    other = CapturePrior(prior.log_m0 + 0.4, 0.8)
    return found, row_prior(prior, X), row_prior(other, X)


def test_refined_at_tau_1_is_the_sources_posterior(informed):
    found, prior, _ = informed
    loc, scale = refined(found, prior, prior, 1.0)
    assert_allclose(loc, found.loc, rtol=1e-12)
    assert_allclose(scale, found.scale, rtol=1e-12)


def test_refined_as_tau_grows_is_the_capture_prior(informed):
    found, prior, other = informed
    for tau in (1e6, np.inf):
        for given, expected in zip(refined(found, prior, other, tau), other, strict=True):
            assert_allclose(given, expected, rtol=1e-9)


def test_refined_as_tau_vanishes_is_the_freeze(informed):
    for prior in informed[1:]:
        loc, scale = refined(informed[0], informed[1], prior, 1e-6)
        assert_allclose(loc, informed[0].loc, rtol=0, atol=1e-9)
        assert np.all(scale < 1e-6)


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.0, 10.0])
def test_refined_takes_the_prior_once_and_a_power_of_the_likelihood(informed, tau):
    found, prior, other = informed
    likelihood = found.scale**-2.0 - prior[1] ** -2.0
    for own in (prior, other):
        loc, scale = refined(found, prior, own, tau)
        assert_allclose(scale**-2.0, own[1] ** -2.0 + likelihood / tau**2, rtol=1e-10)
        if tau >= 1:  # the product of two Gaussians
            peak = (found.raw_loc / found.scale**2 - prior[0] / prior[1] ** 2) / likelihood
            expected = own[0] / own[1] ** 2 + likelihood / tau**2 * peak
            assert_allclose(loc, expected * scale**2, rtol=1e-9)


def test_offsets_at_the_bound_stay_there():
    found = OffsetPosterior(np.zeros(1), np.array([0.2]), np.array([-0.3]))
    prior = np.array([0.1]), np.array([0.5])
    for tau in (0.5, 1.0, np.inf):
        assert_array_equal(np.ravel(refined(found, prior, prior, tau)), [0.0, 0.0])


# ------------------------------------------------------------------ scores


LOCATIONS = [-3.0, -1.0, -0.3, 0.0, 0.3, 1.0, 3.0]


@pytest.mark.parametrize("location", LOCATIONS)
@pytest.mark.parametrize("n_genes", [1, 2, small.N_GENES])
def test_score_of_independent_genes_against_integration(n_genes, location):
    """Sigma = 0: one integral, over the offset, from a prior far below 0 to one far above.

    Laplace's error is that of its next term, some 0.003 nats, where the truncation does not bite. Where
    the posterior is cut at its mode its skewness does not cancel: the error is then 0.27 times the
    skewness, with a posterior sd of 0.3 to 0.5 some 0.02 to 0.04. Measured over 16 cells: at most
    0.041 with one or two genes, 0.022 with twelve; 0.005 on average.
    """
    X, mean, loadings, noise, r, prior = independent(n_genes, location)
    found = score_rows(X, Params(mean, loadings, noise, 1 / r), prior)
    loc, scale = row_prior(prior, X)
    exact = [
        direct.exact_offset(u, mean, r, m, s)
        for u, m, s in zip(X.toarray(), loc, scale, strict=True)
    ]
    error = found - np.array(exact)
    assert np.max(np.abs(error)) < (0.005 if location == 3.0 else 0.06)
    assert abs(error.mean()) < 0.025


@pytest.mark.parametrize("sd", [0.5, 1.5])
@pytest.mark.parametrize("location", LOCATIONS)
def test_score_of_one_gene_against_integration(location, sd):
    """Log-rate and offset integrated together. Measured: at most 0.03 nats (sd 0.5), 0.04 (sd 1.5)."""
    X, mean, loadings, noise, r, prior = correlated(1, location, sd)
    assert_scores_are_exact(X, mean, loadings, noise, r, prior, N, 0.05 if sd == 0.5 else 0.09)


@pytest.mark.parametrize("location", [-1.0, 0.0, 1.0])
def test_score_of_two_genes_against_integration(location):
    """Measured over 56 cells at prior locations from -3 to 2: at most 0.03 nats, 0.005 on average."""
    assert_scores_are_exact(*correlated(2, location), 3, 0.05)


def assert_scores_are_exact(X, mean, loadings, noise, r, prior, n, bound):
    found = score_rows(X, Params(mean, loadings, noise, 1 / r), prior)
    loc, scale = row_prior(prior, X)
    for c in range(n):
        exact = direct.exact_truncated(X.toarray()[c], mean, loadings, noise, r, loc[c], scale[c])
        assert abs(found[c] - exact) < bound


def test_the_two_ways_of_integrating_the_offset_agree():
    """`exact_truncated` with next to no variance of x against `exact_offset`."""
    u, mean, r = np.array([7.0, 3.0]), np.array([2.5, 1.5]), np.array([3.0, 8.0])
    for loc in (-0.5, 0.8):
        joint = direct.exact_truncated(u, mean, np.zeros((2, 1)), np.full(2, 1e-3), r, loc, 0.5)
        alone = direct.exact_offset(u, mean, r, loc, 0.5)
        # the variance adds about 1e-3 / 2 times the curvatures and squared slopes, at most 10 each
        assert_allclose(joint, alone, atol=0.01)


def test_many_counts_against_the_bound():
    """A thousand counts where the prior expects a hundred: the posterior is an exponential at 0."""
    X, mean, loadings, noise, r, _ = independent(small.N_GENES, 0.0)
    X = csr(10 * X.toarray())
    prior = CapturePrior(np.log(100.0), 0.5)
    found = score_rows(X, Params(mean, loadings, noise, 1 / r), prior)
    loc, scale = row_prior(prior, X)
    assert np.all(loc < -1.5)
    exact = [
        direct.exact_offset(u, mean, r, m, s)
        for u, m, s in zip(X.toarray(), loc, scale, strict=True)
    ]
    assert_allclose(found, exact, rtol=0, atol=0.03)


def test_score_far_above_the_bound_does_not_know_of_it():
    X, mean, loadings, noise, r, _ = correlated(2, 1.0)
    prior = CapturePrior(np.log(1e5), 0.5)
    loc, scale = row_prior(prior, X)
    found = score_rows(X, Params(mean, loadings, noise, 1 / r), prior)
    plain = solve_rows(RowBatches(X, loc, scale), Params(mean, loadings, noise, 1 / r)).log_marginal
    constants = score_rows(X, Params(mean, loadings, noise, 1 / r), None)
    zero = np.zeros(N)
    constants -= solve_rows(
        RowBatches(X, zero, zero), Params(mean, loadings, noise, 1 / r)
    ).log_marginal
    assert_allclose(found, plain + constants, rtol=0, atol=1e-9)


@pytest.mark.parametrize("make", [independent, correlated])
def test_score_is_continuous_where_the_bound_begins_to_act(make):
    """The mode of the offset crosses 0 as log M0 falls: two formulas, one value."""
    X, mean, loadings, noise, r, prior = make(small.N_GENES, 0.0)
    one = X[3]

    def raw(log_m0):
        loc, scale = CapturePrior(log_m0, 0.5).rows(library_sizes(one))
        return solve_rows(RowBatches(one, loc, scale), Params(mean, loadings, noise, 1 / r)).offset[
            0
        ]

    switch = optimize.brentq(raw, prior.log_m0 - 9, prior.log_m0 + 9, xtol=1e-13)

    def score(log_m0):
        return score_rows(one, Params(mean, loadings, noise, 1 / r), CapturePrior(log_m0, 0.5))[0]

    def posterior(log_m0):
        prior = CapturePrior(log_m0, 0.5)
        return np.ravel(offset_posterior(one, Params(mean, loadings, noise, 1 / r), prior))

    h = 1e-7
    assert raw(switch - h) < 0 < raw(switch + h)
    assert_allclose(score(switch - h), score(switch + h), rtol=0, atol=1e-5)
    assert_allclose(posterior(switch - h), posterior(switch + h), rtol=0, atol=1e-5)


def test_no_capture_is_the_log_pmf():
    X, mean, loadings, noise, r, _ = independent(small.N_GENES, 1.0)
    found = score_rows(X, Params(mean, loadings, noise, 1 / r), None)
    expected = stats.nbinom.logpmf(X.toarray(), r, 1 / (1 + np.exp(mean) / r)).sum(1)
    assert_allclose(found, expected, rtol=1e-11)
    poisson = score_rows(X, Params(mean, loadings, noise, 0 * r), None)
    assert_allclose(poisson, stats.poisson.logpmf(X.toarray(), np.exp(mean)).sum(1), rtol=1e-11)


@pytest.mark.parametrize("location", [-1.0, 0.0, 2.0])
def test_scores_do_not_depend_on_the_batches(location):
    X, mean, loadings, noise, r, prior = correlated(small.N_GENES, location)
    double = csr(np.concatenate([X.toarray(), X.toarray()]))
    whole = score_rows(X, Params(mean, loadings, noise, 1 / r), prior)
    parts = score_rows(double, Params(mean, loadings, noise, 1 / r), prior, batch_size=8)
    assert_allclose(parts, np.r_[whole, whole], rtol=0, atol=1e-9)


def test_probabilities_sum_to_one():
    """One gene with few counts: the scores of all its counts are probabilities, up to Laplace's error."""
    mean, r = np.array([0.5]), np.array([4.0])
    X = csr(np.arange(160.0)[:, None])

    # a library size that is not the count's: the prior of every row is held
    class Held(CapturePrior):
        def rows(self, library_size):
            return super().rows(np.full_like(library_size, 10.0))

    for log_m0 in (np.log(10.0), np.log(4.0), np.log(60.0)):
        prior = Held(log_m0, 0.5)
        scores = score_rows(X, Params(mean, np.zeros((1, 0)), np.zeros(1), 1 / r), prior)
        assert_allclose(np.exp(scores).sum(), 1.0, atol=0.04)


# ------------------------------------------------------------------ scores given the totals


COMPOSITIONS = np.array([[1, 0], [3, 4], [20, 2], [0, 60], [0, 0]])


def given_total_by_integration(u, mean, loadings, noise, r, nodes=24):
    """``log p(u | total)``: log-rates by Gauss-Hermite, offset by a trapezoid rule, times the total."""
    t, w = np.polynomial.hermite_e.hermegauss(nodes)
    L = np.linalg.cholesky(direct.covariance(loadings, noise, 0.0))
    grid = np.stack(np.meshgrid(t, t, indexing="ij"), -1).reshape(-1, 2)
    log_weight = np.log(np.outer(w, w).ravel() / (2 * np.pi))
    eta = np.linspace(-25.0, 25.0, 501)
    # the flat offset takes up the level: it is the same for every x, so the window moves with it
    x = mean + grid @ L.T
    level = logsumexp(x, axis=1) - np.log(u.sum())
    y = x[:, None, :] - (level[:, None] + eta)[:, :, None]
    given = logsumexp(np.sum(nb_log_pmf(u, y, r), -1), axis=1) + np.log(eta[1] - eta[0])
    return logsumexp(given + log_weight) + np.log(u.sum())


@pytest.mark.parametrize("r", [2.0, 8.0, np.inf])
def test_score_given_totals_of_two_genes_against_integration(r):
    mean, r = np.array([0.5, 1.5]), np.full(2, r)
    loadings, noise = np.array([[0.4], [-0.3]]), np.array([0.05, 0.1])
    found = score_rows_given_totals(csr(COMPOSITIONS), Params(mean, loadings, noise, 1 / r))
    assert found[-1] == 0.0  # one composition of nothing
    for u, value in zip(COMPOSITIONS[:-1], found, strict=False):
        exact = given_total_by_integration(u, mean, loadings, noise, r)
        assert abs(value - exact) < 0.03


def test_score_given_totals_of_independent_poisson_genes_is_the_multinomial():
    X, mean, loadings, noise, r, _ = independent(small.N_GENES, 1.0)
    found = score_rows_given_totals(X, Params(mean, loadings, noise, 0 * r))
    p = np.exp(mean) / np.exp(mean).sum()
    assert_allclose(found, stats.multinomial.logpmf(X.toarray(), library_sizes(X), p), rtol=1e-9)


def test_score_given_totals_of_one_gene_says_nothing():
    found = score_rows_given_totals(
        csr([[1.0], [7.0], [300.0]]),
        Params(np.ones(1), np.zeros((1, 0)), np.zeros(1), np.full(1, 1 / 50.0)),
    )
    assert_allclose(found, 0.0, atol=0.005)


def test_score_given_totals_takes_no_capture_prior():
    X = make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=0).data
    source = NBVCPEstimator(random_state=0).fit(X)
    model = NBLNEstimator(2, informative_prior_estimator=source, random_state=0).fit(X)
    poisson = NBLNEstimator(
        2, informative_prior_estimator=source, observation="multinomial", random_state=0
    ).fit(X)
    for fitted in (source, model):
        plain, given = fitted.score(X), fitted.score(X, given_totals=True)
        fitted.capture_prior_ = CapturePrior(fitted.capture_prior_.log_m0, 0.05)
        assert fitted.score(X) > plain + 0.2  # a narrower prior scores better for that alone
        assert fitted.score(X, given_totals=True) == given
        assert given == fitted.score_samples(X, given_totals=True).mean()
    # the multinomial channel has no other score
    assert_array_equal(poisson.score_samples(X), poisson.score_samples(X, given_totals=True))

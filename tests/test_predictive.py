"""Posterior predictive draws and compositions: levels, seeds, selection, memory, errors."""

import copy
import tracemalloc

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy import stats
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator

from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln.datasets import make_nbln_counts
from sknbln.predictive import (
    compositional_samples,
    iter_posterior_predictive,
    posterior_predictive,
    predictive_check,
    quantile_residuals,
)
from sknbln.solver.overdispersion import TotalOverdispersion

from .reference import direct, predictive, truth
from .reference.predictive import (
    ALPHA,
    LEVELS,
    MODELS,
    N_GENES,
    Z_MAX,
    globals_,
    simulate,
    standardized,
)


@pytest.fixture
def fits():
    frame, models = predictive.fits()
    return frame.copy(), models


def levels_of(name):
    return [level for level in LEVELS if (name, level) != ("multinomial", "marginal")]


COPIES = 15  # of 4 rows: as many as in `fits`, whose kernels are compiled once for the module


def replicates(model, X, level, n_samples):
    """Replicates of each row, (n_samples, n_rows, n_genes); copies of the rows share a pass."""
    rows = np.tile(X, (COPIES, 1))
    options = dict(level=level, n_samples=n_samples // COPIES, random_state=0)
    return model.posterior_predictive(rows, **options).reshape(-1, *X.shape)


# ------------------------------------------------------------------ levels


@pytest.mark.parametrize("kind", ["nbln", "poisson", "nbvcp"])
def test_marginal_draws_have_the_model_s_moments(kind):
    mean, W, d, r = globals_(poisson=kind == "poisson")
    if kind == "nbvcp":
        model = truth.nbvcp(np.exp(mean), r, library_size=np.ones(20_000))
    else:
        model = truth.nbln(mean, W, d, r, library_size=np.ones(20_000))
    u = model.posterior_predictive(level="marginal", n_samples=2, random_state=0)
    u = u.reshape(-1, N_GENES).astype(float)
    found = model.moments()
    centred = u - found.mean
    assert np.all(np.abs(standardized(u, found.mean)) < Z_MAX)
    products = centred[:, :, None] * centred[:, None, :]
    assert np.all(np.abs(standardized(products, found.covariance)) < Z_MAX)


def test_marginal_offsets_follow_the_capture_prior_of_the_rows():
    """Poisson, Sigma = 0: a total has mean sum(m) E exp(-eta), eta around log M0 - log L."""
    mean, prior = np.full(N_GENES, 50.0), (np.log(400.0), 0.3)
    size = np.repeat([20.0, 100.0, 1000.0], 10_000)
    model = truth.nbvcp(mean, np.full(N_GENES, 1e8), capture_prior=prior, library_size=size)
    options = dict(level="marginal", capture="prior", n_samples=1, random_state=0)
    totals = model.posterior_predictive(**options)[0].sum(1)
    for L in (20.0, 100.0, 1000.0):
        loc = prior[0] - np.log(L)
        eta = stats.truncnorm(-loc / prior[1], np.inf, loc, prior[1])
        expected = mean.sum() * eta.expect(lambda e: np.exp(-e))
        assert abs(standardized(totals[size == L].astype(float), expected)) < Z_MAX


def test_marginal_offsets_are_those_of_the_rows():
    """Frozen offsets at the source's posterior, free ones at the model's own: a point here."""
    mean, W, d, r = globals_()
    X = simulate(mean - 1.0, W, d, r, 4, np.random.default_rng(4))
    prior = (np.log(X.sum(1).mean()) + 1.0, 0.5)
    options = dict(capture_prior=prior, library_size=X.sum(1))
    rows = sp.csr_matrix(np.tile(X, (COPIES, 1)), dtype=float)
    for frozen in (("r", "mu", "eta"), ("r", "mu")):
        model = truth.nbln(mean, W, d, r, frozen=frozen, **options)
        many = replicates(model, X, "marginal", 8000)
        eta = model.sample_posterior(8000 // COPIES, rows, random_state=0).eta.reshape(-1, 4)
        expected = np.exp(mean + (np.sum(W**2, 1) + d) / 2) * np.exp(-eta).mean(0)[:, None]
        for c in range(4):
            assert np.all(np.abs(standardized(many[:, c], expected[c])) < Z_MAX)
        if frozen[-1] == "eta":
            np.testing.assert_allclose(eta.mean(0), model._source.offsets(rows).loc[:4], atol=0.05)
        else:
            free = model._solve(rows).offset[:4]
            np.testing.assert_allclose(eta.mean(0), free, atol=0.1)


def test_marginal_totals_of_a_fit_vary_as_the_data_s():
    """Offsets by the capture prior around each row's total vary twice: sd .71 where the data have .45."""
    X = make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=3).data.toarray()
    model = NBLNEstimator(2, random_state=0).fit(X)
    observed = np.log(X.sum(1)).std()
    for given in (None, X):
        draws = model.posterior_predictive(given, level="marginal", n_samples=20, random_state=0)
        ratio = np.log(draws.sum(-1) + 1).std(-1).mean() / observed
        # above 1: frozen offsets of independent genes have taken up what the log-rates share
        assert 0.9 < ratio < 1.25
    wide = model.posterior_predictive(level="marginal", capture="prior", n_samples=20)
    assert np.log(wide.sum(-1) + 1).std(-1).mean() / observed > 1.4


def test_the_capture_prior_is_for_marginal_replicates_only(fits):
    frame, models = fits
    with pytest.raises(ValueError, match=r"capture='prior'.*level='library_anchored'"):
        models["default"].posterior_predictive(frame, capture="prior")
    with pytest.raises(ValueError, match="capture"):
        models["default"].posterior_predictive(frame, level="marginal", capture="fresh")


@pytest.mark.parametrize("name", MODELS)
def test_library_anchored_totals_are_the_observed_ones(fits, name):
    frame, models = fits
    X = frame.copy()
    X.iloc[3] = 0
    u = models[name].posterior_predictive(X, n_samples=4, random_state=0)
    assert u.dtype == np.int64
    np.testing.assert_array_equal(u.sum(2), np.tile(X.sum(axis=1), (4, 1)))


def test_library_anchored_compositions_keep_the_overdispersion():
    """Two genes and a total N: u_1 is beta-binomial where r is shared and Sigma = 0."""
    r, total = 1.5, 40
    model = truth.nbvcp(np.full(2, 7.0), np.full(2, r), library_size=np.full(20_000, total))
    u = model.posterior_predictive(n_samples=1, random_state=0)[0, :, 0]
    expected = stats.betabinom(total, r, r).pmf(np.arange(total + 1)) * len(u)
    observed = np.bincount(u, minlength=total + 1)
    assert stats.chisquare(observed, expected).pvalue > ALPHA


@pytest.mark.parametrize("poisson", [False, True])
def test_per_cell_counts_have_the_moments_of_the_rows_posterior(poisson):
    """Against the dense Laplace posterior; the prior's covariance would be seen."""
    mean, W, d, r = globals_(poisson=poisson)
    X = simulate(mean, W, d, r, 4, np.random.default_rng(3))
    model = truth.nbln(mean, W, d, r, library_size=X.sum(1))
    u = replicates(model, X, "per_cell", 6000)
    Sigma = direct.covariance(W, d, 0.0)
    for c, row in enumerate(X):
        found = direct.laplace(row, mean, Sigma, r)
        deviations = []
        for V in (found.covariance, Sigma):
            expected = np.exp(found.y + np.diag(V) / 2)
            covariance = np.outer(expected, expected) * np.expm1(V)
            covariance += np.diag(expected + np.exp(2 * (found.y + np.diag(V))) / r)
            centred = u[:, c] - expected
            z = standardized(centred[:, :, None] * centred[:, None, :], covariance)
            deviations.append(max(np.abs(z).max(), np.abs(standardized(u[:, c], expected)).max()))
        assert deviations[0] < Z_MAX
        assert deviations[1] > 2 * Z_MAX


def test_per_cell_free_offsets_are_integrated():
    """Offsets that are not frozen: the row's posterior with capture as one more factor."""
    mean, W, d, r = globals_()
    X = simulate(mean - 1.0, W, d, r, 4, np.random.default_rng(4))
    prior = (np.log(X.sum(1).mean()) + 1.0, 0.5)
    model = truth.nbln(
        mean, W, d, r, frozen=("r", "mu"), capture_prior=prior, library_size=X.sum(1)
    )
    model.informative_priors_tau = np.inf  # the capture prior alone
    rows = sp.csr_matrix(np.tile(X, (COPIES, 1)), dtype=float)
    offset, scale, _ = model._row_capture(rows)
    assert np.all(scale == 0.5)
    u = replicates(model, X, "per_cell", 6000)
    for c, row in enumerate(X):
        found = direct.laplace(row, mean - offset[c], direct.covariance(W, d, 0.5), r)
        expected = np.exp(found.y + np.diag(found.covariance) / 2)
        assert np.all(np.abs(standardized(u[:, c], expected)) < Z_MAX)


def test_per_cell_of_independent_genes_takes_the_row_s_offset():
    mean, r = np.array([3.0, 9.0, 20.0]), np.array([1.0, 3.0, 9.0])
    model = truth.nbvcp(mean, r)
    X = np.array([[3, 9, 20], [0, 0, 0]])
    u = model.posterior_predictive(X, level="per_cell", n_samples=20_000, random_state=0)
    for c in range(2):  # without capture every row is alike
        assert np.all(np.abs(standardized(u[:, c].astype(float), mean)) < Z_MAX)
        centred = u[:, c] - mean
        assert np.all(np.abs(standardized(centred**2, mean + mean**2 / r)) < Z_MAX)


def test_per_cell_of_a_multinomial_has_the_observed_totals(fits):
    frame, models = fits
    u = models["multinomial"].posterior_predictive(frame, level="per_cell", n_samples=3)
    np.testing.assert_array_equal(u.sum(2), np.tile(frame.sum(axis=1), (3, 1)))


@pytest.mark.parametrize("name", MODELS)
def test_draws_lie_near_the_counts(fits, name):
    """Every model and level, on the rows of the fit: the grand mean to a quarter."""
    frame, models = fits
    for level in levels_of(name):
        u = models[name].posterior_predictive(frame, level=level, n_samples=20, random_state=0)
        assert u.min() >= 0
        tolerance = (
            1.6 if level == "marginal" else 1.25
        )  # its offsets scatter: E exp(-eta) is larger
        assert 1 / tolerance < u.mean() / frame.to_numpy().mean() < tolerance


# ------------------------------------------------------------------ posterior draws


def test_every_replicate_has_a_draw_of_the_source_s_posterior(fits):
    """Counts of one gene, Sigma = 0, given r and m of the draw: their means follow the draws of m."""
    frame, models = fits
    source = copy.copy(models["nbvcp"])
    loc, _ = source._guide.log_mean
    source._guide = source._guide._replace(log_mean=(loc, np.full(N_GENES, 0.8)))
    found = source.posterior_predictive(frame, level="per_cell", n_samples=30, random_state=3)
    drawn = source.sample_posterior(30, frame, random_state=3)
    expected = drawn.mu * np.exp(-drawn.eta).mean(1, keepdims=True)
    ratio = found.mean(1) / expected
    # 60 counts of mean above 1 and r above 0.5: a standard error of 0.2 at most
    assert np.all(np.abs(np.log(ratio)) < 1.0)
    assert np.std(np.log(expected), axis=0).min() > 0.5


def test_every_replicate_takes_frozen_parameters_from_a_draw_of_the_source():
    """Next to no Sigma: a replicate's counts are NB with r, mu and eta of that draw."""
    n_genes, n_rows, n_samples = N_GENES, 4 * COPIES, 300
    mean, point = np.full(n_genes, 2.0), np.full(n_genes, 1e-18)
    X = np.random.default_rng(0).poisson(np.exp(mean - 0.7), (n_rows, n_genes))
    model = truth.nbln(
        mean,
        1e-9 * np.ones((n_genes, 1)),
        point,
        np.full(n_genes, 2.0),
        capture_prior=(np.log(X.sum(1).mean()) + 0.7, 0.3),
        library_size=X.sum(1),
    )
    source, wide = model.informative_prior_estimator_, np.full(n_genes, 0.8)
    source._guide = source._guide._replace(
        log_mean=(mean, wide), log_dispersion=(np.full(n_genes, np.log(2.0)), wide)
    )
    model._source = source._posterior()
    drawn = source.sample_posterior(n_samples, X, random_state=3)
    u = model.posterior_predictive(X, level="per_cell", n_samples=n_samples, random_state=3)
    expected = drawn.mu[:, None, :] * np.exp(-drawn.eta[:, :, None])
    residual = (u - expected) / np.sqrt(expected + expected**2 / drawn.r[:, None, :])
    for axis in (0, 1, 2):  # r and mu by gene, eta by row
        sums = residual.sum(axis) / np.sqrt(residual.shape[axis])
        assert np.abs(standardized(np.ravel(sums) ** 2, 1.0)) < Z_MAX
    assert np.abs(standardized(np.ravel(residual) ** 2, 1.0)) < Z_MAX
    assert drawn.eta.std(0).min() > 0.02


def test_coupled_draws_keep_the_source_s_marginal_overdispersion(fits):
    """Sigma takes each draw's share: Sigma_gg + T(r) is T of the source's r of that draw."""
    _, models = fits
    model = models["coupled"]
    draws = model._posterior_draws(20, None, np.random.RandomState(0), eta=None)
    source = model._source.draws(20, np.random.RandomState(0), offsets=False)
    variance = draws.inflation * np.diag(model.get_covariance())
    total = model._total
    np.testing.assert_allclose(
        variance + total(np.log(draws.r)), total(np.log(source.r)), rtol=1e-8
    )
    # and the marginal mean does not follow the share
    kept = draws.log_mean + variance / 2
    spread = (
        kept - model.mean_ - np.diag(model.get_covariance()) / 2
    ) / model._standard_deviation.mean
    assert abs(spread.std() - 1) < 0.3


def test_counts_of_a_coupled_model_have_the_marginal_law_of_each_source_s_draw():
    """Sigma and r share 1 + 1/r of the source anew in every replicate; mean m is kept."""
    mean, W, d, r = globals_()
    n_samples, n_rows, share = 6, 20_000, np.full(N_GENES, 0.3)
    model = truth.nbln(mean, W, d, r, cascade="marginal", library_size=np.ones(n_rows))
    model._coordinate_variance = share
    model._total = TotalOverdispersion(np.zeros(N_GENES))  # log(1 + 1/r)
    source, wide = model.informative_prior_estimator_, np.full(N_GENES, 0.8)
    source._guide = source._guide._replace(log_dispersion=(np.log(r), wide))
    model._source = source._posterior()
    drawn = source.sample_posterior(n_samples, random_state=3)
    u = model.posterior_predictive(level="marginal", n_samples=n_samples, random_state=3)
    t = np.log1p(1 / drawn.r)
    scale = np.sqrt((t - t * np.exp(-share / t)) / (np.sum(W**2, 1) + d))
    for s in range(n_samples):
        expected, counts = drawn.mu[s], u[s].astype(float)
        assert np.all(np.abs(standardized(counts, expected)) < Z_MAX)
        covariance = np.outer(expected, expected) * np.expm1(
            (W @ W.T) * np.outer(scale[s], scale[s])
        )
        np.fill_diagonal(covariance, expected + expected**2 / drawn.r[s])
        centred = counts - expected
        products = centred[:, :, None] * centred[:, None, :]
        assert np.all(np.abs(standardized(products, covariance)) < Z_MAX)


def test_posterior_draws_of_named_rows(fits):
    """Validated rows are handed on without their names: no warning about it."""
    frame, models = fits
    for model in models.values():
        assert model.sample_posterior(3, frame).eta.shape == (3, len(frame))


# ------------------------------------------------------------------ seeds, selection, memory


@pytest.mark.parametrize("name", MODELS)
def test_same_seed_same_draws_and_a_gene_is_drawn_whatever_is_selected(fits, name):
    frame, models = fits
    model = models[name]
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    before = frame.copy()
    for level in levels_of(name):
        options = dict(level=level, n_samples=3)
        first = posterior_predictive(model, frame, random_state=1, **options)
        again = model.posterior_predictive(frame.astype(float), random_state=1, **options)
        np.testing.assert_array_equal(first, again)
        some = posterior_predictive(model, frame, random_state=1, genes=[5, 0], **options)
        np.testing.assert_array_equal(first[:, :, [5, 0]], some)
        one_by_one = iter_posterior_predictive(model, frame, random_state=1, **options)
        np.testing.assert_array_equal(first, np.stack(list(one_by_one)))
        assert np.any(first != posterior_predictive(model, frame, random_state=2, **options))
        assert np.any(first[0] != first[1])
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    pd.testing.assert_frame_equal(frame, before)


def test_without_x_the_training_rows_are_replicated(fits):
    frame, models = fits
    for name in ("nbvcp", "default"):
        for level in ("marginal", "library_anchored"):
            # 0 is the seed of the estimators
            given = posterior_predictive(
                models[name], frame, level=level, n_samples=2, random_state=0
            )
            own = posterior_predictive(models[name], level=level, n_samples=2)
            np.testing.assert_array_equal(given, own)


def test_a_frozen_estimator_is_the_one_inside(fits):
    frame, models = fits
    options = dict(n_samples=2, random_state=0)
    inside = posterior_predictive(models["default"], frame, **options)
    frozen = posterior_predictive(FrozenEstimator(models["default"]), frame, **options)
    np.testing.assert_array_equal(frozen, inside)


def test_genes_by_name(fits):
    frame, models = fits
    by_name = posterior_predictive(models["default"], frame, n_samples=2, genes=["gene6", "gene1"])
    by_place = posterior_predictive(models["default"], frame, n_samples=2, genes=np.array([6, 1]))
    np.testing.assert_array_equal(by_name, by_place)


@pytest.mark.parametrize("consume", ["iterator", "check"])
def test_memory_is_that_of_one_replicate(consume):
    mean, W, d, r = globals_(n_genes=100)
    X = simulate(mean, W, d, r, 10_000, np.random.default_rng(0))
    model = truth.nbln(mean, W, d, r, library_size=X.sum(1))
    one = X.size * 8
    given = sp.csr_matrix(X, dtype=float)
    list(iter_posterior_predictive(model, X[:10], n_samples=1))  # imports and caches
    tracemalloc.start()
    if consume == "iterator":
        for u in iter_posterior_predictive(model, None, n_samples=8, random_state=0):
            assert u.nbytes == one
        bound = 2 * one  # the one in use and the next
    else:
        predictive_check(model, given, n_samples=8, random_state=0)
        bound = 3 * one  # copies of X while it is checked and sorted
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    chunks = 12 * 2**18 * 8
    assert peak < bound + chunks < 8 * one


# ------------------------------------------------------------------ compositions


def test_compositions_have_the_law_of_log_ratios():
    mean, W, d, r = globals_()
    found = compositional_samples(truth.nbln(mean, W, d, r), n_samples=20_000, random_state=0)
    assert set(found) == {"model"}
    np.testing.assert_allclose(found.model.sum(1), 1.0, rtol=1e-12)
    P = np.eye(N_GENES) - 1 / N_GENES
    centred = np.log(found.model) @ P - P @ mean
    assert np.all(np.abs(standardized(centred, np.zeros(N_GENES))) < Z_MAX)
    expected = P @ direct.covariance(W, d, 0.0) @ P
    products = centred[:, :, None] * centred[:, None, :]
    assert np.all(np.abs(standardized(products, expected)) < Z_MAX)


def test_compositions_of_independent_genes_are_their_means():
    mean = np.array([1.0, 2.0, 5.0])
    found = compositional_samples(truth.nbvcp(mean, np.ones(3)), n_samples=4, genes=[2, 0])
    np.testing.assert_allclose(found.model, np.tile([5 / 8, 1 / 8], (4, 1)), rtol=1e-12)


def test_empirical_compositions_and_pseudobulk(fits):
    frame, models = fits
    X = frame.copy()
    X.iloc[[2, 7]] = 0
    found = compositional_samples(models["default"], X, n_samples=10, genes=["gene3", "gene0"])
    u = X.to_numpy(float)
    kept = u[u.sum(1) > 0]
    assert found.model.shape == (10, 2)
    np.testing.assert_allclose(found.cells, (kept / kept.sum(1, keepdims=True))[:, [3, 0]])
    np.testing.assert_allclose(found.pseudobulk, (u.sum(0) / u.sum())[[3, 0]])
    with pytest.raises(ValueError, match="X has no counts"):
        compositional_samples(models["default"], 0 * X)


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("genes", "message"),
    [
        ([0, 8], r"unknown entries \[8\]: expected positions 0 to 7"),
        ([-1], r"unknown entries \[-1\]"),
        (["gene1", "actin"], r"unknown entries \['actin'\]"),
        ([1, 2, 1], r"\[1\] more than once"),
        (["gene1", "gene1"], r"\['gene1'\] more than once"),
        ([], "expected a list"),
        (3, "expected a list"),
        ("gene1", "expected a list"),
        ([0.0], "integer positions or names"),
        ([True] * 8, r"np.flatnonzero\(mask\)"),
    ],
)
def test_unknown_and_repeated_genes_are_refused(fits, genes, message):
    frame, models = fits
    with pytest.raises(ValueError, match=message):
        posterior_predictive(models["default"], frame, genes=genes)


def test_genes_by_name_of_a_model_without_names():
    with pytest.raises(ValueError, match="fitted without names"):
        posterior_predictive(truth.nbln(*globals_(), library_size=[3]), genes=["a"])


def test_arguments_that_do_not_go_together_are_refused(fits):
    frame, models = fits
    model = models["default"]
    with pytest.raises(ValueError, match="give them as X"):
        model.posterior_predictive(level="per_cell")
    for check in (predictive_check, quantile_residuals):
        with pytest.raises(ValueError, match="give them as X"):
            check(model, None)
    with pytest.raises(ValueError, match="conditional on them"):
        models["multinomial"].posterior_predictive(level="marginal")
    with pytest.raises(ValueError, match="conditional on them"):
        models["multinomial"].moments()
    with pytest.raises(ValueError, match="at least two"):
        predictive_check(model, frame[:1])
    with pytest.raises(ValueError, match="level"):
        iter_posterior_predictive(model, level="cells")  # at the call
    with pytest.raises(ValueError, match="n_samples"):
        posterior_predictive(model, n_samples=0)
    with pytest.raises(TypeError, match="found object"):
        posterior_predictive(object())
    with pytest.raises(NotFittedError):
        posterior_predictive(NBLNEstimator())
    with pytest.raises(NotFittedError):
        NBVCPEstimator().moments()
    with pytest.raises(ValueError, match="8 features"):
        posterior_predictive(truth.nbln(*globals_()), np.ones((2, 3)))

"""The cascade: names, frozen values, soft priors, gene sets, levels under a grid search."""

import numpy as np
import pandas as pd
import pytest
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV

from sknbln import NBLNEstimator, NBVCPEstimator, _capture
from sknbln._capture import given_source
from sknbln._counts import validate_counts
from sknbln._source import canonical_freeze, marginal_priors, soft_priors
from sknbln.datasets import make_nbln_counts
from sknbln.solver.objective import weak_mean_prior
from sknbln.solver.overdispersion import TotalOverdispersion
from sknbln.solver.params import Params


@pytest.fixture(scope="module")
def counts():
    return make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=3).data


@pytest.fixture(scope="module")
def source(counts):
    return NBVCPEstimator(random_state=0).fit(counts)


def fit(counts, source, **options):
    return NBLNEstimator(2, informative_prior_estimator=source, random_state=0, **options).fit(
        counts
    )


# ------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ((), ()),
        (["eta", "r"], ("r", "eta")),
        (("dispersion", "capture_efficiency"), ("r", "eta")),
        (("capture_efficiency", "expression", "r"), ("r", "mu", "eta")),
        (("mean_expression",), ("mu",)),
    ],
)
def test_names_and_aliases(given, canonical):
    assert canonical_freeze(given) == canonical


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("r", "expected a tuple or list"),
        (("r", "dispersion"), "'r' and 'dispersion', which are the same"),
        (("expression", "mean_expression"), "the same"),
        (("r", "r"), "the same"),
        (("W",), "'W', which is not a parameter"),
        ((3,), "not a parameter"),
        ({"r"}, "expected a tuple or list"),
    ],
)
def test_bad_names_say_what_is_allowed(counts, source, given, found):
    with pytest.raises(ValueError, match=found) as caught:
        fit(counts, source, informative_priors_freeze=given)
    for name in ("'r'", "dispersion", "mean_expression", "capture_efficiency"):
        assert name in str(caught.value)


# ------------------------------------------------------------------ frozen values


@pytest.mark.parametrize("freeze", [(), ("r",), ("r", "eta"), ("r", "mu", "eta"), ("eta",)])
@pytest.mark.parametrize("cascade", ["parameter", "marginal"])
def test_frozen_values_are_the_source_s_bit_for_bit(counts, source, freeze, cascade):
    """Under the marginal cascade those of eta; r and mu are coupled."""
    options = dict(informative_priors_freeze=list(reversed(freeze)), cascade=cascade)
    model = fit(counts, source, **options)
    assert model.frozen_params_ == freeze
    for name, ours, theirs in (
        ("r", model.dispersion_, source.dispersion_),
        ("mu", model.mean_, np.log(source.mean_)),
        ("eta", model.capture_offset_, source.capture_offset_),
    ):
        literal = cascade == "parameter" or name == "eta"
        assert np.array_equal(ours, theirs) == (name in freeze and literal), name


@pytest.mark.parametrize(
    ("options", "frozen"),
    [
        ({}, ("eta",)),
        ({"cascade": "parameter"}, ("r", "eta")),
        ({"observation": "poisson"}, ("eta",)),
        ({"observation": "multinomial"}, ()),
        ({"informative_priors_freeze": ()}, ()),
    ],
    ids=str,
)
def test_without_a_freeze_set_the_cascade_recommends_one(counts, source, options, frozen):
    assert NBLNEstimator().informative_priors_freeze is None
    assert fit(counts, source, **options).frozen_params_ == frozen


def test_marginal_freeze_keeps_the_marginal_moments(counts, source):
    model = fit(counts, source, informative_priors_freeze=("r", "mu", "eta"))
    variance = np.diag(model.get_covariance())
    np.testing.assert_allclose(model.mean_ + variance / 2, np.log(source.mean_), rtol=1e-10)
    total = TotalOverdispersion.at(
        source.mean_ * np.mean(np.exp(-source.capture_offset_)), source.dispersion_
    )
    level = total(np.log(source.dispersion_))
    np.testing.assert_allclose(variance + total(np.log(model.dispersion_)), level, rtol=1e-8)
    assert np.all(variance < level)


def test_marginal_without_r_couples_the_mean_only(counts, source):
    model = fit(counts, source, informative_priors_freeze=("mu", "eta"))
    variance = np.diag(model.get_covariance())
    np.testing.assert_allclose(model.mean_ + variance / 2, np.log(source.mean_), rtol=1e-10)


# ------------------------------------------------------------------ soft priors


def test_soft_priors_are_the_moments_of_the_draws(source):
    priors = soft_priors(source._posterior(), 2.0, 4000, np.random.RandomState(0))
    for prior, (loc, scale) in (
        (priors.mean, (source._guide.log_mean[0], source._guide.log_mean_scale)),
        (priors.dispersion, (source._guide.log_dispersion[0], source._guide.log_dispersion_scale)),
    ):
        # 4,000 draws: 1.1 % error of a standard deviation
        np.testing.assert_allclose(prior.precision**-0.5, 2.0 * scale, rtol=0.06)
        np.testing.assert_allclose(prior.loc, loc, atol=0.08 * scale.max())


@pytest.mark.parametrize("tau", [0.0, 2.0, np.inf])
def test_marginal_priors_have_the_posterior_s_deviations_and_the_coupling_s_error(source, tau):
    posterior = source._posterior()
    total = TotalOverdispersion(np.full(posterior.mean.size, 0.3))
    mean, of_total = marginal_priors(posterior, total, Params(True, True, True, True), tau)
    weak = weak_mean_prior(np.log(posterior.mean)).precision
    # the variance of log T(r) by the trapezoidal rule
    z = np.linspace(-10.0, 10.0, 4001)[:, None]
    density = np.exp(-(z**2) / 2) / np.sum(np.exp(-(z**2) / 2))
    guide = posterior.guide
    level = np.log(total(guide.log_dispersion[0] + z * guide.log_dispersion_scale))
    of_level = np.sum(density * (level - np.sum(density * level, 0)) ** 2, 0)
    for precision, variance in (
        (mean.precision - weak, guide.log_mean_scale**2),
        (of_total.prior.precision, of_level),
    ):
        expected = 1 / (tau**2 * variance + 0.1**2)
        np.testing.assert_allclose(precision, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(of_total.prior.loc, np.log(total(np.log(posterior.dispersion))))
    # the model whose r is the source's, without variance of the log-rates, is at the centre
    zeros = np.zeros((posterior.mean.size, 1))
    nothing = np.zeros(posterior.mean.size)
    own = Params(np.log(posterior.mean), zeros, nothing, np.log(posterior.dispersion))
    np.testing.assert_allclose(of_total.log_density(own), 0.0, atol=1e-6)


def test_anchors_hold_the_marginal_moments(counts, source):
    """The default anchors the marginal mean and the total overdispersion, tau=inf does not."""

    def far(**options):
        model = fit(counts, source, **options)
        variance = np.diag(model.get_covariance())
        mean = model.mean_ + variance / 2 - np.log(source.mean_)
        V = variance + model._total(np.log(model.dispersion_))
        overdispersion = np.log(V / model._total(np.log(source.dispersion_)))
        return np.array([np.sqrt(np.mean(x**2)) for x in (mean, overdispersion)])

    anchored = far(informative_priors_tau=1e-4)
    assert np.all(anchored < 0.1)  # their standard deviation
    assert np.all(anchored < far())
    assert np.all(far() < far(informative_priors_tau=np.inf))


def test_small_tau_approaches_the_freeze(counts, source):
    literal = dict(cascade="parameter", tol=1e-6)
    free = dict(informative_priors_freeze=(), **literal)
    frozen = fit(counts, source, informative_priors_freeze=("r", "mu", "eta"), **literal)
    distances = []
    for tau in (1.0, 1e-1, 1e-3):
        model = fit(counts, source, informative_priors_tau=tau, **free)
        distances.append(
            [
                np.abs(np.log(model.dispersion_ / frozen.dispersion_)).max(),
                np.abs(model.mean_ - frozen.mean_).max(),
                np.abs(model.capture_offset_ - frozen.capture_offset_).max(),
            ]
        )
    distances = np.array(distances)
    assert np.all(distances[1:] < 0.3 * distances[0])
    # what is left is the centre of the prior: the mean of 1,000 draws, a few hundredths of a
    # posterior standard deviation from the point estimate
    assert np.all(distances[-1] < 0.1)


@pytest.mark.parametrize("cascade", ["parameter", "marginal"])
def test_infinite_tau_is_no_prior(counts, source, cascade):
    """The prior's centre then has no influence on mu and r."""
    options = dict(
        informative_priors_freeze=("eta",),
        informative_priors_tau=np.inf,
        cascade=cascade,
        tol=1e-7,
        max_iter=2000,
    )
    model = fit(counts, source, **options)
    import copy

    moved = copy.copy(source)
    moved._guide = source._guide._replace(
        log_dispersion=(source._guide.log_dispersion[0] + 3.0, source._guide.log_dispersion[1]),
        log_mean=(source._guide.log_mean[0] - 2.0, source._guide.log_mean[1]),
    )
    again = fit(counts, moved, **options)
    np.testing.assert_allclose(again.mean_, model.mean_, atol=1e-9)
    np.testing.assert_allclose(again.dispersion_, model.dispersion_, rtol=1e-9)


def test_free_offsets_lie_between_the_source_and_the_capture_prior(counts, source):
    """The three ends are in test_capture.py; here what the model asks for."""
    X = validate_counts(source, counts, reset=False)
    found, prior = source._posterior().offsets(X), source.capture_prior_

    def offsets(tau, prior=prior, frozen=False):
        return given_source(X, found, source.capture_prior_, prior, frozen=frozen, tau=tau)[:2]

    narrow = offsets(1e-6)
    np.testing.assert_allclose(narrow[0], found.loc, atol=1e-6)
    assert np.all(narrow[1] < 2e-6 * found.scale)
    as_it_is = offsets(1.0)
    np.testing.assert_allclose(as_it_is[0], found.loc, rtol=1e-9)
    np.testing.assert_allclose(as_it_is[1], found.scale, rtol=1e-9)
    wide = offsets(np.inf)
    loc, scale = prior.rows(np.asarray(X.sum(1)).ravel())
    np.testing.assert_allclose(wide[0], loc)
    np.testing.assert_allclose(wide[1], scale)
    np.testing.assert_array_equal(offsets(1.0, frozen=True), [found.loc, 0 * found.loc])
    # no capture model, no offset
    np.testing.assert_array_equal(offsets(1.0, prior=None), np.zeros((2, X.shape[0])))


# ------------------------------------------------------------------ rows of the model, rows of the source


@pytest.mark.parametrize("freeze", [("r", "eta"), ("r",)])
def test_offsets_are_of_the_model_s_own_rows(counts, source, freeze):
    """A source fitted on more rows, and on the same rows in another order."""
    X = counts.tocsr()
    for rest in (X[20:], X[::-1]):
        model = fit(rest, source, informative_priors_freeze=freeze)
        drawn = model.sample_posterior(400, random_state=0).eta
        assert drawn.shape == (400, rest.shape[0])
        # those of the training rows as of the same rows given
        given = model.sample_posterior(400, rest, random_state=0).eta
        np.testing.assert_allclose(drawn, given, rtol=1e-9)
        spread = drawn.std(0)
        assert np.all(np.abs(drawn.mean(0) - model.capture_offset_) < 6 * spread)
        eta = model.get_distributions()["eta"].base_dist
        assert np.all(np.abs(np.asarray(eta.loc) - model.capture_offset_) < 6 * spread)
        np.testing.assert_allclose(np.asarray(eta.scale), spread, rtol=0.25)
        totals = np.asarray(rest.sum(1)).ravel()
        replicated = model.posterior_predictive(level="marginal", n_samples=20, random_state=0)
        assert np.corrcoef(np.log(totals), np.log(replicated.sum(-1) + 1).mean(0))[0, 1] > 0.9
        assert source.capture_offset_.size == X.shape[0]


def test_the_source_s_own_rows_keep_its_posterior(counts, source):
    model = fit(counts, source)
    eta = model.get_distributions()["eta"].base_dist
    np.testing.assert_allclose(np.asarray(eta.loc), source._guide.capture_offset[0], rtol=1e-6)


def test_offsets_of_rows_are_solved_in_the_model_s_own_batches(counts, source, monkeypatch):
    """The source has a batch_size too, None here."""
    model, sizes, batches = fit(counts, source, batch_size=150), [], _capture.RowBatches

    def noted(*args, batch_size=None, known=None):
        sizes.append(batch_size)
        return batches(*args, batch_size=batch_size, known=known)

    monkeypatch.setattr(_capture, "RowBatches", noted)
    model.transform(counts)
    assert sizes == [150]


# ------------------------------------------------------------------ gene sets


def frame(counts, names):
    return pd.DataFrame(counts.toarray(), columns=names)


def test_a_source_of_more_genes_is_cut_by_name(counts):
    names = np.array([f"g{i}" for i in range(counts.shape[1])])
    whole = NBVCPEstimator(random_state=0).fit(frame(counts, names))
    keep = np.array([5, 3, 11, 0, 20, 8, 9, 1])
    X = frame(counts, names)[names[keep]]
    model = fit(X, whole, cascade="parameter")
    np.testing.assert_array_equal(model.dispersion_, whole.dispersion_[keep])
    assert model.informative_prior_estimator_ is whole
    assert model.sample_posterior(5).r.shape == (5, 8)
    scale, expected = model.get_distributions()["r"].scale, whole._guide.log_dispersion_scale
    np.testing.assert_allclose(scale, expected[keep], rtol=1e-6)
    assert whole.n_features_in_ == counts.shape[1]


def test_missing_genes_are_named(counts):
    names = [f"g{i}" for i in range(counts.shape[1])]
    others = [f"h{i}" for i in range(12)]
    part = NBVCPEstimator(random_state=0).fit(frame(counts, names[:12] + others))
    with pytest.raises(ValueError, match=r"12 of the 24 genes.*g12, g13.*g21, \.\.\."):
        fit(frame(counts, names), part)


def test_without_names_the_numbers_must_agree(counts, source):
    with pytest.raises(ValueError, match="24 genes, X has 10"):
        fit(counts[:, :10], source)


def test_a_frozen_source_that_is_not_fitted_is_refused(counts):
    with pytest.raises(ValueError, match="not fitted"):
        fit(counts, FrozenEstimator(NBVCPEstimator()))


# ------------------------------------------------------------------ a grid over all of it


def test_grid_search_over_cascade_and_freeze_sets(counts, source):
    grid = GridSearchCV(
        NBLNEstimator(2, informative_prior_estimator=FrozenEstimator(source), random_state=0),
        {
            "cascade": ["parameter", "marginal"],
            "informative_priors_freeze": [(), ("r",), ("r", "eta"), ("r", "mu", "eta")],
            "latent_dim": [1, 2],
        },
        cv=2,
        error_score="raise",
    ).fit(counts)
    assert np.all(np.isfinite(grid.cv_results_["mean_test_score"]))
    best = grid.best_params_
    # the raw freeze counts dispersion twice, and a held-out score sees that
    assert (best["cascade"], best["informative_priors_freeze"]) != ("parameter", ("r", "eta"))

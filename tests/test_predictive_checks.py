"""Predictive p-values and residuals: uniform under the model, and not otherwise."""

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln.datasets import make_nbln_counts, make_nbvcp_counts
from sknbln.predictive import (
    posterior_predictive,
    predictive_check,
    quantile_residuals,
)

from .reference import predictive, truth
from .reference.predictive import ALPHA, LEVELS, N_GENES, RANK, STATISTICS, globals_, simulate


@pytest.fixture
def fits():
    frame, models = predictive.fits()
    return frame.copy(), models


def test_statistics_are_numpy_s(fits):
    frame, models = fits
    X = frame.to_numpy()
    options = dict(n_samples=4, random_state=0)
    check = predictive_check(models["default"], frame, **options)
    drawn = posterior_predictive(models["default"], frame, **options)
    of = {
        "mean": lambda u: u.mean(-2),
        "variance": lambda u: u.var(-2, ddof=1),
        "zero_fraction": lambda u: (u == 0).mean(-2),
        "maximum": lambda u: u.max(-2),
    }
    for name, statistic in of.items():
        observed, replicated = statistic(X), statistic(drawn)
        np.testing.assert_allclose(check.observed[name], observed, rtol=1e-12)
        np.testing.assert_allclose(check.predicted[name], replicated.mean(0), rtol=1e-12)
        spread = replicated.std(0, ddof=1)
        np.testing.assert_allclose(check.spread[name], spread, rtol=1e-6, atol=1e-9)
        # ties to rounding: the sums are exact, NumPy's two-pass variance is not
        ties = np.isclose(replicated, observed, rtol=1e-10)
        above = ~ties & (replicated > observed)
        p = (above.sum(0) + (ties.sum(0) + 1) / 2) / 5
        np.testing.assert_allclose(check.p_values[name], p, rtol=1e-12)
    assert check.groups is None and check.totals is None  # the totals are the observed ones
    assert all(type(v) is float for v in check.summary.values())
    assert set(check.summary) == {f"{s}_{kind}" for s in STATISTICS for kind in ("outside", "ks")}


def test_groups_are_checked_one_by_one_and_totals_with_them(fits):
    frame, models = fits
    model, X = models["default"], frame.to_numpy()
    groups = np.where(np.arange(len(X)) % 3, "b", "a")
    options = dict(level="marginal", n_samples=6, random_state=0)
    check = predictive_check(model, frame, groups=groups, genes=[3, 1], **options)
    drawn = posterior_predictive(model, frame, **options)
    assert list(check.groups) == ["a", "b"]
    for g, label in enumerate(check.groups):
        rows = groups == label
        assert_allclose(check.observed.mean[g], X[rows][:, [3, 1]].mean(0))
        assert_allclose(
            check.predicted.variance[g], drawn[:, rows][:, :, [3, 1]].var(1, ddof=1).mean(0)
        )
        assert_allclose(check.predicted.maximum[g], drawn[:, rows][:, :, [3, 1]].max(1).mean(0))
        totals = X[rows].sum(1), drawn[:, rows].sum(2)
        assert_allclose(check.totals.observed.variance[g], totals[0].var(ddof=1))
        assert_allclose(check.totals.predicted.maximum[g], totals[1].max(1).mean())
        above = (totals[1].mean(1) > totals[0].mean()).sum()
        assert_allclose(check.totals.p_values.mean[g], (above + 0.5) / 7)
    whole = predictive_check(model, frame, **options)
    assert whole.p_values.mean.shape == (X.shape[1],) and whole.totals.p_values.mean.shape == ()


def test_a_group_that_the_model_does_not_describe_is_found(fits):
    frame, models = fits
    X = frame.to_numpy().copy()
    odd = np.arange(len(X)) < len(X) // 4
    X[odd] = X[odd][:, ::-1]
    X = pd.DataFrame(X, columns=frame.columns)
    check = predictive_check(models["default"], X, groups=odd, n_samples=50, random_state=0)
    outside = np.mean((check.p_values.mean < 0.025) | (check.p_values.mean > 0.975), axis=1)
    assert outside[1] > 0.5 > 0.3 > outside[0]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([0, 1], "groups has 2 labels, X has"),
        ("one", "The group 'one' has 1 row: a check needs at least two"),
    ],
)
def test_groups_that_cannot_be_checked_are_refused(fits, groups, message):
    frame, models = fits
    if isinstance(groups, str):
        groups = [groups] + ["more"] * (len(frame) - 1)
    with pytest.raises(ValueError, match=message):
        predictive_check(models["default"], frame, groups=groups)


def test_at_the_mode_only_count_noise_is_left(fits):
    """Draws at the mode scatter less than those of the posterior, around the same means."""
    frame, models = fits
    model = models["default"]
    options = dict(level="per_cell", n_samples=200, random_state=0)
    at_mode = posterior_predictive(model, frame, latent="mode", **options)
    drawn = posterior_predictive(model, frame, **options)
    assert at_mode.var(0).mean() < 0.9 * drawn.var(0).mean()
    assert_allclose(at_mode.mean(), drawn.mean(), rtol=0.25)
    with pytest.raises(ValueError, match="latent='mode' takes the rows' own log-rates"):
        posterior_predictive(model, frame, latent="mode")


def test_summary_is_of_the_p_values(fits):
    frame, models = fits
    # genes that the model does not fit, the first a little, the last badly
    X = np.round(frame * np.r_[np.linspace(1.05, 2.0, 8), np.ones(frame.shape[1] - 8)])
    check = predictive_check(models["default"], X, n_samples=100, random_state=4)
    for name in STATISTICS:
        p = np.sort(check.p_values[name])
        outside = np.mean((p < 0.025) | (p > 0.975))
        assert check.summary[f"{name}_outside"] == outside
        steps = np.arange(p.size + 1) / p.size
        distance = max((steps[1:] - p).max(), (p - steps[:-1]).max())
        assert check.summary[f"{name}_ks"] == pytest.approx(distance)
    found = np.concatenate(list(check.p_values.values()))
    # the threshold can be told from 0.05
    assert np.any((found > 0.025) & (found < 0.05)) and np.any(found < 0.025)


def repeated_checks(level, n_repeats=10):
    """p-values and residuals of fresh data under the truth: every repeat with a truth of its own."""
    p, residuals = [], []
    for seed in range(n_repeats):
        rng = np.random.default_rng(seed)
        parameters = globals_(seed, n_genes=30)
        # given its total a row's composition says nothing of capture: the flat prior, exactly
        totals = rng.integers(40, 200, 200) if level == "library_anchored" else None
        X = simulate(*parameters, 200, rng, totals)
        model = truth.nbln(*parameters)
        check = predictive_check(model, X, level=level, n_samples=80, random_state=seed)
        p.append([check.p_values[name] for name in STATISTICS])
        if totals is not None:
            residuals.append(quantile_residuals(model, X, n_samples=20, random_state=seed))
    return np.concatenate(p, axis=1), residuals


@pytest.mark.parametrize("level", ["marginal", "library_anchored"])
def test_p_values_and_residuals_are_uniform_under_the_model(level):
    """300 genes by Kolmogorov and Smirnov; their means are 1 and more, so that ties are few."""
    p, residuals = repeated_checks(level)
    for values in p:
        assert stats.kstest(values, "uniform").pvalue > ALPHA
    if level == "library_anchored":
        q = np.ravel(residuals)
        assert 0 < q.min() and q.max() < 1
        assert stats.kstest(q, "uniform").pvalue > ALPHA
        # entries of low counts, by one gene: exactly uniform too
        assert stats.kstest(residuals[0][:, 0], "uniform").pvalue > ALPHA


@pytest.mark.slow
def test_shares_outside_under_the_true_model_with_capture():
    """At every level 5 +- 3 % of the genes outside [0.025, 0.975], four data sets of 500 genes together.

    Library-anchored replicates take a row's total as no evidence on its composition, which holds where
    capture varies more than the sum of the rates: its spread is 0.6 nats here. At 0.35 and 600 genes 9 % of
    the variances were outside.
    """
    outside = {level: [] for level in LEVELS}
    for seed in range(4):
        sim = make_nbln_counts(
            n_cells=200, n_genes=500, n_factors=2, capture_sd=0.6, random_state=seed
        )
        totals = np.asarray(sim.data.sum(axis=1), float).ravel()
        eta = sim.capture_offset
        model = truth.nbln(
            sim.mean,
            sim.loadings,
            sim.noise_variance,
            sim.dispersion,
            frozen=("r", "mu"),
            capture_prior=(eta.mean() + np.log(np.median(totals)), eta.std()),
            library_size=totals,
            informative_priors_tau=np.inf,
        )
        for level, found in outside.items():
            check = predictive_check(model, sim.data, level=level, random_state=seed)
            found.append([check.summary[f"{name}_outside"] for name in STATISTICS])
    for level, found in outside.items():
        share = np.mean(found, axis=0)
        assert np.all((share > 0.02) & (share < 0.08)), (level, share)


def test_residuals_are_uniform_for_genes_that_are_nearly_always_zero():
    mean, W, d, r = globals_(n_genes=30)
    mean[:10] = -5.0
    rng = np.random.default_rng(0)
    X = simulate(mean, W, d, r, 500, rng, rng.integers(20, 60, 500))
    q = quantile_residuals(truth.nbln(mean, W, d, r), X, n_samples=10, random_state=0)
    assert (X[:, :10] == 0).mean() > 0.98
    for g in (0, 1, 20):
        assert stats.kstest(q[:, g], "uniform").pvalue > ALPHA


def test_a_poisson_log_normal_fit_to_overdispersed_counts_is_seen():
    """r = 0.2: log-normal rates cannot have that many zeros and that variance; on unseen rows."""
    X = make_nbvcp_counts(
        n_cells=2000,
        n_genes=N_GENES,
        mean_range=(5.0, 50.0),
        dispersion=(0.2, 0.0),
        random_state=0,
    ).data
    train, test = X[:1000], X[1000:]
    options = dict(batch_size=60, random_state=0)  # of a shape that is compiled already
    right = NBVCPEstimator(**options).fit(train)
    wrong = NBLNEstimator(
        latent_dim=RANK, observation="poisson", informative_prior_estimator=right, **options
    ).fit(train)
    found = [predictive_check(m, test, random_state=0).summary for m in (right, wrong)]
    # 8 genes: of independent uniform values 4 or more are outside once in 2,700
    assert found[1]["zero_fraction_outside"] >= 0.5 > found[0]["zero_fraction_outside"]
    q = [quantile_residuals(m, test, n_samples=50, random_state=0) for m in (right, wrong)]
    distance = [stats.kstest(np.ravel(a), "uniform").statistic for a in q]
    # Kolmogorov's critical distance of 8,000 values at level 1e-6 is 0.03
    assert distance[1] > 2 * distance[0]
    assert distance[1] > 0.05


@pytest.mark.slow
def test_held_out_p_values_of_a_large_fit_are_nearly_uniform():
    """A fit to 6,000 rows against 300 new ones: what the fit does not know is a fifth of the noise."""
    mean, W, d, r = globals_(0, n_genes=40)
    mean = mean + 1.0
    rng = np.random.default_rng(0)
    X = simulate(mean, W, d, r, 6000, rng)
    source = NBVCPEstimator(capture_efficiency=None, random_state=0).fit(X)
    model = NBLNEstimator(
        latent_dim=RANK,
        capture_efficiency=None,
        informative_prior_estimator=source,
        informative_priors_freeze=("eta",),
        informative_priors_tau=np.inf,
        random_state=0,
    ).fit(X)
    for level in ("marginal", "library_anchored"):
        p = {name: [] for name in STATISTICS}
        for seed in range(5):
            totals = rng.integers(200, 600, 300) if level == "library_anchored" else None
            new = simulate(mean, W, d, r, 300, rng, totals)
            check = predictive_check(model, new, level=level, random_state=seed)
            for name in STATISTICS:
                p[name].extend(check.p_values[name])
        for name in STATISTICS:
            values = np.array(p[name])
            # 0.05 for the truth, with a standard error of 0.015 to 0.03: genes of a row are correlated
            assert np.mean((values < 0.025) | (values > 0.975)) < 0.13
            assert stats.kstest(values, "uniform").statistic < 0.15


@pytest.mark.slow
def test_library_anchored_p_values_of_cells_with_capture_are_nearly_uniform():
    """Totals are not quite uninformative of compositions here; with 200 genes it matters little."""
    outside = []
    for seed in range(5):
        sim = make_nbln_counts(n_cells=300, n_genes=200, random_state=seed)
        model = truth.nbln(sim.mean, sim.loadings, sim.noise_variance, sim.dispersion)
        summary = predictive_check(model, sim.data, random_state=seed).summary
        outside.append([summary[f"{name}_outside"] for name in STATISTICS])
    assert np.all(np.mean(outside, axis=0) < 0.1)  # 0.05 where exact


def test_checks_of_selected_genes_are_those_of_all(fits):
    frame, models = fits
    model, options = models["default"], dict(n_samples=5, random_state=0)
    everything = predictive_check(model, frame, **options)
    some = predictive_check(model, frame, genes=[4, 2], **options)
    np.testing.assert_array_equal(some.genes, [4, 2])
    for part in ("p_values", "observed", "predicted"):
        for name in STATISTICS:
            np.testing.assert_array_equal(everything[part][name][[4, 2]], some[part][name])
    residuals = quantile_residuals(model, frame, **options)
    np.testing.assert_array_equal(
        residuals[:, [4, 2]], quantile_residuals(model, frame, genes=[4, 2], **options)
    )

"""Priors of the loadings: densities, scale updates, rank, calibration, intervals."""

import numpy as np
import pytest
from scipy.optimize import minimize, minimize_scalar
from scipy.stats import halfcauchy, norm, ortho_group
from sklearn.exceptions import ConvergenceWarning

from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln.datasets import make_nbln_counts
from sknbln.solver.column_priors import (
    ColumnPenalty,
    ColumnScales,
    Evidence,
    ard,
    horseshoe,
    horseshoe_variance,
    named,
    normal_exponential_gamma,
    relaxed,
)
from sknbln.solver.coupling import MarginalCoupling
from sknbln.solver.gauge import compositional, effective_rank, singular_basis

from .reference.ascent import problem
from .reference.coupling import total

FREE = dict(cascade="parameter", informative_priors_freeze=("eta",), informative_priors_tau=np.inf)


def evidence(S, n_genes=40, information=100.0, reliability=0.95):
    S = np.asarray(S, float)
    return Evidence(
        S,
        np.full(S.size, reliability),
        np.full((n_genes, S.size), information),
        np.full(n_genes, 0.5),
    )


# ------------------------------------------------------------------ the penalty


def test_penalty_gradient_and_no_effect_of_the_all_ones_part():
    rng = np.random.default_rng(0)
    W, V = rng.standard_normal((2, 9, 3))
    penalty = ColumnPenalty(np.array([0.5, 2.0, 9.0]), np.array([0.0, 1.0, 4.0]), rng.random(9))
    h = 1e-6
    slope = (penalty.value(W + h * V) - penalty.value(W - h * V)) / (2 * h)
    assert slope == pytest.approx(np.sum(penalty.gradient(W) * V), rel=1e-6)
    assert penalty.value(W + np.array([3.0, -1.0, 0.5])) == pytest.approx(penalty.value(W))


def test_a_rotation_of_the_singular_basis_gains_nothing_at_first_order():
    """Otherwise sweeps and updates of the scales, which turn the columns back, would not converge."""
    rng = np.random.default_rng(0)
    W = rng.standard_normal((9, 3))
    W = W @ singular_basis(W)
    penalty = ColumnPenalty(np.array([0.5, 2.0, 9.0]), np.array([0.0, 1.0, 4.0]), rng.random(9))
    slopes = W.T @ penalty.gradient(W)
    assert np.abs(slopes).min() > 1e-3
    np.testing.assert_allclose(slopes, slopes.T)


def test_gaussian_part_of_the_penalty_has_standard_deviation_sigma():
    W = compositional(np.random.default_rng(0).standard_normal((9, 1)))
    v, volume, *_ = named({"type": "gaussian", "sigma": 0.3})[1](evidence([1.0]))
    value = ColumnPenalty(1 / v, volume, np.zeros(9)).value(W)
    expected = norm.logpdf(W, scale=0.3).sum() - norm.logpdf(0, scale=0.3) * 9
    assert value == pytest.approx(expected)


# ------------------------------------------------------------------ scale updates


def column_log_density(S, variance, dof):
    """Of a column with dof degrees of freedom: the normalizer of the subspace counts dof times."""
    return -0.5 * dof * np.log(variance) - 0.5 * S / variance


@pytest.mark.parametrize("S", [0.01, 1.0, 30.0])
def test_horseshoe_scale_is_the_mode_with_lambda_a_standard_deviation(S):
    dof, tau = 39, 0.4
    found = horseshoe_variance(np.array([S]), dof, tau)[0]

    def minus(log_lambda):
        scale = np.exp(log_lambda)
        return -column_log_density(S, scale**2, dof) - halfcauchy.logpdf(scale, scale=tau)

    best = minimize_scalar(minus, bounds=(-8, 4), method="bounded", options={"xatol": 1e-10})
    assert np.sqrt(found) == pytest.approx(np.exp(best.x), rel=1e-5)


def test_horseshoe_finds_the_joint_mode_of_scales_and_tau():
    S, dof = np.array([20.0, 8.0, 0.5]), 39
    v, volume, _, tau, *_ = horseshoe(evidence(S), tau_scale=0.7)

    def minus(x):
        scale, tau = np.exp(x[:3]), np.exp(x[3])
        return -(
            column_log_density(S, scale**2, dof).sum()
            + halfcauchy.logpdf(scale, scale=tau).sum()
            + halfcauchy.logpdf(tau, scale=0.7)
        )

    best = minimize(minus, np.zeros(4), method="BFGS", options={"gtol": 1e-8})
    np.testing.assert_allclose(np.sqrt(v), np.exp(best.x[:3]), rtol=1e-4)
    assert tau == pytest.approx(np.exp(best.x[3]), rel=1e-3)
    assert np.all(volume == 0)


@pytest.mark.parametrize("S", [0.05, 2.0, 30.0])
def test_neg_scale_is_the_mode_with_psi_a_variance(S):
    dof, alpha, beta = 39, 1.5, 0.7
    v = normal_exponential_gamma(evidence([S]), alpha=alpha, beta=beta).variance

    def minus(x):
        psi, rate = np.exp(x)
        return -(
            column_log_density(S, psi, dof)
            + np.log(rate)
            - rate * psi
            + (alpha - 1) * np.log(rate)
            - beta * rate
        )

    best = minimize(minus, [0.0, 0.0], method="BFGS", options={"gtol": 1e-9})
    assert v[0] == pytest.approx(np.exp(best.x[0]), rel=1e-4)


@pytest.mark.parametrize("update", [horseshoe, normal_exponential_gamma])
def test_scales_are_floored(update):
    v = update(evidence([0.0, 5.0]), lambda_min=0.02).variance
    assert np.sqrt(v[0]) == pytest.approx(0.02)
    assert np.sqrt(v[1]) > 0.02


@pytest.mark.parametrize(
    ("prior", "alias", "name"),
    [
        ("gaussian", {"scale": 0.3}, {"sigma": 0.3}),
        ("neg_columnwise", {"psi_min": 0.09}, {"lambda_min": 0.3}),
    ],
)
def test_names_of_scribe_are_aliases(prior, alias, name):
    default, by_alias, by_name = (
        named({"type": prior, **options})[1](evidence([0.0, 5.0])).variance
        for options in ({}, alias, name)
    )
    assert by_alias[0] == by_name[0] == pytest.approx(0.09)  # the least variance, or the only one
    np.testing.assert_array_equal(by_alias, by_name)
    assert default[0] != by_alias[0]
    with pytest.raises(ValueError, match=r"is another name of .*, found both"):
        named({"type": prior, **alias, **name})


def test_tau_has_a_floor_of_its_own():
    """Two columns without support take the global scale to its floor, by default that of lambda."""
    S = evidence([0.0, 0.0])
    fixed = {"tau_scale": 1e-3, "lambda_min": 1e-2}
    assert horseshoe(S, **fixed).tau == pytest.approx(1e-2, rel=1e-3)
    found = horseshoe(S, **fixed, tau_min=0.1)
    assert found.tau == pytest.approx(0.1, rel=1e-3)
    assert horseshoe(S, **fixed, tau_min=1e-3).tau < 0.5e-2
    np.testing.assert_allclose(found.variance, 1e-4)  # lambda keeps its own


def test_ard_scales_are_floored_as_those_of_the_other_priors():
    v = ard(evidence([0.0, 5.0], reliability=0.4)).variance
    assert v[0] == pytest.approx(horseshoe(evidence([0.0, 5.0])).smallest)
    assert np.sqrt(v[1]) > 0.3


def test_ard_counts_the_posterior_variance_of_known_columns_only():
    known = evidence([4.0], information=20.0, reliability=1.0)
    v, volume, *_ = ard(known)
    variance = 1 / (20.0 + 1 / v[0])
    assert v[0] == pytest.approx((4.0 + 40 * variance) / 39, rel=1e-5)
    gamma = 40 * (1 - variance / v[0])
    assert volume[0] == pytest.approx(gamma, rel=1e-5)
    # the forces along a column cancel: S / lambda^2 = gamma - 1 (G loadings, G - 1 degrees)
    assert 4.0 / v[0] == pytest.approx(gamma - 1, rel=1e-4)
    v, volume, *_ = ard(evidence([4.0], information=20.0, reliability=0.4))
    assert v[0] == pytest.approx(4.0 / 39)
    assert volume[0] == 0


def next_variances(variance, last, smallest=1e-6):
    """Scales of a stage after an update to the given variances."""
    return relaxed(ColumnScales(variance, np.zeros_like(variance), smallest), last)


def stages_until_settled(step, relax):
    scales, n = next_variances(np.array([1.0, 3.0]), None), 0
    while n < 1000:
        found, n = step(scales.variance), n + 1
        if np.all(np.abs(np.log(found / scales.variance)) < 1e-6):
            break
        scales = next_variances(found, scales if relax else None)
    return found, n


def test_slow_scales_are_over_relaxed():
    """One column goes 5 % of the way to its variance in a stage, another alternates about it."""
    target, left = np.log([1e-2, 2.0]), np.array([0.95, -0.5])

    def step(v):
        return np.exp(target + left * (np.log(v) - target))

    plain, many = stages_until_settled(step, relax=False)
    taken_further, few = stages_until_settled(step, relax=True)
    for found in (plain, taken_further):
        np.testing.assert_allclose(found, [1e-2, 2.0], rtol=1e-4)
    assert few < many / 3


def test_relaxed_scales_keep_their_floor():
    scales = next_variances(np.array([4e-6]), None)
    for _ in range(3):
        scales = next_variances(scales.variance / 2, scales)
    assert scales.variance == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ({"type": "lasso"}, "expected a type out of"),
        ({"tau_scale": 1.0}, "expected a type out of"),
        ({"type": "gaussian", "tau_scale": 1.0}, "has no hyper-parameter 'tau_scale'"),
        ({"type": "horseshoe_columnwise", "tau_scale": -1.0}, "positive finite"),
        ({"type": "neg_columnwise", "scale": 1.0}, "has no hyper-parameter 'scale'"),
        ({"type": "neg_columnwise", "psi_min": -1.0}, "psi_min=-1.0, expected a positive finite"),
        ({"type": "gaussian", "scale": "1"}, "scale='1', expected a positive finite number"),
        ({"type": "gaussian", "sigma": "1"}, "sigma='1', expected a positive finite number"),
        ({"type": "gaussian", "sigma": np.nan}, "sigma=nan, expected a positive finite number"),
        ({"type": "gaussian", "sigma": 10**400}, "expected a positive finite number"),
        ({"type": "gaussian", "sigma": 1e-300}, r"sigma=1e-300, .* between 1e-08 and 1e\+08"),
        ({"type": "gaussian", "sigma": 1e300}, r"sigma=1e\+300, .* between 1e-08 and 1e\+08"),
        (
            {"type": "horseshoe_columnwise", "tau_scale": 1e200, "lambda_min": 1e-200},
            r"tau_scale=1e\+200, .* between 1e-08 and 1e\+08",
        ),
        (
            {"type": "horseshoe_columnwise", "tau_scale": 1e-200},
            r"tau_scale=1e-200, .* between 1e-08 and 1e\+08",
        ),
    ],
)
def test_bad_priors_are_refused(prior, message):
    with pytest.raises(ValueError, match=message):
        named(prior)


# ------------------------------------------------------------------ the basis


def test_the_singular_basis_never_lowers_the_joint_mode():
    """Profiled over the scales the penalty is minus sums of log norms: Hadamard's inequality."""
    rng = np.random.default_rng(0)
    W = rng.standard_normal((20, 4)) * [3, 2, 1, 0.2]

    def profiled(loadings):
        S = np.sum(compositional(loadings) ** 2, 0)
        v = horseshoe(evidence(S, 20)).variance
        return np.sum(column_log_density(S, v, 19))

    best = profiled(W @ singular_basis(W))
    for seed in range(20):
        assert profiled(W @ ortho_group.rvs(4, random_state=seed)) <= best + 1e-8


def test_singular_basis_of_more_columns_than_genes():
    W = np.random.default_rng(0).standard_normal((3, 5))
    rotation = singular_basis(W)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(5), atol=1e-12)


def test_effective_rank_counts_what_moves_genes():
    assert effective_rank(np.array([5.0, 2.0, 0.3, 0.2]), 100) == 3
    assert effective_rank(np.array([1e-4, 1e-4]), 100) == 0


# ------------------------------------------------------------------ fits


@pytest.fixture(scope="module")
def rank_three():
    sim = make_nbln_counts(n_cells=400, n_genes=80, n_factors=3, random_state=0)
    return sim, NBVCPEstimator(random_state=0).fit(sim.data)


@pytest.mark.parametrize("prior", ["ard", "horseshoe_columnwise", "neg_columnwise"])
def test_the_true_rank_is_found(rank_three, prior):
    sim, source = rank_three
    model = NBLNEstimator(
        6, loadings_prior=prior, informative_prior_estimator=source, random_state=0, **FREE
    ).fit(sim.data)
    found = model.w_prior_diagnostics_
    assert found["strategy_type"] == prior
    assert found["effective_rank"] == found["column_norm_effective_rank"] == 3
    assert found["scale_effective_rank"] == 3
    assert found["sigma_k"].shape == (6,)
    assert ("tau" in found) == (prior == "horseshoe_columnwise")


def test_no_factors_in_data_without_any():
    sim = make_nbln_counts(n_cells=400, n_genes=80, n_factors=0, random_state=0)
    model = NBLNEstimator(6, loadings_prior="ard", random_state=0, **FREE).fit(sim.data)
    assert model.w_prior_diagnostics_["effective_rank"] == 0


def test_each_stage_is_an_ascent_of_the_penalized_objective(rank_three, monkeypatch):
    from sknbln import _maximum

    outcomes, original = [], _maximum.ascend

    def recorded(*args, **options):
        outcomes.append(original(*args, **options))
        return outcomes[-1]

    monkeypatch.setattr(_maximum, "ascend", recorded)
    sim, source = rank_three
    model = NBLNEstimator(
        6, loadings_prior="ard", informative_prior_estimator=source, random_state=0, **FREE
    ).fit(sim.data)
    (outcome,) = outcomes
    assert len(outcome.stages) > 2
    for history in outcome.stages:
        assert np.all(np.diff(history) > -1e-9)
    assert model.objective_history_.size == model.n_iter_ + 1
    assert model.n_iter_ == sum(len(stage) - 1 for stage in outcome.stages)


@pytest.mark.parametrize("prior", ["gaussian", "ard"])
def test_stages_without_any_move_end_the_fit_and_warn(rank_three, monkeypatch, prior):
    """Where no step raises the objective and the scales stay, another stage would be the same."""
    from sknbln.solver import ascent

    monkeypatch.setattr(ascent, "_next_step", lambda *args: (None, 1e9))
    monkeypatch.setattr(ascent, "search", lambda *args: (None, None))
    sim, source = rank_three
    model = NBLNEstimator(
        2, loadings_prior=prior, informative_prior_estimator=source, random_state=0, **FREE
    )
    with pytest.warns(ConvergenceWarning, match="no damped step raises the objective"):
        model.fit(sim.data)
    assert not model.converged_
    # one for the columns that are real, where the prior selects the rank, and one for each of two stages
    assert model.n_iter_ == {"gaussian": 2, "ard": 3}[prior]
    assert model.objective_history_.size == model.n_iter_ + 1


@pytest.mark.parametrize("coupling", [None, MarginalCoupling(total())])
def test_penalized_objective_has_the_exact_gradient(coupling):
    evaluate, x = problem(16, coupling)
    rng = np.random.default_rng(0)
    penalty = ColumnPenalty(np.array([3.0, 40.0]), np.array([50.0, 5.0]), rng.random(len(x.mean)))
    direction = rng.standard_normal(x.loadings.shape)
    h = 1e-4
    up, down = (
        evaluate(x._replace(loadings=x.loadings + s * direction), penalty).value for s in (h, -h)
    )
    slope = np.sum(evaluate(x, penalty).gradient.loadings * direction)
    assert (up - down) / (2 * h) == pytest.approx(slope, rel=1e-5)


def test_explained_variance(rank_three):
    sim, source = rank_three
    model = NBLNEstimator(3, informative_prior_estimator=source, random_state=0, **FREE).fit(
        sim.data
    )
    n = sim.data.shape[1]
    P = np.eye(n) - 1 / n
    compositional_covariance = P @ model.get_covariance() @ P
    np.testing.assert_allclose(
        model.explained_variance_ratio_.sum() * np.trace(compositional_covariance),
        model.explained_variance_.sum(),
    )
    values = np.linalg.eigvalsh(model.components_.T @ model.components_)[::-1][:3]
    np.testing.assert_allclose(model.explained_variance_, values, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("latent_dim", [8, 16])
def test_ard_is_calibrated_at_any_generous_latent_dim(latent_dim):
    """500 x 200, four factors. Joint modes give slopes of 1.6, no prior 0.75 (0.64 at 16)."""
    sim = make_nbln_counts(n_cells=500, n_genes=200, n_factors=4, random_state=2)
    model = NBLNEstimator(latent_dim, loadings_prior="ard", random_state=0, **FREE).fit(sim.data)
    upper = np.triu_indices(200, 1)
    estimate = (model.components_.T @ model.components_)[upper]
    truth = (sim.loadings @ sim.loadings.T)[upper]
    assert model.w_prior_diagnostics_["effective_rank"] == 4
    assert np.corrcoef(estimate, truth)[0, 1] > 0.88
    assert 0.85 < (estimate @ truth) / (estimate @ estimate) < 1.2


# the scores may show one factor more than there are
@pytest.mark.filterwarnings("ignore:All 2 columns of the loadings are real")
@pytest.mark.slow
@pytest.mark.parametrize("prior", ["none", "ard"])
def test_intervals_of_loadings_and_scores_cover(prior):
    """90 % intervals, twelve data sets together, after the rotation that matches truth and fit."""
    loadings, scores = [], []
    for seed in range(12):
        sim = make_nbln_counts(n_cells=600, n_genes=80, n_factors=2, random_state=seed)
        model = NBLNEstimator(2, loadings_prior=prior, random_state=0, **FREE).fit(sim.data)
        model.set_params(whiten=True)  # as the true scores are
        U, _, Vt = np.linalg.svd(sim.loadings.T @ model.components_.T)
        error = model.components_.T - sim.loadings @ U @ Vt
        loadings.append(np.abs(error / model.components_standard_error_.T) < norm.ppf(0.95))
        mean, covariance = model.posterior_scores(sim.data)
        np.testing.assert_array_equal(mean, model.transform(sim.data))
        error = sim.scores @ U @ Vt - mean
        sd = np.sqrt(np.einsum("cii->ci", covariance))
        scores.append(np.abs(error / sd) < norm.ppf(0.95))
    assert 0.85 < np.mean(loadings) < 0.95
    assert 0.85 < np.mean(scores) < 0.95

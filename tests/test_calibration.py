"""Are the stated uncertainties right: posterior draws, intervals and scores, against simulated truth.

Elsewhere: intervals of loadings and scores, covariances under "ard" (test_column_priors.py); standard
deviations of mu against a bootstrap (test_nbln.py); the Laplace error on few genes (test_marginal.py).
"""

import contextlib
import itertools

import numpy as np
import pytest
from scipy import stats

from sknbln import NBLNEstimator, NBVCPEstimator, _nbvcp
from sknbln._capture import CapturePrior
from sknbln._passes import solve_rows
from sknbln._rows import RowBatches
from sknbln.datasets import load_immune_cells, make_nbln_counts

from .reference.importance import log_marginal

pytestmark = pytest.mark.slow

# ------------------------------------------------------------------ simulation-based calibration

N_SETS, N_CELLS, N_GENES = 200, 192, 12
N_DRAWS, N_BINS = 199, 10
LOG_MEAN = (5.0, 1.0)
CAPTURE = (2.0, 0.5)


@pytest.fixture
def fixed_priors(monkeypatch):
    """Priors that do not look at the counts: the parameters can be drawn from them.

    The estimator's own prior of the offsets has the row's total in it, that of log m the columns' totals.
    """
    original = _nbvcp._problem

    def problem(X, prior, histogram, known=None):
        loc, scale = (np.full(X.shape[1], v) for v in LOG_MEAN)
        return original(X, prior, histogram, known)._replace(mean_prior=(loc, scale))

    def rows(self, library_size):
        return tuple(np.full(np.shape(library_size), v) for v in self)

    monkeypatch.setattr(_nbvcp, "_problem", problem)
    monkeypatch.setattr(_nbvcp, "LOG_MEAN_PRIOR_SCALE", LOG_MEAN[1])
    monkeypatch.setattr(CapturePrior, "rows", rows)


def ranks(seed):
    """Ranks of the truth among posterior draws of one data set: of one gene, one cell, the level of all log m
    and of every gene's r, which are independent of each other but for the offsets."""
    rng = np.random.default_rng(seed)
    m = np.exp(rng.normal(*LOG_MEAN, N_GENES))
    r = np.exp(rng.normal(*_nbvcp.LOG_DISPERSION_PRIOR, N_GENES))
    loc, scale = CAPTURE
    eta = stats.truncnorm.rvs(-loc / scale, np.inf, loc, scale, size=N_CELLS, random_state=rng)
    counts = rng.poisson(m * np.exp(-eta)[:, None] * rng.gamma(r, 1 / r, (N_CELLS, N_GENES)))
    model = NBVCPEstimator(capture_efficiency=CAPTURE, random_state=seed).fit(counts)
    draws = model.sample_posterior(N_DRAWS, random_state=seed)
    return {
        "r": (draws.r < r).sum(0),
        "mu": (draws.mu < m).sum(0)[:1],
        "eta": (draws.eta < eta).sum(0)[:1],
        "level of mu": [np.sum(np.log(draws.mu).mean(1) < np.log(m).mean())],
    }


@pytest.mark.usefixtures("fixed_priors")
@pytest.mark.filterwarnings("ignore:.*more counts than the prior total:UserWarning")
def test_posterior_of_nbvcp_is_calibrated():
    """Talts et al. 2018, https://arxiv.org/abs/1804.06788: the ranks are uniform."""
    found = [ranks(seed) for seed in range(N_SETS)]
    for name in found[0]:
        pooled = np.concatenate([one[name] for one in found])
        histogram = np.bincount(pooled * N_BINS // (N_DRAWS + 1), minlength=N_BINS)
        assert stats.chisquare(histogram).pvalue > 0.01, f"{name}: {histogram}"


# ------------------------------------------------------------------ intervals


def coverage_of_free_mu_and_r(cascade):
    """Shares of the true mu and r in 90 % intervals, four data sets together, without capture.

    Without capture the level of mu is identified.
    """
    inside = {"mu": [], "r": []}
    for seed in range(4):
        sim = make_nbln_counts(
            600, 80, n_factors=2, capture_mean=0.0, capture_sd=0.0, random_state=seed
        )
        model = NBLNEstimator(
            2,
            informative_priors_freeze=(),
            informative_priors_tau=np.inf,
            capture_efficiency=None,
            cascade=cascade,
            random_state=0,
        ).fit(sim.data)
        found = model.get_distributions()
        for name, truth in (("mu", sim.mean), ("r", sim.dispersion)):
            cdf = np.asarray(found[name].cdf(truth))
            inside[name].append(np.abs(cdf - 0.5) < 0.45)
    return {name: np.mean(some) for name, some in inside.items()}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_intervals_of_free_mu_and_r_cover():
    """Measured on eight: 0.88 of mu and 0.88 of r.

    By the curvature in mu alone it was 0.69, and with d at its floor (a third of the genes) taken for known
    0.83 of r.
    """
    coverage = coverage_of_free_mu_and_r("parameter")
    assert all(0.85 < value < 0.95 for value in coverage.values()), coverage


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_intervals_under_a_split_of_overdispersion_hold_the_truth():
    """Measured: 0.95 of mu and 0.99 of r.

    How overdispersion is divided between d and r is a prior's word here, nearer to this truth than it says.
    """
    coverage = coverage_of_free_mu_and_r("marginal")
    assert all(0.85 < value for value in coverage.values()), coverage


# ------------------------------------------------------------------ scores


def exact_scores(model, X, n_draws, rng):
    """`score_samples` by importance sampling: estimates and their standard errors, (n_cells,) each."""
    params = model._params()
    mean, loadings, noise = params[:3]
    r = model.dispersion_
    offset, scale = model.capture_prior_.rows(np.asarray(X.sum(axis=1)).ravel())
    found = solve_rows(RowBatches(X, offset, scale), params)
    k = loadings.shape[1]
    covariance = np.empty((X.shape[0], k + 1, k + 1))
    covariance[:, :k, :k] = found.score_covariance
    shared = -found.score_offset_covariance / scale[:, None]
    covariance[:, :k, k] = covariance[:, k, :k] = shared
    covariance[:, k, k] = found.offset_variance / scale**2
    centre = np.column_stack([found.scores, (offset - found.offset) / scale])
    return np.transpose(
        [
            log_marginal(
                X[[c]].toarray()[0],
                *(mean, loadings, noise, r, offset[c], scale[c]),
                posterior_mean=centre[c],
                posterior_cov=covariance[c],
                n_draws=n_draws,
                rng=rng,
                n_nodes=9,
            )
            for c in range(X.shape[0])
        ]
    )


@pytest.mark.filterwarnings("ignore:The log-rates of .* have a variance above:UserWarning")
def test_score_differences_of_real_rows():
    """25 held-out rows of the immune cells x 300 genes; 10,000 draws a row and model.

    The fits are to 1e-5, whatever the default is.
    """
    X = load_immune_cells().data.astype(float).tocsr()
    train, rows = X[:550], X[550:575]
    source = NBVCPEstimator(random_state=0).fit(train)
    models = {"nbvcp": source}
    for name, options in (
        ("literal", {"cascade": "parameter"}),
        ("default", {}),
        ("poisson", {"observation": "poisson", "cascade": "parameter"}),
    ):
        twice = pytest.warns(UserWarning, match="Overdispersion is counted twice")
        with twice if name == "literal" else contextlib.nullcontext():
            models[name] = NBLNEstimator(
                4, informative_prior_estimator=source, tol=1e-5, random_state=0, **options
            ).fit(train)
    rng = np.random.default_rng(0)
    laplace, exact, error = {}, {}, {}
    for name, model in models.items():
        laplace[name] = model.score_samples(rows)
        exact[name], error[name] = exact_scores(model, rows, 10_000, rng)
        assert np.max(error[name]) < 0.03
    for one, other in itertools.combinations(models, 2):
        difference = exact[one] - exact[other]
        assert abs(np.mean(difference)) > 4  # there is something to get right
        assert abs(np.mean(laplace[one] - laplace[other] - difference)) < 0.25

"""Known covariates: what a batch costs, p-values of its coefficients, power, time.

    python benchmarks/covariates.py

``batch``: 1,000 rows, 200 genes, four factors (``make_nbln_counts``, seed 3), and a batch effect of
``N(0, 0.5^2)`` per gene on half of the rows. Number of factors found, correlation of the scores with the
batch, off-diagonals of ``W_perp W_perp'`` against the truth.

``tests``: shares of p-values below a level, for groups without an effect (``make_nbvcp_counts`` without
capture, mean counts .1 to 10, 300 genes; and ``make_nbln_counts`` with three factors), and where half of 400
genes have an effect of ``N(0, 0.5^2)``, beside a negative binomial regression per gene by statsmodels where
that is installed.

``time``: processor seconds of a second fit to 1,000 rows and 300 genes.
"""

import time
import warnings

import numpy as np
from _common import off_diagonals, table

from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln.datasets import make_nbln_counts, make_nbvcp_counts

try:
    import statsmodels.api as statsmodels
except ImportError:
    statsmodels = None

NO_CAPTURE = {"mean_range": (0.1, 10.0), "capture_mean": 0.0, "capture_sd": 0.0}


def multiple_correlation(y, scores):
    """Multiple correlation of y with the columns of scores."""
    columns = np.column_stack([np.ones(len(y)), scores])
    left = y - columns @ np.linalg.lstsq(columns, y, rcond=None)[0]
    return np.sqrt(max(1.0 - left.var() / y.var(), 0.0))


def batch(n=1000, genes=200):
    """Fits without a batch in the data, with one that is left out, and with one that is given."""
    rng = np.random.default_rng(0)
    of_row, effect = rng.integers(0, 2, n), rng.normal(0.0, 0.5, genes)
    options = dict(n_factors=4, random_state=3)
    plain = make_nbln_counts(n, genes, **options)
    mixed = make_nbln_counts(n, genes, offset=np.outer(of_row, effect), **options)
    rows = []
    for name, X, known in (
        ("no batch in the data", plain.data, {}),
        ("batch left out", mixed.data, {}),
        ("batch given", mixed.data, {"covariates": of_row.astype(str)}),
    ):
        model = NBLNEstimator(random_state=0).fit(X, **known)
        on_batch = multiple_correlation(of_row, model.transform(X, **known))
        corr, slope = off_diagonals(model.components_.T, plain.loadings)
        rows.append([name, model.latent_dim_, *(f"{v:.3f}" for v in (on_batch, corr, slope))])
    print(table(["", "factors", "with batch", "corr", "slope"], rows), end="\n\n")


def regressions(X, group):
    """p-values of a negative binomial regression per gene, NaN where it fails."""
    design, counts = statsmodels.add_constant(group), X.toarray()
    p = np.full(counts.shape[1], np.nan)
    for g, u in enumerate(counts.T):
        try:
            p[g] = statsmodels.NegativeBinomial(u, design).fit(disp=0, maxiter=100).pvalues[1]
        except Exception:  # statsmodels raises many
            continue
    return p


def shares(name, n, p):
    """A row of the table: shares of p-values below the levels, and how many there are none of."""
    found = p[np.isfinite(p)]
    below = (f"{np.mean(found < level):.4f}" for level in (0.05, 0.01, 0.001))
    return [name, n, *below, p.size - found.size]


def tests():
    """Calibration and power."""
    rows = []
    for n in (200, 2000):
        group = np.random.default_rng(n).integers(0, 2, n).astype(float)
        X = make_nbvcp_counts(n, 300, random_state=1, **NO_CAPTURE).data
        plain = NBVCPEstimator(capture_efficiency=None, random_state=0).fit(X, covariates=group)
        rows.append(shares("NBVCP, null", n, plain.coef_test().p_value.to_numpy()))
        if statsmodels is not None:
            rows.append(shares("statsmodels, null", n, regressions(X, group)))
        X = make_nbln_counts(n, 300, n_factors=3, mean_range=(0.1, 10.0), random_state=1).data
        source = NBVCPEstimator(random_state=0).fit(X, covariates=group)
        model = NBLNEstimator(3, informative_prior_estimator=source, random_state=0)
        model.fit(X, covariates=group)
        for name, fitted in (("NBVCP", source), ("NBLN", model)):
            p = fitted.coef_test().p_value.to_numpy()
            rows.append(shares(f"{name}, factors and capture, null", n, p))
    for seed in range(2):
        rng = np.random.default_rng(seed)
        group = rng.integers(0, 2, 200).astype(float)
        has_effect = np.arange(400) % 2 == 0
        offset = np.outer(group, np.where(has_effect, rng.normal(0.0, 0.5, 400), 0.0))
        X = make_nbvcp_counts(200, 400, random_state=seed, offset=offset, **NO_CAPTURE).data
        plain = NBVCPEstimator(capture_efficiency=None, random_state=0).fit(X, covariates=group)
        found = {"NBVCP": plain.coef_test().p_value.to_numpy()}
        if statsmodels is not None:
            found["statsmodels"] = regressions(X, group)
        for name, p in found.items():
            rows.append(shares(f"{name}, no effect, seed {seed}", 200, p[~has_effect]))
            rows.append(shares(f"{name}, effect, seed {seed}", 200, p[has_effect]))
    print(table(["p-values", "rows", "< .05", "< .01", "< .001", "none"], rows), end="\n\n")


def costs():
    """Time of ten covariates against that of ten factors."""
    X = make_nbln_counts(1000, 300, n_factors=4, random_state=0).data
    covariates = np.random.default_rng(0).normal(size=(1000, 10))
    rows = []
    for k, known in ((4, {}), (4, {"covariates": covariates}), (14, {})):
        source = NBVCPEstimator(random_state=0).fit(X, **known)
        model = NBLNEstimator(k, informative_prior_estimator=source, random_state=0)
        model.fit(X, **known)
        start = time.process_time()
        model.fit(X, **known)
        seconds = time.process_time() - start
        per_sweep = f"{seconds / model.n_iter_:.3f}"
        rows.append([k, 10 if known else 0, f"{seconds:.2f}", model.n_iter_, per_sweep])
    print(table(["factors", "covariates", "s", "sweeps", "s / sweep"], rows))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    batch()
    tests()
    costs()

"""Estimators and counts for tests of the predictive package."""

import functools

import numpy as np
import pandas as pd

from sknbln import NBLNEstimator, NBVCPEstimator

N_GENES, RANK = 8, 2
LEVELS = ("marginal", "library_anchored", "per_cell")
STATISTICS = ("mean", "variance", "zero_fraction", "maximum")
MODELS = ("nbvcp", "default", "literal", "free", "coupled", "poisson", "multinomial")
# Largest of some hundred standardized deviations; a normal one exceeds it once in a million.
Z_MAX = 5.0
# The seeds are fixed: a correct sampler fails a test of uniformity with this probability.
ALPHA = 1e-3


def globals_(seed=0, n_genes=N_GENES, poisson=False):
    rng = np.random.default_rng(seed)
    mean = rng.uniform(0.0, 2.0, n_genes)
    loadings = 0.4 * rng.standard_normal((n_genes, RANK))
    noise = rng.uniform(0.05, 0.3, n_genes)
    r = np.full(n_genes, np.inf) if poisson else np.exp(rng.uniform(0.0, 2.0, n_genes))
    return mean, loadings, noise, r


def simulate(mean, loadings, noise, r, n_cells, rng, totals=None):
    """Counts of the model, at full capture or given totals, by NumPy alone."""
    x = mean + rng.standard_normal((n_cells, RANK)) @ loadings.T
    x += np.sqrt(noise) * rng.standard_normal(x.shape)
    rate = np.exp(x)
    if np.all(np.isfinite(r)):
        rate *= rng.gamma(r, 1 / r, x.shape)
    if totals is None:
        return rng.poisson(rate)
    return np.stack([rng.multinomial(n, p / p.sum()) for n, p in zip(totals, rate, strict=True)])


def standardized(sample, expected):
    """(mean over axis 0 - expected) by its standard error."""
    return (sample.mean(0) - expected) / (sample.std(0) / np.sqrt(len(sample)))


@functools.cache
def fits():
    """Models fitted on a DataFrame, with names of genes; fitted once for all test modules."""
    counts = simulate(*globals_(), 60, np.random.default_rng(5))
    frame = pd.DataFrame(counts, columns=[f"gene{g}" for g in range(N_GENES)])
    source = NBVCPEstimator(random_state=0).fit(frame)
    options = dict(latent_dim=RANK, random_state=0, informative_prior_estimator=source)
    variants = {
        "nbvcp": source,
        "default": NBLNEstimator(**options),
        "literal": NBLNEstimator(cascade="parameter", **options),
        "free": NBLNEstimator(informative_priors_freeze=(), **options),
        "coupled": NBLNEstimator(informative_priors_freeze=("r", "eta"), **options),
        "poisson": NBLNEstimator(observation="poisson", **options),
        "multinomial": NBLNEstimator(observation="multinomial", **options),
    }
    return frame, {name: m if m is source else m.fit(frame) for name, m in variants.items()}

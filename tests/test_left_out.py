"""The density of a count given the others of its row: against the row's with that count missing."""

import numpy as np
import pytest
import scipy.sparse as sp
from numpy.testing import assert_allclose
from scipy.integrate import quad
from scipy.stats import nbinom, norm

from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln.datasets import make_nbln_counts

from .reference import truth


def simulation(**options):
    sim = make_nbln_counts(
        n_cells=40, n_genes=12, n_factors=2, capture_mean=0.0, random_state=0, **options
    )
    return sim, sim.data.toarray()


def model_of(sim):
    return truth.nbln(
        sim.mean, sim.loadings, sim.noise_variance, sim.dispersion, capture_efficiency=None
    )


def left_out_slowly(model, X, **known):
    """Of a row with and without each of its counts; missing counts are integrated out."""
    whole, found = model.score_samples(X, **known), np.empty(X.shape[1])
    for g in range(X.shape[1]):
        without = X.astype(float)
        without[:, g] = np.nan
        found[g] = np.mean(whole - model.score_samples(without, **known))
    return found


def test_the_score_is_that_of_a_row_less_that_without_the_gene():
    sim, X = simulation()
    model = model_of(sim)
    found = model.score_genes(X)
    # both are approximations: by Laplace's method twice, by it and quadrature
    assert_allclose(found, left_out_slowly(model, X), atol=0.02)
    assert_allclose(model.score_genes(sp.csr_array(X)), found, rtol=1e-12)
    # independent genes with the same variances know nothing of each other
    variance = sim.noise_variance + np.sum(sim.loadings**2, axis=1)
    alone = truth.nbln(
        sim.mean, np.zeros((12, 0)), variance, sim.dispersion, capture_efficiency=None
    ).score_genes(X)
    assert np.sum(found - alone) > 0.2


def test_without_factors_it_is_the_integral_over_the_log_rate():
    """The quadrature against an adaptive one, for counts from none to ten thousands."""
    mean, noise, r = (
        np.array([-3.0, 1.0, 9.0]),
        np.array([2.0, 0.5, 0.3]),
        np.array([0.3, 2.0, 50.0]),
    )
    model = truth.nbln(mean, np.zeros((3, 0)), noise, r, capture_efficiency=None)
    X = np.array([[0, 3, 9000], [2, 0, 15_000], [0, 40, 2000]])

    def exact(u, m, v, size):
        at = np.log(max(u, 0.1))

        def density(y):
            return nbinom.pmf(u, size, size / (size + np.exp(y))) * norm.pdf(y, m, v**0.5)

        return np.log(quad(density, m - 12 * v**0.5, m + 12 * v**0.5, points=[m, at], limit=400)[0])

    expected = [[exact(*args) for args in zip(row, mean, noise, r, strict=True)] for row in X]
    assert_allclose(model.score_genes(X), np.mean(expected, axis=0), atol=3e-3)


def test_independent_genes_with_and_without_capture():
    _, X = simulation()
    fitted = NBVCPEstimator(capture_efficiency=None, random_state=0).fit(X)
    m, r = fitted.mean_, fitted.dispersion_
    assert_allclose(fitted.score_genes(X), nbinom.logpmf(X, r, r / (r + m)).mean(0), rtol=1e-9)
    prior = np.log(1.5 * X.sum(1).max()), 0.4
    fitted = NBVCPEstimator(capture_efficiency=prior, random_state=0).fit(X)
    # the prior is centred on the row's total, which lacks the gene in the slow version
    small = X.sum(0) < 0.2 * X.sum()
    assert small.sum() == 11
    found, slow = fitted.score_genes(X), left_out_slowly(fitted, X)
    assert_allclose(found[small], slow[small], atol=0.05)


def test_covariates_offsets_and_missing_counts():
    _, X = simulation()
    known = dict(covariates=np.arange(40) % 2, offset=np.linspace(-1, 1, 40))
    model = NBLNEstimator(latent_dim=2, capture_efficiency=None, random_state=0)
    model.fit(X, **known)
    assert_allclose(model.score_genes(X, **known), left_out_slowly(model, X, **known), atol=0.05)
    holed = X.astype(float)
    holed[5:, 3] = np.nan
    holed[:, 4] = np.nan
    found = model.score_genes(holed, **known)
    assert np.isnan(found[4]) and np.isfinite(np.delete(found, 4)).all()
    rows = {name: values[:5] for name, values in known.items()}
    few = X[:5].astype(float)
    few[:, 4] = np.nan
    assert_allclose(found[3], model.score_genes(few, **rows)[3], rtol=1e-9)


def test_given_totals_a_gene_has_no_score():
    _, X = simulation()
    model = NBLNEstimator(latent_dim=1, observation="multinomial", random_state=0).fit(X)
    with pytest.raises(ValueError, match="given the total and the other genes a count is known"):
        model.score_genes(X)

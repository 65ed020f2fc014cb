"""Moments of counts in closed form, against simulation."""

import numpy as np
import pytest

from .reference import truth
from .reference.predictive import N_GENES, Z_MAX, globals_, simulate, standardized


@pytest.mark.parametrize("poisson", [False, True])
@pytest.mark.parametrize("offset", [0.0, 0.7])
def test_moments_are_those_of_simulated_counts(poisson, offset):
    mean, W, d, r = globals_(poisson=poisson)
    found = truth.nbln(mean, W, d, r).moments(capture_offset=offset)
    u = simulate(mean - offset, W, d, r, 200_000, np.random.default_rng(1)).astype(float)
    assert np.all(np.abs(standardized(u, found.mean)) < Z_MAX)
    centred = u - found.mean
    products = centred[:, :, None] * centred[:, None, :]
    assert np.all(np.abs(standardized(products, found.covariance)) < Z_MAX)
    np.testing.assert_array_equal(np.diag(found.covariance), found.variance)
    if not poisson:
        # the test would see the burst term in its form for Sigma_gg = 0
        S = np.sum(W**2, 1) + d
        other = found.variance - np.exp(2 * (mean - offset + S)) / r + found.mean**2 / r
        assert np.abs(standardized(centred**2, other)).max() > 2 * Z_MAX


def test_moments_of_independent_genes():
    mean, r = np.array([0.5, 3.0, 40.0]), np.array([0.5, 2.0, 8.0])
    found = truth.nbvcp(mean, r).moments()
    np.testing.assert_allclose(found.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(found.variance, mean + mean**2 / r, rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.diag(mean + mean**2 / r), rtol=1e-12)


def test_moments_that_overflow_are_inf_with_a_warning():
    mean, W, d, r = globals_()
    d[2] = 500.0  # E u = exp(250 + ...) is finite, its square is not
    with pytest.warns(RuntimeWarning, match=f"moments of 1 of {N_GENES} genes"):
        found = truth.nbln(mean, W, d, r).moments()
    assert np.isinf(found.variance[2])
    assert np.all(np.isfinite(found.mean))
    assert not np.any(np.isnan(found.covariance))
    assert np.isinf(found.covariance).sum() == 1


@pytest.mark.parametrize("offset", [np.nan, "1", None, np.inf])
def test_moments_refuse_an_offset_that_is_not_a_number(offset):
    with pytest.raises(ValueError, match="offset="):
        truth.nbln(*globals_()).moments(capture_offset=offset)


@pytest.mark.parametrize("offset", [np.nan, "1", None, np.inf, [0.0, 1.0]])
def test_moments_refuse_a_log_exposure_that_is_not_a_number_or_one_per_gene(offset):
    with pytest.raises(ValueError, match=r"^offset="):
        truth.nbln(*globals_()).moments(offset=offset)


def test_a_log_exposure_is_the_opposite_of_a_capture_offset():
    model = truth.nbln(*globals_())
    found, expected = model.moments(offset=0.7), model.moments(capture_offset=-0.7)
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-12)
    by_gene = model.moments(offset=np.r_[0.7, np.zeros(N_GENES - 1)])
    expected = np.r_[found.mean[0], model.moments().mean[1:]]
    np.testing.assert_allclose(by_gene.mean, expected, rtol=1e-12)

"""From an estimator and its source to one Laplace problem: where a free dispersion starts."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from sknbln._fitting import less_overdispersion

LOG_R = np.log(np.array([1e-4, 0.1, 1.0, 10.0, 1e4]))


def test_without_variance_the_dispersion_is_as_it_was():
    # phi is what is left of 1 + phi: rounding of 1 over phi
    assert_allclose(less_overdispersion(LOG_R, np.zeros(5)), LOG_R, rtol=0, atol=1e-11)


def test_variance_that_explains_too_much_leaves_a_tenth():
    variance = np.log1p(np.exp(-LOG_R))  # all of it
    for factor in (1.0, 2.0, 1e3):
        found = less_overdispersion(LOG_R, factor * variance)
        assert_allclose(found, LOG_R + np.log(10.0), rtol=0, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(st.floats(-9.0, 9.0), st.floats(0.0, 20.0), st.floats(0.0, 1.0))
def test_marginal_overdispersion_is_kept_down_to_a_tenth(log_r, variance, more):
    """``(1 + phi) exp(variance)`` is what it was; more variance never leaves more overdispersion."""
    log_r, variance = np.array([log_r]), np.array([variance])
    found = less_overdispersion(log_r, variance)
    before, left = np.exp(-log_r), np.exp(-found)
    assert np.all(left >= 0.1 * before * (1 - 1e-12))
    if left > 0.1001 * before:
        assert_allclose((1 + left) * np.exp(variance), 1 + before, rtol=1e-12)
    else:
        assert np.all((1 + 0.1001 * before) * np.exp(variance) >= 1 + before)
    assert np.all(less_overdispersion(log_r, variance + more) >= found)

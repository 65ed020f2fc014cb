"""The overdispersion T(r) that a dispersion adds: definition, limits, slope, inverse; NumPy and JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.integrate import quad

from sknbln import _jax as jax_module
from sknbln.solver import overdispersion
from sknbln.solver.channel import SMALLEST_OVERDISPERSION
from sknbln.solver.overdispersion import TotalOverdispersion

WEIGHT = np.array([0.0, 0.3, 1.0])
T = TotalOverdispersion(WEIGHT)
LARGEST_LOG_R = -np.log(SMALLEST_OVERDISPERSION)
LOG_R = np.linspace(-9.0, 22.0, 63)[:, None]
EULER = 0.57721566490153286


def log_minus_digamma(r):
    """``log r - digamma(r)`` by Binet's integral, which has no cancellation."""

    def integrand(s):
        t = s / r
        # 1/(1 - e^-t) - 1/t, by its series where it cancels
        kernel = 0.5 + t / 12 if t < 1e-4 else 1 / -np.expm1(-t) - 1 / t
        return kernel * np.exp(-s) / r

    return quad(integrand, 0, np.inf, epsabs=0, epsrel=1e-11, limit=200)[0]


def test_weight_is_the_share_of_the_mean_count():
    found = TotalOverdispersion.at(np.array([0.0, 1.0, 30.0]), np.array([1.0, 1.0, 10.0]))
    assert_allclose(found.weight, [0.0, 0.5, 0.75])


@pytest.mark.parametrize("r", [1e-3, 0.05, 1.0, 7.5, 300.0, 999.0, 1001.0, 1e5, 1e9])
def test_value_is_the_definition(r):
    expected = 2 * WEIGHT * log_minus_digamma(r) + (1 - WEIGHT) * np.log1p(1 / r)
    assert_allclose(T(np.log(r) * np.ones(3)), expected, rtol=1e-9)


@pytest.mark.parametrize(
    "r, difference",  # digamma(1) = -gamma, digamma(1/2) = -gamma - 2 log 2, digamma(2) = 1 - gamma
    [(1.0, EULER), (0.5, EULER + np.log(2.0)), (2.0, np.log(2.0) + EULER - 1.0)],
)
def test_values_that_are_known(r, difference):
    assert_allclose(TotalOverdispersion(1.0)(np.log(r)), 2 * difference, rtol=1e-13)
    assert_allclose(TotalOverdispersion(0.0)(np.log(r)), np.log1p(1 / r), rtol=1e-14)


def test_limits():
    """``1/r`` for large sizes, whatever the weight; ``2 w / r`` for small ones, but for logarithms."""
    assert_array_equal(T(np.full(3, np.inf)), 0.0)
    assert_array_equal(T.slope(np.full(3, np.inf)), 0.0)
    large = np.full(3, np.log(1e8))
    assert_allclose(T(large), 1e-8, rtol=1e-7)
    assert_allclose(T.slope(large), -1e-8, rtol=1e-7)
    small = np.log(1e-7)
    assert_allclose(T(np.full(3, small))[1:], 2 * WEIGHT[1:] * 1e7, rtol=1e-5)
    assert_allclose(T(np.full(3, small))[0], -small, rtol=1e-5)


def test_the_series_meets_the_functions():
    """At the size where the asymptotic series takes over, value and slope hardly jump."""
    at = np.log(overdispersion._LARGE)
    below, above = (at + s * 1e-9 * np.ones(3) for s in (-1, 1))
    assert_allclose(T(above), T(below), rtol=1e-8)
    assert_allclose(T.slope(above), T.slope(below), rtol=1e-8)


def test_it_is_convex_and_falls():
    slope = T.slope(LOG_R)
    assert np.all(slope < 0)
    assert np.all(np.diff(slope, axis=0) > 0)


def test_slope_is_the_difference_quotient():
    h = 1e-4
    at = np.linspace(-9.0, 5.0, 57)[:, None]  # beyond it T itself loses digits of differences
    found = 8 * (T(at + h) - T(at - h)) - (T(at + 2 * h) - T(at - 2 * h))
    assert_allclose(T.slope(at), found / (12 * h), rtol=1e-7)


@settings(max_examples=200, deadline=None)
@given(st.floats(-9.0, np.log(1e9)), st.floats(0.0, 1.0))
def test_inverse_is_the_inverse(log_r, weight):
    total = TotalOverdispersion(np.array([weight]))
    level = total(np.array([log_r]))
    assert_allclose(total(total.inverse(level)), level, rtol=1e-9)
    assert_allclose(total.inverse(level), log_r, atol=1e-7)


def test_inverse_of_no_overdispersion_is_the_largest_size():
    found = T.inverse(np.array([0.0, SMALLEST_OVERDISPERSION / 10, SMALLEST_OVERDISPERSION]))
    assert_allclose(found, LARGEST_LOG_R, rtol=1e-6)
    assert np.all(found <= LARGEST_LOG_R)


@jax_module.float64
def test_jax_is_numpy():
    level = T(LOG_R)
    for name, at in (("__call__", LOG_R * np.ones(3)), ("slope", LOG_R), ("inverse", level)):
        found = jax.jit(getattr(T, name))(jnp.asarray(at))
        assert isinstance(found, jax.Array)
        assert_allclose(found, getattr(T, name)(at), rtol=1e-9, atol=1e-12, err_msg=name)


@jax_module.float64
def test_derivative_of_jax_is_the_slope():
    derivative = jax.jit(jax.vmap(jax.jacfwd(lambda log_r: TotalOverdispersion(0.3)(log_r))))
    at = LOG_R[:, 0]
    assert_allclose(derivative(jnp.asarray(at)), TotalOverdispersion(0.3).slope(at), rtol=1e-6)

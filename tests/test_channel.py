"""The count channel: against SciPy, explicit sums and finite differences; finite everywhere."""

import jax
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import stats
from scipy.special import gammaln

from sknbln._counts import CountHistogram, row_constants
from sknbln.solver.channel import (
    _STIRLING,
    channel_terms,
    dispersion_terms,
    log1p_of_positive,
    log_factorial,
    log_likelihood_terms,
    log_odds_terms,
    log_rising,
    log_rising_derivatives,
    log_rising_slope,
    third_derivative,
)

PHI = np.array([0.0, 1e-8, 1e-5, 1e-3, 0.1, 1.0, 30.0, 1e4])
COUNTS = np.array([0.0, 1.0, 2.0, 7.0, 300.0])
Y = np.array([-6.0, -1.0, 0.0, 0.7, 3.0, 6.0])
SIZES = np.array([1e-4, 1e-2, 1.0, 29.9, 30.0, 30.1, 1e3, 1e6, 1e8, 1e10])
N_PROPERTY = 40  # values per hypothesis example: one array shape, one compilation


@pytest.fixture(autouse=True)
def float64(strict_jax):
    with jax.enable_x64(True):
        yield


def grid():
    """Every count with every log-rate and every overdispersion, as (n, 1) columns."""
    return tuple(a.reshape(-1, 1) for a in np.meshgrid(COUNTS, Y, PHI, indexing="ij"))


def channel(u, y, phi):
    """Terms and y-dependent log-likelihood, one jitted call."""
    return jax.tree.map(np.asarray, _channel(u, y, phi))


@jax.jit
def _channel(u, y, phi):
    terms = channel_terms(u, y, phi)
    logs = log_odds_terms(phi, terms)
    return (
        terms,
        log_likelihood_terms(u, y, logs),
        third_derivative(terms),
        dispersion_terms(u, phi, terms, logs),
    )


def test_log1p_is_numpys():
    x = np.concatenate([[0.0], np.geomspace(1e-300, 1e300, 200_001), 1.0 + PHI])
    x = np.concatenate([x, np.nextafter(np.sqrt(2.0) - 1.0, [0.0, 1.0]), 2.0 ** np.arange(900)])
    found = np.asarray(jax.jit(log1p_of_positive)(x))
    assert_allclose(found, np.log1p(x), rtol=5e-16, atol=0)
    assert_array_equal(jax.jit(log1p_of_positive)(np.array([np.inf, np.nan])), [np.inf, np.nan])
    slope = np.asarray(jax.vmap(jax.grad(log1p_of_positive))(x))
    assert_allclose(slope, 1.0 / (1.0 + x), rtol=3e-16)


def central(f, x, h):
    """Fourth-order central difference."""
    return (8 * (f(x + h) - f(x - h)) - (f(x + 2 * h) - f(x - 2 * h))) / (12 * h)


def scipy_log_pmf(u, y, phi):
    poisson = phi == 0
    r = 1 / np.where(poisson, 1.0, phi)
    nb = stats.nbinom.logpmf(u, r, 1 / (1 + np.exp(y) / r))
    return np.where(poisson, stats.poisson.logpmf(u, np.exp(y)), nb)


def test_log_pmf_is_scipys():
    u, y, phi = grid()
    keep = (phi == 0) | (phi >= 1e-5)  # above r = 1e5 SciPy's own differences of lgamma cancel
    value = channel(u, y, phi)[1]
    with np.errstate(divide="ignore"):
        value = value + log_rising(u, 1 / phi) - log_factorial(u)
    assert_allclose(value[keep], scipy_log_pmf(u, y, phi)[keep], rtol=1e-9, atol=1e-9)


def test_poisson_is_the_value_at_phi_zero_and_its_limit():
    u, y, _ = grid()
    terms, value, third, _ = channel(u, y, np.zeros_like(y))
    rate = np.exp(y)
    assert_allclose(terms.gradient, u - rate, rtol=1e-14, atol=1e-13)
    assert_allclose(terms.curvature, rate, rtol=1e-14)
    assert_allclose(third, rate, rtol=1e-14)
    assert_allclose(value, u * y - rate, rtol=1e-14, atol=1e-13)
    # the first-order term in phi is at most phi (u + rate)^2 / 2 = 2.5e-7 here
    near, near_value, *_ = channel(u, y, np.full_like(y, 1e-12))
    assert_allclose(near.gradient, terms.gradient, atol=1e-6)
    assert_allclose(near_value, value, atol=1e-6)


def difference_error(f, x, derivative, u, y, phi):
    """Largest error of a derivative, in units of the terms that cancel in the differences.

    Those lose 1e-16 / 1e-3 of their size, and the fourth-order rule (1e-3)^4 of the fifth derivative.
    """
    size = 1 + u * (1 + np.abs(y) + np.abs(np.log(np.maximum(phi, 1e-8)))) + np.exp(y)
    return np.max(np.abs(central(f, x, 1e-3) - derivative) / size)


def test_derivatives_in_the_log_rate():
    u, y, phi = grid()
    terms, _, third, _ = channel(u, y, phi)

    def error(f, derivative):
        return difference_error(lambda at: f(channel(u, at, phi)), y, derivative, u, y, phi)

    assert error(lambda c: c[1], terms.gradient) < 1e-10
    assert error(lambda c: c[0].gradient, -terms.curvature) < 1e-10
    assert error(lambda c: c[0].curvature, third) < 1e-10
    assert_allclose(u - terms.gradient, terms.fitted, rtol=1e-10, atol=1e-10)


def test_derivatives_in_the_dispersion():
    u, y, phi = grid()
    keep = phi[:, 0] > 0
    u, y, phi = u[keep], y[keep], phi[keep]
    log_r = -np.log(phi)
    score, second, d_gradient, d_curvature = channel(u, y, phi)[3]

    def error(f, derivative):
        return difference_error(
            lambda s: f(channel(u, y, np.exp(-s))), log_r, derivative, u, y, phi
        )

    assert error(lambda c: c[1], score) < 1e-10
    assert error(lambda c: c[3][0], second) < 1e-10
    assert error(lambda c: c[0].gradient, d_gradient) < 1e-10
    assert error(lambda c: c[0].curvature, d_curvature) < 1e-10


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-8.0, 4.0), st.floats(0.0, 6.0))
def test_derivatives_anywhere(seed, log10_phi, log10_count):
    """The derivatives of the two tests above, at random points."""
    rng = np.random.default_rng(seed)
    y = rng.uniform(-14.0, 16.0, (N_PROPERTY, 1))
    u = rng.integers(0, int(10**log10_count) + 1, y.shape).astype(float)
    phi = np.full_like(y, 10**log10_phi)
    terms, _, third, (score, second, d_gradient, d_curvature) = channel(u, y, phi)

    def by_rate(f, derivative):
        return difference_error(lambda at: f(channel(u, at, phi)), y, derivative, u, y, phi)

    def by_dispersion(f, derivative):
        return difference_error(
            lambda s: f(channel(u, y, np.exp(-s))), -np.log(phi), derivative, u, y, phi
        )

    assert by_rate(lambda c: c[1], terms.gradient) < 1e-10
    assert by_rate(lambda c: c[0].gradient, -terms.curvature) < 1e-10
    assert by_rate(lambda c: c[0].curvature, third) < 1e-10
    assert by_dispersion(lambda c: c[1], score) < 1e-10
    assert by_dispersion(lambda c: c[3][0], second) < 1e-10
    assert by_dispersion(lambda c: c[0].gradient, d_gradient) < 1e-10
    assert by_dispersion(lambda c: c[0].curvature, d_curvature) < 1e-10


def test_derivatives_in_the_dispersion_are_zero_for_poisson_counts():
    u, y, _ = grid()
    found = channel(u, y, np.zeros_like(y))[3]
    for derivative in found:
        assert_allclose(derivative, 0.0, atol=1e-12 * np.exp(6.0))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 1e-8, 1e-4, 1e-2, 1.0, 1e2, 1e4]),
    st.sampled_from([0, 1, 10, 10**5, 10**9]),
)
def test_finite_and_concave_for_extreme_inputs(seed, phi, largest):
    rng = np.random.default_rng(seed)
    y = np.sort(rng.uniform(-700, 700, N_PROPERTY))
    y[[0, -1]] = -700, 700
    u = np.full(N_PROPERTY, float(rng.integers(0, largest + 1)))
    phi = np.full(N_PROPERTY, phi)
    terms, value, third, dispersion = channel(*(a[:, None] for a in (u, y, phi)))
    for a in (*terms, value, third, *dispersion):
        assert np.all(np.isfinite(a))
    assert np.all(terms.curvature >= 0)
    # a concave function's slope falls, and its graph lies below its tangents
    slack = 1e-12 * (1 + u[1:] + terms.fitted[1:, 0])
    assert np.all(np.diff(terms.gradient[:, 0]) <= slack)
    inside = y < 600  # the rate is held at exp(600) above
    tangent = value[:-1] + terms.gradient[:-1] * np.diff(y)[:, None]
    # u y and u log(1 + phi e^y) cancel: rounding of terms of size u |y|
    size = 1e-14 * (1 + u[:1] * 700 + np.abs(value[1:]) + np.abs(value[:-1]) + np.abs(tangent))
    assert np.all((value[1:] <= tangent + size)[inside[1:]])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-18.0, 9.0), st.integers(0, 10**9))
def test_probabilities_are_at_most_one(seed, log_phi, u):
    rng = np.random.default_rng(seed)
    y = rng.uniform(-40, 30, (N_PROPERTY, 1))
    value = channel(np.full_like(y, u), y, np.full_like(y, np.exp(log_phi)))[1]
    constant = log_rising(float(u), np.exp(-log_phi)) - log_factorial(u)
    # rounding of the largest term, u log(phi exp(y)) or u log u
    assert np.all(value + constant <= 1e-12 * (1 + u) * 60)


# ------------------------------------------------------------------ constants


def explicit_rising(u, r):
    """Value and two derivatives in log r, as sums over j < u."""
    j = np.arange(u)
    return np.sum(np.log1p(j / r)), -np.sum(j / (r + j)), np.sum(j * r / (r + j) ** 2)


@pytest.mark.parametrize("r", SIZES)
def test_log_rising_is_the_explicit_sum(r):
    for u in (0, 1, 2, 3, 17, 400, 20_000):
        value, first, second = explicit_rising(u, r)
        assert_allclose(log_rising(u, r), value, rtol=1e-11, atol=1e-12)
        found = [float(a) for a in log_rising_derivatives(u, r)]
        # r log(1 + u/r) and u cancel where r is large: rounding of terms of the size of u
        assert_allclose(found[0], first, rtol=1e-11, atol=1e-12 + 1e-15 * u)
        assert_allclose(found[1], second, rtol=1e-11, atol=1e-12 + 1e-15 * u)


def test_log_rising_of_infinite_size_is_zero():
    u = np.array([0.0, 1.0, 1e9])
    assert_array_equal(log_rising(u, np.inf), 0.0)
    for derivative in log_rising_derivatives(u, np.inf):
        assert_array_equal(derivative, 0.0)


def test_log_rising_takes_fractional_counts():
    u, r = np.array([0.5, 3.25, 40.75]), np.array([0.3, 2.0, 20.0])
    assert_allclose(log_rising(u, r), gammaln(u + r) - gammaln(r) - u * np.log(r), rtol=1e-13)
    # across the switch to Stirling's series there is no step
    below, above = np.nextafter(_STIRLING, 0), _STIRLING
    for u in (0.5, 3.0, 1e4):
        assert_allclose(log_rising(u, below), log_rising(u, above), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("u", [1.0, 6.5, 500.0])
def test_log_rising_derivatives_are_differences(u):
    log_r = np.log(np.array([1e-4, 0.1, 3.0, 25.0, 40.0, 1e4, 1e8]))
    first, second = log_rising_derivatives(u, np.exp(log_r))
    scale = 1e-16 * u * np.maximum(1.0, np.abs(np.log(u) - log_r)) / 1e-3 + 1e-9
    value = central(lambda s: log_rising(u, np.exp(s)), log_r, 1e-3)
    assert np.all(np.abs(value - first) < 10 * scale)
    slope = central(lambda s: log_rising_derivatives(u, np.exp(s))[0], log_r, 1e-3)
    assert np.all(np.abs(slope - second) < 10 * scale)


@jax.jit
def _rising_slope(u, r):
    return log_rising_slope(u, r)


def rising_slope(u, r):
    with jax.enable_x64(True):
        return np.asarray(_rising_slope(u, r))


@pytest.mark.parametrize("r", SIZES)
def test_log_rising_slope_is_the_first_derivative(r):
    """Also as the explicit sum, and for fractional counts."""
    u = np.array([0.0, 1.0, 2.0, 17.0, 400.0, 20_000.0])
    found = rising_slope(u, np.full(u.size, r))
    explicit = [explicit_rising(int(v), r)[1] for v in u]
    # r (digamma(u+r) - digamma(r)) and u cancel where r is large: rounding of terms of the size of u
    assert np.all(np.abs(found - explicit) <= 1e-11 * np.abs(explicit) + 1e-12 + 1e-15 * u)
    u = np.array([0.25, 3.5, 40.75, 1e5 + 0.125])
    expected = log_rising_derivatives(u, r)[0]
    assert_allclose(rising_slope(u, np.full(u.size, r)), expected, rtol=1e-11, atol=1e-11)


def test_log_rising_slope_of_a_matrix_of_counts():
    rng = np.random.default_rng(0)
    u, r = rng.poisson(20.0, (50, 30)).astype(float), np.exp(rng.uniform(-11.0, 20.0, 30))
    expected = log_rising_derivatives(u, r)[0]
    assert_allclose(rising_slope(u, r[None, :]), expected, rtol=1e-11, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9), st.floats(-9.3, 23.1))
def test_log_rising_is_finite_and_falls_with_r(u, log_r):
    r = np.exp(log_r)
    first, second = log_rising_derivatives(u, r)
    assert np.isfinite(log_rising(u, r)) and np.isfinite(first) and np.isfinite(second)
    assert log_rising(u, r) >= -1e-9
    assert -u * (1 + 1e-9) <= first <= 1e-9 * (1 + u)


def count_matrix():
    rng = np.random.default_rng(4)
    X = rng.poisson(rng.gamma(0.4, 6.0, (30, 7))).astype(float)
    X[:, 3] = 0  # a gene without counts
    X[5] = 0  # a cell without counts
    return X


def test_histogram_sums_are_the_dense_sums():
    X = count_matrix()
    r = np.array([1e-3, 0.5, 29.0, 2.0, 31.0, 1e6, np.inf])
    histogram = CountHistogram(sp.csr_matrix(X))
    assert_allclose(histogram.constants(r), log_rising(X, r[None, :]).sum(0), rtol=1e-12)
    dense = log_rising_derivatives(X, r[None, :])
    for found, expected in zip(histogram.constant_derivatives(r), dense, strict=True):
        assert_allclose(found, expected.sum(0), rtol=1e-12, atol=1e-12)
    assert_allclose(histogram.log_factorials, log_factorial(X).sum(), rtol=1e-13)
    assert histogram.times.sum() == np.count_nonzero(X)
    assert len(set(zip(histogram.gene, histogram.count, strict=True))) == histogram.gene.size


@pytest.mark.parametrize("value", [2.0**31 - 1, 2.0**31, 2.0**40 + 1, 0.5, 2.0**31 + 0.5], ids=str)
def test_histogram_of_fractional_and_huge_counts(value):
    """The distinct counts of every gene and their multiplicities, by both ways of counting."""
    X = count_matrix()
    X[:, -1] = 3.0  # one gene has the same count in all other cells
    X[2:4, 0], X[7, -1] = value, value
    histogram = CountHistogram(sp.csr_matrix(X))
    expected = {}
    for g in range(X.shape[1]):
        values, times = np.unique(X[X[:, g] != 0, g], return_counts=True)
        expected |= {(g, v): t for v, t in zip(values, times, strict=True)}
    found = zip(histogram.gene.tolist(), histogram.count.tolist(), strict=True)
    assert dict(zip(found, histogram.times, strict=True)) == expected
    assert expected[0, value] == 2 and expected[6, value] == 1
    r = np.array([1e-3, 0.5, 29.0, 2.0, 31.0, 1e6, 3.0])
    assert_allclose(histogram.constants(r), log_rising(X, r[None, :]).sum(0), rtol=1e-12)
    assert_allclose(histogram.log_factorials, log_factorial(X).sum(), rtol=1e-13)


def test_histogram_keys_do_not_overflow():
    """The largest key, of the last gene and the largest count, is beyond 32 bits."""
    X = sp.csr_matrix(
        (np.array([2.0**31 - 2, 1.0, 5.0]), (np.array([0, 1, 1]), np.array([0, 0, 49_999]))),
        shape=(2, 50_000),
    )
    histogram = CountHistogram(X)
    assert_array_equal(histogram.gene, [0, 0, 49_999])
    assert_array_equal(histogram.count, [1.0, 2.0**31 - 2, 5.0])
    assert_array_equal(histogram.times, 1.0)


def test_histogram_of_nothing():
    histogram = CountHistogram(sp.csr_matrix((4, 3)))
    assert_array_equal(histogram.constants(np.ones(3)), np.zeros(3))
    assert_array_equal(histogram.constant_derivatives(np.ones(3)), np.zeros((2, 3)))
    assert histogram.log_factorials == 0.0


def test_row_constants_are_the_dense_sums():
    X = count_matrix()
    r = np.array([1e-3, 0.5, 29.0, 2.0, 31.0, 1e6, np.inf])
    expected = (log_rising(X, r[None, :]) - log_factorial(X)).sum(1)
    found = row_constants(sp.csr_matrix(X), r)
    assert found.shape == (30,)
    assert_allclose(found, expected, rtol=1e-12)
    assert found[5] == 0.0

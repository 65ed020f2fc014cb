"""The marginal-preserving coupling: the moments that it keeps, its gradients and its metric."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from sknbln.solver.channel import SMALLEST_OVERDISPERSION
from sknbln.solver.columns import Columns
from sknbln.solver.coupling import Identity, MarginalCoupling
from sknbln.solver.metric import Metric, least_squares_matrix, packed
from sknbln.solver.params import Params, noise_coordinate, noise_variance

from .reference.coupling import expand_gene, gradient_gene, total

K = 3
BLOCKS = Params._fields
ROWS = 5
TOTAL = total(ROWS)  # of few counts to many
COUPLED, MEAN_COUPLED = MarginalCoupling(TOTAL), MarginalCoupling()


def coordinates(seed, size, log_noise, log_r):
    """Coordinates with loadings of scale ``exp(size)`` and noise variance ``exp(log_noise)``."""
    rng = np.random.default_rng(seed)
    return Params(
        rng.uniform(-3, 8, ROWS),
        np.exp(size) * rng.standard_normal((ROWS, K)),
        noise_coordinate(np.full(ROWS, np.exp(log_noise))),
        np.full(ROWS, log_r),
    )


def variance(params):
    return np.sum(params.loadings**2, 1) + noise_variance(params)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.floats(-12.0, 6.0),
    st.floats(np.log(1e-6), np.log(50.0)),
    st.floats(np.log(1e-3), np.log(1e9)),
)
def test_coupling_keeps_the_marginal_moments(seed, size, log_noise, log_r):
    x = coordinates(seed, size, log_noise, log_r)
    params = COUPLED.expand(x)
    for block in params:
        assert np.all(np.isfinite(block))
    Sigma, level = variance(params), TOTAL(x.dispersion)
    # the bound itself is reached, to rounding, by rows far beyond it
    assert np.all(Sigma <= level * (1 + 1e-12))
    left = TOTAL(params.dispersion)
    assert_allclose(Sigma + left, level, rtol=1e-10, atol=2 * SMALLEST_OVERDISPERSION)
    assert_allclose(params.mean + Sigma / 2, x.mean, rtol=1e-12, atol=1e-12)
    assert np.all(left > 0)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-6.0, 1.0), st.floats(-3.0, 3.0))
def test_coupling_keeps_room_for_dispersion(seed, size, log_r):
    """Away from saturation Sigma_gg is strictly below its bound, and grows with the row."""
    x = coordinates(seed, size, -2.0, log_r)
    bound = TOTAL(x.dispersion)
    Sigma = variance(COUPLED.expand(x))
    keep = variance(x) < 20 * bound
    assert np.all(Sigma[keep] < bound[keep])
    more = COUPLED.expand(x._replace(loadings=1.01 * x.loadings))
    assert np.all(variance(more)[keep] > Sigma[keep])


@given(st.integers(0, 2**32 - 1), st.floats(-6.0, 3.0))
@settings(max_examples=50, deadline=None)
def test_coupling_of_the_mean_alone(seed, size):
    x = coordinates(seed, size, -1.0, 0.3)
    params = MEAN_COUPLED.expand(x)
    assert_allclose(params.mean + variance(params) / 2, x.mean, rtol=1e-12, atol=1e-10)
    assert_array_equal(params.loadings, x.loadings)
    assert_array_equal(params.noise, x.noise)
    assert_array_equal(params.dispersion, x.dispersion)


def test_small_rows_are_hardly_changed():
    """``c -> 1`` as the row goes to zero: the limit is the uncoupled model."""
    x = coordinates(0, -9.0, np.log(1e-6), 0.0)
    params = COUPLED.expand(x)
    assert_allclose(params.loadings, x.loadings, rtol=1e-5)
    assert_allclose(noise_variance(params), noise_variance(x), rtol=1e-5)
    assert_allclose(params.dispersion, x.dispersion, atol=1e-5)


# log of the scale of the loadings, and the coupling. At -0.5 Sigma_gg is near its bound.
CASES = [
    (size, coupling)
    for size in (-14.0, -6.0, -5.3, -5.0, -2.0, -0.5)
    for coupling in (COUPLED, MEAN_COUPLED)
]


@pytest.mark.parametrize("size, coupling", CASES)
def test_coupling_against_its_formulas(size, coupling):
    """`expand`, and `pull_back` as its transposed Jacobian, gene by gene; no solver involved."""
    x = coordinates(3, size, -1.5 if size > -3 else max(2 * size, np.log(1e-6)), 0.2)
    rng = np.random.default_rng(0)
    gradient = Params(*(rng.standard_normal(b.shape) for b in x))
    params = coupling.expand(x)
    pulled = coupling.pull_back(x, gradient)
    for g in range(ROWS):
        gene, weight = [b[g] for b in x[:4]], TOTAL.weight[g] if coupling is COUPLED else None
        expected = expand_gene(*gene, weight)
        found = params.mean[g], params.loadings[g], noise_variance(params)[g], params.dispersion[g]
        for value, other in zip(found, expected, strict=True):
            assert_allclose(value, np.asarray(other, float), rtol=1e-7, atol=1e-12)
        slopes = gradient_gene([w[g] for w in gradient[:4]], gene, weight)
        # a dispersion by bisection has an error of 1e-13, over a step that is short beside the row
        atol = 1e-9 + 1e-10 / np.exp(size)
        for name, value, other in zip(BLOCKS[:3], (b[g] for b in pulled), slopes, strict=False):
            assert_allclose(value, other, rtol=1e-5, atol=atol, err_msg=f"{name} {g}")
    # a marginal overdispersion is frozen; without it the dispersion is the model's own
    expected = np.zeros(ROWS) if coupling is COUPLED else gradient.dispersion
    assert_array_equal(pulled.dispersion, expected)


@pytest.mark.parametrize("coupling", [COUPLED, MEAN_COUPLED, Identity()])
@pytest.mark.parametrize("size", [-6.0, -2.0, 0.0])
def test_metric_is_pulled_back_as_gradients_are(size, coupling):
    """The information of one gradient v, ``v v'``, is that of its pull-back in the coordinates."""
    x = coordinates(3, size, -1.5 if size > -3 else 2 * size, 0.2)
    params = coupling.expand(x)
    rng = np.random.default_rng(0)
    nothing = Params(*map(np.zeros_like, x))
    v = Params(*(rng.standard_normal(b.shape) for b in x))
    for part in ({"mean", "loadings"}, {"noise"}, {"dispersion"}):
        of = nothing._replace(**{name: getattr(v, name) for name in part})
        column = np.concatenate([of.mean[:, None], of.loadings], 1)
        outer = column[:, :, None] * column[:, None, :]
        columns = Columns.at(params.loadings, np.ones(ROWS), 10, 0.0)
        metric = Metric(packed(outer), of.noise**2, of.dispersion**2, 0.0, columns)
        found = coupling.pull_back_metric(x, metric)
        pulled = coupling.pull_back(x, of)
        column = np.concatenate([pulled.mean[:, None], pulled.loadings], 1)
        matrix = least_squares_matrix(found.moments, x.loadings.shape[1])
        assert_allclose(matrix, column[:, :, None] * column[:, None, :], rtol=1e-9, atol=1e-12)
        assert_allclose(found.noise, pulled.noise**2, rtol=1e-9)


@pytest.mark.parametrize("coupling", [COUPLED, MEAN_COUPLED, Identity()])
def test_a_mean_that_follows_the_loadings_is_observed_in_their_lengths(coupling):
    """``dmu / d(|w|^2 / 2)`` is ``dSigma_gg/dS``: the information in the mean is one in the lengths."""
    x = coordinates(3, -1.0, -2.0, 0.2)
    params = coupling.expand(x)
    information, zero = np.arange(1.0, ROWS + 1), np.zeros(ROWS)
    moments = np.zeros((ROWS, K + 1, K + 1))
    moments[:, 0, 0] = information
    columns = Columns.at(params.loadings, information, 10, 0.0)
    metric = coupling.pull_back_metric(x, Metric(packed(moments), zero, zero, 0.0, columns))
    longer = x._replace(loadings=(1 + 1e-6) * x.loadings)
    # of mu in half the squared length of the coordinates' loadings
    slope = (coupling.expand(longer).mean - params.mean) / (1e-6 * np.sum(x.loadings**2, 1))
    assert_allclose(metric.columns.lengths, information * slope**2, rtol=1e-4)

"""The coordinates of the parameters and their ranges; Gaussian priors."""

import numpy as np
from numpy.testing import assert_allclose, assert_array_equal

from sknbln.solver.params import (
    LOG_DISPERSION_RANGE,
    NOISE_RANGE,
    GaussianPrior,
    Params,
    dispersion,
    in_model_units,
    moved,
    noise_coordinate,
)

from .reference.ascent import problem


def test_coordinates_and_back():
    d, r = np.array([0.0, 1e-6, 0.3, 50.0]), np.array([1e-3, 1.0, 1e8, np.inf])
    x = Params(np.arange(4.0), np.zeros((4, 0)), noise_coordinate(d), np.log(r))
    params = in_model_units(x)
    assert_allclose(params.noise, d, rtol=1e-12)
    assert_allclose(params.dispersion, 1 / r, rtol=1e-12)
    assert_allclose(dispersion(params), r, rtol=1e-12)
    assert_array_equal(params.noise[0], 0.0)


def test_scales_stay_in_their_ranges():
    x = problem(14)[1]
    step = Params(
        *(np.full(b.shape, s) for b, s in zip(x, (1.0, 1.0, 99.0, -99.0, 1.0), strict=True))
    )
    new = moved(x, step)
    assert_allclose(new.noise, NOISE_RANGE[1])
    assert_allclose(new.dispersion, LOG_DISPERSION_RANGE[0])
    assert_allclose(new.mean, x.mean + 1)


def test_gaussian_prior():
    prior = GaussianPrior(np.array([1.0, 0.0, 2.0]), np.array([4.0, 0.0, 0.25]))
    x = np.array([0.5, np.inf, 4.0])
    assert_allclose(prior.gradient(x), [2.0, 0.0, -0.5])
    assert_allclose(prior.log_density(x), -0.5 * (4 * 0.25 + 0.25 * 4))
    assert GaussianPrior.flat(3).log_density(x) == 0.0

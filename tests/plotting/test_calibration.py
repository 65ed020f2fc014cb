"""Residuals and variances."""

import numpy as np
import pytest
from sklearn.utils import Bunch

from sknbln.plotting import CalibrationDisplay
from sknbln.predictive import (
    predictive_check,
    quantile_residuals,
)

from .displays import legend_texts, line


def test_calibration_draws_residuals_and_variances(model, counts):
    display = CalibrationDisplay.from_estimator(model, counts, n_samples=20, random_state=4)
    rng = np.random.RandomState(4)
    residuals = quantile_residuals(model, counts, n_samples=20, random_state=rng)
    check = predictive_check(model, counts, n_samples=20, random_state=rng)
    np.testing.assert_array_equal(display.residuals, residuals)
    left, right = display.axes_[0]
    grid, median = line(left, "median gene").get_data()
    below = np.mean(residuals[:, :, None] <= grid, axis=0)
    np.testing.assert_allclose(median, np.median(below - grid, axis=0), atol=1e-12)
    for scatter, what in zip(right.collections, [check.observed, check.predicted], strict=True):
        expected = np.column_stack([what.mean, what.variance])
        np.testing.assert_allclose(scatter.get_offsets(), expected)
    assert right.get_xscale() == right.get_yscale() == "log"
    assert f"{display.fraction_outside_:.1%} of 20 genes" in left.get_title()


def test_calibration_of_few_genes_draws_each(model, counts):
    display = CalibrationDisplay.from_estimator(model, counts, genes=["G03", "G00"], n_samples=5)
    left, right = display.axes_[0]
    grid, curve = line(left, "each gene").get_data()
    expected = np.mean(display.residuals[:, 0, None] <= grid, axis=0) - grid
    np.testing.assert_allclose(curve, expected, atol=1e-12)
    assert not any("median" in text for text in legend_texts(right))


def moments(n_genes):
    values = np.linspace(1, 5, n_genes)
    return Bunch(mean=values, variance=2 * values)


def test_calibration_band_holds_95_percent_of_uniform_curves():
    uniform = np.random.default_rng(1).uniform(size=(150, 2000))
    display = CalibrationDisplay(uniform, moments(2000), moments(2000)).plot()
    # binomial: 0.05 +- 0.005; the band's level comes from 2,000 simulated curves: +- 0.005; and
    # counts are whole numbers, so that the band is a little too wide
    assert 0.025 < display.fraction_outside_ < 0.07
    low, high = [
        each.get_ydata() for each in display.axes_[0, 0].lines if each.get_linestyle() == "--"
    ]
    assert np.all(low <= 0) and np.all(high >= 0)


@pytest.mark.parametrize("shape", [(0.6, 0.6), (2.0, 2.0), (1.0, 1.6)])
def test_calibration_sees_residuals_that_are_not_uniform(shape):
    residuals = np.random.default_rng(1).beta(*shape, size=(400, 20))
    display = CalibrationDisplay(residuals, moments(20), moments(20)).plot()
    assert display.fraction_outside_ > 0.9
    middle = line(display.axes_[0, 0], "median gene").get_ydata()
    quarter, three_quarters = middle[16], middle[48]
    # wider, narrower, smaller than predicted: as the docstring reads the curve
    assert (quarter > 0, three_quarters > 0) == {
        0.6: (True, False),
        2.0: (False, True),
        1.6: (True, True),
    }[shape[1]]

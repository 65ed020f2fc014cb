"""Residuals, variances and means."""

import numpy as np
import pytest
from sklearn.utils import Bunch

from sknbln.plotting import CalibrationDisplay
from sknbln.predictive import (
    predictive_check,
    quantile_residuals,
)

from .displays import legend_texts, line


def test_calibration_draws_residuals_variances_and_means(model, counts):
    display = CalibrationDisplay.from_estimator(model, counts, n_samples=20, random_state=4)
    rng = np.random.RandomState(4)
    residuals = quantile_residuals(model, counts, n_samples=20, random_state=rng)
    check = predictive_check(model, counts, n_samples=20, random_state=rng)
    np.testing.assert_array_equal(display.residuals, residuals)
    left, middle, right = display.axes_[0]
    grid, median = line(left, "median gene").get_data()
    below = np.mean(residuals[:, :, None] <= grid, axis=0)
    np.testing.assert_allclose(median, np.median(below - grid, axis=0), atol=1e-12)
    for scatter, what in zip(middle.collections, [check.observed, check.predicted], strict=True):
        expected = np.column_stack([what.mean, what.variance])
        np.testing.assert_allclose(scatter.get_offsets(), expected)
    assert middle.get_xscale() == middle.get_yscale() == "log"
    bars, points = right.collections
    mean, error = check.predicted.mean, 2 * check.spread.mean
    expected = np.column_stack([mean, check.observed.mean / mean])
    np.testing.assert_allclose(points.get_offsets(), expected)
    ends = [[[m, max(1 - e / m, 1e-9)], [m, 1 + e / m]] for m, e in zip(mean, error, strict=True)]
    np.testing.assert_allclose(bars.get_segments(), ends)
    assert right.get_xscale() == right.get_yscale() == "log"
    outside = np.mean(np.abs(check.observed.mean - mean) > error)
    assert display.fraction_means_outside_ == outside
    assert right.get_title().startswith(f"{outside:.1%} of 20 genes leave their bar")
    assert f"{display.fraction_outside_:.1%} of 20 genes" in left.get_title()


def test_calibration_of_few_genes_draws_each(model, counts):
    display = CalibrationDisplay.from_estimator(model, counts, genes=["G03", "G00"], n_samples=5)
    left, *others = display.axes_[0]
    grid, curve = line(left, "each gene").get_data()
    expected = np.mean(display.residuals[:, 0, None] <= grid, axis=0) - grid
    np.testing.assert_allclose(curve, expected, atol=1e-12)
    texts = [text for ax in others for text in legend_texts(ax)]
    assert not any("median" in text for text in texts)


def moments(n_genes):
    values = np.linspace(1, 5, n_genes)
    return Bunch(mean=values, variance=2 * values)


def calibration(residuals):
    """A display with residuals of one's own."""
    same = moments(residuals.shape[1])
    return CalibrationDisplay(residuals, same, same, same).plot()


def test_calibration_band_holds_95_percent_of_uniform_curves():
    uniform = np.random.default_rng(1).uniform(size=(150, 2000))
    display = calibration(uniform)
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
    display = calibration(residuals)
    assert display.fraction_outside_ > 0.9
    middle = line(display.axes_[0, 0], "median gene").get_ydata()
    quarter, three_quarters = middle[16], middle[48]
    # wider, narrower, smaller than predicted: as the docstring reads the curve
    assert (quarter > 0, three_quarters > 0) == {
        0.6: (True, False),
        2.0: (False, True),
        1.6: (True, True),
    }[shape[1]]


def test_calibration_of_means_that_differ():
    predicted = Bunch(mean=np.r_[np.geomspace(0.01, 100, 59), 0.5], variance=np.ones(60))
    ratio = np.r_[np.where(np.arange(59) % 2, 2.0, 1.0), 0.0]  # the last gene was not counted
    observed = Bunch(mean=ratio * predicted.mean, variance=np.ones(60))
    spread = Bunch(mean=np.r_[np.full(59, 0.3), 0.6] * predicted.mean)
    residuals = np.random.default_rng(0).uniform(size=(50, 60))
    display = CalibrationDisplay(residuals, observed, predicted, spread).plot()
    assert display.fraction_means_outside_ == 29 / 60
    ax = display.axes_[0, 2]
    bars, points = ax.collections
    assert len(points.get_offsets()) == len(bars.get_segments()) == 59
    x, y = line(ax, "running median").get_data()
    groups = np.array_split(np.arange(59), 5)
    np.testing.assert_allclose(x, [np.median(predicted.mean[group]) for group in groups])
    np.testing.assert_allclose(y, [np.median(ratio[group]) for group in groups])
    low, high = ax.get_ylim()
    assert low < 0.5 and high > 2


def test_calibration_bars_of_genes_so_rare_that_they_reach_zero():
    same = moments(3)
    residuals = np.random.default_rng(0).uniform(size=(50, 3))
    display = CalibrationDisplay(residuals, same, same, Bunch(mean=2 * same.mean)).plot()
    ax = display.axes_[0, 2]
    low, high = np.array(ax.collections[0].get_segments())[:, :, 1].T
    assert np.all((0 < low) & (low < ax.get_ylim()[0])) and high.tolist() == [5.0] * 3
    assert ax.get_ylim()[1] > 5

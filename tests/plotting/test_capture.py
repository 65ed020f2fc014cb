"""Capture offsets and their prior."""

import copy

import numpy as np
import pytest

from sknbln import NBVCPEstimator
from sknbln.plotting import CaptureDisplay

from .displays import N_CELLS, legend_texts, line


def band(ax):
    """x and both ends of the filled band."""
    x, y = ax.collections[-1].get_paths()[0].vertices.T
    return x, y


@pytest.mark.parametrize("name", ["model", "source", "shrunk"])
def test_capture_draws_the_offsets_and_their_prior(name, counts, request):
    estimator = request.getfixturevalue(name)
    display = CaptureDisplay.from_estimator(estimator)
    ax = display.ax_
    points = ax.collections[0].get_offsets()
    totals = counts.sum(axis=1)
    np.testing.assert_allclose(points, np.column_stack([totals, estimator.capture_offset_]))
    log_m0, sigma = estimator.capture_prior_
    size, centre = line(ax, "prior").get_data()
    np.testing.assert_allclose(centre, log_m0 - np.log(size))
    assert size[0] < totals.min() and size[-1] > totals.max()
    x, y = band(ax)
    distance = np.abs(y - (log_m0 - np.log(x)))
    np.testing.assert_allclose(distance, sigma)
    assert ax.get_xscale() == "log" and ax.get_yscale() == "linear"
    assert ax.get_title() == f"capture prior: log M0 = {log_m0:.3g}, sigma_M = {sigma:.3g}"
    assert legend_texts(ax)[0] == f"cells ({N_CELLS})"


def test_capture_of_equal_library_sizes_has_labels_that_are_apart():
    size = np.linspace(980, 1020, 30)
    ax = CaptureDisplay(size, np.full(30, 2.0), (9.0, 0.5)).plot().ax_
    ax.figure.canvas.draw()
    low, high = ax.get_xlim()
    assert low < 1000 < high  # a power of ten
    assert not any(label.get_text() for label in ax.get_xticklabels(minor=True))


def test_capture_cuts_the_prior_off_at_zero():
    size = np.array([0, 10, 1000])  # a row without counts is drawn at 1
    display = CaptureDisplay(size, np.array([4.0, 2.0, 0.0]), (np.log(100), 0.5)).plot()
    assert display.ax_.collections[0].get_offsets()[:, 0].tolist() == [1, 10, 1000]
    grid, centre = line(display.ax_, "prior").get_data()
    np.testing.assert_allclose(centre, np.maximum(np.log(100 / grid), 0), atol=1e-12)
    x, y = band(display.ax_)
    assert y.min() == 0
    assert y[x > 100 * np.exp(0.6)].max() == 0 and y[x < 100 * np.exp(0.4)].max() > 0


def test_capture_of_frozen_offsets_has_the_prior_of_the_source(model, shrunk):
    own = (9.0, 0.25)
    for estimator in (model, shrunk):
        other = copy.copy(estimator)
        other.capture_prior_ = own
        frozen = "eta" in estimator.frozen_params_
        prior = CaptureDisplay.from_estimator(other).capture_prior
        assert prior == (estimator.capture_prior_ if frozen else own)


def test_capture_refuses_fits_without_a_capture_model(model, counts):
    without = NBVCPEstimator(capture_efficiency=None, random_state=0).fit(counts)
    with pytest.raises(ValueError, match="found an NBVCPEstimator without a capture model"):
        CaptureDisplay.from_estimator(without)
    multinomial = copy.copy(model)
    multinomial.observation = "multinomial"
    with pytest.raises(ValueError, match="with observation='nb' or 'poisson'"):
        CaptureDisplay.from_estimator(multinomial)

"""The spectrum of the loadings."""

import numpy as np
import pytest

from sknbln.plotting import LoadingsSpectrumDisplay

from .displays import N_GENES, legend_texts, line


def test_spectrum_draws_norms_threshold_and_rank(model):
    display = LoadingsSpectrumDisplay.from_estimator(model)
    norms = np.linalg.norm(model.components_, axis=1)
    x, y = line(display.ax_, "counted").get_data()
    assert x.tolist() == [1, 2, 3]
    np.testing.assert_allclose(y, norms)
    assert display.threshold == pytest.approx(0.05 * norms[0])
    np.testing.assert_allclose(line(display.ax_, "5% of").get_ydata(), display.threshold)
    np.testing.assert_allclose(line(display.ax_, "effective rank 3 of 3").get_xdata(), 3.5)
    assert display.ax_.get_yscale() == "log"
    assert "prior" not in " ".join(legend_texts(display.ax_))


def test_spectrum_draws_the_scales_of_a_prior(shrunk):
    display = LoadingsSpectrumDisplay.from_estimator(shrunk)
    found = shrunk.w_prior_diagnostics_
    rank = found["effective_rank"]
    assert rank == 2  # of the simulation: what was pruned is below the axis
    _, y = line(display.ax_, "prior scale").get_data()
    np.testing.assert_allclose(y, found["sigma_k"][:rank] * np.sqrt(N_GENES - 1))
    assert "below the axis" in legend_texts(display.ax_)
    low = display.ax_.get_ylim()[0]
    below = [
        each for each in display.ax_.lines if each.get_marker() == "v" and len(each.get_xdata())
    ]
    assert sorted(len(each.get_xdata()) for each in below) == [1, 1]
    assert all(np.all(each.get_ydata() == low) for each in below)


def test_spectrum_of_vanishing_loadings():
    display = LoadingsSpectrumDisplay(np.zeros(2), 0, 100).plot()
    assert display.threshold == pytest.approx(0.1)
    assert "0.01 nats per gene" in legend_texts(display.ax_)
    assert "counted" not in legend_texts(display.ax_)

"""The course of a fit."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from sknbln.plotting import ConvergenceDisplay

from .displays import N_CELLS, line


def test_convergence_draws_the_history_and_the_decrements(model):
    display = ConvergenceDisplay.from_estimator(model)
    left, right = display.axes_[0]
    history = model.objective_history_
    x, y = line(left, "distance").get_data()
    np.testing.assert_allclose(y, history[-1] - history[:-1])
    assert x.tolist() == list(range(model.n_iter_))
    np.testing.assert_allclose(line(left, "gain").get_ydata(), np.diff(history))
    # the line is where the fit stopped: its last two gains are below, no two in a row before, or the
    # promise of another sweep is below half of it
    smallest = line(left, f"tol = {model.tol_:g} of the objective").get_ydata()[0]
    below = np.diff(history) < smallest
    x, y = line(left, "promise").get_data()
    assert x == [model.n_iter_ + 1] and y == [model.promised_gain_]
    assert below[-2:].all() or 0 < model.promised_gain_ < smallest / 2
    assert not np.any(below[:-2] & below[1:-1])
    assert smallest == pytest.approx(model.tol_ * abs(history[-1]), rel=1e-3)
    assert left.get_title() == f"NBLNEstimator: converged after {model.n_iter_} sweeps"
    decrement = right.lines[0].get_ydata()
    np.testing.assert_allclose(decrement, np.sort(np.maximum(model.newton_decrement_, 1e-16)))
    assert right.get_title() == f"mode not found: 0 of {N_CELLS} rows"
    assert left.get_yscale() == right.get_yscale() == "log"


def test_convergence_says_what_did_not_converge():
    objective, decrement = np.array([-3.0, -2.0, -2.2]), np.array([1e-12, 1e-3, 0.0])
    display = ConvergenceDisplay(objective, False, newton_decrement=decrement, tol=1e-3).plot()
    left, right = display.axes_[0]
    assert left.get_title() == "NOT converged after 2 sweeps"
    np.testing.assert_allclose(line(left, "fall").get_data(), [[2], [0.2]])
    np.testing.assert_allclose(line(left, "distance").get_ydata(), [0.8, 0.2])
    np.testing.assert_allclose(line(left, "tol").get_ydata(), 1e-3 * 2.2)
    assert right.get_title() == "mode not found: 1 of 3 rows"


def test_convergence_of_the_variational_fit(source):
    display = ConvergenceDisplay.from_estimator(source)
    assert display.axes_.shape == (1, 1)
    ax = display.axes_[0, 0]
    np.testing.assert_array_equal(line(ax, "each step").get_ydata(), source.loss_curve_)
    x, y = line(ax, "mean of 25").get_data()
    assert x[0] == 13 and y[0] == pytest.approx(source.loss_curve_[:25].mean())
    assert ax.get_title().startswith("NBVCPEstimator: ")
    # one axes is enough for one panel
    ax = plt.subplots()[1]
    assert ConvergenceDisplay.from_estimator(source, ax=ax).axes_[0, 0] is ax

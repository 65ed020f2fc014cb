"""Differences of held-out log-likelihood between models."""

import numpy as np
import pytest

from sknbln.plotting import ComparisonDisplay

from .displays import comparison


def test_comparison_draws_differences_with_their_errors_and_the_best_at_the_top():
    result = comparison()
    display = ComparisonDisplay.from_comparison(result)
    points, _, (bars,) = display.errorbar_
    np.testing.assert_array_equal(points.get_xdata(), result.table["difference"])
    ends = np.array([segment[:, 0] for segment in bars.get_segments()])
    wanted = result.table["difference"].to_numpy()[:, None]
    wanted = wanted + result.table["difference_standard_error"].to_numpy()[:, None] * [-1, 1]
    np.testing.assert_allclose(ends, wanted)
    names = [label.get_text() for label in display.ax_.get_yticklabels()]
    assert names == list(result.table.index)
    low, high = display.ax_.get_ylim()
    assert low > high  # downwards: position 0, the best, is at the top
    assert points.get_ydata()[0] == 0 and points.get_xdata()[0] == 0
    first = display.ax_.texts[0].get_text()
    assert first == "\N{MINUS SIGN}1.5 ± 0.5"


def test_comparison_takes_what_compare_returns():
    with pytest.raises(TypeError, match=r"expected what .*compare returned; found DataFrame"):
        ComparisonDisplay.from_comparison(comparison().table)

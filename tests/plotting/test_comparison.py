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
    # to two digits of the error, none beside the best
    texts = [text.get_text() for text in display.ax_.texts]
    assert texts == ["\N{MINUS SIGN}1.50 ± 0.50", "\N{MINUS SIGN}20.0 ± 2.0"]


@pytest.mark.parametrize(
    "difference, error, text",
    [(-59.4, 134.0, "59 ± 134"), (-0.0806, 0.0488, "0.081 ± 0.049"), (-1.0, np.nan, "1.00 ± nan")],
)
def test_differences_are_written_as_precisely_as_they_are_known(difference, error, text):
    display = ComparisonDisplay([0.0, difference], [0.0, error], ["a", "b"]).plot()
    assert display.ax_.texts[0].get_text() == "\N{MINUS SIGN}" + text


def test_comparison_takes_what_compare_returns():
    with pytest.raises(TypeError, match=r"expected what .*compare returned; found DataFrame"):
        ComparisonDisplay.from_comparison(comparison().table)

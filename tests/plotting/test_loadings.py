"""The spectrum of the loadings."""

import matplotlib.pyplot as plt
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
    assert display.axes_.tolist() == [[display.ax_]]  # the number of factors was given
    assert not display.ax_.get_title()
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


# ------------------------------------------------------------------ how the number of factors was found


def diagnostics(eigenvalues, rank, information=None, largest=2.0, threshold=2.2):
    """As `rank_diagnostics_`: 51 eigenvalues, of which these are above those of noise."""
    eigenvalues = np.append(eigenvalues, np.geomspace(0.95 * largest, 0.4, 51 - len(eigenvalues)))
    return {
        "score_eigenvalues": eigenvalues,
        "null_eigenvalues": largest * np.linspace(0.9, 1.0, 8),
        "null_threshold": threshold,
        "score_rank": rank,
        "column_information": information if information is None else np.asarray(information),
        "noise_edge": None if information is None else 1.6,
    }


FOUND = {
    "factors": ([3.0, 2.0], 2, diagnostics([30.0, 9.0, 2.4], 3, [25.0, 5.0, 0.9])),
    "null": ([0.0], 0, diagnostics([], 0)),
    "dropped": ([0.0], 0, diagnostics([2.5], 1, [1.1])),
    "weak": ([0.4, 0.3, 0.2], 3, diagnostics([2.5, 2.4, 2.3], 3, [1.9, 1.8, 1.7])),
    "many": (np.geomspace(9, 1, 50), 50, diagnostics(np.geomspace(9, 2.3, 50), 50, np.ones(50))),
}


def drawn(name, ax=None):
    norms, rank, found = FOUND[name]
    return LoadingsSpectrumDisplay(np.asarray(norms), rank, 40, rank_diagnostics=found).plot(ax)


def test_scree_plot_has_the_eigenvalues_and_those_of_permuted_scores(shrunk):
    """Of a fit with fewer than 200 rows: columns are not looked at after a few sweeps."""
    found = shrunk.rank_diagnostics_
    display = LoadingsSpectrumDisplay.from_estimator(shrunk)
    assert display.axes_.shape == (1, 2) and display.ax_ is display.axes_[0, 1]
    ax, rank = display.axes_[0, 0], found["score_rank"]
    assert rank == 2
    np.testing.assert_allclose(line(ax, "counted").get_ydata(), found["score_eigenvalues"][:rank])
    low, high = ax.get_ylim()
    shown = found["score_eigenvalues"][found["score_eigenvalues"] > low]
    assert shown.size > rank + 1
    np.testing.assert_allclose(line(ax, "not counted").get_ydata(), shown[rank:])
    (band,) = ax.patches
    edges = band.get_y(), band.get_y() + band.get_height()
    null = found["null_eigenvalues"]
    np.testing.assert_allclose(edges, [null.min(), null.max()])
    np.testing.assert_allclose(line(ax, "threshold").get_ydata(), found["null_threshold"])
    np.testing.assert_allclose(line(ax, "2 factors").get_xdata(), rank + 0.5)
    assert high > found["score_eigenvalues"].max()


def test_columns_after_a_few_sweeps_are_drawn_against_the_edge_of_the_noise():
    display = drawn("factors")
    assert display.axes_.shape == (1, 3)
    ax = display.axes_[0, 1]
    assert line(ax, "above the edge").get_ydata().tolist() == [25.0, 5.0]
    x, y = line(ax, "below the edge").get_data()
    assert (x.tolist(), y.tolist()) == ([3], [0.9])
    np.testing.assert_allclose(line(ax, "edge of the noise 1.6").get_ydata(), 1.6)
    assert ax.get_ylim()[0] < 0.9
    # where all are above it, it is on the picture too
    low, high = drawn("weak").axes_[0, 1].get_ylim()
    assert low < 1.6 < high


def test_genes_without_counts_have_no_spectrum():
    found = {
        **diagnostics([], 0, threshold=0.0),
        "score_eigenvalues": np.zeros(1),
        "null_eigenvalues": np.zeros(8),
    }
    display = LoadingsSpectrumDisplay(np.zeros(1), 0, 4, rank_diagnostics=found).plot()
    display.figure_.canvas.draw()
    texts = legend_texts(display.axes_[0, 0])
    assert {"0 factors", "below the axis"} <= set(texts)


def places(ax):
    """Points of the data in pixels."""
    values = [each.get_xydata() for each in ax.lines if each.get_marker() in ("o", "x", "v")]
    return ax.transData.transform(np.concatenate(values))


@pytest.mark.parametrize("layout", ["own", "divided"])
@pytest.mark.parametrize("name", FOUND)
def test_no_legend_hides_a_value_and_no_text_is_cut_off(name, layout):
    figure = None if layout == "own" else plt.figure(figsize=(13, 4))
    display = drawn(name, None if layout == "own" else figure.subplots())
    display.figure_.canvas.draw()
    for ax in display.axes_.flat:
        assert len(places(ax))
        assert not ax.get_legend().get_window_extent().padded(3).count_contains(places(ax))
    width, height = display.figure_.get_size_inches()
    around = display.figure_.get_tightbbox()
    assert around.x0 > -0.02 and around.y0 > -0.02
    assert around.x1 < width + 0.02 and around.y1 < height + 0.02


def test_the_panels_are_drawn_on_the_callers_axes():
    figure, axes = plt.subplots(1, 3)
    display = drawn("factors", axes)
    assert display.axes_.ravel().tolist() == axes.tolist() and display.ax_ is axes[2]
    half = plt.figure().subfigures(1, 2)[1]
    assert drawn("factors", half).figure_ is half and len(half.axes) == 3
    figure, ax = plt.subplots()
    assert drawn("null", ax).axes_.shape == (1, 2)
    assert not ax.axison and len(figure.axes) == 3
    with pytest.raises(ValueError, match="ax holds 2 axes, this picture needs 3"):
        drawn("factors", plt.subplots(1, 2)[1])

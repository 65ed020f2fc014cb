"""Histograms of counts and replicates."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from sknbln.plotting import PPCDisplay
from sknbln.predictive import posterior_predictive

from .displays import N_CELLS, N_GENES, line


def test_ppc_draws_the_histograms_of_counts_and_replicates(model, counts):
    options = dict(level="marginal", n_samples=40, random_state=5)
    display = PPCDisplay.from_estimator(model, counts, genes=["G07", "G02"], **options)
    draws = posterior_predictive(model, counts, genes=["G07", "G02"], **options)
    assert [panel.name for panel in display.panels] == ["G07", "G02"]
    for j, (panel, ax) in enumerate(zip(display.panels, display.axes_.flat, strict=True)):
        observed = counts[panel.name].to_numpy()
        edges = panel.edges
        assert edges[0] == 0 and edges[-1] == np.inf and len(np.unique(np.diff(edges[:-1]))) == 1
        np.testing.assert_allclose(panel.observed, np.histogram(observed, edges)[0] / N_CELLS)
        predicted = [np.histogram(draw[:, j], edges)[0] / N_CELLS for draw in draws]
        np.testing.assert_allclose(panel.predicted, predicted)
        x, y = line(ax, "observed").get_data()
        np.testing.assert_allclose(y, panel.observed)
        middles = (edges[:-2] + edges[1:-1] - 1) / 2  # of the whole numbers in a bin
        np.testing.assert_allclose(x[:-1], middles)
        wide, narrow, median = [each.get_data() for each in ax.patches]
        low, high = np.quantile(predicted, [0.05, 0.95], axis=0)
        np.testing.assert_allclose((wide.baseline, wide.values), (low, high), atol=1e-12)
        low, high = np.quantile(predicted, [0.25, 0.75], axis=0)
        np.testing.assert_allclose((narrow.baseline, narrow.values), (low, high), atol=1e-12)
        np.testing.assert_allclose(median.values, np.median(predicted, axis=0))
        assert ax.get_title() == f"{panel.name}\nmean {observed.mean():.3g}"
        assert ax.get_xticklabels()[-1].get_text() == f"≥{edges[-2]:.0f}"
    (legend,) = display.figure_.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "predicted, 90% of replicates",
        "predicted, 50% of replicates",
        "predicted, median",
        "observed",
    ]
    assert display.figure_.get_suptitle().endswith("marginal\n40 replicates")


def test_ppc_spreads_genes_over_mean_expression(model, counts):
    counts = counts.copy()
    counts["G04"] = 0  # never counted: not chosen
    display = PPCDisplay.from_estimator(model, counts, n_genes=7, n_samples=2, n_cols=4)
    order = counts.mean().sort_values().index.drop("G04")
    places = [order.get_loc(panel.name) for panel in display.panels]
    assert places == [0, 3, 6, 9, 12, 15, 18]
    assert display.axes_.shape == (2, 4)
    with pytest.raises(ValueError, match="'n_cols' parameter"):
        display.plot(n_cols=0)
    visible = [ax.get_visible() for ax in display.axes_.flat]
    assert visible == [True] * 7 + [False]
    everything = PPCDisplay.from_estimator(model, counts, n_genes=50, n_samples=2)
    assert len(everything.panels) == N_GENES - 1
    with pytest.raises(ValueError, match="there are no genes to choose"):
        PPCDisplay.from_estimator(model, counts * 0, n_samples=2)


def test_ppc_one_huge_count_does_not_set_the_bins(model, counts):
    extreme = counts.copy()
    extreme.loc[0, "G07"] = 10**6
    (panel,) = PPCDisplay.from_estimator(model, extreme, genes=["G07"], n_samples=2).panels
    assert panel.edges[-2] <= 2 * counts["G07"].max()
    assert panel.observed[-1] > 0 and panel.observed.sum() == pytest.approx(1)


def test_ppc_takes_more_axes_than_genes(source, counts):
    axes = plt.subplots(2, 3)[1]
    display = PPCDisplay.from_estimator(source, counts, n_genes=4, n_samples=2, ax=axes)
    assert display.axes_.shape == (2, 3) and not display.figure_.legends
    assert [ax.get_visible() for ax in axes.flat] == [True] * 4 + [False] * 2
    with pytest.raises(ValueError, match="ax holds 6 axes, this picture needs 7"):
        PPCDisplay.from_estimator(source, counts, n_genes=7, n_samples=2, ax=plt.subplots(2, 3)[1])

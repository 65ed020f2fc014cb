"""Correlations of genes."""

import numpy as np
import pytest

from sknbln.plotting import CorrelationDisplay

from .displays import N_GENES


def test_correlation_is_the_estimators_in_another_order(model):
    display = CorrelationDisplay.from_estimator(model)
    assert sorted(display.genes) == list(range(N_GENES))
    expected = model.get_correlation()[np.ix_(display.genes, display.genes)]
    np.testing.assert_array_equal(np.asarray(display.im_.get_array()), expected)
    low, high = display.im_.get_clim()
    assert low == -high
    names = [label.get_text() for label in display.ax_.get_xticklabels()]
    assert names == list(model.feature_names_in_[display.genes])
    assert display.colorbar_.ax.get_ylabel() == "correlation"


def test_correlation_of_factors(model):
    display = CorrelationDisplay.from_estimator(model, kind="factors")
    S = model.components_.T @ model.components_
    expected = S / np.sqrt(np.outer(np.diag(S), np.diag(S)))
    order = np.ix_(display.genes, display.genes)
    np.testing.assert_allclose(display.correlation, expected[order], atol=1e-12)
    with pytest.raises(ValueError, match="'kind' parameter"):
        CorrelationDisplay.from_estimator(model, kind="counts")


def test_correlation_of_chosen_and_of_the_most_connected_genes(model):
    display = CorrelationDisplay.from_estimator(model, genes=["G05", "G02", "G11", "G07"])
    assert sorted(display.names) == ["G02", "G05", "G07", "G11"]
    C = model.get_correlation()
    np.testing.assert_array_equal(display.correlation, C[np.ix_(display.genes, display.genes)])
    assert "4 of 20 genes" in display.ax_.get_title()

    display = CorrelationDisplay.from_estimator(model, n_genes=6)
    connected = np.sum((C - np.eye(N_GENES)) ** 2, axis=1)
    assert set(display.genes) == set(np.argsort(-connected)[:6])
    assert "6 most connected of 20 genes" in display.ax_.get_title()
    display.figure_.canvas.draw()
    title = display.ax_.title.get_window_extent()
    assert 0 <= title.x0 and title.x1 <= display.figure_.bbox.width  # not cut off
    with pytest.raises(ValueError, match="'n_genes' parameter"):
        CorrelationDisplay.from_estimator(model, n_genes=0)


def test_correlation_puts_the_members_of_a_module_side_by_side(model):
    from sknbln.plotting._correlation import _seriation

    module = np.random.default_rng(0).integers(0, 3, 40)
    C = np.where(module[:, None] == module, 0.8, -0.3)
    np.fill_diagonal(C, 1.0)
    assert np.count_nonzero(np.diff(module[_seriation(C)])) == 2


def test_correlation_of_many_genes_is_not_named():
    rng = np.random.default_rng(0)
    C = np.corrcoef(rng.standard_normal((2000, 5)))
    display = CorrelationDisplay(C, [f"gene {i}" for i in range(2000)]).plot(vmax=0.5)
    assert len(display.ax_.get_xticks()) == 0
    assert display.ax_.get_xlabel() == "2000 genes"
    assert display.im_.get_clim() == (-0.5, 0.5) and display.colorbar_.extend == "both"

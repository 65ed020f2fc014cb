"""Correlations of genes."""

import numpy as np
import pytest

from sknbln.plotting import CorrelationDisplay

from .displays import N_GENES


def test_correlation_is_the_estimators_in_another_order(model):
    display = CorrelationDisplay.from_estimator(model)
    assert sorted(display.genes) == list(range(N_GENES))
    # to the bit; of genes in another order the matrix products differ by rounding
    expected = model.get_correlation().to_numpy()[np.ix_(display.genes, display.genes)]
    np.testing.assert_array_equal(np.asarray(display.im_.get_array()), expected)
    low, high = display.im_.get_clim()
    assert low == -high
    names = [label.get_text() for label in display.ax_.get_xticklabels()]
    assert names == list(model.feature_names_in_[display.genes])
    assert display.colorbar_.ax.get_ylabel() == "correlation"


def test_correlation_of_factors(model):
    display = CorrelationDisplay.from_estimator(model, scale="factors")
    S = model.components_.T @ model.components_
    expected = S / np.sqrt(np.outer(np.diag(S), np.diag(S)))
    order = np.ix_(display.genes, display.genes)
    np.testing.assert_allclose(display.correlation, expected[order], atol=1e-12)
    with pytest.raises(ValueError, match="'scale' parameter"):
        CorrelationDisplay.from_estimator(model, scale="counts")


def test_correlation_of_chosen_and_of_the_most_connected_genes(model):
    display = CorrelationDisplay.from_estimator(model, genes=["G05", "G02", "G11", "G07"])
    assert sorted(display.names) == ["G02", "G05", "G07", "G11"]
    C = model.get_correlation().to_numpy()
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


def test_correlation_marks_pairs_below_a_q(model, counts):
    test = model.correlation_test(counts)
    q = np.nanquantile(test.q_value, 0.3)
    display = CorrelationDisplay.from_estimator(
        model, scale="expression", test=test, q=q, genes=range(2, 12)
    )
    x, y = display.marks_.get_offsets().data.astype(int).T
    values = test.q_value[display.genes[y], display.genes[x]]
    assert len(x) == np.sum(test.q_value[2:12, 2:12] <= q) > 0
    assert np.all(values <= q)
    expected = model.get_correlation("expression", genes=display.genes)
    np.testing.assert_array_equal(display.correlation, expected)
    with pytest.raises(ValueError, match="give the test of all pairs"):
        few = model.correlation_test(counts, genes=[0, 1])
        CorrelationDisplay.from_estimator(model, test=few)

"""Compositions of cells, gene by gene."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from sknbln.plotting import CompositionalCornerDisplay, CompositionalGridDisplay
from sknbln.predictive import compositional_samples

from .displays import N_CELLS, legend_texts, line


def heights(ax):
    """The histogram of the cells."""
    (found,) = [each.get_data() for each in ax.patches if hasattr(each, "get_data")]
    return found


def area(fill):
    """Area under a filled curve, which runs along 0 and back along the curve."""
    x, y = fill.get_paths()[0].vertices.T
    return abs(np.sum((x[1:] - x[:-1]) * (y[1:] + y[:-1]) / 2))


def test_grid_draws_model_cells_and_pseudobulk(model, counts):
    genes = ["G01", "G05", "G11"]
    options = dict(n_samples=300, genes=genes, random_state=1)
    display = CompositionalGridDisplay.from_estimator(model, counts, n_cols=3, **options)
    found = compositional_samples(model, counts, **options)
    np.testing.assert_array_equal(display.model, found.model)
    assert display.axes_.shape == (1, 3)
    pseudobulk = np.log10(counts.sum() / counts.to_numpy().sum())
    for j, (gene, ax) in enumerate(zip(genes, display.axes_.flat, strict=True)):
        shares = found.cells[:, j]
        positive = np.log10(shares[shares > 0])
        drawn = heights(ax)
        expected = np.histogram(positive, drawn.edges)[0] / (N_CELLS * np.diff(drawn.edges))
        np.testing.assert_allclose(drawn.values, expected)
        assert np.sum(drawn.values * np.diff(drawn.edges)) == pytest.approx(np.mean(shares > 0))
        assert area(ax.collections[0]) == pytest.approx(1, abs=0.01)
        np.testing.assert_allclose(line(ax, "pseudobulk").get_xdata(), pseudobulk[gene])
        zeros = (counts[gene] == 0).mean()
        assert ax.get_title() == (f"{gene}\n{zeros:.1%} of cells are 0" if zeros else gene)
        assert ax.get_xlabel() == "log10 share"
    texts = [text.get_text() for text in display.figure_.legends[0].get_texts()]
    assert texts[:2] == ["model before count noise", f"cells, counts / total ({N_CELLS})"]


def test_grid_shows_the_genes_of_the_corner(model, source, counts):
    for estimator in (model, source):
        options = dict(n_genes=5, n_samples=10)
        grid = CompositionalGridDisplay.from_estimator(estimator, counts, **options)
        corner = CompositionalCornerDisplay.from_estimator(estimator, counts, **options)
        assert list(grid.names) == list(corner.names)
    assert [ax.get_visible() for ax in grid.axes_.flat] == [True] * 5 + [False]
    assert [bool(ax.get_xlabel()) for ax in grid.axes_.flat] == [False] * 2 + [True] * 3 + [False]
    for options in (dict(n_genes=0), dict(n_cols=0), dict(n_samples=0)):
        with pytest.raises(ValueError, match=f"'{next(iter(options))}' parameter"):
            CompositionalGridDisplay.from_estimator(model, counts, **options)


def test_grid_of_a_gene_that_was_never_counted(model, counts):
    counts = counts.copy()
    counts["G04"] = 0
    display = CompositionalGridDisplay.from_estimator(model, counts, genes=["G04"])
    (ax,) = display.axes_.flat
    assert ax.get_title() == "G04\n100.0% of cells are 0"
    assert ax.get_ylim()[1] > 0 and not ax.lines
    with pytest.raises(ValueError, match="X has no counts"):
        CompositionalGridDisplay.from_estimator(model, counts * 0)


def test_grid_of_genes_without_zeros():
    shares = np.random.default_rng(0).uniform(0.01, 0.02, (50, 2))
    display = CompositionalGridDisplay(shares, shares, shares.mean(axis=0), ["a", "b"]).plot()
    assert [ax.get_title() for ax in display.axes_.flat] == ["a", "b"]
    # no axis has room for zeros
    assert all(ax.get_xlim()[0] > -2.1 for ax in display.axes_.flat)


def test_grid_takes_more_axes_than_genes(source, counts):
    axes = plt.subplots(2, 3)[1]
    display = CompositionalGridDisplay.from_estimator(source, counts, n_genes=4, ax=axes)
    assert not display.figure_.legends and legend_texts(axes[0, 0])
    assert [ax.get_visible() for ax in axes.flat] == [True] * 4 + [False] * 2
    with pytest.raises(ValueError, match="ax holds 6 axes, this picture needs 7"):
        CompositionalGridDisplay.from_estimator(source, counts, n_genes=7, ax=axes)

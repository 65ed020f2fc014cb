"""Compositions of cells, pair by pair."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.contour import ContourSet

from sknbln.plotting import CompositionalCornerDisplay
from sknbln.plotting._common import VERMILLION
from sknbln.predictive import compositional_samples

from .displays import N_CELLS, legend_texts


def test_corner_draws_cells_zeros_and_pseudobulk(model, counts):
    genes = ["G01", "G05", "G11"]
    display = CompositionalCornerDisplay.from_estimator(
        model, counts, genes=genes, n_samples=300, random_state=1
    )
    found = compositional_samples(model, counts, n_samples=300, genes=genes, random_state=1)
    np.testing.assert_array_equal(display.model, found.model)
    assert display.axes_.shape == (3, 3)
    for row, col in np.ndindex(3, 3):
        ax = display.axes_[row, col]
        assert (ax.get_visible() and ax.axison) == (row >= col)
        if row <= col:
            continue
        drawn = ax.collections[0].get_offsets()
        some = found.cells > 0
        for j, gene, limit in ((0, col, ax.get_xlim()[0]), (1, row, ax.get_ylim()[0])):
            seen, zero = some[:, gene], ~some[:, gene]
            np.testing.assert_allclose(drawn[seen, j], np.log10(found.cells[seen, gene]))
            # zeros are inside the axes and apart from all that has a logarithm
            assert np.all(drawn[zero, j] > limit)
            if zero.any():
                assert drawn[zero, j].max() < drawn[seen, j].min()
        expected = np.log10(counts.sum() / counts.to_numpy().sum())
        across, up = (each for each in ax.lines if each.get_color() == VERMILLION)
        np.testing.assert_allclose(across.get_xdata(), expected[genes[col]])
        np.testing.assert_allclose(up.get_ydata(), expected[genes[row]])
    for j, gene in enumerate(genes):
        zeros = (counts[gene] == 0).mean()
        diagonal = display.axes_[j, j]
        (heights,) = [each.get_data() for each in diagonal.patches if hasattr(each, "get_data")]
        area = np.sum(heights.values * np.diff(heights.edges))
        assert area == pytest.approx(1 - zeros) and heights.values.max() < diagonal.get_ylim()[1]
        title = diagonal.get_title()
        assert title == (f"{gene}\n{zeros:.1%} of cells are 0" if zeros else gene)
        assert display.axes_[2, j].get_xlabel() == f"{gene}\nlog10 share"
    texts = legend_texts(display.axes_[0, 2])  # in the empty half
    assert texts[0] == f"cells, counts / total ({N_CELLS})"
    assert "zeros (strips at the edge)" in texts


def test_corner_contours_hold_their_share_of_the_model():
    rng = np.random.default_rng(0)
    log = rng.multivariate_normal([-2, -3], [[0.1, 0.06], [0.06, 0.08]], 20_000)
    display = CompositionalCornerDisplay(10**log, 10 ** log[:50], 10 ** log[0], ["a", "b"]).plot()
    (contours,) = [
        each
        for each in display.axes_[1, 0].collections
        if isinstance(each, ContourSet) and not each.filled
    ]
    inside = [np.mean(path.contains_points(log)) for path in contours.get_paths()]
    # smoothing widens them a little, more where there are fewer points
    np.testing.assert_allclose(inside, [0.9, 0.5], atol=0.03)
    texts = [text.get_text() for text in display.figure_.legends[0].get_texts()]
    assert not any("zeros" in text for text in texts)


def test_corner_chooses_genes_that_can_be_read(model, source, counts):
    often = (counts > 0).mean() >= 0.5
    display = CompositionalCornerDisplay.from_estimator(source, counts, n_genes=3, n_samples=10)
    assert list(display.names) == list(counts.mean()[often].nlargest(3).index)
    display = CompositionalCornerDisplay.from_estimator(model, counts, n_genes=3, n_samples=10)
    length = pd.Series(np.linalg.norm(model.components_, axis=0), counts.columns)
    assert list(display.names) == list(length[often].nlargest(3).index)
    rare = counts * (np.arange(N_CELLS) % 3 == 0)[:, None]
    display = CompositionalCornerDisplay.from_estimator(model, rare, n_genes=2, n_samples=10)
    assert set(display.names) == set((rare > 0).mean().nlargest(2).index)
    with pytest.raises(ValueError, match="'n_genes' parameter"):
        CompositionalCornerDisplay.from_estimator(model, counts, n_genes=1)
    with pytest.raises(ValueError, match="two genes or more; found 1"):
        CompositionalCornerDisplay.from_estimator(model, counts, genes=["G03"])


def test_corner_of_a_gene_that_was_never_counted(model, counts):
    counts = counts.copy()
    counts["G04"] = 0
    display = CompositionalCornerDisplay.from_estimator(model, counts, genes=["G04", "G01", "G02"])
    assert display.axes_[0, 0].get_title() == "G04\n100.0% of cells are 0"
    display.figure_.canvas.draw()
    assert "pseudobulk" in legend_texts(display.axes_[0, 2])  # in the panel of the other two

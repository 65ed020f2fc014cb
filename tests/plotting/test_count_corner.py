"""Counts of cells and replicates, pair by pair."""

import numpy as np
import pytest
from matplotlib.contour import ContourSet

from sknbln.plotting import CountCornerDisplay
from sknbln.predictive import posterior_predictive

from .displays import N_CELLS, legend_texts
from .test_grid import area, heights


def around(counts, seed):
    """log10 of positive counts n, each somewhere between n - 1/2 and n + 1/2."""
    low, high = np.log10(counts - 0.5), np.log10(counts + 0.5)
    return low + (high - low) * np.random.default_rng(seed).uniform(size=low.size)


def test_counts_draws_cells_and_replicates_and_their_zeros(model, counts):
    genes = ["G01", "G05", "G11"]
    options = dict(genes=genes, level="marginal", n_samples=6, random_state=1)
    display = CountCornerDisplay.from_estimator(model, counts, **options)
    draws = posterior_predictive(model, counts, **options)
    np.testing.assert_array_equal(display.replicates, draws.reshape(-1, 3))
    cells = counts[genes].to_numpy()
    np.testing.assert_array_equal(display.cells, cells)
    for row, col in zip(*np.tril_indices(3, -1), strict=True):
        ax = display.axes_[row, col]
        drawn = ax.collections[0].get_offsets()
        for j, gene, limit in ((0, col, ax.get_xlim()[0]), (1, row, ax.get_ylim()[0])):
            n, place = cells[:, gene], drawn[:, j]
            assert np.all(np.abs(10 ** place[n > 0] - n[n > 0]) <= 0.5 + 1e-9)
            assert np.all((limit < place[n == 0]) & (place[n == 0] < np.log10(0.5)))
    for j, gene in enumerate(genes):
        ax, zeros = display.axes_[j, j], (draws[:, :, j] == 0).mean()
        seen = (counts[gene] > 0).mean()
        values, edges, _ = heights(ax)
        # bins hold whole counts
        n_binned = np.histogram(counts[gene], 10**edges)[0]
        np.testing.assert_allclose(values * np.diff(edges), n_binned / N_CELLS, atol=1e-12)
        assert np.sum(values * np.diff(edges)) == pytest.approx(seen)
        assert area(ax.collections[0]) == pytest.approx(1 - zeros, abs=0.01)
        expected = f"{gene}\n{1 - seen:.1%} of cells,\n{zeros:.1%} of replicates are 0"
        assert ax.get_title() == (gene if seen == 1 and zeros == 0 else expected)
        assert display.axes_[2, j].get_xlabel() == f"{gene}\nlog10 count"
    corner = display.axes_[0, 2]
    texts = [f"cells ({N_CELLS})", "replicates, 50%, 90%", "zeros (strips at the edge)"]
    assert legend_texts(corner) == texts
    assert corner.get_legend().get_title().get_text() == "Counts, marginal"


def test_counts_are_drawn_the_same_every_time(source, counts):
    options = dict(n_genes=2, n_samples=2, random_state=0)
    drawn = [
        CountCornerDisplay.from_estimator(source, counts, **options).axes_[1, 0].collections[0]
        for _ in range(2)
    ]
    np.testing.assert_array_equal(*(each.get_offsets() for each in drawn))


def test_counts_of_two_genes_are_spread_out_independently():
    ones = np.ones((500, 2))
    ax = CountCornerDisplay(ones, ones, ["a", "b"]).plot().axes_[1, 0]
    x, y = ax.collections[0].get_offsets().T
    # independent: standard error 1 / sqrt(500)
    assert abs(np.corrcoef(x, y)[0, 1]) < 0.2
    assert np.ptp(x) > 0.9 * np.log10(3) and np.ptp(y) > 0.9 * np.log10(3)


def test_counts_contours_hold_their_share_of_the_replicates():
    rng = np.random.default_rng(0)
    log_rate = rng.multivariate_normal([1, 2], [[0.8, 0.5], [0.5, 1.0]], 30_000)
    draws = rng.poisson(np.exp(log_rate))
    display = CountCornerDisplay(draws, draws[:100], ["a", "b"]).plot()
    contours = [c for c in display.axes_[1, 0].collections if isinstance(c, ContourSet)]
    both = np.all(draws > 0, axis=1)
    points = np.column_stack([around(draws[both, j], j) for j in (0, 1)])
    inside = [np.mean(path.contains_points(points)) for path in contours[1].get_paths()]
    # smoothing widens them a little, most where small counts end abruptly
    np.testing.assert_allclose(inside, [0.9, 0.5], atol=0.03)
    # along the strip of the second gene the first, and the reverse
    for filled, gene in ((contours[2], 0), (contours[4], 1)):
        zero = (draws[:, 1 - gene] == 0) & (draws[:, gene] > 0)
        values = around(draws[zero, gene], 2)
        ends = [path.vertices[:, gene] for path in filled.get_paths()]
        held = [np.mean((end.min() < values) & (values < end.max())) for end in ends]
        np.testing.assert_allclose(held, [0.9, 0.5], atol=0.05)
    assert len(contours) == 6


def test_counts_of_rare_genes():
    cells = np.zeros((200, 3), int)
    cells[:3, 1] = 1
    display = CountCornerDisplay(cells, cells, ["never", "three", "never either"]).plot()
    display.figure_.canvas.draw()
    title = display.axes_[1, 1].get_title()
    assert title == "three\n98.5% of cells,\n98.5% of replicates are 0"
    # fewer replicates than 1 % have no contours, nor have those where both are zero
    contours = [
        len([c for c in display.axes_[pair].collections if isinstance(c, ContourSet)])
        for pair in ((1, 0), (2, 0), (2, 1))
    ]
    assert contours == [2, 0, 2]
    one = cells.copy()
    one[1:] = 0
    (ax,) = [CountCornerDisplay(one, cells, ["never", "once"]).plot().axes_[1, 0]]
    assert not [c for c in ax.collections if isinstance(c, ContourSet)]


def test_counts_of_fractions():
    cells = np.full((50, 2), 0.3)
    ax = CountCornerDisplay(cells, cells, ["a", "b"]).plot().axes_[1, 0]
    drawn = 10 ** ax.collections[0].get_offsets()
    assert np.all((0.15 <= drawn) & (drawn <= 0.8))


def test_counts_refuses(model, counts):
    with pytest.raises(ValueError, match="'n_genes' parameter"):
        CountCornerDisplay.from_estimator(model, counts, n_genes=1)
    with pytest.raises(ValueError, match="two genes or more; found 1"):
        CountCornerDisplay.from_estimator(model, counts, genes=["G03"], n_samples=1)
    with pytest.raises(ValueError, match="capture='prior' draws totals afresh"):
        CountCornerDisplay.from_estimator(model, counts, capture="prior")

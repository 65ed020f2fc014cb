"""Cells in the space of the factors."""

import copy

import numpy as np
import pandas as pd
import pytest

from sknbln.plotting import EmbeddingDisplay

from .displays import N_CELLS, legend_texts


def test_embedding_draws_the_scores(model, counts):
    display = EmbeddingDisplay.from_estimator(model, counts, components=(2, 0))
    scores = model.transform(counts)[:, [2, 0]]
    np.testing.assert_array_equal(display.scatters_[0].get_offsets(), scores)
    share = model.explained_variance_ratio_
    assert display.ax_.get_xlabel() == f"component 3, nats ({share[2]:.1%} of variance)"
    assert display.ax_.get_ylabel() == f"component 1, nats ({share[0]:.1%} of variance)"
    assert display.legend_ is None and display.ax_.get_legend() is None


def test_embedding_of_standardized_scores_says_so(model, counts):
    whitened = copy.copy(model).set_params(whiten=True)
    display = EmbeddingDisplay.from_estimator(whitened, counts, ellipses=5)
    share = model.explained_variance_ratio_[0]
    assert display.ax_.get_xlabel() == f"component 1, standardized ({share:.1%} of variance)"
    norms = np.linalg.norm(model.components_, axis=1)[:2]
    in_nats = EmbeddingDisplay.from_estimator(model, counts, ellipses=5)
    np.testing.assert_allclose(display.embedding * norms, in_nats.embedding)
    np.testing.assert_allclose(display.covariance * np.outer(norms, norms), in_nats.covariance)


@pytest.mark.parametrize("components", [(0, 3), (0, 0), (0,), (0.0, 1.0), "01", (-1, 0)])
def test_embedding_refuses_components_that_are_not_there(model, counts, components):
    with pytest.raises(ValueError, match="expected two different columns"):
        EmbeddingDisplay.from_estimator(model, counts, components=components)


def test_embedding_groups(model, counts):
    kind = pd.Series(np.where(np.arange(N_CELLS) % 3 == 0, "b", "a"), name="kind", dtype=object)
    kind[5] = None
    display = EmbeddingDisplay.from_estimator(model, counts, groups=kind)
    assert legend_texts(display.ax_) == ["a (79)", "b (40)", "missing (1)"]
    assert display.legend_.get_title().get_text() == "kind"
    scores = model.transform(counts)[:, :2]
    for scatter, rows in zip(
        display.scatters_, [kind == "a", kind == "b", kind.isna()], strict=True
    ):
        np.testing.assert_array_equal(scatter.get_offsets(), scores[rows])
    colours = {tuple(scatter.get_facecolor()[0]) for scatter in display.scatters_}
    assert len(colours) == 3
    with pytest.raises(ValueError, match="groups has 3 entries, the embedding has 120 cells"):
        EmbeddingDisplay.from_estimator(model, counts, groups=["a", "b", "c"])


def test_embedding_categories_keep_their_order(model, counts):
    kind = pd.Categorical(["low", "high"] * (N_CELLS // 2), categories=["low", "high", "none"])
    display = EmbeddingDisplay.from_estimator(model, counts, groups=kind)
    assert legend_texts(display.ax_) == ["low (60)", "high (60)"]


def test_embedding_many_groups_are_told_apart():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(50), np.arange(1, 51)).astype(str)
    display = EmbeddingDisplay(rng.standard_normal((groups.size, 2)), groups=groups).plot()
    texts = legend_texts(display.ax_)
    assert len(texts) == 30 and texts[-1] == f"21 other groups ({21 * 22 // 2})"
    looks = {
        (tuple(s.get_facecolor()[0]), s.get_paths()[0].vertices.tobytes())
        for s in display.scatters_
    }
    assert len(looks) == 30
    assert sum(len(s.get_offsets()) for s in display.scatters_) == groups.size


def test_embedding_numbers_are_a_scale(model, counts):
    depth = counts.sum(axis=1).astype(float).rename("depth")
    depth[3] = np.nan
    display = EmbeddingDisplay.from_estimator(model, counts, groups=depth)
    np.testing.assert_array_equal(display.scatters_[1].get_array(), depth.dropna())
    assert display.colorbar_.ax.get_ylabel() == "depth"
    assert legend_texts(display.ax_) == ["missing (1)"]
    few = EmbeddingDisplay.from_estimator(model, counts, groups=np.arange(N_CELLS) % 4)
    assert few.colorbar_ is None and len(few.scatters_) == 4


def test_embedding_ellipses_are_the_posterior(model, counts):
    display = EmbeddingDisplay.from_estimator(model, counts, components=(0, 2), ellipses=7)
    mean, covariance = model.posterior_scores(counts)
    found = display.ellipses_
    assert len(found.get_offsets()) == 7
    rows = np.linspace(0, N_CELLS - 1, 7).astype(int)
    np.testing.assert_array_equal(found.get_offsets(), mean[rows][:, [0, 2]])
    angles = np.linspace(0, 2 * np.pi, 9)
    sizes = found.get_widths(), found.get_heights(), np.radians(found.get_angles())
    for i, (width, height, turn) in zip(rows, zip(*sizes, strict=True), strict=True):
        along, across = width / 2 * np.cos(angles), height / 2 * np.sin(angles)
        edge = np.array(
            [
                along * np.cos(turn) - across * np.sin(turn),
                along * np.sin(turn) + across * np.cos(turn),
            ]
        )
        block = covariance[i][np.ix_([0, 2], [0, 2])]
        squared = np.einsum("ij,ij->j", edge, np.linalg.solve(block, edge))
        np.testing.assert_allclose(squared, -2 * np.log(0.1))  # chi-square, two degrees, 90 %
    low, high = display.ax_.get_xlim()
    assert low < mean[0, 0] - np.sqrt(4.6 * covariance[0, 0, 0]) < high  # nothing is cut off
    assert legend_texts(display.ax_) == ["90% of the posterior, 7 cells"]
    with pytest.raises(ValueError, match="ellipses need the posterior covariances"):
        EmbeddingDisplay(mean[:, :2]).plot(ellipses=True)

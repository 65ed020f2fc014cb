"""Pictures can be read: text inside the figure, labels apart, colours told apart by the colour-blind."""

import copy
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from sknbln.plotting import CorrelationDisplay, EmbeddingDisplay
from sknbln.plotting._common import PALETTE

from .displays import DRAW_ALL, drawn_axes, every_picture

# ------------------------------------------------------------------ text


def overlapping(labels):
    """Pairs of neighbours whose boxes overlap."""
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)
    return [(a, b) for a, b in itertools.pairwise(boxes) if a.overlaps(b)]


@every_picture
def test_text_is_inside_the_figure_and_labels_are_apart(name, model, counts):
    """Names of 23 letters: identifiers of genes with their version and name."""
    renamed = copy.copy(model)
    names = np.array([f"ENSG000002887{i:02d}.11_CD3D" for i in range(counts.shape[1])], object)
    renamed.feature_names_in_ = names
    display = DRAW_ALL[name](renamed, counts.set_axis(names, axis=1))
    figure = display.figure_
    figure.canvas.draw()
    width, height = figure.get_size_inches()
    drawn, edge = figure.get_tightbbox(), 0.02  # inches
    assert drawn.x0 > -edge and drawn.y0 > -edge
    assert drawn.x1 < width + edge and drawn.y1 < height + edge
    for ax in drawn_axes(display):
        if ax.get_visible() and ax.axison:
            low, high = ax.get_xlim()
            ticks = ax.get_xticklabels() + ax.get_xticklabels(minor=True)
            shown = [t for t in ticks if t.get_text() and low <= t.get_position()[0] <= high]
            assert not overlapping(shown)


# ------------------------------------------------------------------ colours

#: what is left of linear RGB in the three dichromacies (Machado et al. 2009, severity 1)
VISION = {
    "normal": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def seen(colours, vision):
    """CIE L*a*b* of colours as they are seen."""
    rgb = np.array([to_rgb(colour) for colour in colours])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ np.transpose(VISION[vision]), 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = linear @ np.transpose(to_xyz) / [0.9505, 1.0, 1.089]
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


def smallest_distance(colours, vision):
    return min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen(colours, vision), 2))


@pytest.mark.parametrize("vision", VISION)
def test_groups_are_told_apart_by_colour(vision):
    # a difference of 2 can be seen side by side; matplotlib's own first seven come to 5 (protan)
    assert smallest_distance(PALETTE, vision) > 15


@pytest.mark.parametrize("vision", VISION)
def test_scales_are_read_by_the_colour_blind(vision):
    heat = CorrelationDisplay(np.eye(3), list("abc")).plot().im_.cmap
    # -0.6 and 0.6, and the ends; red to green come to 17
    assert smallest_distance(heat([0.2, 0.8]), vision) > 30
    assert smallest_distance(heat([0.0, 1.0]), vision) > 30
    points = np.random.default_rng(0).standard_normal((40, 2))
    scale = EmbeddingDisplay(points, groups=points[:, 0]).plot().scatters_[0].get_cmap()
    lightness = seen(scale(np.linspace(0, 1, 21)), vision)[:, 0]
    assert np.all(np.diff(lightness) > 0)
    plt.close("all")

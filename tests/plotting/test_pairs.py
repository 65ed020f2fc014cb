"""Estimates of pairs against their p-values, and networks."""

import numpy as np
import pytest

from sknbln.network import sparse_network
from sknbln.plotting import NetworkDisplay, VolcanoDisplay

from .displays import N_GENES, legend_texts


def test_volcano_has_every_pair(model, counts):
    test = model.correlation_test(counts)
    q = np.nanquantile(test.q_value, 0.3)
    display = VolcanoDisplay.from_test(test, q=q, n_named=3)
    points = np.concatenate([each.get_offsets() for each in display.ax_.collections])
    table = test.to_frame()
    assert len(points) == len(table) == N_GENES * (N_GENES - 1) // 2
    np.testing.assert_allclose(np.sort(points[:, 0]), np.sort(table.correlation))
    np.testing.assert_allclose(np.sort(points[:, 1]), np.sort(-np.log10(table.p_value)))
    assert [text.get_text() for text in display.ax_.texts] == [
        f"{row.gene_1}, {row.gene_2}" for row in table[:3].itertuples()
    ]
    numbers = [
        int(text.rpartition("(")[2][:-1].replace(",", "")) for text in legend_texts(display.ax_)
    ]
    assert sum(numbers[1:]) == np.sum(table.q_value <= q)


def test_genes_without_names_are_named_by_position(model, counts):
    table = model.correlation_test(counts).to_frame()
    number = {name: j for j, name in enumerate(dict.fromkeys([*table.gene_1, *table.gene_2]))}
    table = table.assign(gene_1=table.gene_1.map(number), gene_2=table.gene_2.map(number))
    display = VolcanoDisplay(table).plot(n_named=1)
    first = table.sort_values("p_value", kind="stable").iloc[0]
    assert display.ax_.texts[0].get_text() == f"{int(first.gene_1)}, {int(first.gene_2)}"


def test_volcano_of_a_difference_and_of_no_estimates(model, source, counts):
    group = np.arange(len(counts)) % 2
    test = model.correlation_difference_test(
        counts, group, genes=range(5), n_permutations=50, random_state=0
    )
    display = VolcanoDisplay.from_test(test)
    assert display.ax_.get_xlabel().startswith("difference") and len(display.table) == 10
    with pytest.raises(ValueError, match="no estimates to draw"):
        VolcanoDisplay.from_test(source.correlation_test(counts))


def test_network_of_genes_with_edges(model):
    pytest.importorskip("networkx")
    network = sparse_network(model, genes=range(12), select="ebic", gamma=0.0)
    edges = network.edges()
    display = NetworkDisplay.from_network(network)
    assert set(display.positions_) == {*edges.gene_1, *edges.gene_2}
    assert {text.get_text() for text in display.ax_.texts} == set(display.positions_)
    assert f"of 12 genes, {len(edges)} edges" in display.ax_.get_title()
    assert len(display.plot(max_genes=4).positions_) <= 4

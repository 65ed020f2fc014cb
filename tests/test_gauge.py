"""Which columns of the loadings are real: their information against the edges of noise."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from sknbln.solver.gauge import (
    EDGE_MARGIN,
    above_noise,
    column_information,
    compositional,
    noise_edges,
)


def test_edge_of_all_genes_is_marchenko_and_pasturs():
    for G, n in ((24, 150), (1000, 500)):
        edges = noise_edges(G, n)
        assert edges.shape == (G,)
        assert_allclose(edges[-1], EDGE_MARGIN * (G / n + 2 * np.sqrt(G / n)), rtol=1e-12)
        # of fewer genes there are more choices, and the bound over them is no less than the law's edge
        s = np.arange(1, G + 1) / n
        assert np.all(edges >= EDGE_MARGIN * (s + 2 * np.sqrt(s)) * (1 - 1e-12))
        # of a single gene: one in G, so that the largest of them is meant
        assert_allclose(
            edges[0], EDGE_MARGIN * ((q := (1 + 2 * np.log(G)) / n) + 2 * np.sqrt(q)), rtol=1e-12
        )


def test_information_of_columns_is_diagonal_in_their_basis():
    rng = np.random.default_rng(0)
    W, weight = rng.standard_normal((30, 4)) * [3.0, 2.0, 1.0, 0.5], rng.uniform(0.1, 5.0, 30)
    contributions, basis = column_information(W, weight)
    assert contributions.shape == (30, 4)
    assert_allclose(basis @ basis.T, np.eye(4), atol=1e-12)
    turned = compositional(W) @ basis
    q = turned.T @ (weight[:, None] * turned)
    assert_allclose(contributions.sum(0), np.diag(q), rtol=1e-10)
    assert_allclose(q, np.diag(np.diag(q)), atol=1e-10 * q.max())
    assert np.all(np.diff(np.diag(q)) < 0)
    # it is of the compositional loadings, and of their span only
    rotation = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    again, _ = column_information((W + rng.standard_normal(4)) @ rotation, weight)
    assert_allclose(again, contributions, rtol=1e-8, atol=1e-10)


def column(total, n_genes, G):
    """Contributions of a column that is spread evenly over some of the genes."""
    out = np.zeros((G, 1))
    out[np.random.default_rng(0).permutation(G)[:n_genes]] = total / n_genes
    return out


@pytest.mark.parametrize("n_genes", [2, 30, 150])
def test_a_column_of_some_genes_is_real_above_their_edge(n_genes):
    G, n = 150, 400
    edges = noise_edges(G, n)
    edge = edges[n_genes - 1]
    below, above = column(0.99 * edge, n_genes, G), column(1.01 * edge, n_genes, G)
    assert above_noise(np.concatenate([below, above, below], 1), edges).tolist() == [
        False,
        True,
        False,
    ]


def test_a_column_of_one_gene_is_never_real():
    """It is the same as the noise variance of that gene."""
    edges = noise_edges(150, 400)
    assert not above_noise(column(100.0 * edges[-1], 1, 150), edges)
    assert above_noise(column(100.0 * edges[-1], 2, 150), edges)


def test_a_column_of_two_genes_is_real_far_below_the_edge_of_all():
    G, n = 150, 400
    edges = noise_edges(G, n)
    assert edges[1] < 0.4 * edges[-1]
    assert above_noise(column(1.05 * edges[1], 2, G), edges)
    assert not above_noise(column(1.05 * edges[1], 150, G), edges)
    # the edge of more genes tells it too where those hold next to nothing
    assert not above_noise(column(0.5 * edges[1], 2, G), edges)


@pytest.mark.parametrize("shape", [(24, 150), (150, 400), (500, 250)], ids=str)
def test_the_best_columns_of_noise_are_below_the_edges(shape):
    """Loadings of the largest eigenvectors of noise: ``w' B w`` is their spike's excess, in all genes."""
    (G, n), weight = shape, np.full(shape[0], 0.7)
    for seed in range(5):
        A = np.random.default_rng(seed).standard_normal((n, G)) / np.sqrt(n)
        values, vectors = np.linalg.eigh(A.T @ A)
        W = vectors[:, -3:] * np.sqrt(np.maximum(values[-3:] - 1, 0) / weight[0])
        contributions, _ = column_information(W, weight)
        assert not np.any(above_noise(contributions, noise_edges(G, n)))
        # and with a spike of that size at least twice the edge, it is above
        spiked = W * np.sqrt(2.5)
        assert above_noise(column_information(spiked, weight)[0], noise_edges(G, n))[0]

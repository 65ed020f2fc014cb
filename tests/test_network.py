"""Sparse networks of genes: the path, what is chosen, and what is handed over."""

import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.exceptions import ConvergenceWarning

from sknbln import NBLNEstimator, network
from sknbln._known import Known
from sknbln.datasets import make_nbln_counts
from sknbln.network import sparse_network

from .reference.truth import nbln, nbvcp

G, N = 8, 500


@pytest.fixture
def model():
    """Two modules of four genes; genes of different modules are independent."""
    W = np.zeros((G, 2))
    W[:4, 0], W[4:, 1] = 0.8, 0.6
    model = nbln(np.zeros(G), W, np.full(G, 0.3), np.full(G, 5.0))
    model.feature_names_in_ = np.array([f"g{j}" for j in range(G)], object)
    model._known, model._gene_covariance = Known.nothing(N), np.zeros((G, 4, 4))
    return model


def is_inside(table):
    side = {f"g{j}": j // 4 for j in range(G)}
    return table.gene_1.map(side) == table.gene_2.map(side)


def test_edges_are_inside_the_modules(model):
    found = sparse_network(model, select="ebic")
    table = found.edges()
    assert len(table) == 12 and is_inside(table).all()
    assert np.all(np.diff(np.abs(table.partial_correlation)) <= 0)
    assert_array_equal(found.partial_correlation, found.partial_correlation.T)
    assert found.n_edges[0] == 0 and found.n_edges[np.argmin(found.criterion)] == 12


def test_without_a_penalty_partial_correlations_are_those_of_the_precision(model, monkeypatch):
    monkeypatch.setattr(network, "_LEAST", 1e-6)
    found = sparse_network(model, select="ebic", gamma=0.0)
    precision = np.linalg.inv(model.get_correlation("log_rate"))
    expected = -precision / np.sqrt(np.outer(np.diag(precision), np.diag(precision)))
    np.fill_diagonal(expected, 1.0)
    assert found.penalty == found.penalties[-1]
    assert_allclose(found.partial_correlation, expected, atol=2e-4)


def test_the_path_ends_where_correlations_are_too_ill_conditioned(model, monkeypatch):
    original = network.graphical_lasso

    def fails_below(R, penalty, **options):
        if penalty < 0.3:
            raise FloatingPointError("Non SPD result")
        return original(R, penalty, **options)

    monkeypatch.setattr(network, "graphical_lasso", fails_below)
    with pytest.warns(UserWarning, match=r"path that ends at the penalty 0.3.*Take fewer genes"):
        found = sparse_network(model, select="ebic", gamma=0.0)
    assert found.penalty == found.penalties[-1] >= 0.3
    assert len(found.penalties) == len(found.n_edges) == len(found.criterion) < 20
    assert (
        repr(found)
        == f"GeneNetwork(8 genes, {found.n_edges[-1]} edges, penalty={found.penalty:.3g})"
    )


def test_a_gap_of_nothing_is_not_passed_on(model, monkeypatch):
    """Older releases of scikit-learn warn of it where a gene has no edge; a real gap is passed on."""
    gaps = [0.0, 0.0, 0.25]
    original = network.graphical_lasso

    def warns(*args, **options):
        gap = gaps.pop(0) if gaps else 0.0
        for text in (f"{gap}, tolerance: {0.0}", f"{gap:.6e}, tolerance: {0.0:.3e}"):
            message = "Objective did not converge.\nIncrease the iterations. Duality gap: " + text
            warnings.warn(message, ConvergenceWarning, stacklevel=2)
        return original(*args, **options)

    monkeypatch.setattr(network, "graphical_lasso", warns)
    with pytest.warns(ConvergenceWarning) as found:
        sparse_network(model, select="ebic", gamma=0.0)
    assert all("gap: 0.25," in str(w.message) or "gap: 2.5" in str(w.message) for w in found)
    assert len(found) == 2


def test_the_first_edge_comes_below_its_penalty(model):
    found = sparse_network(model, select="ebic", n_penalties=60)
    R = model.get_correlation("log_rate").to_numpy()
    assert_allclose(found.first_edge_penalty, np.max(R - np.eye(G)), rtol=1e-12)
    assert found.n_edges[0] == 0 and found.n_edges[1] > 0


def test_an_empty_network_is_said(model):
    model._known = Known.nothing(2)  # so few cells that no edge is worth its penalty
    with pytest.warns(UserWarning, match="no edges at the penalty .* first comes below 0.681"):
        found = sparse_network(model, select="ebic", genes=["g0", "g5", "g1"], gamma=1.0)
    assert len(found.edges()) == 0 and found.genes.tolist() == ["g0", "g5", "g1"]


def test_uncertain_correlations_have_fewer_edges(model):
    """With errors as of 12 cells and not 500."""
    exact = sparse_network(model, select="ebic")
    model._gene_covariance = np.tile(0.1 * np.eye(4), (G, 1, 1))
    with pytest.warns(UserWarning, match="no edges"):
        uncertain = sparse_network(model, select="ebic", gamma=1.0)
    assert len(uncertain.edges()) < len(exact.edges())


def test_hand_over_to_networkx(model):
    pytest.importorskip("networkx")
    found = sparse_network(model, select="ebic")
    graph = found.to_networkx()
    assert set(graph.nodes) == set(model.feature_names_in_)
    assert graph.number_of_edges() == 12
    assert graph.edges["g0", "g1"]["partial_correlation"] == found.partial_correlation[0, 1]


def test_hand_over_to_varp(model):
    """Genes are matched by name; other variables have no edges."""
    found = sparse_network(model, select="ebic", genes=["g1", "g0", "g5"])
    adata = SimpleNamespace(var_names=["g0", "x", "g1", "g5"], n_vars=4, varp={})
    found.to_varp(adata, key="edges")
    expected = np.zeros((4, 4))
    expected[0, 2] = expected[2, 0] = found.partial_correlation[0, 1]
    assert_array_equal(adata.varp["edges"].toarray(), expected)
    adata.var_names = ["g0", "x", "g2", "g5"]
    with pytest.raises(ValueError, match=r"1 genes .* missing from adata.var_names: g1"):
        found.to_varp(adata)


def test_arguments_are_refused(model):
    with pytest.raises(TypeError, match="NBVCPEstimator has no correlations"):
        sparse_network(nbvcp(np.ones(3), np.ones(3)))
    with pytest.raises(ValueError, match="give them as X"):
        sparse_network(model)
    with pytest.raises(ValueError, match="'select' parameter"):
        sparse_network(model, select="bic")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The network has no edges")
def test_stability_chooses_the_smallest_penalty_that_halves_agree_on():
    sim = make_nbln_counts(n_cells=400, n_genes=30, n_factors=2, random_state=0)
    X = pd.DataFrame(sim.data.toarray(), columns=[f"g{j}" for j in range(30)])
    model = NBLNEstimator(2, random_state=0).fit(X)
    found = sparse_network(model, X, n_halves=2)
    assert np.all(np.diff(found.criterion) >= 0)
    chosen = np.flatnonzero(found.penalties == found.penalty)[0]
    assert found.criterion[chosen] <= 0.05
    assert chosen + 1 == found.penalties.size or found.criterion[chosen + 1] > 0.05
    assert np.all((found.stability >= 0) & (found.stability <= 1))

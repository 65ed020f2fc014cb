"""AnnData in, results in its places, in scanpy's manner."""

import importlib
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from numpy.testing import assert_allclose, assert_array_equal

import sknbln
from sknbln import NBLNEstimator
from sknbln.datasets import load_immune_cells, make_nbln_counts

anndata = pytest.importorskip("anndata")

N, G, USED = 120, 40, 24


@pytest.fixture
def adata():
    """Log-normalized values in X, counts in a layer; 24 of the genes are highly variable."""
    counts = sp.csr_matrix(
        make_nbln_counts(N, G, n_factors=2, random_state=0).data, dtype=np.float32
    )
    obs = pd.DataFrame(
        {"sample": np.arange(N) % 2, "depth": np.linspace(0.0, 1.0, N)},
        index=[f"cell{i}" for i in range(N)],
    )
    var = pd.DataFrame({"highly_variable": np.arange(G) < USED}, index=[f"g{j}" for j in range(G)])
    adata = anndata.AnnData(counts.copy(), obs=obs, var=var)
    adata.layers["counts"] = counts
    adata.X.data = np.log1p(1.7 * adata.X.data)
    return adata


def nbln(adata, **options):
    options = {"layer": "counts", "n_components": 2, "random_state": 0, **options}
    return sknbln.tl.nbln(adata, **options)


def test_the_package_does_not_need_anndata(monkeypatch):
    for name in ("anndata", "scanpy"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "sknbln.tl")
    tl = importlib.import_module("sknbln.tl")
    monkeypatch.setattr(sknbln, "tl", tl)
    with pytest.raises(TypeError, match="found object"):
        tl.project(None, object())


def test_results_are_those_of_the_estimator_and_survive_a_file(adata, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="sknbln"):
        model = nbln(adata, return_estimator=True)
    assert "24 of 40 genes are used, those in adata.var['highly_variable']" in caplog.text
    counts = adata.layers["counts"][:, :USED]
    expected = NBLNEstimator(2, random_state=0).fit(counts)
    assert_array_equal(model.components_, expected.components_)
    adata.write_h5ad(tmp_path / "a.h5ad")
    adata = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert_array_equal(adata.obsm["X_nbln"], expected.transform(counts))
    assert_array_equal(adata.varm["nbln"][:USED], expected.components_.T)
    assert_array_equal(adata.varm["nbln"][USED:], 0.0)
    for name, values in (
        ("mean", expected.mean_),
        ("dispersion", expected.dispersion_),
        ("noise", expected.noise_variance_),
    ):
        assert_array_equal(adata.var[f"nbln_{name}"][:USED], values)
        assert adata.var[f"nbln_{name}"][USED:].isna().all()
    assert_array_equal(adata.obs["capture_offset"], expected.capture_offset_)
    found = adata.uns["nbln"]
    assert found["params"] == {"n_components": 2, "layer": "counts", "random_state": 0}
    assert found["rank"] == 2 and found["converged"] and found["n_iter"] == expected.n_iter_
    assert_allclose(found["score"], expected.score(counts))
    assert_allclose(found["variance_ratio"], expected.explained_variance_ratio_)


def test_copies_views_and_backed_objects(adata, tmp_path):
    copy, model = nbln(adata, copy=True, return_estimator=True)
    assert "X_nbln" not in adata.obsm and copy.obsm["X_nbln"].shape == (N, 2)
    view = adata[:, adata.var_names[::-1]]
    sknbln.tl.project(view, model, layer="counts")  # genes are matched by name
    assert not view.is_view
    assert_allclose(view.obsm["X_nbln"], copy.obsm["X_nbln"], atol=1e-9)
    assert nbln(adata) is None
    assert_array_equal(adata.obsm["X_nbln"], copy.obsm["X_nbln"])
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    again = nbln(backed, mask_var=np.arange(G) < USED, key_added="again", return_estimator=True)
    assert_allclose(backed.obsm["X_again"], copy.obsm["X_nbln"], atol=1e-9)
    assert_allclose(again.mean_, model.mean_, atol=1e-9)


def test_a_batch_is_a_category_and_is_taken_out_of_new_cells_too(adata):
    options = dict(batch_key="sample", covariate_keys="depth", return_estimator=True)
    model = nbln(adata, **options)
    assert list(model.covariate_names_in_) == ["sample[1]", "depth"]
    counts = adata.layers["counts"][:, :USED]
    covariates = adata.obs.assign(sample=adata.obs["sample"].astype(str))[["sample", "depth"]]
    expected = model.transform(counts, covariates=covariates)
    assert_array_equal(adata.obsm["X_nbln"], expected)
    new = sknbln.tl.project(adata[:10, ::-1], model, layer="counts", key_added="new", copy=True)
    assert_allclose(new.obsm["X_new"], expected[:10], atol=1e-9)
    with pytest.raises(KeyError, match=r"obs has no column 'sample'; it has depth"):
        del new.obs["sample"]
        sknbln.tl.project(new, model, layer="counts")


def test_nbvcp(adata):
    model = sknbln.tl.nbvcp(adata, layer="counts", random_state=0, return_estimator=True)
    assert_array_equal(adata.var["nbvcp_mean"][:USED], model.mean_)
    assert_array_equal(adata.var["nbvcp_dispersion"][:USED], model.dispersion_)
    assert_array_equal(adata.obs["capture_offset"], model.capture_offset_)
    assert adata.uns["nbvcp"]["params"] == {"layer": "counts", "random_state": 0}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer": None}, ValueError, r"adata.X does not hold counts.*fractional.*layer='counts'"),
        ({"layer": "raw"}, KeyError, r"no layer 'raw'; its layers are counts"),
        ({"batch_key": "lane"}, KeyError, r"obs has no column 'lane'; it has sample, depth"),
        ({"mask_var": "hvg"}, KeyError, r"var has no column 'hvg'; it has highly_variable"),
        ({"mask_var": [True, False]}, ValueError, r"40 booleans, one per gene, found shape \(2,\)"),
        ({"mask_var": np.zeros(G, bool)}, ValueError, "leaves no gene"),
        ({"latent_dim": 3}, TypeError, "as n_components, found latent_dim"),
    ],
)
def test_what_is_wrong_is_said(adata, options, error, message):
    before = set(adata.obsm) | set(adata.var) | set(adata.obs) | set(adata.uns)
    with pytest.raises(error, match=message):
        nbln(adata, **options)
    assert set(adata.obsm) | set(adata.var) | set(adata.obs) | set(adata.uns) == before


def test_the_layer_that_is_x_has_no_name():
    """AnnData 0.13 lists X among the layers, as None."""
    counts = np.arange(12.0).reshape(4, 3)
    table = SimpleNamespace(X=counts / 7, layers={None: counts / 7, "counts": counts}, raw=None)
    with pytest.raises(KeyError, match=r"no layer 'raw'; its layers are counts\."):
        sknbln.tl._matrix(table, "raw")
    assert sknbln.tl._where_counts_are(table).endswith(
        "like counts: 'counts'; pass layer='counts'."
    )


def test_values_that_are_no_counts_are_refused(adata):
    scaled = adata.copy()
    scaled.X = adata.layers["counts"].toarray() - 1.0
    with pytest.raises(ValueError, match=r"negative values \(-1\)"):
        nbln(scaled, layer=None)
    del scaled.layers["counts"]
    with pytest.raises(ValueError, match="No layer looks like counts: load the raw counts"):
        nbln(scaled, layer=None)
    scaled.raw = anndata.AnnData(adata.layers["counts"].copy(), var=adata.var)
    with pytest.raises(ValueError, match=r"pass adata.raw.to_adata\(\)"):
        nbln(scaled, layer=None)
    same = adata.layers["counts"].toarray()
    same[:, 0] += 10_000 - same.sum(1)
    scaled.layers["one_total"] = same
    with pytest.raises(ValueError, match="all rows have nearly the same total"):
        nbln(scaled, layer="one_total")
    scaled.X = None
    with pytest.raises(ValueError, match=r"adata.X is empty"):
        nbln(scaled, layer=None)


def test_project_takes_what_nbln_fitted(adata):
    model = nbln(adata, return_estimator=True, max_iter=200)
    with pytest.raises(ValueError, match=r"14 of the 24 genes of the fit are missing.*'g10'"):
        sknbln.tl.project(adata[:, :10], model, layer="counts")
    with pytest.raises(TypeError, match=r"found NBLNEstimator\. One that was fitted to a matrix"):
        sknbln.tl.project(adata, NBLNEstimator(2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of scanpy and what it imports
def test_the_lines_in_the_readme(tmp_path, monkeypatch):
    """From counts in a file, with two batches, to clusters and a picture."""
    pytest.importorskip("scanpy")
    pytest.importorskip("leidenalg")
    import matplotlib

    matplotlib.use("Agg")
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(import scanpy.*?)```", readme, re.DOTALL)
    cells = load_immune_cells()
    rng = np.random.default_rng(0)
    sample = rng.integers(2, size=cells.data.shape[0])
    # the second sample has lost half of the counts of every third gene
    keep = np.where((sample[:, None] == 1) & (np.arange(cells.data.shape[1]) % 3 == 0), 0.5, 1.0)
    counts = rng.binomial(cells.data.toarray().astype(int), keep)
    obs = pd.DataFrame(
        {"cell_type": np.asarray(cells.target).astype(str), "sample": sample.astype(str)}
    )
    obs.index = [f"cell{i}" for i in range(len(obs))]
    var = pd.DataFrame(index=cells.feature_names)
    anndata.AnnData(sp.csr_matrix(counts), obs=obs, var=var).write_h5ad(tmp_path / "counts.h5ad")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(lines, names)
    adata = names["adata"]
    assert adata.obsm["X_umap"].shape == (600, 2)
    # macrophages are apart, CD4+ and CD8+ T cells overlap: the share of cells in clusters of their own kind
    table = pd.crosstab(adata.obs["leiden"], adata.obs["cell_type"])
    macrophages, others = table["Macrophages"], table.drop(columns="Macrophages").sum(axis=1)
    assert np.maximum(macrophages, others).sum() > 0.95 * len(adata)  # measured .99
    # each cell's neighbours are of both samples
    same = adata.obsp["connectivities"].astype(bool).tocoo()
    mixed = np.mean(sample[same.row] == sample[same.col])
    assert 0.45 < mixed < 0.6  # measured .49; without batch_key .70

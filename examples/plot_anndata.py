"""
From AnnData and back
=====================

The estimators take a matrix of raw counts and return arrays. In an ``AnnData`` object the matrix
is ``adata.X`` or a layer, and each array has its place: arrays with one row per cell go into
``adata.obsm``, arrays with one row per gene into ``adata.varm``. Scanpy's functions look for them
there.

This package does not require ``anndata``. Where it is not installed, this page still runs, with a
stand-in that has the same attributes.
"""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln.datasets import load_immune_cells
from sknbln.plotting import EmbeddingDisplay

cells = load_immune_cells()
obs = pd.DataFrame({"cell_type": cells.target}, index=[f"cell{i}" for i in range(600)])
var = pd.DataFrame(index=cells.feature_names)
try:
    import anndata
except ImportError:
    print("anndata is not installed; a stand-in shows what goes where.")
    adata = SimpleNamespace(X=cells.data, obs=obs, var=var, obsm={}, varm={}, uns={}, layers={})
else:
    adata = anndata.AnnData(cells.data, obs=obs, var=var)
    print(adata)

# %%
# Most ``AnnData`` objects have *normalized* values in ``adata.X`` and the counts in a layer. The
# models need the counts.
adata.layers["counts"] = adata.X.copy()
counts = adata.layers["counts"]

# %%
# Fit both models. A data frame of the counts would carry the genes' names into the fit
# (``feature_names_in_``), at the price of a dense copy. With a matrix, the results are in the
# order of ``adata.var_names``.
genes = NBVCPEstimator(random_state=0).fit(counts)
model = NBLNEstimator(informative_prior_estimator=genes, random_state=0).fit(counts)

# %%
# Store the results. Everything is already a NumPy array.
adata.obsm["X_nbln"] = model.transform(counts)
adata.varm["nbln"] = model.get_W_compositional()
adata.obs["capture_probability"] = np.exp(-model.capture_offset_)
adata.obs["nbln_score"] = model.score_samples(counts)
adata.var["mean_log_rate"] = model.mean_
adata.var["dispersion"] = model.dispersion_
adata.uns["nbln"] = {"explained_variance_ratio": model.explained_variance_ratio_}
for place in ("obs", "var", "obsm", "varm", "uns", "layers"):
    print(f"{place:<7s}", ", ".join(getattr(adata, place)))

# %%
# From here on, use scanpy::
#
#     sc.pp.neighbors(adata, use_rep="X_nbln")
#     sc.tl.umap(adata)
#     sc.tl.leiden(adata)
#     sc.pl.umap(adata, color=["cell_type", "leiden", "capture_probability"])
#
# As with principal components, the columns are ordered by explained variance, and a neighbour graph
# weights each by what it explains: ``transform`` returns principal coordinates of the log-rates, in
# nats. ``whiten=True`` would give standardized scores, in which weak components, mostly noise, count as
# much as the leading ones.
EmbeddingDisplay.from_estimator(model, counts, groups=adata.obs["cell_type"])
plt.show()

# %%
# Macrophages are well separated; CD4+ and CD8+ T cells overlap on the first two components.
#
# New cells, in another object with the same genes in the same order, are embedded without a new
# fit: ``new.obsm["X_nbln"] = model.transform(new.layers["counts"])``. If the genes are in another
# order, ``new[:, adata.var_names]`` restores it.
#
# Cells from several batches have the batch in ``adata.obs``. Given as a covariate, its shifts are
# taken out while the factors are estimated (:doc:`/guide/covariates`)::
#
#     batch = adata.obs[["batch"]]
#     model.fit(counts, covariates=batch)
#     adata.obsm["X_nbln"] = model.transform(counts, covariates=batch)

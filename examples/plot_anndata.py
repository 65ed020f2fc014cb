"""
AnnData in one line
===================

:func:`sknbln.tl.nbln` fits the model to the counts of an ``AnnData`` object and writes the results
where scanpy looks for them. The estimators themselves take matrices and return arrays.
It takes ``pip install ".[anndata,plot]"``.
"""

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

import sknbln
from sknbln.datasets import load_immune_cells

# %%
# Counts of 600 immune cells. Most ``AnnData`` objects have *normalized* values in ``adata.X`` and the
# counts in a layer; the model needs the counts.
cells = load_immune_cells()
obs = pd.DataFrame(
    {"cell_type": cells.target, "sample": np.arange(600) % 2},
    index=[f"cell{i}" for i in range(600)],
)
adata = anndata.AnnData(cells.data, obs=obs, var=pd.DataFrame(index=cells.feature_names))
adata.layers["counts"] = adata.X.copy()
adata.X.data = np.log1p(adata.X.data)

# %%
# One line. Where ``adata.var`` has a column ``highly_variable``, those genes are used. Batches and other
# covariates are columns of ``adata.obs``; their shifts are taken out while the factors are estimated.
model = sknbln.tl.nbln(
    adata, layer="counts", batch_key="sample", random_state=0, return_estimator=True
)
print(adata)
print({name: adata.uns["nbln"][name] for name in ("rank", "score", "converged", "n_iter")})

# %%
# Values that are no counts are refused, and the message says where counts are:
try:
    sknbln.tl.nbln(adata)
except ValueError as error:
    print(error)

# %%
# From here on, use scanpy::
#
#     sc.pp.neighbors(adata, use_rep="X_nbln")
#     sc.tl.umap(adata)
#     sc.tl.leiden(adata)
#     sc.pl.umap(adata, color=["cell_type", "leiden", "capture_offset"])
#
# As with principal components, the columns are ordered by explained variance, and a neighbour graph
# weights each by what it explains: they are principal coordinates of the log-rates, in nats.
kinds = list(dict.fromkeys(adata.obs["cell_type"]))
for kind in kinds:
    chosen = adata.obsm["X_nbln"][(adata.obs["cell_type"] == kind).to_numpy()]
    plt.scatter(chosen[:, 0], chosen[:, 1], s=8, label=kind)
plt.xlabel("component 1 (nats)")
plt.ylabel("component 2 (nats)")
plt.legend()
plt.show()

# %%
# Macrophages are well separated; CD4+ and CD8+ T cells overlap on the first two components.
#
# New cells, in another object, are embedded without a new fit. Genes are taken by name:
new = adata[:5, ::-1].copy()
sknbln.tl.project(new, model, layer="counts")
print(np.abs(new.obsm["X_nbln"] - adata.obsm["X_nbln"][:5]).max())

"""
From counts to neighbours, modules and a check
==============================================

A tutorial with ``AnnData``: fit, look at the cells, find groups and the genes behind them, and ask
whether the model describes cells that it has not seen. :func:`sknbln.tl.nbln` writes the results
where scanpy looks for them; the estimators themselves take matrices and return arrays.
It takes ``pip install ".[anndata,plot]"``.
"""

import anndata
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.cluster import KMeans
from sklearn.neighbors import KNeighborsClassifier

import sknbln
from sknbln.datasets import load_immune_cells
from sknbln.plotting import CalibrationDisplay, CorrelationDisplay
from sknbln.predictive import predictive_check

# %%
# Counts of 600 immune cells, of which every fourth is kept for the check. Most ``AnnData`` objects
# have *normalized* values in ``adata.X`` and the counts in a layer; the model needs the counts.
cells = load_immune_cells()
obs = pd.DataFrame(
    {"cell_type": cells.target, "sample": np.where(np.arange(600) % 2, "one", "two")},
    index=[f"cell{i}" for i in range(600)],
)
everything = anndata.AnnData(cells.data, obs=obs, var=pd.DataFrame(index=cells.feature_names))
everything.layers["counts"] = everything.X.copy()
everything.X.data = np.log1p(everything.X.data)
held_out = np.random.default_rng(0).permutation(600) < 150
adata, new = everything[~held_out].copy(), everything[held_out].copy()

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
# **Neighbours.** From here on, use scanpy::
#
#     sc.pp.neighbors(adata, use_rep="X_nbln")
#     sc.tl.umap(adata)
#     sc.tl.leiden(adata)
#     sc.pl.umap(adata, color=["cell_type", "leiden", "capture_offset"])
#
# or scikit-learn, as here. As with principal components, the columns are ordered by explained
# variance, and a neighbour graph weights each by what it explains: they are principal coordinates
# of the log-rates, in nats. New cells, in another object, are embedded without a new fit; genes
# are taken by name.
sknbln.tl.project(new, model, layer="counts")
neighbours = KNeighborsClassifier(15).fit(adata.obsm["X_nbln"], adata.obs["cell_type"])
right = neighbours.score(new.obsm["X_nbln"], new.obs["cell_type"])
print(f"type of new cells by their 15 nearest neighbours: {right:.0%} right")

adata.obs["group"] = KMeans(3, n_init=10, random_state=0).fit_predict(adata.obsm["X_nbln"])
print(pd.crosstab(adata.obs["group"], adata.obs["cell_type"]))

figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharex=True, sharey=True)
for ax, key in zip(axes, ("cell_type", "group"), strict=True):
    for name in sorted(adata.obs[key].unique()):
        chosen = adata.obsm["X_nbln"][(adata.obs[key] == name).to_numpy()]
        ax.scatter(chosen[:, 0], chosen[:, 1], s=10, label=str(name).replace("_", " "))
    ax.set(xlabel="component 1, nats", title=key.replace("_", " "))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize="small")
axes[0].set_ylabel("component 2, nats")
plt.show()

# %%
# Macrophages are well separated. CD4+ and CD8+ T cells overlap: the 300 most abundant genes hardly
# tell them apart.
#
# **Genes.** The loadings say which genes make a component, in nats per standard deviation of its scores.
loadings = pd.DataFrame(adata.varm["nbln"], index=adata.var_names)
for component in range(3):
    order = loadings[component].sort_values()
    print(f"component {component + 1}: {', '.join(order.index[::-1][:6])}")
    print(f"       against: {', '.join(order.index[:6])}")

# %%
# **Modules.** Which genes move together is asked within one type: between types every marker
# correlates with every other. The :doc:`example on pairs <plot_pairs>` goes on from here, with
# tests, modules and networks.
macrophages = adata[adata.obs["cell_type"] == "Macrophages"].to_df(layer="counts")
within = sknbln.NBLNEstimator(random_state=0).fit(macrophages)
test = within.correlation_test(macrophages, scale="expression")
pairs = test.to_frame(q=0.05)
print(f"{len(pairs)} pairs of genes at a false discovery rate of 5 %, the first of them:")
print(pairs.head(5).round(3).to_string(index=False))
degree = np.nansum(test.q_value <= 0.05, axis=1)
linked = test.genes[np.argsort(-degree, kind="stable")[:25]]
CorrelationDisplay.from_estimator(within, scale="expression", test=test, genes=linked)
plt.show()

# %%
# **A check.** Does the model describe the cells that it has not seen? First the log-likelihood per
# cell, beside that of independent genes; then the share of genes whose statistics lie outside the
# central 95 % of replicates, 5 % where the model is right.
counts, batch = new.layers["counts"], new.obs[["sample"]]
independent = model.informative_prior_estimator_
print("held-out log-likelihood per cell")
print(f"  independent genes {independent.score(counts, covariates=batch):.1f}")
print(f"  {model.latent_dim_} factors        {model.score(counts, covariates=batch):.1f}")
check = predictive_check(model, counts, covariates=batch, random_state=0)
for what in ("mean", "variance", "zero_fraction"):
    print(f"  {what:<14s}{check.summary[f'{what}_outside']:5.0%} of the genes outside")
CalibrationDisplay.from_estimator(model, counts, covariates=batch, random_state=0)
plt.show()

# %%
# The factors predict new cells far better than independent genes do, and the marginal distributions
# of a good part of the genes are still off: three cell types are not one normal distribution.
# :doc:`plot_correlations` says what that means for what one reads from a fit.

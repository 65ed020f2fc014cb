"""
Quick start
===========

Fit both models to a real count matrix, score them on cells that they have not seen, and use the
embedding. The data are 600 immune cells x 300 genes that come with the package.
"""

import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln.datasets import load_immune_cells

cells = load_immune_cells()
X, labels = cells.data, cells.target
print(f"{X.shape[0]} cells x {X.shape[1]} genes, {X.nnz / np.prod(X.shape):.0%} non-zero")

# %%
# Two fits: independent genes first, then the factor model, which takes the capture offsets from it,
# finds the number of factors and refines everything else. (Without a source it fits one itself.)
train, test = train_test_split(np.arange(len(labels)), random_state=0, stratify=labels)
start = time.perf_counter()
independent = NBVCPEstimator(random_state=0).fit(X[train])
model = NBLNEstimator(informative_prior_estimator=independent, random_state=0).fit(X[train])
print(f"Both fits took {time.perf_counter() - start:.0f} s, compilation included")

# %%
# The score is the log-likelihood of a cell in nats, on the same scale for every model.
print("\nHeld-out log-likelihood per cell (higher is better)")
print(f"  NBVCP, independent genes      {independent.score(X[test]):9.2f}")
print(f"  NBLN, {model.latent_dim_} factors              {model.score(X[test]):9.2f}")

# %%
# Any scikit-learn model can use the embedding. Everything is refitted within each fold.
folds = StratifiedKFold(5, shuffle=True, random_state=0)
logistic = LogisticRegression(max_iter=1000)
contenders = {
    "NBLN": NBLNEstimator(latent_dim=12, random_state=0),
    "PCA on log1p counts": make_pipeline(
        FunctionTransformer(lambda counts: np.log1p(counts.toarray())), PCA(12, random_state=0)
    ),
}
print("\nAccuracy of cell types from 12 dimensions, 5-fold cross-validated")
for name, embedding in contenders.items():
    accuracy = cross_val_score(
        make_pipeline(embedding, StandardScaler(), logistic), X, labels, cv=folds
    )
    print(f"  {name:<22s} {accuracy.mean():.3f} +- {accuracy.std() / np.sqrt(5):.3f}")

# %%
# The factors predict the cell types about as well as principal components of log counts do, but
# no better: CD4+ and CD8+ T cells are hard to tell apart by the 300 most abundant genes. The
# model adds a likelihood, uncertainties, and correlations that do not come from counting noise.
#
# The picture shows the four leading components, for training and held-out cells.
coordinates = model.transform(X)
held_out = np.isin(np.arange(len(labels)), test)
palette = ["#0072B2", "#E69F00", "#009E73", "#CC79A7"]  # safe for the colour-blind
figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
for ax, (first, second) in zip(axes, [(0, 1), (2, 3)], strict=True):
    for colour, name in zip(palette, cells.target_names, strict=False):
        for marker, rows, what in (("o", ~held_out, "training"), ("^", held_out, "held out")):
            chosen = rows & (labels == name)
            ax.scatter(
                coordinates[chosen, first],
                coordinates[chosen, second],
                s=22 if marker == "^" else 12,
                marker=marker,
                color=colour,
                alpha=0.75,
                linewidths=0,
                label=f"{name.replace('_', ' ')}, {what}",
            )
    ax.set(xlabel=f"component {first + 1}, nats", ylabel=f"component {second + 1}, nats")
    ax.spines[["top", "right"]].set_visible(False)
figure.suptitle("Immune cells: principal coordinates of the NBLN model")
axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small")
target = Path("quickstart.png")
figure.savefig(target, dpi=150)
print(f"\nThe embedding is drawn in {target}, in the working directory")

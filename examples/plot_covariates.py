"""
Batches and treatments: known covariates
========================================

What is known of the cells, such as the batch, the donor or a treatment, need not be found by the
factors. Given as covariates, it gets coefficients of its own, and the factors describe what is
left. The coefficients of a treatment are a test of every gene: differential expression.

The counts are simulated, so that we know the answer: two factors, two batches that shift every
gene, and a treatment that changes every fifth gene.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from sknbln import NBLNEstimator
from sknbln.datasets import make_nbln_counts
from sknbln.plotting import EmbeddingDisplay

n_cells, n_genes = 400, 100
rng = np.random.default_rng(0)
obs = pd.DataFrame(
    {
        "batch": rng.choice(["first", "second"], n_cells),
        "treatment": pd.Categorical(
            rng.choice(["control", "drug"], n_cells), categories=["control", "drug"]
        ),
    }
)
second, drug = obs["batch"] == "second", obs["treatment"] == "drug"
batch_effect = rng.normal(0, 0.7, n_genes)
drug_effect = np.where(np.arange(n_genes) % 5 == 0, rng.normal(0, 0.5, n_genes), 0.0)
counts = make_nbln_counts(
    n_cells,
    n_genes,
    n_factors=2,
    loading_norms=(0.2, 0.5),
    mean_range=(0.3, 30.0),
    offset=np.outer(second, batch_effect) + np.outer(drug, drug_effect),
    random_state=0,
)
X = counts.data

# %%
# Two fits of the same counts. Columns of strings, booleans and categorical types are coded by
# contrasts with their first level; numeric columns are used as they are. With an ``AnnData``
# object, the argument is ``covariates=adata.obs[["batch", "treatment"]]``.
plain = NBLNEstimator(random_state=0).fit(X)
model = NBLNEstimator(random_state=0).fit(X, covariates=obs)
print("covariates", model.covariate_names_in_)
print(f"factors found: {plain.latent_dim_} without covariates, {model.latent_dim_} with them")

# %%
# Without covariates, a factor is spent on the batches. With them, the factors are the two
# that the counts were simulated with. Methods that take rows take the covariates of these rows.
embeddings = {
    "without covariates": plain.transform(X),
    "with covariates": model.transform(X, covariates=obs),
}
figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for ax, (title, Z) in zip(axes, embeddings.items(), strict=True):
    EmbeddingDisplay(Z[:, :2], groups=obs["batch"]).plot(ax=ax)
    ax.set_title(title)
    centred = Z - Z.mean(axis=0)
    explained = centred @ np.linalg.lstsq(centred, second - second.mean(), rcond=None)[0]
    print(f"correlation of batch and scores {title}: {np.std(explained) / np.std(second):.2f}")
plt.show()

# %%
# The coefficients are in nats: differences of log-rates from the first level. Capture offsets are
# estimated per cell, so that a shift of all genes together looks like another capture efficiency:
# coefficients are read relative to one another.
table = model.coef_test()
of_drug = table[table["covariate"] == "treatment[drug]"]
print(of_drug.sort_values("p_value").head().to_string(index=False))

# %%
# The genes that the drug changes, at a false discovery rate of 5 %. What is missed are small effects
# and genes with few counts.
found = (of_drug["q_value"] < 0.05).to_numpy()
true = drug_effect != 0
print(f"{np.sum(found & true)} of {true.sum()} found, {np.sum(found & ~true)} others")

figure, ax = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
for rows, label, colour in ((~found, "q >= 0.05", "0.6"), (found, "q < 0.05", "#D55E00")):
    ax.errorbar(
        drug_effect[rows],
        of_drug["coefficient"][rows],
        1.96 * of_drug["standard_error"][rows],
        fmt="o",
        color=colour,
        markersize=4,
        elinewidth=1,
        label=label,
    )
ax.axline((0, 0), slope=1, color="0.3", linewidth=1)
ax.set(xlabel="true effect of the drug (nats)", ylabel="coefficient, 95 % interval")
ax.spines[["top", "right"]].set_visible(False)
ax.legend(frameon=False)
plt.show()

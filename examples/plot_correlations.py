"""
Gene-gene correlations of immune cells, with checks
===================================================

Correlations between genes are easy to compute and hard to trust. The order here is: hold cells
out, fit, see whether the fit converged, check it against the held-out cells, and only then read
correlations.
"""

import warnings

import matplotlib.pyplot as plt
import numpy as np
from sklearn.model_selection import train_test_split

from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln.datasets import load_immune_cells
from sknbln.plotting import (
    CalibrationDisplay,
    CompositionalCornerDisplay,
    ConvergenceDisplay,
    CorrelationDisplay,
    PPCDisplay,
)
from sknbln.predictive import predictive_check

cells = load_immune_cells(as_frame=True)
X = cells.data
train, test = train_test_split(X, random_state=0, stratify=cells.target)
genes = NBVCPEstimator(random_state=0).fit(train)
settings = {
    "literal cascade": {"cascade": "parameter", "latent_dim": 12},
    "default": {},
}
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    models = {
        name: NBLNEstimator(informative_prior_estimator=genes, random_state=0, **options).fit(train)
        for name, options in settings.items()
    }
# the literal cascade warns of what is wrong with it
print(*(f"{w.category.__name__}: {w.message}" for w in said), sep="\n")

# %%
# Did the fit converge? The objective rises to within the tolerance, and the mode of every
# training cell was found.
model = models["default"]
ConvergenceDisplay.from_estimator(model)
plt.show()

# %%
# Numbers before pictures. A predictive p-value says where an observed statistic of a gene lies
# among those of replicated cells. When the model is right, 5 % of the genes lie outside [0.025,
# 0.975]. The cells are held out.
print(f"{'':<28s}{'score':>9s}   genes outside, in %")
print(f"{'':<28s}{'':>9s}    mean  variance  zeros  maximum")
for name, fit in {"independent genes": genes, **models}.items():
    found = predictive_check(fit, test, n_samples=200, random_state=0).summary
    outside = [100 * found[f"{what}_outside"] for what in ("mean", "variance", "zero_fraction")]
    outside.append(100 * found["maximum_outside"])
    print(f"{name:<28s}{fit.score(test):9.1f}{outside[0]:8.0f}", end="")
    print(f"{outside[1]:10.0f}{outside[2]:7.0f}{outside[3]:9.0f}")

# %%
# By score, the factor models predict held-out cells far better than independent genes do, and
# still no model passes. With free dispersions, more than a quarter of the genes have the wrong
# mean among the new cells, and nearly four in ten have the wrong variance, which the model mostly
# overestimates. This check is of *marginal distributions* over one population of cells, and three
# cell types are not one normal distribution. For a gene that is on in a quarter of the cells, the
# model uses a log-normal marginal of the right width, whose tail is too heavy. The literal
# cascade counts dispersion twice, and so predicts too many zeros. Trust these fits for structure,
# not for tail probabilities.

# %%
# Count by count: randomized quantile residuals, and the variance and the mean of each gene in the
# data and in the model. The median gene is right; one in five is not. The model's variances are
# somewhat too large at all means, and many means leave the bars, which agrees with the table.
CalibrationDisplay.from_estimator(model, test, random_state=0)
plt.show()

# %%
# Gene by gene: the observed counts of the held-out cells against replicated counts, for genes
# from rare to abundant.
PPCDisplay.from_estimator(model, test, random_state=0)
plt.show()

# %%
# Gene against gene: compositions of the cells, and of the model before count noise. Markers that
# are on in one cell type and off in another form two clouds, one of them at zero. The model has
# one normal distribution for all cells, and covers both clouds with one broad ellipse. It
# describes the mixture, not a single type.
CompositionalCornerDisplay.from_estimator(model, test, n_genes=4, random_state=0)
plt.show()

# %%
# Now the correlations. They are of log-rates relative to the cell's level, so no assumption on
# capture can change them. The picture shows two dozen genes of known function, ordered by
# clustering. Genes that hardly vary, such as those of the ribosome, are left out: relative to the
# cell's level they all move alike, and ``get_correlation`` warns of them.
markers = [
    *("CD3D", "CD3E", "CD2", "IL32", "LTB", "CCL5", "CCL4", "NKG7"),  # lymphocytes
    *("CD14", "CD68", "C1QA", "C1QB", "LYZ", "S100A8", "S100A9", "TYROBP"),  # myeloid
    *("HLA-DRA", "HLA-DPA1", "HLA-DRB1", "CD74"),  # antigen presentation
    *("JUN", "FOS", "HSPA1A"),  # stress
]
CorrelationDisplay.from_estimator(model, genes=markers)
plt.show()

# %%
# Genes that belong together form blocks: T cells against macrophages, the complement genes C1QA
# and C1QB, the calprotectin pair S100A8 and S100A9, antigen presentation. Most of the large
# correlations come from the difference between macrophages and T cells: they are
# correlations *between* types. To ask about the rest, fit within a type.
#
# How certain are these correlations? Refit on resampled cells; here those of the log-rates themselves.
rng = np.random.RandomState(0)
refits = []
for _ in range(5):
    rows = rng.choice(len(train), len(train))
    refit = NBLNEstimator(
        latent_dim=model.latent_dim_, informative_prior_estimator=genes, random_state=0
    ).fit(train.iloc[rows])
    refits.append(refit.get_correlation("log_rate"))
refits = np.array(refits)
correlation = model.get_correlation("log_rate").to_numpy()
upper = np.triu_indices(len(X.columns), 1)
spread = refits.std(axis=0, ddof=1)
print(f"median standard error of a correlation: {np.median(spread[upper]):.2f}")
print("pairs whose weakest refit is strongest:")
for i in np.argsort(-np.abs(refits[:, *upper]).min(axis=0))[:8]:
    g, h = upper[0][i], upper[1][i]
    print(
        f"  {X.columns[g]:>10s} {X.columns[h]:<10s} {correlation[g, h]:6.2f} +- {spread[g, h]:.2f}"
    )

# %%
# All of these genes belong to known complexes: MHC class II, complement C1q and the ribosome. The
# standard errors do not include the uncertainty of the source, which was not refitted. Nor do
# they include what resampling cannot show: that the model's marginal distributions are wrong for
# some genes.

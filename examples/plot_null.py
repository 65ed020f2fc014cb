"""
Where nothing should be found
=============================

Spike-in controls put the same mixture of molecules into every well, so all variation between
wells comes from capture and counting. A method that finds structure there finds it anywhere. This
example simulates such counts, so that we know that there is no structure, and a positive control
to compare them with.
"""

import warnings

import matplotlib.pyplot as plt
import numpy as np

from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln.datasets import make_nbln_counts, make_nbvcp_counts
from sknbln.plotting import LoadingsSpectrumDisplay

shape = {"n_cells": 500, "n_genes": 90, "capture_sd": 0.6}
null = make_nbvcp_counts(**shape, mean_range=(0.05, 100.0), random_state=0)
weak = make_nbln_counts(
    **shape, mean_range=(0.05, 100.0), n_factors=2, loading_norms=(0.2, 0.4), random_state=0
)
train, test = slice(0, 400), slice(400, None)

# %%
# Each data set gets three fits: independent genes; eight factors; the number of factors that the
# scores of the counts show. Where they show none, the fit says so in a warning.
settings = {"eight factors": {"latent_dim": 8}, "found": {"latent_dim": "auto"}}
models = {}
print("gain over independent genes (nats per cell, held out), effective rank")
for data, X in (("null", null.data), ("two weak factors", weak.data)):
    genes = NBVCPEstimator(random_state=0).fit(X[train])
    for name, options in settings.items():
        model = NBLNEstimator(informative_prior_estimator=genes, random_state=0, **options)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* found no factor")
            model.fit(X[train])
        gain = model.score(X[test]) - genes.score(X[test])
        rank = model.w_prior_diagnostics_["effective_rank"]
        print(f"  {data:<18s}{name:<14s}{gain:8.2f}{rank:6d}")
        models[data, name] = model

# %%
# Asked for eight components, a fit gives eight on the null, and the held-out score says that they
# are worth less than nothing. Left to itself it finds none there, and the real factors of the
# positive control.
styles = {"eight factors": ("#0072B2", "o"), "found": ("#009E73", "^")}  # safe for the colour-blind
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
for ax, data in zip(axes, ("null", "two weak factors"), strict=True):
    for name, (colour, marker) in styles.items():
        norms = np.linalg.norm(models[data, name].components_, axis=1)
        ax.plot(np.arange(1, norms.size + 1), norms, marker=marker, color=colour, label=name)
    ax.set(title=data, xlabel="component")
    ax.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("norm of the loadings (nats)")
axes[1].legend(frameon=False)
plt.show()

# %%
# How many factors there are is found in two steps, which a picture shows. A factor has an eigenvalue of
# the scores that is larger than those of permuted scores; then its column, after a few sweeps, has more
# information than noise has. In the null no eigenvalue is above those of permuted scores, so that
# there are no columns to look at.
for data in ("two weak factors", "null"):
    display = LoadingsSpectrumDisplay.from_estimator(models[data, "found"])
    display.figure_.suptitle(data)
plt.show()

# %%
# A fit makes claims about the covariances of log-rates between genes, relative to the cell's
# level. In the null, the true covariances are all zero.
upper = np.triu_indices(shape["n_genes"], 1)


def covariances(model):
    """Off-diagonals of the compositional covariance that the factors explain, nats squared."""
    return (model.components_.T @ model.components_)[upper]


figure, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
bins = np.linspace(-0.2, 0.2, 81)
for name, line in (("eight factors", "--"), ("found", "-")):
    values = covariances(models["null", name])
    print(f"null, {name:<14s}largest covariance {np.abs(values).max():.1e}")
    ax.hist(
        np.clip(values, bins[0], bins[-1]),
        bins,
        histtype="step",
        color=styles[name][0],
        linestyle=line,
        linewidth=1.8,
        label=name,
    )
ax.set(
    xlabel="estimated covariance of log-rates (truth: 0; the outermost bins hold what is beyond)",
    ylabel="pairs of genes",
    yscale="log",
    title="Null: 4,005 pairs of genes",
)
ax.spines[["top", "right"]].set_visible(False)
ax.legend(frameon=False)
plt.show()

# %%
# Correlations do not help here. A correlation is a ratio: where the log-rates have almost no
# variance, it divides zero by zero and can take any value. Look at the rank and the variances
# first; where the rank is 0, there are no correlations to read.
print("null                  median sd of log-rates   largest correlation")
for name in settings:
    model = models["null", name]
    sd = np.sqrt(np.median(np.sum(model.components_**2, axis=0) + model.noise_variance_))
    largest = np.abs(model.get_correlation()[upper]).max()
    print(f"  {name:<20s}{sd:12.3f} nats{largest:22.2f}")

# %%
# For comparison, here is the usual recipe, Pearson's correlation of the logarithms of counts per
# library. On the null it does well: its values scatter as those of 400 independent cells do, with
# a standard deviation of 1/20. The positive control shows its price.
for data, X in (("null", null.data), ("two weak factors", weak.data)):
    counts = X[train].toarray()
    size = counts.sum(axis=1, keepdims=True)
    pearson = np.corrcoef(np.log1p(counts / size * np.median(size)).T)[upper]
    print(f"{data:<18s}Pearson: sd {pearson.std():.3f}, largest {np.abs(pearson).max():.2f}")


def against(truth, estimate):
    """Correlation with the truth, and slope of the truth on the estimate (1 is calibrated)."""
    slope = (truth @ estimate) / (estimate @ estimate)
    return f"correlation with the truth {np.corrcoef(truth, estimate)[0, 1]:.2f}, slope {slope:.2f}"


sigma = weak.loadings @ weak.loadings.T + np.diag(weak.noise_variance)
true_correlation = (sigma / np.sqrt(np.outer(np.diag(sigma), np.diag(sigma))))[upper]
model = models["two weak factors", "found"]
print("\ntwo weak factors, off-diagonals")
print("  Pearson:               ", against(true_correlation, pearson))
print("  NBLN, correlation:     ", against(true_correlation, model.get_correlation()[upper]))
print("  NBLN, covariance:      ", against(sigma[upper], covariances(model)))

# %%
# Pearson's correlations are too small by half or more, since counting noise is in their
# denominator, and they follow the truth less closely. The model's covariances and correlations are
# both close to calibrated.

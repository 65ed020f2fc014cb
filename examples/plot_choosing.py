"""
Choosing a setting by held-out score
====================================

How many factors, which parameters to freeze, which prior: the held-out log-likelihood of a row is
on one scale for all of these choices, so one grid search can make them. The data are the 600
immune cells that come with the package.
"""

import warnings
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score

from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln.datasets import load_immune_cells

X = load_immune_cells().data
folds = KFold(3, shuffle=True, random_state=0)

# %%
# The grid is a list: each entry is a family of settings. The source of the cascade is passed
# unfitted, so that it is fitted on the training rows of each fold; ``memory`` keeps that fit for
# all candidates of the fold. A fit stops when its sweeps gain less than the fraction ``tol`` of
# the log-posterior: 0.06 nats per cell here, where settings differ by whole nats. Two families
# warn of what the scores will show: the literal cascade counts overdispersion twice, and with eight
# factors all columns are real, so that the rank under ARD is only a bound. These warnings are
# expected.
families = {
    "literal cascade": {"latent_dim": [2, 4, 8, 16], "cascade": ["parameter"]},
    "default cascade": {"latent_dim": [2, 4, 8, 16]},
    "default cascade, ARD": {"latent_dim": [8, 16], "loadings_prior": ["ard"]},
}
with TemporaryDirectory() as cache, warnings.catch_warnings():
    for expected in ("Overdispersion is counted twice", "All .* columns of the loadings are real"):
        warnings.filterwarnings("ignore", message=expected)
    model = NBLNEstimator(
        informative_prior_estimator=NBVCPEstimator(random_state=0),
        memory=cache,
        tol=1e-4,
        random_state=0,
    )
    search = GridSearchCV(model, list(families.values()), cv=folds, refit=False).fit(X)
independent = cross_val_score(NBVCPEstimator(random_state=0), X, cv=folds)
print(f"independent genes: {independent.mean():.1f} nats per cell")
print(f"best: {search.best_params_}, {search.best_score_:.1f} nats per cell")

# %%
# Folds differ by more nats than settings do, and every candidate sees the same folds. So subtract
# the score of independent genes on the same fold before taking means and spreads.
table = pd.DataFrame(search.cv_results_)
splits = table[[f"split{i}_test_score" for i in range(folds.n_splits)]].to_numpy()
table["gain"] = (splits - independent).mean(axis=1)
table["spread"] = (splits - independent).std(axis=1, ddof=1) / np.sqrt(folds.n_splits)
table["family"] = np.repeat(list(families), [len(f["latent_dim"]) for f in families.values()])
print(f"\nspread of the raw score over folds   {splits.std(axis=1).mean():.1f} nats")
print(f"spread of the gain over folds        {table['spread'].mean():.1f} nats\n")
shown = table.pivot(index="param_latent_dim", columns="family", values="gain")[list(families)]
print(shown.round(1).to_string(na_rep=""))

# %%
figure, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
styles = [("#E69F00", "s"), ("#0072B2", "o"), ("#009E73", "^")]  # safe for the colour-blind
for shift, (family, (colour, marker)) in enumerate(zip(families, styles, strict=True)):
    rows = table[table["family"] == family]
    ax.errorbar(
        rows["param_latent_dim"].astype(float) * 1.03 ** (shift - 1),
        rows["gain"],
        rows["spread"],
        color=colour,
        marker=marker,
        capsize=3,
        label=family,
    )
ax.set_xscale("log", base=2)
ax.set_xticks([2, 4, 8, 16], ["2", "4", "8", "16"])
ax.set(
    xlabel="latent_dim",
    ylabel="gain over independent genes\n(nats per cell, held out)",
    title="Three folds: mean and standard error",
)
ax.spines[["top", "right"]].set_visible(False)
ax.legend(frameon=False)
plt.show()

# %%
# Letting the data refine the dispersions is worth more than adding factors. Two factors with free
# dispersions score as well as sixteen under the default freeze, because the independent genes'
# dispersions already hold the variance that the factors explain. With 400 training cells the
# score still rises at 16 factors, but ever more slowly. The ARD prior makes no difference here:
# these cells support nearly all the factors of the model, so there is little to shrink. The prior
# helps where ``latent_dim`` is larger than the data support; only a search like this one can show
# where that is.

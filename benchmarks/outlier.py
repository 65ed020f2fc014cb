"""How far one outlier cell moves the components, against what an ordinary cell and sampling do.

    python benchmarks/outlier.py [--cells 300] [--genes 40] [--seeds 3]

The outlier has 100 times the median library and 90 % of it in one gene; the other counts are spread as
in an ordinary cell. The move is the largest principal angle, in degrees, between the subspaces of the true
number of components with and without a cell. One line per setting, medians over the seeds:

outlier   one outlier cell added, the largest over the seeds in brackets
ordinary  one ordinary cell left out, the largest of 5
sampling  the fits of two halves of the cells against each other, divided by 2: about the standard
          error of the subspace with all cells
share     outlier / ordinary

The last line is principal components of the logarithms of depth-normalized counts, for comparison.
"""

import argparse
import warnings

import numpy as np
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA

from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln.datasets import make_nbln_counts

RANK = 2
SETTINGS = {
    "default": {},
    "literal": {"cascade": "parameter"},
    "free dispersion": {
        "cascade": "parameter",
        "informative_priors_freeze": ("eta",),
        "informative_priors_tau": np.inf,
    },
    "ard": {"loadings_prior": "ard"},
    "poisson": {"observation": "poisson"},
    "PCA of log counts": None,
}


def with_outlier(X, gene=0, times=100.0, share=0.9):
    """X and one more row: an ordinary row's other counts, scaled, and `share` of the total in one gene."""
    total = times * np.median(X.sum(1))
    row = X.mean(0)
    row[gene] = 0.0
    row *= (1.0 - share) * total / row.sum()
    row[gene] = share * total
    return np.vstack([X, np.round(row)])


def components(X, options, seed=0):
    """Components of a fit, (RANK, n_genes)."""
    if options is None:
        rates = np.log1p(X / X.sum(1, keepdims=True) * np.median(X.sum(1)))
        return PCA(RANK, random_state=seed).fit(rates).components_
    source = NBVCPEstimator(random_state=seed).fit(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = NBLNEstimator(
            RANK, informative_prior_estimator=source, random_state=seed, tol=1e-7, **options
        ).fit(X)
    return model.components_


def angle(A, B):
    """Largest principal angle between two sets of components, degrees."""
    return float(np.degrees(subspace_angles(A.T, B.T).max()))


def measure(n_cells, n_genes, options, seed):
    """(outlier, ordinary, sampling) of one seed, degrees."""
    counts = make_nbln_counts(n_cells, n_genes, n_factors=RANK, random_state=seed)
    X = counts.data.toarray().astype(float)
    gene = int(np.argsort(X.mean(0))[n_genes // 2])
    usual = components(X, options)
    outlier = angle(usual, components(with_outlier(X, gene), options))
    left_out = [components(np.delete(X, c, 0), options) for c in range(5)]
    ordinary = max(angle(usual, found) for found in left_out)
    halves = [components(X[i::2], options) for i in range(2)]
    return outlier, ordinary, angle(*halves) / 2.0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=300)
    parser.add_argument("--genes", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    given = parser.parse_args()
    print("| setting | outlier | ordinary | sampling | share |")
    print("|---|---|---|---|---|")
    for label in given.settings:
        found = [measure(given.cells, given.genes, SETTINGS[label], s) for s in range(given.seeds)]
        outlier, ordinary, sampling = np.median(found, axis=0)
        largest = np.max(found, axis=0)[0]
        print(
            f"| {label} | {outlier:.2f} ({largest:.2f}) | {ordinary:.2f} | {sampling:.2f} "
            f"| {outlier / ordinary:.1f} |",
            flush=True,
        )

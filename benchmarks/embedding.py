"""Do clusters of an embedding agree with cell types: k-means on held-out immune cells.

    python benchmarks/embedding.py [--latent-dim auto 8 16] [--splits 3]

The embeddings are fitted to two thirds of the 600 cells of ``sknbln.datasets.load_immune_cells``. The
other cells are transformed, and clustered by k-means into as many clusters as there are cell types (10
starts). The numbers are adjusted Rand indices between clusters and cell types: 1 where they agree, 0 on
average for clusters at random. Mean over the splits, lowest and highest in brackets.

whiten=False  principal coordinates: scores times the norms of their components
whiten=True   standardized scores

NBLN is fitted with its defaults but for the number of factors, which it finds itself under "auto"; PCA, of
the logarithms of depth-normalized counts, has as many components.
"""

import argparse
import warnings

import numpy as np
from _common import table
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score
from sklearn.model_selection import StratifiedShuffleSplit

from sknbln import NBLNEstimator
from sknbln.datasets import load_immune_cells


def agreement(embedding, types):
    """Adjusted Rand index between the clusters of an embedding and the cell types."""
    clusters = KMeans(np.unique(types).size, n_init=10, random_state=0).fit_predict(embedding)
    return adjusted_rand_score(types, clusters)


def fit_nbln(X, k):
    """NBLN, and the counts as it takes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the embedding is judged, not the fit
        model = NBLNEstimator(k, random_state=0).fit(X)
    return model, lambda rows: rows


def fit_pca(X, k):
    """PCA, and the logarithms that it takes of counts."""
    typical = np.median(X.sum(axis=1))

    def logs(rows):
        counts = rows.toarray()
        return np.log1p(typical * counts / counts.sum(axis=1, keepdims=True))

    return PCA(k, random_state=0).fit(logs(X)), logs


METHODS = {"NBLN": fit_nbln, "PCA of log counts": fit_pca}


def run(dims, n_splits):
    """Adjusted Rand indices by (method, latent dimension, `whiten`), one per split."""
    cells, found = load_immune_cells(), {}
    splits = StratifiedShuffleSplit(n_splits, test_size=1 / 3, random_state=0)
    for train, test in splits.split(cells.data, cells.target):
        for k in dims:
            n_components = k
            for name in METHODS:
                model, prepared = METHODS[name](cells.data[train], n_components)
                n_components = getattr(model, "latent_dim_", n_components)
                held_out = prepared(cells.data[test])
                for whiten in (False, True):  # neither model's fit depends on it
                    Z = model.set_params(whiten=whiten).transform(held_out)
                    index = agreement(Z, cells.target[test])
                    found.setdefault((name, k, whiten), []).append(index)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latent-dim", nargs="+", default=["auto", "8", "16"])
    parser.add_argument("--splits", type=int, default=3)
    given = parser.parse_args()
    dims = [k if k == "auto" else int(k) for k in given.latent_dim]
    found = run(dims, given.splits)
    rows = []
    for name in METHODS:
        for k in dims:
            values = (found[name, k, whiten] for whiten in (False, True))
            rows.append(
                [name, k, *(f"{np.mean(v):.2f} ({min(v):.2f}, {max(v):.2f})" for v in values)]
            )
    print(table(["method", "dimensions", "whiten=False", "whiten=True"], rows))

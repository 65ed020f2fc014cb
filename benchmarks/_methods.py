"""The methods that are compared: settings of ours, and the peers. Each is imported in its worker only."""

import importlib.util
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from _common import unit_scores

#: parameters of NBLNEstimator by setting; the number of factors that is given unless they name it
OURS = {
    "default": {"latent_dim": "auto"},
    "k": {},
    "ard": {"loadings_prior": "ard"},
}


class Fit(NamedTuple):
    """What a fit is judged by.

    ``loadings`` (n_genes, k) belong to scores of covariance I. ``scores`` are those of the training rows,
    None where `transform` gives them. `transform` and `score` are None where the method has none.
    """

    loadings: np.ndarray
    scores: np.ndarray | None = None
    transform: Callable | None = None
    score: Callable | None = None
    numbers: dict[str, Any] = {}


class Method(NamedTuple):
    """``fit(X, k, seed, capture_prior)`` of CSR counts; ``modules`` are imported before the baseline."""

    fit: Callable
    modules: tuple
    note: str


# ------------------------------------------------------------------ ours


def fit_ours(X, k, seed, capture_prior, setting):
    """NBVCP, then NBLN given it."""
    from sknbln import NBLNEstimator, NBVCPEstimator

    start = time.perf_counter()
    source = NBVCPEstimator(capture_efficiency=capture_prior, random_state=seed).fit(X)
    middle = time.perf_counter()
    options = {"latent_dim": k, **OURS[setting]}
    model = NBLNEstimator(informative_prior_estimator=source, random_state=seed, **options).fit(X)
    numbers = {
        "nbvcp_s": middle - start,
        "nbln_s": time.perf_counter() - middle,
        "iterations": model.n_iter_,
        "nbvcp_iterations": source.n_iter_,
        "converged": bool(source.converged_ and model.converged_),
        "rank": model.w_prior_diagnostics_["effective_rank"],
    }
    return Fit(model.components_.T, None, model.transform, model.score, numbers)


# ------------------------------------------------------------------ peers


def fit_factor_analysis(X, k, seed, capture_prior):
    """Factor analysis of log(1 + counts per million)."""
    from sklearn.decomposition import FactorAnalysis

    def logs(X):
        counts = X.toarray().astype(float)
        return np.log1p(1e6 * counts / np.maximum(counts.sum(1, keepdims=True), 1.0))

    model = FactorAnalysis(k, random_state=seed).fit(logs(X))
    return Fit(
        model.components_.T,
        transform=lambda X: model.transform(logs(X)),
        numbers={"iterations": int(model.n_iter_)},
    )


def fit_fastglmpca(X, k, seed, capture_prior, dense=False):
    """Poisson GLM-PCA; `dense` gives it a dense matrix, which it treats by other code."""
    import fastglmpca

    form = (lambda X: X.toarray().astype(np.float32)) if dense else (lambda X: X)
    model = fastglmpca.poisson(form(X), n_pcs=k, seed=seed, progress_bar=False, return_model=True)
    scores = model.U * model.d
    return Fit(
        unit_scores(model.V, scores),
        scores,
        transform=lambda X: model.project(form(X), progress_bar=False),
        numbers={"iterations": len(model.loglik_history_) - 1},
    )


def fit_glmpca(X, k, seed, capture_prior):
    """Negative binomial GLM-PCA; genes without counts, which it refuses, get loadings 0."""
    from glmpca.glmpca import glmpca

    np.random.seed(seed)  # noqa: NPY002  glmpca draws its start from the global generator
    counts = X.toarray()
    seen = counts.sum(0) > 0
    found = glmpca(counts[:, seen].T, k, fam="nb")
    loadings = np.zeros((X.shape[1], k))
    loadings[seen] = found["loadings"]
    return Fit(
        unit_scores(loadings, found["factors"]),
        found["factors"],
        numbers={"iterations": len(found["dev"]) - 1},
    )


def fit_plnpca(X, k, seed, capture_prior, offsets="zero"):
    """Poisson log-normal PCA by variational inference, at most 400 iterations as it comes."""
    import torch
    from pyPLNmodels import PlnPCA

    torch.manual_seed(seed)
    model = PlnPCA(X.toarray(), rank=k, compute_offsets_method=offsets).fit()
    return Fit(model.components.numpy().astype(float), model.latent_mean.numpy().astype(float))


def fit_linear_scvi(X, k, seed, capture_prior, epochs=3000):
    """Linearly decoded variational autoencoder, negative binomial."""
    import anndata
    import scvi
    from scipy.sparse import csr_matrix

    scvi.settings.seed = seed
    scvi.settings.verbosity = 40

    def annotated(X):
        # scvi knows sparse matrices, not sparse arrays
        data = anndata.AnnData(csr_matrix(X, dtype=np.float32))
        scvi.model.LinearSCVI.setup_anndata(data)
        return data

    data = annotated(X)
    model = scvi.model.LinearSCVI(data, n_latent=k, gene_likelihood="nb")
    model.train(max_epochs=epochs, accelerator="cpu", enable_progress_bar=False, logger=False)
    scores = model.get_latent_representation(data)
    return Fit(
        unit_scores(model.get_loadings().to_numpy(), scores),
        scores,
        transform=lambda X: model.get_latent_representation(annotated(X)),
        numbers={"iterations": epochs},
    )


PEERS = {
    "factoranalysis": Method(
        fit_factor_analysis, ("sklearn.decomposition",), "log1p of counts per million, SVD"
    ),
    "fastglmpca": Method(fit_fastglmpca, ("fastglmpca",), "Poisson, sparse input"),
    "fastglmpca-dense": Method(
        partial(fit_fastglmpca, dense=True), ("fastglmpca",), "Poisson, dense input"
    ),
    "glmpca": Method(fit_glmpca, ("glmpca.glmpca",), "negative binomial"),
    "plnpca": Method(fit_plnpca, ("torch", "pyPLNmodels"), "no offsets, its default"),
    "plnpca-logsum": Method(
        partial(fit_plnpca, offsets="logsum"), ("torch", "pyPLNmodels"), "offsets of row totals"
    ),
    "linearscvi": Method(fit_linear_scvi, ("anndata", "scvi"), "negative binomial, 3,000 epochs"),
}
DEFAULT_PEERS = ("factoranalysis", "fastglmpca", "fastglmpca-dense", "glmpca", "plnpca")
METHODS = {
    f"sknbln {name}": Method(partial(fit_ours, setting=name), ("sknbln",), str(OURS[name] or ""))
    for name in OURS
} | PEERS


def missing(name):
    """Top-level modules of a method that are not installed."""
    tops = (module.partition(".")[0] for module in METHODS[name].modules)
    return [top for top in tops if importlib.util.find_spec(top) is None]

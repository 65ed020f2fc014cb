"""Marginal log-likelihood of a cell by importance sampling: slow, with a known standard error.

The scores (and the capture offset) are drawn from a Gaussian around the Laplace posterior; given
them the genes are independent, and each gene's own residual is integrated by Gauss-Hermite
quadrature.
"""

import numpy as np
from scipy.special import gammaln, logsumexp


def nb_log_pmf(u, log_mean, r):
    """Negative binomial (Poisson where r is inf), written with scipy's gammaln alone."""
    u, log_mean, r = (np.asarray(a, float) for a in (u, log_mean, r))
    poisson = np.isinf(r)
    size = np.where(poisson, 1.0, r)
    s = log_mean - np.log(size)
    constants = gammaln(u + size) - gammaln(size) - gammaln(u + 1)
    nb = constants + u * s - (u + size) * np.logaddexp(0, s)
    if not poisson.any():
        return nb
    return np.where(poisson, u * log_mean - np.exp(log_mean) - gammaln(u + 1), nb)


def log_marginal(
    u,
    mean,
    loadings,
    noise,
    r,
    offset,
    scale,
    *,
    posterior_mean,
    posterior_cov,
    n_draws,
    rng,
    n_nodes=21,
):
    """One cell. Returns the estimate and its standard error (delta method).

    ``posterior_mean`` (k + 1,) and ``posterior_cov`` belong to the standardized scores and capture
    deviation: ``offset_c = offset - scale * zeta[-1]``.
    """
    F = np.column_stack([loadings, np.full(mean.size, scale)])
    n = F.shape[1]
    L = np.linalg.cholesky(1.3 * posterior_cov + 1e-12 * np.eye(n))
    eps = rng.standard_normal((n_draws, n))
    zeta = posterior_mean + eps @ L.T
    log_q = -0.5 * np.sum(eps**2, 1) - np.sum(np.log(np.diag(L)))
    log_prior = -0.5 * np.sum(zeta**2, 1)
    centre = mean - offset + zeta @ F.T  # (n_draws, n_genes)
    blocks = np.array_split(centre, -(-centre.size // 100_000))  # they stay in the cache
    log_p = np.concatenate([_given_scores(u, block, noise, r, n_nodes) for block in blocks])
    log_w = log_p + log_prior - log_q
    estimate = logsumexp(log_w) - np.log(n_draws)
    w = np.exp(log_w - log_w.max())
    return estimate, w.std() / w.mean() / np.sqrt(n_draws)


def _given_scores(u, centre, noise, r, n_nodes):
    """Log-probability of the cell given each row of log-rates ``centre``, residuals integrated."""
    if np.all(noise < 1e-4):
        return nb_log_pmf(u, centre, r).sum(1)
    nodes, weights = np.polynomial.hermite_e.hermegauss(n_nodes)
    weights = np.log(weights / weights.sum())
    # adaptive: nodes around each gene's own posterior mode given the scores
    e = np.zeros_like(centre)
    sd = np.sqrt(noise)
    phi = np.where(np.isinf(r), 0.0, 1.0 / r)
    for _ in range(30):
        rate = np.exp(np.minimum(centre + sd * e, 30))
        fitted = (1 + u * phi) * rate / (1 + phi * rate)
        curvature = 1 + noise * fitted / (1 + phi * rate)
        step = np.clip((sd * (u - fitted) - e) / curvature, -2, 2)
        e = e + step
        if np.max(np.abs(step)) < 1e-6:  # nodes need no exact mode
            break
    width = 1 / np.sqrt(curvature)
    parts = []
    for node, log_weight in zip(nodes, weights, strict=True):
        at = e + width * node
        parts.append(
            nb_log_pmf(u, centre + sd * at, r)
            - 0.5 * at**2
            + 0.5 * node**2
            + np.log(width)
            + log_weight
        )
    return logsumexp(parts, axis=0).sum(1)

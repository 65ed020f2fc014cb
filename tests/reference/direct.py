"""The model of one cell, by dense matrices and SciPy: slow, and easy to check.

The log-rates of a cell are ``y ~ N(loc, Sigma)`` with ``Sigma = F F' + diag(d)``, ``F = [W, s 1]``. Nothing
here is low-rank or batched, and no code is shared with the package: the distribution of the counts is written
with the size r, not with ``phi = 1/r``.
"""

from typing import NamedTuple

import numpy as np
from scipy import linalg, optimize
from scipy.special import expit, log_ndtr, logsumexp

from .importance import nb_log_pmf

REACH = 6.0  # bound of a gene's own variance in the next term of Laplace's expansion


class Laplace(NamedTuple):
    """Laplace approximation of one cell's posterior of y."""

    y: np.ndarray  # mode
    covariance: np.ndarray  # (Sigma^{-1} + A)^{-1}
    log_marginal: float


def factors(loadings, scale):
    """Loadings and the capture column, (n_genes, k + 1)."""
    return np.column_stack([loadings, np.full(len(loadings), scale)])


def covariance(loadings, noise, scale):
    """Prior covariance of y, (n_genes, n_genes)."""
    F = factors(loadings, scale)
    return F @ F.T + np.diag(noise)


def pmf_derivatives(u, y, r):
    """First to fourth derivative of the log-pmf in y (the second and on are negative or signed)."""
    poisson = np.isinf(r)
    size = np.where(poisson, 1.0, r)
    p = expit(y - np.log(size))
    pq = (u + size) * p * (1 - p)
    nb = u - (u + size) * p, -pq, -pq * (1 - 2 * p), -pq * (1 - 6 * p * (1 - p))
    rate = np.exp(np.where(poisson, y, 0.0))
    pln = u - rate, -rate, -rate, -rate
    return [np.where(poisson, a, b) for a, b in zip(pln, nb, strict=True)]


def _maximum(u, loc, A, penalty, r):
    """Maximizer e of ``sum log p(u | loc + A e) - e' diag(penalty) e / 2``."""

    def value(e):
        return -np.sum(nb_log_pmf(u, loc + A @ e, r)) + 0.5 * np.sum(penalty * e**2)

    def gradient(e):
        return -A.T @ pmf_derivatives(u, loc + A @ e, r)[0] + penalty * e

    def hessian(e):
        return -(A.T * pmf_derivatives(u, loc + A @ e, r)[1]) @ A + np.diag(penalty)

    found = optimize.minimize(
        value, np.zeros(A.shape[1]), jac=gradient, hess=hessian, method="trust-exact", tol=1e-6
    )
    e = found.x
    for _ in range(6):  # SciPy stops at rounding errors of the value; the gradient allows more
        e = e - linalg.solve(hessian(e), gradient(e), assume_a="pos")
    return e, hessian(e)


def laplace(u, loc, Sigma, r):
    """Laplace approximation for a Sigma that has an inverse; constants included."""
    L = linalg.cholesky(Sigma, lower=True)
    e, _ = _maximum(u, loc, L, np.ones(len(u)), r)
    y = loc + L @ e
    inverse = linalg.inv(Sigma)
    precision = inverse - np.diag(pmf_derivatives(u, y, r)[1])
    value = (
        np.sum(nb_log_pmf(u, y, r))
        - 0.5 * (y - loc) @ inverse @ (y - loc)
        - 0.5 * np.linalg.slogdet(Sigma)[1]
        - 0.5 * np.linalg.slogdet(precision)[1]
    )
    return Laplace(y, linalg.inv(precision), float(value))


def laplace_whitened(u, loc, loadings, noise, scale, r, flat_offset=False):
    """The same in the coordinates e of ``y = loc + [F, diag(sqrt d)] e``: d may be 0.

    With `flat_offset` the capture column (`scale` must be 1) has no prior; the improper integral over it
    is then left without its factor ``1 / sqrt(2 pi)``, as a limit of ever wider priors times their scale.
    """
    F = factors(loadings, scale)
    A = np.column_stack([F, np.diag(np.sqrt(noise))])
    penalty = np.ones(A.shape[1])
    if flat_offset:
        penalty[F.shape[1] - 1] = 0.0
    e, precision = _maximum(u, loc, A, penalty, r)
    y = loc + A @ e
    value = (
        np.sum(nb_log_pmf(u, y, r))
        - 0.5 * np.sum(penalty * e**2)
        - 0.5 * np.linalg.slogdet(precision)[1]
    )
    return Laplace(y, A @ linalg.inv(precision) @ A.T, float(value))


def second_order(u, y, V, r):
    """The next term of Laplace's expansion of the log-marginal, given mode and covariance.

    ``sum_g f4 V_gg^2 / 8 + sum_gh f3_g f3_h (V_gg V_gh V_hh / 8 + V_gh^3 / 12)``: the likelihood's third and
    fourth derivatives are diagonal in y, the prior has none.
    """
    _, _, f3, f4 = pmf_derivatives(u, y, r)
    v = np.diag(V)
    pair = V * np.outer(v, v) / 8 + V**3 / 12
    return float(np.sum(f4 * v**2) / 8 + f3 @ pair @ f3)


def leading_second_order(u, y, V, noise, r):
    """The part of it that does not shrink as genes are added: what is each gene's own, and the scores' move.

    A gene's own is that of one gene with ``v = 1 / (1 / d - f2)``.
    """
    _, f2, f3, f4 = pmf_derivatives(u, y, r)
    v = noise / (1 - noise * f2)
    bound = 1 / np.sqrt(1 + (v / REACH) ** 2)
    own = np.sum(bound * (f4 * v**2 / 8 + 5 * f3**2 * v**3 / 24))
    pull = bound * f3 * v / 2
    return float(own + 0.5 * pull @ (V - np.diag(v)) @ pull)


def exact(u, loc, Sigma, r, *, half_width=9.0, n=None, log_factor=None):
    """``log p(u)`` for one or two genes, by a fine trapezoid rule around the mode.

    In whitened coordinates the posterior is at least as concave as a standard normal, so nine units
    either side of the mode leave out less than 1e-17, and the rule's error is exponentially small in
    (posterior standard deviation / spacing)^2. ``log_factor`` of y multiplies the integrand.
    """
    L = linalg.cholesky(Sigma, lower=True)
    e, _ = _maximum(u, loc, L, np.ones(len(u)), r)
    n = {1: 6001, 2: 601}[len(u)] if n is None else n
    offsets = np.linspace(-half_width, half_width, n)
    axes = [e_i + offsets for e_i in e]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(u))
    y = loc + grid @ L.T
    log_prior = -0.5 * np.sum(grid**2, 1) - 0.5 * len(u) * np.log(2 * np.pi)
    value = log_prior + np.sum(nb_log_pmf(u, y, r), 1)
    if log_factor is not None:
        value = value + log_factor(y)
    return float(logsumexp(value) + len(u) * np.log(offsets[1] - offsets[0]))


def exact_truncated(u, mean, loadings, noise, r, loc, sd):
    """``log p(u)`` of one or two genes, the offset's prior ``TruncNormal(loc, sd, low=0)``.

    Without the truncation ``y = x - eta`` is Gaussian; the truncation multiplies by
    ``P(eta >= 0 | y) / P(eta >= 0)``, both Gaussian probabilities.
    """
    Sigma = covariance(loadings, noise, sd)
    gain = sd**2 * linalg.solve(Sigma, np.ones(len(u)), assume_a="pos")
    left = np.sqrt(sd**2 * (1 - gain.sum()))

    def log_factor(y):
        conditional = loc - (y - mean + loc) @ gain
        return log_ndtr(conditional / left) - log_ndtr(loc / sd)

    # the truncation may move the posterior by several prior standard deviations: a wider grid
    n = {1: 12_001, 2: 601}[len(u)]
    return exact(u, mean - loc, Sigma, r, half_width=12.0, n=n, log_factor=log_factor)


def exact_offset(u, mean, r, loc, sd, *, n_panels=40, n_nodes=10):
    """``log p(u)`` of independent genes (Sigma = 0) whose offset is ``TruncNormal(loc, sd, low=0)``.

    The one integral is over the offset, by panels of Gauss-Legendre nodes.
    """
    low, high = max(0.0, loc - 10 * sd), max(loc + 10 * sd, 10 * sd)
    nodes, weights = np.polynomial.legendre.leggauss(n_nodes)
    # finer and finer towards the bound, where many counts may press the posterior against it
    edges = np.linspace(low, high, n_panels + 1)
    edges = np.unique(np.r_[edges, low + np.geomspace(1e-7, high - low, n_panels)])
    half = np.diff(edges)[:, None] / 2
    eta = (edges[:-1, None] + half * (nodes + 1)).ravel()
    log_weight = np.log((half * weights).ravel())
    likelihood = np.sum(nb_log_pmf(u, mean - eta[:, None], r), 1)
    log_prior = (
        -0.5 * ((eta - loc) / sd) ** 2 - np.log(sd) - 0.5 * np.log(2 * np.pi) - log_ndtr(loc / sd)
    )
    return float(logsumexp(likelihood + log_prior + log_weight))

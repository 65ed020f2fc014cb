r"""Steps of the global parameters: the gradient times the inverse of a metric.

With the posterior of the scores fixed, the working response of gene g has variance ``1/b``, so
``(mu_g, b_g, w_g)`` solve weighted least squares with matrix ``A_g = sum_c b_cg E[(1, c, z)(1, c, z)']``, c
the covariates of a cell. The step is
``A_g^{-1}`` times the *exact* gradient of the Laplace marginal: without the implicit terms it would be the
expectation-maximization step, with them its fixed point is the optimum of the objective. Changes that all
genes share, those of the lengths and angles of the columns and of the levels of mu and of the coefficients,
come out far too small this way and have Newton steps of their own (`Columns.step`, `shift_step`,
`coef_shift_step`). The coordinate of d takes a
Fisher-scoring step, ``log r`` a Newton step.

All arrays have one row per gene, none has rows for cells.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.linalg import eigh

from .columns import Columns
from .lowrank import triangle
from .params import Params

_MAX_LOG_STEP = 1.0  # nats; largest step of the coordinates of d and r
#: least share of the information of complete data in a common shift of coefficients
_LEAST_SHARE = 1e-6
#: least share of the regressions' curvature along a step that is left without the columns' excess
LEAST_CURVATURE_LEFT = 0.01


class Metric(NamedTuple):
    """Information in the parameters: in the model's own units or, pulled back, in the coordinates."""

    moments: np.ndarray  # (n_genes, T) in each gene's (mu, b, w), packed
    noise: np.ndarray  # (n_genes,)
    dispersion: np.ndarray  # (n_genes,)
    shift: float  # in a common shift of all log-rates
    columns: Columns  # in a common change of all loadings
    coef_shift: np.ndarray = np.zeros((0, 0))  # (p, p) in a common shift of all genes' coefficients
    least_noise: np.ndarray | float = -np.inf  # (n_genes,) it holds for coordinates of d above


def least_squares_matrix(moments, n=None):
    """Unpack the sums of b [1 s][1 s]' to (n_genes, n + 1, n + 1); s are n covariates and scores."""
    n_genes, n_moments = moments.shape
    n = (math.isqrt(8 * n_moments + 1) - 3) // 2 if n is None else n
    A = np.empty((n_genes, n + 1, n + 1))
    A[:, 0, 0] = moments[:, 0]
    A[:, 0, 1:] = A[:, 1:, 0] = moments[:, 1 : n + 1]
    A[:, 1:, 1:] = moments[:, n + 1 :][:, triangle(n)[2]]
    return A


def packed(A):
    """Inverse of `least_squares_matrix`."""
    i, j, _ = triangle(A.shape[1] - 1)
    return np.concatenate([A[:, 0], A[:, 1 + i, 1 + j]], 1)


def regression_step(gradient, metric, free):
    """``A_g^{-1} gradient`` for (mu_g, b_g, w_g), without the rows and columns of what is frozen.

    ``A_g`` includes the precision of the prior of the columns, which holds the deviations of the loadings
    from their mean over genes.
    """
    (n_genes, k), p = gradient.loadings.shape, gradient.coef.shape[1]
    keep = np.r_[free.mean, np.full(p, free.coef), np.full(k, free.loadings)]
    if not keep.any():
        return np.zeros(n_genes), np.zeros((n_genes, k)), np.zeros((n_genes, p))
    A = least_squares_matrix(metric.moments)[:, keep][:, :, keep]
    rhs = _joined(gradient.mean, gradient.coef, gradient.loadings)[:, keep]
    diagonal = np.einsum("gii->gi", A)
    diagonal += 1e-10 * diagonal.mean(1, keepdims=True) + 1e-300
    step = np.zeros((n_genes, 1 + p + k))
    step[:, keep] = np.linalg.solve(A, rhs[:, :, None])[:, :, 0]
    precision = metric.columns.precision
    held = np.flatnonzero(precision > 0) if free.loadings else []
    if len(held):
        # the mean itself has no prior: less precision / n_genes for every pair of genes, by Woodbury
        common = np.zeros((n_genes, 1 + p + k, len(held)))
        common[:, 1 + p :] = np.swapaxes(metric.columns.natural[:, held], 1, 2)
        common = common[:, keep]
        inverse = np.linalg.solve(A, common)
        inner = np.diag(len(A) / precision[held]) - np.einsum("gih,gij->hj", common, inverse)
        shared = np.einsum("gih,gi->h", common, step[:, keep])
        step[:, keep] += inverse @ np.linalg.solve(inner, shared)
    return step[:, 0], step[:, 1 + p :], step[:, 1 : 1 + p]


def _joined(mean, coef, loadings):
    """A gene's (mu, b, w) in a row."""
    return np.concatenate([mean[:, None], coef, loadings], 1)


def shift_step(gradient, metric):
    """Newton step of a common shift of all log-rates, less the part in the regressions' step.

    With free capture offsets the offsets nearly undo a shift of ``mu``, so that its information is far below
    that of the regressions.
    """
    information, complete = metric.shift, float(metric.moments[:, 0].sum())
    if not 0 < information < complete:
        return 0.0
    return float(np.sum(gradient.mean)) * _beyond(information, complete)


def coef_shift_step(gradient, metric):
    """Newton step of a common shift of all genes' coefficients, less the part in the regressions' step, (p,).

    Free capture offsets nearly undo it, as they do a shift of ``mu``: the covariates of a cell shift its
    level. ``v' (I^{-1} - C^{-1}) v`` in the basis in which the information I and that of complete data C are
    diagonal.
    """
    p = gradient.coef.shape[1]
    if not p:
        return np.zeros(0)
    complete = least_squares_matrix(metric.moments.sum(0, keepdims=True))[0, 1 : 1 + p, 1 : 1 + p]
    share, basis = eigh(metric.coef_shift, complete)
    beyond = np.where(share > 0, 1.0 / np.clip(share, _LEAST_SHARE, 1.0) - 1.0, 0.0)
    return basis @ (beyond * (basis.T @ gradient.coef.sum(0)))


def _beyond(information, complete):
    """Inverse of the information less the inverse of that of complete data."""
    safe = np.maximum(information, 1e-300)
    return np.where(information > 0, (1.0 - information / np.maximum(complete, safe)) / safe, 0.0)


def _bounded(information, gradient):
    return np.maximum(information, 1e-8 + 0.1 * np.abs(gradient))


def scale_step(gradient, information):
    """Newton step of the coordinate of d or of log r, at most `_MAX_LOG_STEP`."""
    step = gradient / _bounded(information, gradient)
    return np.clip(step, -_MAX_LOG_STEP, _MAX_LOG_STEP)


def direction(gradient, metric, free):
    """The preconditioned gradient: a step of the `Params`, 0 for what is not free."""
    mean, loadings, coef = regression_step(gradient, metric, free)
    if free.mean:
        mean = mean + shift_step(gradient, metric)
    if free.coef:
        coef = coef + coef_shift_step(gradient, metric)
    if free.loadings:
        loadings = loadings + metric.columns.step(gradient.loadings)
    zero = np.zeros_like(gradient.noise)
    return Params(
        mean,
        loadings,
        scale_step(gradient.noise, metric.noise) if free.noise else zero,
        scale_step(gradient.dispersion, metric.dispersion) if free.dispersion else zero,
        coef,
    )


def product(gradient, metric, step, free):
    """The matrix whose inverse is in `direction`, times a step of what is ``free``."""
    columns = metric.columns
    p = step.coef.shape[1]
    A = least_squares_matrix(metric.moments)

    def regression(mean, coef, loadings):
        product = (A @ _joined(mean, coef, loadings)[:, :, None])[:, :, 0]
        pull = columns.shared_pull(loadings)
        return product[:, 0], product[:, 1 : 1 + p], product[:, 1 + p :] - pull

    mean, coef, loadings = regression(step.mean, step.coef, step.loadings)
    if free.loadings:  # less the excess of the regressions' information, by Woodbury's identity
        S = columns.inverse(columns.complete, columns.project(loadings))
        S = S - columns.inverse(columns.complete, columns.times(columns.observed, S))
        excess = regression(np.zeros_like(mean), np.zeros_like(coef), columns.lift(S))
        own = step.mean, step.coef, step.loadings
        whole, taken = (
            sum(np.sum(a * b) for a, b in zip(own, other, strict=True))
            for other in ((mean, coef, loadings), excess)
        )
        # `complete` is the regressions' information only if they are alike; else the excess may be too large
        if whole - taken > LEAST_CURVATURE_LEFT * whole:
            mean, coef, loadings = mean - excess[0], coef - excess[1], loadings - excess[2]
    return Params(
        mean,
        loadings,
        _bounded(metric.noise, gradient.noise) * step.noise,
        _bounded(metric.dispersion, gradient.dispersion) * step.dispersion,
        coef,
    )

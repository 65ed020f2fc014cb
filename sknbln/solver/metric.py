r"""Steps of the global parameters: the gradient times the inverse of a metric.

With the posterior of the scores fixed, the working response of gene g has variance ``1/b``, so
``(mu_g, w_g)`` solve weighted least squares with matrix ``A_g = sum_c b_cg E[(1, z)(1, z)']``. The step is
``A_g^{-1}`` times the *exact* gradient of the Laplace marginal: without the implicit terms it would be the
expectation-maximization step, with them its fixed point is the optimum of the objective. Changes that all
genes share, those of the lengths and angles of the columns and of the level of mu, come out far too small
this way and have Newton steps of their own (`Columns.step`, `shift_step`). The coordinate of d takes a
Fisher-scoring step, ``log r`` a Newton step.

All arrays have one row per gene, none has rows for cells.
"""

from typing import NamedTuple

import numpy as np

from .columns import Columns
from .lowrank import triangle
from .params import Params

_MAX_LOG_STEP = 1.0  # nats; largest step of the coordinates of d and r
#: least share of the regressions' curvature along a step that is left without the columns' excess
LEAST_CURVATURE_LEFT = 0.01


class Metric(NamedTuple):
    """Information in the parameters: in the model's own units or, pulled back, in the coordinates."""

    moments: np.ndarray  # (n_genes, T) in each gene's (mu, w), packed
    noise: np.ndarray  # (n_genes,)
    dispersion: np.ndarray  # (n_genes,)
    shift: float  # in a common shift of all log-rates
    columns: Columns  # in a common change of all loadings


def least_squares_matrix(moments, k):
    """Unpack the sums of b [1 z][1 z]' to (n_genes, k + 1, k + 1)."""
    n_genes = moments.shape[0]
    A = np.empty((n_genes, k + 1, k + 1))
    A[:, 0, 0] = moments[:, 0]
    A[:, 0, 1:] = A[:, 1:, 0] = moments[:, 1 : k + 1]
    A[:, 1:, 1:] = moments[:, k + 1 :][:, triangle(k)[2]]
    return A


def packed(A):
    """Inverse of `least_squares_matrix`."""
    i, j, _ = triangle(A.shape[1] - 1)
    return np.concatenate([A[:, 0], A[:, 1 + i, 1 + j]], 1)


def regression_step(gradient, metric, free):
    """``A_g^{-1} gradient`` for (mu_g, w_g), without the rows and columns of what is frozen.

    ``A_g`` includes the precision of the prior of the columns, which holds the deviations of the loadings
    from their mean over genes.
    """
    n_genes, k = gradient.loadings.shape
    if not (free.mean or (free.loadings and k)):
        return np.zeros(n_genes), np.zeros((n_genes, k))
    keep = np.r_[free.mean, np.full(k, free.loadings)]
    A = least_squares_matrix(metric.moments, k)[:, keep][:, :, keep]
    rhs = np.concatenate([gradient.mean[:, None], gradient.loadings], 1)[:, keep]
    diagonal = np.einsum("gii->gi", A)
    diagonal += 1e-10 * diagonal.mean(1, keepdims=True) + 1e-300
    step = np.zeros((n_genes, k + 1))
    step[:, keep] = np.linalg.solve(A, rhs[:, :, None])[:, :, 0]
    precision = metric.columns.precision
    held = np.flatnonzero(precision > 0) if free.loadings else []
    if len(held):
        # the mean itself has no prior: less precision / n_genes for every pair of genes, by Woodbury
        common = np.zeros((n_genes, k + 1, len(held)))
        common[:, 1:] = np.swapaxes(metric.columns.natural[:, held], 1, 2)
        common = common[:, keep]
        inverse = np.linalg.solve(A, common)
        inner = np.diag(len(A) / precision[held]) - np.einsum("gih,gij->hj", common, inverse)
        shared = np.einsum("gih,gi->h", common, step[:, keep])
        step[:, keep] += inverse @ np.linalg.solve(inner, shared)
    return step[:, 0], step[:, 1:]


def shift_step(gradient, metric):
    """Newton step of a common shift of all log-rates, less the part in the regressions' step.

    With free capture offsets the offsets nearly undo a shift of ``mu``, so that its information is far below
    that of the regressions.
    """
    information, complete = metric.shift, float(metric.moments[:, 0].sum())
    if not 0 < information < complete:
        return 0.0
    return float(np.sum(gradient.mean)) * _beyond(information, complete)


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
    mean, loadings = regression_step(gradient, metric, free)
    if free.mean:
        mean = mean + shift_step(gradient, metric)
    if free.loadings:
        loadings = loadings + metric.columns.step(gradient.loadings)
    zero = np.zeros_like(gradient.noise)
    return Params(
        mean,
        loadings,
        scale_step(gradient.noise, metric.noise) if free.noise else zero,
        scale_step(gradient.dispersion, metric.dispersion) if free.dispersion else zero,
    )


def product(gradient, metric, step, free):
    """The matrix whose inverse is in `direction`, times a step of what is ``free``."""
    columns = metric.columns
    A = least_squares_matrix(metric.moments, step.loadings.shape[1])

    def regression(mean, loadings):
        product = A @ np.concatenate([mean[:, None], loadings], 1)[:, :, None]
        return product[:, 0, 0], product[:, 1:, 0] - columns.shared_pull(loadings)

    mean, loadings = regression(step.mean, step.loadings)
    if free.loadings:  # less the excess of the regressions' information, by Woodbury's identity
        S = columns.inverse(columns.complete, columns.project(loadings))
        S = S - columns.inverse(columns.complete, columns.times(columns.observed, S))
        excess = regression(np.zeros_like(mean), columns.lift(S))
        whole = np.sum(step.mean * mean) + np.sum(step.loadings * loadings)
        taken = np.sum(step.mean * excess[0]) + np.sum(step.loadings * excess[1])
        # `complete` is the regressions' information only if they are alike; else the excess may be too large
        if whole - taken > LEAST_CURVATURE_LEFT * whole:
            mean, loadings = mean - excess[0], loadings - excess[1]
    return Params(
        mean,
        loadings,
        _bounded(metric.noise, gradient.noise) * step.noise,
        _bounded(metric.dispersion, gradient.dispersion) * step.dispersion,
    )

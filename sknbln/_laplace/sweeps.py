r"""One update of the global parameters from the sums over cells.

Given the posterior of the scores, the working response of gene g has variance ``1/b``, so
``(mu_g, w_g)`` solve a weighted least squares with matrix ``A_g = sum_c b_cg E[(1, z)(1, z)']``. The
step taken here is ``A_g^{-1}`` times the *exact* gradient of the Laplace marginal: without the
implicit terms it is the expectation-maximization step, with them its fixed point is the optimum of
the objective. What all genes change together, the lengths and angles of the columns and the level of
mu, moves by far too little so, and has Newton steps of its own (`Columns`, `shift_step`). ``log d`` takes
a Fisher-scoring step, ``log r`` a Newton step.

Plain NumPy: this works on arrays with one row per gene, never on cells.
"""

from typing import NamedTuple

import numpy as np

from .lowrank import triangle

#: the coordinate of d is log(1 + d / NOISE_UNIT), nats squared: logarithmic above it, linear below
NOISE_UNIT = 0.01
NOISE_RANGE = (np.log1p(1e-6 / NOISE_UNIT), np.log1p(50.0 / NOISE_UNIT))
LOG_DISPERSION_RANGE = (np.log(1e-5), np.log(1e9))
_MAX_LOG_STEP = 1.0


class Parameters(NamedTuple):
    """Global parameters in the coordinates in which steps are taken.

    ``log_noise`` is ``log(1 + d / NOISE_UNIT)``, so that d = 0 is at a finite distance: 0, which is
    kept where it is not free. ``log_r`` may be +inf (Poisson) where it is not free.
    """

    mean: np.ndarray  # (n_genes,)
    loadings: np.ndarray  # (n_genes, k)
    log_noise: np.ndarray  # (n_genes,)
    log_r: np.ndarray  # (n_genes,)

    @property
    def noise(self):
        """Noise variance d of the log-rates."""
        return NOISE_UNIT * np.expm1(self.log_noise)

    def natural(self):
        """Arguments of the cell solver: mean, loadings, noise variance d, overdispersion 1/r."""
        return self.mean, self.loadings, self.noise, np.exp(-self.log_r)

    def moved(self, step, length):
        """These parameters after ``length`` times a step, inside the ranges of the scales."""
        out = [a + length * s for a, s in zip(self, step, strict=True)]
        out[2] = np.where(self.log_noise > 0, np.clip(out[2], *NOISE_RANGE), 0.0)
        out[3] = _clipped(self.log_r, out[3], LOG_DISPERSION_RANGE)
        return Parameters(*out)


def _clipped(old, new, limits):
    return np.where(np.isfinite(old), np.clip(new, *limits), old)


class GaussianPrior(NamedTuple):
    """Independent Gaussian priors; precision 0 is no prior."""

    loc: np.ndarray
    precision: np.ndarray

    @classmethod
    def flat(cls, n):
        """No prior on any of n parameters."""
        return cls(np.zeros(n), np.zeros(n))

    def times(self, other):
        """The product of two priors of the same parameters."""
        precision = self.precision + other.precision
        safe = np.where(precision > 0, precision, 1.0)
        return GaussianPrior(
            (self.precision * self.loc + other.precision * other.loc) / safe, precision
        )

    def log_density(self, x):
        """Without the normalizing constant, which does not depend on x."""
        return 0.5 * float(np.sum(self.gradient(x) * self._residual(x)))

    def gradient(self, x):
        """Of the log-density."""
        return -self.precision * self._residual(x)

    def _residual(self, x):
        # x may be infinite where there is no prior
        return np.where(self.precision > 0, x, self.loc) - self.loc


class Columns(NamedTuple):
    """What is known of a common change of all loadings, ``W (I + S)`` with S symmetric.

    A regression on the scores takes them as known, and so lengthens a column, or turns two towards each
    other, by far too little: it assumes the information ``sum_g b_g w_g w_g' = n H``. The n cells have
    ``2 n tr(R S R S)``, ``R = H (I + H)^{-1}`` the reliability of the scores. In the basis in which H is
    diagonal every entry of S has a number of its own. (Parameter expansion of the EM algorithm, Liu, Rubin
    & Wu 1998, takes such a step for its own reasons.)
    """

    loadings: np.ndarray  # (n_genes, k) in the basis
    basis: np.ndarray  # (k, k)
    information: np.ndarray  # (k, k) of each entry of S
    assumed: np.ndarray  # (k, k) the same by the regression; nowhere less

    @classmethod
    def at(cls, loadings, weight, n_cells, precision):
        """From the sums of b over cells, and the precision (k,) of the prior of the columns."""
        h, basis = np.linalg.eigh(loadings.T @ (weight[:, None] * loadings) / n_cells)
        h = np.maximum(h, 0.0)
        # a column of noise is no longer than its genes' regressions want it
        reliability = np.maximum(h / (1.0 + h), 0.5)
        rotated = loadings @ basis
        pull = np.outer(basis.T**2 @ np.broadcast_to(precision, h.shape), np.sum(rotated**2, 0))
        prior = (pull + pull.T) / 2.0
        assumed = n_cells * (h[:, None] + h[None, :]) / 2.0 + prior
        information = 2.0 * n_cells * np.outer(reliability, reliability) + prior
        return cls(rotated, basis, np.minimum(information, assumed), assumed)

    def project(self, change):
        """The symmetric matrix of inner products of changes of the loadings with ``W S``."""
        T = self.loadings.T @ (change @ self.basis)
        return (T + T.T) / 2.0

    def lift(self, S):
        """``W S``, (n_genes, k)."""
        return self.loadings @ S @ self.basis.T


class Gradients(NamedTuple):
    """Gradient of the log-posterior in `Parameters`, with what preconditions it."""

    mean: np.ndarray
    loadings: np.ndarray
    log_noise: np.ndarray
    log_r: np.ndarray
    moments: np.ndarray
    information_log_noise: np.ndarray
    information_log_r: np.ndarray
    missing_log_r: np.ndarray
    information_shift: float
    columns: Columns


def least_squares_matrix(moments, k):
    """Unpack the sums of b [1 z][1 z]' to (n_genes, k + 1, k + 1)."""
    n_genes = moments.shape[0]
    A = np.empty((n_genes, k + 1, k + 1))
    A[:, 0, 0] = moments[:, 0]
    A[:, 0, 1:] = A[:, 1:, 0] = moments[:, 1 : k + 1]
    A[:, 1:, 1:] = moments[:, k + 1 :][:, triangle(k)[2]]
    return A


def regression_step(grad, free_mean, free_loadings):
    """``A_g^{-1} gradient`` for (mu_g, w_g), with what is frozen left out of the system."""
    k = grad.loadings.shape[1]
    if not (free_mean or (free_loadings and k)):
        return np.zeros_like(grad.mean), np.zeros_like(grad.loadings)
    keep = np.r_[free_mean, np.full(k, free_loadings)]
    A = least_squares_matrix(grad.moments, k)[:, keep][:, :, keep]
    rhs = np.concatenate([grad.mean[:, None], grad.loadings], 1)[:, keep]
    diagonal = np.einsum("gii->gi", A)
    diagonal += 1e-10 * diagonal.mean(1, keepdims=True) + 1e-300
    step = np.zeros((grad.mean.size, k + 1))
    step[:, keep] = np.linalg.solve(A, rhs[:, :, None])[:, :, 0]
    return step[:, 0], step[:, 1:]


def shift_step(grad):
    """Newton step of a common shift of all log-rates, beyond what the regression takes of it.

    With free capture offsets a shift of ``mu`` is nearly undone by the offsets, so that its
    information is far below what the regression assumes.
    """
    information, assumed = grad.information_shift, float(grad.moments[:, 0].sum())
    if not 0 < information < assumed:
        return 0.0
    return float(np.sum(grad.mean)) * _beyond(information, assumed)


def column_step(grad):
    """Newton step of a common change of all loadings, beyond what the regression takes of it."""
    columns = grad.columns
    S = columns.project(grad.loadings) * _beyond(columns.information, columns.assumed)
    return columns.lift(S)


def _beyond(information, assumed):
    """Inverse information less the inverse of what was assumed."""
    safe = np.maximum(information, 1e-300)
    return np.where(information > 0, (1.0 - information / np.maximum(assumed, safe)) / safe, 0.0)


def _bounded(information, gradient):
    return np.maximum(information, 1e-8 + 0.1 * np.abs(gradient))


def scale_step(gradient, information):
    """Damped Newton step of logarithms of scales."""
    step = gradient / _bounded(information, gradient)
    return np.clip(step, -_MAX_LOG_STEP, _MAX_LOG_STEP)


def curvature_product(grad, step, free):
    """The matrix that the steps of what is ``free`` invert, times a step."""
    A = least_squares_matrix(grad.moments, step.loadings.shape[1])

    def regression(mean, loadings):
        product = A @ np.concatenate([mean[:, None], loadings], 1)[:, :, None]
        return product[:, 0, 0], product[:, 1:, 0]

    mean, loadings = regression(step.mean, step.loadings)
    if free.loadings:  # less what the regression assumes too much: Woodbury's identity
        columns = grad.columns
        excess = columns.assumed - columns.information
        S = columns.project(loadings) * excess / np.maximum(columns.assumed, 1e-100) ** 2
        too_much = regression(np.zeros_like(mean), columns.lift(S))
        mean, loadings = mean - too_much[0], loadings - too_much[1]
    return Parameters(
        mean,
        loadings,
        _bounded(grad.information_log_noise, grad.log_noise) * step.log_noise,
        _bounded(grad.information_log_r, grad.log_r) * step.log_r,
    )

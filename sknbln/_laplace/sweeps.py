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
from scipy.sparse.linalg import LinearOperator, cg

from .lowrank import triangle

#: the coordinate of d is log(1 + d / NOISE_UNIT), nats squared: logarithmic above it, linear below
NOISE_UNIT = 0.01
NOISE_RANGE = (np.log1p(1e-6 / NOISE_UNIT), np.log1p(50.0 / NOISE_UNIT))
LOG_DISPERSION_RANGE = (np.log(1e-5), np.log(1e9))
_MAX_LOG_STEP = 1.0
_CG_TOL, _CG_ITERATIONS = 1e-10, 200
#: an information of which there is none
_NOTHING = 1e-100
#: share of the most that may be known of a rotation of the loadings, of which only a prior knows: not 0
LEAST_ROTATION = 0.02
#: share of the regressions' curvature along a step that stays when the columns' excess is taken off
LEAST_CURVATURE_LEFT = 0.01


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


class Information(NamedTuple):
    """Of the cells in the entries of a matrix S: ``own * S + other * S'``."""

    own: np.ndarray  # (k, k)
    other: np.ndarray  # (k, k)


class Columns(NamedTuple):
    """What is known of a common change of all loadings, ``W (I + S)``.

    A regression on the scores takes them as known, and so lengthens a column, or turns two towards each
    other, by far too little: it assumes the information ``n tr(S' H S)``, ``n H = sum_g b_g w_g w_g'``. The n
    cells have ``2 n tr(R T R T)`` of the symmetric part T of S, ``R = H (I + H)^{-1}`` the reliability of the
    scores, and none of a rotation. In the basis in which H is diagonal every entry has a number of its
    own. (Parameter expansion of the EM algorithm, Liu, Rubin & Wu 1998, takes such a step for its own
    reasons.) A prior of the columns, with precisions P, adds ``tr(P S' C S)``, C the products of the
    columns of W_perp. Without one a rotation changes nothing, and S is symmetric.
    """

    loadings: np.ndarray  # (n_genes, k)
    natural: (
        np.ndarray
    )  # (n_genes, k, k) derivative of a gene's natural loadings in its coordinates
    basis: np.ndarray  # (k, k)
    known: Information  # in the basis
    assumed: Information  # the same by the regression; nowhere less
    precision: np.ndarray  # (k,) P
    products: np.ndarray  # (k, k) C

    @classmethod
    def at(cls, loadings, weight, n_cells, precision):
        """From the sums of b over cells, and the precision of the prior of the columns."""
        h, basis = np.linalg.eigh(loadings.T @ (weight[:, None] * loadings) / n_cells)
        h = np.maximum(h, 0.0)
        # a column of noise is no longer than its genes' regressions want it
        reliability = np.maximum(h / (1.0 + h), 0.5)
        assumed = n_cells * np.broadcast_to(h[:, None], basis.shape)
        assumed = Information(assumed, np.zeros_like(assumed))
        centred = loadings - loadings.mean(0)
        precision = np.broadcast_to(precision, h.shape)
        products = centred.T @ centred
        products += 1e-12 * np.trace(products) * np.eye(h.size)  # regular, where columns are alike
        natural = np.broadcast_to(np.eye(h.size), (len(loadings), h.size, h.size))
        columns = cls(loadings, natural, basis, assumed, assumed, precision, products)
        return columns.knowing(2.0 * n_cells * np.outer(reliability, reliability))

    def knowing(self, T):
        """With ``known`` by what the cells know of T, but no more than is assumed of it."""
        own = self.assumed.own
        # of T alone the arithmetic means of what is assumed, with a rotation beside it the harmonic ones
        most = rotation = (own + own.T) / 2.0
        if self.has_prior:
            most = own * own.T / np.maximum(most, 1e-300)
            rotation = LEAST_ROTATION * most * (1.0 - np.eye(len(own)))
            most = most - rotation
        T = np.minimum(T, most)
        return self._replace(known=Information((T + rotation) / 2.0, (T - rotation) / 2.0))

    @property
    def has_prior(self):
        """Whether there is a prior of the columns."""
        return bool(np.any(self.precision > 0))

    def project(self, change):
        """Inner products of changes of the loadings with ``W S``."""
        return self.loadings.T @ change

    def lift(self, S):
        """``W S``, (n_genes, k)."""
        return self.loadings @ S

    def common(self, change):
        """The prior's pull on what the genes have in common, which it does not hold, (n_genes, k)."""
        if not self.has_prior:
            return np.zeros_like(change)
        shared = self.precision * np.einsum("gij,gj->gi", self.natural, change).mean(0)
        return np.einsum("i,gij->gj", shared, self.natural)

    def times(self, information, S):
        """``known`` or ``assumed``, with the prior's, times S."""
        X = self.basis.T @ S @ self.basis
        of_cells = information.own * X + information.other * X.T
        return self.basis @ of_cells @ self.basis.T + self.products @ S * self.precision

    def inverse(self, information, T):
        """S of which :meth:`times` makes T; symmetric without a prior."""
        B, k = self.basis, self.precision.size
        if not self.has_prior:
            total = information.own + information.other
            total = total + total.T
            return B @ (B.T @ (T + T.T) @ B / np.where(total > 0, total, np.inf)) @ B.T
        diagonal = B**2 @ information.own @ B.T**2
        diagonal = diagonal + np.outer(np.diag(self.products), self.precision)
        # of a column of nothing there is no S
        inverse = np.divide(1.0, diagonal, out=np.zeros((k, k)), where=diagonal > _NOTHING)
        if not np.any(inverse * T):
            return np.zeros((k, k))
        found, _ = cg(
            LinearOperator(
                (k * k, k * k), lambda s: self.times(information, s.reshape(k, k)).ravel()
            ),
            T.ravel(),
            rtol=_CG_TOL,
            maxiter=_CG_ITERATIONS,
            M=LinearOperator((k * k, k * k), lambda s: s * inverse.ravel()),
        )
        return found.reshape(k, k)


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


def packed(A):
    """Inverse of `least_squares_matrix`."""
    i, j, _ = triangle(A.shape[1] - 1)
    return np.concatenate([A[:, 0], A[:, 1 + i, 1 + j]], 1)


def regression_step(grad, free_mean, free_loadings):
    """``A_g^{-1} gradient`` for (mu_g, w_g), with what is frozen left out of the system.

    ``A_g`` has the precision of the columns' prior, which holds their deviations from the mean over genes.
    """
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
    precision = grad.columns.precision
    held = np.flatnonzero(precision > 0) if free_loadings else []
    if len(held):
        # what the genes have in common is not: less precision / n_genes of every pair, by Woodbury
        common = np.zeros((grad.mean.size, k + 1, len(held)))
        common[:, 1:] = np.swapaxes(grad.columns.natural[:, held], 1, 2)
        common = common[:, keep]
        inverse = np.linalg.solve(A, common)
        inner = np.diag(len(A) / precision[held]) - np.einsum("gih,gij->hj", common, inverse)
        shared = np.einsum("gih,gi->h", common, step[:, keep])
        step[:, keep] += inverse @ np.linalg.solve(inner, shared)
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
    T = columns.project(grad.loadings)
    return columns.lift(columns.inverse(columns.known, T) - columns.inverse(columns.assumed, T))


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
        return product[:, 0, 0], product[:, 1:, 0] - grad.columns.common(loadings)

    mean, loadings = regression(step.mean, step.loadings)
    if free.loadings:  # less what the regression assumes too much: Woodbury's identity
        columns = grad.columns
        S = columns.inverse(columns.assumed, columns.project(loadings))
        S = S - columns.inverse(columns.assumed, columns.times(columns.known, S))
        excess = regression(np.zeros_like(mean), columns.lift(S))
        whole = np.sum(step.mean * mean) + np.sum(step.loadings * loadings)
        taken = np.sum(step.mean * excess[0]) + np.sum(step.loadings * excess[1])
        # `assumed` is the regressions' only where they are alike; elsewhere it may be more than all
        if whole - taken > LEAST_CURVATURE_LEFT * whole:
            mean, loadings = mean - excess[0], loadings - excess[1]
    return Parameters(
        mean,
        loadings,
        _bounded(grad.information_log_noise, grad.log_noise) * step.log_noise,
        _bounded(grad.information_log_r, grad.log_r) * step.log_r,
    )

r"""The marginal-preserving coupling: the coordinates in which the log-posterior is maximized.

Without coupling the coordinates are the model's own parameters. With it they are each gene's *marginal*
log-mean ``M`` and, where it is frozen, its *marginal* dispersion; the covariance takes its share of both:

.. math:: \mu = M - \Sigma_{gg}/2, \qquad T(r) = T(r_m) - \Sigma_{gg}

with the overdispersion T of `overdispersion`. ``T > 0`` needs ``Sigma_gg`` below ``t = T(r_m)``. Therefore a
gene with coordinates (w, d) and ``S = |w|^2 + d`` has loadings ``sqrt(c) w`` and noise variance ``c d``,

.. math:: \Sigma_{gg} = c S = t (1 - e^{-S/t}), \qquad T(r) = t e^{-S/t}

Functions with an argument ``xp`` take NumPy arrays, or JAX arrays with ``xp=jax.numpy``.
"""

import numpy as np
from scipy.special import lambertw

from .channel import SMALLEST_OVERDISPERSION
from .metric import least_squares_matrix, packed
from .params import NOISE_UNIT, Params, noise_coordinate, noise_variance


def remaining_level(t, S, xp=np):
    """Overdispersion ``t exp(-S / t)`` that is left to the dispersion; the rest of t is ``Sigma_gg``."""
    return t * xp.exp(-S / t)


def remaining_level_slopes(t, S, xp=np):
    """Derivatives of `remaining_level` in t and in S."""
    share = xp.exp(-S / t)
    return share * (1.0 + S / t), -share


def marginal_level(level, S):
    """Inverse of `remaining_level` in t."""
    x = np.real(lambertw(S / level))
    return np.where(x > 0, S / np.where(x > 0, x, 1.0), level)


class Identity:
    """No coupling: the coordinates are the parameters."""

    def expand(self, x):
        """The model's own parameters, in the coordinates that they have without coupling."""
        return x

    def pull_back(self, x, gradient):
        """Gradient in the coordinates, from that in (mu, W, d, log r)."""
        return gradient._replace(noise=(noise_variance(x) + NOISE_UNIT) * gradient.noise)

    def pull_back_metric(self, x, metric):
        """Metric in the coordinates."""
        slope = noise_variance(x) + NOISE_UNIT
        return metric._replace(noise=slope**2 * metric.noise)


class MarginalCoupling:
    """Coordinates are the marginal log-mean and, with a `TotalOverdispersion`, the marginal dispersion."""

    def __init__(self, total=None):
        self.total = total

    def _saturation(self, x):
        """``S``, ``c`` and ``dc/dS`` of each gene."""
        S = np.sum(x.loadings**2, 1) + noise_variance(x)
        if self.total is None:
            return S, np.ones_like(S), np.zeros_like(S)
        t = S / self.total(x.dispersion)
        small = t < 1e-5
        safe = np.where(small, 1.0, t)
        c = np.where(small, 1.0 - t / 2, -np.expm1(-safe) / safe)
        dc_dt = np.where(small, -0.5 + t / 3, (np.exp(-t) - c) / safe)
        return S, c, dc_dt * t / np.maximum(S, 1e-300)

    def _slopes(self, x, S):
        """Derivatives of ``Sigma_gg`` and of ``log r`` in S; the marginal overdispersion is frozen."""
        if self.total is None:
            return np.ones_like(S), np.zeros_like(S)
        t = self.total(x.dispersion)
        level = np.maximum(remaining_level(t, S), SMALLEST_OVERDISPERSION)
        slope = -remaining_level_slopes(t, S)[1]
        return slope, -level / t / self.total.slope(self.total.inverse(level))

    def expand(self, x):
        """The model's own parameters, in the coordinates that they have without coupling."""
        S, c, _ = self._saturation(x)
        variance = c * S
        log_r = x.dispersion
        if self.total is not None:
            log_r = self.total.inverse(remaining_level(self.total(x.dispersion), S))
        return Params(
            x.mean - variance / 2,
            np.sqrt(c)[:, None] * x.loadings,
            noise_coordinate(c * noise_variance(x)),
            log_r,
            x.coef,
        )

    def pull_back(self, x, grad):
        """Gradient in the coordinates: the chain rule through Sigma_gg."""
        S, c, dc_dS = self._saturation(x)
        d_variance, d_log_r = self._slopes(x, S)
        d = noise_variance(x)
        by_c = np.sum(grad.loadings * x.loadings, 1) / (2.0 * np.sqrt(c)) + grad.noise * d
        by_S = by_c * dc_dS - 0.5 * grad.mean * d_variance + grad.dispersion * d_log_r
        return Params(
            grad.mean,
            np.sqrt(c)[:, None] * grad.loadings + 2.0 * by_S[:, None] * x.loadings,
            (d + NOISE_UNIT) * (c * grad.noise + by_S),
            np.zeros_like(grad.dispersion) if self.total is not None else grad.dispersion,
            grad.coef,
        )

    def pull_back_metric(self, x, metric):
        """Metric in the coordinates: ``J' I J`` gene by gene, blocks (mu, b, w) and d.

        A change of a loading or of d also moves the mean and the dispersion. So does a change of the lengths
        of the columns; only rotations are known to change nothing.
        """
        S, c, dc_dS = self._saturation(x)
        d_variance, d_log_r = self._slopes(x, S)
        W, noise, root = x.loadings, noise_variance(x), np.sqrt(c)
        (n_genes, k), p = W.shape, x.coef.shape[1]
        products = W[:, :, None] * W[:, None, :]
        natural = root[:, None, None] * np.eye(k) + (dc_dS / root)[:, None, None] * products
        size, w = 1 + p + k, slice(1 + p, None)
        J = np.zeros((n_genes, size, size))  # derivatives of (mu, b, w) in (M, b, loadings)
        J[:, range(1 + p), range(1 + p)] = 1.0
        J[:, 0, w] = -d_variance[:, None] * W
        J[:, w, w] = natural
        A = least_squares_matrix(metric.moments)
        log_r = np.maximum(metric.dispersion, 0.0) * d_log_r**2
        others = 4.0 * (metric.noise * (dc_dS * noise) ** 2 + log_r)
        pulled = np.swapaxes(J, 1, 2) @ A @ J
        pulled[:, w, w] += others[:, None, None] * products
        # derivatives of (mu, b, w) in d of the coordinates
        along = np.zeros((n_genes, size))
        along[:, 0], along[:, w] = -0.5 * d_variance, (dc_dS / (2.0 * root))[:, None] * W
        own = c + dc_dS * noise
        slope = noise + NOISE_UNIT
        information = np.einsum("gi,gij,gj->g", along, A, along)
        information += metric.noise * own**2 + log_r
        columns = metric.columns.with_lengths(metric.moments[:, 0] * d_variance**2)
        if self.total is not None:
            columns = columns._replace(loadings=W, natural=natural).with_observed(np.inf)
        return metric._replace(
            moments=packed(pulled),
            noise=slope**2 * information,
            columns=columns,
        )

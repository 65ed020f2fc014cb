r"""The log-posterior of the globals as a function of the coordinates in which it is maximized.

Without coupling the coordinates are the model's parameters themselves. With it (the
marginal-preserving cascade) the coordinates are each gene's *marginal* log-mean ``M`` and, where it
is frozen, *marginal* overdispersion ``phi_m``; the covariance takes its share of both:

.. math:: \mu = M - \Sigma_{gg}/2, \qquad \phi = (1 + \phi_m) e^{-\Sigma_{gg}} - 1

and so that ``phi > 0``, ``Sigma_gg`` saturates below ``S_max = log(1 + phi_m)``: a row (w, d) of the
coordinates with ``S = |w|^2 + d`` stands for the row ``(sqrt(c) w, c d)`` with
``c = S_max (1 - exp(-S / S_max)) / S``.
"""

from typing import NamedTuple

import numpy as np

from .driver import Point
from .likelihood import SMALLEST_OVERDISPERSION
from .lowrank import triangle
from .marginal import rotated
from .sweeps import (
    NOISE_UNIT,
    Columns,
    GaussianPrior,
    Gradients,
    Parameters,
    least_squares_matrix,
    packed,
)

#: rate of the exponential prior of every noise variance d: mean 1/2 nat squared. It matters for genes
#: with next to no counts, whose d is otherwise unbounded.
NOISE_RATE = 2.0
#: relative rounding error of a sum over all counts: a few units in the last place of its parts
ROUNDING = 1e-15


class NaturalGradient(NamedTuple):
    """Gradient in the model's parameters (in d, not log d) before it is pulled back."""

    mean: np.ndarray
    loadings: np.ndarray
    noise: np.ndarray
    log_r: np.ndarray


class Metric(NamedTuple):
    """Information in the model's parameters or, pulled back, in the coordinates."""

    moments: np.ndarray  # (n_genes, T) of each gene's (mu, w), packed
    noise: np.ndarray  # (n_genes,) of d; in the coordinates of log_noise, with its prior's
    log_r: np.ndarray  # (n_genes,)
    columns: Columns  # of a common change of all loadings


class NoPenalty:
    """No prior of the loadings."""

    precision = 0.0

    def value(self, loadings):
        """Zero."""
        return 0.0

    def gradient(self, loadings):
        """Zero."""
        return 0.0


def _squares(k):
    """Columns of the packed moments that hold the squares of the scores."""
    i, j, _ = triangle(k)
    return 1 + k + np.flatnonzero(i == j)


class Identity:
    """The coordinates are the parameters."""

    def expand(self, x):
        """Coordinates to parameters."""
        return x

    def pull_back(self, x, params, grad):
        """Gradient in the coordinates."""
        return Parameters(
            grad.mean, grad.loadings, (params.noise + NOISE_UNIT) * grad.noise, grad.log_r
        )

    def pull_back_metric(self, x, params, metric):
        """Metric in the coordinates."""
        slope = params.noise + NOISE_UNIT
        return metric._replace(noise=slope**2 * metric.noise + slope * NOISE_RATE)


class MarginalCoupling:
    """Marginal mean, and where `couple_dispersion` marginal overdispersion, are the coordinates."""

    def __init__(self, couple_dispersion):
        self.couple_dispersion = couple_dispersion

    def _variance(self, x):
        return np.sum(x.loadings**2, 1) + x.noise

    def _saturation(self, x):
        """``S``, ``c`` and ``dc/dS`` per gene."""
        S = self._variance(x)
        if not self.couple_dispersion:
            return S, np.ones_like(S), np.zeros_like(S)
        t = S / np.log1p(np.exp(-x.log_r))
        small = t < 1e-5
        safe = np.where(small, 1.0, t)
        c = np.where(small, 1.0 - t / 2, -np.expm1(-safe) / safe)
        dc_dt = np.where(small, -0.5 + t / 3, (np.exp(-t) - c) / safe)
        return S, c, dc_dt * t / np.maximum(S, 1e-300)

    def _slopes(self, x, S):
        """Derivatives of ``Sigma_gg`` and of ``log r`` in S; the marginal overdispersion is frozen."""
        if not self.couple_dispersion:
            return np.ones_like(S), np.zeros_like(S)
        t = np.log1p(np.exp(-x.log_r))
        slope = np.exp(-S / t)
        level = np.maximum(t * slope, SMALLEST_OVERDISPERSION)  # log(1 + phi)
        return slope, np.exp(level) * level / np.expm1(level) / t

    def _log_overdispersion(self, x, S):
        """``log phi``: with ``t = log(1 + phi_m)``, ``log(1 + phi) = t - c S = t exp(-S / t)``."""
        t = np.log1p(np.exp(-x.log_r))
        return np.log(np.maximum(np.expm1(t * np.exp(-S / t)), SMALLEST_OVERDISPERSION))

    def expand(self, x):
        """Coordinates to parameters."""
        S, c, _ = self._saturation(x)
        variance = c * S
        log_r = x.log_r
        if self.couple_dispersion:
            log_r = -self._log_overdispersion(x, S)
        return Parameters(
            x.mean - variance / 2,
            np.sqrt(c)[:, None] * x.loadings,
            np.log1p(c * x.noise / NOISE_UNIT),
            log_r,
        )

    def pull_back(self, x, params, grad):
        """Gradient in the coordinates: the chain rule through Sigma_gg."""
        S, c, dc_dS = self._saturation(x)
        d_variance, d_log_r = self._slopes(x, S)
        by_c = np.sum(grad.loadings * x.loadings, 1) / (2.0 * np.sqrt(c)) + grad.noise * x.noise
        by_S = by_c * dc_dS - 0.5 * grad.mean * d_variance + grad.log_r * d_log_r
        return Parameters(
            grad.mean,
            np.sqrt(c)[:, None] * grad.loadings + 2.0 * by_S[:, None] * x.loadings,
            (x.noise + NOISE_UNIT) * (c * grad.noise + by_S),
            np.zeros_like(grad.log_r) if self.couple_dispersion else grad.log_r,
        )

    def pull_back_metric(self, x, params, metric):
        """Metric in the coordinates: ``J' I J`` gene by gene, blocks (mu, w) and d.

        A loading or d that changes moves the mean and the dispersion beside it. So do the lengths of the
        columns: of their common changes only rotations are known to be free.
        """
        S, c, dc_dS = self._saturation(x)
        d_variance, d_log_r = self._slopes(x, S)
        W, noise, root = x.loadings, x.noise, np.sqrt(c)
        n_genes, k = W.shape
        products = W[:, :, None] * W[:, None, :]
        natural = root[:, None, None] * np.eye(k) + (dc_dS / root)[:, None, None] * products
        J = np.zeros((n_genes, k + 1, k + 1))  # of (mu, w) in (M, loadings)
        J[:, 0, 0] = 1.0
        J[:, 0, 1:] = -d_variance[:, None] * W
        J[:, 1:, 1:] = natural
        A = least_squares_matrix(metric.moments, k)
        log_r = np.maximum(metric.log_r, 0.0) * d_log_r**2
        others = 4.0 * (metric.noise * (dc_dS * noise) ** 2 + log_r)
        pulled = np.swapaxes(J, 1, 2) @ A @ J
        pulled[:, 1:, 1:] += others[:, None, None] * products
        # of (mu, w) in d of the coordinates
        along = np.concatenate([-0.5 * d_variance[:, None], (dc_dS / (2.0 * root))[:, None] * W], 1)
        own = c + dc_dS * noise
        slope = noise + NOISE_UNIT
        information = np.einsum("gi,gij,gj->g", along, A, along)
        information += metric.noise * own**2 + log_r
        columns = metric.columns._replace(loadings=W, natural=natural).knowing(np.inf)
        return metric._replace(
            moments=packed(pulled),
            noise=slope**2 * information + slope * own * NOISE_RATE,
            columns=columns,
        )


class Objective:
    """Log-posterior of the globals, by one pass over the cells.

    Parameters
    ----------
    sweep : callable
        Maps (mean, loadings, noise, phi) to `BatchSums`.
    histogram : CountHistogram
    prior_mean, prior_log_r : GaussianPrior
        Priors of the coordinates ``mean`` and ``log_r``.
    coupling : Identity or MarginalCoupling
    weak_log_r : GaussianPrior
        Prior of the model's own ``log r``, whatever the coordinates.
    penalty : ColumnPenalty
        Log-density of the loadings; may be replaced between stages.
    """

    def __init__(
        self,
        sweep,
        histogram,
        prior_mean,
        prior_log_r,
        coupling=None,
        weak_log_r=None,
        penalty=None,
    ):
        self.sweep = sweep
        self.histogram = histogram
        self._known = None  # of the last log r: it is often frozen
        self._swept = None  # the last parameters and their sums: a new penalty needs no other pass
        self.prior_mean: GaussianPrior = prior_mean
        self.prior_log_r: GaussianPrior = prior_log_r
        self.coupling = coupling if coupling is not None else Identity()
        self.penalty = penalty if penalty is not None else NoPenalty()
        self.weak_log_r = (
            weak_log_r if weak_log_r is not None else GaussianPrior.flat(histogram.n_genes)
        )

    def natural_gradient(self, params):
        """Log-likelihood, gradient in the model's parameters, and the sums behind it."""
        if self._swept is None or not all(map(np.array_equal, self._swept[0], params)):
            kept = Parameters(*map(np.copy, params))
            self._swept = kept, self.sweep(*params.natural())
        sums = self._swept[1]
        constants, first, second = self._constants(params.log_r)
        genes = sums.genes
        grad = NaturalGradient(
            genes.gradient_mean,
            genes.gradient_loadings,
            genes.gradient_noise,
            genes.gradient_log_r + first,
        )
        rising, factorials = constants
        value = float(sums.log_marginal) + (rising - factorials)
        return value, grad, sums, genes.information_log_r - second

    def rounding(self, log_r, sums):
        """Rounding error of the log-likelihood: of large counts the parts are far larger than the sum."""
        return ROUNDING * (abs(float(sums.log_marginal)) + sum(self._constants(log_r)[0]))

    def rotate(self, rotation):
        """Follow a rotation (k, k) of the loadings: what is known of the last parameters stays known."""
        self.sweep.rotate(rotation)
        if self._swept is not None:
            params, sums = self._swept
            params = params._replace(loadings=params.loadings @ rotation)
            self._swept = params, sums._replace(genes=rotated(sums.genes, rotation))

    def _constants(self, log_r):
        """What does not depend on the log-rates: its two sums, and two derivatives in log r per gene."""
        if self._known is None or not np.array_equal(self._known[0], log_r):
            r = np.exp(log_r)
            rising = float(np.sum(self.histogram.constants(r)))
            sums = rising, self.histogram.log_factorials
            self._known = log_r.copy(), (sums, *self.histogram.constant_derivatives(r))
        return self._known[1]

    def __call__(self, x):
        """The `Point` at coordinates x."""
        params = self.coupling.expand(x)
        value, natural, sums, information_log_r = self.natural_gradient(params)
        gradient_log_r = natural.log_r
        natural = natural._replace(
            log_r=natural.log_r + self.weak_log_r.gradient(params.log_r),
            noise=natural.noise - NOISE_RATE,
            loadings=natural.loadings + self.penalty.gradient(params.loadings),
        )
        value += self.penalty.value(params.loadings)
        value += self.weak_log_r.log_density(params.log_r) - NOISE_RATE * float(
            np.sum(params.noise)
        )
        grad = self.coupling.pull_back(x, params, natural)
        columns = Columns.at(
            params.loadings,
            sums.genes.moments[:, 0],
            self.histogram.n_cells,
            self.penalty.precision,
        )
        moments = sums.genes.moments.copy()
        moments[:, _squares(x.loadings.shape[1])] += self.penalty.precision
        information_log_r = information_log_r + self.weak_log_r.precision
        metric = Metric(moments, sums.genes.information_noise, information_log_r, columns)
        metric = self.coupling.pull_back_metric(x, params, metric)
        metric.moments[:, 0] += self.prior_mean.precision
        return Point(
            x,
            value + self.prior_mean.log_density(x.mean) + self.prior_log_r.log_density(x.log_r),
            self.rounding(params.log_r, sums),
            Gradients(
                grad.mean + self.prior_mean.gradient(x.mean),
                grad.loadings,
                grad.log_noise,
                grad.log_r + self.prior_log_r.gradient(x.log_r),
                metric.moments,
                metric.noise,
                metric.log_r + self.prior_log_r.precision,
                sums.genes.missing_log_r,
                float(sums.information_shift) + float(np.sum(self.prior_mean.precision)),
                metric.columns,
            ),
            int(sums.n_unconverged),
            sums.genes.moments,
            gradient_log_r,
        )

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

from .channel import SMALLEST_OVERDISPERSION
from .columns import Columns
from .lowrank import triangle
from .marginal import BatchSums, rotated
from .metric import Metric, least_squares_matrix, packed
from .params import (
    NOISE_UNIT,
    GaussianPrior,
    Params,
    in_model_units,
    noise_coordinate,
    noise_variance,
)

#: rate of the exponential prior of every noise variance d: mean 1/2 nat squared. It matters for genes
#: with next to no counts, whose d is otherwise unbounded.
NOISE_RATE = 2.0
#: standard deviation of the normal prior of log m, around the genes' average
LOG_MEAN_PRIOR_SCALE = 4.0
#: location and standard deviation of the normal prior of log r
LOG_DISPERSION_PRIOR = (2.0, 1.0)
#: relative rounding error of a sum over all counts: a few units in the last place of its parts
ROUNDING = 1e-15


def weak_dispersion_prior(n_genes):
    """The prior of log r that keeps genes with little information finite."""
    loc, scale = LOG_DISPERSION_PRIOR
    return GaussianPrior(np.full(n_genes, loc), np.full(n_genes, scale**-2.0))


def weak_mean_prior(level):
    """The prior of log m, around the genes' average, that keeps genes without counts finite."""
    return GaussianPrior(
        np.full(level.size, level.mean()), np.full(level.size, LOG_MEAN_PRIOR_SCALE**-2.0)
    )


class Point(NamedTuple):
    """Coordinates with the log-posterior, its gradient and its metric there."""

    x: Params
    value: float  # nats
    #: rounding error of the value, nats: a smaller fall is not a fall, a smaller promise promises nothing
    rounding: float
    gradient: Params
    metric: Metric
    sums: BatchSums  # over the cells
    gradient_log_r: np.ndarray  # of the log-likelihood, in the model's own log r; (n_genes,)


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
        """Coordinates of the model's own parameters."""
        return x

    def pull_back(self, x, gradient):
        """Gradient in the coordinates, from that in (mu, W, d, log r)."""
        return gradient._replace(noise=(noise_variance(x) + NOISE_UNIT) * gradient.noise)

    def pull_back_metric(self, x, metric):
        """Metric in the coordinates."""
        slope = noise_variance(x) + NOISE_UNIT
        return metric._replace(noise=slope**2 * metric.noise + slope * NOISE_RATE)


class MarginalCoupling:
    """Marginal mean, and where `couple_dispersion` marginal overdispersion, are the coordinates."""

    def __init__(self, couple_dispersion):
        self.couple_dispersion = couple_dispersion

    def _variance(self, x):
        return np.sum(x.loadings**2, 1) + noise_variance(x)

    def _saturation(self, x):
        """``S``, ``c`` and ``dc/dS`` per gene."""
        S = self._variance(x)
        if not self.couple_dispersion:
            return S, np.ones_like(S), np.zeros_like(S)
        t = S / np.log1p(np.exp(-x.dispersion))
        small = t < 1e-5
        safe = np.where(small, 1.0, t)
        c = np.where(small, 1.0 - t / 2, -np.expm1(-safe) / safe)
        dc_dt = np.where(small, -0.5 + t / 3, (np.exp(-t) - c) / safe)
        return S, c, dc_dt * t / np.maximum(S, 1e-300)

    def _slopes(self, x, S):
        """Derivatives of ``Sigma_gg`` and of ``log r`` in S; the marginal overdispersion is frozen."""
        if not self.couple_dispersion:
            return np.ones_like(S), np.zeros_like(S)
        t = np.log1p(np.exp(-x.dispersion))
        slope = np.exp(-S / t)
        level = np.maximum(t * slope, SMALLEST_OVERDISPERSION)  # log(1 + phi)
        return slope, np.exp(level) * level / np.expm1(level) / t

    def _log_overdispersion(self, x, S):
        """``log phi``: with ``t = log(1 + phi_m)``, ``log(1 + phi) = t - c S = t exp(-S / t)``."""
        t = np.log1p(np.exp(-x.dispersion))
        return np.log(np.maximum(np.expm1(t * np.exp(-S / t)), SMALLEST_OVERDISPERSION))

    def expand(self, x):
        """Coordinates of the model's own parameters."""
        S, c, _ = self._saturation(x)
        variance = c * S
        log_r = x.dispersion
        if self.couple_dispersion:
            log_r = -self._log_overdispersion(x, S)
        return Params(
            x.mean - variance / 2,
            np.sqrt(c)[:, None] * x.loadings,
            noise_coordinate(c * noise_variance(x)),
            log_r,
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
            np.zeros_like(grad.dispersion) if self.couple_dispersion else grad.dispersion,
        )

    def pull_back_metric(self, x, metric):
        """Metric in the coordinates: ``J' I J`` gene by gene, blocks (mu, w) and d.

        A loading or d that changes moves the mean and the dispersion beside it. So do the lengths of the
        columns: of their common changes only rotations are known to be free.
        """
        S, c, dc_dS = self._saturation(x)
        d_variance, d_log_r = self._slopes(x, S)
        W, noise, root = x.loadings, noise_variance(x), np.sqrt(c)
        n_genes, k = W.shape
        products = W[:, :, None] * W[:, None, :]
        natural = root[:, None, None] * np.eye(k) + (dc_dS / root)[:, None, None] * products
        J = np.zeros((n_genes, k + 1, k + 1))  # of (mu, w) in (M, loadings)
        J[:, 0, 0] = 1.0
        J[:, 0, 1:] = -d_variance[:, None] * W
        J[:, 1:, 1:] = natural
        A = least_squares_matrix(metric.moments, k)
        log_r = np.maximum(metric.dispersion, 0.0) * d_log_r**2
        others = 4.0 * (metric.noise * (dc_dS * noise) ** 2 + log_r)
        pulled = np.swapaxes(J, 1, 2) @ A @ J
        pulled[:, 1:, 1:] += others[:, None, None] * products
        # of (mu, w) in d of the coordinates
        along = np.concatenate([-0.5 * d_variance[:, None], (dc_dS / (2.0 * root))[:, None] * W], 1)
        own = c + dc_dS * noise
        slope = noise + NOISE_UNIT
        information = np.einsum("gi,gij,gj->g", along, A, along)
        information += metric.noise * own**2 + log_r
        columns = metric.columns._replace(loadings=W, natural=natural).with_observed(np.inf)
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
        Maps parameters in the model's own units to `BatchSums`.
    histogram : CountHistogram
    prior_mean, prior_log_r : GaussianPrior
        Priors of the coordinates ``mean`` and ``dispersion``.
    coupling : Identity or MarginalCoupling
    weak_log_r : GaussianPrior
        Prior of the model's own ``log r``, whatever the coordinates.
    """

    def __init__(
        self,
        sweep,
        histogram,
        prior_mean,
        prior_log_r,
        coupling=None,
        weak_log_r=None,
    ):
        self.sweep = sweep
        self.histogram = histogram
        self._known = None  # of the last log r: it is often frozen
        self._swept = None  # the last parameters and their sums: a new penalty needs no other pass
        self.prior_mean: GaussianPrior = prior_mean
        self.prior_log_r: GaussianPrior = prior_log_r
        self.coupling = coupling if coupling is not None else Identity()
        self.weak_log_r = (
            weak_log_r if weak_log_r is not None else GaussianPrior.flat(histogram.n_genes)
        )

    def _sums(self, own):
        """Sums over the cells at coordinates of the model's own parameters."""
        if self._swept is None or not all(map(np.array_equal, self._swept[0], own)):
            kept = Params(*map(np.copy, own))
            self._swept = kept, self.sweep(in_model_units(own))
        return self._swept[1]

    def log_likelihood(self, own):
        """Log-likelihood, and its gradient in (mu, W, d, log r)."""
        sums, ((rising, factorials), first, _) = self._sums(own), self._constants(own.dispersion)
        genes = sums.genes
        return float(sums.log_marginal) + (rising - factorials), Params(
            genes.gradient_mean,
            genes.gradient_loadings,
            genes.gradient_noise,
            genes.gradient_log_r + first,
        )

    def _rounding(self, own):
        """Rounding error of the log-likelihood: of large counts the parts are far larger than the sum."""
        parts = sum(self._constants(own.dispersion)[0])
        return ROUNDING * (abs(float(self._sums(own).log_marginal)) + parts)

    def rotate(self, rotation):
        """Follow a rotation (k, k) of the loadings: the last parameters need no other pass."""
        self.sweep.rotate(rotation)
        if self._swept is not None:
            own, sums = self._swept
            own = own._replace(loadings=own.loadings @ rotation)
            self._swept = own, sums._replace(genes=rotated(sums.genes, rotation))

    def _constants(self, log_r):
        """What does not depend on the log-rates: its two sums, and two derivatives in log r per gene."""
        if self._known is None or not np.array_equal(self._known[0], log_r):
            r = np.exp(log_r)
            rising = float(np.sum(self.histogram.constants(r)))
            sums = rising, self.histogram.log_factorials
            self._known = log_r.copy(), (sums, *self.histogram.constant_derivatives(r))
        return self._known[1]

    def moments(self, own):
        """Sums over the cells of b [1 z][1 z]', packed, at coordinates of the model's own parameters."""
        return self._sums(own).genes.moments

    def _metric(self, x, own, precision):
        """The `Metric` in the coordinates, the priors' precisions included."""
        sums = self._sums(own)
        genes = sums.genes
        columns = Columns.at(own.loadings, genes.moments[:, 0], self.histogram.n_cells, precision)
        moments = genes.moments.copy()
        moments[:, _squares(x.loadings.shape[1])] += precision
        information_log_r = genes.information_log_r - self._constants(own.dispersion)[2]
        information_log_r = information_log_r + self.weak_log_r.precision
        shift = float(sums.information_shift) + float(np.sum(self.prior_mean.precision))
        metric = Metric(moments, genes.information_noise, information_log_r, shift, columns)
        metric = self.coupling.pull_back_metric(x, metric)
        metric.moments[:, 0] += self.prior_mean.precision
        return metric._replace(dispersion=metric.dispersion + self.prior_log_r.precision)

    def __call__(self, x, penalty=None):
        """The `Point` at coordinates x, under a `ColumnPenalty` of the loadings."""
        penalty = NoPenalty() if penalty is None else penalty
        own = self.coupling.expand(x)
        value, gradient = self.log_likelihood(own)
        gradient_log_r = gradient.dispersion
        gradient = gradient._replace(
            dispersion=gradient.dispersion + self.weak_log_r.gradient(own.dispersion),
            noise=gradient.noise - NOISE_RATE,
            loadings=gradient.loadings + penalty.gradient(own.loadings),
        )
        value += penalty.value(own.loadings)
        value += self.weak_log_r.log_density(own.dispersion) - NOISE_RATE * float(
            np.sum(noise_variance(own))
        )
        gradient = self.coupling.pull_back(x, gradient)
        return Point(
            x,
            value
            + self.prior_mean.log_density(x.mean)
            + self.prior_log_r.log_density(x.dispersion),
            self._rounding(own),
            gradient._replace(
                mean=gradient.mean + self.prior_mean.gradient(x.mean),
                dispersion=gradient.dispersion + self.prior_log_r.gradient(x.dispersion),
            ),
            self._metric(x, own, penalty.precision),
            self._sums(own),
            gradient_log_r,
        )

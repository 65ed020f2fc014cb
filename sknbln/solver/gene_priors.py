r"""Priors of the genes' noise variances, dispersions and total overdispersions, in the model's own units.

*Noise variance*: ``log d ~ N(c, s^2)``, where centre and width are estimated from the genes, so that genes
with few counts take the d of the others. They are at their maximum for any parameters: derivatives in them
vanish, and the log-density is one smooth function of the parameters (empirical Bayes). Under the literal
cascade ``d ~ Exponential(2)``.

*Split*: ``log d - log T(r) ~ N(c, 1)``. The counts of one gene hardly tell a variance of its log-rate from
the overdispersion of its counts. An even split, c = 0, holds the balance. Where overdispersion is large the
two differ, and c is one of two values, between which the likelihood decides.

*Total overdispersion*: ``log(Sigma_gg + T_g(r_g)) ~ N(l_g, s_g^2)``, see `overdispersion`.
"""

from dataclasses import dataclass

import numpy as np

from .overdispersion import TotalOverdispersion
from .params import NOISE_UNIT, GaussianPrior, Params, noise_coordinate, noise_variance

_LEAST_NOISE_LEFT = 1 / 8  # share of d that a step leaves, under a prior of log d
_ROUNDS = 100  # of the iteration for centre and width, at most


@dataclass(frozen=True)
class Pool:
    """Normal prior of one number per gene, whose centre and width are estimated from the genes."""

    loc: float  # prior of the centre
    scale: float
    least: float  # least width

    def centre_and_width(self, x):
        """Their maximum for the numbers x, (n_genes,)."""
        width = max(float(np.std(x)), self.least)
        for _ in range(_ROUNDS):
            precision = x.size / width**2
            centre = (precision * np.mean(x) + self.loc / self.scale**2) / (
                precision + self.scale**-2.0
            )
            last, width = width, max(float(np.sqrt(np.mean((x - centre) ** 2))), self.least)
            if abs(width - last) <= 1e-14 * width:
                break
        return centre, width

    def log_density(self, x):
        """Log-density of the numbers and the centre, nats, up to constants."""
        centre, width = self.centre_and_width(x)
        of_centre = ((centre - self.loc) / self.scale) ** 2
        return -0.5 * (float(np.sum((x - centre) ** 2)) / width**2 + of_centre) - x.size * np.log(
            width
        )

    def gradient(self, x):
        """Its gradient in x."""
        centre, width = self.centre_and_width(x)
        return (centre - x) / width**2

    def precision(self, x):
        """Precision of each number's prior."""
        return self.centre_and_width(x)[1] ** -2.0


@dataclass(frozen=True)
class Exponential:
    """Exponential prior of a positive number per gene, by its logarithm."""

    rate: float

    def log_density(self, x):
        """Log-density of the numbers ``exp(x)``, nats, up to constants."""
        return -self.rate * float(np.sum(np.exp(x)))

    def gradient(self, x):
        """Its gradient in x."""
        return -self.rate * np.exp(x)

    def precision(self, x):
        """Its curvature in the coordinate of a noise variance, in units of x."""
        return self.rate * np.exp(2.0 * x) / (np.exp(x) + NOISE_UNIT)


#: of d where nothing is known of the overdispersion of independent genes: mean 1/2 nat squared
NOISE_EXPONENTIAL = Exponential(2.0)
#: of log d. The centre's prior spans what counts can show.
NOISE_POOL = Pool(np.log(0.1), 3.0, 0.5)
#: width of the prior of the split
SPLIT_WIDTH = 1.0


@dataclass(frozen=True, eq=False)
class OverdispersionPrior:
    """Normal prior of the log of each gene's total overdispersion ``V = Sigma_gg + T(r)``."""

    total: TotalOverdispersion
    prior: GaussianPrior  # of log V, (n_genes,)

    def _value(self, own):
        return np.sum(own.loadings**2, 1) + noise_variance(own) + self.total(own.dispersion)

    def log_density(self, own):
        """Log-density at coordinates of the model's own parameters, nats, up to constants."""
        return self.prior.log_density(np.log(self._value(own)))

    def gradient(self, own):
        """Its gradient in (mu, W, d, log r)."""
        V = self._value(own)
        return self._slopes(own, self.prior.gradient(np.log(V)) / V)

    def root_information(self, own):
        """Square roots of the information in (mu, W, d, log r), of rank one for each gene."""
        return self._slopes(own, np.sqrt(self.prior.precision) / self._value(own))

    def _slopes(self, own, factor):
        """Derivatives of V, times a factor of each gene."""
        return Params(
            np.zeros_like(factor),
            2.0 * factor[:, None] * own.loadings,
            factor,
            factor * self.total.slope(own.dispersion),
            np.zeros_like(own.coef),
        )


#: centres of the split: even, nearly all overdispersion in r (gamma), nearly all in d (log-normal)
EVEN, NEARLY_ALL_IN_R, NEARLY_ALL_IN_NOISE = 0.0, -2.0, 5.0


@dataclass(frozen=True, eq=False)
class SplitPrior:
    """Normal prior of ``log d - log T(r)``: how a gene's overdispersion is split between d and r."""

    total: TotalOverdispersion
    centre: float

    def _value(self, own):
        T = self.total(own.dispersion)
        return np.log(noise_variance(own)) - np.log(T) - self.centre, self.total.slope(
            own.dispersion
        ) / T

    def log_density(self, own):
        """Log-density at coordinates of the model's own parameters, nats, up to constants."""
        return -0.5 * float(np.sum(self._value(own)[0] ** 2)) / SPLIT_WIDTH**2

    def gradient(self, own):
        """Its gradient in d and in log r."""
        value, slope = self._value(own)
        pull = value / SPLIT_WIDTH**2
        return -pull / noise_variance(own), pull * slope

    def information(self, own):
        """Information in d and in log r."""
        slope = self._value(own)[1]
        return (SPLIT_WIDTH * noise_variance(own)) ** -2.0, (slope / SPLIT_WIDTH) ** 2


@dataclass(frozen=True, eq=False)
class GenePriors:
    """The priors that the genes of a model have; by default none."""

    noise: Pool | Exponential | None = None  # of log d
    split: SplitPrior | None = None
    total: OverdispersionPrior | None = None

    def log_density(self, own):
        """Log-density at coordinates of the model's own parameters, nats, up to constants."""
        value = 0.0 if self.noise is None else self.noise.log_density(np.log(noise_variance(own)))
        return value + sum(p.log_density(own) for p in (self.split, self.total) if p is not None)

    def gradient(self, own):
        """Its gradient in (mu, W, d, log r)."""
        total = Params(*map(np.zeros_like, own))
        if self.total is not None:
            total = self.total.gradient(own)
        noise, dispersion = total.noise, total.dispersion
        if self.noise is not None:
            d = noise_variance(own)
            noise = noise + self.noise.gradient(np.log(d)) / d
        if self.split is not None:
            of_noise, of_dispersion = self.split.gradient(own)
            noise, dispersion = noise + of_noise, dispersion + of_dispersion
        return total._replace(noise=noise, dispersion=dispersion)

    def information(self, own):
        """Information in d and log r, and in the loadings, where it is of rank one, its square root.

        The block ``mean`` is that in ``|w|^2 / 2``; there is none in the mean itself.
        """
        root = Params(*map(np.zeros_like, own))
        if self.total is not None:
            root = self.total.root_information(own)
        noise, dispersion = root.noise**2, root.dispersion**2
        if self.noise is not None:
            d = noise_variance(own)
            noise = noise + self.noise.precision(np.log(d)) / d**2
        if self.split is not None:
            of_noise, of_dispersion = self.split.information(own)
            noise, dispersion = noise + of_noise, dispersion + of_dispersion
        return root._replace(mean=4.0 * root.noise**2, noise=noise, dispersion=dispersion)

    def least_noise(self, x):
        """Least coordinate of d up to which the information at coordinates x holds, (n_genes,) or -inf.

        A normal prior of log d is steep near 0, where the coordinate is linear in d.
        """
        if self.split is None and not isinstance(self.noise, Pool):
            return -np.inf
        return noise_coordinate(_LEAST_NOISE_LEFT * noise_variance(x))

    def noise_precision(self, own):
        """Precision of the priors of log d, given r."""
        value = 0.0 if self.noise is None else self.noise.precision(np.log(noise_variance(own)))
        return value if self.split is None else value + SPLIT_WIDTH**-2.0

    def dispersion_precision(self, own):
        """Precision of the prior of log r, 0 without it."""
        return 0.0 if self.split is None else self.split.information(own)[1]

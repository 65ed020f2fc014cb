"""The global parameters, what a cell brings, and Gaussian priors: the nouns of the solver."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

#: the coordinate of d is log(1 + d / NOISE_UNIT), nats squared: logarithmic above it, linear below
NOISE_UNIT = 0.01
NOISE_RANGE = (np.log1p(1e-6 / NOISE_UNIT), np.log1p(50.0 / NOISE_UNIT))
#: rate of the exponential prior of every noise variance d: mean 1/2 nat squared. It matters for genes
#: with next to no counts, whose d is otherwise unbounded.
NOISE_RATE = 2.0
LOG_DISPERSION_RANGE = (np.log(1e-5), np.log(1e9))


class Params(NamedTuple):
    """One value for each block of the global parameters.

    *The model's own units*, which the cell solver takes: mean log-rates mu, loadings W, noise variances d and
    overdispersions ``1 / r``, 0 for Poisson counts.

    *Coordinates*, in which steps are taken: ``log(1 + d / NOISE_UNIT)``, so that d = 0 is at a finite
    distance, and ``log r``, which may be +inf (Poisson) where it is not free.

    Gradients, steps and what is free have the same four blocks.
    """

    mean: np.ndarray  # (n_genes,)
    loadings: np.ndarray  # (n_genes, k)
    noise: np.ndarray  # (n_genes,)
    dispersion: np.ndarray  # (n_genes,)


def noise_variance(x):
    """Noise variances d at coordinates x, (n_genes,)."""
    return NOISE_UNIT * np.expm1(x.noise)


def noise_coordinate(d):
    """Coordinate of noise variances d, (n_genes,)."""
    return np.log1p(d / NOISE_UNIT)


def in_model_units(x):
    """The model's own parameters at coordinates x."""
    return Params(x.mean, x.loadings, noise_variance(x), np.exp(-x.dispersion))


def moved(x, step, length):
    """Coordinates after ``length`` times a step, inside the ranges of the scales.

    A noise variance of 0 and a dispersion of inf stay: they are not free.
    """
    mean, loadings, noise, dispersion = (a + length * s for a, s in zip(x, step, strict=True))
    return Params(
        mean,
        loadings,
        np.where(x.noise > 0, np.clip(noise, *NOISE_RANGE), 0.0),
        np.where(
            np.isfinite(x.dispersion),
            np.clip(dispersion, *LOG_DISPERSION_RANGE),
            x.dispersion,
        ),
    )


def dispersion(params):
    """The negative binomial's size ``r`` from the overdispersion of `params`; inf for Poisson counts."""
    with np.errstate(divide="ignore"):
        return 1.0 / params.dispersion


class Cells(NamedTuple):
    """What a batch of cells brings to the kernel. Everything here is data.

    ``scale = 0`` is a known offset, ``scale > 0`` a Gaussian prior on it; ``precision`` is 1 for a
    proper prior and 0 for a flat offset (then ``scale`` is 1). ``weight`` is 0 for padding.
    """

    counts: jnp.ndarray  # (n_cells, n_genes)
    offset: jnp.ndarray  # (n_cells,) prior location m_c of the capture offset
    scale: jnp.ndarray  # (n_cells,) prior scale s_c of the capture offset
    precision: jnp.ndarray  # (n_cells,)
    weight: jnp.ndarray  # (n_cells,)


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

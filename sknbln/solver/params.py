"""The global parameters, the data of a batch of cells, and Gaussian priors."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

#: the coordinate of d is log(1 + d / NOISE_UNIT), nats squared: logarithmic above it, linear below
NOISE_UNIT = 0.01
NOISE_RANGE = (np.log1p(1e-6 / NOISE_UNIT), np.log1p(50.0 / NOISE_UNIT))
LOG_DISPERSION_RANGE = (np.log(1e-5), np.log(1e9))


class Params(NamedTuple):
    """The four blocks of the global parameters, or one value for each of them.

    *The model's own units*, in which cells are solved: mean log-rates mu, loadings W, noise variances d and
    overdispersions ``1 / r``, 0 for Poisson counts.

    *Coordinates*, in which steps are taken: ``log(1 + d / NOISE_UNIT)``, so that d = 0 is at a finite
    distance, and ``log r``, which may be +inf (Poisson) where it is not free.

    Gradients, steps and flags of what is free have the same four blocks.
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
    """Coordinates after ``length`` times a step, clipped to the ranges of d and r.

    A noise variance of 0 and a dispersion of inf stay as they are: they are not free.
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
    """Counts and capture priors of a batch of cells.

    ``scale = 0`` means a known offset, ``scale > 0`` a Gaussian prior of the offset. ``precision`` is 1 for a
    proper prior and 0 for a flat one (then ``scale`` is 1). ``weight`` is 0 for padding, 1 otherwise.
    """

    counts: jnp.ndarray  # (n_cells, n_genes)
    offset: jnp.ndarray  # (n_cells,) prior location m_c of the capture offset
    scale: jnp.ndarray  # (n_cells,) prior scale s_c of the capture offset
    precision: jnp.ndarray  # (n_cells,) of the standardized capture offset
    weight: jnp.ndarray  # (n_cells,)


class GaussianPrior(NamedTuple):
    """Independent Gaussian priors; where the precision is 0 there is no prior."""

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
        """Log-density without its normalizing constant."""
        return 0.5 * float(np.sum(self.gradient(x) * self._residual(x)))

    def gradient(self, x):
        """Gradient of the log-density."""
        return -self.precision * self._residual(x)

    def _residual(self, x):
        # x may be infinite where there is no prior
        return np.where(self.precision > 0, x, self.loc) - self.loc

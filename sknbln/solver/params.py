"""The global parameters, the data of a batch of cells, and Gaussian priors."""

from collections import namedtuple
from typing import NamedTuple

import numpy as np

#: the coordinate of d is log(1 + d / NOISE_UNIT), nats squared: logarithmic above it, linear below
NOISE_UNIT = 0.01
NOISE_RANGE = (np.log1p(1e-6 / NOISE_UNIT), np.log1p(50.0 / NOISE_UNIT))
LOG_DISPERSION_RANGE = (np.log(1e-5), np.log(1e9))


class Params(namedtuple("Params", "mean loadings noise dispersion coef")):
    """The five blocks of the global parameters, or one value for each of them.

    *The model's own units*, in which cells are solved: mean log-rates mu, (n_genes,); loadings W,
    (n_genes, k); noise variances d, (n_genes,); overdispersions ``1 / r``, (n_genes,), 0 for Poisson counts;
    coefficients B of the covariates, (n_genes, p). Without covariates p = 0, the default.

    *Coordinates*, in which steps are taken: ``log(1 + d / NOISE_UNIT)``, so that d = 0 is at a finite
    distance, and ``log r``, which may be +inf (Poisson) where it is not free.

    Gradients, steps and flags of what is free have the same five blocks; by default the coefficients are free
    where the mean is.
    """

    __slots__ = ()

    def __new__(cls, mean, loadings, noise, dispersion, coef=None):
        """The blocks; ``coef`` is optional."""
        if coef is None:
            coef = np.zeros((mean.shape[0], 0)) if np.ndim(mean) else mean
        return super().__new__(cls, mean, loadings, noise, dispersion, coef)


def noise_variance(x):
    """Noise variances d at coordinates x, (n_genes,)."""
    return NOISE_UNIT * np.expm1(x.noise)


def noise_coordinate(d):
    """Coordinate of noise variances d, (n_genes,)."""
    return np.log1p(d / NOISE_UNIT)


def in_model_units(x):
    """The model's own parameters at coordinates x."""
    return x._replace(noise=noise_variance(x), dispersion=np.exp(-x.dispersion))


def moved(x, step):
    """Coordinates after a step, clipped to the ranges of d and r.

    A noise variance of 0 and a dispersion of inf stay as they are: they are not free.
    """
    new = Params(*(a + s for a, s in zip(x, step, strict=True)))
    return new._replace(
        noise=np.where(x.noise > 0, np.clip(new.noise, *NOISE_RANGE), 0.0),
        dispersion=np.where(
            np.isfinite(x.dispersion),
            np.clip(new.dispersion, *LOG_DISPERSION_RANGE),
            x.dispersion,
        ),
    )


def dispersion(params):
    """The negative binomial's size ``r`` from the overdispersion of `params`; inf for Poisson counts."""
    with np.errstate(divide="ignore"):
        return 1.0 / params.dispersion


class Cells(namedtuple("Cells", "counts offset scale precision weight design exposure")):
    """Counts, capture priors, covariates and exposures of a batch of cells.

    ``counts`` are (n_cells, n_genes). The prior of the capture offsets has the locations ``offset`` m_c and
    the ``scale`` s_c, (n_cells,) each; ``scale = 0`` means a known offset. ``precision`` (n_cells,), of the
    standardized offset, is 1 for a proper prior and 0 for a flat one (then ``scale`` is 1). ``weight``
    (n_cells,) is 0 for padding, 1 for rows without weights of their own. ``design`` (n_cells, p) are
    covariates, ``exposure`` known log-exposures: (n_cells, 1), (n_cells, n_genes) or, without any,
    (n_cells, 0). By default there are none.
    """

    __slots__ = ()

    def __new__(cls, counts, offset, scale, precision, weight, design=None, exposure=None):
        """The arrays; ``design`` and ``exposure`` are optional."""
        nothing = np.zeros((weight.shape[0], 0)) if design is None or exposure is None else None
        design = nothing if design is None else design
        exposure = nothing if exposure is None else exposure
        return super().__new__(cls, counts, offset, scale, precision, weight, design, exposure)


class GaussianPrior(NamedTuple):
    """Independent Gaussian priors; where the precision is 0 there is no prior.

    A number stands for an array of it.
    """

    loc: np.ndarray | float
    precision: np.ndarray | float

    @classmethod
    def flat(cls, shape):
        """No prior on any parameter of an array of this shape."""
        return cls(np.zeros(shape), np.zeros(shape))

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

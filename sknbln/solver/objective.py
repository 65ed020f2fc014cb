"""The log-posterior of the globals as a function of the coordinates in which it is maximized."""

import copy
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from .columns import Columns
from .coupling import Identity
from .gene_priors import GenePriors
from .lowrank import triangle
from .marginal import BatchSums, rotated
from .metric import Metric
from .params import GaussianPrior, Params, in_model_units

#: standard deviation of the normal prior of log m, around the genes' average
LOG_MEAN_PRIOR_SCALE = 4.0
#: location and standard deviation of the normal prior of log r of independent genes
LOG_DISPERSION_PRIOR = (2.0, 1.0)
#: standard deviation of the normal prior of the coefficients, nats per standard deviation of the covariate
COEF_PRIOR_SCALE = 2.0
NO_PRIOR = GaussianPrior(0.0, 0.0)
#: relative rounding error of a sum over all counts in double precision
ROUNDING = 1e-15


def weak_dispersion_prior(n_genes):
    """Prior of log r that keeps genes with little information finite."""
    loc, scale = LOG_DISPERSION_PRIOR
    return GaussianPrior(np.full(n_genes, loc), np.full(n_genes, scale**-2.0))


def weak_coef_prior(shape):
    """Prior of the coefficients that keeps a gene without counts at some value of a covariate finite."""
    return GaussianPrior(np.zeros(shape), np.full(shape, COEF_PRIOR_SCALE**-2.0))


def weak_mean_prior(level):
    """Prior of log m, around the average of the genes, that keeps genes without counts finite."""
    return GaussianPrior(
        np.full(level.size, level.mean()), np.full(level.size, LOG_MEAN_PRIOR_SCALE**-2.0)
    )


class Point(NamedTuple):
    """Coordinates with the log-posterior, its gradient and its metric there."""

    x: Params
    value: float  # nats
    log_likelihood: float  # nats
    #: rounding error of the value, nats; a difference of values that is smaller says nothing
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


def _squares(n):
    """Positions of the squares of the covariates and scores, n in all, in the packed moments."""
    i, j, _ = triangle(n)
    return 1 + n + np.flatnonzero(i == j)


def _packed_square(a):
    """The outer products of the rows of `a`, (n_genes, n), in the places of the packed moments."""
    n = a.shape[1]
    i, j, _ = triangle(n)
    return np.concatenate([np.zeros((a.shape[0], 1 + n)), a[:, i] * a[:, j]], 1)


def _same(a, b):
    """Whether two blocks of parameters are equal but for the rounding of a rotation."""
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-13, atol=1e-15)


class Objective:
    """Log-posterior of the global parameters, by one pass over the cells.

    Parameters
    ----------
    sweep : callable
        Maps parameters in the model's own units to `BatchSums`.
    histogram : CountHistogram
    prior_mean, prior_log_r : GaussianPrior
        Priors of the coordinates ``mean`` and ``dispersion``.
    coupling : Identity or MarginalCoupling
    gene_priors : GenePriors
        Priors of the genes' parameters in the model's own units, whatever the coordinates.
    prior_coef : GaussianPrior
        Prior of the coefficients of the covariates, (n_genes, p); by default none.
    """

    def __init__(
        self,
        sweep,
        histogram,
        prior_mean,
        prior_log_r,
        coupling=None,
        gene_priors=None,
        prior_coef=NO_PRIOR,
    ):
        self.sweep = sweep
        self.histogram = histogram
        self._last_constants = None  # the last log r, which is often frozen, and its constants
        self._last_sums = (
            None  # the last parameters and their sums: a new penalty needs no new pass
        )
        self.prior_mean: GaussianPrior = prior_mean
        self.prior_log_r: GaussianPrior = prior_log_r
        self.prior_coef: GaussianPrior = prior_coef
        self.coupling = coupling if coupling is not None else Identity()
        self.gene_priors = GenePriors() if gene_priors is None else gene_priors

    @property
    def split(self):
        """Centre of the prior of the split; None without one."""
        prior = self.gene_priors.split
        return None if prior is None else prior.centre

    def with_split(self, centre):
        """The same objective with another centre of the prior of the split, where it has one."""
        if self.gene_priors.split is None:
            return self
        other = copy.copy(self)
        split = replace(self.gene_priors.split, centre=centre)
        other.gene_priors = replace(self.gene_priors, split=split)
        return other

    def _sums(self, own):
        """Sums over the cells at coordinates of the model's own parameters."""
        if self._last_sums is None or not all(map(_same, self._last_sums[0], own)):
            kept = Params(*map(np.copy, own))
            self._last_sums = kept, self.sweep(in_model_units(own))
        return self._last_sums[1]

    def log_likelihood(self, own):
        """Log-likelihood and its gradient in (mu, W, d, log r, B)."""
        sums, ((rising, factorials), first, _) = self._sums(own), self._constants(own.dispersion)
        genes = sums.genes
        return float(sums.log_marginal) + (rising - factorials), Params(
            genes.gradient_mean,
            genes.gradient_loadings,
            genes.gradient_noise,
            genes.gradient_log_r + first,
            genes.gradient_coef,
        )

    def _rounding(self, own):
        """Rounding error of the log-likelihood, nats: its terms may be far larger than their sum."""
        parts = ROUNDING * sum(self._constants(own.dispersion)[0])
        return self.sweep.rounding * abs(float(self._sums(own).log_marginal)) + parts

    def refine(self):
        """Go on in double precision; whether it was single before."""
        was_single = self.sweep.refine()
        if was_single:
            self._last_sums = None
        return was_single

    def rotate(self, rotation):
        """Rotate the last sums with the loadings, by a rotation (k, k), so that they need no new pass.

        A rotation with fewer columns drops the others.
        """
        self.sweep.rotate(rotation)
        if self._last_sums is None or rotation.shape[1] != rotation.shape[0]:
            self._last_sums = None
            return
        own, sums = self._last_sums
        own = own._replace(loadings=own.loadings @ rotation)
        self._last_sums = own, sums._replace(genes=rotated(sums.genes, rotation))

    def _constants(self, log_r):
        """The two sums of the constants, which do not depend on y, and two derivatives in log r per gene."""
        if self._last_constants is None or not np.array_equal(self._last_constants[0], log_r):
            r = np.exp(log_r)
            rising = float(np.sum(self.histogram.constants(r)))
            sums = rising, self.histogram.log_factorials
            self._last_constants = log_r.copy(), (sums, *self.histogram.constant_derivatives(r))
        return self._last_constants[1]

    def moments(self, own):
        """Sums over the cells of b [1 c z][1 c z]', packed, at coordinates of the model's own parameters."""
        return self._sums(own).genes.moments

    def _metric(self, x, own, precision):
        """The `Metric` in the coordinates, with the precisions of the priors."""
        sums = self._sums(own)
        genes = sums.genes
        of_priors = self.gene_priors.information(own)
        columns = Columns.at(own.loadings, genes.moments[:, 0], self.histogram.n_cells, precision)
        columns = columns.with_lengths(of_priors.mean)
        moments, p = genes.moments.copy(), x.coef.shape[1]
        squares = _squares(p + x.loadings.shape[1])
        moments[:, squares[p:]] += precision
        moments[:, squares[:p]] += self.prior_coef.precision
        moments += _packed_square(np.concatenate([of_priors.coef, of_priors.loadings], 1))
        information_log_r = genes.information_log_r - self._constants(own.dispersion)[2]
        information_log_r = information_log_r + of_priors.dispersion
        shift = float(sums.information_shift) + float(np.sum(self.prior_mean.precision))
        information_noise = genes.information_noise + of_priors.noise
        coef_shift = sums.information_coef_shift + np.diag(
            np.sum(np.broadcast_to(self.prior_coef.precision, x.coef.shape), 0)
        )
        metric = Metric(
            moments,
            information_noise,
            information_log_r,
            shift,
            columns,
            coef_shift,
            self.gene_priors.least_noise(x),
        )
        metric = self.coupling.pull_back_metric(x, metric)
        metric.moments[:, 0] += self.prior_mean.precision
        return metric._replace(dispersion=metric.dispersion + self.prior_log_r.precision)

    def __call__(self, x, penalty=None):
        """The `Point` at coordinates x, under a `ColumnPenalty` of the loadings if there is one."""
        penalty = NoPenalty() if penalty is None else penalty
        own = self.coupling.expand(x)
        log_likelihood, gradient = self.log_likelihood(own)
        value = log_likelihood
        gradient_log_r = gradient.dispersion
        of_priors = self.gene_priors.gradient(own)
        gradient = gradient._replace(
            loadings=gradient.loadings + of_priors.loadings + penalty.gradient(own.loadings),
            noise=gradient.noise + of_priors.noise,
            dispersion=gradient.dispersion + of_priors.dispersion,
        )
        value += penalty.value(own.loadings) + self.gene_priors.log_density(own)
        gradient = self.coupling.pull_back(x, gradient)
        return Point(
            x,
            value
            + self.prior_mean.log_density(x.mean)
            + self.prior_log_r.log_density(x.dispersion)
            + self.prior_coef.log_density(x.coef),
            log_likelihood,
            self._rounding(own),
            gradient._replace(
                mean=gradient.mean + self.prior_mean.gradient(x.mean),
                dispersion=gradient.dispersion + self.prior_log_r.gradient(x.dispersion),
                coef=gradient.coef + self.prior_coef.gradient(x.coef),
            ),
            self._metric(x, own, penalty.precision),
            self._sums(own),
            gradient_log_r,
        )

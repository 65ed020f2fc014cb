"""Posterior of an NBVCP fit: point estimates, the variational posterior, offsets of rows, draws."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import truncnorm
from sklearn.utils import Bunch

from . import _capture, _svi
from .solver.params import Params


def independent_params(mean, dispersion, coef=None):
    """`Params` of independent genes with means m and dispersions r: no loadings, no noise variances."""
    n_genes = mean.size
    return Params(np.log(mean), np.zeros((n_genes, 0)), np.zeros(n_genes), 1.0 / dispersion, coef)


@dataclass(frozen=True, eq=False)
class NBVCPPosterior:
    """Posterior of an NBVCP fit, as its own draws and an NBLN fit with this source use it."""

    mean: np.ndarray  # (n_genes,) point estimate of m, expected counts at full capture
    dispersion: np.ndarray  # (n_genes,) point estimate of r
    #: variational posterior of log m, log r, the coefficients and the offsets of `rows`
    guide: _svi.Guide
    rows: _capture.OffsetPosterior  # offsets of the training rows given the point estimates
    capture_prior: _capture.CapturePrior | None

    @property
    def params(self):
        """The point estimates as `Params`."""
        return independent_params(self.mean, self.dispersion, self.coef)

    @property
    def coef(self):
        """Coefficients of the covariates, in nats per standard deviation of each, (n_genes, p)."""
        return self.guide.coef_mean

    def offsets(self, X, batch_size=None, known=None):
        """Posterior of the capture offsets of the rows of X given the point estimates."""
        return _capture.offset_posterior(
            X, self.params, self.capture_prior, batch_size, known=known
        )

    def with_genes(self, genes):
        """The posterior of the genes at these positions."""
        guide, coef = self.guide, {}
        if guide.coef is not None:
            coef["coef"] = tuple(a[genes] for a in guide.coef)
            coef["coef_known"] = guide.coef_known[genes]
        return replace(
            self,
            mean=self.mean[genes],
            dispersion=self.dispersion[genes],
            guide=guide._replace(
                log_mean=tuple(a[genes] for a in guide.log_mean),
                log_dispersion=tuple(a[genes] for a in guide.log_dispersion),
                common_shift=(guide.common_shift[0][genes], guide.common_shift[1]),
                dispersion_known=guide.dispersion_known[genes],
                **coef,
            ),
        )

    def with_rows(self, offsets):
        """The posterior with other rows in place of its own; unchanged if they are the same.

        ``offsets`` is the posterior of their offsets given the point estimates.
        """
        if _capture.same_offsets(offsets, self.rows):
            return self
        guide = self.guide
        if guide.capture_offset is not None:
            guide = guide._replace(capture_offset=(offsets.raw_loc, offsets.scale))
        return replace(self, rows=offsets, guide=guide)

    def without_rows(self):
        """The posterior of the genes alone."""
        guide, none = self.guide, slice(0, 0)
        if guide.capture_offset is not None:
            guide = guide._replace(capture_offset=tuple(a[none] for a in guide.capture_offset))
        return replace(self, guide=guide, rows=self.rows.chosen(none))

    def log_draws(self, n_samples, rng):
        """Draws of log r, log m and B, a `Bunch` of ``r`` and ``mu`` (n_samples, n_genes) and ``coef``.

        ``coef`` (n_samples, n_genes, p) is in nats per standard deviation of each covariate.
        """
        guide = self.guide
        normals = {
            "r": (guide.log_dispersion[0], guide.log_dispersion_scale),
            "mu": guide.log_mean,
        }
        draws = Bunch(
            **{
                name: loc + scale * rng.standard_normal((n_samples, loc.size))
                for name, (loc, scale) in normals.items()
            }
        )
        share, sigma = guide.common_shift
        draws.mu += sigma * share * rng.standard_normal((n_samples, 1))
        loc = guide.coef_mean
        draws.coef = loc + guide.coef_scale * rng.standard_normal((n_samples, *loc.shape))
        return draws

    def draws(self, n_samples, rng, X=None, batch_size=None, *, offsets=True, known=None):
        """Draws of r, m, B and eta: a `Bunch` of arrays, ``r`` and ``mu`` (n_samples, n_genes), ``coef``.

        ``eta``, (n_samples, n_rows), has the offsets of validated counts X, or of the posterior's own rows
        if X is None; it is None if `offsets` is False.
        """
        logs, eta = self.log_draws(n_samples, rng), None
        if offsets:
            of_rows = self if X is None else self.with_rows(self.offsets(X, batch_size, known))
            eta = of_rows._offset_draws(logs.mu, rng)
        return Bunch(r=np.exp(logs.r), mu=np.exp(logs.mu), coef=logs.coef, eta=eta)

    def _offset_draws(self, log_mean, rng):
        """Draws of the rows' offsets, given draws of log m."""
        shape, guide = (log_mean.shape[0], self.rows.loc.size), self.guide
        if guide.capture_offset is None:
            return np.zeros(shape)
        loc, scale = guide.capture_offset
        centre, sd = guide.log_mean
        shift = _svi.shift_of(log_mean - centre, sd, guide.common_shift[0])
        loc = loc + shift[:, None] * _svi.likelihood_share(scale, self.capture_prior.sigma)
        return truncnorm.rvs(-loc / scale, np.inf, loc, scale, size=shape, random_state=rng)


class SourceModel(ABC):
    """An estimator that an NBLN fit can have as its source.

    A fitted source has the attributes `_design`, the `Design` of its covariates, and `_known`, what is known
    of its training rows.
    """

    @abstractmethod
    def _posterior(self):
        """The `NBVCPPosterior` of the fit."""

"""Posterior distributions and draws of the parameters of an NBLN fit."""

import numpy as np
import numpyro.distributions as dist
from numpy.typing import ArrayLike
from sklearn.utils import Bunch, check_random_state
from sklearn.utils.validation import check_is_fitted

from . import _posterior
from ._base import CountModelMixin
from ._counts import checked_n_samples
from ._covariance import CovarianceMixin
from ._typing import CountsLike, Covariates, Seed
from .predictive._replicates import ParameterDraws


class PosteriorMixin(CovarianceMixin, CountModelMixin):
    """Methods of a fitted NBLN model that give the posterior of r, mu, B and eta."""

    def get_distributions(self) -> dict[str, dist.Distribution]:
        """Posterior distributions of the parameters, as NumPyro distributions.

        Returns
        -------
        dict
            ``"r"`` (n_genes,) unless the channel has no dispersion; ``"mu"`` (n_genes,) log-rates; with
            covariates ``"coef"`` (n_genes, n_coefficients), in the units of `coef_`; ``"eta"``
            (n_cells,) capture offsets and ``"z"`` (n_cells, latent_dim) standardized scores of the training
            rows, whatever `whiten` is. Frozen parameters have the source's posterior (under
            ``cascade="marginal"`` transformed by the coupling). Free parameters have a Gaussian (log-normal
            for r) from the curvature of the profiled objective.
        """
        check_is_fitted(self)
        guide, rows, sd = self._source.guide, self._rows, self._standard_deviation
        coupled, frozen, distributions = self.cascade == "marginal", self.frozen_params_, {}
        if self.observation == "nb":
            coupling = None
            if coupled:
                coupling = _posterior.CoupledDispersion(self._coordinate_variance, self._total)
            distributions["r"] = (
                _posterior.source_dispersion(guide, coupling)
                if "r" in frozen
                else dist.LogNormal(np.log(self.dispersion_), sd.dispersion)
            )
        shift = np.diag(self.get_covariance()) / 2 if coupled else 0.0
        distributions["mu"] = (
            dist.Normal(guide.log_mean[0] - shift, guide.log_mean_scale)
            if "mu" in frozen
            else dist.Normal(self.mean_, sd.mean)
        )
        if self.coef_.shape[1]:
            distributions["coef"] = dist.Normal(self.coef_, self.coef_standard_error_)
        if "eta" in frozen:
            prior = self._source.capture_prior
            distributions["eta"] = _posterior.source_offsets(guide, prior, self.capture_offset_)
        else:
            scale = rows.offset_scale
            distributions["eta"] = _posterior.truncated(rows.offset, scale, self.capture_offset_)
        distributions["z"] = dist.MultivariateNormal(rows.scores, rows.score_covariance)
        return distributions

    def sample_posterior(
        self,
        n_samples: int | None = None,
        X: CountsLike | None = None,
        *,
        random_state: Seed = None,
        covariates: Covariates | None = None,
        offset: ArrayLike | None = None,
    ) -> Bunch:
        """Draws from the posterior of r, mu, B and eta; frozen parameters come from the source's draws.

        Parameters
        ----------
        n_samples : int or None, default=None
            Number of draws; None takes ``informative_priors_n_samples``.
        X : {array-like, sparse matrix} of shape (n_rows, n_genes) or None, default=None
            Rows whose capture offsets are drawn; None for the training rows.
        random_state : int, RandomState instance or None, default=None
            Seed of the draws; None takes the estimator's.
        covariates, offset
            Of the rows of X, as in :meth:`fit`.

        Returns
        -------
        Bunch
            ``r`` (n_samples, n_genes), ``mu`` (n_samples, n_genes) log-rates, ``eta`` (n_samples, n_rows);
            with covariates ``coef`` (n_samples, n_genes, n_coefficients) in the units of `coef_`.
        """
        check_is_fitted(self)
        known = None
        if X is not None:
            X, known = self._given_rows(X, covariates, offset, self._offset_prior())
        n_samples = checked_n_samples(
            self.informative_priors_n_samples if n_samples is None else n_samples
        )
        rng = check_random_state(self.random_state if random_state is None else random_state)
        draws = self._posterior_draws(n_samples, X, rng, eta="all", known=known)
        bunch = Bunch(r=draws.r, mu=draws.log_mean, eta=draws.eta)
        return self._with_coef(bunch, draws.coef)

    def _posterior_draws(self, n_samples, X, rng, *, eta, known=None):
        """Parameter draws for replicated counts; `eta` selects the offsets: None, "frozen" or "all"."""
        coupled, frozen = self.cascade == "marginal", self.frozen_params_
        sd, with_offsets = self._standard_deviation, eta is not None and "eta" in frozen
        source = self._source.draws(
            n_samples, rng, X, self.batch_size, offsets=with_offsets, known=known
        )
        r, fitted = source.r, np.diag(self.get_covariance())
        variance = fitted
        if "r" not in frozen:
            r = self.dispersion_ * np.exp(sd.dispersion * rng.standard_normal(r.shape))
        elif coupled:
            r, variance = _posterior.coupled_draws(r, self._coordinate_variance, self._total)
        if "mu" in frozen:
            log_mean = np.log(source.mu) - (variance / 2 if coupled else 0.0)
        else:
            log_mean = self.mean_ + sd.mean * rng.standard_normal(r.shape)
            # the marginal mean, mu + Sigma_gg/2, is what the data determine
            log_mean = log_mean - (variance - fitted) / 2
        coef = source.coef
        if "mu" not in frozen:
            coef = self._params().coef + sd.coef * rng.standard_normal(coef.shape)
        inflation = None if variance is fitted else variance / np.maximum(fitted, 1e-300)
        offsets = source.eta
        if eta == "all" and "eta" not in frozen:
            rows = self._rows if X is None else self._solve(X, known)
            offsets = _posterior.offset_draws(rows.offset, rows.offset_scale, n_samples, rng)
        return ParameterDraws(r, log_mean, offsets, inflation, coef)

"""Loadings, covariance, correlations and diagnostics of an NBLN fit, from its fitted attributes."""

import warnings
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from sklearn.utils import Bunch, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted

from ._correlation import (
    BOUNDARY,
    SCALES,
    drawn_intervals,
    interval,
    on_scale,
    standard_errors,
)
from ._counts import user_stacklevel
from ._nbvcp_posterior import SourceModel
from ._pairs import CorrelationTest, PairTestMixin
from ._typing import Alternative, CountsLike, Covariates, Scale, Seed
from .predictive._arguments import gene_positions, validated_options


class CovarianceMixin(PairTestMixin):
    """Methods of `NBLNEstimator` that describe W, Sigma and the dispersion.

    They read these attributes.
    """

    components_: np.ndarray
    loadings_: np.ndarray
    noise_variance_: np.ndarray
    dispersion_gradient_: np.ndarray
    informative_prior_estimator_: SourceModel
    w_prior_diagnostics_: dict[str, Any]
    _gene_covariance: np.ndarray

    @property
    def cascade_source(self) -> SourceModel:
        """The fitted source, ``informative_prior_estimator_``, by SCRIBE's name."""
        check_is_fitted(self)
        return self.informative_prior_estimator_

    @property
    def w_prior_diagnostics(self) -> dict[str, Any]:
        """``w_prior_diagnostics_``, by SCRIBE's name."""
        check_is_fitted(self)
        return self.w_prior_diagnostics_

    def get_W_compositional(self) -> np.ndarray:
        """Gauge-invariant loadings W_perp, ``components_.T``.

        Returns
        -------
        ndarray of shape (n_genes, latent_dim)
        """
        check_is_fitted(self)
        return self.components_.T.copy()

    def get_gauge_diagnostics(self) -> dict[str, Any]:
        """How much of the raw loadings is common to all genes.

        A common shift of a cell's log-rates is exchangeable with its capture offset. With frozen offsets, a
        large all-ones part is variation of the cells' totals that the offsets do not explain; it is
        harmless, and absent from `components_`. With free offsets it means that depth and loadings compete,
        and only compositional quantities should be interpreted. A loadings prior acts on W_perp alone: with
        shrinkage the ratio grows because W_perp gets smaller, not because the gauge is less well
        determined.

        Returns
        -------
        dict
            ``compositional_norm``, Frobenius norm of W_perp; ``ones_norm``, norm of the all-ones part
            ``W - W_perp``; ``ratio``, the second divided by the first; ``ones_norm_per_factor``,
            (latent_dim,).
        """
        check_is_fitted(self)
        ones = np.abs(self.loadings_.mean(0)) * np.sqrt(self.loadings_.shape[0])
        compositional = float(np.linalg.norm(self.components_))
        total = float(np.linalg.norm(ones))
        return {
            "compositional_norm": compositional,
            "ones_norm": total,
            "ratio": total / compositional if compositional > 0 else np.inf,
            "ones_norm_per_factor": ones,
        }

    def get_dispersion_diagnostics(self) -> dict[str, Any]:
        """Slope of the log-likelihood in log r, which shows whether overdispersion is counted twice.

        With r frozen at the source's value, the source's dispersion already contains the variance that Sigma
        explains. The data then favour a larger r: the derivative of the marginal log-likelihood with respect
        to log r is large and positive. Near zero, or small compared with the number of cells, it is no cause
        for concern; otherwise use ``cascade="marginal"`` or leave r out of the freeze set.

        Returns
        -------
        dict
            ``total``, the sum over genes, in nats per unit of log r; ``per_cell``, the same divided by the
            number of training cells; ``per_gene``, (n_genes,), a copy of ``dispersion_gradient_``;
            ``fraction_positive``, the fraction of genes with a positive slope.
        """
        check_is_fitted(self)
        total = float(self.dispersion_gradient_.sum())
        return {
            "total": total,
            "per_cell": total / self.capture_offset_.size,
            "per_gene": self.dispersion_gradient_.copy(),
            "fraction_positive": float(np.mean(self.dispersion_gradient_ > 0)),
        }

    def get_covariance(self) -> np.ndarray:
        """Covariance of the log-rates, ``W W' + diag(d)``.

        Returns
        -------
        ndarray of shape (n_genes, n_genes)
        """
        check_is_fitted(self)
        return self.loadings_ @ self.loadings_.T + np.diag(self.noise_variance_)

    def get_precision(self) -> np.ndarray:
        """Inverse of the covariance of the log-rates, by the Woodbury identity.

        Returns
        -------
        ndarray of shape (n_genes, n_genes)
        """
        check_is_fitted(self)
        scaled = self.loadings_ / self.noise_variance_[:, None]
        inner = np.eye(self.loadings_.shape[1]) + self.loadings_.T @ scaled
        return np.diag(1 / self.noise_variance_) - scaled @ np.linalg.solve(inner, scaled.T)

    @validated_options(scale=[StrOptions(set(SCALES))])
    def get_correlation(
        self, scale: Scale = "compositional", genes: ArrayLike | None = None
    ) -> pd.DataFrame | np.ndarray:
        r"""Correlations of genes in the fit, on one of three scales.

        Parameters
        ----------
        scale : {"compositional", "log_rate", "expression"}, default="compositional"
            ``"compositional"``: of log-rates relative to the cell's mean log-rate, that of ``P Sigma P``,
            ``P = I - 11'/G``. It is invariant under the exchange of level and capture offset within a cell.
            ``"log_rate"``: of the log-rates, that of Sigma. ``"expression"``: of the cell's expression, with
            its bursts,

            .. math:: \rho_{jk} = \frac{e^{\Sigma_{jk}} - 1}{\sqrt{v_j v_k}}, \qquad
                      v_g = e^{\Sigma_{gg}} (1 + 1/r_g) - 1

            what CS-CORE [1]_ and memento [2]_ estimate and smFISH measures.
        genes : array-like or None, default=None
            Names or positions of the genes; None for all. The correlations are those of the whole model.

        Returns
        -------
        DataFrame or ndarray of shape (n_genes, n_genes)
            A DataFrame if the genes have names.

        Raises
        ------
        ValueError
            For an unknown scale or gene.

        Warns
        -----
        UserWarning
            If, on the compositional scale, genes vary less than the mean log-rate that is subtracted from
            all: relative to it they all move together, and their correlations with each other are near 1
            whatever the genes do.

        References
        ----------
        .. [1] Su, C., Xu, Z., Shan, X., Cai, B., Zhao, H. and Zhang, J. (2023). Cell-type-specific
           co-expression inference from single cell RNA-sequencing data. Nature Communications 14, 4846.
        .. [2] Kim, M. C., Gate, R., Lee, D. S. et al. (2024). Method of moments framework for differential
           expression analysis of single-cell RNA sequencing data. Cell 187, 6393-6410.
        """
        check_is_fitted(self)
        positions = gene_positions(self, genes)
        if scale == "compositional":
            self._warn_about_closure(positions)
        return self._named(on_scale(self._params(), scale, positions).correlation, positions)

    @validated_options(
        scale=[StrOptions(set(SCALES))],
        level=[Interval(Real, 0, 1, closed="neither")],
    )
    def get_correlation_interval(
        self,
        scale: Scale = "compositional",
        genes: ArrayLike | None = None,
        *,
        level: float = 0.9,
        random_state: Seed = None,
    ) -> Bunch:
        """Correlations of genes in the fit, with standard errors and intervals.

        The standard errors are those of the delta method: from the joint information of each gene's
        loadings, noise variance and dispersion, by the outer products of the cells' exact gradients and
        the priors of d and r, and from the sampling of the scores, which all genes share. Intervals are
        symmetric in ``artanh``; where a correlation is within two standard errors of 1 or -1 they are
        quantiles of 400 draws.

        Parameters
        ----------
        scale : {"compositional", "log_rate", "expression"}, default="compositional"
            See :meth:`get_correlation`.
        genes : array-like or None, default=None
            Names or positions of the genes; None for all.
        level : float, default=0.9
            Probability that an interval holds the truth.
        random_state : int, RandomState instance or None, default=None
            Seed of the draws; None takes the estimator's.

        Returns
        -------
        Bunch
            ``correlation``, ``standard_error``, ``low`` and ``high``, each a DataFrame, or an ndarray if the
            genes have no names, of shape (n_genes, n_genes).

        Notes
        -----
        A factor model with few factors gives every pair a correlation, those of unrelated genes included. To
        ask whether genes move together at all, use :meth:`correlation_test`. The intervals know of the
        sampling of cells, and not of what the model itself is wrong by.
        """
        check_is_fitted(self)
        positions = gene_positions(self, genes)
        correlation, error = self._correlations(scale, positions)
        low, high = interval(correlation, error, level)
        at_boundary = np.triu(np.abs(correlation) + BOUNDARY * error >= 1.0, 1)
        if at_boundary.any():
            rng = check_random_state(self.random_state if random_state is None else random_state)
            pairs, covariance = np.nonzero(at_boundary), self._gene_covariance[positions]
            n_cells = self._known.total_weight
            ends = drawn_intervals(
                self._params(), scale, positions, pairs, covariance, n_cells, level, rng
            )
            for end, drawn in zip((low, high), ends, strict=True):
                end[pairs] = end[pairs[::-1]] = drawn
        parts = dict(correlation=correlation, standard_error=error, low=low, high=high)
        return Bunch(**{name: self._named(a, positions) for name, a in parts.items()})

    def _correlations(self, scale, positions):
        """Correlations of the genes at these positions and their standard errors."""
        on = on_scale(self._params(), scale, positions)
        noise, covariance = self.noise_variance_[positions], self._gene_covariance[positions]
        return on.correlation, standard_errors(on, noise, covariance, self._known.total_weight)

    def _named(self, correlation, positions):
        if not hasattr(self, "feature_names_in_"):
            return correlation
        names = self.feature_names_in_[positions]
        return pd.DataFrame(correlation, index=names, columns=names)

    def _warn_about_closure(self, positions):
        """Warn if genes vary less than the mean log-rate that is subtracted from all."""
        common = np.sum(self.loadings_.mean(0) ** 2) + self.noise_variance_.mean() / len(
            self.noise_variance_
        )
        own = np.sum(self.loadings_**2, 1) + self.noise_variance_
        n_still = int(np.sum(own[positions] < common))
        if n_still > 1:
            warnings.warn(
                f"{n_still} of {len(positions)} genes vary less than the mean log-rate that is "
                "subtracted from all genes, so that their compositional correlations with each other are "
                'near 1 whatever they do. Leave these genes out, or look at scale="log_rate".',
                UserWarning,
                stacklevel=user_stacklevel(),
            )

    @validated_options(scale=[StrOptions(set(SCALES))])
    def correlation_test(
        self,
        X: CountsLike,
        genes: ArrayLike | None = None,
        *,
        alternative: Alternative = "two-sided",
        scale: Scale = "compositional",
        covariates: Covariates | None = None,
        offset: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> CorrelationTest:
        """Score test of every pair of genes, with the correlations of the fit beside.

        The test is that of the source, :meth:`NBVCPEstimator.correlation_test`: it asks whether genes that
        are independent could look so, and uses nothing of the factors. The correlations and their standard
        errors are those of :meth:`get_correlation_interval`.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_cells, n_genes)
            Counts.
        genes : array-like or None, default=None
            Names or positions of genes that are paired with all genes; None for all pairs.
        alternative : {"two-sided", "greater", "less"}, default="two-sided"
            Which pairs have small p-values.
        scale : {"compositional", "log_rate", "expression"}, default="compositional"
            Scale of the correlations, see :meth:`get_correlation`.
        covariates, offset
            Of the rows, as in :meth:`fit`.
        sample_weight : array-like of shape (n_cells,) or None, default=None
            How often each row counts in the test.

        Returns
        -------
        CorrelationTest
            With ``correlation`` and ``standard_error``.
        """
        test = super().correlation_test(
            X,
            genes,
            alternative=alternative,
            covariates=covariates,
            offset=offset,
            sample_weight=sample_weight,
        )
        positions, whole = gene_positions(self, genes), np.arange(self.n_features_in_)
        correlation, error = self._correlations(scale, whole)
        return replace(test, correlation=correlation[positions], standard_error=error[positions])

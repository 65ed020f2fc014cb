"""Replicated counts and moments as methods of an estimator."""

from numbers import Real

import numpy as np
from numpy.typing import ArrayLike
from sklearn.utils import Bunch
from sklearn.utils.validation import check_is_fitted

from .._typing import Capture, CountsLike, Covariates, Latent, Level, Seed
from ._arguments import refuse_given_totals
from ._draws import posterior_predictive
from ._interface import PredictiveModel
from ._moments import count_moments


class PredictiveMixin(PredictiveModel):
    """Replicated counts and moments as methods of an estimator."""

    def posterior_predictive(
        self,
        X: CountsLike | None = None,
        *,
        level: Level = "library_anchored",
        capture: Capture = "posterior",
        latent: Latent = "posterior",
        n_samples: int = 100,
        genes: ArrayLike | None = None,
        random_state: Seed = None,
        covariates: Covariates | None = None,
        offset: ArrayLike | None = None,
    ) -> np.ndarray:
        """Draw counts from the fitted model by :func:`sknbln.predictive.posterior_predictive`.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_rows, n_genes) or None, default=None
            Rows to replicate; None for the training rows (not with ``level="per_cell"``).
        level, capture, latent, n_samples, genes, random_state, covariates, offset
            See :func:`sknbln.predictive.posterior_predictive`.

        Returns
        -------
        ndarray of shape (n_samples, n_rows, n_genes_selected), int64
        """
        return posterior_predictive(
            self,
            X,
            level=level,
            capture=capture,
            latent=latent,
            n_samples=n_samples,
            genes=genes,
            random_state=random_state,
            covariates=covariates,
            offset=offset,
        )

    def moments(
        self,
        *,
        covariates: Covariates | None = None,
        offset: ArrayLike = 0.0,
        capture_offset: float = 0.0,
    ) -> Bunch:
        r"""Mean, variance and covariance of the counts of a cell, in closed form.

        At the fitted parameters, with ``S = Sigma`` (0 for `NBVCPEstimator`, where ``mu = log m``):

        .. math:: E u_g &= e^{\mu_g + S_{gg}/2 - \eta} \\
                  Var\, u_g &= E u_g + (E u_g)^2 (e^{S_{gg}} - 1) + e^{2\mu_g + 2 S_{gg} - 2\eta} / r_g \\
                  Cov(u_g, u_h) &= E u_g\, E u_h\, (e^{S_{gh}} - 1)

        with ``mu + B c + o`` in place of ``mu`` where the cell has covariates and a log-exposure. The last
        term of the variance is ``E[rate^2] / r_g``, by the law of total variance. In the form
        ``(E u_g)^2 / r_g``, right for ``S_gg = 0`` only, it is too small by a factor of ``exp(S_gg)``.

        Parameters
        ----------
        covariates : array-like of shape (1, n_covariates), DataFrame or None, default=None
            Those of the cell, one row, as in `fit`.
        offset : float or array-like of shape (n_genes,), default=0.0
            Log-exposure of the cell, nats.
        capture_offset : float, default=0.0
            Capture offset eta of the cell, nats; 0 is full capture.

        Returns
        -------
        Bunch
            ``mean`` (n_genes,), ``variance`` (n_genes,) and ``covariance`` (n_genes, n_genes), whose
            diagonal is ``variance``.

        Raises
        ------
        ValueError
            When an offset is not a finite number, when the fit had covariates and none are given, and for
            ``observation="multinomial"``, which has no distribution of totals.

        Warns
        -----
        RuntimeWarning
            When moments overflow; they are inf.
        """
        check_is_fitted(self)
        refuse_given_totals(self, "moments()")
        if not isinstance(capture_offset, Real) or not np.isfinite(capture_offset):
            raise ValueError(
                f"capture_offset={capture_offset!r}: expected a finite number, in nats."
            )
        params, exposure = self._params(), np.asarray(offset)
        if exposure.dtype.kind not in "iuf" or exposure.shape not in ((), params.mean.shape):
            raise ValueError(
                f"offset={offset!r}: expected a number, in nats, or one for each gene."
            )
        if not np.all(np.isfinite(exposure)):
            raise ValueError(f"offset={offset!r}: expected finite numbers, in nats.")
        shift = params.coef @ (self._design.matrix(covariates, 1) / self._design.scale)[0]
        params = params._replace(mean=params.mean + shift + exposure)
        return count_moments(params, float(capture_offset))

"""Replicated counts and moments as methods of an estimator."""

from numbers import Real

import numpy as np
from sklearn.utils.validation import check_is_fitted

from ._arguments import refuse_given_totals
from ._draws import posterior_predictive
from ._interface import PredictiveModel
from ._moments import count_moments


class PredictiveMixin(PredictiveModel):
    """Replicated counts and moments as methods of an estimator."""

    def posterior_predictive(
        self,
        X=None,
        *,
        level="library_anchored",
        capture="posterior",
        n_samples=100,
        genes=None,
        random_state=None,
    ):
        """Draw counts from the fitted model by :func:`sknbln.predictive.posterior_predictive`.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_rows, n_genes) or None, default=None
            Rows to replicate; None for the training rows (not with ``level="per_cell"``).
        level, capture, n_samples, genes, random_state
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
            n_samples=n_samples,
            genes=genes,
            random_state=random_state,
        )

    def moments(self, *, offset=0.0):
        r"""Mean, variance and covariance of the counts of a cell, in closed form.

        At the fitted parameters, with ``S = Sigma`` (0 for `NBVCPEstimator`, where ``mu = log m``):

        .. math:: E u_g &= e^{\mu_g + S_{gg}/2 - \eta} \\
                  Var\, u_g &= E u_g + (E u_g)^2 (e^{S_{gg}} - 1) + e^{2\mu_g + 2 S_{gg} - 2\eta} / r_g \\
                  Cov(u_g, u_h) &= E u_g\, E u_h\, (e^{S_{gh}} - 1)

        The last term of the variance is ``E[rate^2] / r_g``, by the law of total variance. In the
        form ``(E u_g)^2 / r_g``, right for ``S_gg = 0`` only, it is too small by a factor of ``exp(S_gg)``.

        Parameters
        ----------
        offset : float, default=0.0
            Capture offset eta of the cell, nats; 0 is full capture.

        Returns
        -------
        Bunch
            ``mean`` (n_genes,), ``variance`` (n_genes,) and ``covariance`` (n_genes, n_genes), whose
            diagonal is ``variance``.

        Raises
        ------
        ValueError
            When `offset` is not a finite number, and for ``observation="multinomial"``, which has no
            distribution of totals.

        Warns
        -----
        RuntimeWarning
            When moments overflow; they are inf.
        """
        check_is_fitted(self)
        refuse_given_totals(self, "moments()")
        if not isinstance(offset, Real) or not np.isfinite(offset):
            raise ValueError(f"offset={offset!r}: expected a finite number, in nats.")
        return count_moments(self._params(), float(offset))

"""Replicated counts and moments as methods of an estimator."""

from numbers import Real

import numpy as np
from sklearn.utils.validation import check_is_fitted

from ._arguments import refuse_multinomial
from ._draws import posterior_predictive
from ._moments import count_moments


class PredictiveMixin:
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
        """Counts drawn from the fitted model: :func:`sknbln.predictive.posterior_predictive`.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_rows, n_genes) or None, default=None
            Rows to replicate; None for the training rows (not with ``level="per_cell"``).
        level : {"marginal", "library_anchored", "per_cell"}, default="library_anchored"
            What is drawn afresh.
        capture : {"posterior", "prior"}, default="posterior"
            Where ``level="marginal"`` takes the rows' capture offsets from.
        n_samples : int, default=100
            Replicates, each with a posterior draw of its own.
        genes : array-like of int or str, or None, default=None
            Positions or names of the genes to return.
        random_state : int, RandomState instance or None, default=None
            None takes the estimator's.

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

        The last term of the variance is ``E[rate^2] / r_g``, by the law of total variance. It is
        sometimes written ``(E u_g)^2 / r_g``, which is its value at ``S_gg = 0`` and too small by
        ``exp(S_gg)`` elsewhere.

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
            When moments are beyond floating point; they are inf.
        """
        check_is_fitted(self)
        refuse_multinomial(self, "moments()")
        if not isinstance(offset, Real) or not np.isfinite(offset):
            raise ValueError(f"offset={offset!r}: expected a finite number, in nats.")
        return count_moments(self._params(), float(offset))

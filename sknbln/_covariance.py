"""Loadings, covariance and diagnostics of an NBLN fit, from its fitted attributes alone."""

import numpy as np
from sklearn.utils.validation import check_is_fitted


class CovarianceMixin:
    """Methods of `NBLNEstimator` that describe W, Sigma and the dispersion.

    They read `components_`, `loadings_`, `noise_variance_`, `latent_dim_`, `dispersion_gradient_` and
    `capture_offset_`.
    """

    def get_W_compositional(self):
        """Gauge-invariant loadings W_perp, ``components_.T``.

        Returns
        -------
        ndarray of shape (n_genes, latent_dim)
        """
        check_is_fitted(self)
        return self.components_.T.copy()

    def get_gauge_diagnostics(self):
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

    def get_dispersion_diagnostics(self):
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

    def get_covariance(self):
        """Covariance of the log-rates, ``W W' + diag(d)``.

        Returns
        -------
        ndarray of shape (n_genes, n_genes)
        """
        check_is_fitted(self)
        return self.loadings_ @ self.loadings_.T + np.diag(self.noise_variance_)

    def get_precision(self):
        """Inverse of the covariance of the log-rates, by the Woodbury identity.

        Returns
        -------
        ndarray of shape (n_genes, n_genes)
        """
        check_is_fitted(self)
        scaled = self.loadings_ / self.noise_variance_[:, None]
        inner = np.eye(self.loadings_.shape[1]) + self.loadings_.T @ scaled
        return np.diag(1 / self.noise_variance_) - scaled @ np.linalg.solve(inner, scaled.T)

    def get_correlation(self):
        """Compositional correlation of the log-rates: that of ``P Sigma P``, ``P = I - 11'/G``.

        It is invariant under the exchange of level and capture offset within a cell.

        Returns
        -------
        ndarray of shape (n_genes, n_genes)
        """
        covariance = self.get_covariance()
        covariance = covariance - covariance.mean(0)
        covariance = covariance - covariance.mean(1, keepdims=True)
        sd = np.sqrt(np.maximum(np.diag(covariance), 1e-300))
        correlation = covariance / sd[:, None] / sd[None, :]
        np.fill_diagonal(correlation, 1.0)
        return correlation

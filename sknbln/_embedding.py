"""Embeddings of rows by an NBLN fit: principal coordinates, and log-rates from them."""

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import TransformerMixin
from sklearn.utils.validation import check_array, check_is_fitted

from ._base import lazy_with_dask
from ._typing import CountsLike, Covariates


class EmbeddingMixin(TransformerMixin):
    """Methods of a fitted NBLN model that map rows to principal coordinates, and back."""

    def _units(self):
        """Size of a standardized score of 1 in the units of `whiten`, and which components are zero.

        Zero means up to rounding, as the last of `n_genes` components is.
        """
        norms = np.linalg.norm(self.components_, axis=1)
        rounding = np.finfo(float).eps * max(self.components_.shape)
        is_zero = norms <= rounding * norms.max()
        units = np.ones_like(norms) if self.whiten else np.where(is_zero, 0.0, norms)
        return units, is_zero

    @lazy_with_dask
    def transform(
        self,
        X: CountsLike,
        *,
        covariates: Covariates | None = None,
        offset: ArrayLike | None = None,
    ) -> np.ndarray:
        r"""Principal coordinates of the rows: posterior means of the factor scores in the units of `whiten`.

        .. math:: Z_{ck} = \lVert W_{\perp k} \rVert \, \mathrm E[z_{ck} \mid u_c]

        in nats, with ``W_perp_k`` the rows of `components_`; without the norms if ``whiten=True``.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_cells, n_genes)
            Counts; training rows and new rows are treated alike.
        covariates, offset
            Of the rows, as in :meth:`fit`.

        Returns
        -------
        ndarray of shape (n_cells, latent_dim)
            Principal coordinates. Those of a component that is zero are 0. A Dask array, not computed yet,
            where X is one.
        """
        check_is_fitted(self)
        X, known = self._given_rows(X, covariates, offset, self._offset_prior())
        return self._embedded(self._solve(X, known).scores)

    def _embedded(self, scores):
        """Standardized scores in the units of `whiten`."""
        units, is_zero = self._units()
        return np.where(is_zero, 0.0, scores * units)

    def inverse_transform(self, Z: ArrayLike) -> np.ndarray:
        r"""Log-rates at full capture of rows with these coordinates, at the mean of the covariates.

        .. math:: \mu + W z_c, \qquad z_{ck} = Z_{ck} / \lVert W_{\perp k} \rVert

        or ``z = Z`` if ``whiten=True``. The noise of single genes, of variance d, is left out.

        Parameters
        ----------
        Z : array-like of shape (n_rows, latent_dim)
            Principal coordinates, in the units that :meth:`transform` returns. Those of a component that is
            zero are ignored.

        Returns
        -------
        ndarray of shape (n_rows, n_genes)
            Log-rates, nats.

        Raises
        ------
        ValueError
            If Z does not have a column per component, or has values that are not finite.
        """
        check_is_fitted(self)
        given = check_array(Z, dtype=np.float64, input_name="Z")
        n_components = len(self.components_)
        if given.shape[1] != n_components:
            raise ValueError(
                f"Z has {given.shape[1]} columns, expected {n_components}: one per component, as transform "
                "returns them."
            )
        units, is_zero = self._units()
        scores = np.divide(given, units, out=np.zeros_like(given), where=~is_zero)
        return self.mean_ + scores @ self.loadings_.T

    def posterior_scores(
        self,
        X: CountsLike,
        *,
        covariates: Covariates | None = None,
        offset: ArrayLike | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Posterior mean and covariance of the principal coordinates, in the units of `whiten`.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_cells, n_genes)
            Counts.
        covariates, offset
            Of the rows, as in :meth:`fit`.

        Returns
        -------
        mean : ndarray of shape (n_cells, latent_dim)
            Posterior means, as returned by :meth:`transform`.
        covariance : ndarray of shape (n_cells, latent_dim, latent_dim)
            Posterior covariances given the model's parameters; a capture offset that is not frozen is
            integrated out. In nats squared; of standardized scores if ``whiten=True``.
        """
        check_is_fitted(self)
        X, known = self._given_rows(X, covariates, offset, self._offset_prior())
        posterior = self._solve(X, known)
        units, _ = self._units()
        return self._embedded(posterior.scores), posterior.score_covariance * np.outer(units, units)

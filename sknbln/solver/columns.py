"""A common change of all loadings: the lengths and angles of the columns.

The regressions of genes on scores take the scores as known. The step here adds what they leave out, by
parameter expansion: it compares the information of complete data (scores known) with that of the counts.
"""

from typing import NamedTuple

import numpy as np
from scipy.sparse.linalg import LinearOperator, cg

_CG_TOL, _CG_ITERATIONS = 1e-10, 200  # of conjugate gradients
#: information below this counts as 0
_NO_INFORMATION = 1e-100
#: added to the information, as a share of the largest: without counts it may be singular
_RIDGE = 1e-14
#: least observed information in a rotation of the loadings under a prior, as a share of the largest possible:
#: the counts hold none
LEAST_ROTATION = 0.02


class Columns(NamedTuple):
    """Information in a common change of all loadings, ``W (I + S)``.

    Regressions on the scores have the complete-data information ``n tr(S' H S)``,
    ``n H = sum_g b_g w_g w_g'``. It is too large, so that a regression step lengthens a column, or turns two
    columns towards each other, by far too little. The observed information of n cells is
    ``2 n tr(R T R T)``, where T is the symmetric part of S and ``R = H (I + H)^{-1}`` the reliability of the
    scores; a rotation has none. In the basis in which H is diagonal every entry has a number of its own.
    (Parameter expansion of the EM algorithm, Liu, Rubin & Wu 1998, takes the same step for another reason.)
    A prior of the columns with precisions P adds ``tr(P S' C S)``, where C are the products of the columns of
    W_perp. Without a prior a rotation changes nothing, and S is symmetric. Where a gene's mean or its total
    overdispersion depends on ``|w_g|^2``, the change ``2 w_g' S w_g`` is observed: that adds
    ``sum_g a_g (w_g' S w_g)^2`` to the information of complete data and of the counts alike.
    """

    loadings: np.ndarray  # (n_genes, k)
    natural: np.ndarray  # (n_genes, k, k) derivative of a gene's own loadings in its coordinates
    basis: np.ndarray  # (k, k)
    #: (own, other), (k, k) each: the observed information times S is ``own * S + other * S'``, in the basis
    observed: tuple
    complete: tuple  # the same for complete data; never less
    precision: np.ndarray  # (k,) P, of the prior of the columns
    products: np.ndarray  # (k, k) C, of the columns of W_perp
    lengths: np.ndarray  # (n_genes,) a, information in each gene's |w|^2 / 2

    @classmethod
    def at(cls, loadings, weight, n_cells, precision):
        """`Columns` at loadings W, from the sums of b over cells (n_genes,) and the prior's precision."""
        h, basis = np.linalg.eigh(loadings.T @ (weight[:, None] * loadings) / n_cells)
        h = np.maximum(h, 0.0)
        # without this floor a column of noise would grow beyond what the regressions want
        reliability = np.maximum(h / (1.0 + h), 0.5)
        complete = n_cells * np.broadcast_to(h[:, None], basis.shape)
        complete = complete, np.zeros_like(complete)
        centred = loadings - loadings.mean(0)
        precision = np.broadcast_to(precision, h.shape)
        products = centred.T @ centred
        products += 1e-12 * np.trace(products) * np.eye(h.size)  # regular, where columns are alike
        natural = np.broadcast_to(np.eye(h.size), (len(loadings), h.size, h.size))
        columns = cls(
            loadings,
            natural,
            basis,
            complete,
            complete,
            precision,
            products,
            np.zeros(len(loadings)),
        )
        return columns.with_observed(2.0 * n_cells * np.outer(reliability, reliability))

    def with_observed(self, T):
        """With T as the observed information in symmetric changes, bounded by that of complete data."""
        own, _ = self.complete
        # the bound is the arithmetic mean of the two complete-data entries, with rotations the harmonic mean
        most = rotation = (own + own.T) / 2.0
        if self.has_prior:
            most = own * own.T / np.maximum(most, 1e-300)
            rotation = LEAST_ROTATION * most * (1.0 - np.eye(len(own)))
            most = most - rotation
        T = np.minimum(T, most)
        return self._replace(observed=((T + rotation) / 2.0, (T - rotation) / 2.0))

    @property
    def has_prior(self):
        """Whether there is a prior of the columns."""
        return bool(np.any(self.precision > 0))

    def with_lengths(self, information):
        """With more information in each gene's ``|w|^2 / 2``, (n_genes,)."""
        return self._replace(lengths=self.lengths + information)

    def project(self, change):
        """``W' change``, (k, k): the gradient in S of the inner product of ``change`` and ``W S``."""
        return self.loadings.T @ change

    def lift(self, S):
        """``W S``, (n_genes, k)."""
        return self.loadings @ S

    def shared_pull(self, change):
        """The prior's pull on the mean over genes, which the prior does not hold, (n_genes, k)."""
        if not self.has_prior:
            return np.zeros_like(change)
        shared = self.precision * np.einsum("gij,gj->gi", self.natural, change).mean(0)
        return np.einsum("i,gij->gj", shared, self.natural)

    def times(self, information, S):
        """The ``observed`` or ``complete`` information and that of the prior, times S."""
        own, other = information
        X = self.basis.T @ S @ self.basis
        of_cells = own * X + other * X.T
        of_prior = self.products @ S * self.precision
        return self.basis @ of_cells @ self.basis.T + of_prior + self._of_lengths(S)

    def _of_lengths(self, S):
        W = self.loadings
        change = np.einsum("gi,gi->g", W @ S, W)
        return W.T @ ((self.lengths * change)[:, None] * W)

    def inverse(self, information, T):
        """S for which :meth:`times` gives T; symmetric without a prior."""
        B, k, (own, other) = self.basis, self.precision.size, information
        symmetric = not self.has_prior
        if symmetric:
            T = (T + T.T) / 2.0
            total = (own + other + (own + other).T) / 2.0
            if not np.any(self.lengths):
                return B @ (B.T @ T @ B / np.where(total > 0, total, np.inf)) @ B.T
        of_lengths = (self.loadings**2).T @ (self.lengths[:, None] * self.loadings**2)
        diagonal = B**2 @ own @ B.T**2 + np.outer(np.diag(self.products), self.precision)
        diagonal = diagonal + of_lengths
        # no change of a column without information
        inverse = np.divide(1.0, diagonal, out=np.zeros((k, k)), where=diagonal > _NO_INFORMATION)
        if symmetric:  # so that S stays symmetric
            inverse = (inverse + inverse.T) / 2.0
        size, ridge = np.max(np.abs(T)), _RIDGE * diagonal.max()
        if not np.any(inverse * T):
            return np.zeros((k, k))

        def product(s):
            S = s.reshape(k, k)
            S = self.times(information, (S + S.T) / 2.0 if symmetric else S)
            return ((S + S.T) / 2.0 if symmetric else S).ravel() + ridge * s

        S, _ = cg(
            LinearOperator((k * k, k * k), product),
            T.ravel() / size,  # the squares of small numbers vanish
            rtol=_CG_TOL,
            maxiter=_CG_ITERATIONS,
            M=LinearOperator((k * k, k * k), lambda s: s * inverse.ravel()),
        )
        return size * S.reshape(k, k)

    def step(self, gradient):
        """Newton step of a common change of all loadings, less the part in the regressions' step."""
        T = self.project(gradient)
        return self.lift(self.inverse(self.observed, T) - self.inverse(self.complete, T))

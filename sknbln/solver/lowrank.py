"""Algebra of ``diag(d) + F F'`` with one weight vector per cell, batched by hand.

``F = [W, 1 s_c]`` is the loadings with capture as one more column: all ones over genes, scaled by
the cell's prior standard deviation of the capture offset. The Gram matrices ``F' diag(b_c) F`` of
all cells are one matrix product with the products of pairs of columns (upper triangle only).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve

LOG_BLOCK, _LOG_BLOCK_SINGLE = 8, 4


def triangle(n):
    """Indices that pack the upper triangle of an n x n matrix, and those that unpack it.

    Returns ``(i, j, back)``: packed entry t is entry (i[t], j[t]), and ``packed[..., back]`` is the full
    symmetric matrix.
    """
    i, j = np.triu_indices(n)
    back = np.zeros((n, n), np.int32)
    back[i, j] = back[j, i] = np.arange(i.size)
    return i, j, back


class Factors(NamedTuple):
    """The columns of F, and the products of pairs of columns for sums over genes."""

    columns: jnp.ndarray  # (n_genes, k + 1) loadings and the all-ones capture column
    rows: jnp.ndarray  # (k + 1, n_genes) the same, transposed
    pairs: jnp.ndarray  # (n_genes, T) products of pairs of columns, packed upper triangle
    weighted_pairs: jnp.ndarray  # (T, n_genes) the same, twice where the columns differ

    @classmethod
    def of(cls, W):
        """Factors of loadings W, (n_genes, k)."""
        F = jnp.concatenate([W, jnp.ones((W.shape[0], 1), W.dtype)], 1)
        i, j, _ = triangle(F.shape[1])
        twice = np.where(i == j, 1.0, 2.0).astype(W.dtype)
        return cls(F, F.T, F[:, i] * F[:, j], twice[:, None] * (F.T[i] * F.T[j]))

    def lift(self, zeta):
        """``F zeta`` for every cell: (n_cells, n_genes)."""
        return zeta @ self.rows

    def project(self, x):
        """``F' x`` for every cell: (n_cells, k + 1)."""
        return x @ self.columns

    def gram(self, b):
        """``F' diag(b_c) F`` for every cell: (n_cells, k + 1, k + 1)."""
        return (b @ self.pairs)[:, triangle(self.columns.shape[1])[2]]

    def quadratic_diagonal(self, C):
        """``diag(F C_c F')`` for every cell: (n_cells, n_genes)."""
        i, j, _ = triangle(self.columns.shape[1])
        return jax.lax.optimization_barrier(C[:, i, j]) @ self.weighted_pairs


def column_scale(scale, k):
    """Scales of the columns of F per cell: ones for the factors, ``scale`` for capture."""
    ones = jnp.ones((scale.shape[0], k), scale.dtype)
    return jnp.concatenate([ones, scale[:, None]], 1)


def precision_matrix(b, factors, scales, prior_precision):
    """``M_c = P_c + S_c F' diag(b_c) F S_c``, shape (n_cells, k + 1, k + 1)."""
    n = scales.shape[1]
    gram = factors.gram(b) * scales[:, :, None] * scales[:, None, :]
    return gram + prior_precision[:, :, None] * jnp.eye(n, dtype=b.dtype)[None]


def cholesky(M):
    """Lower Cholesky factors of a stack of matrices with eigenvalues of at least 1, up to rounding.

    Where the rounding error of the largest eigenvalue may exceed the smallest, it is added to the diagonal.
    """
    n = M.shape[-1]
    error = 2 * n * jnp.finfo(M.dtype).eps * jnp.trace(M, axis1=1, axis2=2)
    lift = jnp.where(error > 0.1, error, 0.0)
    return jnp.linalg.cholesky(M + lift[:, None, None] * jnp.eye(n, dtype=M.dtype)[None])


def solve(L, x):
    """``M^{-1} x`` for a stack of vectors x, from the Cholesky factors L of M."""
    return cho_solve((L, True), x[..., None])[..., 0]


def inverse(L):
    """``M^{-1}`` for a stack of matrices, from their Cholesky factors."""
    return cho_solve(
        (L, True), jnp.broadcast_to(jnp.eye(L.shape[-1], dtype=L.dtype)[None], L.shape)
    )


def log_det(L):
    """``log det M`` for a stack of matrices, from their Cholesky factors."""
    return 2.0 * jnp.sum(jnp.log(jnp.diagonal(L, axis1=1, axis2=2)), 1)


def row_sums(x):
    """``sum_g x``, (n_cells,): a matrix product, because XLA vectorizes it and not the reduction."""
    return x @ jnp.ones(x.shape[1], x.dtype)


def sum_of_logs(x):
    """``sum_g log x`` of each row, for entries of at least 1 and far from overflow.

    A logarithm costs several products, so logarithms are taken of products of `LOG_BLOCK` entries, half as
    many in single precision.
    """
    block = _LOG_BLOCK_SINGLE if x.dtype == jnp.float32 else LOG_BLOCK
    short = -x.shape[1] % block
    padded = jnp.pad(x, ((0, 0), (0, short)), constant_values=1.0)
    # the entries of a product lie far apart: that is vectorized, a product of neighbours is not
    product = functools.reduce(jnp.multiply, jnp.split(padded, block, axis=1))
    return row_sums(jnp.log(product))

"""Algebra of ``diag(d) + F F'`` with one weight vector per cell, batched by hand.

``F = [W, 1 s_c]`` is the loadings with capture as one more column: all ones over genes, scaled by
the cell's prior standard deviation of the capture offset. The Gram matrices ``F' diag(b_c) F`` of
all cells are one matrix product with the products of pairs of columns (upper triangle only).
"""

import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve

LOG_BLOCK = 8


def triangle(n):
    """Row and column indices of the upper triangle of an n x n matrix, and the way back.

    Returns ``(i, j, back)``: packed entry t stands for (i[t], j[t]) and ``packed[..., back]`` is the
    full symmetric matrix.
    """
    i, j = np.triu_indices(n)
    back = np.zeros((n, n), np.int32)
    back[i, j] = back[j, i] = np.arange(i.size)
    return i, j, back


def with_capture(W):
    """Loadings and the all-ones capture column, (n_genes, k + 1)."""
    return jnp.concatenate([W, jnp.ones((W.shape[0], 1), W.dtype)], 1)


def pair_products(F):
    """Products of pairs of columns of F, packed upper triangle: (n_genes, T)."""
    i, j, _ = triangle(F.shape[1])
    return F[:, i] * F[:, j]


def column_scale(scale, k):
    """Scales of the columns of F per cell: ones for the factors, ``scale`` for capture."""
    ones = jnp.ones((scale.shape[0], k), scale.dtype)
    return jnp.concatenate([ones, scale[:, None]], 1)


def precision_matrix(b, pairs, scales, prior_precision):
    """``M_c = P_c + S_c F' diag(b_c) F S_c``, shape (n_cells, k + 1, k + 1)."""
    n = scales.shape[1]
    _, _, back = triangle(n)
    gram = (b @ pairs)[:, back] * scales[:, :, None] * scales[:, None, :]
    return gram + prior_precision[:, :, None] * jnp.eye(n, dtype=b.dtype)[None]


def cholesky(M):
    """Lower Cholesky factors of a stack of matrices whose eigenvalues are 1 at least, but for rounding.

    Where the rounding error of the largest eigenvalue could hide the smallest, it is added to all.
    """
    n = M.shape[-1]
    error = 2 * n * jnp.finfo(M.dtype).eps * jnp.trace(M, axis1=1, axis2=2)
    lift = jnp.where(error > 0.1, error, 0.0)
    return jnp.linalg.cholesky(M + lift[:, None, None] * jnp.eye(n, dtype=M.dtype)[None])


def solve(L, x):
    """``M^{-1} x`` for a stack of vectors, given the Cholesky factors."""
    return cho_solve((L, True), x[..., None])[..., 0]


def inverse(L):
    """``M^{-1}`` for a stack, given the Cholesky factors."""
    return cho_solve(
        (L, True), jnp.broadcast_to(jnp.eye(L.shape[-1], dtype=L.dtype)[None], L.shape)
    )


def log_det(L):
    """``log det M`` for a stack, given the Cholesky factors."""
    return 2.0 * jnp.sum(jnp.log(jnp.diagonal(L, axis1=1, axis2=2)), 1)


def row_sums(x):
    """``sum_g x``, shape (n_cells,): as a product, which is vectorized where a reduction is not."""
    return x @ jnp.ones(x.shape[1], x.dtype)


def sum_of_logs(x):
    """``sum_g log x`` of each row, for entries of 1 at least and far from overflow.

    A logarithm costs several times a product, so it is taken of products of `LOG_BLOCK` entries.
    """
    short = -x.shape[1] % LOG_BLOCK
    padded = jnp.pad(x, ((0, 0), (0, short)), constant_values=1.0)
    return row_sums(jnp.log(jnp.prod(padded.reshape(x.shape[0], -1, LOG_BLOCK), 2)))


def quadratic_diagonal(C, pairs):
    """``diag(F C_c F')`` for every cell: (n_cells, n_genes)."""
    i, j, _ = triangle(C.shape[-1])
    twice = np.where(i == j, 1.0, 2.0)
    return (C[:, i, j] * twice[None, :]) @ pairs.T

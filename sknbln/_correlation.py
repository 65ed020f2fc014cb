r"""Correlations of genes in a fit, on three scales, and their standard errors.

With ``S = W W'`` off the diagonal, ``t = Sigma_gg`` and ``v = exp(t) (1 + 1/r) - 1``

.. math:: \rho_{jk} = S_{jk} / \sqrt{t_j t_k} \quad\mathrm{(log\_rate)}, \qquad
          \rho_{jk} = (e^{S_{jk}} - 1) / \sqrt{v_j v_k} \quad\mathrm{(expression)}

and the compositional correlation is that of ``P Sigma P``, ``P = I - 11'/G``.

A small change of the parameters changes a correlation by

.. math:: d\rho = A_{jk}\, dS_{jk} - \tfrac12 \rho_{jk} (d\ell_j + d\ell_k), \qquad
          d\ell = 2 b\, w \cdot dw + c\, dd + e\, d\log r

with ``l`` the logarithm of the gene's own variance. Its variance has three parts: one from each gene's
parameters, with their joint information, and one from the sample covariance ``I + E`` of n cells' scores, by
which W is known only up to, with ``Var E_ab = 1/n``, 2/n on the diagonal.
"""

from typing import NamedTuple

import numpy as np
from scipy.stats import norm

from .solver.gauge import compositional

SCALES = ("compositional", "log_rate", "expression")
#: draws of an interval at the boundary, and pairs that are drawn at a time
N_DRAWS, _PAIRS_AT_ONCE = 400, 2**12
#: a correlation this many standard errors from 1 or -1, or nearer, is at its boundary
BOUNDARY = 2.0
_LARGEST = 1.0 - 1e-12  # correlation whose artanh is taken


class Scale(NamedTuple):
    """Correlations on a scale, and what they change by."""

    correlation: np.ndarray  # (n, n), 1 on the diagonal
    slope: np.ndarray  # (n, n) A
    loadings: np.ndarray  # (n, k) w
    by_loadings: np.ndarray  # (n,) b
    by_noise: np.ndarray  # (n,) c
    by_log_r: np.ndarray  # (n,) e


class _Genes(NamedTuple):
    """What the correlations of genes on a scale are computed from; draws have a first axis of their own."""

    loadings: np.ndarray  # (n, k), W_perp on the compositional scale
    own: np.ndarray  # (n,) variance of the gene
    shift: np.ndarray  # (n,) subtracted from a covariance for each of its two genes
    overdispersion: np.ndarray  # (n,) 1/r on the scale of expression, else 0


def _genes(params, scale, genes):
    """`_Genes` at these positions, and the factor of d in the genes' own variances."""
    W, d, by_noise, rest = params.loadings, params.noise, 1.0, 0.0
    shift = np.zeros(len(genes))
    if scale == "compositional":
        rest = d.sum() / len(d) ** 2
        W, by_noise, shift = compositional(W), 1.0 - 2.0 / len(d), (d / len(d) - rest / 2)[genes]
    own = np.sum(W[genes] ** 2, 1) + by_noise * d[genes] + rest
    phi = params.dispersion[genes] if scale == "expression" else np.zeros(len(genes))
    return _Genes(W[genes], own, shift, phi), by_noise


def _correlations(scale, S, j, k):
    """Correlations and their slopes A from covariances S of pairs, and the `_Genes` of both."""
    S = S - j.shift - k.shift
    if scale == "expression":  # numerator and denominator divided by exp(own), which may overflow
        own, share = (j.own + k.own) / 2, np.sqrt(_share(j) * _share(k))
        slope = np.exp(S - own) / share
        return slope - np.exp(-own) / share, slope
    slope = 1.0 / np.sqrt(np.maximum(j.own * k.own, 1e-300))
    return S * slope, slope


def _share(genes):
    """``v exp(-own)`` on the scale of expression."""
    return np.maximum(1.0 + genes.overdispersion - np.exp(-genes.own), 1e-300)


def on_scale(params, scale, genes):
    """The `Scale` of the genes at these positions, from `Params` in the model's units."""
    of, by_noise = _genes(params, scale, genes)
    S = of.loadings @ of.loadings.T
    column = _Genes(*(a[:, None] for a in of))
    correlation, slope = _correlations(scale, S, column, of)
    np.fill_diagonal(correlation, 1.0)
    by_own, by_log_r = 1.0 / np.maximum(of.own, 1e-300), np.zeros(len(genes))
    if scale == "expression":
        by_own, by_log_r = (1.0 + of.overdispersion) / _share(of), -of.overdispersion / _share(of)
    return Scale(correlation, slope, of.loadings, by_own, by_noise * by_own, by_log_r)


def with_prior_of_noise(covariance, precision):
    """Covariances of each gene's (w, log d, log r) with a prior of log d of this precision, (n_genes,)."""
    of_noise = covariance[:, :, -2]
    factor = precision / (1.0 + precision * of_noise[:, -2])
    return covariance - factor[:, None, None] * of_noise[:, :, None] * of_noise[:, None, :]


def standard_errors(on, noise, covariance, n_cells):
    """Standard errors of correlations, (n, n); 0 on the diagonal.

    ``on`` is their `Scale`, ``noise`` the genes' d, ``covariance`` that of each gene's (w, log d, log r),
    (n, k + 2, k + 2).
    """
    rho, A, W, b, c, e = on
    k = W.shape[1]
    own = np.concatenate([b[:, None] * W, (c * noise / 2)[:, None], e[:, None] / 2], 1)
    by_own = np.einsum("gij,gj->gi", covariance, own)
    squares = (W[:, :, None] * W[:, None, :]).reshape(-1, k * k)
    of_gene = A**2 * (covariance[:, :k, :k].reshape(-1, k * k) @ squares.T)
    of_gene -= 2 * A * rho * (by_own[:, :k] @ W.T)
    of_gene += rho**2 * np.sum(own * by_own, 1)[:, None]
    S, n = W @ W.T, np.sum(W**2, 1)
    B, N = b[:, None] * n[:, None], n[:, None]
    # Cov(w'Eu, x'Ey) = (w.x u.y + w.y u.x) / n_cells
    shared = A**2 * (N * N.T + S**2) - 2 * A * rho * S * (B + B.T)
    shared += rho**2 * (B**2 + B.T**2 + 2 * S**2 * np.outer(b, b)) / 2
    variance = of_gene + of_gene.T + shared / n_cells
    np.fill_diagonal(variance, 0.0)
    return np.sqrt(np.maximum(variance, 0.0))


def drawn_intervals(params, scale, genes, pairs, covariance, n_cells, level, rng):
    """Ends of intervals of pairs, (n_pairs,) each, from draws of the genes' parameters and of the scores.

    ``pairs`` are two arrays of places among the genes, which are at these positions. Noise variances are
    drawn on their own scale, and are at least 0: where d is near 0, that of log d is no Gaussian.
    """
    of, by_noise = _genes(params, scale, genes)
    (n, k), d = of.loadings.shape, params.noise[genes]
    unit = np.ones((n, k + 2))
    unit[:, k] = d
    values, vectors = np.linalg.eigh(covariance * unit[:, :, None] * unit[:, None, :])
    root = vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :]
    change = np.einsum("gij,sgj->sgi", root, rng.standard_normal((N_DRAWS, n, k + 2)))
    E = rng.standard_normal((N_DRAWS, k, k)) / np.sqrt(2.0 * n_cells)
    W = (of.loadings + change[:, :, :k]) @ (np.eye(k) + (E + E.swapaxes(1, 2)) / 2)
    own = of.own - np.sum(of.loadings**2, 1) + np.sum(W**2, 2)
    own += by_noise * (np.maximum(d + change[:, :, k], 0.0) - d)
    phi = of.overdispersion * np.exp(-change[:, :, k + 1])
    drawn = _Genes(W, own, np.broadcast_to(of.shift, own.shape), phi)
    low, high = (np.empty(len(pairs[0])) for _ in range(2))
    ends = (1.0 + level) / 2, (1.0 - level) / 2
    for at in range(0, len(low), _PAIRS_AT_ONCE):
        some = slice(at, at + _PAIRS_AT_ONCE)
        z, fitted = (
            _artanh_of_pairs(scale, a, [side[some] for side in pairs]) for a in (drawn, of)
        )
        # draws scatter around the fit as the fit does around the truth
        low[some], high[some] = np.tanh(2 * fitted - np.quantile(z, ends, axis=0))
    return low, high


def _artanh_of_pairs(scale, genes, pairs):
    """Inverse hyperbolic tangents of the correlations of pairs of `_Genes`, (..., n_pairs)."""
    W, *others = genes
    j, k = (_Genes(W[..., side, :], *(a[..., side] for a in others)) for side in pairs)
    S = np.einsum("...pi,...pi->...p", j.loadings, k.loadings)
    return _artanh(_correlations(scale, S, j, k)[0])


def _artanh(correlation):
    return np.arctanh(np.clip(correlation, -_LARGEST, _LARGEST))


def interval(correlation, standard_error, level):
    """Ends of intervals of correlations, symmetric on the scale of their inverse hyperbolic tangents."""
    z = _artanh(correlation)
    sd = standard_error * np.cosh(z) ** 2
    width = norm.isf((1.0 - level) / 2) * sd
    return np.tanh(z - width), np.tanh(z + width)

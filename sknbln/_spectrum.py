r"""How many factors: parallel analysis of the scores at the independent-gene fit.

At the fit of independent genes, with fitted means ``m = m_g exp(-eta_c)``, the score and the information of a
log-rate are

.. math:: g = (u - m) \frac{r}{r + m}, \qquad i = \frac{m r}{r + m}

From the scores is taken what the fit of a row's level and of a gene's mean takes. Under independence the
eigenvalues of the genes' correlation matrix of g are those of noise. Their null distribution comes from
permuting the standardized scores ``g / sqrt(i)`` of every gene over the rows, each gene by itself (Horn 1965):
that keeps each gene's own distribution, zero inflation and outliers included.
"""

from typing import NamedTuple

import numpy as np
from scipy.sparse.linalg import LinearOperator, eigsh

#: rows that are used at most, and entries of the dense matrix of scores, 4 bytes each
MOST_ROWS, MOST_ENTRIES = 20_000, 2**25
MOST_FACTORS = 50
N_PERMUTATIONS = 8
#: a factor's eigenvalue is above the mean of the permutations' largest by this many standard deviations
DEVIATIONS = 2.0
_TOLERANCE = 1e-4  # relative, of the eigenvalues
_LARGEST_GRAM = 3000  # up to this size a product matrix is decomposed directly


class ScoreSpectrum(NamedTuple):
    """Leading eigenvalues of the scores' correlation matrix, and those of permuted scores."""

    eigenvalues: np.ndarray  # (n_eigenvalues,), descending
    null: np.ndarray  # (n_permutations,) largest eigenvalue of each permutation

    @property
    def threshold(self):
        """Eigenvalues above it are of factors."""
        return float(self.null.mean() + DEVIATIONS * self.null.std(ddof=1))

    @property
    def n_factors(self):
        """Number of leading eigenvalues above the threshold."""
        above = self.eigenvalues > self.threshold
        return int(np.argmin(above)) if not above.all() else above.size


def _eigenvalues(A, k):
    """The k largest eigenvalues of ``A' A``, descending."""
    small = min(A.shape)
    if small <= _LARGEST_GRAM:
        gram = A @ A.T if A.shape[0] <= A.shape[1] else A.T @ A
        return np.linalg.eigvalsh(gram)[::-1][:k].astype(float)
    product = LinearOperator((A.shape[1],) * 2, lambda v: A.T @ (A @ v), dtype=A.dtype)
    start = np.ones(A.shape[1], A.dtype)
    return np.sort(eigsh(product, k, v0=start, tol=_TOLERANCE, return_eigenvectors=False))[
        ::-1
    ].astype(float)


def _without_levels(g, i):
    """Scores without what rows' levels and genes' means take, each gene scaled to unit length; in place."""
    g -= i * (g.sum(1) / np.maximum(i.sum(1), 1e-30))[:, None]
    g -= i * (g.sum(0) / np.maximum(i.sum(0), 1e-30))[None, :]
    norms = np.sqrt(np.einsum("cg,cg->g", g, g, dtype=float))
    g /= np.where(norms > 0, norms, 1.0).astype(g.dtype)
    return g


def score_spectrum(counts, mean, dispersion, offset, rng):
    """`ScoreSpectrum` of counts at the fit of independent genes.

    Parameters
    ----------
    counts : source of rows, see ``_rows.CSRRows``
    mean, dispersion : ndarray of shape (n_genes,)
        Means at full capture and dispersions of independent genes.
    offset : ndarray of shape (n_cells,)
        Capture offsets of the rows, nats.
    rng : RandomState
        Seeds the permutations and the choice of rows, where there are more than are used.
    """
    n_cells, n_genes = counts.shape
    n = min(n_cells, MOST_ROWS, max(MOST_ENTRIES // n_genes, 2))
    if n < n_cells:
        chosen = np.sort(rng.choice(n_cells, n, replace=False))
        counts, offset = counts.chosen(chosen), offset[chosen]
    m = np.exp(-offset)[:, None].astype(np.float32) * mean.astype(np.float32)
    share = 1.0 / (1.0 + m / dispersion.astype(np.float32))
    g = (counts.block(slice(0, n)).toarray() - m).astype(np.float32) * share
    i = m * share
    root = np.sqrt(i)
    standard = g / np.where(root > 0, root, 1.0)
    k = min(MOST_FACTORS + 1, n, n_genes)
    eigenvalues = _eigenvalues(_without_levels(g, i), k)
    null = np.empty(N_PERMUTATIONS)
    for p in range(N_PERMUTATIONS):
        for gene in range(n_genes):
            g[:, gene] = standard[rng.permutation(n), gene]
        g *= root
        null[p] = _eigenvalues(_without_levels(g, i), 1)[0]
    return ScoreSpectrum(eigenvalues, null)

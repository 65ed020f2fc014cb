r"""How many factors: parallel analysis of the scores at the fit of independent genes.

With fitted means ``m = m_g exp(-eta_c)``, the score and the expected information of a log-rate are

.. math:: g = (u - m) \frac{r}{r + m}, \qquad i = \frac{m r}{r + m}

From the scores is subtracted what the fit of each row's level and each gene's mean takes. Under independence
the eigenvalues of the genes' correlation matrix of g are noise. Their null distribution comes from permuting
the standardized scores ``g / sqrt(i)`` of every gene over the rows, each gene by itself (Horn 1965). That
keeps each gene's own distribution, zero inflation and outliers included.

Genes with counts in next to no rows are left out: their few counts lie in the deepest rows, which no
permutation keeps.
"""

from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigvalsh
from scipy.sparse.linalg import eigsh

from ._known import Known

#: rows that are used at most, and entries of the dense matrix of scores, 4 bytes each
MOST_ROWS, MOST_ENTRIES = 20_000, 2**24
MOST_FACTORS = 50
N_PERMUTATIONS = 8
#: a factor's eigenvalue is above the mean of the permutations' largest by this many standard deviations
DEVIATIONS = 2.5
#: a gene has counts in at least this many rows; in half of fewer rows
LEAST_ROWS = 10
_TOLERANCE = 1e-3  # of the largest eigenvalue of a permutation, relative
_LARGEST_DIRECT = 100  # larger matrices are decomposed by Lanczos' method


@dataclass(frozen=True, eq=False)
class ScoreSpectrum:
    """Leading eigenvalues of the scores' correlation matrix, and the largest of permuted scores."""

    eigenvalues: np.ndarray  # (n_eigenvalues,), descending
    null: np.ndarray  # (n_permutations,)

    @property
    def threshold(self):
        """Eigenvalues above it are those of factors."""
        return float(self.null.mean() + DEVIATIONS * self.null.std(ddof=1))

    @property
    def n_factors(self):
        """Number of leading eigenvalues above the threshold."""
        return int(np.sum(np.cumprod(self.eigenvalues > self.threshold)))


def _eigenvalues(A, k):
    """The k largest eigenvalues of ``A' A``, descending."""
    gram = A @ A.T if A.shape[0] <= A.shape[1] else A.T @ A
    n = gram.shape[0]
    if n <= max(_LARGEST_DIRECT, 2 * k):
        values = eigvalsh(gram, subset_by_index=[n - k, n - 1])
    else:
        start = np.ones(n, gram.dtype)
        values = eigsh(gram, k, v0=start, tol=_TOLERANCE, return_eigenvectors=False)
    return np.sort(values)[::-1].astype(float)


def _take_out(g, i, design):
    """Subtract what the fit of each gene's coefficients takes from scores, in place; few covariates."""
    columns = np.concatenate([np.ones((len(design), 1)), design], 1).astype(g.dtype)
    products = (columns[:, :, None] * columns[:, None, :]).reshape(len(columns), -1)
    A = (i.T @ products).reshape(-1, columns.shape[1], columns.shape[1])
    A += 1e-6 * np.trace(A, axis1=1, axis2=2)[:, None, None] * np.eye(A.shape[1], dtype=g.dtype)
    A[:, 0, 0] += 1e-30
    g -= i * (columns @ np.linalg.solve(A, (g.T @ columns)[:, :, None])[:, :, 0].T)


def _standardize(g, i, design):
    """Subtract what rows' levels and genes' means take from scores, and scale genes to length 1; in place.

    With the columns of a design, what the genes' coefficients take too.
    """
    g -= i * (g.sum(1) / np.maximum(i.sum(1), 1e-30))[:, None]
    g -= i * (g.sum(0) / np.maximum(i.sum(0), 1e-30))
    if design.shape[1]:
        _take_out(g, i, design)
    norms = np.linalg.norm(g, axis=0)
    g /= np.where(norms > 0, norms, 1.0)
    return g


def score_spectrum(counts, mean, dispersion, offset, rng, known=None, coef=None):
    """`ScoreSpectrum` of counts at the fit of independent genes.

    Parameters
    ----------
    counts : CSRRows or another source of rows
    mean, dispersion : ndarray of shape (n_genes,)
        Means at full capture and dispersions of independent genes.
    offset : ndarray of shape (n_cells,)
        Capture offsets of the rows, nats.
    rng : RandomState
        Seeds the permutations, and the choice of rows where not all are used.
    known : Known, optional
        Covariates and exposures of the rows.
    coef : ndarray of shape (n_genes, p), optional
        Coefficients of the covariates.
    """
    n_cells, n_genes = counts.shape
    known = Known.nothing(n_cells) if known is None else known
    used = known.used
    if used.size < n_cells:
        counts, offset, known = counts.chosen(used), offset[used], known.chosen(used)
        n_cells = used.size
    n = min(n_cells, MOST_ROWS, max(MOST_ENTRIES // n_genes, 2))
    if n < n_cells:
        chosen = np.sort(rng.choice(n_cells, n, replace=False))
        counts, offset, known = counts.chosen(chosen), offset[chosen], known.chosen(chosen)
    block = counts.block(slice(0, n))
    genes = np.flatnonzero(block.getnnz(0) >= min(LEAST_ROWS, n / 2))
    if not genes.size:
        return ScoreSpectrum(np.zeros(1), np.zeros(N_PERMUTATIONS))
    g = block[:, genes].toarray().astype(np.float32)
    log_mean = -offset[:, None] + np.log(mean[genes])
    if not known.is_nothing:
        shift = known.log_scale(coef)
        log_mean += shift[:, genes] if shift.shape[1] > 1 else shift
    m = np.exp(log_mean).astype(np.float32)
    share = 1.0 / (1.0 + m / dispersion[genes].astype(np.float32))
    g -= m
    g *= share
    i = m * share
    root = np.sqrt(i)
    standard = np.divide(g, root, out=np.zeros_like(g), where=root > 0)
    if known.weight is not None:
        weight = np.sqrt(known.weight[:, None]).astype(np.float32)
        g, i, root = g * weight, i * weight, root * weight
    k = min(MOST_FACTORS + 1, n, genes.size)
    eigenvalues = _eigenvalues(_standardize(g, i, known.design), k)
    generator, null = np.random.default_rng(rng.randint(2**31)), []
    for _ in range(N_PERMUTATIONS):
        generator.permuted(standard, axis=0, out=g)
        g *= root
        null.append(_eigenvalues(_standardize(g, i, known.design), 1)[0])
    return ScoreSpectrum(eigenvalues, np.array(null))

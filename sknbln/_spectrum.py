r"""How many factors: parallel analysis of the scores at the fit of independent genes.

With fitted means ``m = m_g exp(-eta_c)``, the score and the expected information of a log-rate are

.. math:: g = (u - m) \frac{r}{r + m}, \qquad i = \frac{m r}{r + m}

From the scores is subtracted what the fit of each row's level and each gene's mean takes. Under independence
the eigenvalues of the genes' correlation matrix of g are noise. Their null distribution comes from permuting
the standardized scores ``g / sqrt(i)`` of every gene over the rows, each gene by itself (Horn 1965). That
keeps each gene's own distribution, zero inflation and outliers included.

Genes with counts in next to no rows are left out: their few counts lie in the deepest rows, which no
permutation keeps.

The eigenvalue of two or three genes that move together, ``1 + rho`` and ``1 + 2 rho`` with their correlation
rho, can lie below all eigenvalues of noise. Such groups show in the single correlations that the leading
factors leave, beside the largest correlation of permuted scores.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy.linalg import eigh
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import eigsh

from ._known import Known
from ._scores import coefficients, scores
from .solver.gauge import EDGE_MARGIN

#: rows that are used at most, and entries of the dense matrix of scores, 4 bytes each
MOST_ROWS, MOST_ENTRIES = 20_000, 2**24
MOST_FACTORS = 50
N_PERMUTATIONS = 8
#: of more scores than `MANY_SCORES` fewer permutations: there all largest eigenvalues are nearly the same
MANY_SCORES, FEW_PERMUTATIONS = 2**20, 3
_TRACY_WIDOM_SD = 1.268  # of order 1
#: a factor's eigenvalue is above the mean of the permutations' largest by this many standard deviations
DEVIATIONS = 2.5
#: a correlation that the factors leave shows a group of genes where it is this many times the largest of
#: permuted scores: strong factors, exponential in the rates, leave correlations of up to twice that
GROUP_MARGIN = 2.0
MOST_GROUPS = 10
_LARGEST_SD = 2.0  # nats; of a gene's loading at the start
#: a gene has counts in at least this many rows; in half of fewer rows
LEAST_ROWS = 10
_AT_ONCE = 2**18  # scores in a block of genes
_ORDERS = 64  # random orders of the rows in a permutation, at most
_TOLERANCE = 1e-3  # of the largest eigenvalue of a permutation, relative
_LARGEST_DIRECT = 100  # larger matrices are decomposed by Lanczos' method


@dataclass(frozen=True, eq=False)
class ScoreSpectrum:
    """Leading eigenvalues of the scores' correlation matrix, and the largest of permuted scores."""

    eigenvalues: np.ndarray  # (n_eigenvalues,), descending
    null: np.ndarray  # (n_permutations,)
    groups: np.ndarray  # (n_genes, n_groups) loadings at the start of groups of few genes
    least_sd: float = 0.0  # of the null, whose own is that of few permutations

    @property
    def threshold(self):
        """Eigenvalues above it are those of factors."""
        sd = max(self.null.std(ddof=1), self.least_sd)
        return float(self.null.mean() + DEVIATIONS * sd)

    @property
    def n_factors(self):
        """Number of leading eigenvalues above the threshold."""
        return int(np.sum(np.cumprod(self.eigenvalues > self.threshold)))


def _edge_sd(n_genes, n_cells):
    """Standard deviation of the largest eigenvalue of the correlations of noise (Johnstone 2001)."""
    p, n = np.sqrt(n_genes), np.sqrt(n_cells)
    return _TRACY_WIDOM_SD * (n + p) * (1.0 / n + 1.0 / p) ** (1 / 3) / n_cells


def _products(A, most):
    """Inner products of the rows of A, (n_genes, n), or of its fewer columns; and of its rows `most`."""
    if len(most) == len(A):
        gram = A @ A.T
        return gram, gram
    chosen = A[most]
    return A.T @ A, chosen @ chosen.T


def _leading(A, gram, k):
    """The k largest eigenvalues of ``A A'``, descending, and their eigenvectors, (n_genes, k)."""
    n = gram.shape[0]
    if n <= max(_LARGEST_DIRECT, 2 * k):
        values, vectors = eigh(gram, subset_by_index=[n - k, n - 1])
    else:
        values, vectors = eigsh(gram, k, v0=np.ones(n, gram.dtype), tol=_TOLERANCE)
    order = np.argsort(values)[::-1]
    values, vectors = values[order].astype(float), vectors[:, order]
    if n < len(A):
        vectors = A @ vectors / np.sqrt(np.maximum(values, 1e-30)).astype(A.dtype)
    return values, vectors


def _largest_correlation(gram):
    """Largest correlation of two rows of length 1, in magnitude; the diagonal of `gram` is lost."""
    np.fill_diagonal(gram, 0.0)
    return max(gram.max(), -gram.min())


def _correlations_left(gram, values, vectors):
    """Correlations that leading eigenpairs leave, 0 on the diagonal, from inner products."""
    C = gram - (vectors * values.astype(gram.dtype)) @ vectors.T
    sd = np.sqrt(np.maximum(np.diag(C), 1e-6))
    C /= sd[:, None]
    C /= sd
    np.fill_diagonal(C, 0.0)
    return C


def _groups(correlations, least):
    """Groups of genes that correlate by more than ``least``, strongest first, each as a column.

    The products of a group's entries are its genes' correlations, as well as one column can give them.
    """
    together = np.abs(correlations) > least
    n_labels, labels = connected_components(csr_array(together), directed=False)
    found = []
    for label in np.flatnonzero(np.bincount(labels, minlength=n_labels) > 1):
        genes = np.flatnonzero(labels == label)
        values, vectors = np.linalg.eigh(correlations[np.ix_(genes, genes)].astype(float))
        column = np.zeros(len(correlations))
        column[genes] = vectors[:, -1] * np.sqrt(values[-1] * genes.size / (genes.size - 1))
        found.append((values[-1], column))
    found.sort(key=lambda group: -group[0])
    return np.array([column for _, column in found[:MOST_GROUPS]]).reshape(-1, len(correlations)).T


def _take_out(g, i, design):
    """Subtract what the fit of each gene's coefficients takes from scores, in place; few covariates."""
    columns = np.concatenate([np.ones((len(design), 1)), design], 1).astype(g.dtype)
    products = (columns[:, :, None] * columns[:, None, :]).reshape(len(columns), -1)
    A = (i @ products).reshape(-1, columns.shape[1], columns.shape[1])
    g -= i * (coefficients(A, g @ columns) @ columns.T)


def _parts(g):
    """Slices of the genes of `g`, (n_genes, n), whose temporary arrays stay small."""
    size = max(_AT_ONCE // max(g.shape[1], 1), 1)
    return [slice(at, min(at + size, len(g))) for at in range(0, len(g), size)]


def _fill(g, level, block, genes, offset, known, coef):
    """Write the counts of some genes and their log-levels beside the genes' means, (n_genes, n) each."""
    size = max(_AT_ONCE // block.shape[1], 1)
    for at in range(0, block.shape[0], size):
        rows = slice(at, at + size)
        shift = known.chosen(rows).log_scale(coef) - offset[rows, None]
        g[:, rows] = block[rows].toarray()[:, genes].T
        level[:, rows] = (shift[:, genes] if shift.shape[1] > 1 else shift).T


def _information(root, weight):
    """The information of scores, from its root and the roots of the rows' weights; None without any."""
    return root**2 if weight is None else root**2 * weight


def _sums(root, weight):
    """Sums of the information over genes, (n,), and of its squares over cells, (n_genes,)."""
    of_rows, squares = np.zeros(root.shape[1], root.dtype), np.empty(len(root), root.dtype)
    for part in _parts(root):
        i = _information(root[part], weight)
        of_rows += i.sum(0)
        squares[part] = np.einsum("gc,gc->g", i, i)
    return np.maximum(of_rows, 1e-30), squares


def _standardize(g, root, weight, of_rows, design):
    """Subtract what cells' levels and genes' means take from scores, and scale genes to length 1; in place.

    With the columns of a design, what the genes' coefficients take too. Scores ``g`` and the roots of their
    information are (n_genes, n_cells), and ``of_rows`` are the sums of the information over genes.
    """
    level, norms = g.sum(0) / of_rows, np.empty(len(g), g.dtype)
    for part in _parts(g):
        own, i = g[part], _information(root[part], weight)
        own -= i * level
        own -= i * (own.sum(1) / np.maximum(i.sum(1), 1e-30))[:, None]
        if design.shape[1]:
            _take_out(own, i, design)
        norms[part] = np.linalg.norm(own, axis=1)
        own /= np.where(norms[part] > 0, norms[part], 1.0)[:, None]
    return norms


def _permuted(a, out, generator):
    """Permute every row of `a`, (n_genes, n), by itself, into `out`.

    A permutation is one of `_ORDERS` random orders with a random cyclic shift; two rows of ``a`` share both
    with probability ``1 / (_ORDERS n)``. It takes a sixth of the time of a random order for every row.
    """
    n = a.shape[1]
    shifts = generator.integers(n, size=len(a))
    for start in range(min(_ORDERS, len(a))):
        ordered = a[start::_ORDERS].take(generator.permutation(n), axis=1)
        for to, row, shift in zip(
            out[start::_ORDERS], ordered, shifts[start::_ORDERS], strict=True
        ):
            to[: n - shift], to[n - shift :] = row[shift:], row[:shift]
    return out


def score_spectrum(counts, mean, dispersion, offset, rng, known=None, coef=None):
    """`ScoreSpectrum` of counts at the fit of independent genes.

    Parameters
    ----------
    counts : Rows
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
    block = counts.in_memory().X
    genes = np.flatnonzero(block.getnnz(0) >= min(LEAST_ROWS, n / 2))
    if not genes.size:
        return ScoreSpectrum(np.zeros(1), np.zeros(N_PERMUTATIONS), np.zeros((n_genes, 0)))
    log_mean, r = (a.astype(np.float32)[:, None] for a in (np.log(mean[genes]), dispersion[genes]))
    weight = None if known.weight is None else np.sqrt(known.weight).astype(np.float32)
    # each of these arrays may be as large as the counts in memory
    g, root, standard = (np.empty((genes.size, n), np.float32) for _ in range(3))
    abundance = np.empty(genes.size)
    _fill(g, root, block, genes, offset, known, coef)
    for part in _parts(g):
        m = np.exp(log_mean[part] + root[part])
        abundance[part] = m.sum(1)
        own, i = scores(g[part], m, r[part])[:2]
        np.sqrt(i, out=root[part])
        standard[part] = np.divide(own, root[part], out=np.zeros_like(own), where=i > 0)
        if weight is not None:
            own *= weight
    of_rows, squares = _sums(root, weight)
    norms = _standardize(g, root, weight, of_rows, known.design)
    # at most as many genes as rows, those with the most counts: no larger a product than for the eigenvalues
    most = np.sort(np.argsort(-abundance, kind="stable")[:n])
    gram, of_most = _products(g, most)
    values, vectors = _leading(g, gram, min(MOST_FACTORS + 1, n, genes.size))
    generator, null, largest = np.random.default_rng(rng.randint(2**31)), [], []
    has_many = g.size > MANY_SCORES
    for _ in range(FEW_PERMUTATIONS if has_many else N_PERMUTATIONS):
        _permuted(standard, g, generator)
        g *= root
        if weight is not None:
            g *= weight
        _standardize(g, root, weight, of_rows, known.design)
        gram, of_permuted = _products(g, most)
        null.append(_leading(g, gram, 1)[0][0])
        largest.append(_largest_correlation(of_permuted))
    least_sd = _edge_sd(*g.shape) if has_many else 0.0
    spectrum = ScoreSpectrum(values, np.array(null), np.zeros((n_genes, 0)), least_sd)
    # an eigenvector just above the threshold may be half of a group's
    k = int(np.sum(values > 1.0 + EDGE_MARGIN * (spectrum.threshold - 1.0)))
    left = _correlations_left(of_most, values[:k], vectors[most, :k])
    groups = _groups(left, GROUP_MARGIN * np.mean(largest))
    # from correlations of scores to covariances of log-rates
    scale = norms[most] / np.sqrt(squares[most])
    loadings = np.zeros((n_genes, groups.shape[1]))
    loadings[genes[most]] = np.clip(groups * scale[:, None], -_LARGEST_SD, _LARGEST_SD)
    return replace(spectrum, groups=loadings)

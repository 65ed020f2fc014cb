"""The part of the loadings that the counts determine: W_perp, its singular basis, its effective rank.

A common level of a cell's log-rates cannot be told from its capture offset. So the counts determine only
the loadings less their mean over genes, and these up to a rotation.
"""

import numpy as np

#: fewest rows at which the edge of the noise is known, and its margin
LEAST_ROWS, EDGE_MARGIN = 200, 1.15
#: columns with a norm below this fraction of the largest do not count towards the effective rank
RANK_FRACTION = 0.05
#: nor do columns with a root mean square below this, nats: the rank is 0 where all columns vanish
SMALLEST_LOADING = 0.01


def compositional(loadings):
    """``W_perp``: the loadings less their mean over genes."""
    return loadings - loadings.mean(0)


def singular_basis(loadings):
    """Rotation (k, k) to the singular basis of W_perp.

    There the columns of W_perp are orthogonal and their norms descend, and the entry of largest magnitude of
    each column is positive. ``scores @ rotation`` are the scores in that basis.
    """
    centred = compositional(loadings)
    Vt = np.linalg.svd(centred, full_matrices=centred.shape[0] < centred.shape[1])[2]
    rotated = centred @ Vt.T
    largest = rotated[np.argmax(np.abs(rotated), 0), np.arange(rotated.shape[1])]
    return Vt.T * np.where(largest < 0, -1.0, 1.0)


def effective_rank(norms, n_genes):
    """Number of columns whose norm is above 5 % of the largest and above `SMALLEST_LOADING` per gene."""
    least = max(RANK_FRACTION * norms.max(initial=0.0), SMALLEST_LOADING * np.sqrt(n_genes))
    return int(np.sum(norms > least))


def noise_edges(n_genes, n_cells):
    """Largest ``w' B w`` of a column of noise in its s largest genes, for s = 1 to n_genes, with a margin.

    For all genes it is the edge of the Marchenko-Pastur law; in s of them a union bound over the choices of s
    genes. A factor of a few genes is real far below the edge of all genes.
    """
    s = np.arange(1, n_genes + 1)
    ratio = s * (1.0 + 2.0 * np.log(n_genes / s)) / n_cells
    return EDGE_MARGIN * (ratio + 2.0 * np.sqrt(ratio))


def column_information(loadings, weight):
    """Contributions of the genes to ``w' B w`` of each column, (n_genes, k), and the columns' basis (k, k).

    B is diag(weight). In the basis ``W_perp' B W_perp`` is diagonal, with descending entries.
    """
    centred = compositional(loadings)
    basis = np.linalg.eigh(centred.T @ (weight[:, None] * centred))[1][:, ::-1]
    return weight[:, None] * (centred @ basis) ** 2, basis


def above_noise(contributions, edges):
    """Whether each column, with these contributions of the genes, is above the edges of the noise, (k,).

    The gene that contributes most counts as the second does: a column of one gene is its noise variance.
    """
    largest = -np.sort(-contributions, axis=0)
    largest[:1] = largest[1:2]
    return np.any(np.cumsum(largest, axis=0) > edges[:, None], axis=0)

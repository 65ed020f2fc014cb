"""The part of the loadings that the counts determine: W_perp, its singular basis, its effective rank.

A common level of a cell's log-rates cannot be told from its capture offset. So the counts determine only
the loadings less their mean over genes, and these up to a rotation.
"""

import numpy as np

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

"""What the counts say of the loadings: W_perp, its singular basis, how many of its columns are real.

The level of a cell's log-rates is exchangeable with its capture offset, so that only the loadings less their
mean over genes are determined, and those up to a rotation.
"""

import numpy as np

#: columns below this fraction of the largest are not counted
RANK_FRACTION = 0.05
#: nor columns whose root mean square is below this, nats: where all vanish, none is real
SMALLEST_LOADING = 0.01


def compositional(loadings):
    """``W_perp``: the loadings less their mean over genes."""
    return loadings - loadings.mean(0)


def singular_basis(loadings):
    """Rotation (k, k) to the singular basis of W_perp, with signs.

    In it the columns of W_perp are orthogonal, their norms descend, and the entry of largest
    magnitude of each is positive. ``scores @ rotation`` are the scores in that basis.
    """
    centred = compositional(loadings)
    Vt = np.linalg.svd(centred, full_matrices=centred.shape[0] < centred.shape[1])[2]
    rotated = centred @ Vt.T
    largest = rotated[np.argmax(np.abs(rotated), 0), np.arange(rotated.shape[1])]
    return Vt.T * np.where(largest < 0, -1.0, 1.0)


def effective_rank(norms, n_genes):
    """Number of columns above 5 % of the largest that move the genes at all."""
    least = max(RANK_FRACTION * norms.max(initial=0.0), SMALLEST_LOADING * np.sqrt(n_genes))
    return int(np.sum(norms > least))

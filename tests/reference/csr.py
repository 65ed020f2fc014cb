"""Dense counts as sparse matrices."""

import numpy as np
import scipy.sparse as sp


def csr(counts):
    """Canonical float64 CSR, as `validate_counts` returns it."""
    X = sp.csr_matrix(np.asarray(counts, float))
    X.sum_duplicates()
    X.eliminate_zeros()
    return X

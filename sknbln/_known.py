"""What is known of rows besides their counts: covariates, log-exposures, weights, what is missing."""

from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.utils.validation import check_array

#: weight of a row that is left out of the sums over rows: it adds nothing to them, and is solved like others
NO_WEIGHT = 1e-300
#: log-exposure of a count that was not seen, nats: its expectation is 0, whatever the rate, and so it is
#: without any influence
NOT_SEEN = -1e4
_ROWS_AT_ONCE = 1024  # in means over rows, which are dense


def checked_weight(sample_weight, n_rows):
    """Weights of the rows, (n_rows,), validated; None where there are none.

    Raises
    ------
    ValueError
        If they are not one finite number >= 0 for each row, or all are 0.
    """
    if sample_weight is None:
        return None
    weight = check_array(
        sample_weight, ensure_2d=False, dtype=np.float64, input_name="sample_weight"
    )
    if weight.shape != (n_rows,):
        raise ValueError(
            f"sample_weight of shape {weight.shape}: expected ({n_rows},), a weight for each row of X."
        )
    if (weight < 0).any():
        raise ValueError(
            f"Negative values in sample_weight: {np.sum(weight < 0)} of them, the first in row "
            f"{np.argmax(weight < 0)}. A weight is how often a row counts, 0 or more."
        )
    if not weight.any():
        raise ValueError("All weights in sample_weight are zero: give some rows a weight above 0.")
    return weight


def without_missing(X):
    """Canonical CSR with zeros in place of NaN, and a mask of them; None where there is none."""
    is_nan = np.isnan(X.data)
    if not is_nan.any():
        return X, None
    X, mask = X.copy(), X.astype(bool)
    mask.data[:] = is_nan
    mask.eliminate_zeros()
    X.data[is_nan] = 0.0
    X.eliminate_zeros()
    return X, mask


def refuse_genes_not_seen(estimator, missing, weight):
    """Raise ValueError if all counts of a gene are missing, in rows with a weight; None where none is."""
    if missing is None:
        return
    missing = missing if weight is None else missing[weight > 0]
    n_rows = missing.shape[0]
    genes = np.flatnonzero(missing.getnnz(axis=0) == n_rows)
    if genes.size:
        names = getattr(estimator, "feature_names_in_", np.arange(missing.shape[1]))[genes[:10]]
        raise ValueError(
            f"All counts of {genes.size} genes are missing, NaN in all {n_rows} rows: "
            f"{', '.join(map(str, names))}{', ...' if genes.size > 10 else ''}. Nothing can be learned "
            "of them: leave them out."
        )


class Known(NamedTuple):
    """What is known of rows besides their counts."""

    design: np.ndarray  # (n_rows, p) covariates, centred and of unit variance in the fit
    exposure: np.ndarray  # (n_rows, q) log-exposures, q = 0 (there are none), 1 or n_genes
    weight: np.ndarray | None = None  # (n_rows,) of the rows in sums; None is 1
    #: (n_rows, n_genes) sparse, True where a count was not seen; None where all were
    missing: csr_matrix | None = None

    @classmethod
    def coded(cls, design, covariates, offset, n_rows, weight=None, missing=None):
        """Of arguments of `fit` and other methods, the covariates coded by a `Design`."""
        exposure = np.zeros((n_rows, 0)) if offset is None else offset
        weight = None if weight is None else np.maximum(weight, NO_WEIGHT)
        return cls(design.matrix(covariates, n_rows) / design.scale, exposure, weight, missing)

    @classmethod
    def nothing(cls, n):
        """No covariates and no exposures of n rows."""
        return cls(np.zeros((n, 0)), np.zeros((n, 0)))

    def chosen(self, positions):
        """Those of the rows at these positions, or of a slice."""
        return Known(*(a if a is None else a[positions] for a in self))

    @property
    def used(self):
        """Positions of the rows that have a weight."""
        if self.weight is None:
            return np.arange(len(self.design))
        return np.flatnonzero(self.weight > NO_WEIGHT)

    @property
    def total_weight(self):
        """Sum of the rows' weights: their number, where they have none."""
        return len(self.design) if self.weight is None else float(self.weight.sum())

    def weighted(self, a):
        """``a``, with rows for the rows, times their weights."""
        return a if self.weight is None else (self.weight * a.T).T

    @property
    def is_nothing(self):
        """Whether there are neither covariates nor exposures nor missing counts."""
        return not (self.design.shape[1] or self.exposure.shape[1] or self.missing is not None)

    def dense(self):
        """The same with missing counts as entries of the exposures; for a few rows."""
        if self.missing is None:
            return self
        exposure = np.where(self.missing.toarray(), NOT_SEEN, 0.0)
        if self.exposure.shape[1]:
            exposure = exposure + self.exposure
        return self._replace(exposure=exposure, missing=None)

    def log_scale(self, coef):
        """``B c + o``, what is added to the log-means, (n_rows, n_genes) or (n_rows, 1)."""
        shift, exposure = np.zeros((len(self.design), 1)), self.dense().exposure
        if self.design.shape[1]:
            shift = self.design @ coef.T
        return shift + exposure if exposure.shape[1] else shift

    def blocks(self):
        """Slices of rows, over which a dense matrix of genes is small."""
        return [slice(at, at + _ROWS_AT_ONCE) for at in range(0, len(self.design), _ROWS_AT_ONCE)]

    def sum_of_scales(self, offset, coef):
        """``sum_c exp(B c + o - offset)``, () without covariates and exposures, else (n_genes,) or (1,)."""
        if self.is_nothing:
            return np.sum(self.weighted(np.exp(-offset)))
        total = 0.0
        for rows in self.blocks():
            part = self.chosen(rows)
            total += np.sum(part.weighted(np.exp(part.log_scale(coef) - offset[rows, None])), 0)
        return total

    def totals(self, X, coef):
        """``sum_g u (B c + o)`` of each of these rows, CSR X, (n_rows,)."""
        total = np.sum((X @ coef) * self.design, 1)
        if self.exposure.shape[1]:
            total = total + np.asarray(X.multiply(self.exposure).sum(1)).ravel()
        return total

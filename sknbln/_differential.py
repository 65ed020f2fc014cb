"""Differential expression, by Wald tests of coefficients, and co-expression, by permuted scores of pairs."""

from dataclasses import dataclass
from itertools import combinations
from math import ceil, comb

import numpy as np
import pandas as pd
from scipy.sparse import csr_array
from scipy.stats import false_discovery_control, norm

#: blocks are enough where the smallest p-value of two sides is at most this
_LARGEST_LEAST_P = 0.05


def coefficient_table(coef, standard_error, covariate_names, gene_names):
    """Two-sided normal Wald test of every coefficient.

    The statistic is the coefficient divided by its standard error. q-values are Benjamini-Hochberg's, over
    the genes of each covariate by itself. Where a standard error is 0 or not finite there is no test:
    statistic, p-value and q-value are NaN, and the gene does not count in the q-values of others.

    Parameters
    ----------
    coef, standard_error : array-like of shape (n_genes, p)
        Coefficients in nats per unit of their covariate, and their standard errors.
    covariate_names : sequence of str, length p
        Names of the coefficients.
    gene_names : sequence of length n_genes or None
        Names of the genes; None for their numbers.

    Returns
    -------
    pandas.DataFrame
        With a row per coefficient, gene by gene, and the columns gene, covariate, coefficient,
        standard_error, statistic, p_value, q_value.
    """
    coef, standard_error = np.asarray(coef, float), np.asarray(standard_error, float)
    n_genes, p = coef.shape
    gene_names = np.arange(n_genes) if gene_names is None else np.asarray(gene_names)
    tested = np.isfinite(coef) & np.isfinite(standard_error) & (standard_error > 0)
    statistic = np.full_like(coef, np.nan)
    np.divide(coef, standard_error, out=statistic, where=tested)
    p_value = 2 * norm.sf(np.abs(statistic))
    q_value = np.full_like(coef, np.nan)
    for j in np.flatnonzero(tested.any(axis=0)):
        q_value[tested[:, j], j] = false_discovery_control(p_value[tested[:, j], j])
    return pd.DataFrame(
        {
            "gene": np.repeat(gene_names, p),
            "covariate": np.tile(np.asarray(covariate_names, object), n_genes),
            "coefficient": coef.ravel(),
            "standard_error": standard_error.ravel(),
            "statistic": statistic.ravel(),
            "p_value": p_value.ravel(),
            "q_value": q_value.ravel(),
        }
    )


@dataclass(frozen=True, eq=False)
class Units:
    """Rows or blocks of rows, which are permuted between two groups."""

    is_first: np.ndarray  # (n_units,) whether a unit is of the first group
    unit: np.ndarray  # (n_rows,) unit of each row
    columns: np.ndarray  # (n_rows, q) indicators of the blocks, or without them of the groups

    @classmethod
    def of(cls, groups, blocks, n_rows):
        """From the labels of the rows; blocks may be None.

        Raises
        ------
        ValueError
            "groups of shape ..."; "Missing values in ..."; "groups has ... values"; "... blocks have rows of
            both groups"; "... blocks in the two groups can be allocated in ... ways".
        """
        group, kinds = _codes(groups, "groups", n_rows)
        if len(kinds) != 2:
            raise ValueError(
                f"groups has {len(kinds)} values, {', '.join(map(str, kinds[:5]))}: expected two, one for "
                "each of the groups that are compared."
            )
        if blocks is None:
            return cls(group == 0, np.arange(n_rows), np.eye(2)[group])
        unit, names = _codes(blocks, "blocks", n_rows)
        share = np.bincount(unit, group == 0) / np.bincount(unit)
        mixed = (share > 0) & (share < 1)
        if mixed.any():
            raise ValueError(
                f"{mixed.sum()} blocks have rows of both groups, {names[mixed][0]} among them: blocks are "
                "permuted as a whole, and so belong to one group each."
            )
        found = cls(share > 0, unit, np.eye(len(names))[unit])
        found._refuse_few()
        return found

    @property
    def n_allocations(self):
        """Number of ways to allocate the units to groups of their sizes."""
        return comb(self.is_first.size, int(self.is_first.sum()))

    def _refuse_few(self):
        if 2 / self.n_allocations <= _LARGEST_LEAST_P:
            return
        n_first = int(self.is_first.sum())
        raise ValueError(
            f"{n_first} and {self.is_first.size - n_first} blocks in the two groups can be allocated in "
            f"{self.n_allocations} ways, so that no p-value is below .05. Needed are at least "
            f"{ceil(2 / _LARGEST_LEAST_P)} ways, such as 4 blocks in each group have."
        )

    def permuted(self, n, rng):
        """Indicators of the first group, (1 + n, n_units): the actual one first; all of them if not more."""
        if self.n_allocations > n:
            others = [rng.permutation(self.is_first) for _ in range(n)]
        else:
            size, chosen = self.is_first.size, int(self.is_first.sum())
            others = [
                np.isin(np.arange(size), first) for first in combinations(range(size), chosen)
            ]
        return np.array([self.is_first, *others], float)


def _codes(labels, what, n_rows):
    """Labels of rows as numbers, and the sorted labels."""
    labels = np.asarray(labels)
    if labels.shape != (n_rows,):
        raise ValueError(
            f"{what} of shape {labels.shape}: expected ({n_rows},), a label for each row."
        )
    if pd.isna(labels).any():
        raise ValueError(f"Missing values in {what}: leave these rows out.")
    return pd.factorize(labels, sort=True)


def permuted_differences(g, i, a, units, n_permutations, rng):
    """Differences between two groups of the scores of every pair, standardized by permutations.

    Parameters
    ----------
    g, i : ndarray of shape (n_rows, n_genes)
        Scores and information.
    a : ndarray of shape (n_rows, 1)
        What the fit of a row's offset takes of the mean of a product, per product of information.
    units : Units
        What is permuted.
    n_permutations : int
        Number of permutations.
    rng : RandomState

    Returns
    -------
    statistic, skewness, difference : ndarray of shape (n_genes, n_genes), above the diagonal
        The statistic in standard deviations of its permutations, their skewness, and the difference of the
        estimates of ``Sigma_jk``.
    """
    offsets, v = np.sqrt(a) * i, i * (1.0 - a * i)
    n_rows, n = g.shape
    sums = csr_array((np.ones(n_rows), (units.unit, np.arange(n_rows))))
    first = units.permuted(n_permutations, rng)
    statistic, skewness, difference = (np.zeros((n, n)) for _ in range(3))
    for j in range(n - 1):
        later = slice(j + 1, n)
        T = sums @ (g[:, [j]] * g[:, later] + offsets[:, [j]] * offsets[:, later])
        V = sums @ (v[:, [j]] * v[:, later])
        V_first = np.maximum(first @ V, 1e-300)
        V_second = np.maximum(V.sum(0) - V_first, 1e-300)
        T_first = first @ T
        of_groups = T_first / V_first - (T.sum(0) - T_first) / V_second
        t = of_groups / np.sqrt(1.0 / V_first + 1.0 / V_second)
        centre = t[1:].mean(0)
        sd = np.maximum(t[1:].std(0), 1e-300)
        statistic[j, later] = (t[0] - centre) / sd
        skewness[j, later] = np.mean((t[1:] - centre) ** 3, 0) / sd**3
        difference[j, later] = of_groups[0]
    return statistic, skewness, difference

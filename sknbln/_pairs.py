"""Which genes move together: a test of every pair, on the scores at the fit of independent genes.

P-values are those of the Pearson III law with the moments of the pairs' scores (see `_scores`): of two sides,
the probability of a statistic as far from 0, which is well calibrated where few counts leave no lower tail.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from numbers import Integral

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.special import gammainc, gammaincc, ndtr
from scipy.stats import false_discovery_control
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted

from ._correlation import interval
from ._differential import Units, permuted_differences
from ._known import NO_WEIGHT, checked_weight
from ._scores import IndependentScores, mirrored, pair_blocks, pair_moments
from ._typing import Alternative, CountsLike, Covariates, Seed
from .predictive._arguments import gene_positions, validated_options
from .predictive._interface import PredictiveModel

_ROUNDS = 5  # Newton steps of each gene's mean in each group or block
_SMALL_SKEW = 0.01  # where r* is accurate to 1e-5


def upper_tail(z, skew):
    """Upper tail of the Pearson III law with mean 0, variance 1 and this skewness, at an array z.

    That of a gamma law with shape ``4 / skew^2``. Where that is large, incomplete gamma functions lose their
    accuracy in the tails, and the tail is that of a normal law at Barndorff-Nielsen's r*.
    """
    tail = np.full(np.shape(z), np.nan)
    is_small = np.abs(skew) < _SMALL_SKEW
    tail[is_small] = ndtr(-_normal_deviate(z[is_small], skew[is_small]))
    for mask, sign, function in (
        (skew >= _SMALL_SKEW, 1.0, gammaincc),
        (skew <= -_SMALL_SKEW, -1.0, gammainc),
    ):
        scale = 2.0 / np.abs(skew[mask])
        tail[mask] = function(scale**2, np.maximum(scale * (scale + sign * z[mask]), 0.0))
    return tail


def _normal_deviate(z, skew):
    """r* of the Pearson III law: the normal deviate with the tail of z, for small skewness."""
    t = z * skew / 2.0
    small = np.abs(t) < 1e-4
    t = np.where(small, 1e-4, np.maximum(t, 1e-12 - 1.0))
    ratio = np.sqrt(2.0 * (t - np.log1p(t))) / np.abs(t)  # of w to z
    w = z * np.where(small, 1.0 - z * skew / 6.0, ratio)
    safe = np.where(small, 1.0, w)
    return w + np.where(small, skew / 6.0, -np.log(ratio) / safe)


def p_values(z, skew, alternative="two-sided"):
    """Probabilities of a standardized statistic as extreme as z, under the Pearson III law."""
    if alternative != "two-sided":
        return upper_tail(z, skew) if alternative == "greater" else upper_tail(-z, -skew)
    size = np.abs(z)
    return np.minimum(upper_tail(size, skew) + upper_tail(size, -skew), 1.0)


@dataclass(frozen=True, eq=False)
class CorrelationTest:
    """Tests of pairs of genes, a row for each gene asked for and a column for each gene it is paired with.

    A gene paired with itself, and pairs of a gene without any counts, have no test: their values are NaN.

    Attributes
    ----------
    genes : ndarray of shape (n,)
        Names of the genes of the rows; their positions where the fit has no names.
    partners : ndarray of shape (m,)
        Names or positions of the genes of the columns.
    statistic : ndarray of shape (n, m)
        Standardized statistics: positive where two genes move together.
    p_value : ndarray of shape (n, m)
        P-values.
    q_value : ndarray of shape (n, m)
        Benjamini and Hochberg's q-values over all pairs, each counted once.
    correlation : ndarray of shape (n, m) or None
        Correlations of an `NBLNEstimator`.
    standard_error : ndarray of shape (n, m) or None
        Their standard errors.
    difference : ndarray of shape (n, m) or None
        Of a test between groups, the difference of the estimates of ``Sigma_jk``, nats squared.
    """

    genes: np.ndarray
    partners: np.ndarray
    statistic: np.ndarray
    p_value: np.ndarray
    q_value: np.ndarray
    correlation: np.ndarray | None = None
    standard_error: np.ndarray | None = None
    difference: np.ndarray | None = None

    def __repr__(self) -> str:
        """One line."""
        q_value = self.q_value[first_of_pairs(self.genes, self.partners) & ~np.isnan(self.q_value)]
        return (
            f"{type(self).__name__}({len(self.genes)} genes x {len(self.partners)} partners, "
            f"{q_value.size} pairs tested, {np.count_nonzero(q_value <= 0.05)} with q <= 0.05)"
        )

    @property
    def sign(self) -> np.ndarray:
        """Signs of the statistics: 1, 0 or -1, NaN where there is no test; (n, m)."""
        return np.sign(self.statistic)

    def interval(self, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Ends of intervals of the correlations that hold the truth with this probability.

        Parameters
        ----------
        level : float, default=0.9
            Probability.

        Returns
        -------
        low, high : ndarray of shape (n, m)

        Raises
        ------
        ValueError
            If the test has no correlations, as that of an NBVCPEstimator.
        """
        if self.correlation is None:
            raise ValueError(
                "This test has no correlations: those of an NBVCPEstimator are all 0. Test with an "
                "NBLNEstimator."
            )
        return interval(self.correlation, self.standard_error, level)

    def to_frame(self, q: float | None = None, *, level: float = 0.9) -> pd.DataFrame:
        """Table of the pairs, each once, with the smallest p-values first.

        Parameters
        ----------
        q : float or None, default=None
            Only pairs with a q-value of at most this; None for all pairs.
        level : float, default=0.9
            Probability of the intervals of correlations.

        Returns
        -------
        DataFrame
            Columns ``gene_1``, ``gene_2``, ``statistic``, ``sign``, ``p_value``, ``q_value``, and where the
            test has them ``difference``, ``correlation``, ``standard_error``, ``low`` and ``high``.
        """
        once = first_of_pairs(self.genes, self.partners)
        if q is not None:
            once &= self.q_value <= q
        i, j = np.nonzero(once)
        order = np.argsort(self.p_value[i, j], kind="stable")
        i, j = i[order], j[order]
        columns = {"gene_1": self.genes[i], "gene_2": self.partners[j]}
        for name in ("statistic", "sign", "p_value", "q_value"):
            columns[name] = getattr(self, name)[i, j]
        for name in ("difference", "correlation", "standard_error"):
            if getattr(self, name) is not None:
                columns[name] = getattr(self, name)[i, j]
        if self.correlation is not None:
            ends = interval(columns["correlation"], columns["standard_error"], level)
            columns["low"], columns["high"] = ends
        return pd.DataFrame(columns)


def first_of_pairs(genes, partners):
    """True once for every pair of two genes in the table of genes with their partners."""
    row = {gene: i for i, gene in enumerate(genes)}
    rank = np.array([row.get(gene, len(genes)) for gene in partners])
    return rank > np.arange(len(genes))[:, None]


def tested_pairs(
    statistic, skew, out, names, positions, has_counts, alternative="two-sided", least=0.0
):
    """`CorrelationTest` of standardized statistics; the arrays `skew` and `out` become its p and q values.

    No p-value is below ``least``.
    """
    genes = names[positions]
    statistic[np.arange(len(positions)), positions] = np.nan
    statistic[~has_counts[positions]] = statistic[:, ~has_counts] = np.nan
    p_value, q_value = skew, out
    for block, columns in pair_blocks(positions, len(names)):
        at = block, columns
        p_value[at] = np.maximum(p_values(statistic[at], skew[at], alternative), least)
    mirrored(p_value, positions)
    q_value[:] = 0.0
    tested = first_of_pairs(genes, names) & ~np.isnan(p_value)
    if tested.any():
        q_value[tested] = false_discovery_control(p_value[tested])
    mirrored(q_value, positions)
    q_value[np.isnan(p_value)] = np.nan
    return CorrelationTest(genes, names, statistic, p_value, q_value)


class PairTestMixin(PredictiveModel):
    """Methods of a fitted model that test every pair of genes, at its fit of independent genes."""

    @abstractmethod
    def _independent(self):
        """The `NBVCPPosterior` of independent genes."""

    def _gene_names(self):
        return getattr(self, "feature_names_in_", np.arange(self.n_features_in_))

    def _scores_of(self, X, covariates, offset, columns, weight=None, n_rounds=0):
        """`IndependentScores` of rows, less what these columns and the covariates take."""
        X, known = self._given(X, covariates, offset)
        if weight is not None:
            known = known._replace(weight=np.maximum(weight, NO_WEIGHT))
        columns = np.concatenate([columns, known.design], 1)
        return IndependentScores(X, self._independent(), known, columns, self.batch_size, n_rounds)

    @validated_options(alternative=[StrOptions({"two-sided", "greater", "less"})])
    def correlation_test(
        self,
        X: CountsLike,
        genes: ArrayLike | None = None,
        *,
        alternative: Alternative = "two-sided",
        covariates: Covariates | None = None,
        offset: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> CorrelationTest:
        r"""Score test of every pair of genes: whether they move together more than independent genes do.

        The statistic is the standardized score ``T / sqrt(V)`` of the covariance ``Sigma_jk`` of two
        log-rates, at the fit of independent genes (for an `NBLNEstimator` that of its source, and no other
        part of the fit has a say),

        .. math:: T = \sum_c g_{cj} g_{ck} + a_c i_{cj} i_{ck}, \qquad g = (u - m) \frac{r}{r + m}, \quad
                  i = \frac{m r}{r + m}, \quad a_c = 1 / \textstyle\sum_g i_{cg}

        with the fitted means m. Its law under independence is Pearson's type III with the moments of
        negative binomial counts [1]_ [2]_. Capture offsets, covariates, exposures and missing counts are in
        the means. What is tested is ``Sigma_jk`` relative to the level of the cell, which the capture offset
        takes; without a capture model, ``Sigma_jk`` itself.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_cells, n_genes)
            Counts: those of the fit, or others. NaN is a count that was not seen.
        genes : array-like or None, default=None
            Names or positions of genes that are paired with all genes; None for all pairs.
        alternative : {"two-sided", "greater", "less"}, default="two-sided"
            Which pairs have small p-values: those that move together or against each other, together
            ("greater"), or against each other ("less"). The two-sided one is the probability of a statistic
            as far from 0.
        covariates, offset
            Of the rows, as in :meth:`fit`.
        sample_weight : array-like of shape (n_cells,) or None, default=None
            How often each row counts.

        Returns
        -------
        CorrelationTest
            ``statistic``, ``p_value`` and ``q_value``, each of shape (n_genes_asked_for, n_genes),
            ``sign``, and ``to_frame()``; of an `NBLNEstimator` also ``correlation``, ``standard_error`` and
            ``interval()``.

        Raises
        ------
        ValueError
            If a gene or the alternative is unknown, or X, its covariates or weights are not as in
            :meth:`fit`.

        Notes
        -----
        Counts with outlier cells, zero inflation or a mixture of cell types are not independent given the
        capture offset: that is found, as it should be, as genes that move together. Test within a type, or
        give types as covariates.

        The cost is four products of (n, n_cells) and (n_cells, n_genes) matrices, half of it for all pairs;
        the memory 24 bytes per pair and a block of rows.

        References
        ----------
        .. [1] Rao, C. R. (1948). Large sample tests of statistical hypotheses concerning several parameters
           with applications to problems of estimation. Math. Proc. Cambridge Philos. Soc. 44, 50-57.
        .. [2] Pearson, K. (1895). Contributions to the mathematical theory of evolution, II. Skew variation
           in homogeneous material. Phil. Trans. R. Soc. A 186, 343-414.

        Examples
        --------
        >>> from sknbln import NBVCPEstimator
        >>> from sknbln.datasets import make_nbln_counts
        >>> X = make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=0).data
        >>> test = NBVCPEstimator(random_state=0).fit(X).correlation_test(X, genes=[0, 1])
        >>> test.p_value.shape
        (2, 24)
        >>> test.to_frame(q=0.05).columns.tolist()
        ['gene_1', 'gene_2', 'statistic', 'sign', 'p_value', 'q_value']
        """
        check_is_fitted(self)
        positions = gene_positions(self, genes)
        weight = checked_weight(sample_weight, np.shape(X)[0])
        rows = self._scores_of(X, covariates, offset, np.ones((np.shape(X)[0], 1)), weight)
        T, V, K = pair_moments(rows, positions)
        for block, columns in pair_blocks(positions, T.shape[1]):
            at = block, columns
            sd = np.sqrt(np.maximum(V[at], 1e-300))
            T[at] /= sd
            K[at] /= sd**3
        mirrored(T, positions)
        names = self._gene_names()
        return tested_pairs(T, K, V, names, positions, rows.has_counts, alternative)

    @validated_options(n_permutations=[Interval(Integral, 19, None, closed="left")])
    def correlation_difference_test(
        self,
        X: CountsLike,
        groups: ArrayLike,
        blocks: ArrayLike | None = None,
        *,
        genes: ArrayLike | None = None,
        n_permutations: int = 999,
        random_state: Seed = None,
        covariates: Covariates | None = None,
        offset: ArrayLike | None = None,
    ) -> CorrelationTest:
        """Test of every pair of genes: whether they move together more in one of two groups of cells.

        Of each group the scores of :meth:`correlation_test` estimate ``Sigma_jk``, by ``T / V``. The
        statistic is their difference divided by ``sqrt(1 / V_1 + 1 / V_2)``, and standardized by its mean and
        standard deviation over permutations of the rows' groups; p-values are those of the Pearson III law
        that has the skewness of the permutations too [1]_. Each gene's means in the groups are fitted
        first, so that differential expression is no difference of correlations. The fit should be of the rows
        of both groups.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_cells, n_genes)
            Counts.
        groups : array-like of shape (n_cells,)
            Group of each row, two values. Differences are those of the first, in sorted order, from the
            second.
        blocks : array-like of shape (n_cells,) or None, default=None
            Donor, batch or other unit of each row, which belongs to one group as a whole. Blocks are then
            permuted instead of rows, and each gene's mean in each block is fitted. Rows of one donor are
            no independent samples of its group: without blocks their p-values are too small.
        genes : array-like or None, default=None
            Names or positions of the genes whose pairs with each other are tested; None for all.
        n_permutations : int, default=999
            Number of permutations; all of them where there are no more.
        random_state : int, RandomState instance or None, default=None
            Seed of the permutations; None takes the estimator's.
        covariates, offset
            Of the rows, as in :meth:`fit`.

        Returns
        -------
        CorrelationTest
            Square, of the genes asked for, with ``difference``, that of the estimates of ``Sigma_jk`` in nats
            squared. No p-value is below two over the number of allocations to the groups.

        Raises
        ------
        ValueError
            If there are not two groups; if a block has rows of both; if blocks are so few that no p-value
            is below .05: 4 in each group are enough.

        Notes
        -----
        The cost is ``n_permutations * n_units`` operations for each pair: choose some hundred genes.

        References
        ----------
        .. [1] Winkler, A. M., Ridgway, G. R., Douaud, G., Nichols, T. E. and Smith, S. M. (2016). Faster
           permutation inference in brain imaging. NeuroImage 141, 502-516.

        Examples
        --------
        >>> import numpy as np
        >>> from sknbln import NBVCPEstimator
        >>> from sknbln.datasets import make_nbln_counts
        >>> X = make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=0).data
        >>> model = NBVCPEstimator(random_state=0).fit(X)
        >>> group = np.repeat(["control", "case"], 75)
        >>> model.correlation_difference_test(
        ...     X, group, genes=[0, 1, 2], random_state=0
        ... ).p_value.shape
        (3, 3)
        """
        check_is_fitted(self)
        positions = gene_positions(self, genes)
        rng = check_random_state(self.random_state if random_state is None else random_state)
        units = Units.of(groups, blocks, np.shape(X)[0])
        rows = self._scores_of(X, covariates, offset, units.columns, n_rounds=_ROUNDS)
        parts = [(g[:, positions], i[:, positions], a) for _, g, i, _, a in rows]
        g, i, a = (np.concatenate(part) for part in zip(*parts, strict=True))
        statistic, skew, difference = permuted_differences(g, i, a, units, n_permutations, rng)
        whole, names = np.arange(len(positions)), self._gene_names()[positions]
        for table in (statistic, difference):
            mirrored(table, whole)
        has_counts, out = rows.has_counts[positions], np.empty_like(skew)
        least = 2.0 / units.n_allocations
        test = tested_pairs(statistic, skew, out, names, whole, has_counts, least=least)
        return replace(test, difference=difference)

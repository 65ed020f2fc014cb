"""Thinning: every count split into two that are independent given the mean."""

from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike
from sklearn.utils import check_array, check_random_state, check_scalar

from ._typing import CountsLike, Seed


class ThinningSplit:
    r"""Split every count into a training and a test count: for questions that other rows cannot answer.

    With the share e of the counts in the test matrix and dispersion (size) r of the gene,

    .. math:: u_{test} \sim \mathrm{Binomial}(u, p), \quad p \sim \mathrm{Beta}(e\, r, (1 - e)\, r), \quad
              u_{train} = u - u_{test}

    Parts of a negative binomial u of mean m and size r are independent, negative binomial of means
    (1 - e) m and e m and sizes (1 - e) r and e r [1]_; those of a Poisson u (r infinite, p = e) independent
    and Poisson.

    It yields matrices, not indices of rows, and is no ``cv=`` of scikit-learn or :func:`compare`. Both
    matrices have the same rows, so that an embedding of these very rows can be judged.

    Parameters
    ----------
    n_splits : int, default=5
        Number of splits, each of all counts: repetitions, not folds.
    test_share : float, default=0.2
        Share e of the test counts in the mean, between 0 and 1.
    dispersion : float, array-like of shape (n_genes,) or None, default=None
        Dispersion r of the counts given the rates, positive; None, or inf, for Poisson counts.
    random_state : int, RandomState instance or None, default=None
        Seed of the splits.

    Attributes
    ----------
    offset : float
        ``log(e / (1 - e))``, the log-exposure of the test counts relative to the training counts, nats.

    Notes
    -----
    The dispersion has to be known, from other data or other rows. With one that is too large,
    or as Poisson counts, overdispersion is in both matrices and a model that fits it in one is rewarded in
    the other; with one that is too small the two are negatively correlated. Independence is given the
    means only: what a cell's log-rates are, its factors, its capture and the noise of single genes,
    the two matrices share. How well factors from one predict the other is what the split measures. What it
    does not measure is how a model predicts other cells: for that use :func:`compare`.

    To score, fit to the training counts, predict the log-rates of its rows, add `offset`, and take the
    log-likelihood of the test counts under their mean, as in the example.

    References
    ----------
    .. [1] Neufeld, A., Dharamshi, A., Gao, L. L. and Witten, D. (2024). Data thinning for
       convolution-closed distributions. Journal of Machine Learning Research 25 (57), 1-35.

    Examples
    --------
    How well two factors predict the test counts of Poisson log-normal counts, and how well none does:

    >>> import numpy as np
    >>> from scipy.stats import poisson
    >>> from sknbln import NBLNEstimator
    >>> from sknbln.datasets import make_nbln_counts
    >>> from sknbln.model_selection import ThinningSplit
    >>> sim = make_nbln_counts(
    ...     n_cells=150, n_genes=24, n_factors=2, dispersion=(1e6, 0.1), random_state=0
    ... )
    >>> thinning = ThinningSplit(1, random_state=0)
    >>> [(X_train, X_test)] = thinning.split(sim.data)
    >>> bool((X_train + X_test != sim.data).nnz == 0)
    True
    >>> model = NBLNEstimator(2, observation="poisson", random_state=0).fit(X_train)
    >>> scores = model.transform(X_train)
    >>> capture = thinning.offset - model.capture_offset_[:, None]
    >>> factors = np.exp(model.inverse_transform(scores) + capture)
    >>> none = np.exp(model.inverse_transform(0 * scores) + capture)
    >>> counts = X_test.toarray()
    >>> bool(poisson.logpmf(counts, factors).sum() > poisson.logpmf(counts, none).sum())
    True
    """

    def __init__(
        self,
        n_splits: int = 5,
        *,
        test_share: float = 0.2,
        dispersion: ArrayLike | None = None,
        random_state: Seed = None,
    ) -> None:
        self.n_splits = n_splits
        self.test_share = test_share
        self.dispersion = dispersion
        self.random_state = random_state

    @property
    def offset(self) -> float:
        """Log-exposure of the test counts relative to the training counts, nats."""
        return float(np.log(self.test_share) - np.log1p(-self.test_share))

    def get_n_splits(self, X: Any = None, y: Any = None, groups: Any = None) -> int:
        """Return the number of splits; the arguments are ignored."""
        return self.n_splits

    def split(self, X: CountsLike) -> Iterator[tuple[sp.csr_matrix, sp.csr_matrix]]:
        """Yield the training and the test counts of each split.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_cells, n_genes)
            Counts.

        Yields
        ------
        X_train, X_test : csr_matrix of shape (n_cells, n_genes), int64
            Their sum is X.

        Raises
        ------
        ValueError
            If X holds values that are not counts; if a parameter is out of its range.
        """
        check_scalar(self.n_splits, "n_splits", Integral, min_val=1)
        check_scalar(
            self.test_share, "test_share", Real, min_val=0, max_val=1, include_boundaries="neither"
        )
        X = sp.csr_matrix(check_array(X, accept_sparse="csr", input_name="X", copy=True))
        X.sum_duplicates()
        X.eliminate_zeros()
        if np.any(X.data < 0) or np.any(X.data != np.floor(X.data)):
            raise ValueError(
                "ThinningSplit expects counts: found values that are negative or not whole numbers, which "
                "cannot be split by a binomial draw. Give raw counts."
            )
        X = X.astype(np.int64)
        size = self._dispersion(X.shape[1])[X.indices]
        rng = np.random.default_rng(check_random_state(self.random_state).randint(2**31, size=4))
        known = np.isfinite(size)
        for _ in range(self.n_splits):
            share = np.full(size.shape, float(self.test_share))
            share[known] = rng.beta(share[known] * size[known], (1 - share[known]) * size[known])
            test = X.copy()
            test.data = rng.binomial(X.data, share)
            test.eliminate_zeros()
            yield X - test, test

    def _dispersion(self, n_genes):
        """Dispersion of each gene, inf for Poisson counts."""
        r = np.asarray(np.inf if self.dispersion is None else self.dispersion, float)
        if r.shape not in ((), (n_genes,)) or not np.all(r > 0):
            raise ValueError(
                f"dispersion of shape {r.shape}: expected a positive number, or one for each of the "
                f"{n_genes} genes."
            )
        return np.broadcast_to(r, n_genes)

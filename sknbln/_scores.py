r"""Scores of log-rates at a fit of independent genes, and of the covariance of every pair.

With fitted means ``m = m_g exp(B_g c_c + o_cg - eta_c)``, the score and the expected information of a
log-rate are

.. math:: g = (u - m) \frac{r}{r + m}, \qquad i = \frac{m r}{r + m}

and the score of ``Sigma_jk`` is ``T_jk = sum_c g_cj g_ck``. From g is taken what the fit of each gene's mean
and coefficients takes. The capture offsets are fitted to the same counts, which takes
``i_cj i_ck a_c``, ``a_c = 1 / sum_g i_cg``, from the mean of each product: it is added back. (The capture
prior has no part in a, since its centre follows the same counts.) Under independence the variance of T is
then ``sum_c v_cj v_ck`` with ``v = i (1 - a i)``, and its third cumulant ``sum_c k_cj k_ck`` with that of g,
``k = i (2 - r / (r + m))``.
"""

import numpy as np

from ._blocks import CSRRows

#: entries of a block of dense rows, and of a block of pairs; 8 bytes each in a few arrays
_ROW_ENTRIES, _PAIR_ENTRIES = 2**21, 2**21
_LARGEST_STEP = 1.0  # nats
_RIDGE = 1e-6  # of a gene's information: keeps that of its coefficients regular


def scores(counts, mean, dispersion):
    """Scores g of log-rates, their information i, and the shares ``r / (r + m)``.

    ``counts`` become the scores, in place.
    """
    share = 1.0 / (1.0 + mean / dispersion)
    counts -= mean
    counts *= share
    return counts, mean * share, share


def coefficients(information, of_columns):
    """One Newton step of each gene's coefficients of q columns x, (n_genes, q).

    ``information`` is ``sum_c i x x'``, (n_genes, q, q), and is changed; ``of_columns`` is ``sum_c g x``.
    """
    q = information.shape[1]
    ridge = _RIDGE * np.trace(information, axis1=1, axis2=2) + 1e-30
    information += ridge[:, None, None] * np.eye(q, dtype=information.dtype)
    return np.linalg.solve(information, of_columns[:, :, None])[:, :, 0]


class IndependentScores:
    """Scores of rows at a fit of independent genes, a block of dense rows at a time.

    Iteration yields tuples of a slice of rows, the scores g less what the coefficients of ``columns`` take,
    their information i, the shares ``r / (r + m)``, (n, n_genes) each, and ``a``, (n, 1): what the fit of
    the capture offset takes of the mean of a product of scores, per product of information.

    Parameters
    ----------
    X : csr_matrix of shape (n_cells, n_genes)
        Counts.
    fit : NBVCPPosterior
        The fit of independent genes.
    known : Known
        Covariates and exposures of the rows; rows count with their weights.
    columns : ndarray of shape (n_cells, q)
        Columns with coefficients of every gene, which are taken out of the scores.
    n_rounds : int, default=0
        Newton steps by which the means are fitted to the columns first, where the fit does not know of them.
    """

    def __init__(self, X, fit, known, columns, batch_size=None, n_rounds=0):
        self.counts, self.fit, self.known, self.columns = CSRRows(X), fit, known, columns
        self.offsets = fit.offsets(X, batch_size, known)
        self.n_cells, self.n_genes = X.shape
        step = max(_ROW_ENTRIES // max(self.n_genes, 1), 1)
        self._slices = [
            slice(at, min(at + step, self.n_cells)) for at in range(0, self.n_cells, step)
        ]
        self.has_counts = np.asarray(X.getnnz(axis=0)) > 0
        self._log_mean = np.log(fit.mean)
        self._coef = np.zeros((self.n_genes, columns.shape[1]))
        for _ in range(n_rounds):
            self._coef += np.clip(self._coefficients(), -_LARGEST_STEP, _LARGEST_STEP)
        self._taken = self._coefficients()

    def _of_rows(self, rows):
        known = self.known.chosen(rows)
        m = self._log_mean + known.log_scale(self.fit.coef) - self.offsets.loc[rows, None]
        m += self.columns[rows] @ self._coef.T
        return scores(self.counts.block(rows).toarray(), np.exp(m, out=m), self.fit.dispersion)

    def _coefficients(self):
        """What the scores say of the coefficients of `columns`, (n_genes, q)."""
        q = self.columns.shape[1]
        information, total = np.zeros((self.n_genes, q * q)), np.zeros((self.n_genes, q))
        for rows in self._slices:
            g, i, _ = self._of_rows(rows)
            x = self.columns[rows]
            weighted = self.known.chosen(rows).weighted(x)
            total += g.T @ weighted
            information += i.T @ (weighted[:, :, None] * x[:, None, :]).reshape(len(x), -1)
        return coefficients(information.reshape(-1, q, q), total)

    def __iter__(self):
        prior = self.fit.capture_prior
        for rows in self._slices:
            g, i, share = self._of_rows(rows)
            g -= i * (self.columns[rows] @ self._taken.T)
            a = np.zeros((len(g), 1))
            if prior is not None:
                # an offset at its bound 0 is not fitted
                is_free = self.offsets.raw_loc[rows, None] > 0
                a = is_free / np.maximum(i.sum(1, keepdims=True), 1e-300)
            yield rows, g, i, share, a


def _is_all(positions, n_genes):
    return np.array_equal(positions, np.arange(n_genes))


def pair_blocks(positions, n_genes):
    """Slices of the rows and columns of a table of pairs; of all pairs, those above the diagonal."""
    step, every = max(_PAIR_ENTRIES // n_genes, 1), _is_all(positions, n_genes)
    for at in range(0, len(positions), step):
        yield slice(at, min(at + step, len(positions))), slice(at if every else 0, n_genes)


def mirrored(table, positions):
    """The table with the values of pairs that stand twice copied from above the diagonal, in place."""
    if _is_all(positions, table.shape[1]):
        for rows, _ in pair_blocks(positions, table.shape[1]):
            square = table[rows, rows]
            square[:] = np.triu(square) + np.triu(square, 1).T
            table[rows.stop :, rows] = table[rows, rows.stop :].T
    else:
        square = table[:, positions]
        table[:, positions] = np.triu(square) + np.triu(square, 1).T
    return table


def pair_moments(rows_of_scores, positions):
    """Score of each pair and its variance and third cumulant under independence, three (n, n_genes) arrays.

    ``positions`` are those of the n genes that are paired with all genes: in order, where these are all.
    """
    shape = len(positions), rows_of_scores.n_genes
    moments = [np.zeros(shape) for _ in range(3)]
    for rows, g, i, share, a in rows_of_scores:
        weight = rows_of_scores.known.chosen(rows).weight
        root = 1.0 if weight is None else np.sqrt(weight)[:, None]
        g *= root
        cubes = root * i * (2.0 - share)
        offsets = root * np.sqrt(a) * i
        i *= root * (1.0 - a * i)
        for factor, total in zip((np.vstack([g, offsets]), i, cubes), moments, strict=True):
            for block, columns in pair_blocks(positions, shape[1]):
                total[block, columns] += factor[:, positions[block]].T @ factor[:, columns]
    return moments

"""The score test of every pair, one pair and one cell at a time."""

import numpy as np
from scipy.stats import pearson3


def pair_test(U, mean, r, log_scale, offset, is_free, columns, weight):
    """Statistic and p-values (two-sided, greater, less) of every pair, four (n_genes, n_genes) arrays.

    ``mean`` are at full capture, ``log_scale`` (n_cells, n_genes) is what covariates and exposures add to
    their logarithms (-inf where a count was not seen), ``is_free`` tells which cells' offsets are fitted.
    """
    n_cells, n_genes = U.shape
    m = mean * np.exp(log_scale - offset[:, None])
    i = m * r / (m + r)
    g = (U - m) * r / (r + m)
    g = np.stack([less_coefficients(g[:, j], i[:, j], columns, weight) for j in range(n_genes)], 1)
    a = np.where(is_free, 1.0 / i.sum(1), 0.0)
    k3 = (r / (r + m)) ** 3 * m * (1 + m / r) * (1 + 2 * m / r)
    out = np.full((4, n_genes, n_genes), np.nan)
    for j in range(n_genes):
        for k in range(n_genes):
            if j == k:
                continue
            T = V = K = 0.0
            for c in range(n_cells):
                T += weight[c] * (g[c, j] * g[c, k] + a[c] * i[c, j] * i[c, k])
                V += weight[c] * np.prod([i[c, s] * (1 - a[c] * i[c, s]) for s in (j, k)])
                K += weight[c] * k3[c, j] * k3[c, k]
            z, law = T / np.sqrt(V), pearson3(K / V**1.5)
            out[:, j, k] = z, law.sf(abs(z)) + law.cdf(-abs(z)), law.sf(z), law.cdf(z)
    return out


def less_coefficients(g, i, columns, weight):
    """Scores of a gene less one Newton step of its coefficients."""
    information = sum(weight[c] * i[c] * np.outer(x, x) for c, x in enumerate(columns))
    of_scores = sum(weight[c] * g[c] * x for c, x in enumerate(columns))
    return g - i * (columns @ np.linalg.solve(information, of_scores))


def benjamini_hochberg(p):
    """q-values by their definition."""
    return np.array([min(q * len(p) / np.sum(p <= q) for q in p[p >= own]) for own in p])

"""Wald tests of the coefficients of covariates: differential expression."""

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, norm


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

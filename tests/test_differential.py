"""The table of Wald tests of coefficients."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import norm

from sknbln._differential import coefficient_table

GENES = ["a", "b", "c", "d"]
COLUMNS = ["gene", "covariate", "coefficient", "standard_error", "statistic", "p_value", "q_value"]


@pytest.fixture
def coef():
    return np.array([[0.5, -1.0], [0.0, 2.0], [-0.3, 0.1], [1.5, 0.7]])


@pytest.fixture
def table(coef):
    return coefficient_table(coef, np.full_like(coef, 0.25), ["batch[B]", "age"], GENES)


def test_rows_gene_by_gene(table, coef):
    assert table.columns.tolist() == COLUMNS
    assert table["gene"].tolist() == [g for g in GENES for _ in range(2)]
    assert table["covariate"].tolist() == ["batch[B]", "age"] * 4
    assert_array_equal(table["coefficient"], coef.ravel())
    assert_array_equal(table["statistic"], coef.ravel() / 0.25)


def test_p_values_are_two_sided_normal(table):
    expected = norm.cdf(-np.abs(table["statistic"])) + norm.sf(np.abs(table["statistic"]))
    assert_allclose(table["p_value"], expected, rtol=1e-12)
    assert table["p_value"][2] == 1  # a coefficient of 0


def test_small_p_values_keep_their_digits():
    table = coefficient_table([[10.0]], [[0.5]], ["x0"], None)
    assert_allclose(table["p_value"], 5.5072482372124e-89, rtol=1e-10)


def test_q_values_are_benjamini_hochberg_per_covariate(table):
    """q of rank i is the least p_j n / j over j >= i, written out."""
    for _, part in table.groupby("covariate"):
        p = part["p_value"].to_numpy()
        expected = [min(q * len(p) / np.count_nonzero(p <= q) for q in p[p >= own]) for own in p]
        assert_allclose(part["q_value"], expected, rtol=1e-12)


def test_genes_without_names_are_numbered(coef):
    table = coefficient_table(coef, np.ones_like(coef), ["u", "v"], None)
    assert_array_equal(table["gene"], np.repeat(np.arange(4), 2))


def test_without_a_standard_error_there_is_no_test(coef):
    error = np.full_like(coef, 0.25)
    error[0, 0], error[1, 0], error[2, 1] = 0, np.nan, np.inf
    coef[3, 1] = np.nan
    table = coefficient_table(coef, error, ["batch[B]", "age"], GENES)
    untested = ~np.isfinite(table["statistic"])
    assert table["gene"][untested].tolist() == ["a", "b", "c", "d"]
    assert table.loc[untested, ["statistic", "p_value", "q_value"]].isna().all(axis=None)
    tested = coefficient_table(coef[2:, :1], error[2:, :1], ["batch[B]"], GENES[2:])
    of_batch = table[~untested & (table["covariate"] == "batch[B]")]
    assert_array_equal(of_batch["q_value"], tested["q_value"])  # of two tests, not four


def test_no_gene_can_be_tested(coef):
    table = coefficient_table(coef, np.zeros_like(coef), ["u", "v"], GENES)
    assert table[["statistic", "p_value", "q_value"]].isna().all(axis=None)


def test_no_covariates():
    table = coefficient_table(np.zeros((4, 0)), np.zeros((4, 0)), (), GENES)
    assert table.columns.tolist() == COLUMNS
    assert len(table) == 0

"""The simulators follow their models and return their truth; the real data are as described."""

import doctest

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy import sparse

from sknbln.datasets import (
    _real,
    _simulate,
    load_immune_cells,
    make_nbln_counts,
    make_nbvcp_counts,
)

MAKERS = [make_nbvcp_counts, make_nbln_counts]


def assert_counts(X, shape):
    assert isinstance(X, sparse.csr_array)
    assert X.shape == shape
    assert X.dtype == np.int32
    assert X.has_sorted_indices
    assert X.has_canonical_format
    assert X.data.min() > 0


# What comes back


def test_nbvcp_bunch():
    b = make_nbvcp_counts(30, 12, random_state=0)
    assert_counts(b.data, (30, 12))
    assert set(b) == {"data", "mean", "dispersion", "capture_offset", "expected_counts"}
    assert b.mean.shape == b.dispersion.shape == b.expected_counts.shape == (12,)
    assert b.capture_offset.shape == (30,)


def test_nbln_bunch():
    b = make_nbln_counts(30, 12, n_factors=3, random_state=0)
    assert_counts(b.data, (30, 12))
    assert b.mean.shape == b.noise_variance.shape == b.dispersion.shape == (12,)
    assert b.loadings.shape == (12, 3)
    assert b.scores.shape == (30, 3)
    assert b.capture_offset.shape == (30,)
    assert b.expected_counts.shape == (12,)
    assert "log_rates" not in b


def test_log_rates_are_those_of_the_same_draw():
    plain = make_nbln_counts(200, 12, random_state=0)
    b = make_nbln_counts(200, 12, return_log_rates=True, random_state=0)
    assert_array_equal(plain.data.toarray(), b.data.toarray())
    noise = b.log_rates - b.mean - b.scores @ b.loadings.T
    # 2400 draws: the standard error of a mean square is sqrt(2 / 2400) = 0.029.
    assert_allclose(np.mean(noise**2 / b.noise_variance), 1.0, atol=4 * 0.029)


def test_no_factors():
    b = make_nbln_counts(30, 12, n_factors=0, random_state=0)
    assert_counts(b.data, (30, 12))
    assert b.loadings.shape == (12, 0)
    assert b.scores.shape == (30, 0)


@pytest.mark.parametrize("n_cells, n_genes", [(1, 1), (1, 5), (5, 1)])
@pytest.mark.parametrize("make", MAKERS)
def test_smallest_sizes(make, n_cells, n_genes):
    kwargs = {"n_factors": 0} if make is make_nbln_counts else {}
    b = make(n_cells, n_genes, mean_range=(50, 60), random_state=0, **kwargs)
    assert_counts(b.data, (n_cells, n_genes))


# The truth has the properties that the docstrings promise


def test_loadings_sum_to_zero_and_differ_in_strength():
    b = make_nbln_counts(2, 400, n_factors=4, random_state=0)
    assert_allclose(b.loadings.sum(axis=0), 0.0, atol=1e-12)
    norms = np.linalg.norm(b.loadings, axis=1)
    # "Close to" uniform on (0.3, 0.8): the centring comes last and moves rows a little.
    assert norms.min() > 0.3 - 0.02 and norms.max() < 0.8 + 0.02
    strengths = np.linalg.norm(b.loadings, axis=0)
    assert (np.diff(strengths) < 0).all()


def test_two_genes_one_factor():
    b = make_nbln_counts(3, 2, n_factors=1, random_state=0)
    assert_allclose(b.loadings[0], -b.loadings[1], atol=1e-15)


@pytest.mark.parametrize("make", MAKERS)
def test_ranges_are_kept(make):
    b = make(300, 500, mean_range=(0.5, 2.0), dispersion=(6.3, 2.0), random_state=0)
    assert b.expected_counts.min() >= 0.5 * (1 - 1e-12)
    assert b.expected_counts.max() <= 2.0 * (1 + 1e-12)
    # At log_sd = 2 many sizes reach both ends of the clip.
    assert_allclose([b.dispersion.min(), b.dispersion.max()], [1.5, 30.0])
    assert b.capture_offset.min() >= 0


def test_noise_variance_range():
    b = make_nbln_counts(3, 500, noise_variance=(0.1, 0.4), random_state=0)
    assert 0.1 <= b.noise_variance.min() < 0.11
    assert 0.39 < b.noise_variance.max() <= 0.4


@pytest.mark.parametrize("make", MAKERS)
def test_capture_offsets_without_spread(make):
    assert_array_equal(make(5, 6, capture_sd=0, random_state=0).capture_offset, 3.0)
    no_capture = make(5, 6, capture_mean=0, capture_sd=0, random_state=0)
    assert_array_equal(no_capture.capture_offset, 0.0)


def test_truncated_capture_keeps_the_expected_counts():
    # Half the mass of N(0, 1) is cut off here; the mean capture probability is then 0.523.
    eta = make_nbvcp_counts(20_000, 1, capture_mean=0, capture_sd=1, random_state=0).capture_offset
    assert eta.min() >= 0
    p = np.exp(-eta)
    assert_allclose(
        np.exp(_simulate._log_mean_capture(0.0, 1.0)), p.mean(), atol=4 * p.std() / 20_000**0.5
    )


def test_depth_scales_the_counts_and_nothing_else():
    deep = make_nbln_counts(300, 40, random_state=0)
    shallow = make_nbln_counts(300, 40, depth=0.1, random_state=0)
    assert_array_equal(deep.mean, shallow.mean)
    assert_array_equal(deep.loadings, shallow.loadings)
    assert_allclose(shallow.capture_offset, deep.capture_offset + np.log(10))
    assert_allclose(shallow.expected_counts, 0.1 * deep.expected_counts)


@pytest.mark.parametrize("make", MAKERS)
def test_offset_multiplies_the_rates_and_nothing_else(make):
    """Half of the rows have e times the counts of gene 0, and an e-th of those of gene 1."""
    effect = np.zeros((4000, 6))
    effect[::2, :2] = [1.0, -1.0]
    settings = {"mean_range": (2.0, 5.0), "capture_sd": 0.0, "random_state": 0}
    plain, changed = make(4000, 6, **settings), make(4000, 6, offset=effect, **settings)
    for name in set(plain) - {"data"}:
        assert_array_equal(plain[name], changed[name])
    X = changed.data.toarray()
    expected = changed.expected_counts * np.exp(effect[:2])
    for rows, mean in zip((X[::2], X[1::2]), expected, strict=True):
        assert (np.abs(rows.mean(axis=0) - mean) < 5 * standard_error(rows)).all()


@pytest.mark.parametrize("make", MAKERS)
def test_offset_of_rows(make):
    offset = np.log(np.linspace(1, 5, 30))
    by_row = make(30, 8, offset=offset, random_state=0)
    by_count = make(30, 8, offset=np.repeat(offset[:, None], 8, 1).tolist(), random_state=0)
    assert_array_equal(by_row.data.toarray(), by_count.data.toarray())
    assert by_row.data.sum() > 1.5 * make(30, 8, random_state=0).data.sum()


# Moments


def standard_error(values):
    return values.std(axis=0) / len(values) ** 0.5


def assert_moments(X, mean, variance):
    """Compare column means and variances with their expectations, at 5 standard errors."""
    assert (np.abs(X.mean(axis=0) - mean) < 5 * standard_error(X)).all()
    squares = (X - mean) ** 2
    assert (np.abs(squares.mean(axis=0) - variance) < 5 * standard_error(squares)).all()


def test_nbvcp_moments():
    b = make_nbvcp_counts(
        40_000, 8, mean_range=(0.3, 10), capture_mean=0, capture_sd=0, random_state=1
    )
    m = b.mean
    assert_allclose(m, b.expected_counts)
    assert_moments(b.data.toarray(), m, m + m**2 / b.dispersion)


@pytest.mark.parametrize("n_factors", [0, 2])
def test_nbln_moments(n_factors):
    b = make_nbln_counts(
        40_000,
        8,
        n_factors=n_factors,
        mean_range=(0.3, 10),
        capture_mean=0,
        capture_sd=0,
        random_state=2,
    )
    X = b.data.toarray()
    S = b.loadings @ b.loadings.T + np.diag(b.noise_variance)
    s = np.diag(S)
    m = np.exp(b.mean + s / 2)
    assert_allclose(m, b.expected_counts)
    poisson_log_normal = m + m**2 * (np.exp(s) - 1)
    variance = poisson_log_normal + np.exp(2 * b.mean + 2 * s) / b.dispersion
    assert_moments(X, m, variance)
    # m^2 / r, its value at Sigma_gg = 0, is not the extra term: the data tell the two apart.
    squares = (X - m) ** 2
    wrong = poisson_log_normal + m**2 / b.dispersion
    z = (squares.mean(axis=0) - wrong) / standard_error(squares)
    assert z.sum() / len(z) ** 0.5 > 5

    covariance = np.outer(m, m) * np.expm1(S)
    for g, h in [(0, 1), (2, 5), (3, 7)]:
        products = (X[:, g] - m[g]) * (X[:, h] - m[h])
        assert abs(products.mean() - covariance[g, h]) < 5 * standard_error(products)


def test_infinite_dispersion_gives_poisson():
    b = make_nbvcp_counts(
        20_000, 5, dispersion=(np.inf, 0.0), capture_mean=0, capture_sd=0, random_state=0
    )
    assert np.isinf(b.dispersion).all()
    assert_moments(b.data.toarray(), b.mean, b.mean)


@pytest.mark.parametrize("make", MAKERS)
def test_expected_counts_with_capture(make):
    b = make(20_000, 10, random_state=3)
    X = b.data.toarray()
    assert (np.abs(X.mean(axis=0) - b.expected_counts) < 5 * standard_error(X)).all()


# Randomness and chunks


@pytest.mark.parametrize("make", MAKERS)
def test_same_seed_same_counts(make):
    a, b, c = (make(50, 10, random_state=seed) for seed in (0, 0, 1))
    for key in a:
        left, right = (x[key].toarray() if key == "data" else x[key] for x in (a, b))
        assert_array_equal(left, right)
    assert (a.data != c.data).nnz > 0


@pytest.mark.parametrize("make", MAKERS)
def test_global_random_state_is_left_alone(make):
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    make(20, 5, random_state=0)
    assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


@pytest.mark.parametrize("make", MAKERS)
def test_random_state_instance_moves_on(make):
    rng = np.random.RandomState(0)
    first, second = make(20, 5, random_state=rng), make(20, 5, random_state=rng)
    assert (first.data != second.data).nnz > 0
    assert_array_equal(first.mean, make(20, 5, random_state=0).mean)


@pytest.mark.parametrize("make", MAKERS)
def test_many_chunks(make, monkeypatch):
    monkeypatch.setattr(_simulate, "_CHUNK_ENTRIES", 7 * 10)
    b = make(5000, 10, mean_range=(1, 5), random_state=0)
    assert_counts(b.data, (5000, 10))
    X = b.data.toarray()
    assert (np.abs(X.mean(axis=0) - b.expected_counts) < 5 * standard_error(X)).all()


# Arguments


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"n_cells": 0}, "n_cells"),
        ({"n_genes": 2.5}, "n_genes"),
        ({"capture_sd": -1.0}, "capture_sd"),
        ({"capture_mean": -1.0}, "capture_mean"),
        ({"mean_range": (0.0, 1.0)}, r"mean_range must be two numbers \(low, high\), 0 < low"),
        ({"mean_range": (2.0, 1.0)}, "mean_range"),
        ({"mean_range": (1.0, 2.0, 3.0)}, "mean_range"),
        ({"mean_range": 3.0}, "mean_range"),
        ({"dispersion": (-1.0, 0.5)}, "dispersion must be two numbers"),
        ({"dispersion": (6.3, "a")}, "dispersion must be two numbers"),
        ({"mean_range": (1e12, 1e13)}, "too large for int32"),
        ({"offset": np.zeros(10)}, r"offset must be finite, of shape \(20,\) or \(20, 10\), got"),
        ({"offset": [np.inf] * 20}, r"got shape \(20,\) with 20 values that are not finite"),
    ],
)
@pytest.mark.parametrize("make", MAKERS)
def test_bad_arguments(make, kwargs, match):
    with pytest.raises(ValueError, match=match):
        make(**{"n_cells": 20, "n_genes": 10, "random_state": 0, **kwargs})


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"n_factors": -1}, "n_factors"),
        ({"n_factors": 10}, "n_factors=10 must be below n_genes=10"),
        ({"loading_norms": (-0.1, 0.5)}, "loading_norms"),
        ({"noise_variance": (0.1, np.inf)}, "noise_variance"),
        ({"depth": 0.0}, "depth"),
        ({"depth": 100.0}, "every molecule is captured"),
    ],
)
def test_bad_nbln_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match):
        make_nbln_counts(20, 10, random_state=0, **kwargs)


# Real data


def test_immune_cells():
    b = load_immune_cells()
    assert_counts(b.data, (600, 300))
    assert b.target.shape == (600,)
    assert b.target.dtype.kind == "U"
    assert list(b.target_names) == ["Macrophages", "T_cells_CD4+", "T_cells_CD8+"]
    assert_array_equal(np.unique(b.target), b.target_names)
    assert_array_equal(np.unique(b.target, return_counts=True)[1], [153, 212, 235])
    assert b.feature_names.shape == (300,)
    assert len(set(b.feature_names)) == 300
    assert (b.library_size >= b.data.sum(axis=1)).all()
    assert b.frame is None
    assert "MIT" in b.DESCR and "pyPLNmodels 1.0.10" in b.DESCR


def test_immune_cells_labels_belong_to_the_rows():
    # Markers that no shift of the rows or of the gene names would reproduce.
    b = load_immune_cells(as_frame=True)
    by_type = b.data.groupby(b.target).mean()
    assert by_type["CD74"].idxmax() == "Macrophages"
    assert by_type["APOE"].idxmax() == "Macrophages"
    assert by_type["CCL5"].idxmax() == "T_cells_CD8+"


def test_immune_cells_return_X_y():
    X, y = load_immune_cells(return_X_y=True)
    b = load_immune_cells()
    assert (X != b.data).nnz == 0
    assert_array_equal(y, b.target)


def test_immune_cells_as_frame():
    b = load_immune_cells(as_frame=True)
    assert isinstance(b.data, pd.DataFrame)
    assert isinstance(b.target, pd.Series)
    assert list(b.data.columns) == list(b.feature_names)
    assert_array_equal(b.data.to_numpy(), load_immune_cells().data.toarray())
    assert b.frame.shape == (600, 301)
    assert b.frame.columns[-1] == "cell_type"
    X, y = load_immune_cells(return_X_y=True, as_frame=True)
    pd.testing.assert_frame_equal(X, b.data)
    pd.testing.assert_series_equal(y, b.target)


@pytest.mark.parametrize("module", [_real, _simulate])
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0

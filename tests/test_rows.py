"""Batches: what is in them, padding, sums; that nothing depends on them; shapes that are compiled."""

import re

import jax
import numpy as np
import pytest
import scipy.sparse as sp
from numpy.testing import assert_allclose, assert_array_equal

from sknbln import _rows as rows_module
from sknbln._blocks import Rows
from sknbln._known import Known
from sknbln._passes import Sweeper, gene_score_products, solve_rows, sum_over_batches
from sknbln._rows import FEW_ENTRIES, MANY_GENES, RowBatches, pad_columns, padded_rank
from sknbln.solver.channel import log_rising_derivatives
from sknbln.solver.marginal import solve_cells
from sknbln.solver.mode import DECREMENT_TOL
from sknbln.solver.start import information_sums

from .reference import small
from .reference.csr import csr
from .reference.small import rows

K = small.K_ROWS


# ------------------------------------------------------------------ batches


@pytest.mark.parametrize("batch_size", [1, 2, 7, 8, 19, 20, 21, 1000, None])
def test_batches_cover_all_rows_once(batch_size):
    X, offset, scale, precision, _ = rows()
    precision = np.where(np.arange(20) % 2, 1.0, 0.0)
    batches = RowBatches(X, offset, scale, precision, batch_size=batch_size)
    seen = []
    for where, cells in batches:
        n = where.stop - where.start
        seen.extend(range(where.start, where.stop))
        for a in cells:
            assert a.shape[0] == batches.rows
            assert a.dtype == np.float64
        assert_array_equal(cells.counts[:n], X[where].toarray())
        assert_array_equal(cells.counts[n:], 0.0)
        assert_array_equal(cells.offset[:n], offset[where])
        assert_array_equal(cells.scale[:n], scale[where])
        assert_array_equal(cells.precision[:n], precision[where])
        assert_array_equal(cells.precision[n:], 1.0)
        assert_array_equal(cells.weight, np.arange(batches.rows) < n)
    assert seen == list(range(20))


class DenseRows(Rows):
    """Rows that come from elsewhere: a dense array."""

    def __init__(self, X):
        self.whole, self.shape = X, X.shape

    def slices(self):
        return [slice(0, 7), slice(7, self.shape[0])]

    def block(self, rows):
        return csr(self.whole[rows])

    def chosen(self, positions):
        return DenseRows(self.whole[positions])


def test_rows_may_come_from_elsewhere():
    X, offset, scale, precision, params = rows()
    elsewhere = DenseRows(X.toarray())
    for batch_size in (None, 9):
        here, there = (
            RowBatches(source, offset, scale, precision, batch_size=batch_size)
            for source in (X, elsewhere)
        )
        for a, b in zip(solve_rows(here, params), solve_rows(there, params), strict=True):
            assert_array_equal(a, b)
        chosen = np.array([7, 3, 12])
        for (_, a), (_, b) in zip(
            here.without_capture(chosen), there.without_capture(chosen), strict=True
        ):
            assert_array_equal(a.counts, b.counts)
            assert_array_equal(a.counts[:3], X[chosen].toarray())


def test_batches_are_padded_to_few_shapes():
    sizes = {
        RowBatches(csr(np.ones((n, 3))), np.zeros(n), np.zeros(n)).rows for n in range(1, 2000, 7)
    }
    assert all(size % 8 == 0 for size in sizes)
    assert all(size % 64 == 0 for size in sizes if size > 64)
    assert RowBatches(csr(np.ones((1, 3))), np.zeros(1), np.zeros(1)).rows == 8


@pytest.mark.parametrize("n_genes", [1, 100, 3000, 50_000])
def test_automatic_batches_have_rows_by_the_genes_alone(n_genes):
    """Matrices of more rows than one batch share a compiled kernel, of about 2**17 counts."""
    found = set()
    for n in (140_000, 200_001):
        X = sp.csr_matrix((n, n_genes))
        found.add(RowBatches(X, np.zeros(n), np.zeros(n)).rows)
    (size,) = found
    assert size >= 32 and size % 8 == 0
    assert size == 32 or size * n_genes <= 2**17 + 64 * n_genes


def test_automatic_batches_are_bounded_in_memory():
    X = csr(np.ones((3000, 1)))
    X.resize(3000, 20_000)
    batches = RowBatches(X, np.zeros(3000), np.zeros(3000))
    assert batches.rows * 20_000 <= 2 * 2**20
    assert len(batches.starts) > 1


def test_padded_rank_and_columns(monkeypatch):
    assert [padded_rank(k, FEW_ENTRIES, 1) for k in (0, 1, 4, 5, 8)] == [0, 4, 4, 8, 8]
    assert [padded_rank(k, 1000, MANY_GENES) for k in (0, 1, 10)] == [0, 4, 12]
    assert [padded_rank(k, 1000, MANY_GENES + 1) for k in (0, 1, 10)] == [0, 1, 10]
    assert [padded_rank(k, 1, MANY_GENES + 1) for k in (0, 1, 10)] == [8, 8, 16]
    assert [padded_rank(k, FEW_ENTRIES - 1, 1) for k in (0, 1, 8, 9)] == [8, 8, 8, 16]
    monkeypatch.setattr(rows_module, "on_cpu", lambda: False)
    assert [padded_rank(k, FEW_ENTRIES, 1) for k in (0, 1, 16, 17)] == [16, 16, 16, 32]
    a = np.arange(6.0).reshape(3, 2)
    assert_array_equal(pad_columns(a, 4), np.column_stack([a, np.zeros((3, 2))]))
    assert_array_equal(pad_columns(a, 2), a)


def test_a_sample_of_rows_and_all_rows_share_a_shape_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(rows_module, "on_cpu", lambda: False)
    for n_genes in (1, 500, 2_000, 20_000):
        zero = np.zeros(100_000)
        whole = RowBatches(sp.csr_matrix((100_000, n_genes)), zero, zero)
        some = RowBatches(sp.csr_matrix((20_000, n_genes)), zero[:20_000], zero[:20_000])
        assert some.rows == whole.rows and whole.rows * n_genes <= 2**24 + 64 * n_genes


def test_counts_stay_on_an_accelerator(monkeypatch):
    """On a CPU that passes for one: the same sums, and rows are read in the first pass alone."""
    X, *capture, params = rows()
    expected = Sweeper(RowBatches(X, *capture, batch_size=8), K)
    products = gene_score_products(expected.batches, params, expected.scores, True)
    first, second = (expected(params) for _ in range(2))
    monkeypatch.setattr(rows_module, "on_cpu", lambda: False)
    elsewhere, read = DenseRows(X.toarray()), []
    batches = RowBatches(elsewhere, *capture, batch_size=8)
    monkeypatch.setattr(
        elsewhere, "block", lambda rows: read.append(rows) or csr(elsewhere.whole[rows])
    )
    sweeper = Sweeper(batches, K)
    for a, b in zip(
        gene_score_products(batches, params, sweeper.scores, True), products, strict=True
    ):
        assert_sums_close(a, b)
    assert_sums_close(sweeper(params), first)
    assert_sums_close(sweeper(params), second)
    other = RowBatches(elsewhere, *capture, batch_size=8)  # of another stage of a fit
    assert_sums_close(Sweeper(other, K)(params), first)
    assert sorted(rows.start for rows in read) == [rows.start for rows in batches.slices()]
    some = np.array([3, 4])
    assert_array_equal(
        batches.without_capture(some).cells(slice(0, 2)).counts[:2], X[some].toarray()
    )
    monkeypatch.setattr(rows_module, "_MOST_ENTRIES_OF_ACCELERATOR", 1)
    assert isinstance(RowBatches(X, *capture).cells(slice(0, 20)).counts, np.ndarray)


# ------------------------------------------------------------------ sums


def sweep(X, offset, scale, precision, params, batch_size):
    sweeper = Sweeper(RowBatches(X, offset, scale, precision, batch_size=batch_size), K)
    return sweeper, sweeper(params)


def assert_sums_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # of the size of the largest entry: sums cancel
        assert_allclose(a, b, rtol=1e-9, atol=1e-9 * np.max(np.abs(b), initial=1.0))


@pytest.mark.parametrize("batch_size", [1, 9, 19])
def test_sums_do_not_depend_on_the_batches(batch_size):
    problem = rows()
    whole, expected = sweep(*problem, None)
    sweeper, found = sweep(*problem, batch_size)
    assert_sums_close(found, expected)
    assert_allclose(sweeper.scores, whole.scores, rtol=1e-9, atol=1e-9)


def test_sums_are_those_of_the_kernel_without_padding():
    """Latent dimension 3, padded to 4, and 20 rows, padded to 24, against one exact batch."""
    X, offset, scale, precision, params = rows(small.N_CELLS)
    found = sweep(X, offset, scale, precision, params, None)[1]
    cells = small.problem(60)[0]
    with jax.enable_x64(True):
        _, results, expected = solve_cells(cells, params, small.zeros(cells, params))
    assert found.genes.moments.shape == (small.N_GENES, 1 + K + K * (K + 1) // 2)
    assert found.genes.gradient_loadings.shape == (small.N_GENES, K)
    assert_sums_close(found, expected)
    assert results.zeta.shape == (small.N_CELLS, K + 1)


def test_padded_columns_of_the_scores_stay_zero():
    sweeper, _ = sweep(*rows(), None)
    assert sweeper.scores.shape == (20, padded_rank(K, 1, 1) + 1)
    assert_array_equal(sweeper.scores[:, K:-1], 0.0)


def test_sweeps_start_where_the_last_one_ended():
    X, offset, scale, precision, params = rows()
    sweeper, first = sweep(X, offset, scale, precision, params, None)
    start = sweeper.scores.copy()
    again = sweeper(params)
    assert_sums_close(again, first)
    assert_allclose(sweeper.scores, start, rtol=1e-9, atol=1e-9)


def test_a_sweep_that_fails_does_not_spoil_the_next():
    """A trial of the ascent may overflow; what comes after it starts from finite scores."""
    X, offset, scale, precision, params = rows()
    sweeper, first = sweep(X, offset, scale, precision, params, None)
    assert np.isnan(sweeper(params._replace(mean=np.full(small.N_GENES, np.nan))).log_marginal)
    again = sweeper(params)
    assert_sums_close(again, first)


def test_rows_are_those_of_the_kernel():
    X, offset, scale, precision, params = rows()
    found = solve_rows(RowBatches(X, offset, scale, precision, batch_size=9), params)
    cells = small.problem(60)[0]
    with jax.enable_x64(True):
        one = jax.tree.map(np.asarray, small.solved(cells, params)[1])
    s = cells.scale
    expected = dict(
        log_marginal=one.log_marginal,
        scores=one.zeta[:, :K],
        score_covariance=one.covariance[:, :K, :K],
        offset=cells.offset - s * one.zeta[:, K],
        offset_variance=s**2 * one.covariance[:, K, K],
        score_offset_covariance=-s[:, None] * one.covariance[:, :K, K],
        offset_slope=one.offset_slope,
        offset_pull=one.offset_pull,
        offset_curvature=one.offset_curvature,
        converged=np.ones(small.N_CELLS, bool),
    )
    # below its tolerance, and otherwise rounding
    assert found.decrement.shape == (20,)
    assert np.all(found.decrement <= DECREMENT_TOL)
    assert set(found._fields) == {*expected, "decrement"}
    for name, value in expected.items():
        assert getattr(found, name).shape == (20, *value.shape[1:])
        assert_allclose(
            getattr(found, name)[: small.N_CELLS], value, err_msg=name, rtol=1e-8, atol=1e-8
        )


def test_rows_do_not_depend_on_the_batches():
    X, offset, scale, precision, params = rows()
    expected = solve_rows(RowBatches(X, offset, scale, precision), params)
    for batch_size in (1, 9):
        found = solve_rows(RowBatches(X, offset, scale, precision, batch_size=batch_size), params)
        for name, a, b in zip(found._fields, found, expected, strict=True):
            assert_allclose(a, b, err_msg=name, rtol=1e-9, atol=1e-9)


def test_rows_do_not_depend_on_the_start():
    """The scores of a sweep, of other globals too, in batches of other rows."""
    X, offset, scale, precision, params = rows()
    expected = solve_rows(RowBatches(X, offset, scale, precision), params)
    sweeper, _ = sweep(X, offset, scale, precision, params._replace(mean=params.mean + 0.5), 9)
    assert np.abs(sweeper.scores).max() > 0.5
    batches = RowBatches(X, offset, scale, precision, batch_size=7)
    found = solve_rows(batches, params, sweeper.scores)
    for name, a, b in zip(found._fields, found, expected, strict=True):
        if name != "decrement":
            assert_allclose(a, b, err_msg=name, rtol=1e-8, atol=1e-8)


def test_sum_over_batches_is_the_loop():
    X, offset, scale, _, params = rows()
    summed = sum_over_batches(RowBatches(X, offset, scale, batch_size=8), params)
    total = summed(information_sums)
    m = np.exp(params.mean - offset[:, None])
    information = m / (1 + params.dispersion * m)
    assert_allclose(total, information.sum(0), rtol=1e-12)


@pytest.mark.usefixtures("strict_jax")
@pytest.mark.parametrize("free_dispersion", [True, False])
def test_score_products_are_sums_over_cells_of_their_gradients(free_dispersion):
    """Every cell's own gradient in (mu, b, w, log d, log r), by a batch of one real row and padding.

    The constants' part of log r is left out where log r is not free.
    """
    X, offset, scale, precision, params = rows(small.N_CELLS)
    rng = np.random.default_rng(5)
    params = params._replace(coef=0.3 * rng.standard_normal((small.N_GENES, 2)))
    known = Known(rng.standard_normal((small.N_CELLS, 2)), rng.standard_normal((small.N_CELLS, 1)))
    r, size = 1 / params.dispersion, K + 5
    products = np.zeros((small.N_GENES, size, size))
    information = np.zeros(small.N_GENES)
    for c in range(small.N_CELLS):
        one = slice(c, c + 1)
        row = RowBatches(X[one], offset[one], scale[one], precision[one], known=known.chosen(one))
        sums = Sweeper(row, K)(params).genes
        constant = free_dispersion * log_rising_derivatives(X[one].toarray()[0], r)[0]
        score = np.column_stack(
            [
                sums.gradient_mean,
                sums.gradient_coef,
                sums.gradient_loadings,
                params.noise * sums.gradient_noise,
                sums.gradient_log_r + constant,
            ]
        )
        products += np.einsum("ga,gb->gab", score, score)
        information += sums.moments[:, 0]
    sweeper = Sweeper(RowBatches(X, offset, scale, precision, known=known), K)
    sweeper(params)
    for start in (sweeper.scores, 0 * sweeper.scores):
        for batch_size in (None, 3):
            batches = RowBatches(X, offset, scale, precision, batch_size=batch_size, known=known)
            found, b, solved = gene_score_products(batches, params, start, free_dispersion)
            for name, value in solve_rows(batches, params)._asdict().items():
                assert_allclose(getattr(solved, name), value, rtol=1e-8, atol=1e-8, err_msg=name)
            assert found.shape == (small.N_GENES, size, size)
            assert_allclose(found, products, rtol=1e-8, atol=1e-8)
            assert_allclose(b, information, rtol=1e-9)


def test_score_products_of_poisson_counts_are_finite():
    X, offset, scale, precision, params = rows(small.N_CELLS)
    params = params._replace(dispersion=np.zeros(small.N_GENES))
    start = np.zeros((small.N_CELLS, padded_rank(K, 1, 1) + 1))
    batches = RowBatches(X, offset, scale, precision)
    products, *_ = gene_score_products(batches, params, start, False)
    assert np.all(np.isfinite(products))
    assert_allclose(products[:, -1], 0.0, atol=1e-12 * np.abs(products).max())


def test_sums_do_not_depend_on_the_number_of_threads(monkeypatch):
    sums = []
    for workers in (1, 2, 3):
        monkeypatch.setattr(rows_module, "n_workers", lambda workers=workers: workers)
        sums.append(jax.tree.leaves(sweep(*rows(), 4)[1]))
    for other in sums[1:]:
        for a, b in zip(sums[0], other, strict=True):
            assert_array_equal(a, b)


# ------------------------------------------------------------------ compilations


def compilations(caplog):
    """Names of the kernels that were compiled since the last time this was asked."""
    pattern = re.compile(r"Finished XLA compilation of (?:jit\()?(solve_cells)\b")
    found = [m[1] for r in caplog.records if (m := pattern.search(r.getMessage()))]
    caplog.clear()
    return sorted(found)


def test_numbers_and_rows_of_one_bucket_share_a_compilation(caplog):
    def run(n, seed, k, batch_size=None, genes=small.N_GENES):
        X, offset, scale, precision, params = rows(n, seed)
        params = type(params)(*(a[:genes] for a in params))
        params = params._replace(loadings=params.loadings[:, :k])
        batches = RowBatches(X[:, :genes], offset, scale, precision, batch_size=batch_size)
        solve_rows(batches, params)
        Sweeper(batches, k)(params)

    run(20, 60, 3)
    with jax.log_compiles():
        run(20, 61, 3)  # other numbers
        run(17, 60, 3)  # other rows, of the same bucket of 24
        run(24, 62, 1)  # another latent dimension of the bucket of 4
        run(47, 60, 2, batch_size=24)
        assert compilations(caplog) == []
        run(20, 60, 3, genes=11)  # a shape of its own: the count does count
        assert compilations(caplog) == ["solve_cells"]

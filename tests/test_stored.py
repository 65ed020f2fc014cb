"""Counts that are not in memory: read block by block, the same numbers, the same messages."""

import re

import numpy as np
import pytest
import scipy.sparse as sp
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone

from sknbln import NBLNEstimator, NBVCPEstimator, _blocks, _dask, _stored, _svi
from sknbln import _counts as counts_module
from sknbln._blocks import CSRRows
from sknbln._counts import CountHistogram, validate_counts, validated_rows
from sknbln.datasets import make_nbln_counts

#: a shape whose kernels other tests compile too
N, G = 150, 24
BLOCK = 40  # rows


class Slices:
    """Rows of a matrix that gives slices of rows and nothing else; it counts the rows that are read."""

    def __init__(self, X):
        self._X, self.shape, self.dtype, self.largest, self.read = X, X.shape, X.dtype, 0, 0

    def __getitem__(self, rows):
        assert isinstance(rows, slice)
        part = self._X[rows]
        self.largest, self.read = max(self.largest, part.shape[0]), self.read + part.shape[0]
        return part


def in_hdf5(X, path, **options):
    h5py = pytest.importorskip("h5py")
    return h5py.File(path / "X.h5", "w").create_dataset("X", data=X, **options)


def in_zarr(X, path):
    zarr = pytest.importorskip("zarr")
    stored = zarr.open(path / "X.zarr", mode="w", shape=X.shape, dtype=X.dtype, chunks=(16, 5))
    stored[:] = X
    return stored


def backed(X, path):
    ad = pytest.importorskip("anndata")
    ad.AnnData(sp.csr_matrix(X.astype(np.float32))).write_h5ad(path / "X.h5ad")
    return ad.read_h5ad(path / "X.h5ad", backed="r").X


def lazily_read(X, path):
    """As `anndata.experimental.read_lazy` gives X."""
    ad, h5py = pytest.importorskip("anndata"), pytest.importorskip("h5py")
    pytest.importorskip("dask")
    ad.AnnData(sp.csr_matrix(X)).write_h5ad(path / "lazy.h5ad")
    return ad.experimental.read_elem_lazy(h5py.File(path / "lazy.h5ad")["X"], chunks=(33, G))


def in_dask(X, chunks=((30, 20, 70, 0, 30), G)):
    return pytest.importorskip("dask.array").from_array(np.asarray(X), chunks=chunks)


STORES = {
    "slices of a dense matrix": lambda X, _: Slices(X),
    "slices of CSR": lambda X, _: Slices(sp.csr_array(X)),
    "contiguous HDF5 of int16": lambda X, path: in_hdf5(X.astype("i2"), path),
    "chunks of HDF5, half precision": lambda X, path: in_hdf5(X, path, dtype="f2", chunks=(7, 5)),
    "zarr": in_zarr,
    "backed AnnData": backed,
    "lazy AnnData": lazily_read,
    "Dask": lambda X, _: in_dask(X),
    "Dask of CSR chunks": lambda X, _: in_dask(X).map_blocks(sp.csr_matrix),
    "Dask of sparse arrays": lambda X, _: in_dask(X.astype("u1")).map_blocks(sp.csr_array),
    "unsorted CSR with duplicates": lambda X, _: Slices(with_duplicates(X)),
}


def with_duplicates(X):
    """CSR that is not canonical: each count in two parts, and some explicit zeros."""
    column, half = np.arange(G)[None, :].repeat(len(X), 0), X // 2
    indices = np.concatenate([column[:, ::-1], column], 1)
    data = np.concatenate([half[:, ::-1], X - half], 1)
    return sp.csr_matrix(
        (data.ravel(), indices.ravel(), np.arange(0, data.size + 1, 2 * G)), X.shape
    )


@pytest.fixture(scope="module")
def counts():
    X = make_nbln_counts(N, G, n_factors=2, random_state=3).data.toarray()
    X[4] = 0
    return X


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for module in (_dask, _stored):
        monkeypatch.setattr(module, "BLOCK_ENTRIES", BLOCK * G)


def rows_of(X, **options):
    return validated_rows(NBVCPEstimator(), X, reset=True, missing=True, **options)


# ------------------------------------------------------------------ rows


@pytest.mark.parametrize("store", STORES.values(), ids=STORES)
def test_stored_rows_are_those_in_memory(counts, store, tmp_path):
    expected = validate_counts(NBVCPEstimator(), counts, reset=True)
    rows, mask = rows_of(store(counts, tmp_path))
    assert rows.shape == counts.shape and mask is None
    assert len(rows.slices()) > 2
    assert_array_equal(rows.totals, counts.sum(1))
    parts = [slice(0, N), slice(3, 3), slice(35, 41), slice(39, 40), slice(120, N)]
    for part in parts:
        block = rows.block(part)
        assert block.dtype == np.float64 and block.has_canonical_format
        assert_array_equal(block.toarray(), counts[part])
    X = rows.in_memory().X
    for name in ("data", "indices", "indptr"):
        assert_array_equal(getattr(X, name), getattr(expected, name))
    for positions in (np.array([149, 0, 70, 41, 70]), np.arange(5, 140, 3), np.array([], int)):
        chosen = rows.chosen(positions)
        assert_array_equal(chosen.in_memory().X.toarray(), counts[positions])
        if positions.size:
            some = np.arange(positions.size)[::-2]
            assert_array_equal(
                chosen.chosen(some).block(slice(0, some.size)).toarray(), counts[positions[some]]
            )
            assert_array_equal(np.concatenate([b.toarray() for _, b in chosen]), counts[positions])


def test_blocks_are_read_once_and_never_all(counts):
    X = Slices(counts)
    rows, _ = rows_of(X)
    assert X.largest <= BLOCK
    X.read = 0
    for start in range(0, N, 7):
        rows.block(slice(start, min(start + 7, N)))
    assert X.read == N
    X.read = 0
    rows.chosen(np.array([41, 3, 45, 2])).in_memory()
    assert X.read <= 2 * BLOCK


def test_blocks_are_whole_chunks(counts, tmp_path):
    assert rows_of(in_hdf5(counts, tmp_path, chunks=(7, G)))[0].slices()[0] == slice(0, 35)
    assert [s.stop for s in rows_of(in_dask(counts))[0].slices()] == [30, 50, 120, 150]


@pytest.mark.parametrize("weight", [None, np.linspace(0.5, 2, N)], ids=["", "weights"])
def test_distinct_counts_of_blocks_are_those_of_all(counts, weight, monkeypatch):
    whole = CountHistogram(sp.csr_matrix(counts.astype(float)), weight)
    others = [sp.csr_matrix(counts.astype(kind)) for kind in ("i4", "u2", "f4")]
    for rows in (rows_of(Slices(counts))[0], *others):
        assert_same_distinct(CountHistogram(rows, weight), whole)
    monkeypatch.setattr(counts_module, "_COUNTED_KEYS", 1)
    monkeypatch.setattr(counts_module, "_SORTED_AT_ONCE", 50)
    for rows in others:  # many possible keys are sorted, in parts
        X = rows.tolil()
        X[0, 0] = 60_000
        expected = CountHistogram(X.tocsr().astype(float), weight)
        assert_same_distinct(CountHistogram(X.tocsr(), weight), expected)
        dense = [np.unique(column[column > 0]).size for column in X.toarray().T]
        assert_array_equal(np.bincount(expected.gene, minlength=G), dense)


@pytest.mark.parametrize("weight", [None, np.linspace(0.5, 2, N)], ids=["", "weights"])
def test_distinct_counts_of_any_type_are_floats(counts, weight):
    """Fractions, and whole numbers that are too large for a table."""
    for X in (counts.astype("f4") * 1.25, counts.astype("i8") * 2**30):
        expected = CountHistogram(sp.csr_matrix(X.astype(float)), weight)
        assert_same_distinct(CountHistogram(sp.csr_matrix(X), weight), expected)


def assert_same_distinct(found, whole):
    assert_array_equal(found.gene, whole.gene)
    assert_array_equal(found.count, whole.count)
    assert found.count.dtype == float
    assert_allclose(found.times, whole.times, rtol=1e-13)
    assert found.n_cells == whole.n_cells


@pytest.mark.parametrize("kind", ["i4", "u1", "f4"])
def test_counts_in_memory_keep_their_type(counts, kind):
    X = sp.csr_matrix(counts.astype(kind))
    rows, _ = rows_of(X)
    assert rows.X.dtype == kind and np.shares_memory(rows.X.data, X.data)
    assert rows.block(slice(0, 3)).dtype == np.float64


def test_counts_in_memory_are_converted_block_by_block(counts, monkeypatch):
    monkeypatch.setattr("sknbln._blocks._CONVERTED_AT_ONCE", 100)
    X = sp.csr_matrix(counts)
    rows = CSRRows(X)
    assert max(X[part].nnz for part in rows.slices()) < 100 + G
    assert_array_equal(np.concatenate([b.toarray() for _, b in rows]), counts)


@pytest.mark.parametrize("at_once", [1, 10_000], ids="{} rows at once".format)
def test_minibatches_are_those_of_counts_in_memory(at_once, monkeypatch):
    monkeypatch.setattr(_blocks, "_CHOSEN_ENTRIES", at_once * 2)
    monkeypatch.setattr(_stored, "BLOCK_ENTRIES", 100 * 2)
    X = sp.csr_matrix(np.arange(1.0, 901)[:, None] * [1, 2])
    stored = Slices(X)
    expected, found = (
        _svi._minibatches(rows, np.random.RandomState(0)) for rows in (X, rows_of(stored)[0])
    )
    stored.read = 0
    for _ in range(7):  # three in an epoch
        for a, b in zip(next(found), next(expected), strict=True):
            assert_array_equal(a, b)
    assert (stored.read > 3 * 900) == (at_once == 1)  # else at most a pass for each epoch


# ------------------------------------------------------------------ messages


def bad(counts, value, where=(97, 5)):
    X = counts.astype(float)
    X[where] = value
    return X


@pytest.mark.parametrize(
    "change",
    [
        lambda X: bad(X, -1),
        lambda X: bad(bad(X, np.inf), np.inf, (149, 2)),
        lambda X: bad(bad(X, -2), -3, (3, 1)),
        lambda X: X[:, :0],
        lambda X: X[:0],
    ],
    ids=["negative", "inf", "two negative", "no genes", "no rows"],
)
@pytest.mark.parametrize("wrap", [Slices, in_dask], ids=["slices", "dask"])
def test_errors_are_those_of_counts_in_memory(counts, change, wrap):
    X = change(counts)
    with pytest.raises(ValueError) as expected:
        NBVCPEstimator().fit(X)
    stored = wrap(X) if wrap is Slices else wrap(X, (50, -1))
    with pytest.raises(ValueError, match=f"^{re.escape(str(expected.value))}$"):
        NBVCPEstimator().fit(stored)


@pytest.mark.parametrize(
    "change",
    [
        lambda X: X + 0.5 * (X > 0),
        lambda X: 3 * X,
        lambda X: np.where(X > 0, 3, 0),
        lambda X: 0 * X,
        lambda X: np.concatenate([X, 10_000 - X.sum(1, keepdims=True)], 1),
    ],
    ids=["fractions", "multiples", "of short rows", "no counts", "one depth"],
)
def test_warnings_are_those_of_counts_in_memory(counts, change):
    X = change(counts)
    with pytest.warns(UserWarning) as expected:
        validate_counts(NBVCPEstimator(), X, reset=True)
    with pytest.warns(UserWarning) as found:
        rows_of(Slices(X))
    assert [str(w.message) for w in found] == [str(w.message) for w in expected]


def test_another_number_of_genes(counts):
    estimator = NBVCPEstimator()
    validate_counts(estimator, counts[:, :5], reset=True)
    with pytest.raises(ValueError, match=r"X has 24 features, but .* is expecting 5"):
        validated_rows(estimator, Slices(counts), reset=False)


def test_what_cannot_be_read_by_rows_says_what_to_do(counts, tmp_path):
    ad, da = pytest.importorskip("anndata"), pytest.importorskip("dask.array")
    ad.AnnData(sp.csc_matrix(counts)).write_h5ad(tmp_path / "csc.h5ad")
    by_column = ad.read_h5ad(tmp_path / "csc.h5ad", backed="r").X
    unknown = in_dask(counts)
    for X, error, message in (
        (by_column, ValueError, r"stored by columns \(csc\).*as CSR, or give X\.to_memory"),
        (in_dask(counts, (N, 5)), ValueError, r"5 chunks of columns. Give X\.rechunk\(\{1: -1\}\)"),
        (unknown[unknown[:, 0] > 0], ValueError, r"unknown size. Give X\.compute_chunk_sizes"),
        (Slices(counts.astype(complex)), ValueError, "Complex data not supported"),
        (Slices(counts.astype("m8[s]")), ValueError, "Dates in data"),
        (Slices(counts.astype(str)), TypeError, "Objects in data .* found <U"),
        (Slices(counts[0]), ValueError, r"Expected 2D array.*found .*Slices of shape \(24,\)"),
        (da.ones(4), ValueError, r"Expected 2D array.*found dask.* of shape \(4,\)"),
    ):
        with pytest.raises(error, match=message):
            NBLNEstimator().fit(X)


# ------------------------------------------------------------------ fits


def options(X):
    rng = np.random.default_rng(0)
    return dict(
        covariates=rng.standard_normal(len(X)),
        offset=rng.uniform(-0.2, 0.2, X.shape),
        sample_weight=rng.integers(1, 3, len(X)),
    )


@pytest.fixture(scope="module")
def fitted(counts):
    """The fit to the counts in memory."""
    return NBLNEstimator(random_state=0).fit(counts)


def same_fit(found, expected):
    for one, other in (
        (found, expected),
        (found.informative_prior_estimator_, expected.informative_prior_estimator_),
    ):
        for name, value in vars(other).items():
            if isinstance(value, np.ndarray) and value.dtype.kind == "f":
                assert_array_equal(getattr(one, name), value, err_msg=name)


@pytest.mark.parametrize("name", ["slices of CSR", "Dask of CSR chunks"])
def test_fits_to_stored_rows_are_the_same(counts, fitted, name, tmp_path, monkeypatch):
    """Bit for bit: batches and minibatches do not depend on where the rows are."""
    monkeypatch.setattr(_blocks, "_CHOSEN_ENTRIES", 64 * G)
    X, expected = STORES[name](counts, tmp_path), fitted
    found = NBLNEstimator(random_state=0).fit(X)
    same_fit(found, expected)
    new = STORES[name](counts[:70], tmp_path) if name != "Dask of CSR chunks" else X[:70]
    for model, other in (
        (found, expected),
        (found.informative_prior_estimator_, expected.informative_prior_estimator_),
    ):
        for method in ("transform", "score_samples", "score", "sample_posterior"):
            a, b = (getattr(m, method) for m in (model, other))
            more = {} if method != "sample_posterior" else {"random_state": 0, "n_samples": 2}
            a, b = (
                (a(X=new, **more).eta, b(X=counts[:70], **more).eta)
                if more
                else (a(new), b(counts[:70]))
            )
            assert_array_equal(np.asarray(a), b, err_msg=method)


@pytest.mark.slow
def test_fits_with_all_that_is_known_of_rows(counts):
    """And with missing counts. Sums over rows of weighted counts round otherwise in blocks."""
    X = bad(bad(counts, np.nan), np.nan, (3, 0))
    stored, model = Slices(X), NBLNEstimator(2, capture_efficiency=None, random_state=0)
    expected = clone(model).fit(X, **options(X))
    found = model.fit(stored, **options(X))
    assert stored.largest <= BLOCK
    assert_allclose(found.loadings_, expected.loadings_, rtol=1e-8, atol=1e-10)
    assert_allclose(found.coef_, expected.coef_, rtol=1e-8)
    known = {name: value for name, value in options(X).items() if name != "sample_weight"}
    assert_allclose(found.transform(stored, **known), expected.transform(X, **known), rtol=1e-8)


def test_what_needs_counts_in_memory_says_so(counts, fitted):
    model = fitted
    with pytest.raises(
        TypeError, match=r"counts in memory here, found .*Slices of shape .* X\[:\]"
    ):
        model.impute(Slices(counts))
    with pytest.raises(TypeError, match=r"counts in memory here, .*give X\.compute\(\)"):
        model.posterior_predictive(in_dask(counts))
    with pytest.raises(ValueError, match=r"memory='here' keeps the source's fit .* not in memory"):
        NBLNEstimator(memory="here").fit(Slices(counts))

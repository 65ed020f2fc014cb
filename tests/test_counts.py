"""Frames by the types of their columns, what holds counts and is no matrix, whole numbers that are no counts.

Elsewhere: every representation of a matrix, values that are refused, what the estimators do with odd matrices
(test_input.py).
"""

import datetime
import warnings
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from numpy.testing import assert_array_equal

from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln._counts import validate_counts

N, G = 60, 30


@pytest.fixture(scope="module")
def counts():
    """Whole numbers whose rows have other totals, and no common divisor."""
    rng = np.random.default_rng(0)
    return rng.poisson(rng.gamma(2, 1, (N, 1)) * np.ones(G)).astype(float)


def validated(X, **options):
    return validate_counts(NBVCPEstimator(), X, reset=True, **options)


def words(X, *, reset=True):
    """All warnings of the validation of X."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimator = NBVCPEstimator()
        estimator.n_features_in_ = X.shape[1]
        validate_counts(estimator, X, reset=reset)
    return [str(w.message) for w in caught]


# ------------------------------------------------------------------ frames


def pandas_frame(columns):
    return pd.DataFrame(columns)


def nullable_frame(columns):
    return pd.DataFrame(columns).convert_dtypes()


def polars_frame(columns):
    return pytest.importorskip("polars").DataFrame(columns)


def arrow_table(columns):
    return pytest.importorskip("pyarrow").table(columns)


def arrow_batch(columns):
    return pytest.importorskip("pyarrow").RecordBatch.from_pydict(columns)


def arrow_types(columns):
    pytest.importorskip("pyarrow")
    return pd.DataFrame(columns).convert_dtypes(dtype_backend="pyarrow")


FRAMES = [pandas_frame, nullable_frame, polars_frame, arrow_table, arrow_batch, arrow_types]
every_frame = pytest.mark.parametrize("frame", FRAMES)

NUMBERS = {
    "booleans": [True, False, True],
    "integers": [3, 0, 2],
    "floats": [1.0, 2.0, 0.0],
    "decimals": [Decimal(1), Decimal(0), Decimal(7)],
}


@every_frame
def test_columns_of_numbers_are_taken(frame):
    estimator = NBVCPEstimator()
    found = validate_counts(estimator, frame(NUMBERS), reset=True)
    assert_array_equal(found.toarray(), np.array(list(NUMBERS.values()), float).T)
    assert list(estimator.feature_names_in_) == list(NUMBERS)
    with pytest.raises(ValueError, match="same order"):
        validate_counts(estimator, frame(dict(reversed(NUMBERS.items()))), reset=False)


OTHERS = {
    "dates": (datetime.date(2024, 1, 1), "Dates"),
    "moments": (datetime.datetime(2024, 1, 1), "Dates"),
    "moments of a zone": (datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC), "Dates"),
    "hours": (datetime.time(1), "Dates"),
    "durations": (datetime.timedelta(1), "Dates"),
    "text": ("T cell", "Text"),
    "numbers as text": ("1", "Text"),
    "bytes": (b"1", "Text"),
    "lists": ([1], "Objects"),
    "records": ({"count": 1}, "Objects"),
}


@every_frame
@pytest.mark.parametrize("value, what", OTHERS.values(), ids=OTHERS)
def test_other_columns_are_refused_by_name(frame, value, what):
    X = frame({"gene": [1, 2], "other": [value, value]})
    error = TypeError if what == "Objects" else ValueError
    with pytest.raises(error, match=rf"^{what} in data .* column 1 \('other'\)"):
        validated(X)


@every_frame
@pytest.mark.parametrize("column", [[1, None], [True, None], [Decimal(1), None], [None, None]])
def test_what_is_missing_is_nan(frame, column):
    X = frame({"gene": [1, 2], "other": column})
    with pytest.raises(ValueError, match=r"^NaN in data .* row \d, column 1 \('other'\)"):
        validated(X)


PANDAS = {
    "periods": (pd.period_range("2024", periods=2), "Dates"),
    "categories of text": (pd.Series(["a", "b"], dtype="category"), "Text"),
    "sparse text": (pd.arrays.SparseArray(["a", "b"]), "Text"),
    "sparse dates": (pd.arrays.SparseArray(np.array([0, 1], "M8[ns]")), "Dates"),
    "intervals": (pd.interval_range(0, 2), "Objects"),
    "durations of NumPy among objects": (
        pd.Series([np.timedelta64(1, "D"), 1], dtype=object),
        "Dates",
    ),
    "one text among objects": (pd.Series([1, "2"], dtype=object), "Text"),
}


@pytest.mark.parametrize("column, what", PANDAS.values(), ids=PANDAS)
def test_other_columns_of_pandas_are_refused_by_name(column, what):
    error = TypeError if what == "Objects" else ValueError
    with pytest.raises(error, match=rf"^{what} in data .* column 1 \('other'\)"):
        validated(pd.DataFrame({"gene": [1, 2], "other": column}))


def test_complex_columns_are_refused():
    with pytest.raises(ValueError, match="Complex data not supported"):
        validated(pd.DataFrame({"gene": [1, 2], "other": [1j, 2]}))


def test_objects_that_are_no_numbers_are_refused_in_arrays():
    with pytest.raises(ValueError, match=r"^Dates in data .* at row 0, column 1"):
        validated([[1, datetime.date(2024, 1, 1)]])
    with pytest.raises(TypeError, match=r"^Objects in data .* found dict at row 0, column 1"):
        validated([[1, {}]])
    with pytest.raises(ValueError, match=r"^NaN in data .* at row 0, column 1"):
        validated(np.array([[1, pd.NA], [2, 3]], object))


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
def test_sparse_frames(counts, dtype):
    """Booleans too: `get_dummies(sparse=True)` makes them."""
    expected = counts.astype(dtype)
    X = pd.DataFrame(expected, columns=[f"gene{g}" for g in range(G)])
    X = X.astype(pd.SparseDtype(dtype, dtype(0)))
    found = validated(X)
    assert found.dtype == np.float64
    assert_array_equal(found.toarray(), expected)
    assert X.dtypes.iloc[0] == pd.SparseDtype(dtype, dtype(0))


def repeated_pandas():
    return pd.DataFrame(np.ones((3, 4)), columns=["a", "b", "a", "c"])


def repeated_sparse():
    return repeated_pandas().astype(pd.SparseDtype(float, 0.0))


def repeated_arrow():
    pa = pytest.importorskip("pyarrow")
    return pa.Table.from_arrays([pa.array([1, 2])] * 4, ["a", "b", "a", "c"])


@pytest.mark.parametrize("make", [repeated_pandas, repeated_sparse, repeated_arrow])
@pytest.mark.parametrize("estimator", [NBVCPEstimator, NBLNEstimator])
def test_names_that_stand_twice_are_refused(make, estimator):
    message = f"^Columns of the same name in data passed to {estimator.__name__}: a, 1 such"
    with pytest.raises(ValueError, match=message):
        estimator().fit(make())


# ------------------------------------------------------------------ what holds a matrix, and is none


class Holder:
    """Fails when it is taken apart."""

    shape = (3, 2)

    def __len__(self):
        return 3

    def __getitem__(self, rows):
        raise AssertionError("its rows are read")


class AnnData(Holder):
    X = property(lambda self: np.ones((3, 2)))


class SparseDataset(Holder):
    def to_memory(self):
        raise AssertionError("its file is read")


class LazyFrame(Holder):
    columns = ("a", "b")

    def collect(self):
        raise AssertionError("it is computed")


def annotated():
    ad = pytest.importorskip("anndata")
    return ad.AnnData(sp.csr_array(np.eye(4, 3, dtype=np.float32)))


def raw():
    adata = annotated()
    adata.raw = adata
    return adata.raw


def in_hdf5(path):
    return pytest.importorskip("h5py").File(path / "counts.h5ad", "w")


def in_zarr(path):
    return pytest.importorskip("zarr").open_group(path / "counts.zarr", mode="w")


def sparse_dataset(group):
    """The `X` of a backed AnnData, without what else a file of it holds."""
    ad, X = pytest.importorskip("anndata"), sp.csr_matrix(np.eye(4, 3))
    for part in ("data", "indices", "indptr"):
        group[part] = getattr(X, part)
    group.attrs.update(
        {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": X.shape}
    )
    return ad.io.sparse_dataset(group)


def polars_lazy():
    return pytest.importorskip("polars").LazyFrame({"a": [1, 2]})


HOLDERS = {
    "AnnData": (
        AnnData,
        r"AnnData. Call sknbln\.tl\.nbln\(adata\).*its matrix of raw counts: adata\.X",
    ),
    "sparse dataset": (
        SparseDataset,
        r"SparseDataset. Its values are in a file: .*X\.to_memory\(\)",
    ),
    "lazy frame": (LazyFrame, r"LazyFrame. .* give X\.collect\(\)"),
    "mapping": (dict, r"found builtins.dict\.$"),
    "nothing": (lambda: None, r"found builtins.NoneType\.$"),
    "real AnnData": (annotated, r"adata\.X"),
    "real Raw": (raw, r"adata\.X, .*adata\.raw\.X"),
    "real polars LazyFrame": (polars_lazy, r"X\.collect\(\)"),
}


@pytest.mark.parametrize("make, message", HOLDERS.values(), ids=HOLDERS)
@pytest.mark.parametrize("estimator", [NBVCPEstimator, NBLNEstimator])
def test_what_holds_a_matrix_is_refused_at_once(estimator, make, message):
    X = make()
    with pytest.raises(
        TypeError, match=f"^{estimator.__name__} expects a matrix of counts.*{message}"
    ):
        estimator().fit(X)


@pytest.mark.parametrize("store", [in_hdf5, in_zarr])
def test_sparse_matrices_in_files_are_refused_where_all_is_needed(store, tmp_path):
    X = sparse_dataset(store(tmp_path))
    with pytest.raises(TypeError, match=r"X\.to_memory\(\), or the rows that you need"):
        validated(X)
    assert_array_equal(validated(X.to_memory()).toarray(), np.eye(4, 3))
    assert_array_equal(validated(X[:2]).toarray(), np.eye(2, 3))


def test_columns_named_like_attributes_of_other_classes_are_genes():
    names = ["X", "dask", "collect", "to_memory", "column_names", "dtype"]
    estimator = NBVCPEstimator()
    found = validate_counts(estimator, pd.DataFrame(np.eye(3, 6), columns=names), reset=True)
    assert_array_equal(found.toarray(), np.eye(3, 6))
    assert list(estimator.feature_names_in_) == names


# ------------------------------------------------------------------ whole numbers, nearly and not counts


def almost(counts, relative=9e-7):
    """Each non-zero value off by up to a relative distance."""
    X = sp.csr_matrix(counts)
    X.data *= 1 + relative * np.random.default_rng(1).uniform(-1, 1, X.nnz)
    return X


@pytest.mark.parametrize("reset", [True, False], ids=["fit", "new rows"])
def test_values_next_to_whole_numbers_are_rounded_without_a_word(counts, reset):
    X = almost(counts)
    before = X.data.copy()
    assert np.all(X.data % 1 > 0)
    assert words(X, reset=reset) == []
    assert_array_equal(validated(X).toarray(), counts)
    assert_array_equal(validated(X.toarray()).toarray(), counts)
    assert_array_equal(X.data, before)


def test_values_next_to_zero_leave_the_structure(counts):
    noise = 9e-9 * np.random.default_rng(1).uniform(-1, 1, counts.shape)
    X = counts + noise
    X.flags.writeable = False
    found = validated(X)
    assert_array_equal(found.toarray(), counts)
    assert found.nnz == np.count_nonzero(counts) and found.has_canonical_format


@pytest.mark.parametrize("value", [2 + 3e-6, 2e-8, 0.5, 1e5 + 0.2])
def test_other_fractions_stay_and_are_said_once(counts, value):
    X = almost(counts).toarray()
    X[3, 4] = value
    (said,) = words(X)
    assert "not whole numbers" in said and f"({1 / np.count_nonzero(X):.1%} of" in said
    with pytest.warns(UserWarning, match="not whole numbers"):
        assert validated(X)[3, 4] == value


def test_what_is_no_number_is_no_rounding(counts):
    for value, message in ((np.nan, "NaN in data"), (np.inf, "inf in data"), (-1e-6, "Negative")):
        X = almost(counts).toarray()
        X[3, 4] = value
        with pytest.raises(ValueError, match=message):
            validated(X)


def per_million(X):
    return np.round(X / X.sum(1, keepdims=True) * 1e6)


def rarefied(X):
    rng = np.random.default_rng(2)
    return np.array([rng.multinomial(40, row / row.sum()) for row in X])


NO_COUNTS = {
    "times 1000": (lambda X: 1000 * X, r"values of \d+ of \d+ rows .*\(1000 in the first\)"),
    "each row times its own": (
        lambda X: X * np.arange(2, 2 + len(X))[:, None],
        r"\(2 in the first\)",
    ),
    "some rows are counts": (lambda X: np.r_[X[:20], 3 * X[20:]], "times a constant"),
    "few genes, times 7": (lambda X: 7 * X[:, :5], r"of all rows .*\(7 in the first\)"),
    "few rows, times 7": (lambda X: 7 * X[:2], r"\(7 in the first\)"),
    "per million": (per_million, r"totals are equal but for rounding \(9999\d\d to 10000\d\d\)"),
    "per million and empty rows": (
        lambda X: np.r_[per_million(X), 0 * X[:3]],
        "totals are equal but for rounding",
    ),
    "rarefied": (
        rarefied,
        r"totals are equal but for rounding \(40 to 40\). A table that was rarefied",
    ),
}


@pytest.mark.parametrize("make, message", NO_COUNTS.values(), ids=NO_COUNTS)
def test_whole_numbers_that_are_no_counts_are_said_once_and_at_fit(counts, make, message):
    X = make(counts[counts.sum(1) > 0])
    with pytest.warns(UserWarning, match=message) as caught:
        validated(X)
    assert len(caught) == 1
    assert words(X, reset=False) == []


def test_counts_of_few_rows_or_genes_are_not_accused():
    """Totals that are equal, and divisors, by chance: Poisson counts, which have the least variance."""
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 4, 6, 20, 200):
        for n_genes in (1, 2, 19, 20, 100):
            for mean in (0.1, 1, 10, 1e3, 1e7):
                X = rng.poisson(mean, (n, n_genes))
                assert not X.any() or words(X) == [], (n, n_genes, mean)


ODD_COUNTS = {
    "one kind per row": lambda rng: np.eye(5)[rng.integers(0, 5, 300)],
    "mostly one count per row": lambda rng: rng.poisson(0.002, (5000, 50)),
    "yes and no": lambda rng: rng.random((300, 400)) < 0.9,
    "beyond 2^53": lambda rng: rng.poisson(1e17, (100, 30)),
    "equal depths by design": lambda rng: rng.poisson(1e4, (300, 100)),
}


@pytest.mark.parametrize("make", ODD_COUNTS.values(), ids=ODD_COUNTS)
def test_odd_counts_are_not_accused(make):
    assert words(make(np.random.default_rng(0))) == []

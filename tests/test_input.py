"""What may be given as counts and parameters, what is refused and how, and that nothing is modified.

Elsewhere: rows and genes without counts in NBVCP, all-zero new rows, fractional counts (test_nbvcp.py,
test_nbln.py); latent_dim above the number of rows (test_nbln.py); names of freeze levels and genes missing
from a source (test_source.py); hyper-parameters of loadings priors (test_column_priors.py).
"""

import pickle
import warnings
from contextlib import nullcontext
from numbers import Integral, Real

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from numpy.testing import assert_array_equal
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils._param_validation import Interval, generate_invalid_param_val, make_constraint

from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln._counts import validate_counts
from sknbln.datasets import make_nbln_counts
from sknbln.predictive import compositional_samples

N, G = 40, 12
NAMES = [f"gene{g}" for g in range(G)]


@pytest.fixture(scope="module")
def counts():
    """Dense float64 whole numbers, below 128 so that they fit every integer type."""
    X = make_nbln_counts(n_cells=N, n_genes=G, n_factors=2, random_state=0).data.toarray()
    return np.minimum(X, 100).astype(float)


@pytest.fixture(scope="module")
def nbvcp(counts):
    return NBVCPEstimator(random_state=0).fit(counts)


@pytest.fixture(scope="module")
def nbln(counts, nbvcp):
    return NBLNEstimator(2, informative_prior_estimator=nbvcp, random_state=0).fit(counts)


def refit(model, X):
    """A new estimator like `model`, fitted to X."""
    again = clone(model)
    if isinstance(model, NBLNEstimator):
        again.set_params(informative_prior_estimator=model.informative_prior_estimator_)
    return again.fit(X)


def changed(X, value, row=3, column=4):
    X = X.copy()
    X[row, column] = value
    return X


# ------------------------------------------------------------------ representations


def with_explicit_zeros(X):
    rows, columns = (a.ravel() for a in np.indices(X.shape))
    return sp.csr_matrix((X[rows, columns], (rows, columns)), X.shape)


def with_duplicates(X):
    """Every count as a sum of two entries, the rows unsorted."""
    rows, columns = np.nonzero(X)
    value = X[rows, columns]
    first = np.floor(value / 2)
    order = np.argsort(np.r_[rows, rows], kind="stable")[::-1]
    data = np.r_[first, value - first][order]
    indices = np.r_[columns, columns][order]
    ends = np.cumsum(2 * np.bincount(rows, minlength=X.shape[0]))
    # rows backwards, so that the columns within each row run backwards too
    starts = data.size - ends
    pieces = [slice(s, e) for s, e in zip(starts, np.r_[data.size, starts[:-1]], strict=True)]
    out = sp.csr_matrix(
        (
            np.concatenate([data[p] for p in pieces]),
            np.concatenate([indices[p] for p in pieces]),
            np.r_[0, ends],
        ),
        X.shape,
    )
    assert not out.has_canonical_format and not out.has_sorted_indices
    return out


def read_only(X):
    X = X.copy()
    for a in (X.data, X.indices, X.indptr) if sp.issparse(X) else (X,):
        a.flags.writeable = False
    return X


def wide_indices(X):
    X = sp.csr_matrix(X)
    X.indices, X.indptr = X.indices.astype(np.int64), X.indptr.astype(np.int64)
    return X


INTEGERS = [np.dtype(t) for t in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")]
FLOATS = [np.dtype(t) for t in ("f2", "f4", "f8", "longdouble", ">f8")]
SPARSE = [getattr(sp, f"{f}_{c}") for f in ("csr", "csc", "coo") for c in ("matrix", "array")]
REPRESENTATIONS = {
    **{f"dense {t}": lambda X, t=t: X.astype(t) for t in INTEGERS + FLOATS},
    **{f"csr {t}": lambda X, t=t: sp.csr_array(X).astype(t) for t in INTEGERS},
    **{c.__name__: c for c in [*SPARSE, sp.bsr_array, sp.dok_array, sp.lil_array]},
    "list": lambda X: X.astype(int).tolist(),
    "objects": lambda X: X.astype(object),
    "mask without masked entries": lambda X: np.ma.masked_array(X),
    "explicit zeros": with_explicit_zeros,
    "duplicates, unsorted": with_duplicates,
    "64-bit indices": wide_indices,
    "Fortran order": np.asfortranarray,
    "strided view": lambda X: np.repeat(np.repeat(X, 2, 0), 3, 1)[::2, ::3],
    "backwards view": lambda X: X[::-1, ::-1].copy()[::-1, ::-1],
    "read-only": read_only,
    "read-only csr": lambda X: read_only(sp.csr_array(X)),
    "read-only, not canonical": lambda X: read_only(with_duplicates(X)),
    "read-only csc": lambda X: read_only(sp.csc_array(X)),
    "DataFrame": pd.DataFrame,
    "DataFrame of mixed types": lambda X: pd.DataFrame(X).astype({0: "i1", 3: "u8", 5: "f4"}),
    "DataFrame of nullable integers": lambda X: pd.DataFrame(X).astype("Int32"),
    "sparse DataFrame": lambda X: pd.DataFrame(X).astype(pd.SparseDtype(float, 0.0)),
}


@pytest.mark.parametrize("make", REPRESENTATIONS.values(), ids=REPRESENTATIONS)
def test_every_representation_is_the_same_matrix(counts, nbvcp, nbln, make):
    """Bit for bit: whatever is computed is a function of what `validate_counts` returns."""
    expected = validate_counts(NBVCPEstimator(), counts, reset=True)
    X = make(counts)
    found = validate_counts(NBVCPEstimator(), X, reset=True)
    assert found.dtype == np.float64 and found.has_canonical_format
    assert_array_equal(found.toarray(), counts)
    for part in ("data", "indices", "indptr"):
        assert_array_equal(getattr(found, part), getattr(expected, part))
    for model in (nbvcp, nbln):
        assert_array_equal(model.transform(X), model.transform(counts))
        assert_array_equal(model.score_samples(X), model.score_samples(counts))


@pytest.mark.parametrize("name", ["nbvcp", "nbln"])
@pytest.mark.parametrize(
    "make",
    [with_duplicates, sp.coo_array, lambda X: X.astype("u1"), lambda X: X.astype("f4")],
    ids=["duplicates", "coo", "uint8", "float32"],
)
def test_fits_to_them_are_the_same(counts, name, make, request):
    model = request.getfixturevalue(name)
    again = refit(model, make(counts))
    assert_array_equal(again.score_samples(counts), model.score_samples(counts))
    assert_array_equal(again.capture_offset_, model.capture_offset_)


def test_memory_mapped_counts(counts, nbvcp, nbln, tmp_path):
    path = tmp_path / "counts.npy"
    np.save(path, counts)
    mapped = np.load(path, mmap_mode="r")
    for model in (nbvcp, nbln):
        assert_array_equal(refit(model, mapped).score_samples(mapped), model.score_samples(counts))
    assert_array_equal(np.load(path), counts)


def bytes_of(X):
    if isinstance(X, pd.DataFrame):
        return [a for j in range(X.shape[1]) for a in bytes_of(np.asarray(X.iloc[:, j]))]
    if sp.issparse(X):
        parts = ("data", "row", "col") if X.format == "coo" else ("data", "indices", "indptr")
        return [a for part in parts for a in bytes_of(getattr(X, part))]
    return [X.dtype, X.tobytes()]


@pytest.mark.parametrize(
    "make",
    [
        np.array,
        with_explicit_zeros,
        with_duplicates,
        sp.csc_array,
        sp.coo_array,
        lambda X: sp.coo_array(with_duplicates(X)),
        pd.DataFrame,
    ],
    ids=["dense", "explicit zeros", "duplicates", "csc", "coo", "coo duplicates", "DataFrame"],
)
def test_nothing_of_the_callers_is_modified(counts, nbvcp, nbln, make):
    X = make(counts)
    before = bytes_of(X)
    for model in (nbvcp, nbln):
        refit(model, X)
        model.transform(X)
        model.score(X)
        model.sample_posterior(2, X)
    assert bytes_of(X) == before


def test_parameters_are_not_modified(counts, nbvcp):
    """What is mutable among them: a dict, lists and the source."""
    prior = {"type": "horseshoe_columnwise", "tau_scale": 0.5}
    freeze, pair = ["eta", "r"], [9.0, 0.5]
    source = pickle.dumps(nbvcp)
    model = NBLNEstimator(
        2,
        informative_prior_estimator=nbvcp,
        informative_priors_freeze=freeze,
        loadings_prior=prior,
        capture_efficiency=pair,
        random_state=0,
    )
    given = model.get_params(deep=False)
    model.fit(counts).transform(counts)
    model.sample_posterior(2, counts)
    for name, value in model.get_params(deep=False).items():
        assert value is given[name], name
    assert prior == {"type": "horseshoe_columnwise", "tau_scale": 0.5}
    assert (freeze, pair) == (["eta", "r"], [9.0, 0.5])
    assert pickle.dumps(nbvcp) == source


# ------------------------------------------------------------------ what is refused

REFUSED = {
    "negative": (
        lambda X: changed(X, -2),
        "Negative values in data .* found -2 at row 3, column 4",
    ),
    "negative, sparse": (lambda X: sp.csc_array(changed(X, -2)), "found -2 at row 3, column 4"),
    "inf": (lambda X: changed(X, np.inf), "inf in data .* at row 3, column 4"),
    "complex": (lambda X: X.astype(complex), "Complex data not supported: .* expects counts"),
    "complex, sparse": (lambda X: sp.csr_array(X).astype(complex), "Complex data not supported"),
    "text": (
        lambda X: np.array([["a", "b"], ["c", "d"]]),
        "Text in data .* 'a' at row 0, column 0",
    ),
    "numbers as text": (lambda X: X.astype(int).astype(str), "Text in data"),
    "complex objects": (lambda X: changed(X.astype(object), 2 + 1j), "Complex data not supported"),
    "lists of text": (lambda X: [["1", "2"], ["3", "4"]], "Text in data .* '1'"),
    "bytes": (lambda X: X.astype(int).astype("S"), "Text in data"),
    "one text among objects": (
        lambda X: changed(X.astype(object), "7"),
        "Text in data .* found '7' at row 3, column 4",
    ),
    "a column of labels": (
        lambda X: pd.DataFrame(X, columns=NAMES).assign(gene2="T cell"),
        r"Text in data .* found 'T cell' at row 0, column 2 \('gene2'\)\. Leave out columns",
    ),
    "dates": (lambda X: X.astype("M8[D]"), "Dates in data"),
    "a column of dates": (
        lambda X: pd.DataFrame(X, columns=NAMES).assign(gene2=pd.Timestamp(0)),
        r"Dates in data .* in column 2 \('gene2'\)",
    ),
    "masked": (
        lambda X: np.ma.masked_array(X, X > X.max() - 1),
        "Masked entries .* found 1 of 480",
    ),
    "0-D": (lambda X: np.array(3.0), "Expected 2D array"),
    "1-D": (lambda X: X[0], "Expected 2D array, got 1D array"),
    "1-D Series": (lambda X: pd.Series(X[0]), "Expected (a )?2"),
    "1-D text": (lambda X: np.array(["a", "b"]), "could not convert|Expected 2D"),
    "1-D sparse": (lambda X: sp.coo_array(X[0]), "Expected 2D"),
    "3-D": (lambda X: X[None], "dim 3"),
    "no rows": (lambda X: X[:0], r"0 sample\(s\)"),
    "no rows, sparse": (lambda X: sp.csr_array((0, G)), r"0 sample\(s\)"),
    "no columns": (lambda X: X[:, :0], r"0 feature\(s\)"),
    "no columns, sparse": (lambda X: sp.csr_array((N, 0)), r"0 feature\(s\)"),
    "ragged": (lambda X: [[1, 2], [3]], "inhomogeneous"),
    "sparse columns of NaN": (
        lambda X: pd.DataFrame(X).astype(pd.SparseDtype(float, np.nan)),
        "fill value must be 0",
    ),
}


@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("estimator", [NBVCPEstimator, NBLNEstimator])
def test_no_counts_no_fit(counts, estimator, make, message):
    model = estimator()
    with pytest.raises(ValueError, match=message):
        model.fit(make(counts))
    assert not [name for name in vars(model) if name.endswith("_") and "feature" not in name]


def test_bad_new_rows_are_refused_by_every_method(counts, nbvcp, nbln):
    for model in (nbvcp, nbln):
        for method in (model.transform, model.score_samples, model.score):
            with pytest.raises(ValueError, match="Negative values in data passed to NB"):
                method(changed(counts, -1))
        with pytest.raises(ValueError, match="Negative values in data"):
            model.sample_posterior(2, changed(counts, -1))
        with pytest.raises(ValueError, match="NaN in data"):  # compositions of whole rows
            compositional_samples(model, changed(counts, np.nan))
    with pytest.raises(ValueError, match="inf in data"):
        nbln.posterior_scores(changed(counts, np.inf))


NOT_SEEN = {
    "NaN": lambda X: changed(X, np.nan),
    "NaN, sparse": lambda X: sp.coo_array(changed(X, np.nan)),
    "None": lambda X: changed(X.astype(object), None),
    "NA": lambda X: pd.DataFrame(X, columns=NAMES).astype("Int64").mask(changed(X * 0, 1) > 0),
}


@pytest.mark.parametrize("make", NOT_SEEN.values(), ids=NOT_SEEN)
def test_a_missing_value_is_a_count_that_was_not_seen(counts, make):
    before = make(counts)
    X, missing = validate_counts(NBVCPEstimator(), before, reset=True, missing=True)
    assert_array_equal(np.argwhere(missing.toarray()), [[3, 4]])
    assert_array_equal(X.toarray(), changed(counts, 0))
    assert X.has_canonical_format and X.data.all()
    X, missing = validate_counts(NBVCPEstimator(), counts, reset=True, missing=True)
    assert missing is None


@pytest.mark.parametrize("name", ["nbvcp", "nbln"])
def test_other_genes_than_at_fit_are_refused(counts, name, request):
    model = request.getfixturevalue(name)
    with pytest.raises(ValueError, match=r"X has 5 features, but .* is expecting 12"):
        model.transform(counts[:, :5])
    frame = pd.DataFrame(counts, columns=NAMES)
    named = refit(model, counts)
    named.feature_names_in_ = np.array(NAMES, object)
    with pytest.raises(ValueError, match="same order"):
        named.transform(frame.iloc[:, ::-1])
    with pytest.raises(ValueError, match="yet now missing"):
        named.score(frame.iloc[:, :5])
    with pytest.warns(UserWarning, match="does not have valid feature names"):
        named.transform(counts)


# ------------------------------------------------------------------ odd but legal matrices


def without(counts, *, rows=(), columns=()):
    X = counts.copy()
    X[list(rows)] = 0
    X[:, list(columns)] = 0
    return X


ODD = {
    "rows without counts": lambda X: without(X, rows=(0, 5, 39)),
    "genes without counts": lambda X: without(X, columns=(0, 11)),
    "a count of 1e9": lambda X: changed(X, 1e9),
    "totals over 2^31": lambda X: (X * 2**24 + (X > 0)).astype(np.int64),  # no common divisor
    "one row": lambda X: X[:1],
    "one gene": lambda X: X[:, :1],
}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
# one count of 1e9 is a factor of its own, and is said to be
@pytest.mark.filterwarnings("ignore:The mean square of the scores")
@pytest.mark.parametrize(
    "make",
    [
        *(pytest.param(make, id=name) for name, make in ODD.items()),
        # compiles all kernels anew, as "one row" and "one gene" do
        pytest.param(lambda X: X[:1, :1] + 1, id="one count", marks=pytest.mark.slow),
    ],
)
def test_odd_matrices_give_finite_numbers(counts, make):
    X = make(counts)
    source = NBVCPEstimator(random_state=0).fit(X)
    model = NBLNEstimator(2, informative_prior_estimator=source, random_state=0).fit(X)
    assert model.latent_dim_ == min(2, *X.shape)
    zeros = np.zeros((1, X.shape[1]))
    for fitted in (source, model):
        for name, value in vars(fitted).items():
            if isinstance(value, np.ndarray) and value.dtype.kind == "f":
                assert np.all(np.isfinite(value)), name
        for rows in (X, zeros):
            assert np.all(np.isfinite(fitted.transform(rows)))
            assert np.all(np.isfinite(fitted.score_samples(rows)))


def test_totals_over_2_to_the_31_do_not_wrap(counts):
    """Row and column totals of 32-bit counts are float64: the same as those of float64 counts."""
    X = (counts * 2**24 + (counts > 0)).astype(np.uint32)  # no common divisor
    assert X.sum(dtype=np.uint64) > 2**31
    found = validate_counts(NBVCPEstimator(), sp.csr_array(X), reset=True)
    assert_array_equal(np.asarray(found.sum(axis=1)).ravel(), X.sum(1, dtype=np.uint64))


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(
    "factor, message", [(0, "without a single count"), (7, "like counts times a constant")]
)
def test_a_matrix_of_no_counts_is_said_once(counts, factor, message):
    with pytest.warns(UserWarning, match=message) as caught:
        model = NBLNEstimator(2, informative_prior_estimator=NBVCPEstimator(), random_state=0).fit(
            factor * counts
        )
    said = [w for w in caught if message in str(w.message)]
    assert len(said) == 1
    assert said[0].filename == __file__
    # M0 of a matrix without counts is next to nothing: other rows are deeper
    deeper = pytest.warns(UserWarning, match="more counts than the prior total mRNA")
    with nullcontext() if factor else deeper:
        assert np.all(np.isfinite(model.transform(counts)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.transform(factor * counts[:2])  # new rows may well be such


@pytest.mark.parametrize("method", ["fit", "transform", "score_samples", "score"])
def test_warnings_name_the_users_line(counts, nbvcp, method):
    model = clone(nbvcp) if method == "fit" else nbvcp
    with pytest.warns(UserWarning, match="not whole numbers") as caught:
        getattr(model, method)(changed(counts, 0.5))
    assert [w.filename for w in caught] == [__file__]


# ------------------------------------------------------------------ parameters


def out_of_range(constraints):
    """Values that no constraint of a parameter allows."""
    if constraints == "no_validation":
        return
    for constraint in constraints:
        made = make_constraint(constraint)
        try:
            yield generate_invalid_param_val(made)
        except NotImplementedError:
            yield object()
        if isinstance(made, Interval):
            yield np.nan
            yield "3"
            if made.left is not None:
                yield made.left - 1
                yield -5
                if made.closed in ("right", "neither"):
                    yield made.left
            if made.right is not None:
                yield np.nextafter(made.right, np.inf)
                yield np.inf
                if made.closed in ("left", "neither"):
                    yield made.right
            if made.type is Integral:
                yield 2.5
                yield np.inf
            if made.right is None and made.closed in ("left", "neither"):
                yield np.inf


CASES = [
    (estimator, name, value)
    for estimator in (NBVCPEstimator, NBLNEstimator)
    for name, constraints in estimator._parameter_constraints.items()
    for value in out_of_range(constraints)
]


def test_every_parameter_has_constraints():
    for estimator in (NBVCPEstimator, NBLNEstimator):
        assert set(estimator._parameter_constraints) == set(estimator().get_params(deep=False))


@pytest.mark.parametrize(
    "estimator, name, value",
    CASES,
    # texts of values may differ between processes
    ids=[f"{e.__name__}-{n}-{v if isinstance(v, Real) else type(v).__name__}" for e, n, v in CASES],
)
def test_parameters_out_of_range_are_refused(counts, estimator, name, value):
    with pytest.raises(ValueError, match=f"The {name!r} parameter of {estimator.__name__} must be"):
        estimator(**{name: value}).fit(counts)


def test_the_largest_learning_rate_gives_finite_numbers(counts):
    largest = NBVCPEstimator._parameter_constraints["learning_rate"][0].right
    model = NBVCPEstimator(learning_rate=largest, tol=0, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(counts)
    for name, value in vars(model).items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            assert np.all(np.isfinite(value)), name
    assert np.all(np.isfinite(model.score_samples(counts)))
    for name, value in model.sample_posterior(20).items():
        assert np.all(np.isfinite(value)), name


@pytest.mark.parametrize(
    "pair", [(1,), (1, 2, 3), (np.nan, 1), (1, 0), (1, -1), (np.inf, 1), ("a", "b"), ()]
)
@pytest.mark.parametrize("estimator", [NBVCPEstimator, NBLNEstimator])
def test_capture_efficiency_is_a_pair_of_numbers(counts, estimator, pair):
    with pytest.raises(ValueError, match="expected two finite numbers"):
        estimator(capture_efficiency=pair).fit(counts)


@pytest.mark.parametrize("pair", [(51, 1), (-51, 1), (5, 1e-9), (5, 1e9), (1e300, 1), (5, 1e-300)])
@pytest.mark.parametrize("estimator", [NBVCPEstimator, NBLNEstimator])
def test_capture_efficiency_far_out_of_range_is_refused(counts, estimator, pair):
    with pytest.raises(ValueError, match=r"expected log_M0 between -50 and 50.* sigma_M between"):
        estimator(capture_efficiency=pair).fit(counts)


@pytest.mark.filterwarnings("ignore:.*more counts than the prior total:UserWarning")
@pytest.mark.parametrize("pair", [(-50, 1e-8), (-50, 1e8), (50, 1e-8), (50, 1e8)])
def test_capture_efficiency_at_the_ends_of_its_range_gives_finite_numbers(counts, pair):
    X = counts.copy()
    X[0] *= 1e7  # the offset of the largest library is the farthest from the bound
    model = NBVCPEstimator(capture_efficiency=pair, n_steps=20, tol=1e3, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X)
    for name, value in vars(model).items():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            assert np.all(np.isfinite(value)), name
    assert np.all(np.isfinite(model.score_samples(X)))


@pytest.mark.parametrize(
    "prior", [{}, {"type": None}, {"type": ["ard"]}, {"type": "ard", "sigma": 1.0}, {"sigma": 1.0}]
)
def test_a_bad_loadings_prior_is_refused_before_anything_is_fitted(counts, prior):
    with pytest.raises(ValueError, match="loadings_prior"):
        NBLNEstimator(loadings_prior=prior).fit(counts)


@pytest.mark.parametrize("n, error", [(0, ValueError), (-1, ValueError), (2.5, TypeError)])
def test_n_samples_is_a_positive_integer(nbvcp, nbln, n, error):
    for model in (nbvcp, nbln):
        with pytest.raises(error, match="n_samples"):
            model.sample_posterior(n)

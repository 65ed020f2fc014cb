"""Covariates and offsets: how they are coded, and what is refused with which message."""

import pickle
from decimal import Decimal

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import scipy.sparse as sp
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.preprocessing import OneHotEncoder

from sknbln._design import Design, checked_offset

N = 12
BATCH = np.array(["B", "A", "C"] * 4)
AGE = np.array([31, 45.5, 28, 60, 33, 52, 47, 39, 28, 71, 64, 50])
TREATED = np.arange(N) % 4 < 2
FRAME = pd.DataFrame({"batch": BATCH, "age": AGE, "treated": TREATED})
NAMES = ("batch[B]", "batch[C]", "age", "treated[True]")


@pytest.fixture(scope="module")
def design():
    return Design.learned(FRAME, N)


# ------------------------------------------------------------------ coding


def test_columns_are_treatment_contrasts_and_numbers(design):
    assert design.names == NAMES
    encoder = OneHotEncoder(drop="first", sparse_output=False)
    contrasts = encoder.fit_transform(FRAME[["batch", "treated"]])
    columns = np.column_stack([contrasts[:, :2], AGE, contrasts[:, 2]])
    matrix = design.matrix(FRAME, N)
    assert_allclose(matrix, columns - columns.mean(axis=0), rtol=0, atol=1e-14)
    assert_allclose(design.mean, columns.mean(axis=0))
    assert_allclose(design.scale, columns.std(axis=0))


def test_new_rows_are_centred_by_the_rows_of_the_fit(design):
    row = pd.DataFrame({"batch": ["C"], "age": [AGE.mean() + 1], "treated": [False]})
    assert_allclose(design.matrix(row, 1), [[-1 / 3, 2 / 3, 1, -1 / 2]])


@pytest.mark.parametrize(
    "covariates",
    [
        FRAME[["treated", "age", "batch"]],
        FRAME.set_index(np.arange(N) // 2),
        FRAME.astype({"batch": "category"}),
        FRAME.astype({"batch": "string", "age": "Float64", "treated": "boolean"}),
        FRAME.astype({"batch": object, "age": object, "treated": object}),
        FRAME.assign(age=[Decimal(a) for a in AGE]),
        FRAME.assign(age=pd.arrays.SparseArray(AGE)),
        pl.from_pandas(FRAME),
        pl.from_pandas(FRAME).with_columns(pl.col("batch").cast(pl.Categorical)),
        pa.Table.from_pandas(FRAME),
    ],
    ids=[
        "order of columns",
        "repeated index",
        "category",
        "nullable",
        "objects",
        "decimals",
        "sparse",
        "polars",
        "polars categories",
        "pyarrow",
    ],
)
def test_frames_that_say_the_same(design, covariates):
    expected = design.matrix(FRAME, N)
    assert_array_equal(design.matrix(covariates, N), expected)
    again = Design.learned(covariates, N)
    assert set(again.names) == set(NAMES)
    assert_array_equal(again.matrix(FRAME, N), expected[:, [NAMES.index(n) for n in again.names]])


@pytest.mark.parametrize(
    ("covariates", "names", "columns"),
    [
        (AGE, ("x0",), AGE),
        (AGE.tolist(), ("x0",), AGE),
        (np.column_stack([AGE, AGE**2]), ("x0", "x1"), np.column_stack([AGE, AGE**2])),
        (AGE.astype("f4"), ("x0",), AGE),
        (AGE.astype(int).astype("u1"), ("x0",), AGE.astype(int)),
        (pd.DataFrame(AGE), ("x0",), AGE),
        (pd.Series(AGE), ("x0",), AGE),
        (pd.Series(AGE, name="age"), ("age",), AGE),
        (pl.Series("age", AGE), ("age",), AGE),
        (TREATED, ("x0[True]",), TREATED),
        (TREATED.tolist(), ("x0[True]",), TREATED),
        (np.where(TREATED, "b", "a"), ("x0[b]",), TREATED),
        (np.where(TREATED, b"b", b"a"), ("x0[b'b']",), TREATED),
        (np.where(TREATED, "b", "a").astype("T"), ("x0[b]",), TREATED),
        (pd.Categorical(np.where(TREATED, 7, 3)), ("x0[7]",), TREATED),
        ([["ab"[int(t)], a] for t, a in zip(TREATED, AGE, strict=True)], ("x0[b]", "x1"), None),
        (np.ma.masked_array(AGE), ("x0",), AGE),
    ],
)
def test_arrays_and_series(covariates, names, columns):
    design = Design.learned(covariates, N)
    assert design.names == names
    columns = np.column_stack([TREATED, AGE]) if columns is None else columns.reshape(N, -1)
    assert_allclose(design.matrix(covariates, N), columns - columns.mean(axis=0), atol=1e-13)


def test_categorical_types_keep_the_order_of_the_levels_that_occur():
    values = pd.Categorical(BATCH, categories=["C", "X", "A", "B"])
    design = Design.learned(pd.DataFrame({"batch": values}), N)
    assert design.names == ("batch[A]", "batch[B]")  # "C" is the reference


def test_categories_of_numbers_are_categories():
    plate = pd.DataFrame({"plate": pd.Categorical(np.arange(N) % 3 + 1)})
    design = Design.learned(plate, N)
    assert design.names == ("plate[2]", "plate[3]")
    assert_array_equal(design.matrix(plate.astype(int), N), design.matrix(plate, N))


def test_weights_are_repetitions(design):
    weight = np.arange(N) % 4 + 1
    weighted = Design.learned(FRAME, N, weight)
    repeated = Design.learned(FRAME.loc[np.repeat(np.arange(N), weight)], weight.sum())
    assert_allclose(weighted.mean, repeated.mean)
    assert_allclose(weighted.scale, repeated.scale)
    assert not np.allclose(weighted.mean, design.mean)


def test_rows_of_weight_zero_are_left_out():
    weight = (BATCH != "C").astype(float)
    weighted = Design.learned(FRAME, N, weight)
    left = Design.learned(FRAME[weight > 0], 8)
    assert weighted.names == left.names == ("batch[B]", "age", "treated[True]")
    assert_array_equal(weighted.mean, left.mean)
    assert_array_equal(weighted.scale, left.scale)


def test_the_callers_covariates_are_not_changed(design):
    covariates = FRAME.copy()
    Design.learned(covariates, N, np.ones(N)).matrix(covariates, N)
    pd.testing.assert_frame_equal(covariates, FRAME)


def test_pickles(design):
    again = pickle.loads(pickle.dumps(design))
    assert again.names == design.names
    assert_array_equal(again.matrix(FRAME, N), design.matrix(FRAME, N))


def test_no_covariates():
    for covariates in (None, FRAME[[]]):
        design = Design.learned(covariates, N)
        assert design.names == ()
        assert design.matrix(None, 5).shape == (5, 0)
        assert design.scale.shape == design.mean.shape == (0,)


# ------------------------------------------------------------------ refused in the fit


def changed(**columns):
    return FRAME.assign(**columns)


@pytest.mark.parametrize(
    ("covariates", "message"),
    [
        (FRAME[:9], r"9 rows in covariates, 12 in X"),
        (AGE[:, None, None], r"Covariates of shape \(12, 1, 1\) \(ndarray\)"),
        ("batch", r"Covariates of shape \(\) \(str\)"),
        (sp.csr_array(AGE[:, None]), r"Covariates of shape \(\) \(csr_array\)"),
        (pd.concat([FRAME, FRAME], axis=1), r"same name: 'batch', 'age', 'treated'"),
        (
            changed(age=[np.nan, np.nan, *AGE[2:]], batch=[*BATCH[:-1], None]),
            r"Missing values in covariates: 1 in 'batch', 2 in 'age'",
        ),
        (np.ma.masked_array(AGE, AGE > 60), r"Missing values in covariates: 2 in 'x0'"),
        (changed(age=[*AGE[:-1], np.inf]), r"inf in covariates: 1 in 'age', the first in row 11"),
    ],
)
def test_values_and_shapes_that_are_refused(design, covariates, message):
    with pytest.raises(ValueError, match=message):
        Design.learned(covariates, N)
    with pytest.raises(ValueError, match=message):
        design.matrix(covariates, N)


@pytest.mark.parametrize(
    ("column", "values", "kind"),
    [
        ("age", pd.date_range("2020", periods=N), "datetime64"),
        ("age", AGE + 1j, "complex"),
        ("batch", [1, 2.0, "A"] * 4, "mixed"),
        ("batch", [("a",), ("b",), ("c",)] * 4, "mixed"),
    ],
)
def test_kinds_of_values_that_are_refused(column, values, kind):
    with pytest.raises(ValueError, match=rf"found {kind}\S* in '{column}'"):
        Design.learned(changed(**{column: values}), N)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"one": 1.0}, "do not vary: 'one'"),
        ({"tenth": 0.1, "zero": 0}, "do not vary: 'tenth', 'zero'"),
        ({"species": "human"}, "do not vary: 'species'"),
        ({"sex": pd.Categorical(["f"] * N, ["f", "m"])}, "do not vary: 'sex'"),
        ({"years": AGE}, "'years' follows from 'age'|'age' follows from 'years'"),
        ({"months": 12 * AGE + 3}, "'months' follows from 'age'|'age' follows from 'months'"),
        (
            {"lab": np.where(BATCH == "A", "L1", "L2")},
            r"'lab\[L2\]' follows from 'batch\[B\]', 'batch\[C\]'|"
            r"'batch\[.\]' follows from 'batch\[.\]', 'lab\[L2\]'",
        ),
        (
            {"years": AGE, "plate": BATCH},
            r"(?s)(?=.*'(age|years)' follows)(?=.*'(batch|plate)\[B\]' follows)"
            r"(?=.*'(batch|plate)\[C\]' follows)",
        ),
    ],
)
def test_designs_without_full_rank_are_refused_by_name(columns, message):
    with pytest.raises(ValueError, match=message):
        Design.learned(changed(**columns), N)


def test_only_the_columns_concerned_are_named():
    with pytest.raises(ValueError, match="Linearly dependent") as caught:
        Design.learned(changed(years=AGE), N)
    assert "batch" not in str(caught.value).split(".")[0]


def test_rank_is_that_of_the_rows_with_weight():
    varies_in_one_row = changed(first=np.arange(N) == 0)
    assert "first[True]" in Design.learned(varies_in_one_row, N).names
    with pytest.raises(ValueError, match="do not vary: 'first'"):
        Design.learned(varies_in_one_row, N, np.r_[0.0, np.ones(N - 1)])


def test_units_do_not_decide_about_rank():
    """Nearly collinear but independent, in units 1e20 apart."""
    rng = np.random.default_rng(0)
    near = AGE + 1e-3 * rng.normal(size=N)
    assert Design.learned(changed(near=1e-10 * near, far=1e10 * rng.normal(size=N)), N).names
    with pytest.raises(ValueError, match="Linearly dependent"):
        Design.learned(changed(near=1e-10 * AGE, far=1e10 * rng.normal(size=N)), N)


def test_large_values_that_vary_little_are_no_constants():
    seconds = 1.7e9 + 3600 * np.arange(N)
    assert_allclose(
        Design.learned(seconds, N).matrix(seconds, N)[:, 0], seconds - seconds.mean(), rtol=1e-9
    )


def test_more_columns_than_rows():
    barcode = [f"cell{i}" for i in range(N)]
    with pytest.raises(
        ValueError, match=r"12 columns of covariates for 12 rows.*'barcode' alone has 12"
    ):
        Design.learned(pd.DataFrame({"age": AGE, "barcode": barcode}), N)
    with pytest.raises(ValueError, match="4 columns of covariates for 4 rows"):
        Design.learned(FRAME, N, np.arange(N) < 4)
    with pytest.raises(ValueError, match="3 columns of covariates for 3 rows"):
        Design.learned(np.random.default_rng(0).normal(size=(3, 3)), 3)


# ------------------------------------------------------------------ refused in new rows


@pytest.mark.parametrize(
    ("covariates", "message"),
    [
        (None, "The fit had covariates.*'batch', 'age', 'treated'"),
        (FRAME[["age"]], "missing 'batch', 'treated'. Give"),
        (changed(site=1), "not seen in the fit 'site'"),
        (FRAME.rename(columns={"age": "years"}), "missing 'age'; not seen in the fit 'years'"),
        (
            FRAME.to_numpy(),
            "missing 'batch', 'age', 'treated'; not seen in the fit 'x0', 'x1', 'x2'",
        ),
        (
            changed(batch=["A", "D", "E", "D"] * 3),
            r"Unknown levels of the covariate 'batch': 'D', 'E', in 9 rows. The fit knows 'A', 'B', 'C'",
        ),
        (
            changed(age=BATCH),
            "'age' was numeric in the fit, and these rows have values of kind string",
        ),
        (changed(batch=AGE), "Unknown levels of the covariate 'batch': '31.0'"),
    ],
)
def test_new_rows_that_are_refused(design, covariates, message):
    with pytest.raises(ValueError, match=message):
        design.matrix(covariates, N)


def test_covariates_after_a_fit_without():
    with pytest.raises(
        ValueError, match="The fit had no covariates, and these rows have 'batch', 'age'"
    ):
        Design.learned(None, N).matrix(FRAME[["batch", "age"]], N)


def test_long_lists_are_cut(design):
    with pytest.raises(ValueError, match=r"'D0', .*'D7', \.\.\. \(12 in all\), in 12 rows"):
        design.matrix(changed(batch=[f"D{i}" for i in range(N)]), N)


# ------------------------------------------------------------------ offsets

SHAPE = (N, 5)
LOG_EXPOSURE = np.log(AGE)


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        (LOG_EXPOSURE, LOG_EXPOSURE[:, None]),
        (LOG_EXPOSURE.tolist(), LOG_EXPOSURE[:, None]),
        (LOG_EXPOSURE[:, None], LOG_EXPOSURE[:, None]),
        (pd.Series(LOG_EXPOSURE, index=np.arange(N)[::-1]), LOG_EXPOSURE[:, None]),
        (np.outer(LOG_EXPOSURE, np.ones(5)), np.outer(LOG_EXPOSURE, np.ones(5))),
        (pd.DataFrame(np.outer(LOG_EXPOSURE, np.ones(5))), np.outer(LOG_EXPOSURE, np.ones(5))),
        (np.zeros(N), np.zeros((N, 1))),
        (-LOG_EXPOSURE - 40, -LOG_EXPOSURE[:, None] - 40),
    ],
)
def test_offsets(offset, expected):
    found = checked_offset(offset, SHAPE, None)
    assert found.dtype == np.float64
    assert_array_equal(found, expected)


def test_no_offset():
    assert checked_offset(None, SHAPE, "human") is None


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (LOG_EXPOSURE[:-1], r"Offset of shape \(11,\): expected \(12,\).* or \(12, 5\)"),
        (LOG_EXPOSURE[None, :], r"Offset of shape \(1, 12\)"),
        (np.ones((N, 4)), r"Offset of shape \(12, 4\)"),
        (1.5, r"Offset of shape \(\)"),
        (["depth"] * N, "Offset holds values that are no numbers .*'depth'"),
        (pd.array([1, None] * 6), "not finite: 6 of them, the first nan in row 1"),
        (
            np.r_[0.5, -np.inf, LOG_EXPOSURE[2:]],
            "not finite: 1 of them, the first -inf in row 1, column 0",
        ),
        (np.where(np.eye(N, 5), np.nan, 0.5), "not finite: 5 of them, the first nan in row 0"),
    ],
)
def test_offsets_that_are_refused(offset, message):
    with pytest.raises(ValueError, match=message):
        checked_offset(offset, SHAPE, None)


@pytest.mark.parametrize(
    ("offset", "found"),
    [
        (np.arange(N), "whole numbers"),
        (np.eye(N, 5), "whole numbers"),
        (AGE, "values up to 71"),
        (np.r_[30.5, LOG_EXPOSURE[1:]], "values up to 30.5"),
    ],
)
def test_offsets_that_look_like_the_exposure(offset, found):
    with pytest.warns(
        UserWarning, match=rf"exposure itself \({found}\).*np\.log\(exposure\)"
    ) as caught:
        checked_offset(offset, SHAPE, None)
    assert [w.filename for w in caught] == [__file__]


def test_offset_beside_a_capture_model():
    with pytest.warns(UserWarning, match="capture_efficiency=None") as caught:
        checked_offset(LOG_EXPOSURE, SHAPE, "human")
    assert [w.filename for w in caught] == [__file__]

"""Covariates and exposures in: the columns of a design, remembered from the fit; every message about them."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.linalg import qr, solve_triangular
from sklearn.preprocessing import OneHotEncoder

from ._counts import user_stacklevel

#: kinds of values, in the words of `pandas.api.types.infer_dtype`
_NUMERIC = {"integer", "floating", "mixed-integer-float", "decimal"}
_CATEGORICAL = {"categorical", "string", "bytes", "boolean"}
#: what is left of a column when others are taken out of it, relative to its size, that is rounding error
_TOLERANCE = 1e-8
#: exp(30) is 1e13: no exposure is that large, in any unit that counts are recorded in
_LARGEST_LOG_EXPOSURE = 30
#: number of names that a message lists
_LISTED = 8


@dataclass(frozen=True, eq=False)
class Design:
    """Columns of the covariates of a fit: how they are coded, and what they are centred by.

    A numeric covariate is one column as it is, so that its coefficient is in nats per unit of the covariate.
    A categorical one (of strings, booleans or a categorical type) is one column per level but the first, 1
    in the rows of the level and 0 elsewhere, by `OneHotEncoder(drop="first")`; its coefficients are
    differences from the first level in nats. Levels are those that occur in the fit, sorted; those of a
    categorical type keep its order.

    Attributes
    ----------
    names : tuple of str, length p
        Of the coefficients: "age", "batch[B]".
    levels : dict of str to list or None
        Per covariate its levels, None if it is numeric. The order of the columns is that of the dict.
    mean : ndarray of shape (p,)
        Weighted means of the columns in the fit.
    scale : ndarray of shape (p,)
        Weighted standard deviations of the columns in the fit.
    """

    names: tuple
    levels: dict
    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def learned(cls, covariates, n_rows, sample_weight=None):
        """Design of a fit.

        Parameters
        ----------
        covariates : array-like of shape (n_rows,) or (n_rows, n_covariates), Series, DataFrame or None
            One row per row of X. Columns without names are called "x0", "x1", ... None for no covariates.
        n_rows : int
            Number of rows of X.
        sample_weight : ndarray of shape (n_rows,) or None
            Weights of the rows; rows of weight 0 are left out.

        Returns
        -------
        Design

        Raises
        ------
        ValueError
            "Covariates of shape ..."; "... rows in covariates ..."; "Missing values in covariates ..."; "inf
            in covariates ..."; "Covariates of dates, ... "; "Covariates of the same name ..."; "Covariates
            that do not vary ..."; "Linearly dependent covariates ..."; "... columns of covariates ...".
        """
        if covariates is None:
            return cls((), {}, np.zeros(0), np.zeros(0))
        frame = _frame(covariates, n_rows)
        weight = np.ones(n_rows) if sample_weight is None else np.asarray(sample_weight, float)
        seen = weight > 0
        frame, weight = frame[seen], weight[seen]
        levels = {name: _levels(frame[name]) for name in frame.columns}
        names = tuple(
            coefficient
            for name, of_column in levels.items()
            for coefficient in _coefficient_names(name, of_column)
        )
        _refuse_many_columns(names, levels, len(frame))
        columns = _coded(frame, levels)
        mean = np.average(columns, axis=0, weights=weight)
        scale = np.sqrt(np.average((columns - mean) ** 2, axis=0, weights=weight))
        _refuse_constants(names, levels, scale, np.abs(columns).max(axis=0))
        _refuse_dependent(names, np.sqrt(weight)[:, None] * (columns - mean) / scale)
        return cls(names, levels, mean, scale)

    def matrix(self, covariates, n_rows):
        """Centred columns of these rows: the means of the fit are subtracted.

        Parameters
        ----------
        covariates : array-like, Series, DataFrame or None
            As in the fit. Columns are matched by name, in any order.
        n_rows : int
            Number of rows of X.

        Returns
        -------
        ndarray of shape (n_rows, p)

        Raises
        ------
        ValueError
            "The fit had covariates ..."; "The fit had no covariates ..."; "Covariates are not those of the
            fit ..."; "Unknown levels ..."; and what `learned` raises about values and shapes.
        """
        if covariates is None:
            if self.levels:
                raise ValueError(
                    f"The fit had covariates, and these rows have none: pass covariates= with the columns "
                    f"{_listed(self.levels)}."
                )
            return np.zeros((n_rows, 0))
        frame = _frame(covariates, n_rows)
        missing = [name for name in self.levels if name not in frame.columns]
        unseen = [name for name in frame.columns if name not in self.levels]
        if unseen and not self.levels:
            raise ValueError(
                f"The fit had no covariates, and these rows have {_listed(unseen)}: fit with covariates, or "
                "leave them out here."
            )
        if missing or unseen:
            differences = [f"missing {_listed(missing)}"] if missing else []
            differences += [f"not seen in the fit {_listed(unseen)}"] if unseen else []
            raise ValueError(
                f"Covariates are not those of the fit: {'; '.join(differences)}. Give the columns "
                f"{_listed(self.levels)}, in any order. Columns of arrays are called x0, x1, ...: after a "
                "fit with named columns give named columns, as a DataFrame has them."
            )
        return _coded(frame[list(self.levels)], self.levels) - self.mean


def _listed(names):
    names = [f"'{name}'" for name in names]
    more = f", ... ({len(names)} in all)" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _coefficient_names(name, levels):
    return [name] if levels is None else [f"{name}[{level}]" for level in levels[1:]]


def _frame(covariates, n_rows):
    """Covariates as a pandas DataFrame with names of type str, without missing values."""
    found = type(covariates).__name__
    if isinstance(covariates, pd.api.extensions.ExtensionArray):
        covariates = pd.Series(covariates)
    if hasattr(type(covariates), "to_frame"):  # Series of pandas and polars
        covariates = covariates.to_frame()
    for attribute in ("column_names", "columns"):  # of pyarrow; of pandas and polars
        if hasattr(type(covariates), attribute):
            names = list(getattr(covariates, attribute))
            break
    else:
        names = None
    if names is None:
        if not isinstance(covariates, np.ndarray):  # a list may hold strings and numbers
            as_type = object if isinstance(covariates, Sequence) else None
            covariates = np.asarray(covariates, as_type)
        if covariates.ndim not in (1, 2):
            raise ValueError(
                f"Covariates of shape {covariates.shape} ({found}): expected an array of shape "
                f"({n_rows},) or ({n_rows}, n_covariates), a Series or a DataFrame, such as "
                "adata.obs[['batch']]."
            )
        frame = pd.DataFrame(covariates)
    elif isinstance(covariates, pd.DataFrame):
        frame = covariates
    else:
        frame = pd.DataFrame({name: np.asarray(covariates[name]) for name in names})
    if names is None or not all(isinstance(name, str) for name in names):
        frame = frame.set_axis([f"x{j}" for j in range(frame.shape[1])], axis=1)
    if not frame.columns.is_unique:
        raise ValueError(
            f"Covariates of the same name: {_listed(frame.columns[frame.columns.duplicated()].unique())}. "
            "They are matched by name: rename them."
        )
    if len(frame) != n_rows:
        raise ValueError(
            f"{len(frame)} rows in covariates, {n_rows} in X: give one row of covariates per row of X."
        )
    _refuse_missing(frame)
    return frame


def _refuse_missing(frame):
    n_missing = {name: int(np.sum(frame[name].isna().to_numpy())) for name in frame.columns}
    where = ", ".join(f"{times} in '{name}'" for name, times in n_missing.items() if times)
    if where:
        raise ValueError(
            f"Missing values in covariates: {where}. Drop these rows, or fill the values in: a category with "
            "a level of its own, such as 'unknown'; a number by what is known of it."
        )


def _levels(column):
    """Levels of a categorical covariate, in order; None for a numeric one."""
    kind = pd.api.types.infer_dtype(column)
    if kind in _NUMERIC:
        return None
    if kind not in _CATEGORICAL:
        raise ValueError(
            f"Covariates of dates, mixed types and other objects are not used: found {kind} in "
            f"'{column.name}'. Give numbers (for a date, days since the first) or categories "
            "(.astype(str), .astype('category'))."
        )
    if isinstance(column.dtype, pd.CategoricalDtype):
        return column.cat.remove_unused_categories().cat.categories.tolist()
    return sorted(column.unique().tolist())


def _coded(frame, levels):
    """Columns of the design before they are centred, (n_rows, p)."""
    parts = [
        _numbers(frame[name]) if of_column is None else _contrasts(frame[name], of_column)
        for name, of_column in levels.items()
    ]
    return np.concatenate([np.zeros((len(frame), 0)), *parts], axis=1)


def _numbers(column):
    kind = pd.api.types.infer_dtype(column)
    if kind not in _NUMERIC:
        raise ValueError(
            f"Covariate '{column.name}' was numeric in the fit, and these rows have values of kind {kind}: "
            "give numbers."
        )
    values = column.to_numpy(float)
    infinite = np.isinf(values)
    if infinite.any():
        raise ValueError(
            f"inf in covariates: {infinite.sum()} in '{column.name}', the first in row "
            f"{np.flatnonzero(infinite)[0]}. Covariates are finite numbers."
        )
    return values[:, None]


def _contrasts(column, levels):
    """Indicators of all levels but the first."""
    code = pd.Index(levels, dtype=object).get_indexer(column.to_numpy(object))
    unknown = column[code < 0]
    if unknown.size:
        raise ValueError(
            f"Unknown levels of the covariate '{column.name}': {_listed(unknown.unique().tolist())}, in "
            f"{unknown.size} rows. The fit knows {_listed(levels)}: fit to rows of all levels "
            "(with a weight above 0), or leave these rows out."
        )
    # by their positions, which keep the order of levels of any type
    encoder = OneHotEncoder(categories=[np.arange(len(levels))], drop="first", sparse_output=False)
    return encoder.fit_transform(code[:, None])


def _refuse_many_columns(names, levels, n_rows):
    if len(names) < n_rows:
        return
    categorical = {name: len(of) for name, of in levels.items() if of is not None}
    largest = max(categorical, key=categorical.get, default=None)
    hint = "" if largest is None else f" '{largest}' alone has {categorical[largest]} levels."
    raise ValueError(
        f"{len(names)} columns of covariates for {n_rows} rows: {_listed(names)}. Coefficients need more "
        f"rows than columns.{hint} Leave out covariates, or levels with few rows."
    )


def _refuse_constants(names, levels, scale, size):
    constant = [name for name, of_column in levels.items() if of_column and len(of_column) == 1]
    constant += [
        name for name, sd, most in zip(names, scale, size, strict=True) if sd <= _TOLERANCE * most
    ]
    if constant:
        raise ValueError(
            f"Covariates that do not vary: {_listed(constant)}. The mean of the log-rates already holds what "
            "all rows share: leave these columns out."
        )


def _refuse_dependent(names, columns):
    """Refuse columns that are linear combinations of others; `columns` are centred and scaled."""
    R, order = qr(columns, mode="r", pivoting=True)
    rank = np.count_nonzero(np.abs(np.diag(R)) > _TOLERANCE * np.abs(R[0, 0])) if names else 0
    if rank == len(names):
        return
    of_others = solve_triangular(R[:rank, :rank], R[:rank, rank:])
    combinations = []
    for j, combination in zip(order[rank:], of_others.T, strict=True):
        others = np.sort(order[:rank][np.abs(combination) > np.sqrt(_TOLERANCE)])
        combinations.append(f"'{names[j]}' follows from {_listed(names[i] for i in others)}")
    raise ValueError(
        f"Linearly dependent covariates: {'; '.join(combinations[:_LISTED])}. Their coefficients cannot be "
        "told apart (as where every batch has one treatment only): leave out one covariate of each set."
    )


def checked_offset(offset, shape, capture_efficiency):
    """Known log-exposures, validated.

    Parameters
    ----------
    offset : array-like of shape (n_cells,), (n_cells, 1) or (n_cells, n_genes), or None
        Logarithms of exposures, in nats.
    shape : tuple of int
        Of the counts.
    capture_efficiency : object
        The estimator's parameter; None for no capture model.

    Returns
    -------
    ndarray of shape (n_cells, 1) or (n_cells, n_genes), or None

    Raises
    ------
    ValueError
        "Offset of shape ..."; "Offset holds values that are no numbers ..."; "Offset holds values that are
        not finite ...".

    Warns
    -----
    UserWarning
        If the values look like exposures, not their logarithms, and if there is a capture model beside.
    """
    if offset is None:
        return None
    try:
        offset = np.asarray(offset, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Offset holds values that are no numbers ({error}): expected logarithms of exposures."
        ) from error
    n_rows, n_genes = shape
    if offset.shape not in ((n_rows,), (n_rows, 1), (n_rows, n_genes)):
        raise ValueError(
            f"Offset of shape {offset.shape}: expected ({n_rows},), one log-exposure per row of X, or "
            f"({n_rows}, {n_genes}), one per count."
        )
    offset = offset.reshape(n_rows, -1)
    bad = ~np.isfinite(offset)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise ValueError(
            f"Offset holds values that are not finite: {bad.sum()} of them, the first "
            f"{offset[row, column]:g} in row {row}, column {column}. Where the exposure is 0 nothing can be "
            "counted, and it has no logarithm: leave such rows out."
        )
    _warn_about_exposure(offset)
    if capture_efficiency is not None:
        warnings.warn(
            "Both an offset and a capture model are given: the exposure is known, and the capture offset of "
            "each row would be estimated beside it. With a known exposure one usually sets "
            "capture_efficiency=None.",
            UserWarning,
            stacklevel=user_stacklevel(),
        )
    return offset


def _warn_about_exposure(offset):
    largest = offset.max(initial=-np.inf)
    whole = offset.any() and np.array_equal(offset, np.round(offset))
    if not whole and largest <= _LARGEST_LOG_EXPOSURE:
        return
    found = "whole numbers" if whole else f"values up to {largest:g}"
    warnings.warn(
        f"The offset looks like the exposure itself ({found}): expected its logarithm, since it is added to "
        "the log-rates. Give np.log(exposure).",
        UserWarning,
        stacklevel=user_stacklevel(),
    )

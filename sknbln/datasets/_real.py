"""The real data set that ships with the package."""

from importlib import resources
from typing import Any, Literal, overload

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.utils import Bunch
from sklearn.utils._param_validation import validate_params

from .._typing import keeping_hints


@overload
def load_immune_cells(*, return_X_y: Literal[False] = False, as_frame: bool = False) -> Bunch: ...


@overload
def load_immune_cells(*, return_X_y: Literal[True], as_frame: bool = False) -> tuple[Any, Any]: ...


@keeping_hints(
    validate_params(
        {"return_X_y": ["boolean"], "as_frame": ["boolean"]},
        prefer_skip_nested_validation=True,
    )
)
def load_immune_cells(
    *, return_X_y: bool = False, as_frame: bool = False
) -> Bunch | tuple[Any, Any]:
    """Load 600 immune cells x 300 genes of single-cell RNA-seq counts, with cell types.

    Three annotated types (CD4+ T cells, CD8+ T cells, macrophages); two of them are close to each
    other, one is far from both. The genes are the 300 most abundant of the source, and two thirds
    of the entries are not zero.

    =================   ==========================================
    Cells (rows)        600
    Genes (columns)     300
    Cell types          3 (212 CD4+, 235 CD8+, 153 macrophages)
    Counts              non-negative integers, as counted
    =================   ==========================================

    Parameters
    ----------
    return_X_y : bool, default=False
        If True, return ``(data, target)`` instead of a Bunch.

    as_frame : bool, default=False
        If True, `data` is a dense :class:`pandas.DataFrame` with the gene symbols as columns and
        `target` a :class:`pandas.Series`.

    Returns
    -------
    data : :class:`~sklearn.utils.Bunch`
        Dictionary-like object, with the attributes

        data : CSR array of shape (600, 300), int32, or DataFrame if `as_frame`
            Counts, cells by genes.
        target : ndarray of str of shape (600,), or Series if `as_frame`
            Cell types.
        target_names : ndarray of str of shape (3,)
            The distinct cell types, sorted.
        feature_names : ndarray of str of shape (300,)
            Gene symbols, by falling abundance in the source.
        library_size : ndarray of int64 of shape (600,)
            Total count of each cell over all 3000 genes of the source. It is this total, not the
            row sum of `data`, that tells how much of a cell was captured.
        frame : DataFrame of shape (600, 301), or None
            `data` and `target` side by side, if `as_frame`.
        DESCR : str
            Source of the data and how this subset was made.

    (data, target) : tuple
        Returned if `return_X_y`.

    Notes
    -----
    Source: the ``scRT`` data distributed with pyPLNmodels 1.0.10
    (https://github.com/PLN-team/pyPLNmodels), MIT licence, Copyright 2022 Bastien Batardiere;
    itself a subset of scMARK [1]_. `DESCR` says how this subset was made.

    References
    ----------
    .. [1] Swechha, D. Mendonca, O. Focsa, J. J. Diaz-Mejia and S. Cooper, "scMARK an 'MNIST' like
       benchmark to evaluate and optimize models for unifying scRNA data",
       https://zenodo.org/records/5765804

    Examples
    --------
    >>> from sknbln.datasets import load_immune_cells
    >>> cells = load_immune_cells()
    >>> cells.data.shape
    (600, 300)
    >>> [str(name) for name in cells.target_names]
    ['Macrophages', 'T_cells_CD4+', 'T_cells_CD8+']
    """
    folder = resources.files(__package__) / "data"
    with (folder / "immune_cells.npz").open("rb") as file, np.load(file) as arrays:
        data = sparse.csr_array(
            (arrays["data"], arrays["indices"], arrays["indptr"]),
            shape=tuple(int(n) for n in arrays["shape"]),
        )
        target_names = arrays["target_names"]
        target = target_names[arrays["target"]]
        feature_names = arrays["feature_names"]
        library_size = arrays["library_size"]

    frame = None
    if as_frame:
        data = pd.DataFrame(data.toarray(), columns=feature_names)
        target = pd.Series(target, name="cell_type")
        frame = pd.concat([data, target], axis=1)
    if return_X_y:
        return data, target
    return Bunch(
        data=data,
        target=target,
        target_names=target_names,
        feature_names=feature_names,
        library_size=library_size,
        frame=frame,
        DESCR=(folder / "README.md").read_text(encoding="utf-8"),
    )

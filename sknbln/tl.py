"""Models of the counts in an AnnData object, in scanpy's manner: results are written into the object.

The package anndata is not imported: objects only have to have its attributes.
"""

from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.sparse import csr_matrix, issparse

from ._nbln import NBLNEstimator
from ._nbvcp import NBVCPEstimator
from ._progress import LOG
from ._typing import AnnData
from ._values import Values, n_fractional

__all__ = ["nbln", "nbvcp", "project"]

_HIGHLY_VARIABLE = "highly_variable"
_LOOKED_AT = 2000  # rows in which counts are told from other values


def nbln(
    adata: AnnData,
    *,
    layer: str | None = None,
    n_components: int | Literal["auto"] = "auto",
    batch_key: str | None = None,
    covariate_keys: str | list[str] | None = None,
    mask_var: str | ArrayLike | None = _HIGHLY_VARIABLE,
    key_added: str = "nbln",
    copy: bool = False,
    return_estimator: bool = False,
    **estimator_parameters: Any,
) -> Any:
    """Fit `NBLNEstimator` to the counts of an AnnData object and write the results into it.

    Parameters
    ----------
    adata : AnnData of shape (n_cells, n_genes)
        Cells and genes, in memory or backed, with raw counts in ``X`` or in a layer.
    layer : str or None, default=None
        Layer of the counts; None is ``adata.X``.
    n_components : "auto" or int, default="auto"
        The `latent_dim` of the estimator: number of factors, found from the data by default.
    batch_key : str or None, default=None
        Column of ``adata.obs`` with the batches, taken as categories whatever its type. Their shifts of each
        gene are estimated with the factors and taken out of the embedding.
    covariate_keys : str, list of str or None, default=None
        Columns of ``adata.obs`` with other covariates, as in :meth:`NBLNEstimator.fit`.
    mask_var : str, array-like of bool of shape (n_genes,) or None, default="highly_variable"
        Genes to use: a column of ``adata.var`` or a mask. The default takes all genes if there is no such
        column; None takes all genes.
    key_added : str, default="nbln"
        Name under which the results are written.
    copy : bool, default=False
        Write into a copy of `adata`, in memory, and return it.
    return_estimator : bool, default=False
        Return the fitted estimator, which :func:`project` takes.
    **estimator_parameters
        Other parameters of `NBLNEstimator`, such as ``random_state`` or ``informative_prior_estimator``.

    Returns
    -------
    adata, estimator or None
        The copy if `copy`, the fitted estimator if `return_estimator`, both as a tuple, or None. Written are

        ``obsm["X_nbln"]`` : (n_cells, n_factors)
            Embedding: principal coordinates of the log-rates, nats.
        ``varm["nbln"]`` : (n_genes, n_factors)
            Loadings (``components_``), nats; 0 for genes that were not used.
        ``var["nbln_mean"]``, ``var["nbln_dispersion"]``, ``var["nbln_noise"]``
            Mean log-rate, dispersion r, and variance of the log-rate that the factors leave; NaN for genes
            that were not used.
        ``obs["capture_offset"]``
            Capture offset of each cell, nats.
        ``uns["nbln"]``
            ``params``, ``score`` (mean log-likelihood per cell of the cells themselves), ``rank``,
            ``converged``, ``n_iter``, ``variance`` and ``variance_ratio`` of the factors.

    Raises
    ------
    ValueError
        If the values are not counts: negative, fractional, or all rows with one total. The message names the
        layers that look like counts.
    KeyError
        If there is no such layer, column of ``adata.obs`` or column of ``adata.var``.

    See Also
    --------
    project : Embed other cells by a fit.

    Notes
    -----
    All objects that are written can be saved in h5ad files; the estimator is not among them. Save it by
    ``joblib.dump`` if it is needed again.

    Examples
    --------
    >>> import anndata, sknbln
    >>> from sknbln.datasets import make_nbln_counts
    >>> counts = make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=0).data
    >>> adata = anndata.AnnData(counts)
    >>> sknbln.tl.nbln(adata, random_state=0)
    >>> adata.obsm["X_nbln"].shape
    (150, 2)
    """
    if "latent_dim" in estimator_parameters:
        raise TypeError("nbln() takes the number of factors as n_components, found latent_dim.")
    estimator = NBLNEstimator(n_components, **estimator_parameters)
    keys = dict(batch_key=batch_key, covariate_keys=covariate_keys, layer=layer)
    adata, genes, rows = _fitted(estimator, adata, mask_var, key_added, copy, keys)
    adata.obsm[f"X_{key_added}"] = estimator.transform(**rows)
    adata.varm[key_added] = _spread(estimator.components_.T, genes, adata.n_vars, 0.0)
    noise = _spread(estimator.noise_variance_, genes, adata.n_vars, np.nan)
    adata.var[f"{key_added}_noise"] = noise
    adata.uns[key_added] |= {
        "params": _storable({"n_components": n_components, **keys, **estimator_parameters}),
        "rank": int(np.sum(estimator.explained_variance_ > 0)),
        "variance": estimator.explained_variance_,
        "variance_ratio": estimator.explained_variance_ratio_,
    }
    return _returned(adata, estimator, copy, return_estimator)


def nbvcp(
    adata: AnnData,
    *,
    layer: str | None = None,
    batch_key: str | None = None,
    covariate_keys: str | list[str] | None = None,
    mask_var: str | ArrayLike | None = _HIGHLY_VARIABLE,
    key_added: str = "nbvcp",
    copy: bool = False,
    return_estimator: bool = False,
    **estimator_parameters: Any,
) -> Any:
    """Fit `NBVCPEstimator` to the counts of an AnnData object and write the results into it.

    Parameters
    ----------
    adata, layer, batch_key, covariate_keys, mask_var, key_added, copy, return_estimator
        As in :func:`nbln`.
    **estimator_parameters
        Parameters of `NBVCPEstimator`.

    Returns
    -------
    adata, estimator or None
        As in :func:`nbln`. Written are ``var["nbvcp_mean"]`` (mean count at full capture),
        ``var["nbvcp_dispersion"]``, ``obs["capture_offset"]`` and ``uns["nbvcp"]`` with ``params``,
        ``score``, ``converged`` and ``n_iter``.

    Raises
    ------
    ValueError, KeyError
        As :func:`nbln`.

    Examples
    --------
    >>> import anndata, sknbln
    >>> from sknbln.datasets import make_nbln_counts
    >>> counts = make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=0).data
    >>> adata = anndata.AnnData(counts)
    >>> sknbln.tl.nbvcp(adata, random_state=0)
    >>> list(adata.var)
    ['nbvcp_mean', 'nbvcp_dispersion']
    """
    estimator = NBVCPEstimator(**estimator_parameters)
    keys = dict(batch_key=batch_key, covariate_keys=covariate_keys, layer=layer)
    adata, _, _ = _fitted(estimator, adata, mask_var, key_added, copy, keys)
    adata.uns[key_added] |= {"params": _storable({**keys, **estimator_parameters})}
    return _returned(adata, estimator, copy, return_estimator)


def project(
    adata: AnnData,
    estimator: NBLNEstimator,
    *,
    layer: str | None = None,
    key_added: str = "nbln",
    copy: bool = False,
) -> AnnData | None:
    """Embed the cells of an AnnData object by an estimator that :func:`nbln` fitted to others.

    Parameters
    ----------
    adata : AnnData
        The new cells. The genes of the fit are taken by name; the columns of ``adata.obs`` that were batch
        and covariates of the fit have to be there.
    estimator : NBLNEstimator
        Fitted by :func:`nbln` with ``return_estimator=True``.
    layer : str or None, default=None
        Layer of the counts; None is ``adata.X``.
    key_added : str, default="nbln"
        The embedding is written to ``obsm["X_" + key_added]``.
    copy : bool, default=False
        Write into a copy of `adata` and return it.

    Returns
    -------
    AnnData or None
        The copy if `copy`.

    Raises
    ------
    ValueError
        If genes of the fit are missing from `adata`, or if the values are not counts.
    TypeError
        If the estimator was not fitted by :func:`nbln`.

    Examples
    --------
    >>> import anndata, sknbln
    >>> from sknbln.datasets import make_nbln_counts
    >>> counts = make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=0).data
    >>> adata = anndata.AnnData(counts)
    >>> model = sknbln.tl.nbln(adata, random_state=0, return_estimator=True)
    >>> new = adata[:10, ::-1].copy()
    >>> sknbln.tl.project(new, model)
    >>> new.obsm["X_nbln"].shape
    (10, 2)
    """
    fitted_on = getattr(estimator, "anndata_", None)
    if not isinstance(estimator, NBLNEstimator) or fitted_on is None:
        raise TypeError(
            "project() takes an NBLNEstimator that sknbln.tl.nbln(adata, return_estimator=True) returned, "
            f"found {type(estimator).__name__}. One that was fitted to a matrix knows no gene names: use its "
            "transform()."
        )
    adata = _writable(adata, copy)
    genes = adata.var_names.get_indexer(fitted_on["var_names"])
    if (genes < 0).any():
        missing = np.asarray(fitted_on["var_names"])[genes < 0]
        named = ", ".join(repr(str(gene)) for gene in missing[:3])
        raise ValueError(
            f"{missing.size} of the {genes.size} genes of the fit are missing from adata.var_names, such as "
            f"{named}. Give an object with all of them; NaN stands for a count that was not seen."
        )
    counts = _counts(adata, layer, genes)
    covariates = _covariates(adata, fitted_on["batch_key"], fitted_on["covariate_keys"])
    adata.obsm[f"X_{key_added}"] = estimator.transform(counts, covariates=covariates)
    return adata if copy else None


def _fitted(estimator, adata, mask_var, key, copy, keys):
    """Fit an estimator and write what both have.

    Returned are the object that is written to, the positions of its genes that were used, and the arguments
    of methods that take rows.
    """
    covariates = _covariates(adata, keys["batch_key"], keys["covariate_keys"])
    genes = _genes(adata, mask_var)
    rows = dict(X=_counts(adata, keys["layer"], genes), covariates=covariates)
    estimator.fit(**rows)
    estimator.anndata_ = {**keys, "var_names": np.asarray(adata.var_names[genes])}
    uns = {
        "score": float(estimator.score(**rows)),
        "converged": bool(estimator.converged_),
        "n_iter": int(estimator.n_iter_),
    }
    adata = _writable(adata, copy)
    for name, values in (("mean", estimator.mean_), ("dispersion", estimator.dispersion_)):
        adata.var[f"{key}_{name}"] = _spread(values, genes, adata.n_vars, np.nan)
    adata.obs["capture_offset"] = estimator.capture_offset_
    adata.uns[key] = uns
    return adata, genes, rows


def _writable(adata, copy):
    """The object that results are written to; a view becomes an object of its own, as in scanpy."""
    if copy:
        return adata.to_memory() if adata.isbacked else adata.copy()
    if adata.is_view:
        adata._init_as_actual(adata.copy())
    return adata


def _genes(adata, mask_var):
    """Positions of the genes to use."""
    if mask_var is None or (
        isinstance(mask_var, str) and mask_var == _HIGHLY_VARIABLE and mask_var not in adata.var
    ):
        return np.arange(adata.n_vars)
    if isinstance(mask_var, str):
        mask = _column(adata.var, mask_var, "var")
    else:
        mask = mask_var
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.shape != (adata.n_vars,):
        raise ValueError(
            f"mask_var has to be a column or an array of {adata.n_vars} booleans, one per gene, found shape "
            f"{mask.shape} of {mask.dtype}."
        )
    if not mask.any():
        raise ValueError("mask_var leaves no gene.")
    genes = np.flatnonzero(mask)
    name = f"adata.var[{mask_var!r}]" if isinstance(mask_var, str) else "mask_var"
    LOG.info("%d of %d genes are used, those in %s", genes.size, adata.n_vars, name)
    return genes


def _column(frame, key, name):
    if key not in frame:
        raise KeyError(f"adata.{name} has no column {key!r}; it has {', '.join(frame.columns)}.")
    return frame[key]


def _covariates(adata, batch_key, covariate_keys):
    """Data frame of the batch, as a category, and other covariates; None without any."""
    covariate_keys = [covariate_keys] if isinstance(covariate_keys, str) else covariate_keys
    columns = {key: _column(adata.obs, key, "obs") for key in covariate_keys or ()}
    if batch_key is not None:
        batch = _column(adata.obs, batch_key, "obs")
        if not isinstance(batch.dtype, pd.CategoricalDtype):
            batch = batch.astype(str).where(batch.notna())
        columns = {batch_key: batch, **columns}
    return pd.DataFrame(columns) if columns else None


def _layers(adata):
    """Names of the layers; from AnnData 0.13 X is the layer None too."""
    return [name for name in adata.layers if name is not None]


def _matrix(adata, layer):
    if layer is None:
        return adata.X
    if layer not in adata.layers:
        raise KeyError(
            f"adata has no layer {layer!r}; its layers are {', '.join(_layers(adata)) or 'none'}."
        )
    return adata.layers[layer]


def _counts(adata, layer, genes):
    """Counts of genes at these positions."""
    place = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    whole = _matrix(adata, layer)
    if whole is None:
        raise ValueError(f"{place} is empty. {_where_counts_are(adata)}")
    reason = _not_counts(whole)
    if reason is not None:
        raise ValueError(
            f"{place} does not hold counts: {reason}. {_where_counts_are(adata)} (A table that was rarefied "
            "to one depth can be given to the estimators as a matrix.)"
        )
    if genes.size == adata.n_vars and np.array_equal(genes, np.arange(genes.size)):
        return whole
    return _matrix(adata[:, genes], layer)


def _not_counts(matrix):
    """Why the values of a matrix are not counts, or None if they are."""
    rows = matrix[: min(matrix.shape[0], _LOOKED_AT)]
    values = rows.data if issparse(rows) else np.asarray(rows).ravel()
    values = values[~np.isnan(values)] if values.dtype.kind == "f" else values
    if values.size and values.min() < 0:
        return f"it has negative values ({values.min():g})"
    fractional = n_fractional(values)
    if fractional:
        example = values[values != np.floor(values)][0]
        return f"{fractional} of {values.size} values are fractional ({example:g}), as after normalizing"
    looked_at = Values("", fitting=True)
    looked_at.add(csr_matrix(rows, dtype=float))
    if looked_at.same_depth() is not None:
        return "all rows have nearly the same total, as after normalizing"
    return None


def _where_counts_are(adata):
    layers = [name for name in _layers(adata) if _not_counts(adata.layers[name]) is None]
    if layers:
        names = ", ".join(map(repr, layers))
        return f"Layers that look like counts: {names}; pass layer={layers[0]!r}."
    if adata.X is not None and _not_counts(adata.X) is None:
        return "adata.X looks like counts: pass layer=None."
    if adata.raw is not None and _not_counts(adata.raw.X) is None:
        return "adata.raw looks like counts: pass adata.raw.to_adata()."
    return "No layer looks like counts: load the raw counts."


def _spread(values, genes, n_genes, empty):
    """The values of some genes in an array for all of them."""
    whole = np.full((n_genes, *values.shape[1:]), empty)
    whole[genes] = values
    return whole


def _storable(parameters):
    """Parameters that h5ad files can hold: None is left out, objects are replaced by their text."""
    kept = {name: value for name, value in parameters.items() if value is not None}
    plain = (str, bool, int, float, np.number)

    def stored(value):
        if isinstance(value, (list, tuple)):
            return [stored(v) for v in value] if len(value) else "()"
        return value if isinstance(value, plain) else str(value)

    return {name: stored(value) for name, value in kept.items()}


def _returned(adata, estimator, copy, return_estimator):
    if copy and return_estimator:
        return adata, estimator
    return adata if copy else estimator if return_estimator else None

"""Simulated counts on disk, drawn and written a chunk of rows at a time; how a fit gets them."""

import contextlib
from pathlib import Path

import numpy as np
from _common import CAPTURE
from scipy import sparse

#: entries of the dense rates of a chunk, 8 bytes each
_CHUNK_ENTRIES = 2**23


def write(path, n_cells, n_genes, depth):
    """Write AnnData's sparse `X` to an h5ad or zarr file; returns loadings, capture prior, counts > 0."""
    truth, sizes, nonzero = _genes(n_cells, n_genes), [], 0
    with _group(path, "w") as group:
        for chunk in _chunks(truth, n_cells, depth):
            _append(group, chunk)
            nonzero += chunk.nnz
            sizes.append(np.asarray(chunk.sum(axis=1)).ravel())
    log_m0 = CAPTURE[0] - np.log(depth) + np.log(np.median(np.concatenate(sizes)))
    return truth.loadings, (log_m0, CAPTURE[1]), nonzero


@contextlib.contextmanager
def opened(path, where):
    """The counts of a file: "disk", "memory", or "dask", in chunks of what the workers hold easily."""
    import anndata

    with _group(path, "r") as group:
        X = anndata.io.sparse_dataset(group["X"])
        if where == "memory":
            yield X.to_memory()
        elif where == "disk":
            yield X
        else:
            rows = max(2**22 // X.shape[1], 1)
            yield anndata.experimental.read_elem_lazy(group["X"], chunks=(rows, X.shape[1]))


@contextlib.contextmanager
def _group(path, mode):
    if Path(path).suffix == ".zarr":
        import zarr

        yield zarr.open_group(path, mode=mode)
        return
    import h5py

    with h5py.File(path, mode) as file:
        yield file


def _append(group, chunk):
    import anndata

    if "X" in group:
        anndata.io.sparse_dataset(group["X"]).append(chunk)
    else:
        anndata.io.write_elem(group, "X", chunk)


def _genes(seed, n_genes):
    """The true parameters: those of `make_nbln_counts` of this seed, whatever the number of cells."""
    from sknbln.datasets import make_nbln_counts

    return make_nbln_counts(1, n_genes, capture_mean=CAPTURE[0], random_state=seed)


def _chunks(truth, n_cells, depth):
    """Chunks of rows of the model, as CSR of int32."""
    rng, n_genes = np.random.default_rng(n_cells), truth.mean.size
    size = max(_CHUNK_ENTRIES // n_genes, 1)
    for start in range(0, n_cells, size):
        n = min(size, n_cells - start)
        offset = np.maximum(rng.normal(CAPTURE[0] - np.log(depth), CAPTURE[1], (n, 1)), 0.0)
        x = rng.standard_normal((n, n_genes)) * np.sqrt(truth.noise_variance)
        x += truth.mean - offset
        x += rng.standard_normal((n, truth.loadings.shape[1])) @ truth.loadings.T
        rate = np.exp(x) * rng.gamma(truth.dispersion, 1 / truth.dispersion, x.shape)
        yield sparse.csr_matrix(rng.poisson(rate).astype(np.int32))

"""Dask arrays: chunks of rows that are read here, or solved where they are, on the workers of a cluster."""

import contextlib
import itertools
import os
import sys
import threading
from collections import deque

import jax
import numpy as np
import scipy.sparse as sp
from sklearn.utils import _safe_indexing

from ._blocks import BLOCK_ENTRIES, StoredRows, as_csr
from ._jax import give_back, of_libc

# of glibc's malloc: what sets its thresholds, their numbers, and those with which it keeps what is freed: all
# at the end of the heap, which arrays of less than 32 MB are in
_MALLOPT, _TRIM_THRESHOLD, _MMAP_THRESHOLD = of_libc("mallopt"), -1, -3
_KEEPING = {_TRIM_THRESHOLD: 2**30, _MMAP_THRESHOLD: 2**25}
_STARTING = threading.Lock()
_STARTED: list[int] = []  # numbers of threads with which JAX was started here


def is_dask(X):
    """Whether X is a Dask array."""
    return all(hasattr(type(X), name) for name in ("__dask_graph__", "to_delayed", "chunks"))


def chunks_of_rows(name, X):
    """The chunks of a Dask array as `Delayed` objects, and their slices of rows.

    Raises
    ------
    ValueError
        If chunks are of some genes, or of unknown size.
    """
    sizes, columns = X.chunks
    if len(columns) > 1:
        raise ValueError(
            f"{name} expects a Dask array in chunks of rows, found {len(columns)} chunks of columns. Give "
            "X.rechunk({1: -1})."
        )
    if np.isnan(X.shape).any():
        raise ValueError(
            f"{name} expects a Dask array of known shape, found {X.shape}: its chunks are of unknown size. "
            "Give X.compute_chunk_sizes()."
        )
    stops = np.cumsum(sizes).tolist()
    rows = [slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
    return [
        (chunk, part)
        for chunk, part in zip(X.to_delayed().ravel(), rows, strict=True)
        if part.stop > part.start
    ]


def transformed(model, X, covariates, offset, n_columns):
    """``model.transform`` of a Dask array as a Dask array, computed chunk by chunk when it is asked for.

    Parameters
    ----------
    model : fitted estimator
        It goes to the workers.
    X : Dask array of shape (n_cells, n_genes)
    covariates, offset
        Of the rows, as in `fit`, or None.
    n_columns : int
        Of the result.
    """
    import dask
    import dask.array as da

    chunks, model = chunks_of_rows(type(model).__name__, X), dask.delayed(model)
    parts = [
        da.from_delayed(
            dask.delayed(_transformed)(
                model, chunk, *(_rows_of(a, rows) for a in (covariates, offset)), rows.start
            ),
            (rows.stop - rows.start, n_columns),
            float,
        )
        for chunk, rows in chunks
    ]
    return da.concatenate(parts)


def _rows_of(a, rows):
    return a if a is None else _safe_indexing(a, np.arange(rows.start, rows.stop))


def _transformed(model, chunk, covariates, offset, start):
    try:
        with tuned_worker():
            return model.transform(chunk, covariates=covariates, offset=offset)
    except ValueError as error:
        error.add_note(
            f"Rows are counted from row {start}, the first of a chunk of the Dask array."
        )
        raise


class DaskRows(StoredRows):
    """Rows of a Dask array: a block is one or more of its chunks, computed when it is needed.

    Parameters
    ----------
    chunks : list of (Delayed, slice)
        As :func:`chunks_of_rows` returns them.
    shape : tuple (n_cells, n_genes)
    missing : bool
        Whether NaN is a count that was not seen.
    """

    def __init__(self, chunks, shape, missing):
        self._chunks = chunks
        size, borders = BLOCK_ENTRIES // max(shape[1], 1), [0]
        for (_, part), (_, following) in itertools.pairwise([*chunks, (None, None)]):
            if following is None or following.stop - borders[-1] > size:
                borders.append(part.stop)
        super().__init__(self._compute, shape, borders, missing)

    def _compute(self, start, stop):
        import dask

        chunks = [chunk for chunk, part in self._chunks if start <= part.start < stop]
        return sp.vstack([as_csr(X) for X in dask.compute(*chunks)], format="csr")

    def cluster(self):
        """The `Cluster` of the active client; None where there is none."""
        distributed = sys.modules.get("distributed")
        if distributed is None:
            return None
        try:
            return Cluster(distributed.default_client(), self._chunks)
        except ValueError:  # no client
            return None


class Cluster:
    """Workers that compute functions of chunks of rows, each where the chunk is.

    A worker that dies costs what it had not sent yet: Dask computes it again.
    """

    def __init__(self, client, chunks):
        self._client, self.chunks = client, chunks

    def in_order(self, function, common, tasks):
        """Yield ``rows, function(chunk, common, *task)`` of each ``(chunk, rows), task`` in order."""
        client, ahead = self._client, deque()
        most = 2 * max(sum(client.nthreads().values()), 1)
        # a task like others, not scattered data: it is there again after the death of a worker
        common = client.submit(_same, common, pure=False)
        try:
            for (chunk, rows), task in tasks:
                future = client.submit(function, client.compute(chunk), common, *task, pure=False)
                ahead.append((rows, future))
                if len(ahead) > most:
                    rows, future = ahead.popleft()
                    yield rows, future.result()
            while ahead:
                rows, future = ahead.popleft()
                yield rows, future.result()
        finally:
            for _, future in ahead:
                future.cancel()


def _same(value):
    return value


@contextlib.contextmanager
def tuned_worker():
    """What a worker's task runs in: a pass takes a third to a half less where that is a process of its own.

    JAX starts with as many threads as the worker has: with one for each processor of the machine, those of
    all workers wait for each other in every small loop. And malloc keeps what the task frees until its end,
    or that of the first of several: Dask has its workers return it to the system at once, so that the pages
    of every new array are cleared.
    """
    worker = _worker()
    if worker is None:
        yield
        return
    _start_jax(worker.state.nthreads)
    thresholds = _malloc_thresholds()
    for option in thresholds:
        _MALLOPT(option, _KEEPING[option])
    try:
        yield
    finally:
        for option, value in thresholds.items():
            _MALLOPT(option, value)
        give_back()


def _worker():
    """The worker that runs this task; None elsewhere, and where the process is shared with its client."""
    distributed = sys.modules.get("distributed")
    if distributed is None:
        return None
    try:
        worker = distributed.get_worker()
    except ValueError:
        return None
    return worker if worker.nanny is not None else None


def _start_jax(n_threads):
    """JAX with this number of threads, unless it has started, or the environment says how many."""
    with _STARTING:
        if _STARTED or "NPROC" in os.environ:
            return
        _STARTED.append(n_threads)
        os.environ["NPROC"] = str(n_threads)  # XLA reads it when it starts
        try:
            jax.local_devices()
        finally:
            os.environ.pop("NPROC", None)


def _malloc_thresholds():
    """Thresholds of malloc that the environment sets, in bytes; none where malloc has its own defaults."""
    trim = os.environ.get("MALLOC_TRIM_THRESHOLD_", "")
    if _MALLOPT is None or not trim.isdecimal():
        return {}
    mmap = os.environ.get("MALLOC_MMAP_THRESHOLD_", "")
    found = {_TRIM_THRESHOLD: int(trim), _MMAP_THRESHOLD: int(mmap) if mmap.isdecimal() else 2**17}
    largest = 2**31 - 1  # number that mallopt takes
    return {option: min(value, largest) for option, value in found.items()}

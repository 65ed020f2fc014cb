"""Wide and long: a whole count matrix, or simulated cells by the ten thousand.

    python benchmarks/scale.py --cells 10000 30000 100000 [--genes 1000] [--depth 1] [--json FILE]
    python benchmarks/scale.py --counts counts.npz --latent-dim 10 [--capture LOG_M0 SIGMA]
    python benchmarks/scale.py --cells 1000000 --depth 0.05 --out-of-core h5ad [--in-memory] [--dask 2]

``--counts`` is a CSR matrix as `scipy.sparse.save_npz` writes it. Each fit has a process of its own;
what is simulated is drawn there in chunks, as CSR. ``--device cpu`` or ``--device cuda`` asks JAX for
that platform; the devices that are used are printed. ``--warm`` fits both models a second time, when all is
compiled; ``--cells 100000 1000000 --device cuda --warm`` is what a GPU is measured by.

"NBVCP MB" and "NBLN MB" are above what the process had with the counts, "all MB" above what it had without.
``--out-of-core`` writes the simulated counts to a file first, a chunk at a time, and fits them from there:
the whole matrix is never in memory. ``--in-memory`` fits the same counts in memory too, and ``--dask N``
as a Dask array on N local worker processes of one thread each.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path

import _process
import _stored
import numpy as np
from _common import CAPTURE, capture_prior, describe, environment, off_diagonals, table, write_json
from _methods import OURS

COLUMNS = {
    "rows": "where",
    "cells": "cells",
    "genes": "genes",
    "counts > 0": "nonzero",
    "NBVCP s": "nbvcp_s",
    "NBLN s": "nbln_s",
    "sum s": "sum_s",
    "CPU s": "cpu_s",
    "compile s": "compile_s",
    "NBVCP MB": "nbvcp_memory_mb",
    "NBLN MB": "nbln_memory_mb",
    "all MB": "memory_mb",
    "process MB": "process_memory_mb",
    "NBVCP steps": "nbvcp_iterations",
    "NBLN sweeps": "iterations",
    "warm NBVCP s": "nbvcp_warm_s",
    "warm NBLN s": "nbln_warm_s",
    "converged": "converged",
    "corr": "correlation",
}


def measure(request):
    """Both fits of one matrix, in a worker process; or write the matrix to a file."""
    if "write" in request:
        loadings, prior, nonzero = _stored.write(
            request["write"], *(request[name] for name in ("cells", "genes", "depth"))
        )
        return {"loadings": loadings.tolist(), "capture": prior, "nonzero": nonzero}
    import sknbln  # noqa: F401, its memory is that of the program

    program = _process.PeakMemory()
    if "file" not in request:
        result = both_fits(request, *counts(request))
    else:
        loadings, prior = np.array(request["loadings"]), tuple(request["capture"])
        with workers(request), _stored.opened(request["file"], request["where"]) as X:
            result = {"nonzero": request["nonzero"]} | both_fits(request, X, loadings, prior)
    result["memory_mb"] = result["process_memory_mb"] - program.baseline
    return result


@contextlib.contextmanager
def workers(request):
    """A Dask cluster of processes on this machine, where the request asks for one."""
    if not request.get("dask"):
        yield
        return
    from distributed import Client, LocalCluster

    options = dict(n_workers=request["dask"], threads_per_worker=1, dashboard_address=None)
    with LocalCluster(host="127.0.0.1", **options) as cluster, Client(cluster):
        yield


def both_fits(request, X, loadings, prior):
    """Times, memory and quality of both fits."""
    import jax
    from sklearn.base import clone

    from sknbln import NBLNEstimator, NBVCPEstimator

    compilation = Compilation()
    result = {
        "where": request.get("where", "memory"),
        "devices": [str(d) for d in jax.devices()],
        "cells": X.shape[0],
        "genes": X.shape[1],
    }
    if hasattr(X, "nnz"):
        parts = (X.data, X.indices, X.indptr)
        result |= {"nonzero": int(X.nnz), "matrix_mb": sum(a.nbytes for a in parts) / 1e6}
    first = _process.PeakMemory()
    start, cpu = time.perf_counter(), time.process_time()
    source = NBVCPEstimator(capture_efficiency=prior, random_state=0).fit(X)
    result["nbvcp_s"] = time.perf_counter() - start
    result["nbvcp_compile_s"] = compilation.seconds
    result["nbvcp_memory_mb"] = first.over_baseline()
    peak = first.peak()

    second = _process.PeakMemory()
    start = time.perf_counter()
    options = {"latent_dim": request["latent_dim"], **OURS[request["setting"]]}
    model = NBLNEstimator(informative_prior_estimator=source, random_state=0, **options).fit(X)
    result["nbln_s"] = time.perf_counter() - start
    result["nbln_memory_mb"] = second.peak() - first.baseline
    result |= {
        "sum_s": result["nbvcp_s"] + result["nbln_s"],
        "cpu_s": time.process_time() - cpu,  # of this process: not of the workers of a cluster
        "compile_s": compilation.seconds,
        "nbln_compile_s": compilation.seconds - result["nbvcp_compile_s"],
        "compilations": compilation.count,
        "process_memory_mb": max(peak, second.peak()),
        "memory_baseline_mb": first.baseline,
        "memory_exact": first.exact,
        "nbvcp_iterations": source.n_iter_,
        "iterations": model.n_iter_,
        "converged": bool(source.converged_ and model.converged_),
    }
    if request["warm"]:
        start = time.perf_counter()
        again = clone(source).fit(X)
        result["nbvcp_warm_s"] = time.perf_counter() - start
        start = time.perf_counter()
        clone(model).set_params(informative_prior_estimator=again).fit(X)
        result["nbln_warm_s"] = time.perf_counter() - start
    if loadings is not None:
        result["correlation"], result["slope"] = off_diagonals(model.components_.T, loadings)
    return result


def counts(request):
    """CSR counts, true loadings or None, capture prior."""
    if "counts" in request:
        from scipy import sparse

        prior = request["capture"]
        X = sparse.csr_array(sparse.load_npz(request["counts"]))
        return X, None, prior if prior == "auto" else tuple(prior)
    from sknbln.datasets import make_nbln_counts

    n, depth = request["cells"], request["depth"]
    sim = make_nbln_counts(
        n, request["genes"], depth=depth, capture_mean=CAPTURE[0], random_state=n
    )
    return sim.data, sim.loadings, capture_prior(sim.data, depth)


class Compilation:
    """Counts what JAX compiles from now on, and the seconds of XLA."""

    def __init__(self):
        import jax.monitoring

        self.count, self.seconds = 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1
            self.seconds += seconds


def slope(cells, seconds):
    """Slope of log seconds in log cells: 1 is linear."""
    return float(np.polyfit(np.log(cells), np.log(seconds), 1)[0])


def slopes(found):
    """Slopes of the times less compilation, over all sizes."""
    cells = [f["cells"] for f in found]
    return {
        part: slope(cells, [f[f"{part}_s"] - f[f"{part}_compile_s"] for f in found])
        for part in ("nbvcp", "nbln")
    } | {"sum": slope(cells, [f["sum_s"] - f["compile_s"] for f in found])}


def requests(given):
    """One request per matrix."""
    common = {name: getattr(given, name) for name in ("latent_dim", "setting", "warm")}
    if given.counts:
        return [common | {"counts": given.counts, "capture": given.capture or "auto"}]
    return [common | {"cells": n, "genes": given.genes, "depth": given.depth} for n in given.cells]


def stored(request, given, folder):
    """Requests for the same simulated counts in a file, which is written first."""
    path = str(Path(folder) / f"{request['cells']}x{request['genes']}.{given.out_of_core}")
    told = _process.run(__file__, request | {"write": path}, cores=given.cores)
    common = request | told | {"file": path}
    yield common | {"where": "disk"}
    if given.in_memory:
        yield common | {"where": "memory"}
    if given.dask:
        yield common | {"where": "dask", "dask": given.dask}


def main():
    """The command line."""
    given = arguments()
    with _process.on_cores(given.cores) as n:
        env = environment(n)
    print(describe(env), flush=True)
    variables = {"JAX_PLATFORMS": given.device} if given.device else None
    found = []
    content = {"program": "scale", "environment": env, "latent_dim": given.latent_dim}
    for request in requests(given):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            for one in stored(request, given, folder) if given.out_of_core else [request]:
                found.append(_process.run(__file__, one, cores=given.cores, env=variables))
                last = found[-1]
                print(
                    f"[{last['cells']} x {last['genes']}] {last['where']}: {last['sum_s']:.1f} s on "
                    f"{last['devices']}",
                    file=sys.stderr,
                    flush=True,
                )
                write_json(given.json, content | {"runs": found})
    k = OURS[given.setting].get("latent_dim", given.latent_dim)
    print(f"\nk = {k}, {given.setting}; {', '.join(found[0]['devices'])}\n")
    rows = [[shown(f.get(column)) for column in COLUMNS.values()] for f in found]
    print(table(COLUMNS, rows))
    content["slopes"] = {}
    for where in dict.fromkeys(f["where"] for f in found):
        same = [f for f in found if f["where"] == where]
        if len(same) > 1:
            content["slopes"][where] = slopes(same)
            parts = ", ".join(f"{part} {v:.2f}" for part, v in content["slopes"][where].items())
            print(f"\n{where}: slope of log seconds (compilation left out) in log cells: {parts}")
    write_json(given.json, content | {"runs": found})


def arguments():
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--cells", type=int, nargs="+", help="numbers of simulated cells")
    what.add_argument("--counts", help="npz file of a CSR matrix, rows are cells")
    parser.add_argument("--genes", type=int, default=1000, help="of simulated cells")
    parser.add_argument("--depth", type=float, default=1.0, help="of simulated cells")
    parser.add_argument("--capture", type=float, nargs=2, help="log_M0 sigma_M of --counts")
    parser.add_argument("--latent-dim", type=int, default=8)
    parser.add_argument("--setting", choices=OURS, default="default")
    parser.add_argument("--device", help="platform of JAX, e.g. cpu, cuda; default: its choice")
    parser.add_argument("--warm", action="store_true", help="fit both again in the same process")
    parser.add_argument("--cores", type=int, help="default: all that this process may use")
    parser.add_argument("--json", help="file for all numbers")
    disk = parser.add_argument_group("rows that are not in memory, of simulated cells")
    disk.add_argument("--out-of-core", choices=("h5ad", "zarr"), help="format of the file")
    disk.add_argument("--in-memory", action="store_true", help="fit the same counts in memory too")
    disk.add_argument("--dask", type=int, help="and on this many local worker processes")
    disk.add_argument("--folder", help="of the file, which is deleted; default: a temporary one")
    given = parser.parse_args()
    if (given.in_memory or given.dask) and not given.out_of_core:
        parser.error("--in-memory and --dask stand beside --out-of-core.")
    if given.out_of_core and given.counts:
        parser.error("--out-of-core is for --cells.")
    return given


def shown(value):
    """Integers with separators."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value


if __name__ == "__main__":
    _process.main(measure, main)

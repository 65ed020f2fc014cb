"""Wide and long: a whole count matrix, or simulated cells by the ten thousand.

    python benchmarks/scale.py --cells 10000 30000 100000 [--genes 1000] [--depth 1] [--json FILE]
    python benchmarks/scale.py --counts counts.npz --latent-dim 10 [--capture LOG_M0 SIGMA]

``--counts`` is a CSR matrix as `scipy.sparse.save_npz` writes it. Each fit has a process of its own;
what is simulated is drawn there in chunks, as CSR. ``--device cpu`` or ``--device cuda`` asks JAX for
that platform; the devices that are used are printed.
"""

import argparse
import sys
import time

import _process
import numpy as np
from _common import CAPTURE, capture_prior, describe, environment, off_diagonals, table, write_json
from _methods import OURS

COLUMNS = {
    "cells": "cells",
    "genes": "genes",
    "counts > 0": "nonzero",
    "NBVCP s": "nbvcp_s",
    "NBLN s": "nbln_s",
    "sum s": "sum_s",
    "compile s": "compile_s",
    "NBVCP MB": "nbvcp_memory_mb",
    "NBLN MB": "nbln_memory_mb",
    "process MB": "process_memory_mb",
    "NBVCP steps": "nbvcp_iterations",
    "NBLN sweeps": "iterations",
    "converged": "converged",
    "corr": "correlation",
}


def measure(request):
    """Both fits of one matrix, in a worker process."""
    import jax

    from sknbln import NBLNEstimator, NBVCPEstimator

    compilation = Compilation()
    X, loadings, prior = counts(request)
    result = {
        "devices": [str(d) for d in jax.devices()],
        "cells": X.shape[0],
        "genes": X.shape[1],
        "nonzero": int(X.nnz),
        "matrix_mb": sum(a.nbytes for a in (X.data, X.indices, X.indptr)) / 1e6,
    }
    first = _process.PeakMemory()
    start = time.perf_counter()
    source = NBVCPEstimator(capture_efficiency=prior, random_state=0).fit(X)
    result["nbvcp_s"] = time.perf_counter() - start
    result["nbvcp_compile_s"] = compilation.seconds
    result["nbvcp_memory_mb"] = first.over_baseline()
    peak = first.peak()

    second = _process.PeakMemory()
    start = time.perf_counter()
    model = NBLNEstimator(
        request["latent_dim"],
        informative_prior_estimator=source,
        random_state=0,
        **OURS[request["setting"]],
    ).fit(X)
    result["nbln_s"] = time.perf_counter() - start
    result["nbln_memory_mb"] = second.peak() - first.baseline
    result |= {
        "sum_s": result["nbvcp_s"] + result["nbln_s"],
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
    common = {"latent_dim": given.latent_dim, "setting": given.setting}
    if given.counts:
        return [common | {"counts": given.counts, "capture": given.capture or "auto"}]
    return [common | {"cells": n, "genes": given.genes, "depth": given.depth} for n in given.cells]


def main():
    """The command line."""
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
    parser.add_argument("--cores", type=int, help="default: all that this process may use")
    parser.add_argument("--json", help="file for all numbers")
    given = parser.parse_args()

    with _process.on_cores(given.cores) as n:
        env = environment(n)
    print(describe(env), flush=True)
    variables = {"JAX_PLATFORMS": given.device} if given.device else None
    found = []
    content = {"program": "scale", "environment": env, "latent_dim": given.latent_dim}
    for request in requests(given):
        found.append(_process.run(__file__, request, cores=given.cores, env=variables))
        last = found[-1]
        print(
            f"[{last['cells']} x {last['genes']}] {last['sum_s']:.1f} s on {last['devices']}",
            file=sys.stderr,
            flush=True,
        )
        write_json(given.json, content | {"runs": found})
    print(f"\nk = {given.latent_dim}, {given.setting}; {', '.join(found[0]['devices'])}\n")
    rows = [[shown(f.get(column)) for column in COLUMNS.values()] for f in found]
    print(table(COLUMNS, rows))
    if len(found) > 1:
        content["slopes"] = slopes(found)
        parts = ", ".join(f"{part} {v:.2f}" for part, v in content["slopes"].items())
        print(f"\nSlope of log seconds (compilation left out) in log cells: {parts}")
    write_json(given.json, content | {"runs": found})


def shown(value):
    """Integers with separators."""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value


if __name__ == "__main__":
    _process.main(measure, main)

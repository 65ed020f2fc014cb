"""A cold grid search: 3 folds x 4 latent dimensions x 2 freeze sets, and how much it compiles.

    python benchmarks/grid.py [1000x500] [--latent-dim 2 4 8 16] [--cores 2] [--json FILE]

Each candidate cascades from an unfitted `NBVCPEstimator`; ``memory`` fits that once per fold. The
process is timed from its start to the end of the search, the fit of the best candidate on all rows
included.
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import _process
from _common import describe, environment, load, save, simulated, table, write_json
from scale import Compilation

FREEZE = [("r", "eta"), ("eta",)]


def measure(request):
    """One grid search, in a worker process."""
    data = load(request["data"])
    from sklearn.model_selection import GridSearchCV

    from sknbln import NBLNEstimator, NBVCPEstimator

    memory, compilation = _process.PeakMemory(), Compilation()
    source = NBVCPEstimator(capture_efficiency=data.capture_prior, random_state=0)
    grid = {"latent_dim": request["latent_dims"], "informative_priors_freeze": FREEZE}
    with tempfile.TemporaryDirectory() as cache, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = NBLNEstimator(informative_prior_estimator=source, memory=cache, random_state=0)
        start = time.perf_counter()
        search = GridSearchCV(model, grid, cv=3).fit(data.counts[data.train])
        seconds = time.perf_counter() - start
    return {
        "wall_s": time.monotonic() - request["started"],
        "search_s": seconds,
        "compilations": compilation.count,
        "compile_s": compilation.seconds,
        "memory_mb": memory.over_baseline(),
        "memory_exact": memory.exact,
        "warnings": sorted({str(w.category.__name__) for w in caught}),
        "best": {k: str(v) for k, v in search.best_params_.items()},
        "candidates": [str(p) for p in search.cv_results_["params"]],
        "scores": search.cv_results_["mean_test_score"].tolist(),
        "fit_s": search.cv_results_["mean_fit_time"].tolist(),
        "score_of_best": search.best_estimator_.score(data.counts[data.test]),
    }


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", nargs="?", default="1000x500", help="CELLSxGENES")
    parser.add_argument("--latent-dim", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--cores", type=int, help="default: all that this process may use")
    parser.add_argument("--simulator", help="file of another simulator, as in recovery.py")
    parser.add_argument("--json", help="file for all numbers")
    given = parser.parse_args()

    with _process.on_cores(given.cores) as n:
        env = environment(n)
    print(describe(env), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.npz"
        save(path, simulated(given.set, given.simulator))
        request = {"data": str(path), "latent_dims": given.latent_dim}
        found = _process.run(__file__, request, cores=given.cores)
    print(
        f"\n**{given.set}**, cold grid search: {found['wall_s']:.1f} s, {found['compilations']} "
        f"compilations ({found['compile_s']:.1f} s), {found['memory_mb']:.0f} MB over baseline\n"
    )
    if found["warnings"]:
        print(f"Warnings: {', '.join(found['warnings'])}\n")
    rows = zip(found["candidates"], found["scores"], found["fit_s"], strict=True)
    print(table(["candidate", "score", "fit s"], [[c, f"{s:.1f}", t] for c, s, t in rows]))
    write_json(given.json, {"program": "grid", "environment": env, "set": given.set, **found})


if __name__ == "__main__":
    _process.main(measure, main)

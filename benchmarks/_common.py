"""Simulated sets, how fits are judged, and tables. Shared by the programs of this directory.

Imports neither sknbln nor a peer at the top: a worker process is timed from its start.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import sparse

#: location and scale of the simulated capture offsets, nats
CAPTURE = 3.0, 0.35
VERSIONS = (
    "sknbln numpy scipy scikit-learn jax jaxlib numpyro torch fastglmpca glmpca pyPLNmodels scvi-tools"
).split()


class SimulatedSet(NamedTuple):
    """Counts, the truth (loadings, noise_variance, mean, dispersion, scores), rows to fit and to score."""

    counts: sparse.csr_array
    truth: dict
    train: np.ndarray
    test: np.ndarray
    depth: float

    @property
    def capture_prior(self):
        """The pair (log_M0, sigma_M) whose centre agrees with the simulated offsets."""
        return capture_prior(self.counts[self.train], self.depth)


def capture_prior(counts, depth=1.0):
    """The pair (log_M0, sigma_M) for simulated counts: the median cell has the simulated offset."""
    sizes = np.asarray(counts.sum(axis=1)).ravel()
    return CAPTURE[0] - np.log(depth) + np.log(np.median(sizes)), CAPTURE[1]


def simulated(name, simulator=None):
    """The set CELLSxGENES (with _shallow for a tenth of the depth), four factors, 80 % of the rows to fit.

    `simulator` is a file with ``simulate(n, g, k, seed, depth)``, SIZES, SEEDS and DEPTH; without it
    the simulator of ``sknbln.datasets`` is used.
    """
    if simulator is not None:
        spec = importlib.util.spec_from_file_location("simulator", simulator)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        depth = module.DEPTH.get(name, 1.0)
        X, t = module.simulate(*module.SIZES[name], 4, module.SEEDS[name], depth)
        names = dict(loadings="W", noise_variance="d", mean="mu", dispersion="r", scores="z")
        truth = {new: t[old] for new, old in names.items()}
        return SimulatedSet(sparse.csr_array(X), truth, t["train"], t["test"], depth)
    from sknbln.datasets import make_nbln_counts

    size, _, shallow = name.partition("_")
    depth = 0.1 if shallow else 1.0
    n_cells, n_genes = (int(v) for v in size.split("x"))
    sim = make_nbln_counts(n_cells, n_genes, depth=depth, random_state=n_cells + n_genes)
    truth = {v: sim[v] for v in ("loadings", "noise_variance", "mean", "dispersion", "scores")}
    train = np.arange(round(0.8 * n_cells))
    return SimulatedSet(sim.data, truth, train, np.arange(train.size, n_cells), depth)


def save(path, data):
    """Write a `SimulatedSet` to an npz file."""
    X = data.counts
    np.savez(
        path,
        **data.truth,
        train=data.train,
        test=data.test,
        depth=data.depth,
        data=X.data,
        indices=X.indices,
        indptr=X.indptr,
        shape=X.shape,
    )


def load(path):
    """Read a `SimulatedSet` back."""
    with np.load(path) as f:
        held = {name: f[name] for name in f.files}
    X = sparse.csr_array(
        tuple(held.pop(v) for v in ("data", "indices", "indptr")), shape=tuple(held.pop("shape"))
    )
    rest = [held.pop(v) for v in ("train", "test", "depth")]
    return SimulatedSet(X, held, *rest[:2], float(rest[2]))


# ------------------------------------------------------------------ how fits are judged


def off_diagonals(loadings, truth):
    """Correlation and slope of the off-diagonals of the true W_perp W_perp' on the estimated.

    W_perp is W less its mean over genes. A slope of 1 is calibrated; above 1 the estimate is too small.
    """
    upper = np.triu_indices(truth.shape[0], 1)
    a, b = ((w @ w.T)[upper] for w in (v - v.mean(0) for v in (loadings, truth)))
    if not a.any():
        return np.nan, np.nan
    return np.corrcoef(a, b)[0, 1], (a @ b) / (a @ a)


def canonical_correlations(a, b):
    """Canonical correlations of the columns of `a` and `b`, descending, as many as `b` has columns.

    Directions that `a` does not have count as 0.
    """
    bases = []
    for m in (a, b):
        left, s, _ = np.linalg.svd(m - m.mean(0), full_matrices=False)
        bases.append(left[:, s > 1e-9 * s[0]] if s[0] > 0 else left[:, :0])
    found = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    return np.concatenate([found, np.zeros(b.shape[1] - found.size)])


def unit_scores(loadings, scores):
    """Loadings W of the same log-rates for scores of covariance I: ``W W' = V cov(U) V'``."""
    values, vectors = np.linalg.eigh(np.atleast_2d(np.cov(scores.T)))
    return loadings @ vectors * np.sqrt(np.maximum(values, 0.0))


def oracle_score(data):
    """Held-out log-likelihood of the true parameters, nats per cell."""
    from sknbln._capture import CapturePrior, score_rows
    from sknbln.solver.params import Params

    *values, r = (data.truth[v] for v in ("mean", "loadings", "noise_variance", "dispersion"))
    rows = data.counts[data.test].astype(float).tocsr()
    prior = CapturePrior(*data.capture_prior)
    return float(score_rows(rows, Params(*values, 1 / r), prior).mean())


# ------------------------------------------------------------------ tables


def table(header, rows):
    """A Markdown table; None is shown as a dash, floats with three significant digits."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell(v) for v in line) + " |" for line in lines)


def cell(value):
    """One value as a table shows it."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def median(rounds, name):
    """Median over the rounds that have the number, else None."""
    values = [r[name] for r in rounds if r.get(name) is not None]
    return float(np.median(values)) if values else None


def medians(rounds):
    """Medians of every number of the rounds."""
    names = dict.fromkeys(
        n for r in rounds for n, v in r.items() if isinstance(v, int | float) and v is not None
    )
    return {name: median(rounds, name) for name in names}


def environment(cores):
    """Date, versions, processor and cores of a run."""
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": cores,
        "versions": versions,
    }


def processor():
    """Model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def describe(env):
    """Environment as one line."""
    versions = ", ".join(f"{name} {v}" for name, v in env["versions"].items())
    return (
        f"{env['date']}, {env['cores']} of {os.cpu_count()} cores ({env['processor']}), "
        f"Python {env['python']}, {versions}"
    )


def write_json(path, content):
    """Write `content` to `path`, where one is given."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(content, indent=1, default=float) + "\n")

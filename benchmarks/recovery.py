"""Recovery of simulated truth by the settings of the cascade and the priors of the loadings.

    python benchmarks/recovery.py 500x200 1000x500 [--latent-dim 8 16] [--settings ard marginal]
                                  [--simulator simulate.py]

Four factors; 80 % of the rows are fitted, the rest scored. One line per setting:

gap    fraction of the way from independent genes to the true parameters, held-out log-likelihood
corr   correlation of the off-diagonals of W_perp W_perp' with the truth's
slope  of the truth regressed on the estimate: 1 is calibrated, above 1 the estimate is too small
rank   components above 5 % of the largest
d, r   medians of the noise variance and the dispersion
s      seconds of the fit given its source, compilation included for the first of a kind

``--simulator`` takes a file with ``simulate(n, g, k, seed, depth)`` and SIZES, SEEDS, DEPTH to
reproduce the tables of the planning documents; without it the simulator of ``sknbln.datasets`` is
used.
"""

import argparse
import importlib.util
import time
import warnings

import numpy as np

from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln._capture import CapturePrior, score_rows
from sknbln.datasets import make_nbln_counts

FREE = {"informative_priors_freeze": ("eta",), "informative_priors_tau": np.inf}
SETTINGS = {
    "raw (default)": {},
    "soft": {"informative_priors_freeze": ()},
    "marginal": {"cascade": "marginal"},
    "free dispersion": FREE,
    "poisson": {"observation": "poisson", "informative_priors_tau": np.inf},
    "ard": {"loadings_prior": "ard", **FREE},
    "ard, raw": {"loadings_prior": "ard"},
    "ard, marginal": {"loadings_prior": "ard", "cascade": "marginal"},
    "horseshoe": {"loadings_prior": "horseshoe_columnwise", **FREE},
}


def simulated(name, simulator):
    """Counts, truth as a dict, rows to fit and to score, depth."""
    if simulator is not None:
        spec = importlib.util.spec_from_file_location("simulator", simulator)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        depth = module.DEPTH.get(name, 1.0)
        X, t = module.simulate(*module.SIZES[name], 4, module.SEEDS[name], depth)
        names = {"loadings": "W", "noise_variance": "d", "mean": "mu", "dispersion": "r"}
        return X, {new: t[old] for new, old in names.items()}, t["train"], t["test"], depth
    size, _, shallow = name.partition("_")
    depth = 0.1 if shallow else 1.0
    n_cells, n_genes = (int(v) for v in size.split("x"))
    sim = make_nbln_counts(n_cells, n_genes, depth=depth, random_state=n_cells + n_genes)
    train = np.arange(round(0.8 * n_cells))
    return sim.data, sim, train, np.arange(train.size, n_cells), depth


def off_diagonals(loadings, truth):
    """Correlation and slope of the truth on the estimate."""
    upper = np.triu_indices(truth.shape[0], 1)
    a, b = (loadings @ loadings.T)[upper], (truth @ truth.T)[upper]
    return np.corrcoef(a, b)[0, 1], (a @ b) / (a @ a)


def run(name, dims, settings, simulator):
    """Print the table of one data set."""
    X, truth, train, test, depth = simulated(name, simulator)
    sizes = np.asarray(X[train].sum(axis=1)).ravel()
    prior = CapturePrior(3.0 - np.log(depth) + np.log(np.median(sizes)), 0.35)
    start = time.perf_counter()
    source = NBVCPEstimator(capture_efficiency=tuple(prior), random_state=0).fit(X[train])
    seconds = time.perf_counter() - start
    values = [truth[v] for v in ("mean", "loadings", "noise_variance", "dispersion")]
    oracle = score_rows(X[test].astype(float).tocsr(), *values, prior).mean()
    base = source.score(X[test])
    print(
        f"\n{name}: NBVCP {base:.2f} ({seconds:.1f} s), true parameters {oracle:.2f} nats per cell"
    )
    print(f"true medians: d {np.median(values[2]):.3f}, r {np.median(values[3]):.2f}")
    print("| setting | k | score | gap | corr | slope | rank | d | r | sweeps | s |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for k in dims:
        for label in settings:
            start = time.perf_counter()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model = NBLNEstimator(
                    k, informative_prior_estimator=source, random_state=0, **SETTINGS[label]
                ).fit(X[train])
            seconds = time.perf_counter() - start
            score = model.score(X[test])
            corr, slope = off_diagonals(model.components_.T, values[1])
            print(
                f"| {label} | {k} | {score:.2f} | {(score - base) / (oracle - base):.3f} | {corr:.3f} "
                f"| {slope:.2f} | {model.w_prior_diagnostics_['effective_rank']} "
                f"| {np.median(model.noise_variance_):.3f} | {np.median(model.dispersion_):.2f} "
                f"| {model.n_iter_}{' (!)' if caught else ''} | {seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "sets", nargs="+", help="CELLSxGENES, with _shallow for a tenth of the depth"
    )
    parser.add_argument("--latent-dim", type=int, nargs="+", default=[8])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--simulator")
    given = parser.parse_args()
    for each in given.sets:
        run(each, given.latent_dim, given.settings, given.simulator)

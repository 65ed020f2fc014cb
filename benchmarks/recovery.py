"""Recovery of simulated truth by the settings of the cascade and the priors of the loadings.

    python benchmarks/recovery.py 500x200 1000x500 [--latent-dim auto 8] [--settings default ard]
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
import time
import warnings

import numpy as np
from _common import off_diagonals, oracle_score, simulated

from sknbln import NBLNEstimator, NBVCPEstimator

SETTINGS = {
    "default": {},
    "all soft": {"informative_priors_freeze": ()},
    "r frozen": {"informative_priors_freeze": ("r", "eta")},
    "no priors": {"informative_priors_tau": np.inf},
    "poisson": {"observation": "poisson"},
    "literal": {"cascade": "parameter"},
    "literal, all soft": {"cascade": "parameter", "informative_priors_freeze": ()},
    "ard": {"loadings_prior": "ard"},
    "horseshoe": {"loadings_prior": "horseshoe_columnwise"},
}


def latent_dim(text):
    """A number of factors, or "auto"."""
    return text if text == "auto" else int(text)


def run(name, dims, settings, simulator):
    """Print the table of one data set."""
    data = simulated(name, simulator)
    fitted, held_out, truth = data.counts[data.train], data.counts[data.test], data.truth
    start = time.perf_counter()
    source = NBVCPEstimator(capture_efficiency=data.capture_prior, random_state=0).fit(fitted)
    seconds = time.perf_counter() - start
    oracle = oracle_score(data)
    base = source.score(held_out)
    print(
        f"\n{name}: NBVCP {base:.2f} ({seconds:.1f} s), true parameters {oracle:.2f} nats per cell"
    )
    d, r = np.median(truth["noise_variance"]), np.median(truth["dispersion"])
    print(f"true medians: d {d:.3f}, r {r:.2f}")
    print("| setting | k | score | gap | corr | slope | rank | d | r | sweeps | s |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for k in dims:
        for label in settings:
            start = time.perf_counter()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model = NBLNEstimator(
                    k, informative_prior_estimator=source, random_state=0, **SETTINGS[label]
                ).fit(fitted)
            seconds = time.perf_counter() - start
            score = model.score(held_out)
            corr, slope = off_diagonals(model.components_.T, truth["loadings"])
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
    parser.add_argument("--latent-dim", type=latent_dim, nargs="+", default=["auto"])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--simulator")
    given = parser.parse_args()
    for each in given.sets:
        run(each, given.latent_dim, given.settings, given.simulator)

"""Which genes move together: calibration, power, coverage, speed of the tests of pairs.

    python benchmarks/pairs.py null power coverage difference speed
    python benchmarks/pairs.py cscore --pair pair.csv

``null``: independent genes with capture, 10 seeds of 100 genes for each number of cells and mean count; share
of p-values below .05, .001 and .0001. With a covariate that moves every gene, given to the fit; and with 1 %
outlier cells, in which a random tenth of the genes has ten times the counts.

``power``: the four simulated sets (`--simulator`), all rows. At 5 % FDR, the share found of the pairs whose
log-rates correlate by more than .3 in magnitude, and the share of false signs among all pairs found: the
score test, and Pearson's correlation of log-normalized counts with Fisher's z.

``coverage``: the same sets, `NBLNEstimator` with defaults. Correlation of the estimates with the truth, slope
of the truth on them, and the share of 90 % intervals that hold the truth, of pairs with a true correlation
above .05 in magnitude and of the others.

``difference``: two groups of the same law, with other means of the genes, by cells and by 6 and 6 donors, all
with their own means; shares of p-values below the levels.

``speed``: seconds and the peak memory of a process, of the fit of independent genes and of the test of all
pairs: 2,000 x 5,000, and with ``--large`` 45,000 x 5,000.

``cscore``: CS-CORE's published pair of independent genes, with the depth as exposure.
"""

import argparse
import os
import resource
import time
import warnings

import numpy as np
import pandas as pd
import scipy.sparse as sp
from _common import describe, environment, simulated, table
from scipy.stats import false_discovery_control, norm

from sknbln import NBLNEstimator, NBVCPEstimator

SETS = ("500x200", "1000x500", "1000x500_shallow", "3000x1000")
LEVELS = (0.05, 0.001, 0.0001)
QUICK = dict(random_state=0, n_steps=50, tol=1.0)  # the variational part has no say in the test


def shares(p):
    p = p[np.isfinite(p)]
    return [f"{np.mean(p < level):.5f}" for level in LEVELS]


def independent(seed, n, mean, genes=100, kind=""):
    """Counts of independent genes with capture, and what is known of the rows."""
    rng = np.random.default_rng(seed)
    m = (
        mean
        * np.exp(rng.uniform(-1.5, 1.5, genes) - 0.35)
        * np.exp(0.35 * rng.standard_normal((n, 1)))
    )
    age = rng.standard_normal(n)
    if kind == "covariate":
        m *= np.exp(np.outer(age, rng.normal(0.0, 0.5, genes)))
    if kind == "outliers":
        m[: n // 100] *= np.where(rng.random((n // 100, genes)) < 0.1, 10.0, 1.0)
    r = np.clip(np.exp(rng.normal(np.log(3.0), 0.6, genes)), 0.5, 30.0)
    U = rng.poisson(m * rng.gamma(r, 1 / r, m.shape)).astype(float)
    U = U[:, U.sum(0) > 0]
    return sp.csr_matrix(U), {"covariates": age} if kind == "covariate" else {}


def upper(a):
    return a[np.triu_indices(len(a), 1)]


def null(args):
    rows = []
    settings = [(n, mean, "") for n in (200, 1000, 5000) for mean in (0.05, 0.5, 5.0, 50.0)]
    settings += [(1000, mean, kind) for kind in ("covariate", "outliers") for mean in (0.5, 5.0)]
    for n, mean, kind in settings:
        p = []
        for seed in range(args.seeds):
            X, known = independent(seed, n, mean, kind=kind)
            model = NBVCPEstimator(**QUICK).fit(X, **known)
            p.append(upper(model.correlation_test(X, **known).p_value))
        rows.append([n, mean, kind, *shares(np.concatenate(p)), sum(a.size for a in p)])
        print(*rows[-1], flush=True)
    print(table(["cells", "mean count", "", *map(str, LEVELS), "pairs"], rows), end="\n\n")


def correlations(loadings, noise):
    S = loadings @ loadings.T + np.diag(noise)
    return S / np.sqrt(np.outer(np.diag(S), np.diag(S)))


def pearson(X):
    """z and two-sided p-values of Pearson's correlations of log-normalized counts."""
    total = np.asarray(X.sum(1))
    logs = np.log1p(X.toarray() / total * np.median(total))
    z = np.arctanh(np.clip(upper(np.corrcoef(logs.T)), -0.999999, 0.999999)) * np.sqrt(
        len(logs) - 3
    )
    return z, 2 * norm.sf(np.abs(z))


def load(name, args):
    """Counts of genes that were seen, and the truth as a dictionary."""
    data = simulated(name, args.simulator)
    seen = np.asarray(data.counts.sum(0)).ravel() > 0
    names = dict(W="loadings", d="noise_variance", r="dispersion")
    truth = {short: data.truth[long][seen] for short, long in names.items()}
    return sp.csr_matrix(data.counts[:, seen].astype(float)), truth


def power(args):
    rows = []
    for name in args.sets:
        X, truth = load(name, args)
        R = upper(correlations(truth["W"], truth["d"]))
        test = NBVCPEstimator(random_state=0).fit(X).correlation_test(X)
        ours = upper(test.statistic), upper(test.p_value)
        for method, (z, p) in (("score test", ours), ("Pearson, log-normalized", pearson(X))):
            found = false_discovery_control(p) < 0.05
            wrong = np.mean(np.sign(z[found]) != np.sign(R[found]))
            small = np.mean(np.abs(R[found]) < 0.02)
            of_strong = np.mean(found[np.abs(R) > 0.3])
            ranking = np.corrcoef(z, R)[0, 1]
            rows.append([name, method, *(f"{v:.3f}" for v in (of_strong, wrong, small, ranking))])
            print(*rows[-1], flush=True)
    header = ["", "", "found of |r| > .3", "false signs", "|r| < .02 among found", "corr of z"]
    print(table(header, rows), end="\n\n")


def expression(S, noise, r):
    own = np.diag(S) + noise
    v = np.exp(own) * (1 + 1 / r) - 1
    return np.expm1(S) / np.sqrt(np.outer(v, v))


def coverage(args):
    rows = []
    for name in args.sets:
        X, truth = load(name, args)
        model = NBLNEstimator(random_state=0).fit(X)
        W, d = truth["W"], truth["d"]
        S, G = W @ W.T, len(d)
        P = np.eye(G) - 1 / G
        C = P @ (S + np.diag(d)) @ P
        C /= np.sqrt(np.outer(np.diag(C), np.diag(C)))
        true = {
            "compositional": C,
            "log_rate": correlations(W, d),
            "expression": expression(S, d, truth["r"]),
        }
        for scale, R in true.items():
            found = model.get_correlation_interval(scale)
            R, estimate = upper(R), upper(found.correlation)
            inside = (upper(found.low) <= R) & (R <= upper(found.high))
            is_null = np.abs(R) < 0.05
            corr = np.corrcoef(estimate, R)[0, 1]
            slope = estimate @ R / (estimate @ estimate)
            shown = (corr, slope, inside[~is_null].mean(), inside[is_null].mean())
            rows.append([name, scale, *(f"{v:.3f}" for v in shown)])
            print(*rows[-1], flush=True)
    print(table(["", "scale", "corr", "slope", "coverage", "of |r| < .05"], rows), end="\n\n")


def difference(args):
    rows = []
    for kind in ("cells", "donors"):
        p = []
        for seed in range(args.seeds):
            rng = np.random.default_rng(seed)
            n, genes = 600, 60
            donor = np.arange(n) % 12
            group = donor < 6
            x = rng.standard_normal((n, 3)) @ (0.4 * rng.standard_normal((3, genes)))
            x += np.outer(group, rng.normal(0.0, 0.3, genes)) + 0.35 * rng.standard_normal((n, 1))
            if kind == "donors":
                x += rng.normal(0.0, 0.3, (12, genes))[donor]
            m = np.exp(x + np.log(rng.uniform(0.2, 6.0, genes)))
            U = rng.poisson(m * rng.gamma(4.0, 0.25, m.shape)).astype(float)
            model = NBVCPEstimator(**QUICK).fit(U)
            blocks = donor if kind == "donors" else None
            test = model.correlation_difference_test(U, group, blocks, random_state=0)
            p.append(upper(test.p_value))
        rows.append([kind, *shares(np.concatenate(p)), sum(a.size for a in p)])
        print(*rows[-1], flush=True)
    print(table(["permuted", *map(str, LEVELS), "pairs"], rows), end="\n\n")


def sparse_counts(n, genes, seed=0):
    """Counts of mean .6, a fifth of them above 0, in blocks of rows."""
    rng, blocks = np.random.default_rng(seed), []
    m = np.exp(rng.normal(-2.0, 1.6, genes))
    for _ in range(0, n, 1000):
        depth = np.exp(0.35 * rng.standard_normal((1000, 1)))
        rate = m * depth * rng.gamma(2.0, 0.5, (1000, genes))
        blocks.append(sp.csr_matrix(rng.poisson(rate).astype(np.float64)))
    return sp.vstack(blocks, format="csr")


def speed(args):
    rows = []
    for n in (2000, 45_000) if args.large else (2000,):
        X = sparse_counts(n, 5000)
        X = X[:, np.asarray(X.sum(0)).ravel() > 0]
        before = time.perf_counter()
        model = NBVCPEstimator(**QUICK).fit(X)
        fitted, of_fit = time.perf_counter(), peak()
        test = model.correlation_test(X)
        tested = time.perf_counter()
        some = model.correlation_test(X, genes=np.arange(200))
        of_some = time.perf_counter() - tested
        assert some.p_value.shape[0] == 200 and np.isfinite(test.q_value[0, 1])
        seconds = (fitted - before, tested - fitted, of_some)
        rows.append([f"{n} x {X.shape[1]}", *(f"{s:.1f}" for s in seconds), of_fit, peak()])
        print(*rows[-1], flush=True)
    header = ["", "fit s", "all pairs s", "200 against all s", "MB after the fit", "MB at most"]
    print(table(header, rows), end="\n\n")


def peak():
    """Peak memory of the process in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def cscore(args):
    pair = pd.read_csv(args.pair)
    X, depth = pair[["gene_1", "gene_2"]], pair["depth"].to_numpy(float)
    model = NBVCPEstimator(capture_efficiency=None, random_state=0).fit(X, offset=np.log(depth))
    test = model.correlation_test(X, offset=np.log(depth))
    print(f"CS-CORE's independent pair: z {test.statistic[0, 1]:.3f}, p {test.p_value[0, 1]:.3f}\n")


PARTS = {f.__name__: f for f in (null, power, coverage, difference, speed, cscore)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--simulator", help="a file with SIZES, SEEDS, DEPTH and simulate()")
    parser.add_argument("--pair", help="CSV with the columns gene_1, gene_2, depth")
    parser.add_argument("--large", action="store_true", help="speed of 45,000 cells too")
    args = parser.parse_args()
    print(describe(environment(len(os.sched_getaffinity(0)))), end="\n\n")
    warnings.simplefilter("ignore")
    for part in args.parts:
        print(f"## {part}\n", flush=True)
        PARTS[part](args)


if __name__ == "__main__":
    main()

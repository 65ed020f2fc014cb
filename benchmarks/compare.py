"""Ours and the peers that are installed, side by side on the same rows of simulated sets.

    python benchmarks/compare.py 500x200 1000x500 [--rounds 3] [--cores 1] [--json FILE]
        [--ours default k ard] [--peers fastglmpca glmpca] [--simulator simulate.py]

The methods alternate, round by round, each time in a process of its own that fits twice, with two
seeds. README.md in this directory explains the columns.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import _process
from _common import (
    describe,
    environment,
    medians,
    oracle_score,
    save,
    simulated,
    table,
    write_json,
)
from _measure import RESULTS, TIMES, measure, shown
from _methods import DEFAULT_PEERS, OURS, PEERS, missing

COLUMNS = TIMES | RESULTS
#: the peer whose time ours is divided by
REFERENCES = ("fastglmpca", "fastglmpca-dense")


def run_set(name, methods, given):
    """All rounds of one set; a dict for JSON."""
    data = simulated(name, given.simulator)
    rounds = {method: [] for method in methods}
    failed = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.npz"
        save(path, data)
        for i in range(given.rounds):
            for method in methods:
                if method in failed or (i > 0 and too_slow(rounds[method], given.once_above)):
                    continue
                request = {
                    "data": str(path),
                    "method": method,
                    "latent_dim": given.latent_dim,
                    "seeds": (2 * i, 2 * i + 1),
                }
                try:
                    found = _process.run(
                        __file__, request, cores=given.cores, timeout=given.timeout
                    )
                except _process.WorkerError as error:
                    failed[method] = said = str(error)
                else:
                    rounds[method].append(found)
                    said = f"cold {found['cold_s']:.2f} s, warm {found['warm_s']:.2f} s"
                print(f"[{name}, round {i + 1}] {method}: {said}", file=sys.stderr, flush=True)
    return {
        "cells_fitted": int(data.train.size),
        "cells_held_out": int(data.test.size),
        "genes": int(data.counts.shape[1]),
        "score_of_truth": oracle_score(data),
        "failed": failed,
        "methods": {
            method: {"medians": medians(found), "rounds": found}
            for method, found in rounds.items()
            if found
        },
    }


def too_slow(rounds, limit):
    """Whether a method's first fit took so long that one round has to do."""
    return bool(rounds) and rounds[0]["first_fit_s"] > limit


def show(name, result, given):
    """Print the table of one set, what failed, and the ratios of times."""
    print(
        f"\n**{name}**: {result['cells_fitted']:,} rows fitted, {result['cells_held_out']:,} held out, "
        f"k = {given.latent_dim}; true parameters {result['score_of_truth']:.1f} nats per cell\n"
    )
    rows = []
    for method, found in result["methods"].items():
        values = found["medians"]
        unsettled = any(r.get("converged") is False for r in found["rounds"])
        rows.append(
            [method + (" (!)" if unsettled else ""), len(found["rounds"])]
            + [shown(label, values.get(column)) for label, column in COLUMNS.items()]
        )
    print(table(["method", "rounds", *COLUMNS], rows))
    for method, error in result["failed"].items():
        print(f"\n{method} failed: {error}")
    rows = list(ratios(result["methods"]))
    if rows:
        print(
            "\nTimes of ours by a peer's, both warm; of the medians, and lowest to highest round:\n"
        )
        print(table(["ours", "peer", "NBLN", "rounds", "NBVCP + NBLN", "rounds"], rows))


def ratios(methods):
    """Rows of the table of times by the references', as a range over the rounds too, which are paired."""
    for reference in (r for r in REFERENCES if r in methods):
        for method in (m for m in methods if m not in PEERS):
            ours, peer = methods[method], methods[reference]
            row = [method, reference]
            for column in ("nbln_s", "warm_s"):
                pairs = zip(ours["rounds"], peer["rounds"], strict=False)
                of = [a[column] / b["warm_s"] for a, b in pairs]
                row.append(f"{ours['medians'][column] / peer['medians']['warm_s']:.2f}")
                row.append(f"{min(of):.2f} to {max(of):.2f}")
            yield row


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="+", help="CELLSxGENES, 80 %% of the cells are fitted")
    parser.add_argument("--latent-dim", type=int, default=8)
    parser.add_argument("--ours", nargs="*", choices=OURS, default=list(OURS))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(DEFAULT_PEERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, help="default: all that this process may use")
    parser.add_argument("--simulator", help="file of another simulator, as in recovery.py")
    parser.add_argument("--json", help="file for all numbers")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds per process")
    parser.add_argument(
        "--once-above",
        type=float,
        default=60.0,
        help="one round only for methods whose fit takes longer (seconds)",
    )
    given = parser.parse_args()
    methods = []
    for name in [f"sknbln {setting}" for setting in given.ours] + given.peers:
        lacking = missing(name)
        if lacking:
            print(f"{name}: {', '.join(lacking)} not installed (requirements.txt), left out")
        else:
            methods.append(name)
    with _process.on_cores(given.cores) as n:
        env = environment(n)
    print(describe(env), flush=True)
    content = {"program": "compare", "latent_dim": given.latent_dim, "environment": env, "sets": {}}
    for name in given.sets:
        content["sets"][name] = run_set(name, methods, given)
        show(name, content["sets"][name], given)
        write_json(given.json, content)
    if any(result["failed"] for result in content["sets"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    _process.main(measure, main)

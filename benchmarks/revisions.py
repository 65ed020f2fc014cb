"""Two git revisions of sknbln side by side on the same rows of simulated sets.

    python benchmarks/revisions.py main worktree 500x200 1000x500 [--rounds 3] [--cores 1] [--json FILE]
        [--settings default refined ard] [--simulator simulate.py]

``worktree`` is the package as it lies in this directory's checkout, uncommitted changes too; anything
else that git knows is checked out in a temporary directory. The revisions alternate, each time in a
process of its own that fits twice, with two seeds, by the code of this directory.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

import _process
from _common import cell, describe, environment, medians, save, simulated, table, write_json
from _measure import measure
from _methods import OURS

ROOT = Path(__file__).resolve().parents[1]
TIMES = {
    "cold s": "cold_s",
    "warm s": "warm_s",
    "NBVCP s": "nbvcp_s",
    "NBLN s": "nbln_s",
    "transform s": "transform_s",
    "MB": "memory_mb",
    "MB warm": "memory_warm_mb",
}
RESULTS = {
    "corr": "correlation",
    "slope": "slope",
    "scores new": "canonical_new",
    "held-out": "score",
    "sweeps": "iterations",
}


@contextlib.contextmanager
def checkouts(revisions):
    """Directories of the revisions; temporary ones are removed at the end."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        found = []
        for i, revision in enumerate(revisions):
            if revision == "worktree":
                found.append(ROOT)
                continue
            path = folder / str(i)
            git("worktree", "add", "--quiet", "--detach", str(path), revision)
            stack.callback(git, "worktree", "remove", "--force", str(path))
            found.append(path)
        yield found


def git(*arguments):
    """Output of a git command in this checkout."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def run_one(path, request, given):
    """One process of the package in `path`."""
    env = {"PYTHONPATH": str(path)}
    found = _process.run(__file__, request, cores=given.cores, env=env, timeout=given.timeout)
    used = Path(found["package"]).resolve()
    if not used.is_relative_to(path.resolve()):
        raise SystemExit(f"The process imported {used}, not the package in {path}.")
    return found


def run_setting(name, setting, path, trees, given):
    """All rounds of one set and setting: a list of rounds for each revision."""
    rounds = [[] for _ in trees]
    for i in range(given.rounds):
        for found, tree in zip(rounds, trees, strict=True):
            request = {
                "data": str(path),
                "method": f"sknbln {setting}",
                "latent_dim": given.latent_dim,
                "seeds": (2 * i, 2 * i + 1),
            }
            found.append(run_one(tree, request, given))
        print(
            f"[{name}, round {i + 1}] {setting}: warm "
            + ", ".join(f"{found[-1]['warm_s']:.2f} s" for found in rounds),
            file=sys.stderr,
            flush=True,
        )
    return rounds


def show(setting, rounds, revisions):
    """Print the numbers of both revisions; times with the ratio and its range over rounds."""
    old, new = (medians(found) for found in rounds)
    rows = []
    for label, column in (TIMES | RESULTS).items():
        digits = 3 if column in TIMES.values() else 5
        row = [label, *(cell(v[column], digits) if column in v else None for v in (old, new))]
        if column in TIMES.values():
            of = [b[column] / a[column] for a, b in zip(*rounds, strict=True)]
            row += [f"{new[column] / old[column]:.2f}", f"{min(of):.2f} to {max(of):.2f}"]
        else:
            row += [None, None]
        rows.append(row)
    print(f"\n{setting}\n")
    print(table(["", *revisions, "second / first", "rounds"], rows), flush=True)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", help="git revision, or `worktree`")
    parser.add_argument("second", help="git revision, or `worktree`")
    parser.add_argument("sets", nargs="+", help="CELLSxGENES, 80 %% of the cells are fitted")
    parser.add_argument("--latent-dim", type=int, default=8)
    parser.add_argument("--settings", nargs="+", choices=OURS, default=["default"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, help="default: all that this process may use")
    parser.add_argument("--simulator", help="file of another simulator, as in recovery.py")
    parser.add_argument("--json", help="file for all numbers")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds per process")
    given = parser.parse_args()

    revisions = [given.first, given.second]
    with _process.on_cores(given.cores) as n:
        env = environment(n)
    env["versions"].pop("sknbln", None)
    commits = [
        git("describe", "--always", "--dirty")
        if r == "worktree"
        else git("rev-parse", "--short", r)
        for r in revisions
    ]
    names = [f"{r} ({commit})" for r, commit in zip(revisions, commits, strict=True)]
    print(f"{names[0]} against {names[1]}; {describe(env)}", flush=True)
    content = {"program": "revisions", "revisions": names, "environment": env, "sets": {}}
    with checkouts(revisions) as trees, tempfile.TemporaryDirectory() as folder:
        for name in given.sets:
            path = Path(folder) / f"{name}.npz"
            save(path, simulated(name, given.simulator))
            print(f"\n**{name}**, k = {given.latent_dim}", flush=True)
            content["sets"][name] = {}
            for setting in given.settings:
                rounds = run_setting(name, setting, path, trees, given)
                content["sets"][name][setting] = [
                    {"medians": medians(found), "rounds": found} for found in rounds
                ]
                show(setting, rounds, revisions)
                write_json(given.json, content)


if __name__ == "__main__":
    _process.main(measure, main)

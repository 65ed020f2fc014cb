"""Two git revisions of sknbln side by side on the same rows of simulated sets.

    python benchmarks/revisions.py main worktree 500x200 1000x500 [--rounds 3] [--cores 1] [--json FILE]
        [--settings default k ard] [--simulator simulate.py]

``worktree`` is the package as it lies in this directory's checkout, uncommitted changes too; anything
else that git knows is written to a temporary directory. The revisions alternate, each time in a
process of its own that fits twice, with two seeds, by the code of this directory.
"""

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import _process
from _common import describe, environment, medians, save, simulated, table, write_json
from _measure import RESULTS, TIMES, measure, shown
from _methods import OURS

ROOT = Path(__file__).resolve().parents[1]


def checked_out(revision, folder):
    """The directory of a revision: its files below `folder`, or this checkout for ``worktree``."""
    if revision == "worktree":
        return ROOT
    path = Path(folder) / revision.replace("/", "_")
    with tarfile.open(fileobj=io.BytesIO(git("archive", revision))) as archive:
        archive.extractall(path, filter="data")
    return path


def git(*arguments):
    """Output of a git command in this checkout, bytes."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.decode().strip()}")
    return done.stdout


def named(revision):
    """A revision with its commit."""
    of = ("describe", "--always", "--dirty") if revision == "worktree" else ("rev-parse", "--short")
    commit = git(*of) if revision == "worktree" else git(*of, revision)
    return f"{revision} ({commit.decode().strip()})"


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
                f"[{name}, round {i + 1}] {setting} of {tree.name}: cold {found[-1]['cold_s']:.2f} s, "
                f"warm {found[-1]['warm_s']:.2f} s",
                file=sys.stderr,
                flush=True,
            )
    return rounds


def show(setting, rounds, revisions):
    """Print the numbers of both revisions; times with the ratio and its range over rounds."""
    old, new = (medians(found) for found in rounds)
    rows = []
    for label, column in (TIMES | RESULTS).items():
        row = [label, *(shown(label, v.get(column)) for v in (old, new)), None, None]
        if label in TIMES:
            of = [b[column] / a[column] for a, b in zip(*rounds, strict=True)]
            row[3:] = f"{new[column] / old[column]:.2f}", f"{min(of):.2f} to {max(of):.2f}"
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
    parser.add_argument("--settings", nargs="+", choices=OURS, default=["k"])
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
    names = [named(revision) for revision in revisions]
    print(f"{names[0]} against {names[1]}; {describe(env)}", flush=True)
    content = {"program": "revisions", "revisions": names, "environment": env, "sets": {}}
    with tempfile.TemporaryDirectory() as folder:
        trees = [checked_out(revision, folder) for revision in revisions]
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

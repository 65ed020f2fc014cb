"""Build sdist and wheel, install the wheel in a fresh environment and use it there.

For `make test-package`. The sdist has to make the same wheel as the tree, and the wheel has to hold
everything that git tracks in sknbln/, the data set and its licence too.
"""

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
USE = """
import warnings; warnings.simplefilter("error")
import sknbln
from sknbln.datasets import load_immune_cells
X = load_immune_cells().data
assert X.shape == (600, 300), X.shape
model = sknbln.NBVCPEstimator(random_state=0).fit(X[:64, :16])
print("sknbln", sknbln.__version__, "of", sknbln.__file__, "scores", round(model.score(X[64:, :16]), 3))
"""


def run(*command, **options):
    """Run a command, in silence unless it fails; its standard output."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def environment(folder):
    """The interpreter of a new virtual environment."""
    venv.create(folder, with_pip=True)
    return folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"


def names(wheel):
    """The files in a wheel."""
    return set(zipfile.ZipFile(wheel).namelist())


def main():
    """Build, compare, install, use."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        python = environment(scratch / "build")
        run(python, "-m", "pip", "install", "--quiet", "build")
        # the sdist from the tree, then a wheel from that sdist
        run(python, "-m", "build", "--outdir", scratch / "dist", ROOT)
        run(python, "-m", "build", "--wheel", "--outdir", scratch / "tree", ROOT)
        (wheel,), (direct,) = (sorted((scratch / d).glob("*.whl")) for d in ("dist", "tree"))
        found, expected = names(wheel), names(direct)
        if found != expected:
            sys.exit(f"The wheels of the sdist and of the tree differ: {sorted(found ^ expected)}")
        tracked = run("git", "ls-files", "sknbln", cwd=ROOT).split()
        if missing := [f for f in tracked if f not in found]:
            sys.exit(f"Not in the wheel: {missing}")
        clean = environment(scratch / "clean")
        run(clean, "-m", "pip", "install", "--quiet", wheel)
        # -I and another folder: nothing of the clone can be imported
        print(run(clean, "-I", "-c", USE, cwd=scratch), end="")
        print(f"{wheel.name}: {len(found)} files, the same from the sdist")


if __name__ == "__main__":
    main()

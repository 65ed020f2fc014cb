"""Worker processes, on how many cores they run, and how much memory they use. Standard library only."""

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_WORKER = "--worker"
_THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
#: would make a cold process warm
_CACHES = ("JAX_COMPILATION_CACHE_DIR",)


class WorkerError(RuntimeError):
    """A worker process failed or ran past its time."""


def main(measure, command_line):
    """The entry of a program: answer a request as a worker, else run its command line.

    `measure` takes the request, a dict, with ``started``: `time.monotonic` when the process was asked
    for; it returns what JSON can hold.
    """
    if sys.argv[1:2] == [_WORKER]:
        request = json.loads(sys.argv[2])
        answer = json.dumps(measure(request), default=float)
        Path(request["answer"]).write_text(answer)
        return
    command_line()


def run(script, request, *, cores=None, env=None, timeout=None):
    """What `script` measures for `request` in a process of its own.

    Parameters
    ----------
    script : path of a program that calls `main`
    request : dict
    cores : int or None
        The process and its thread pools are kept to so many cores; None for all.
    env : dict or None
        Environment variables on top of this process's.
    timeout : float or None
        Seconds.

    Raises
    ------
    WorkerError
        With the end of what the process wrote to its standard error.
    """
    with tempfile.TemporaryDirectory() as folder, on_cores(cores) as n:
        answer = Path(folder) / "answer.json"
        variables = {k: v for k, v in os.environ.items() if k not in _CACHES}
        variables |= dict.fromkeys(_THREADS, str(n)) | (env or {})
        request = request | {"answer": str(answer), "started": time.monotonic()}
        command = [sys.executable, str(script), _WORKER, json.dumps(request, default=float)]
        try:
            done = subprocess.run(
                command, env=variables, capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            raise WorkerError(f"ran past {timeout:g} s") from None
        if done.returncode != 0 or not answer.exists():
            said = done.stderr.strip().splitlines()[-1:] or ["nothing on standard error"]
            raise WorkerError(f"exit status {done.returncode}: {said[0]}")
        return json.loads(answer.read_text())


@contextlib.contextmanager
def on_cores(n):
    """Processes that start inside run on the first `n` cores that this one may use.

    Yields the number. Where the system has no affinity (macOS), only the thread pools are limited.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield n or os.cpu_count()
        return
    before = os.sched_getaffinity(0)
    if n is not None and n > len(before):
        raise SystemExit(f"--cores {n}: this process may use {len(before)}.")
    try:
        if n is not None:
            os.sched_setaffinity(0, sorted(before)[:n])
        yield n or len(before)
    finally:
        os.sched_setaffinity(0, before)


class PeakMemory:
    """Peak resident memory of this process over what was resident at the start, MB (10^6 bytes).

    On Linux the kernel's own high-water mark (VmHWM), set back at the start, so that no peak between
    two samples is missed and none before the start counts. Elsewhere, or where the mark may not be set
    back, the growth of the process's maximum (``ru_maxrss``), which misses what stays below an earlier
    peak; `exact` says which.
    """

    def __init__(self):
        gc.collect()
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.exact = True
            self.baseline = _status("VmRSS")
        except OSError:
            self.exact = False
            self.baseline = _maximum()

    def peak(self):
        """Peak resident memory, MB."""
        return _status("VmHWM") if self.exact else _maximum()

    def over_baseline(self):
        """Peak since the start, less what was resident then, MB."""
        return max(self.peak() - self.baseline, 0.0)


def _status(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"/proc/self/status has no {name}")


def _maximum():
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6

"""A test that hangs fails, with the stacks of its threads, also where no signal is delivered."""

import os
import subprocess
import sys
import warnings

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

HANGS = {
    # while the main thread waits for XLA it runs no Python, so that a signal's handler never runs
    "jitted": """
import jax

def test_hangs():
    loop = jax.jit(lambda x: jax.lax.while_loop(lambda s: s != 5, lambda s: (s + 2) % 4, x))
    loop(0).block_until_ready()
""",
    "lock": """
import threading

def test_hangs():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
""",
    "interpreter's lock held": """
import ctypes

def test_hangs():
    ctypes.PyDLL(None).sleep(10_000)
""",
}


@pytest.mark.skipif(sys.platform == "win32", reason="ctypes.PyDLL(None) needs POSIX")
@pytest.mark.parametrize("name", HANGS)
def test_a_hang_fails(tmp_path, name):
    """Under the suite's own settings, with less patience; this test's own watchdog is the judge."""
    path = tmp_path / "test_hang.py"
    path.write_text(HANGS[name])
    done = subprocess.run(
        [
            sys.executable,
            *(
                "-m",
                "pytest",
                "-c",
                "pyproject.toml",
                "--rootdir",
                tmp_path,
                "-p",
                "tests.conftest",
            ),
            *("-p", "no:cacheprovider", "-o", "timeout=3", path),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert "Timeout" in said
    assert "test_hangs" in said  # the stack of the main thread


def test_the_suite_has_a_watchdog(request):
    assert float(request.config.getini("timeout")) == 600
    assert request.config.getini("timeout_method") == "thread"


def test_a_warning_fails_a_test():
    with pytest.raises(UserWarning, match="of no importance"):
        warnings.warn("of no importance", stacklevel=1)

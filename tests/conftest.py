"""Settings and fixtures that every test module shares."""

import contextlib
import faulthandler
import os
import sys

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key

# Before anything imports matplotlib: no test may open a window.
os.environ["MPLBACKEND"] = "Agg"

# pytest's own plugin does this too, except with `-p no:faulthandler`.
if not faulthandler.is_enabled():
    faulthandler.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """End a test that hangs while it holds the interpreter's lock, as a compilation may.

    pytest-timeout needs that lock; this timer is a thread of C. It gives pytest-timeout 10 seconds.
    """
    patience = float(item.config.getini("timeout")) + 10
    stderr = item.config.stash.get(fault_handler_stderr_fd_key, sys.__stderr__)
    faulthandler.dump_traceback_later(patience, exit=True, file=stderr)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def strict_jax():
    """Make JAX refuse implicit dtype promotion and implicit rank promotion within one test.

    For tests of `sknbln`'s own functions, by `@pytest.mark.usefixtures("strict_jax")` or as an
    argument. It is not autouse: NumPyro and optax promote freely inside.
    """
    import jax

    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.numpy_dtype_promotion("strict"))
        stack.enter_context(jax.numpy_rank_promotion("raise"))
        yield


@pytest.fixture
def compiled():
    """Number of compilations since the last time this was asked."""
    import jax.monitoring

    counter = {"new": 0}

    def listen(event, seconds, **_):
        counter["new"] += event == "/jax/core/compile/backend_compile_duration"

    def since_last():
        found, counter["new"] = counter["new"], 0
        return found

    # it stays, and counts what nobody asks for: JAX 0.8 has no public way to take it away
    jax.monitoring.register_event_duration_secs_listener(listen)
    return since_last

"""JAX's modes: precision, compilation, threads.

The solver runs in float64 inside a local scope; the user's global JAX configuration is never changed.
"""

import ctypes
import functools
import os
import re
import threading
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import jax
import jaxlib
import numpy as np

# jaxlib releases that can hang indefinitely on 2-core CPUs in batched solvers like this one
_HANGING_JAXLIB = re.compile(r"0\.10\.\d+|0\.11\.[01]")
_MOST_WORKERS = 8


def warn_about_jaxlib(version=jaxlib.__version__):
    """Warn if the installed jaxlib is known to hang in computations of this kind."""
    if _HANGING_JAXLIB.fullmatch(version):
        warnings.warn(
            f"jaxlib {version} can hang for ever on CPUs with two cores in computations of the kind "
            "that sknbln runs. Install another release, e.g. `pip install 'jax>=0.11.2'` or "
            "`pip install 'jax<0.10'`.",
            RuntimeWarning,
            stacklevel=3,
        )


def float64(function):
    """Decorate `function` to run with 64-bit JAX types in a local scope, whatever the caller's setting."""

    @functools.wraps(function)
    def scoped(*args, **kwargs):
        with jax.enable_x64(True):
            return function(*args, **kwargs)

    return scoped


def setting_of_now():
    """A function that makes a context with the 64-bit setting that holds now: for what a user runs inside."""
    return functools.partial(jax.enable_x64, bool(jax.config.jax_enable_x64))


def of_libc(name):
    """The function of the C library with this name; None where there is none."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None


_TRIM = of_libc("malloc_trim")  # of glibc: returns freed memory to the system
_COMPILING = threading.Lock()


def give_back():
    """Return freed memory to the system; memory freed by a thread otherwise stays in the thread's heap."""
    if _TRIM is not None:
        _TRIM(0)


@functools.cache
def compiled_once(kernel):
    """Wrap a jitted function that threads share: the first thread compiles it, the others wait.

    Compiling needs most of the memory of a small fit, so that free memory is returned to the system before
    it, and after it: the compiler allocates many small pieces all over the heap, and glibc keeps the free
    memory between them. For a pair of fits that is more than all the memory that they use.
    """
    seen = set()

    @functools.wraps(kernel)
    def called(*args, **kwargs):
        # each device has a compilation of its own
        kinds = [(np.shape(a), getattr(a, "dtype", None)) for a in jax.tree.leaves(args)]
        key = (jax.config.jax_default_device, *kinds, *kwargs.items())
        if key in seen:
            return kernel(*args, **kwargs)
        with _COMPILING:
            if key in seen:  # another thread has compiled it meanwhile
                return kernel(*args, **kwargs)
            give_back()
            result = kernel(*args, **kwargs)
            seen.add(key)
        give_back()
        return result

    return called


def on_cpu():
    """Whether JAX computes on the CPU."""
    device = jax.config.jax_default_device
    platform = jax.default_backend() if device is None else getattr(device, "platform", device)
    return platform == "cpu"


def local_devices():
    """Devices that batches go round, as `jax.default_device` takes them: all of this process.

    One where there is only one, or where the user set a default.
    """
    device = jax.config.jax_default_device
    devices = jax.local_devices()
    return devices if device is None and len(devices) > 1 else [device]


def n_workers():
    """Number of batches that are solved at the same time: processors, at most 8; on accelerators two each.

    While an accelerator solves a batch, the counts of the next are made dense and the sums of the last added.
    """
    if not on_cpu():
        return 2 * len(local_devices())
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), _MOST_WORKERS)
    return min(os.cpu_count() or 1, _MOST_WORKERS)


def in_order(function, tasks, workers):
    """Yield ``function(task)`` of each task in order; ``workers`` threads run at the same time.

    Where there are several devices, tasks go round them. The memory freed by the threads is returned to the
    system at the end.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    devices = local_devices()

    @float64
    def run(task, device):
        with jax.default_device(device):
            return function(task)

    with ThreadPoolExecutor(workers) as pool:
        ahead = deque()
        try:
            for i, task in enumerate(tasks):
                ahead.append(pool.submit(run, task, devices[i % len(devices)]))
                if len(ahead) > workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
    give_back()

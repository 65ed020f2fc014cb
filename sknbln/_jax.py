"""Where the library meets JAX: precision, compilation, threads.

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

# jaxlib releases that can hang for ever on 2-core CPUs on batched solvers like this one.
_HANGING_JAXLIB = re.compile(r"0\.10\.\d+|0\.11\.[01]")
_MOST_WORKERS = 8


def warn_about_jaxlib(version=jaxlib.__version__):
    """Warn when the installed jaxlib is known to hang on this kind of computation."""
    if _HANGING_JAXLIB.fullmatch(version):
        warnings.warn(
            f"jaxlib {version} can hang for ever on CPUs with two cores in computations of the kind "
            "that sknbln runs. Install another release, e.g. `pip install 'jax>=0.11.2'` or "
            "`pip install 'jax<0.10'`.",
            RuntimeWarning,
            stacklevel=3,
        )


def float64(function):
    """Run `function` with 64-bit JAX types, whatever the caller's setting; a local scope."""

    @functools.wraps(function)
    def scoped(*args, **kwargs):
        with jax.enable_x64(True):
            return function(*args, **kwargs)

    return scoped


def _malloc_trim():
    """glibc's, which gives freed memory back to the system; None where there is another allocator."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


_TRIM = _malloc_trim()
_COMPILING = threading.Lock()


def give_back():
    """Return what was freed to the system: threads have their own heaps, and what they free stays there."""
    if _TRIM is not None:
        _TRIM(0)


def tidy(kernel):
    """A jitted function that gives back what its compilation freed.

    The compiler's memory comes in small pieces all over the heap. glibc keeps what is free between them,
    which for a pair of fits is more than all that they need.
    """
    if _TRIM is None:
        return kernel

    @functools.wraps(kernel)
    def called(*args, **kwargs):
        known = kernel._cache_size()
        found = kernel(*args, **kwargs)
        if kernel._cache_size() > known:
            give_back()
        return found

    called._cache_size = kernel._cache_size
    return called


@functools.cache
def compiled_once(kernel):
    """A jitted function that threads may share: it is compiled by the first of them, the others wait."""
    seen = set()

    @functools.wraps(kernel)
    def called(*args, **kwargs):
        shapes = tuple(map(np.shape, jax.tree.leaves(args))), tuple(kwargs.items())
        if shapes in seen:
            return kernel(*args, **kwargs)
        with _COMPILING:
            found = kernel(*args, **kwargs)
            seen.add(shapes)
        return found

    return called


def on_cpu():
    """Whether JAX computes on the processor here."""
    device = jax.config.jax_default_device
    platform = jax.default_backend() if device is None else getattr(device, "platform", device)
    return platform == "cpu"


def n_workers():
    """Batches that are solved at the same time: as many as this process has processors, a few at most."""
    if not on_cpu():
        return 1
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), _MOST_WORKERS)
    return min(os.cpu_count() or 1, _MOST_WORKERS)


def in_order(function, tasks, workers):
    """``function(task)`` of each task, in their order, ``workers`` at a time in threads of their own.

    What the threads have freed is given back at the end.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    device = jax.config.jax_default_device

    @float64
    def run(task):
        with jax.default_device(device):
            return function(task)

    with ThreadPoolExecutor(workers) as pool:
        ahead = deque()
        try:
            for task in tasks:
                ahead.append(pool.submit(run, task))
                if len(ahead) > workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
    give_back()

"""Precision, import, threads and compilation: where the library meets JAX."""

import json
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from sknbln import _jax as jax_module
from sknbln._jax import float64, in_order, warn_about_jaxlib
from sknbln._passes import Sweeper, gene_score_products, solve_rows, sum_over_batches
from sknbln._rows import RowBatches
from sknbln.solver.start import information_sums

from .reference import small
from .reference.small import rows

K = small.K_ROWS


# ------------------------------------------------------------------ the user's JAX


def test_what_leaves_is_float64_numpy_and_the_users_mode_is_kept():
    assert not jax.config.jax_enable_x64
    X, offset, scale, precision, params = rows()
    batches = RowBatches(X, offset, scale, precision)
    out = [
        *solve_rows(batches, params),
        *jax.tree.leaves(Sweeper(batches, K)(params)),
        *sum_over_batches(batches, params)(information_sums),
        *jax.tree.leaves(gene_score_products(batches, params, Sweeper(batches, K).scores, True)),
    ]
    for a in out:
        assert isinstance(a, (np.ndarray, np.generic))
        assert a.dtype in (np.float64, np.int64, np.bool_)
    assert not jax.config.jax_enable_x64
    assert jnp.zeros(1).dtype == jnp.float32


@pytest.mark.parametrize("ambient", [False, True])
def test_scope_is_left_after_an_exception(ambient):
    @float64
    def fails():
        assert jax.config.jax_enable_x64
        raise KeyError("inside")

    with jax.enable_x64(ambient):
        with pytest.raises(KeyError, match="inside"):
            fails()
        assert jax.config.jax_enable_x64 is ambient
    X, offset, scale, _, params = rows()
    with pytest.raises(TypeError):
        solve_rows(RowBatches(X, offset, scale), params._replace(mean=params.mean[:-1]))
    assert not jax.config.jax_enable_x64


def test_scope_keeps_name_and_result():
    @float64
    def named(a, *, b):
        """Doc."""
        return jnp.asarray(a).dtype, b

    assert named.__name__ == "named" and named.__doc__ == "Doc."
    assert named(1.0, b=2) == (np.dtype("float64"), 2)


IMPORT = """
import json, os
import jax, numpyro, optax, sklearn
def flags():
    return {name: repr(value) for name, value in jax.config.values.items()}
before = dict(os.environ), flags()
import sknbln, sknbln.datasets
after = dict(os.environ), flags()
print(json.dumps([
    before[0] == after[0],
    before[1] == after[1],
    jax.config.jax_enable_x64,
    jax._src.xla_bridge.backends_are_initialized(),
]))
"""


def test_import_changes_neither_environment_nor_flags_and_starts_no_backend():
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", IMPORT],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [True, True, False, False]


@pytest.mark.parametrize("version", ["0.10.0", "0.10.2", "0.10.13", "0.11.0", "0.11.1"])
def test_releases_that_hang_are_named(version):
    with pytest.warns(RuntimeWarning, match=f"jaxlib {version} can hang"):
        warn_about_jaxlib(version)


@pytest.mark.parametrize("version", ["0.8.3", "0.9.2", "0.11.2", "0.11.10", "0.12.0.1", "0.1.10"])
def test_other_releases_are_not(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_about_jaxlib(version)


# ------------------------------------------------------------------ threads


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_the_order_of_the_tasks(workers):
    def slower_first(task):
        time.sleep(0.01 * (task == 0))
        return task, threading.get_ident()

    found, threads = zip(*in_order(slower_first, range(9), workers), strict=True)
    assert found == tuple(range(9))
    assert (threading.get_ident() in threads) == (workers == 1)


def test_threads_compute_in_the_callers_precision_and_on_its_device():
    (device, *_) = jax.devices("cpu")

    def looked_at(_):
        return jnp.ones(2).dtype, jax.config.jax_default_device

    with jax.default_device(device), jax.enable_x64(True):
        found = set(in_order(looked_at, range(4), 2))
    assert found == {(np.dtype("float64"), device)}


def test_an_error_ends_the_work_and_is_raised():
    done = []

    def failing(task):
        done.append(task)
        if task == 2:
            raise FloatingPointError("the third")
        return task

    found = []
    with pytest.raises(FloatingPointError, match="the third"):
        for value in in_order(failing, range(50), 2):
            found.append(value)
    assert found == [0, 1] and len(done) < 10


# ------------------------------------------------------------------ compilations


def test_threads_share_a_compilation():
    traced = []

    @jax_module.compiled_once
    @jax.jit
    def kernel(x):
        traced.append(x.shape)
        time.sleep(0.05)  # long enough for the others to come
        return 2.0 * x

    for shape in ((3,), (4,)):
        found = list(in_order(kernel, [np.full(shape, float(i)) for i in range(6)], 3))
        assert_array_equal(np.stack(found), np.tile(2.0 * np.arange(6.0)[:, None], shape))
    assert traced == [(3,), (4,)]


def test_memory_is_given_back_before_and_after_a_compilation_and_only_then(monkeypatch):
    seen = []
    monkeypatch.setattr(jax_module, "_TRIM", lambda _: seen.append("given back"))

    def traced(x):
        seen.append("traced")
        return x + 1

    kernel, once = jax_module.compiled_once(jax.jit(traced)), ["given back", "traced", "given back"]
    assert kernel(1.0) == 2.0 and seen == once
    assert kernel(2.0) == 3.0 and seen == once
    assert_array_equal(kernel(np.zeros(3)), 1.0)
    assert seen == once + once
    # where the allocator is not glibc's, nothing is given back
    monkeypatch.setattr(jax_module, "_TRIM", None)
    assert_array_equal(kernel(np.zeros(4)), 1.0)
    assert seen == [*once, *once, "traced"]


# ------------------------------------------------------------------ devices


TWO_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from sknbln._jax import compiled_once, in_order
from sknbln._passes import Sweeper
from sknbln._rows import RowBatches
from tests.reference.small import K_ROWS, rows

used = lambda task: next(iter(jnp.ones(task).devices())).id
assert list(in_order(used, [1, 2, 3, 4], 2)) == [0, 1, 0, 1]
X, *capture, params = rows()
whole, parts = (Sweeper(RowBatches(X, *capture, batch_size=size), K_ROWS) for size in (None, 8))
one = jax.tree.leaves(whole(params))
with jax.default_device(jax.local_devices()[1]):
    assert list(in_order(used, [1, 2, 3, 4], 2)) == [1] * 4
for a, b in zip(one, jax.tree.leaves(parts(params)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9 * np.max(np.abs(a), initial=1))
"""


@pytest.mark.slow
def test_batches_go_round_the_devices_of_a_machine():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", TWO_DEVICES], check=True, cwd=root, env=env)

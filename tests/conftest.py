"""Settings and fixtures that every test module shares."""

import contextlib
import faulthandler
import os

import pytest

# Before anything imports matplotlib: no test may open a window.
os.environ["MPLBACKEND"] = "Agg"

# pytest's own plugin does this too, except with `-p no:faulthandler`.
if not faulthandler.is_enabled():
    faulthandler.enable()


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

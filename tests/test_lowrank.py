"""The batched low-rank algebra against dense NumPy, one cell at a time."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from sknbln.solver import lowrank

# (cells, genes, factors): few shapes, since each is compiled; k = 0 leaves the capture column alone
SHAPES = [(1, 1, 0), (3, 2, 1), (4, 7, 3)]


@pytest.fixture(autouse=True)
def float64(strict_jax):
    with jax.enable_x64(True):
        yield


@jax.jit
def fast(W, b, scale, precision, x):
    """All functions of the module, for one system."""
    factors = lowrank.Factors.of(W)
    scales = lowrank.column_scale(scale, W.shape[1])
    M = lowrank.precision_matrix(b, factors, scales, lowrank.column_scale(precision, W.shape[1]))
    L = lowrank.cholesky(M)
    inverse = lowrank.inverse(L)
    return dict(
        M=M,
        solution=lowrank.solve(L, x),
        inverse=inverse,
        log_det=lowrank.log_det(L),
        diagonal=factors.quadratic_diagonal(inverse),
        lifted=factors.lift(x),
        projected=factors.project(b),
    )


def dense(W, b, scale, precision, x):
    """The same by loops over cells."""
    names = "M solution inverse log_det diagonal lifted projected".split()
    out = {name: [] for name in names}
    F = np.column_stack([W, np.ones(len(W))])
    for c in range(len(b)):
        S = np.diag(np.r_[np.ones(W.shape[1]), scale[c]])
        P = np.diag(np.r_[np.ones(W.shape[1]), precision[c]])
        M = P + S @ F.T @ np.diag(b[c]) @ F @ S
        out["M"].append(M)
        out["solution"].append(np.linalg.solve(M, x[c]))
        out["inverse"].append(np.linalg.inv(M))
        out["log_det"].append(np.linalg.slogdet(M)[1])
        out["diagonal"].append(np.diag(F @ np.linalg.inv(M) @ F.T))
        out["lifted"].append(F @ x[c])
        out["projected"].append(F.T @ b[c])
    return {name: np.array(value) for name, value in out.items()}


def draw(shape, seed, size, zero_share):
    rng = np.random.default_rng(seed)
    n, G, k = shape
    W = size * rng.standard_normal((G, k))
    b = np.exp(rng.uniform(-4, 4, (n, G))) * (rng.uniform(size=(n, G)) >= zero_share)
    scale = rng.uniform(0.0, 2.0, n) * (rng.uniform(size=n) < 0.7)
    x = rng.standard_normal((n, k + 1))
    return W, b, scale, np.ones(n), x


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(SHAPES),
    st.integers(0, 2**32 - 1),
    st.floats(0.0, 3.0),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_everything_equals_dense_numpy(shape, seed, size, zero_share):
    problem = draw(shape, seed, size, zero_share)
    found, expected = fast(*problem), dense(*problem)
    # the condition number of M is at most 1 + |W|^2 sum b, 1e5 here
    for name, value in expected.items():
        assert_allclose(found[name], value, rtol=1e-10, atol=1e-10, err_msg=name)


def test_flat_offset_has_no_prior_precision():
    W, b, scale, _, x = draw(SHAPES[2], 0, 0.5, 0.0)
    scale[:] = 1.0
    precision = np.zeros_like(scale)
    found, expected = fast(W, b, scale, precision, x), dense(W, b, scale, precision, x)
    for name, value in expected.items():
        assert_allclose(found[name], value, rtol=1e-10, atol=1e-12, err_msg=name)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 2**32 - 1), st.floats(0.0, 2.0))
def test_determinant_identity(shape, seed, size):
    """``det(I + A Sigma) = prod(1 + d a) det M`` with ``b = a / (1 + d a)``."""
    W, a, scale, precision, x = draw(shape, seed, size, 0.2)
    rng = np.random.default_rng(seed)
    d = rng.uniform(0.0, 2.0, len(W)) * (rng.uniform(size=len(W)) < 0.7)
    den = 1 + d * a
    found = np.log(den).sum(1) + fast(W, a / den, scale, precision, x)["log_det"]
    for c in range(len(a)):
        F = np.column_stack([W, np.full(len(W), scale[c])])
        Sigma = F @ F.T + np.diag(d)
        sign, expected = np.linalg.slogdet(np.eye(len(W)) + np.diag(a[c]) @ Sigma)
        assert sign == 1
        assert_allclose(found[c], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_triangle_packs_and_unpacks(n):
    i, j, back = lowrank.triangle(n)
    A = np.arange(n * n).reshape(n, n)
    A = A + A.T
    assert i.size == n * (n + 1) // 2
    assert_array_equal(A[i, j][back], A)


def test_a_zero_column_decouples():
    """The latent dimension is padded with such columns."""
    W, b, scale, precision, x = draw(SHAPES[2], 3, 0.7, 0.1)
    W[:, 1] = 0.0
    found = fast(W, b, scale, precision, x)
    assert_array_equal(found["M"][:, 1], np.tile(np.eye(4)[1], (4, 1)))
    assert_array_equal(found["solution"][:, 1], x[:, 1])

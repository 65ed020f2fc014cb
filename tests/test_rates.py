"""Draws of log-rates from their Laplace posterior, against dense matrices."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from sknbln.solver.rates import draw_rates

from .reference import direct, small


@pytest.fixture(autouse=True)
def float64(strict_jax):
    with jax.enable_x64(True):
        yield


def twin(cells, params, r, c):
    loc = params.mean - cells.offset[c]
    flat = cells.precision[c] == 0
    W, d, scale = params.loadings, params.noise, cells.scale[c]
    return direct.laplace_whitened(cells.counts[c], loc, W, d, scale, r, flat_offset=flat)


KINDS = [
    dict(),
    dict(poisson=True),
    dict(capture="fixed"),
    dict(capture="free"),
    dict(capture="flat"),
]


@pytest.mark.parametrize("zero_noise", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_draws_are_from_the_laplace_posterior(kind, zero_noise):
    """A draw is affine in its noise: unit vectors give its matrix, and with it the exact covariance."""
    cells, params, r = small.problem(seed=1, **kind)
    if zero_noise:
        noise = params.noise.copy()
        noise[::3] = 0.0
        params = params._replace(noise=noise)
    n, n_genes, k = *cells.counts.shape, params.loadings.shape[1]
    alpha, results = small.solved(cells, params)

    def draw(e):
        e = np.tile(e, (n, 1))
        return np.asarray(
            draw_rates(cells, params, results.zeta, alpha, e[:, : k + 1], e[:, k + 1 :])
        )

    center = draw(np.zeros(k + 1 + n_genes))
    columns = np.stack([draw(e) - center for e in np.eye(k + 1 + n_genes)], axis=2)
    for c in range(n):
        expected = twin(cells, params, r, c)
        assert_allclose(center[c], expected.y, atol=1e-7)
        assert_allclose(columns[c] @ columns[c].T, expected.covariance, atol=1e-8)


def test_a_draw_without_noise_is_the_mode():
    cells, params, r = small.problem(seed=2)
    alpha, results = small.solved(cells, params)
    noise = np.zeros((small.N_CELLS, small.RANK + 1)), np.zeros((small.N_CELLS, small.N_GENES))
    y = draw_rates(cells, params, results.zeta, alpha, *noise)
    for c in range(small.N_CELLS):
        assert_allclose(y[c], twin(cells, params, r, c).y, atol=1e-9)

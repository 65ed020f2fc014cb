"""The Newton iteration per cell: the dense twin's mode, from any start and in any batch."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sknbln.solver import mode as mode_module
from sknbln.solver.mode import DECREMENT_TOL, MAX_NEWTON
from sknbln.solver.params import Cells, Params

from .reference import direct, small
from .reference.live_step import newton_step

find_mode = jax.jit(mode_module.find_mode)
KINDS = [
    dict(),
    dict(poisson=True),
    dict(capture="fixed"),
    dict(capture="free"),
    dict(capture="free", poisson=True),
    dict(capture="flat"),
]
# The last Newton step starts from a decrement below 1e-9, so it ends at rounding.
TOL = dict(rtol=1e-9, atol=1e-9)


@pytest.fixture(autouse=True)
def float64(strict_jax):
    with jax.enable_x64(True):
        yield


def solved(cells, params, zeta=None):
    zeta = small.zeros(cells, params) if zeta is None else zeta
    return jax.tree.map(np.asarray, find_mode(cells, params, zeta))


def twin(cells, params, r, c):
    """Dense mode of cell c."""
    return direct.laplace_whitened(
        cells.counts[c],
        params.mean - cells.offset[c],
        params.loadings,
        params.noise,
        cells.scale[c],
        r,
        flat_offset=cells.precision[c] == 0,
    )


def per_cell(mode):
    """The arrays with one row per cell."""
    return mode._asdict() | {"n_iter": np.zeros(len(mode.y))}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_mode_is_the_dense_twins(kind):
    cells, params, r = small.problem(1, **kind)
    mode = solved(cells, params)
    assert mode.converged.all()
    for c in range(small.N_CELLS):
        assert_allclose(mode.y[c], twin(cells, params, r, c).y, **TOL)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_mode_solves_its_equations(kind):
    """``y = loc + F zeta + d alpha``, alpha the likelihood's gradient, ``P zeta = F' alpha``."""
    cells, params, r = small.problem(2, **kind)
    mode = solved(cells, params)
    for c in range(small.N_CELLS):
        F = direct.factors(params.loadings, cells.scale[c])
        loc = params.mean - cells.offset[c]
        P = np.r_[np.ones(small.RANK), cells.precision[c]]
        assert_allclose(mode.y[c], loc + F @ mode.zeta[c] + params.noise * mode.alpha[c], **TOL)
        gradient = direct.pmf_derivatives(cells.counts[c], mode.y[c], r)[0]
        # the remaining gradient is the error of y times the curvature, a few hundred
        assert_allclose(mode.alpha[c], gradient, atol=1e-7)
        assert_allclose(P * mode.zeta[c], F.T @ mode.alpha[c], atol=1e-7)


def test_decrement_is_below_its_tolerance():
    cells, params, _ = small.problem(3)
    mode = solved(cells, params)
    assert np.all(mode.decrement <= DECREMENT_TOL)
    assert 1 < mode.n_iter <= 12


def test_a_newton_step_from_the_mode_stays_there():
    cells, params, _ = small.problem(3)
    mode = solved(cells, params)
    zeta, alpha = newton_step(cells, params, mode.y)
    assert_allclose(zeta, mode.zeta, **TOL)
    assert_allclose(alpha, mode.alpha, atol=1e-7)


def test_start_does_not_matter():
    cells, params, _ = small.problem(4)
    rng = np.random.default_rng(0)
    mode = solved(cells, params)
    for size in (1.0, 30.0):
        zeta = size * rng.standard_normal((small.N_CELLS, small.RANK + 1))
        other = solved(cells, params, zeta)
        assert other.converged.all()
        assert_allclose(other.y, mode.y, **TOL)


def test_no_noise_in_some_genes_or_in_all():
    cells, params, r = small.problem(5)
    noise = params.noise.copy()
    noise[::3] = 0.0
    for d in (noise, np.zeros_like(noise)):
        without = params._replace(noise=d)
        mode = solved(cells, without)
        assert mode.converged.all()
        for c in range(small.N_CELLS):
            assert_allclose(mode.y[c], twin(cells, without, r, c).y, **TOL)


def test_no_prior_variance_at_all():
    cells, params, _ = small.problem(6, capture="fixed")
    params = params._replace(loadings=0 * params.loadings, noise=0 * params.noise)
    mode = solved(cells, params)
    assert mode.converged.all()
    assert_array_equal(mode.y, params.mean[None, :] - cells.offset[:, None])
    assert_array_equal(mode.zeta, 0.0)


def test_a_cell_alone_is_the_cell_among_others():
    cells, params, _ = small.problem(7)
    together = per_cell(solved(cells, params))
    for c in range(small.N_CELLS):
        one = Cells(*(a[c : c + 1] for a in cells))
        for name, value in per_cell(solved(one, params)).items():
            assert_allclose(value[0], together[name][c], err_msg=name, rtol=1e-9, atol=1e-9)


def test_an_extreme_cell_does_not_touch_the_others():
    cells, params, _ = small.problem(7)
    counts = cells.counts.copy()
    counts[3] = 1e7
    usual, other = solved(cells, params), solved(cells._replace(counts=counts), params)
    keep = np.arange(small.N_CELLS) != 3
    assert not np.allclose(usual.y[3], other.y[3])
    assert_allclose(other.y[keep], usual.y[keep], rtol=1e-9, atol=1e-9)


def test_permuted_rows():
    cells, params, _ = small.problem(8)
    order = np.random.default_rng(0).permutation(small.N_CELLS)
    mode = per_cell(solved(cells, params))
    other = per_cell(solved(Cells(*(a[order] for a in cells)), params))
    for name, value in other.items():
        assert_allclose(value, mode[name][order], err_msg=name, rtol=1e-9, atol=1e-9)


def test_permuted_genes():
    cells, params, _ = small.problem(8)
    order = np.random.default_rng(1).permutation(small.N_GENES)
    mode = solved(cells, params)
    other = solved(
        cells._replace(counts=cells.counts[:, order]), Params(*(a[order] for a in params))
    )
    assert_allclose(other.y, mode.y[:, order], **TOL)
    assert_allclose(other.zeta, mode.zeta, **TOL)
    assert_allclose(other.alpha, mode.alpha[:, order], atol=1e-7)


def test_padding_rows_change_nothing_and_cost_no_iteration():
    cells, params, _ = small.problem(9)
    mode = solved(cells, params)
    weight = np.ones(small.N_CELLS)
    weight[5:] = 0.0
    counts = cells.counts.copy()
    counts[5:] = 1e9
    padded = solved(cells._replace(weight=weight, counts=counts), params)
    assert_allclose(padded.y[:5], mode.y[:5], rtol=1e-12, atol=1e-12)
    assert padded.n_iter <= mode.n_iter
    nothing = solved(cells._replace(weight=np.zeros(small.N_CELLS)), params)
    assert nothing.n_iter == 0


def test_padded_latent_columns_change_nothing():
    cells, params, _ = small.problem(9)
    few = params._replace(loadings=params.loadings[:, :2])
    wide = np.column_stack([few.loadings, np.zeros((small.N_GENES, 2))])
    mode, padded = solved(cells, few), solved(cells, params._replace(loadings=wide))
    assert_array_equal(padded.zeta[:, 2:4], 0.0)
    assert_allclose(padded.zeta[:, [0, 1, 4]], mode.zeta, **TOL)
    assert_allclose(padded.y, mode.y, **TOL)


def extreme_counts():
    """A million in one gene, nothing at all, one count, a million everywhere."""
    counts = np.zeros((small.N_CELLS, small.N_GENES))
    counts[0, 4] = 1e6
    counts[2, 0] = 1.0
    counts[3] = 1e6
    counts[4] = np.tile([0.0, 1e6], 6)
    counts[5:] = np.arange(12.0)
    return counts


@pytest.mark.parametrize("noise", [1.0, 0.0, 1e3], ids=lambda v: f"noise{v:g}")
@pytest.mark.parametrize("poisson", [False, True], ids=["nb", "poisson"])
@pytest.mark.parametrize("capture", ["fixed", "free"])
def test_extreme_counts_converge(capture, poisson, noise):
    cells, params, r = small.problem(10, poisson=poisson, capture=capture)
    cells = cells._replace(counts=extreme_counts())
    params = params._replace(noise=noise * params.noise)
    mode = solved(cells, params)
    assert mode.converged.all()
    assert np.all(np.isfinite(mode.y))
    # stationary: the remaining gradient is small beside its terms
    for c in range(small.N_CELLS):
        gradient = direct.pmf_derivatives(cells.counts[c], mode.y[c], r)[0]
        F = direct.factors(params.loadings, cells.scale[c])
        size = 1 + np.abs(F).T @ (cells.counts[c] + np.exp(mode.y[c]))
        assert np.all(np.abs(mode.zeta[c] - F.T @ gradient) < 1e-7 * size)


@pytest.mark.parametrize("shift", [-30.0, 30.0])
def test_means_far_from_the_counts_converge(shift):
    cells, params, _ = small.problem(11)
    mode = solved(cells, params._replace(mean=params.mean + shift))
    assert mode.converged.all()
    assert mode.n_iter < MAX_NEWTON / 2


def test_discordant_cells_converge():
    """Counts up to three nats from the mean in every gene, and four in ten of them dropped to 0."""
    C, G = small.N_CELLS, small.N_GENES
    for seed in range(100):
        rng = np.random.default_rng(seed)
        mean = rng.uniform(-2, 8, G)
        loadings = rng.standard_normal((G, small.RANK)) * np.exp(rng.uniform(-3, 0))
        noise = np.exp(rng.uniform(np.log(0.01), 0, G)) * (rng.uniform(size=G) < 0.9)
        phi = np.exp(rng.uniform(np.log(1e-3), np.log(10), G)) * (rng.uniform(size=G) < 0.8)
        rate = np.exp(mean + rng.uniform(-3, 3, (C, G))) * (rng.uniform(size=(C, G)) < 0.6)
        scale = rng.uniform(0, 2, C) * (rng.uniform(size=C) < 0.7)
        cells = Cells(
            rng.poisson(rate).astype(float), rng.uniform(-1, 1, C), scale, np.ones(C), np.ones(C)
        )
        mode = solved(cells, Params(mean, loadings, noise, phi))
        assert mode.converged.all(), f"seed {seed}"
        assert mode.n_iter < MAX_NEWTON / 2, f"seed {seed}"


def test_flat_offset_is_where_fitted_and_observed_totals_agree():
    cells, params, r = small.problem(12, capture="flat")
    mode = solved(cells, params)
    assert mode.converged.all()
    for c in range(small.N_CELLS):
        gradient = direct.pmf_derivatives(cells.counts[c], mode.y[c], r)[0]
        assert abs(gradient.sum()) < 1e-7
    # the prior location of a flat offset says nothing
    other = solved(cells._replace(offset=cells.offset + 2.5), params)
    assert_allclose(other.y, mode.y, **TOL)
    assert_allclose(other.zeta[:, -1], mode.zeta[:, -1] + 2.5, **TOL)


def test_the_largest_number_of_iterations_is_kept_and_reported(monkeypatch):
    monkeypatch.setattr(mode_module, "MAX_NEWTON", 2)
    cells, params, _ = small.problem(13)
    cells = cells._replace(counts=extreme_counts())
    mode = jax.jit(lambda *args: mode_module.find_mode(*args))(
        cells, params, small.zeros(cells, params)
    )
    assert mode.n_iter == 2
    assert not np.all(mode.converged)

"""The steps of the globals from the sums over cells."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sknbln._laplace.driver import Free
from sknbln._laplace.lowrank import triangle
from sknbln._laplace.objective import MarginalCoupling
from sknbln._laplace.shrinkage import ColumnPenalty
from sknbln._laplace.sweeps import (
    LOG_DISPERSION_RANGE,
    NOISE_RANGE,
    Columns,
    Parameters,
    column_step,
    curvature_product,
    least_squares_matrix,
    packed,
    regression_step,
    scale_step,
    shift_step,
)

from .reference import small
from .reference.ascent import K, problem

ALL = Free(True, True, True, True)


def gradients():
    evaluate, start = problem(13)
    return evaluate(start).grad


@pytest.mark.parametrize("free_mean, free_loadings", [(True, True), (True, False), (False, True)])
def test_regression_step_solves_each_genes_system(free_mean, free_loadings):
    grad = gradients()
    mean, loadings = regression_step(grad, free_mean, free_loadings)
    A = least_squares_matrix(grad.moments, K)
    assert_allclose(A, np.swapaxes(A, 1, 2))
    keep = np.r_[free_mean, [free_loadings] * K].astype(bool)
    for g in range(small.N_GENES):
        rhs = np.r_[grad.mean[g], grad.loadings[g]][keep]
        expected = np.zeros(K + 1)
        expected[keep] = np.linalg.solve(A[g][np.ix_(keep, keep)], rhs)
        assert_allclose(np.r_[mean[g], loadings[g]], expected, rtol=1e-5, atol=1e-8)


def test_regression_step_of_nothing():
    mean, loadings = regression_step(gradients(), False, False)
    assert not mean.any() and not loadings.any()


def test_regression_step_of_a_gene_without_information_is_finite():
    grad = gradients()
    empty = grad._replace(
        moments=np.zeros_like(grad.moments),
        mean=np.zeros_like(grad.mean),
        loadings=np.zeros_like(grad.loadings),
    )
    mean, loadings = regression_step(empty, True, True)
    assert_array_equal(mean, 0.0)
    assert_array_equal(loadings, 0.0)


def with_prior(grad, precision):
    """The moments as the objective has them under a prior of the columns."""
    i, j, _ = triangle(K)
    moments = grad.moments.copy()
    moments[:, 1 + K + np.flatnonzero(i == j)] += precision
    return grad._replace(moments=moments)


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("free_mean", [True, False])
def test_regression_step_leaves_what_the_genes_share_to_the_data(free_mean, coupled):
    """A prior holds deviations of the natural loadings from their mean; one of the columns has none."""
    grad, G = gradients(), small.N_GENES
    precision = np.array([50.0, 0.0])
    natural = grad.columns.natural
    if coupled:
        natural = natural + 0.3 * np.random.default_rng(3).standard_normal(natural.shape)
    columns = grad.columns._replace(
        precision=precision, known=grad.columns.assumed, natural=natural
    )
    A = least_squares_matrix(grad.moments, K)
    A[:, 1:, 1:] += np.swapaxes(natural, 1, 2) @ (precision[:, None] * natural)
    grad = grad._replace(columns=columns, moments=packed(A))
    whole = np.zeros((G, K + 1, G, K + 1))
    for g, A in enumerate(least_squares_matrix(grad.moments, K)):
        whole[g, :, g, :] = A
    whole[:, 1:, :, 1:] -= np.einsum("gki,k,hkj->gihj", natural, precision / G, natural)
    keep = np.tile(np.r_[free_mean, [True] * K], G).astype(bool)
    rhs = np.concatenate([grad.mean[:, None], grad.loadings], 1).ravel()
    expected = np.zeros(G * (K + 1))
    whole = whole.reshape(expected.size, -1)
    expected[keep] = np.linalg.solve(whole[np.ix_(keep, keep)], rhs[keep])
    mean, loadings = regression_step(grad, free_mean, True)
    found = np.concatenate([mean[:, None], loadings], 1).ravel()
    assert_allclose(found, expected, rtol=1e-5, atol=1e-8)
    # and the product is that matrix's
    step = Parameters(mean, loadings, np.zeros(G), np.zeros(G))
    product = curvature_product(grad, step, ALL)
    back = np.concatenate([product.mean[:, None], product.loadings], 1).ravel()
    assert_allclose(back[keep], rhs[keep], rtol=1e-5, atol=1e-8)


def test_curvature_product_is_positive_where_the_columns_take_more_than_there_is():
    rng = np.random.default_rng(11)
    precision, zero = np.array([1e4, 1e-2]), np.zeros(small.N_GENES)
    grad = with_prior(gradients(), precision)
    for weight in (1e-3, 1.0, 1e3):  # in what the regressions are said to assume
        columns = Columns.at(grad.loadings, np.full(zero.size, weight), 50, precision)
        for _ in range(20):
            step = Parameters(zero, columns.lift(rng.standard_normal((K, K))), zero, zero)
            product = curvature_product(grad._replace(columns=columns), step, ALL)
            assert np.sum(product.loadings * step.loadings) > 0


def test_shift_step_completes_newtons_step_of_a_common_shift():
    grad = gradients()
    assumed = grad.moments[:, 0].sum()
    assert 0 < grad.information_shift < assumed
    total = grad.mean.sum() / assumed + shift_step(grad)
    assert_allclose(total, grad.mean.sum() / grad.information_shift, rtol=1e-12)
    assert shift_step(grad._replace(information_shift=assumed)) == 0.0


def columns_at(loadings, precision=0.0, n_cells=50):
    weight = n_cells * np.random.default_rng(3).uniform(0.2, 3.0, loadings.shape[0])
    return Columns.at(loadings, weight, n_cells, precision), weight


def test_information_of_columns_is_that_of_a_factor_model():
    """What is known of W (I + S), against Fisher's information of a Gaussian factor model."""
    rng = np.random.default_rng(4)
    n, W = 50, rng.standard_normal((60, 3)) * [2.0, 1.0, 0.6]
    columns, weight = columns_at(W, n_cells=n)
    precision = np.diag(weight / n)  # of each gene's working response
    inverse = np.linalg.inv(W @ W.T + np.linalg.inv(precision))
    for i in range(3):
        for j in range(i + 1):
            S = np.zeros((3, 3))
            S[i, j] = S[j, i] = 1.0
            S = columns.basis @ S @ columns.basis.T  # in which every entry has a number of its own
            change = columns.lift(S)
            slope = W @ change.T
            slope = slope + slope.T  # of the covariance
            fisher = n / 2 * np.trace(inverse @ slope @ inverse @ slope)
            known = np.sum(S * columns.times(columns.known, S))
            assert_allclose(known, fisher, rtol=1e-8)
            assert_allclose(
                np.sum(S * columns.times(columns.assumed, S)),
                np.sum(weight[:, None] * change**2),
                rtol=1e-8,
            )


def test_information_of_columns_is_between_nothing_and_what_is_assumed():
    """Of symmetric changes, rotations and all mixtures, so that the step climbs whatever the gradient."""
    rng = np.random.default_rng(9)
    for size in ([2.0, 1.0, 0.6], [30.0, 0.1, 1e-3], [1e-2, 1e-3, 1e-4]):
        W = rng.standard_normal((60, 3)) * size
        columns, _ = columns_at(W, rng.uniform(0.1, 10.0, 3))
        units = np.eye(9).reshape(9, 3, 3)
        known, assumed = (
            np.array([columns.times(information, S).ravel() for S in units])
            for information in (columns.known, columns.assumed)
        )
        for matrix in (known, assumed - known):
            assert_allclose(matrix, matrix.T, atol=1e-10 * np.abs(matrix).max())
            values = np.linalg.eigvalsh((matrix + matrix.T) / 2)
            assert values.min() > -1e-12 * values.max()


@pytest.mark.parametrize("precision", [0.0, np.array([0.5, 2.0, 1e6])])
def test_inverse_of_the_columns_information(precision):
    rng = np.random.default_rng(10)
    columns, _ = columns_at(rng.standard_normal((60, 3)), precision)
    S = rng.standard_normal((3, 3))
    if not np.any(precision):
        S = S + S.T  # of a rotation nothing is known
    back = columns.inverse(columns.known, columns.times(columns.known, S))
    assert_allclose(back, S, rtol=1e-5, atol=1e-6)
    if np.any(precision):
        back = columns.inverse(columns.assumed, columns.times(columns.assumed, S))
        assert_allclose(back, S, rtol=1e-5, atol=1e-6)


def test_columns_of_noise_and_of_nothing_take_the_regressions_step():
    rng = np.random.default_rng(5)
    W = np.c_[1e-3 * rng.standard_normal((12, 2)), np.zeros(12)]
    grad = gradients()._replace(columns=columns_at(W)[0], loadings=rng.standard_normal((12, 3)))
    assert_allclose(column_step(grad), 0.0, atol=1e-30)
    nothing = np.zeros((12, 0))
    grad = grad._replace(columns=columns_at(nothing)[0], loadings=nothing)
    assert column_step(grad).shape == (12, 0)


def test_columns_of_nothing_under_a_prior():
    """As where a prior has taken all columns to zero: what is known is singular."""
    rng = np.random.default_rng(12)
    for _ in range(20):
        alike = rng.standard_normal((12, 1)) * [1.0, -4e-3]
        for W in (np.zeros((12, 2)), 1e-16 * (alike + rng.standard_normal(2))):
            columns = Columns.at(W, 1e-200 * np.ones(12), 50, np.array([1e6, 1e6]))
            grad = gradients()._replace(columns=columns, loadings=rng.standard_normal((12, 2)))
            assert np.all(np.isfinite(column_step(grad)))


def test_prior_of_the_columns_is_part_of_their_information():
    rng = np.random.default_rng(6)
    W = rng.standard_normal((12, 3))
    weight = np.ones(12)
    precision = np.array([0.5, 2.0, 30.0])
    held = Columns.at(W, weight, 12, precision)
    free = held._replace(precision=np.zeros(3))
    S = rng.standard_normal((3, 3))
    pull = np.sum(precision * np.sum(((W - W.mean(0)) @ S) ** 2, 0))
    for name in ("known", "assumed"):
        with_prior, without = (np.sum(S * c.times(getattr(c, name), S)) for c in (held, free))
        assert_allclose(with_prior - without, pull, rtol=1e-10)


def test_column_step_climbs():
    """A rise by any gradient, and Newton's step along W S for a gradient of that kind alone."""
    rng = np.random.default_rng(7)
    W = rng.standard_normal((12, 3))
    columns, weight = columns_at(W)
    grad = gradients()._replace(columns=columns)
    for precision in (0.0, rng.uniform(0.1, 100.0, 3)):
        grad = grad._replace(columns=columns_at(W, precision)[0])
        for _ in range(20):
            grad = grad._replace(loadings=rng.standard_normal((12, 3)))
            assert np.sum(column_step(grad) * grad.loadings) >= 0
    grad = grad._replace(columns=columns)
    # the gradient of a quadratic function of S alone, as the regression sees it
    S = rng.standard_normal((3, 3))
    S += S.T
    change = columns.lift(S)
    regression = change.copy()  # A^{-1} times the gradient below
    grad = grad._replace(loadings=weight[:, None] * change)
    total = regression + column_step(grad)
    newton = columns.inverse(columns.known, columns.times(columns.assumed, S))
    assert_allclose(total, columns.lift(newton), rtol=1e-10)


def test_scale_step_is_newtons_inside_its_bounds():
    assert_allclose(scale_step(np.array([0.5, -0.2]), np.array([2.0, 4.0])), [0.25, -0.05])
    wild = scale_step(np.array([1e9, -1e9, 0.0]), np.array([1e-12, -5.0, 0.0]))
    assert_array_equal(wild, [1.0, -1.0, 0.0])


@pytest.mark.parametrize(
    "free", [ALL, Free(True, False, True, True), Free(False, True, True, True)]
)
def test_curvature_product_is_what_the_steps_invert(free):
    """Each block's step maps the product back to the direction it was made of."""
    grad = gradients()
    # the columns' own part, below, is inverted exactly only where the regressions are alike
    grad = grad._replace(columns=grad.columns._replace(known=grad.columns.assumed))
    rng = np.random.default_rng(0)
    blocks = (grad.mean, grad.loadings, grad.log_noise, grad.log_r)
    # small steps of scales: they are cut at one nat
    direction = Parameters(
        *(0.1 * f * rng.standard_normal(b.shape) for b, f in zip(blocks, free, strict=True))
    )
    product = curvature_product(grad, direction, free)
    back = regression_step(
        grad._replace(mean=product.mean, loadings=product.loadings), free.mean, free.loadings
    )
    # the regression adds 1e-10 of its diagonal
    assert_allclose(back[0], direction.mean, rtol=1e-6, atol=1e-8)
    assert_allclose(back[1], direction.loadings, rtol=1e-6, atol=1e-8)
    for name in ("log_noise", "log_r"):
        gradient, information = getattr(grad, name), getattr(grad, f"information_{name}")
        step = getattr(direction, name)
        newton = information > 1e-8 + 0.1 * np.abs(gradient)
        assert newton.any()
        assert_allclose(getattr(product, name)[newton], (information * step)[newton], rtol=1e-14)
        # the step of the gradient, where it is not cut, is mapped to the gradient
        step = scale_step(gradient, information)
        mapped = curvature_product(grad, direction._replace(**{name: step}), free)
        inside = np.abs(step) < 1.0
        assert inside.any()
        assert_allclose(getattr(mapped, name)[inside], gradient[inside], rtol=1e-12)


def test_curvature_product_inverts_the_columns_step():
    """Where each gene's matrix is its weight times the identity, as when scores are well known."""
    rng = np.random.default_rng(8)
    W = rng.standard_normal((small.N_GENES, K))
    columns, weight = columns_at(W)
    i, j, _ = triangle(K)
    moments = np.concatenate([np.ones(1), np.zeros(K), (i == j).astype(float)])
    grad = gradients()._replace(moments=weight[:, None] * moments, columns=columns)
    step = Parameters(
        *(np.zeros_like(b) for b in (grad.mean, grad.loadings, grad.log_noise, grad.log_r))
    )
    step = step._replace(loadings=rng.standard_normal(W.shape))
    product = curvature_product(grad, step, ALL)
    assert np.all(product.mean == 0)
    assert np.sum(product.loadings * step.loadings) > 0
    regression = product.loadings / weight[:, None]
    back = regression + column_step(grad._replace(loadings=product.loadings))
    assert_allclose(back, step.loadings, rtol=1e-10, atol=1e-12)
    # of loadings that are not free there is no part
    held = curvature_product(grad, step, ALL._replace(loadings=False))
    assert_allclose(held.loadings, weight[:, None] * step.loadings, rtol=1e-12)


def test_scales_stay_in_their_ranges():
    x = problem(14)[1]
    step = Parameters(
        *(np.full(b.shape, s) for b, s in zip(x, (1.0, 1.0, 99.0, -99.0), strict=True))
    )
    moved = x.moved(step, 1.0)
    assert_allclose(moved.log_noise, NOISE_RANGE[1])
    assert_allclose(moved.log_r, LOG_DISPERSION_RANGE[0])
    assert_allclose(moved.mean, x.mean + 1)


@pytest.mark.parametrize("dispersion", [True, False])
def test_coupled_loadings_take_the_regressions_step(dispersion):
    """Their common change moves means and dispersions too, of which its information knows nothing."""
    evaluate, start = problem(15, MarginalCoupling(dispersion))
    x = start._replace(loadings=3.0 * start.loadings)
    grad = evaluate(x).grad
    assert_array_equal(column_step(grad), 0.0)
    free = problem(15)[0](x).grad
    assert np.any(column_step(free) != 0)
    # under a prior, which holds rotations, theirs alone is longer
    evaluate.penalty = ColumnPenalty(np.array([1.0, 50.0]), np.zeros(K), np.zeros(small.N_GENES))
    columns = evaluate(x).grad.columns
    turn = columns.basis @ np.array([[0.0, 1.0], [-1.0, 0.0]]) @ columns.basis.T
    lengths = columns.basis @ np.diag([1.0, 2.0]) @ columns.basis.T

    def information(of, S):
        return np.sum(S * columns.times(of, S))

    assert_allclose(
        information(columns.known, lengths), information(columns.assumed, lengths), rtol=1e-10
    )
    assert information(columns.known, turn) < information(columns.assumed, turn)

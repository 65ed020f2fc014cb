"""A common change of all loadings: its information, and its step beyond that of the regressions."""

import warnings

import numpy as np
import pytest
from numpy.testing import assert_allclose

from sknbln.solver.column_priors import ColumnPenalty
from sknbln.solver.columns import Columns
from sknbln.solver.coupling import MarginalCoupling

from .reference import small
from .reference.ascent import K, problem
from .reference.coupling import total


def columns_at(loadings, precision=0.0, n_cells=50):
    weight = n_cells * np.random.default_rng(3).uniform(0.2, 3.0, loadings.shape[0])
    return Columns.at(loadings, weight, n_cells, precision), weight


def test_information_of_columns_is_that_of_a_factor_model():
    """The observed information in W (I + S), against Fisher's of a Gaussian factor model."""
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
            observed = np.sum(S * columns.times(columns.observed, S))
            assert_allclose(observed, fisher, rtol=1e-8)
            assert_allclose(
                np.sum(S * columns.times(columns.complete, S)),
                np.sum(weight[:, None] * change**2),
                rtol=1e-8,
            )


def test_information_of_columns_is_between_nothing_and_that_of_complete_data():
    """For all changes, symmetric or not, so that the step ascends for any gradient."""
    rng = np.random.default_rng(9)
    for size in ([2.0, 1.0, 0.6], [30.0, 0.1, 1e-3], [1e-2, 1e-3, 1e-4]):
        W = rng.standard_normal((60, 3)) * size
        columns, _ = columns_at(W, rng.uniform(0.1, 10.0, 3))
        units = np.eye(9).reshape(9, 3, 3)
        observed, complete = (
            np.array([columns.times(information, S).ravel() for S in units])
            for information in (columns.observed, columns.complete)
        )
        for matrix in (observed, complete - observed):
            assert_allclose(matrix, matrix.T, atol=1e-10 * np.abs(matrix).max())
            values = np.linalg.eigvalsh((matrix + matrix.T) / 2)
            assert values.min() > -1e-12 * values.max()


@pytest.mark.parametrize("precision", [0.0, np.array([0.5, 2.0, 1e6])])
def test_inverse_of_the_columns_information(precision):
    rng = np.random.default_rng(10)
    columns, _ = columns_at(rng.standard_normal((60, 3)), precision)
    S = rng.standard_normal((3, 3))
    if not np.any(precision):
        S = S + S.T  # without a prior there is no information in a rotation
    back = columns.inverse(columns.observed, columns.times(columns.observed, S))
    assert_allclose(back, S, rtol=1e-5, atol=1e-6)
    if np.any(precision):
        back = columns.inverse(columns.complete, columns.times(columns.complete, S))
        assert_allclose(back, S, rtol=1e-5, atol=1e-6)


def test_columns_of_noise_and_zero_columns_take_the_regressions_step():
    rng = np.random.default_rng(5)
    W = np.c_[1e-3 * rng.standard_normal((12, 2)), np.zeros(12)]
    columns = columns_at(W)[0]
    assert_allclose(columns.step(rng.standard_normal((12, 3))), 0.0, atol=1e-30)
    nothing = np.zeros((12, 0))
    assert columns_at(nothing)[0].step(nothing).shape == (12, 0)


def test_zero_columns_under_a_prior():
    """A prior may take all columns to zero, where the observed information is singular."""
    rng = np.random.default_rng(12)
    for _ in range(20):
        alike = rng.standard_normal((12, 1)) * [1.0, -4e-3]
        for W in (np.zeros((12, 2)), 1e-16 * (alike + rng.standard_normal(2))):
            columns = Columns.at(W, 1e-200 * np.ones(12), 50, np.array([1e6, 1e6]))
            assert np.all(np.isfinite(columns.step(rng.standard_normal((12, 2)))))


def test_prior_of_the_columns_is_part_of_their_information():
    rng = np.random.default_rng(6)
    W = rng.standard_normal((12, 3))
    weight = np.ones(12)
    precision = np.array([0.5, 2.0, 30.0])
    held = Columns.at(W, weight, 12, precision)
    free = held._replace(precision=np.zeros(3))
    S = rng.standard_normal((3, 3))
    pull = np.sum(precision * np.sum(((W - W.mean(0)) @ S) ** 2, 0))
    for name in ("observed", "complete"):
        with_prior, without = (np.sum(S * c.times(getattr(c, name), S)) for c in (held, free))
        assert_allclose(with_prior - without, pull, rtol=1e-10)


def test_column_step_climbs():
    """An ascent for any gradient, and Newton's step for the gradient of a function of S alone."""
    rng = np.random.default_rng(7)
    W = rng.standard_normal((12, 3))
    columns, weight = columns_at(W)
    for precision in (0.0, rng.uniform(0.1, 100.0, 3)):
        held = columns_at(W, precision)[0]
        for _ in range(20):
            gradient = rng.standard_normal((12, 3))
            assert np.sum(held.step(gradient) * gradient) >= 0
    # the gradient of a quadratic function of S alone, as the regression sees it
    S = rng.standard_normal((3, 3))
    S += S.T
    change = columns.lift(S)
    regression = change.copy()  # A^{-1} times the gradient below
    total = regression + columns.step(weight[:, None] * change)
    newton = columns.inverse(columns.observed, columns.times(columns.complete, S))
    assert_allclose(total, columns.lift(newton), rtol=1e-10)


@pytest.mark.parametrize("precision", [0.0, np.array([0.5, 2.0, 1e6])])
def test_inverse_with_information_in_the_lengths(precision):
    """Without a prior the change is symmetric: the counts hold no information in a rotation."""
    rng = np.random.default_rng(13)
    columns, weight = columns_at(rng.standard_normal((60, 3)), precision)
    columns = columns.with_lengths(weight).with_lengths(rng.uniform(0.0, 100.0, 60))
    S = rng.standard_normal((3, 3))
    if not columns.has_prior:
        S = S + S.T
    for information in (columns.observed, columns.complete):
        T = columns.times(information, S)
        back = columns.inverse(information, T)
        assert_allclose(back, S, rtol=1e-5, atol=1e-6)
        if not columns.has_prior:  # what a rotation would gain is left out
            turn = np.array([[0.0, 1.0, -2.0], [-1.0, 0.0, 0.5], [2.0, -0.5, 0.0]])
            assert_allclose(columns.inverse(information, T + turn), S, rtol=1e-5, atol=1e-6)


def test_information_in_the_lengths_is_that_of_each_gene():
    """``sum_g a_g (w_g' S w_g)^2``, in complete data and in the counts alike; it adds up."""
    rng = np.random.default_rng(14)
    W, a = rng.standard_normal((12, 3)), rng.uniform(0.0, 5.0, 12)
    columns, _ = columns_at(W)
    S = rng.standard_normal((3, 3))
    longer = columns.with_lengths(a / 4).with_lengths(3 * a / 4)
    # the change of |w|^2 / 2
    h = 1e-6
    change = (np.sum((W + h * W @ S) ** 2, 1) - np.sum((W - h * W @ S) ** 2, 1)) / (4 * h)
    for name in ("observed", "complete"):
        found, before = (np.sum(S * c.times(getattr(c, name), S)) for c in (longer, columns))
        assert_allclose(found - before, np.sum(a * change**2), rtol=1e-7)


def test_coupled_dispersions_take_the_regressions_step():
    """A common change of all loadings also moves the dispersions, of which the information says nothing."""
    evaluate, start = problem(15, MarginalCoupling(total()))
    x = start._replace(loadings=3.0 * start.loadings)
    point = evaluate(x)
    free = problem(15)[0](x)
    assert np.abs(free.metric.columns.step(free.gradient.loadings)).max() > 0.1
    step = point.metric.columns.step(point.gradient.loadings)
    # two solutions of the same system by conjugate gradients
    assert_allclose(step, 0.0, atol=1e-9)
    # under a prior, which determines rotations, only the step of a rotation is longer
    penalty = ColumnPenalty(np.array([1.0, 50.0]), np.zeros(K), np.zeros(small.N_GENES))
    columns = evaluate(x, penalty).metric.columns
    turn = columns.basis @ np.array([[0.0, 1.0], [-1.0, 0.0]]) @ columns.basis.T
    lengths = columns.basis @ np.diag([1.0, 2.0]) @ columns.basis.T

    def information(of, S):
        return np.sum(S * columns.times(of, S))

    assert_allclose(
        information(columns.observed, lengths), information(columns.complete, lengths), rtol=1e-10
    )
    assert information(columns.observed, turn) < information(columns.complete, turn)


def test_coupled_means_hold_the_lengths_of_the_columns():
    """A longer column moves the means: the step of lengths is shorter than with means of their own."""
    evaluate, start = problem(15, MarginalCoupling())
    x = start._replace(loadings=3.0 * start.loadings)
    columns = evaluate(x).metric.columns
    assert np.all(columns.lengths > 0)
    for j in range(K):
        S = np.zeros((K, K))
        S[j, j] = 1.0
        change = columns.lift(S)
        ours, alone = (
            np.sum(c.step(change) * change)
            for c in (columns, columns._replace(lengths=np.zeros(small.N_GENES)))
        )
        assert 0 <= ours < 0.5 * alone


def test_singular_information_is_solved_in_its_range():
    """Two genes without counts, whose lengths alone are observed: two numbers for three changes.

    Conjugate gradients divided by zero here.
    """
    rng = np.random.default_rng(0)
    columns = Columns.at(rng.standard_normal((2, 2)), np.full(2, 1e-150), 8, 0.0)
    columns = columns.with_lengths(np.ones(2))
    change = rng.standard_normal((2, 2))
    T = columns.times(columns.observed, change + change.T)
    for size in (1.0, 1e-180):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            S = columns.inverse(columns.observed, size * T)
        assert_allclose(columns.times(columns.observed, S), size * T, rtol=1e-6)
        assert np.abs(S).max() < size * 10.0

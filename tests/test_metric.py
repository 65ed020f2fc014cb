"""Steps of the parameters: regressions of genes, common shift, scales; and the product with the metric."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sknbln.solver.columns import Columns
from sknbln.solver.lowrank import triangle
from sknbln.solver.metric import (
    least_squares_matrix,
    packed,
    product,
    regression_step,
    scale_step,
    shift_step,
)
from sknbln.solver.params import Params

from .reference import small
from .reference.ascent import K, problem

ALL, NONE = Params(True, True, True, True), Params(False, False, False, False)


def at_a_point():
    evaluate, start = problem(13)
    point = evaluate(start)
    return point.gradient, point.metric


@pytest.mark.parametrize("free_mean, free_loadings", [(True, True), (True, False), (False, True)])
def test_regression_step_solves_each_genes_system(free_mean, free_loadings):
    gradient, metric = at_a_point()
    mean, loadings, _ = regression_step(
        gradient, metric, ALL._replace(mean=free_mean, loadings=free_loadings)
    )
    A = least_squares_matrix(metric.moments, K)
    assert_allclose(A, np.swapaxes(A, 1, 2))
    keep = np.r_[free_mean, [free_loadings] * K].astype(bool)
    for g in range(small.N_GENES):
        rhs = np.r_[gradient.mean[g], gradient.loadings[g]][keep]
        expected = np.zeros(K + 1)
        expected[keep] = np.linalg.solve(A[g][np.ix_(keep, keep)], rhs)
        assert_allclose(np.r_[mean[g], loadings[g]], expected, rtol=1e-5, atol=1e-8)


def test_regression_step_of_nothing_free():
    mean, loadings, _ = regression_step(*at_a_point(), NONE)
    assert not mean.any() and not loadings.any()


def test_regression_step_of_a_gene_without_information_is_finite():
    gradient, metric = at_a_point()
    gradient = Params(*map(np.zeros_like, gradient))
    empty = metric._replace(moments=np.zeros_like(metric.moments))
    mean, loadings, _ = regression_step(gradient, empty, ALL)
    assert_array_equal(mean, 0.0)
    assert_array_equal(loadings, 0.0)


def with_prior(metric, precision):
    """The metric with the precisions of a prior of the columns in its moments."""
    i, j, _ = triangle(K)
    moments = metric.moments.copy()
    moments[:, 1 + K + np.flatnonzero(i == j)] += precision
    return metric._replace(moments=moments)


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("free_mean", [True, False])
def test_prior_leaves_the_mean_over_genes_to_the_data(free_mean, coupled):
    """A prior holds deviations of the natural loadings from their mean; one of the columns has no prior."""
    (gradient, metric), G = at_a_point(), small.N_GENES
    precision = np.array([50.0, 0.0])
    natural = metric.columns.natural
    if coupled:
        natural = natural + 0.3 * np.random.default_rng(3).standard_normal(natural.shape)
    columns = metric.columns._replace(
        precision=precision, observed=metric.columns.complete, natural=natural
    )
    A = least_squares_matrix(metric.moments, K)
    A[:, 1:, 1:] += np.swapaxes(natural, 1, 2) @ (precision[:, None] * natural)
    metric = metric._replace(columns=columns, moments=packed(A))
    whole = np.zeros((G, K + 1, G, K + 1))
    for g, A in enumerate(least_squares_matrix(metric.moments, K)):
        whole[g, :, g, :] = A
    whole[:, 1:, :, 1:] -= np.einsum("gki,k,hkj->gihj", natural, precision / G, natural)
    keep = np.tile(np.r_[free_mean, [True] * K], G).astype(bool)
    rhs = np.concatenate([gradient.mean[:, None], gradient.loadings], 1).ravel()
    expected = np.zeros(G * (K + 1))
    whole = whole.reshape(expected.size, -1)
    expected[keep] = np.linalg.solve(whole[np.ix_(keep, keep)], rhs[keep])
    mean, loadings, _ = regression_step(gradient, metric, ALL._replace(mean=free_mean))
    found = np.concatenate([mean[:, None], loadings], 1).ravel()
    assert_allclose(found, expected, rtol=1e-5, atol=1e-8)
    # and the product is that matrix's
    step = Params(mean, loadings, np.zeros(G), np.zeros(G))
    found = product(gradient, metric, step, ALL)
    back = np.concatenate([found.mean[:, None], found.loadings], 1).ravel()
    assert_allclose(back[keep], rhs[keep], rtol=1e-5, atol=1e-8)


def test_product_is_positive_where_the_columns_excess_is_too_large():
    rng = np.random.default_rng(11)
    precision, zero = np.array([1e4, 1e-2]), np.zeros(small.N_GENES)
    gradient, metric = at_a_point()
    metric = with_prior(metric, precision)
    for weight in (1e-3, 1.0, 1e3):  # of complete data
        columns = Columns.at(gradient.loadings, np.full(zero.size, weight), 50, precision)
        for _ in range(20):
            step = Params(zero, columns.lift(rng.standard_normal((K, K))), zero, zero)
            found = product(gradient, metric._replace(columns=columns), step, ALL)
            assert np.sum(found.loadings * step.loadings) > 0


def test_shift_step_completes_newtons_step_of_a_common_shift():
    gradient, metric = at_a_point()
    complete = metric.moments[:, 0].sum()
    assert 0 < metric.shift < complete
    total = gradient.mean.sum() / complete + shift_step(gradient, metric)
    assert_allclose(total, gradient.mean.sum() / metric.shift, rtol=1e-12)
    assert shift_step(gradient, metric._replace(shift=complete)) == 0.0


def test_scale_step_is_newtons_inside_its_bounds():
    assert_allclose(scale_step(np.array([0.5, -0.2]), np.array([2.0, 4.0])), [0.25, -0.05])
    wild = scale_step(np.array([1e9, -1e9, 0.0]), np.array([1e-12, -5.0, 0.0]))
    assert_array_equal(wild, [1.0, -1.0, 0.0])


@pytest.mark.parametrize(
    "free", [ALL, Params(True, False, True, True), Params(False, True, True, True)]
)
def test_product_is_inverted_by_the_steps(free):
    """Each block's step maps the product back to the direction it was made of."""
    gradient, metric = at_a_point()
    # without the part of the columns, which is inverted exactly only where the regressions are alike
    columns = metric.columns
    metric = metric._replace(columns=columns._replace(observed=columns.complete))
    rng = np.random.default_rng(0)
    # small steps of scales: they are cut at one nat
    step = Params(
        *(0.1 * f * rng.standard_normal(b.shape) for b, f in zip(gradient, free, strict=True))
    )
    found = product(gradient, metric, step, free)
    back = regression_step(found, metric, free)
    # the regression adds 1e-10 of its diagonal
    assert_allclose(back[0], step.mean, rtol=1e-6, atol=1e-8)
    assert_allclose(back[1], step.loadings, rtol=1e-6, atol=1e-8)
    for name in ("noise", "dispersion"):
        slope, information = getattr(gradient, name), getattr(metric, name)
        own = getattr(step, name)
        newton = information > 1e-8 + 0.1 * np.abs(slope)
        assert newton.any()
        assert_allclose(getattr(found, name)[newton], (information * own)[newton], rtol=1e-14)
        # the step of the gradient, where it is not cut, is mapped to the gradient
        own = scale_step(slope, information)
        mapped = product(gradient, metric, step._replace(**{name: own}), free)
        inside = np.abs(own) < 1.0
        assert inside.any()
        assert_allclose(getattr(mapped, name)[inside], slope[inside], rtol=1e-12)


def test_product_inverts_the_columns_step():
    """Where each gene's matrix is its weight times the identity, as when scores are well known."""
    rng = np.random.default_rng(8)
    W = rng.standard_normal((small.N_GENES, K))
    weight = 50 * np.random.default_rng(3).uniform(0.2, 3.0, len(W))
    columns = Columns.at(W, weight, 50, 0.0)
    i, j, _ = triangle(K)
    moments = np.concatenate([np.ones(1), np.zeros(K), (i == j).astype(float)])
    gradient, metric = at_a_point()
    metric = metric._replace(moments=weight[:, None] * moments, columns=columns)
    step = Params(*map(np.zeros_like, gradient))
    step = step._replace(loadings=rng.standard_normal(W.shape))
    found = product(gradient, metric, step, ALL)
    assert np.all(found.mean == 0)
    assert np.sum(found.loadings * step.loadings) > 0
    regression = found.loadings / weight[:, None]
    back = regression + columns.step(found.loadings)
    assert_allclose(back, step.loadings, rtol=1e-10, atol=1e-12)
    # the columns have no part where the loadings are not free
    held = product(gradient, metric, step, ALL._replace(loadings=False))
    assert_allclose(held.loadings, weight[:, None] * step.loadings, rtol=1e-12)

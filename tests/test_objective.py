"""The log-posterior of the globals: its value, and its gradient in every set of coordinates."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sknbln._counts import CountHistogram
from sknbln._known import Known
from sknbln._passes import Sweeper
from sknbln._rows import RowBatches
from sknbln.solver.channel import log_rising
from sknbln.solver.column_priors import ColumnPenalty
from sknbln.solver.coupling import Identity, MarginalCoupling
from sknbln.solver.gene_priors import EVEN, GenePriors, OverdispersionPrior, Pool, SplitPrior
from sknbln.solver.metric import least_squares_matrix
from sknbln.solver.objective import Objective
from sknbln.solver.params import (
    NOISE_UNIT,
    GaussianPrior,
    Params,
    in_model_units,
    noise_coordinate,
    noise_variance,
)

from .reference import direct, small
from .reference.coupling import total
from .reference.csr import csr

K, P = 3, 2
COUPLINGS = [Identity(), MarginalCoupling(total()), MarginalCoupling()]
IDS = ["identity", "coupled", "mean-coupled"]
BLOCKS = Params._fields


def priors(rng):
    """Two priors of coordinates that leave some genes without a prior, and priors of the genes."""
    G = small.N_GENES
    precision = rng.uniform(0.5, 4.0, G) * (np.arange(G) % 3 > 0)
    return (
        GaussianPrior(rng.uniform(0, 3, G), precision),
        GaussianPrior(rng.uniform(0, 2, G), precision[::-1].copy()),
        GenePriors(
            Pool(-1.0, 2.0, 0.3),
            SplitPrior(total(), EVEN),
            OverdispersionPrior(total(), GaussianPrior(rng.uniform(-2, 1, G), precision)),
        ),
    )


def known():
    """Covariates and exposures of the cells of the small problem, and coefficients of its genes."""
    rng = np.random.default_rng(4)
    design = rng.standard_normal((small.N_CELLS, P))
    exposure = 0.2 * rng.standard_normal((small.N_CELLS, small.N_GENES))
    return Known(design, exposure), 0.2 * rng.standard_normal((small.N_GENES, P))


def objective(coupling, seed=0):
    """An `Objective` on the small problem, with every prior, and coordinates to evaluate it at."""
    cells, params, r = small.problem(40)
    rng = np.random.default_rng(seed)
    X, (of_cells, coef) = csr(cells.counts), known()
    sweeper = Sweeper(RowBatches(X, cells.offset, cells.scale, known=of_cells), K)
    prior_coef = GaussianPrior(np.full(coef.shape, 0.1), np.full(coef.shape, 2.0))
    function = Objective(
        sweeper, CountHistogram(X), *priors(rng)[:2], coupling, priors(rng)[2], prior_coef
    )
    # marginal overdispersion of at least 0.5, so that the variance has room
    log_r = np.minimum(np.log(r), 0.5)
    noise = noise_coordinate(params.noise)
    return function, Params(params.mean, params.loadings[:, :K], noise, log_r, coef)


@pytest.mark.parametrize("coupling", COUPLINGS, ids=IDS)
def test_value_is_the_dense_twins_plus_priors(coupling):
    function, x = objective(coupling)
    cells, _, _ = small.problem(40)
    params = coupling.expand(x)
    r = np.exp(params.dispersion)
    expected, of_cells = 0.0, known()[0]
    for c in range(small.N_CELLS):
        Sigma = direct.covariance(params.loadings, noise_variance(params), cells.scale[c])
        loc = params.mean + x.coef @ of_cells.design[c] + of_cells.exposure[c] - cells.offset[c]
        found = direct.laplace(cells.counts[c], loc, Sigma, r)
        own = noise_variance(params)
        beyond = direct.leading_second_order(cells.counts[c], found.y, found.covariance, own, r)
        expected += found.log_marginal + beyond
    for prior, at in (  # normal
        (function.prior_mean, x.mean),
        (function.prior_log_r, x.dispersion),
        (function.prior_coef, x.coef),
    ):
        expected -= 0.5 * np.sum(prior.precision * (at - prior.loc) ** 2)
    expected += function.gene_priors.log_density(params)  # see test_gene_priors.py
    point = function(x)
    assert_allclose(point.value, expected, rtol=0, atol=1e-8)
    assert_allclose(point.gradient_log_r, function.log_likelihood(params)[1].dispersion, rtol=1e-8)
    assert point.x is x
    assert point.sums.n_unconverged == 0


@pytest.mark.parametrize("coupling", COUPLINGS, ids=IDS)
@pytest.mark.parametrize("block", BLOCKS)
def test_gradient_is_the_difference_quotient(coupling, block):
    function, x = objective(coupling)
    grad = getattr(function(x).gradient, block)
    at = getattr(x, block)
    assert grad.shape == at.shape
    rng = np.random.default_rng(1)
    steps = np.concatenate(
        [np.eye(at.size)[: 2 * at.size // small.N_GENES], rng.standard_normal((4, at.size))]
    )
    if (
        block == "dispersion"
        and isinstance(coupling, MarginalCoupling)
        and coupling.total is not None
    ):
        assert_array_equal(grad - function.prior_log_r.gradient(x.dispersion), 0.0)
        return  # the marginal overdispersion is frozen: its gradient is that of its prior
    h = 1e-3

    def value(t, step):
        return function(x._replace(**{block: at + t * step})).value

    for step in steps:
        step = (step / np.linalg.norm(step)).reshape(at.shape)
        found = 8 * (value(h, step) - value(-h, step))
        found = (found - (value(2 * h, step) - value(-2 * h, step))) / (12 * h)
        # rounding: values of a few hundred, 1e-13 each, over 1e-3
        assert_allclose(found, np.sum(grad * step), rtol=1e-7, atol=1e-6)


def test_poisson_and_no_noise_are_frozen_values():
    """``log r = inf`` and ``d = 0`` give finite values and gradients."""
    function, x = objective(Identity())
    function.prior_log_r = GaussianPrior.flat(small.N_GENES)
    function.gene_priors = GenePriors()
    x = x._replace(dispersion=np.full(small.N_GENES, np.inf), noise=np.zeros(small.N_GENES))
    assert_array_equal(noise_variance(x), 0.0)
    point = function(x)
    assert np.isfinite(point.value)
    for block in (point.gradient.mean, point.gradient.loadings, point.gradient.noise):
        assert np.all(np.isfinite(block))
    large = function(x._replace(dispersion=np.full(small.N_GENES, np.log(1e12))))
    assert_allclose(point.value, large.value, atol=1e-6)
    # d = 0 is at a finite distance: the gradient there is the one-sided difference quotient
    h = 1e-4
    for g in range(2):
        at = [function(x._replace(noise=i * h * np.eye(small.N_GENES)[g])).value for i in range(4)]
        slope = (-11 * at[0] + 18 * at[1] - 9 * at[2] + 2 * at[3]) / (6 * h)
        assert_allclose(slope, point.gradient.noise[g], rtol=1e-6, atol=1e-7)


def test_preconditioner_is_the_sums_and_the_priors_curvatures():
    function, x = objective(Identity())
    point = function(x)
    sums = point.sums
    metric, genes, d = point.metric, point.sums.genes, noise_variance(x)
    second = function.histogram.constant_derivatives(np.exp(x.dispersion))[1]
    prior, of_genes = function.prior_mean.precision, function.gene_priors.information(x)
    assert_allclose(
        metric.dispersion,
        genes.information_log_r - second + function.prior_log_r.precision + of_genes.dispersion,
        rtol=1e-8,
    )
    slope = d + NOISE_UNIT  # of d in its coordinate
    assert_allclose(metric.noise, slope**2 * (genes.information_noise + of_genes.noise), rtol=1e-8)
    assert_array_equal(metric.columns.lengths, of_genes.mean)
    of_genes = of_genes.loadings[:, :, None] * of_genes.loadings[:, None, :]
    assert np.all(np.trace(of_genes, axis1=1, axis2=2)[function.prior_mean.precision > 0] > 0)
    assert_allclose(metric.shift, sums.information_shift + prior.sum(), rtol=1e-8)
    assert_allclose(metric.moments[:, 0], genes.moments[:, 0] + prior, rtol=1e-8)
    found, of_counts = (least_squares_matrix(m) for m in (metric.moments, genes.moments))
    of_priors = np.zeros_like(found)
    of_priors[:, 1 + P :, 1 + P :] = of_genes
    of_priors[:, range(1, 1 + P), range(1, 1 + P)] = function.prior_coef.precision
    rest = found[:, 1:, 1:] - of_counts[:, 1:, 1:]
    assert_allclose(rest, of_priors[:, 1:, 1:], rtol=1e-8, atol=1e-8)
    of_coef = np.diag(function.prior_coef.precision.sum(0))
    assert_allclose(metric.coef_shift, sums.information_coef_shift + of_coef, rtol=1e-12)
    assert_allclose(found[:, 0, 1:], of_counts[:, 0, 1:], rtol=1e-8)
    # the sums are those of the likelihood alone, without priors
    alone = function.sweep(in_model_units(x)).genes
    assert_allclose(genes.moments, alone.moments, rtol=1e-7, atol=1e-8)
    assert np.all(metric.noise > 0) and sums.information_shift > 0


def test_constants_are_counted_once():
    """A change of r that the marginal does not see is the constant's: compare with explicit sums."""
    function, x = objective(Identity())
    cells, _, _ = small.problem(40)
    r = np.exp(x.dispersion)
    value, grad = function.log_likelihood(x)
    sums = function(x).sums
    constants = log_rising(cells.counts, r[None, :]).sum() - function.histogram.log_factorials
    assert_allclose(value, sums.log_marginal + constants, rtol=1e-13)
    first = function.histogram.constant_derivatives(r)[0]
    assert_allclose(grad.dispersion, sums.genes.gradient_log_r + first, rtol=1e-13)


def test_constants_are_kept_while_the_dispersions_are_the_same(monkeypatch):
    function, x = objective(Identity())
    made = []
    derivatives = CountHistogram.constant_derivatives

    def recorded(self, r):
        made.append(r)
        return derivatives(self, r)

    monkeypatch.setattr(CountHistogram, "constant_derivatives", recorded)
    first = function(x)
    again = function(x._replace(mean=x.mean + 0.1, dispersion=x.dispersion.copy()))
    assert len(made) == 1
    assert_array_equal(again.x.dispersion, first.x.dispersion)
    other = x._replace(dispersion=x.dispersion + np.where(np.arange(small.N_GENES) == 3, 1e-9, 0.0))
    for at in (other, x):  # one gene is enough, and no old constants are used
        fresh = objective(Identity())[0](at)
        n = len(made)
        point = function(at)
        assert len(made) == n + 1
        assert_allclose(point.value, fresh.value, rtol=1e-13)
        assert_allclose(point.gradient.dispersion, fresh.gradient.dispersion, rtol=1e-8)
    # nor are they after a change in place
    at.dispersion[5] += 1.0
    fresh = objective(Identity())[0](at)
    assert_allclose(function(at).value, fresh.value, rtol=1e-13)


# ------------------------------------------------------------------ the prior


def test_another_penalty_needs_no_new_pass(monkeypatch):
    function, x = objective(Identity())
    passes = []
    whole = Sweeper.__call__
    monkeypatch.setattr(Sweeper, "__call__", lambda self, *a: passes.append(a) or whole(self, *a))
    before = function(x)
    penalty = ColumnPenalty(np.full(K, 3.0), np.zeros(K), np.zeros(small.N_GENES))
    after = function(x, penalty)
    assert len(passes) == 1
    assert_allclose(after.value - before.value, penalty.value(x.loadings), rtol=1e-9)
    assert_allclose(
        after.gradient.loadings - before.gradient.loadings,
        penalty.gradient(x.loadings),
        atol=1e-9,
    )
    moved = x._replace(mean=x.mean + 1e-13)
    assert function(moved, penalty).value != after.value
    assert len(passes) == 2


def test_a_rotation_needs_no_new_pass(monkeypatch):
    function, x = objective(Identity())
    passes = []
    whole = Sweeper.__call__
    monkeypatch.setattr(Sweeper, "__call__", lambda self, *a: passes.append(a) or whole(self, *a))
    function(x)
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((K, K)))[0]
    turned = x._replace(loadings=x.loadings @ rotation)
    function.rotate(rotation)
    found = function(turned)
    assert len(passes) == 1
    expected = objective(Identity())[0](turned)
    assert len(passes) == 2
    assert_allclose(found.value, expected.value, rtol=1e-11)
    assert_allclose(found.sums.genes.moments, expected.sums.genes.moments, rtol=1e-8, atol=1e-8)
    for value, other in zip(found.gradient, expected.gradient, strict=True):
        assert_allclose(value, other, rtol=1e-7, atol=1e-7)
    assert_allclose(found.metric.noise, expected.metric.noise, rtol=1e-7, atol=1e-7)
    # and the next pass starts from scores that were turned with the loadings
    at_the_mode = function.sweep.scores[:, :K].copy()
    function.sweep(in_model_units(turned))
    assert_allclose(function.sweep.scores[:, :K], at_the_mode, atol=1e-8)


def test_a_rotation_to_fewer_columns_drops_the_others():
    """The scores of the columns that stay are kept as a start; the sums are those of a new pass."""
    function, x = objective(Identity())
    function(x)
    scores = function.sweep.scores.copy()
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((K, K)))[0][:, : K - 1]
    fewer = x._replace(loadings=x.loadings @ rotation)
    function.rotate(rotation)
    assert_allclose(function.sweep.scores[:, : K - 1], scores[:, :K] @ rotation, rtol=1e-12)
    assert_array_equal(function.sweep.scores[:, K - 1 : -1], 0.0)
    assert_array_equal(function.sweep.scores[:, -1], scores[:, -1])  # of the capture offset
    fresh = objective(Identity())[0]
    fresh.rotate(np.eye(K, K - 1))
    assert_allclose(function(fewer).value, fresh(fewer).value, rtol=1e-11)


def test_another_centre_of_the_split_shares_the_counts():
    function, x = objective(Identity())
    other = function.with_split(3.0)
    assert function.gene_priors.split.centre == EVEN and other.gene_priors.split.centre == 3.0
    assert other.gene_priors.noise is function.gene_priors.noise
    assert other.sweep is function.sweep
    found, before = other(x), function(x)
    assert_allclose(found.log_likelihood, before.log_likelihood, rtol=1e-11)
    difference = other.gene_priors.log_density(x) - function.gene_priors.log_density(x)
    assert_allclose(found.value - before.value, difference, rtol=1e-9)
    # without the prior there is nothing to centre
    function.gene_priors = replace(function.gene_priors, split=None)
    assert function.with_split(3.0) is function

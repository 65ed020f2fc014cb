"""Priors of d, of its split from r, and of the total overdispersion: densities, gradients, information."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.optimize import minimize

from sknbln.solver.gene_priors import (
    EVEN,
    NEARLY_ALL_IN_NOISE,
    NEARLY_ALL_IN_R,
    NOISE_EXPONENTIAL,
    NOISE_POOL,
    GenePriors,
    OverdispersionPrior,
    Pool,
    SplitPrior,
)
from sknbln.solver.params import GaussianPrior, Params, noise_coordinate, noise_variance

from .reference.coupling import total

G, K = 12, 2
BLOCKS = Params._fields


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    return Params(
        rng.uniform(-2.0, 4.0, G),
        0.5 * rng.standard_normal((G, K)),
        noise_coordinate(np.exp(rng.uniform(-6.0, 2.0, G))),
        rng.uniform(-2.0, 4.0, G),
    )


def of_total():
    rng = np.random.default_rng(7)
    precision = rng.uniform(0.5, 50.0, G) * (np.arange(G) % 4 > 0)  # some genes without it
    return OverdispersionPrior(total(), GaussianPrior(rng.uniform(-1.0, 1.0, G), precision))


SPLIT = SplitPrior(total(), NEARLY_ALL_IN_R)
PRIORS = {
    "none": GenePriors(),
    "pool": GenePriors(NOISE_POOL),
    "split": GenePriors(split=SPLIT),
    "total": GenePriors(total=of_total()),
    "all": GenePriors(NOISE_POOL, SPLIT, of_total()),
}


def in_d(x, block, step, t):
    """Parameters moved by t times a step of one block; that of the noise is a step of d."""
    if block == "noise":
        return x._replace(noise=noise_coordinate(noise_variance(x) + t * step))
    return x._replace(**{block: getattr(x, block) + t * step})


def difference_quotient(function, x, block, step, h):
    def value(t):
        return function(in_d(x, block, step, t))

    return (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h)


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("block", BLOCKS)
def test_gradient_is_the_difference_quotient(name, block):
    priors, x = PRIORS[name], parameters()
    grad = getattr(priors.gradient(x), block)
    assert grad.shape == getattr(x, block).shape
    for g in range(G):
        step = np.zeros_like(grad)
        step[g] = 1.0
        # short beside d
        h = 1e-3 * noise_variance(x)[g] if block == "noise" else 1e-4
        found = difference_quotient(priors.log_density, x, block, step, h)
        assert_allclose(found, np.sum(grad * step), rtol=1e-6, atol=1e-7)


def test_priors_add_up():
    x = parameters()
    parts = [PRIORS[name] for name in ("pool", "split", "total")]
    assert_allclose(PRIORS["all"].log_density(x), sum(p.log_density(x) for p in parts), rtol=1e-13)
    assert PRIORS["none"].log_density(x) == 0.0
    for block in BLOCKS:
        added = sum(getattr(p.gradient(x), block) for p in parts)
        assert_allclose(getattr(PRIORS["all"].gradient(x), block), added, rtol=1e-12)
        assert_array_equal(getattr(PRIORS["none"].gradient(x), block), 0.0)
        assert_array_equal(getattr(PRIORS["none"].information(x), block), 0.0)
    for block in ("noise", "dispersion"):
        added = sum(getattr(p.information(x), block) for p in parts)
        assert_allclose(getattr(PRIORS["all"].information(x), block), added, rtol=1e-12)


# ------------------------------------------------------------------ the pool of log d


def gaussian(x, pool, centre, width):
    """Log-density of numbers and centre, up to the pool's own constants."""
    residual = (x - centre) / width
    of_centre = (centre - pool.loc) / pool.scale
    return -0.5 * np.sum(residual**2) - 0.5 * of_centre**2 - x.size * np.log(width)


@pytest.mark.parametrize("n", [1, 3, 200])
@pytest.mark.parametrize("spread", [0.01, 1.5])
def test_centre_and_width_are_at_their_maximum(n, spread):
    pool, x = Pool(0.3, 2.0, 0.5), 5.0 + spread * np.random.default_rng(0).standard_normal(n)
    centre, width = pool.centre_and_width(x)
    best = minimize(
        lambda v: -gaussian(x, pool, *v),
        (x.mean(), max(x.std(), 0.5)),
        bounds=[(None, None), (pool.least, None)],
        tol=1e-14,
    )
    assert_allclose((centre, width), best.x, rtol=1e-4)
    assert pool.log_density(x) == pytest.approx(gaussian(x, pool, centre, width), rel=1e-12)
    assert pool.log_density(x) >= -best.fun - 1e-10
    assert (width == pool.least) == (spread < 0.1 or n < 200)  # a few numbers are near their centre
    assert pool.precision(x) == width**-2.0


def test_a_gene_is_pulled_to_the_others():
    x = np.r_[np.zeros(50), -4.0, 4.0]
    gradient = NOISE_POOL.gradient(x)
    assert gradient[-2] > 0 > gradient[-1]
    # those far away say that the width is large, and are pulled less
    assert NOISE_POOL.gradient(np.r_[x, 8.0, -8.0])[-4] < gradient[-2]


# ------------------------------------------------------------------ the split


@pytest.mark.parametrize("centre", [NEARLY_ALL_IN_R, EVEN, NEARLY_ALL_IN_NOISE])
def test_split_is_densest_where_d_is_the_centres_share(centre):
    prior, x = SplitPrior(total(), centre), parameters()
    d = np.exp(centre) * total()(x.dispersion)
    best = x._replace(noise=noise_coordinate(d))
    assert_allclose(prior.log_density(best), 0.0, atol=1e-20)
    for part in prior.gradient(best):
        assert_allclose(part, 0.0, atol=1e-8)
    # a factor of e costs half a nat, of each gene
    assert_allclose(prior.log_density(x._replace(noise=noise_coordinate(np.e * d))), -G / 2)


@pytest.mark.parametrize("block", ["noise", "dispersion"])
def test_split_information_is_the_curvature_at_its_maximum(block):
    """There its Hessian is minus the outer product of slopes, which is positive everywhere."""
    priors, x = GenePriors(split=SplitPrior(total(), EVEN)), parameters()
    best = x._replace(noise=noise_coordinate(total()(x.dispersion)))
    found = getattr(priors.information(best), block)
    for g in range(G):
        step = np.eye(G)[g]
        h = 1e-3 * noise_variance(best)[g] if block == "noise" else 1e-3

        def slope(x, g=g):
            return getattr(priors.gradient(x), block)[g]

        curvature = -difference_quotient(slope, best, block, step, h)
        assert_allclose(found[g], curvature, rtol=1e-5)
    assert np.all(getattr(priors.information(x), block) > 0)
    assert_array_equal(priors.dispersion_precision(x), priors.information(x).dispersion)
    assert GenePriors(NOISE_POOL).dispersion_precision(x) == 0.0


# ------------------------------------------------------------------ the total overdispersion


def value(x):
    """V of each gene, by its definition."""
    return np.sum(x.loadings**2, 1) + noise_variance(x) + total()(x.dispersion)


def test_total_is_normal_in_its_logarithm():
    prior, x = of_total(), parameters()
    residual = np.log(value(x)) - prior.prior.loc
    expected = -0.5 * np.sum(prior.prior.precision * residual**2)
    assert_allclose(prior.log_density(x), expected, rtol=1e-12)


def test_information_of_the_total_is_exact_at_its_centre():
    """Of rank one for each gene: the root's outer product is minus the Hessian where the gradient is 0."""
    x = parameters()
    precision = np.linspace(1.0, 20.0, G)
    priors = GenePriors(
        total=OverdispersionPrior(total(), GaussianPrior(np.log(value(x)), precision))
    )
    assert_allclose(priors.log_density(x), 0.0, atol=1e-18)
    root = priors.total.root_information(x)
    assert_array_equal(root.mean, 0.0)
    for g in range(G):
        steps = [("loadings", np.zeros((G, K)), j) for j in range(K)]
        steps += [("noise", np.zeros(G), None), ("dispersion", np.zeros(G), None)]
        of_gene = np.r_[root.loadings[g], root.noise[g], root.dispersion[g]]
        hessian = np.empty((K + 2, K + 2))
        for row, (block, step, j) in enumerate(steps):
            step[(g, j) if j is not None else g] = 1.0
            h = 1e-3 * noise_variance(x)[g] if block == "noise" else 1e-4

            def slopes(x, i, g=g):
                grad = priors.gradient(x)
                return np.r_[grad.loadings[g], grad.noise[g], grad.dispersion[g]][i]

            hessian[row] = [
                difference_quotient(lambda x, i=i: slopes(x, i), x, block, step, h)
                for i in range(K + 2)
            ]
        expected = np.outer(of_gene, of_gene)
        assert_allclose(-hessian, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    information = priors.information(x)
    assert_allclose(information.noise, root.noise**2, rtol=1e-12)
    assert_allclose(information.dispersion, root.dispersion**2, rtol=1e-12)
    assert_allclose(information.loadings, root.loadings, rtol=1e-12)
    # that in |w|^2 / 2, whose derivative is twice that of |w|^2
    assert_allclose(information.mean, 4 * precision / value(x) ** 2, rtol=1e-12)


def test_genes_without_a_prior_of_the_total_have_no_information_of_it():
    information = PRIORS["total"].information(parameters())
    none = of_total().prior.precision == 0
    assert none.any()
    assert information.coef.shape == (none.size, 0)
    for block in information[:4]:
        assert_array_equal(block[none], 0.0)
        assert np.all(np.any(np.atleast_2d(block[~none].T) != 0, axis=0))


@pytest.mark.parametrize("name", ["pool", "all"])
def test_finite_at_the_ends_of_the_ranges(name):
    from sknbln.solver.params import LOG_DISPERSION_RANGE, NOISE_RANGE

    x = parameters()
    for noise in NOISE_RANGE:
        for log_r in LOG_DISPERSION_RANGE:
            at = x._replace(noise=np.full(G, noise), dispersion=np.full(G, log_r))
            assert np.isfinite(PRIORS[name].log_density(at))
            for block in (*PRIORS[name].gradient(at), *PRIORS[name].information(at)):
                assert np.all(np.isfinite(block))


def test_a_step_leaves_a_share_of_d_where_log_d_has_a_prior():
    x = parameters()
    for name in ("pool", "split", "all"):
        least = PRIORS[name].least_noise(x)
        assert_allclose(noise_variance(x._replace(noise=least)), noise_variance(x) / 8, rtol=1e-10)
    assert GenePriors().least_noise(x) == GenePriors(NOISE_EXPONENTIAL).least_noise(x) == -np.inf

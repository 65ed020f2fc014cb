"""The score test of every pair of genes, and its difference between groups."""

from copy import copy
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import pearson3

from sknbln import NBVCPEstimator, _scores
from sknbln._capture import CapturePrior, OffsetPosterior
from sknbln._design import Design
from sknbln._pairs import p_values
from sknbln.datasets import make_nbln_counts

from .reference.pairs import benjamini_hochberg, pair_test
from .reference.truth import nbvcp

N, G = 60, 8


@pytest.fixture(scope="module")
def known():
    """Counts with a covariate, exposures, weights and a missing count; one gene has no counts."""
    rng = np.random.default_rng(0)
    age, exposure = rng.standard_normal(N), rng.uniform(-0.5, 0.5, N)
    x = rng.standard_normal((N, G)) * 0.3 + 0.4 * rng.standard_normal((N, 1)) + 1.0
    x += exposure[:, None] + 0.3 * age[:, None]
    U = rng.poisson(np.exp(x) * rng.gamma(3.0, 1 / 3.0, x.shape)).astype(float)
    U[:, 5] = 0.0
    U[4, 2] = np.nan
    X = pd.DataFrame(U, columns=[f"g{j}" for j in range(G)])
    weight = rng.integers(0, 3, N).astype(float)
    return X, dict(covariates=pd.DataFrame({"age": age}), offset=exposure), weight


def at_offsets(model, offset):
    """The model with these capture offsets of all rows: no fit, and nothing to compile."""
    posterior = OffsetPosterior(np.maximum(offset, 0.0), np.ones(offset.size), offset)
    model._independent = lambda: SimpleNamespace(
        mean=model.mean_,
        dispersion=model.dispersion_,
        coef=model.coef_ * model._design.scale,
        capture_prior=CapturePrior(9.0, 0.5),
        offsets=lambda X, batch_size, known: posterior,
    )
    return model


@pytest.fixture(scope="module")
def model(known):
    """Parameters near those of the counts, and capture offsets, of which some are at their bound 0."""
    X, of_rows, _ = known
    rng = np.random.default_rng(1)
    model = nbvcp(X.mean().to_numpy() * 1.2 + 0.1, np.linspace(1.0, 4.0, G))
    model.feature_names_in_ = np.array(X.columns, object)
    model._design = Design.learned(of_rows["covariates"], N)
    model.coef_ = rng.normal(0.3, 0.1, (G, 1))
    return at_offsets(model, rng.normal(0.3, 0.3, N))


@pytest.mark.parametrize("blocks", [(2**21, 2**21), (3 * G, 3 * G)], ids=["one", "many"])
def test_is_that_of_the_formulas(model, known, blocks, monkeypatch):
    """A loop over pairs and cells, in one block and in many, with all that can be known of rows."""
    X, of_rows, weight = known
    monkeypatch.setattr(_scores, "_ROW_ENTRIES", blocks[0])
    monkeypatch.setattr(_scores, "_PAIR_ENTRIES", blocks[1])
    U, age = X.to_numpy(), of_rows["covariates"]["age"].to_numpy()
    design = age[:, None] - age.mean()
    log_scale = design @ model.coef_.T + of_rows["offset"][:, None]
    log_scale[np.isnan(U)] = -np.inf
    columns = np.concatenate([np.ones((N, 1)), design], 1)
    eta = model._independent().offsets(None, None, None).loc
    expected = pair_test(
        np.nan_to_num(U),
        *(model.mean_, model.dispersion_, log_scale, eta, eta > 0, columns, weight),
    )
    expected[:, 5] = expected[:, :, 5] = np.nan  # the gene without counts
    for alternative, p_value in zip(("two-sided", "greater", "less"), expected[1:], strict=True):
        test = model.correlation_test(X, alternative=alternative, sample_weight=weight, **of_rows)
        assert_allclose(test.statistic, expected[0], rtol=1e-4, atol=1e-6)
        assert_allclose(test.p_value, p_value, rtol=1e-3)
        assert_array_equal(test.sign, np.sign(expected[0]))


def test_a_few_genes_are_paired_with_all(model, known):
    X, of_rows, _ = known
    every = model.correlation_test(X, **of_rows)
    some = model.correlation_test(X, genes=["g6", "g1"], **of_rows)
    assert some.genes.tolist() == ["g6", "g1"] and some.partners.tolist() == list(X.columns)
    for name in ("statistic", "p_value"):
        assert_allclose(getattr(some, name), getattr(every, name)[[6, 1]], rtol=1e-10)
    # of 13 pairs: g6 and g1 are one pair, neither is tested with g5 or with itself
    table = some.to_frame()
    pairs = {frozenset(pair) for pair in zip(table.gene_1, table.gene_2, strict=True)}
    assert len(table) == len(pairs) == 13
    tested = table.dropna()
    assert len(tested) == 11 and tested.p_value.is_monotonic_increasing
    assert_allclose(tested.q_value, benjamini_hochberg(tested.p_value.to_numpy()), rtol=1e-12)
    assert some.q_value[0, 1] == some.q_value[1, 6]


def test_only_pairs_below_a_q(model, known):
    X, of_rows, _ = known
    test = model.correlation_test(X, **of_rows)
    q = np.nanmedian(test.q_value)
    table = test.to_frame(q)
    assert 0 < len(table) == np.sum(np.triu(test.q_value <= q, 1))
    assert_array_equal(test.q_value, test.q_value.T)
    with pytest.raises(ValueError, match="no correlations"):
        test.interval()


def test_rows_of_weight_two_are_two_rows(model, known):
    X, of_rows, weight = known
    twice = np.repeat(np.arange(N), weight.astype(int))
    rows = {name: a.iloc[twice] if hasattr(a, "iloc") else a[twice] for name, a in of_rows.items()}
    eta = model._independent().offsets(None, None, None).raw_loc
    repeated = at_offsets(copy(model), eta[twice]).correlation_test(X.iloc[twice], **rows)
    weighted = model.correlation_test(X, sample_weight=weight, **of_rows)
    assert_allclose(weighted.p_value, repeated.p_value, rtol=1e-8)


@pytest.mark.parametrize("skew", [-0.7, -0.009, 0.0, 0.005, 0.011, 0.1, 3.0])
def test_p_values_are_those_of_pearson_iii(skew):
    z = np.linspace(-4.0, 6.0, 41)
    law, at = pearson3(skew), np.full(z.size, skew)
    assert_allclose(p_values(z, at, "greater"), law.sf(z), rtol=2e-4, atol=1e-14)
    assert_allclose(p_values(z, at, "less"), law.cdf(z), rtol=2e-4, atol=1e-14)
    both = law.sf(abs(z)) + law.cdf(-abs(z))
    assert_allclose(p_values(z, at), np.minimum(both, 1.0), rtol=2e-4)


def test_arguments_are_refused(model, known):
    X, of_rows, _ = known
    with pytest.raises(ValueError, match="unknown entries"):
        model.correlation_test(X, genes=["g99"], **of_rows)
    with pytest.raises(ValueError, match="'alternative' parameter"):
        model.correlation_test(X, alternative="larger", **of_rows)
    with pytest.raises(ValueError, match="sample_weight of shape"):
        model.correlation_test(X, sample_weight=[1.0], **of_rows)
    with pytest.raises(ValueError, match="fit had covariates"):
        model.correlation_test(X, offset=of_rows["offset"])


# ------------------------------------------------------------------ two groups


def test_differences_are_those_of_groups_and_permutations(model, known):
    """Of one pair by its definition: ``T / V`` of both groups, and the same of permuted groups."""
    X, of_rows, _ = known
    X = X.fillna(1.0)
    group = np.arange(N) % 3 == 0
    test = model.correlation_difference_test(
        X, group, genes=["g0", "g3", "g4"], n_permutations=400, random_state=0, **of_rows
    )
    assert test.p_value.shape == (3, 3) and test.genes.tolist() == ["g0", "g3", "g4"]
    age, o = of_rows["covariates"]["age"].to_numpy(), of_rows["offset"]
    design = age[:, None] - age.mean()
    eta = model._independent().offsets(None, None, None).loc
    m = model.mean_ * np.exp(design @ model.coef_.T + (o - eta)[:, None])
    U, r = X.to_numpy(), model.dispersion_
    # negative binomial regressions on the group and on age, to convergence
    columns = np.stack([group, ~group, design[:, 0]], 1).astype(float)
    for j in range(G):
        for _ in range(30):
            i = m[:, j] * r[j] / (m[:, j] + r[j])
            A = columns.T @ (i[:, None] * columns) + 1e-6 * i.sum() * np.eye(3)
            step = np.linalg.solve(A, columns.T @ ((U[:, j] / m[:, j] - 1) * i))
            m[:, j] *= np.exp(columns @ np.clip(step, -1, 1))
    i = m * r / (m + r)
    g, a = (U - m) * r / (m + r), (eta > 0) / i.sum(1)
    T = g[:, 0] * g[:, 3] + a * i[:, 0] * i[:, 3]
    V = i[:, 0] * (1 - a * i[:, 0]) * i[:, 3] * (1 - a * i[:, 3])

    def studentized(first):
        one, two = V[first].sum(), V[~first].sum()
        difference = T[first].sum() / one - T[~first].sum() / two
        return difference / np.sqrt(1 / one + 1 / two), difference

    rng = np.random.RandomState(1)
    null = np.array([studentized(rng.permutation(~group))[0] for _ in range(2000)])
    t, difference = studentized(~group)  # the first label in sorted order is False
    assert_allclose(test.difference[0, 1], difference, rtol=1e-2)
    # 400 permutations know the mean to 1/20 of a standard deviation, and that to 4 %
    assert test.statistic[0, 1] == pytest.approx((t - null.mean()) / null.std(), abs=0.25, rel=0.1)


def test_blocks_are_permuted_as_a_whole(model, known):
    X, of_rows, _ = known
    donor = np.arange(N) % 8
    test = model.correlation_difference_test(X, donor < 4, donor, random_state=0, **of_rows)
    # 70 allocations, and as small as of two sides they allow
    assert np.nanmin(test.p_value) >= 2 / 70
    again = model.correlation_difference_test(X, donor < 4, donor, random_state=1, **of_rows)
    assert_array_equal(test.p_value, again.p_value)  # all allocations


def test_groups_and_blocks_are_refused(model, known):
    X, of_rows, _ = known
    cells = np.arange(N)
    for groups, blocks, message in (
        (cells % 3, None, "groups has 3 values, 0, 1, 2: expected two"),
        (cells[1:] % 2, None, r"groups of shape \(59,\)"),
        (np.where(cells == 3, None, "a"), None, "Missing values in groups"),
        (cells % 2, cells % 3, "3 blocks have rows of both groups, 0 among them"),
        (cells % 6 < 3, cells % 6, "allocated in 20 ways.*at least 40 ways, such as 4 blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            model.correlation_difference_test(X, groups, blocks, **of_rows)


# ------------------------------------------------------------------ calibration


def null_p_values(seed, n, n_genes, mean, covariate=False):
    """p-values of every pair of independent genes with capture."""
    rng = np.random.default_rng(seed)
    m = mean * np.exp(rng.uniform(-1.0, 1.0, n_genes)) * np.exp(0.35 * rng.standard_normal((n, 1)))
    age = rng.standard_normal(n)
    if covariate:
        m = m * np.exp(np.outer(age, rng.choice([-0.5, 0.5], n_genes)))
    r = np.clip(np.exp(rng.normal(np.log(4.0), 0.5, n_genes)), 1.0, 30.0)
    U = rng.poisson(m * rng.gamma(r, 1 / r, m.shape)).astype(float)
    of_rows = dict(covariates=age) if covariate else {}
    model = NBVCPEstimator(random_state=0, n_steps=50, tol=1.0).fit(U, **of_rows)
    p = model.correlation_test(U, **of_rows).p_value[np.triu_indices(n_genes, 1)]
    return p[~np.isnan(p)]


# the variational part of these fits is cut short: it has no say in the test
unfinished = pytest.mark.filterwarnings("ignore:The variational fit")


@pytest.mark.slow
@unfinished
@pytest.mark.parametrize("mean, covariate", [(0.3, False), (5.0, True)])
def test_independent_genes_are_called_as_often_as_the_level_says(mean, covariate):
    """Shares below .05, .001, .0001 within 10 %, 25 % and 50 %, and three standard errors of counting.

    8 sets of 400 x 150 have 89,000 pairs: 4,470, 89 and 9 below the levels.
    """
    p = np.concatenate([null_p_values(s, 400, 150, mean, covariate) for s in range(8)])
    for level, within in ((0.05, 0.1), (0.001, 0.25), (0.0001, 0.5)):
        slack = within * level + 3 * np.sqrt(level / p.size)
        assert abs(np.mean(p < level) - level) < slack, level


@pytest.mark.slow
def test_correlated_genes_are_found_and_their_sign():
    sim = make_nbln_counts(n_cells=400, n_genes=60, n_factors=2, random_state=0)
    model = NBVCPEstimator(random_state=0).fit(sim.data)
    test = model.correlation_test(sim.data)
    W = sim.loadings - sim.loadings.mean(0)
    truth = W @ W.T
    pairs = np.nonzero(np.triu(test.q_value < 0.05, 1))
    assert pairs[0].size > 100
    assert np.mean(test.sign[pairs] == np.sign(truth[pairs])) > 0.97


@pytest.mark.slow
@unfinished
def test_groups_of_the_same_law_differ_as_often_as_the_level_says():
    """Genes are correlated, and expression differs between the groups: neither is a difference of pairs."""
    found = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        group = np.arange(300) % 2
        x = 1.0 + rng.standard_normal((300, 2)) @ (0.4 * rng.standard_normal((2, 40)))
        x += np.outer(group, rng.choice([-0.5, 0.5], 40))
        U = rng.poisson(np.exp(x) * rng.gamma(4.0, 0.25, x.shape)).astype(float)
        model = NBVCPEstimator(random_state=0, n_steps=50, tol=1.0).fit(U)
        test = model.correlation_difference_test(U, group, n_permutations=300, random_state=0)
        found.append(test.p_value[np.triu_indices(40, 1)])
    p = np.concatenate(found)
    # factors make the pairs of a set dependent: over seeds the share varies by a third
    assert 0.03 < np.mean(p < 0.05) < 0.075
    assert np.mean(p < 0.001) < 0.004

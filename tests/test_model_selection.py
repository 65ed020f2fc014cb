"""Comparing models by held-out rows, and thinning of counts."""

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import logsumexp
from scipy.stats import norm, poisson
from sklearn.base import BaseEstimator
from sklearn.frozen import FrozenEstimator
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GroupKFold, KFold, RepeatedKFold

from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln.datasets import make_nbln_counts
from sknbln.model_selection import ThinningSplit, compare, stacking_weights, standard_error


class Poisson(BaseEstimator):
    """Independent Poisson genes: means of the training rows, times a factor."""

    def __init__(self, factor=1.0):
        self.factor = factor

    def fit(self, X, y=None, *, covariates=None):
        self.n_covariates_ = 0 if covariates is None else np.ndim(covariates)
        self.mean_ = self.factor * (np.asarray(X).mean(axis=0) + 0.1)
        return self

    def score_samples(self, X, covariates=None):
        assert self.n_covariates_ == (0 if covariates is None else np.ndim(covariates))
        return poisson.logpmf(np.asarray(X), self.mean_).sum(axis=1)


@pytest.fixture(scope="module")
def counts():
    return np.random.default_rng(0).poisson(4.0, (60, 3))


@pytest.fixture(scope="module")
def mixture_scores():
    """Log-densities of 2,000 draws from .7 N(-2, 1) + .3 N(2, 1) under its parts and two wide ones."""
    rng = np.random.default_rng(0)
    x = np.where(rng.uniform(size=2000) < 0.7, -2.0, 2.0) + rng.standard_normal(2000)
    return np.stack([norm.logpdf(x, m, s) for m, s in ((-2, 1), (2, 1), (0, 5), (1, 9))], axis=1)


# ------------------------------------------------------------------ the numbers of the table


def test_stacking_weights_are_those_of_a_general_optimizer(mixture_scores):
    weight = stacking_weights(mixture_scores)

    def loss(logits):
        return -np.mean(logsumexp(mixture_scores + logits - logsumexp(logits), axis=1))

    found = minimize(loss, np.zeros(4), tol=1e-12)
    twin = np.exp(found.x - logsumexp(found.x))
    assert -np.mean(logsumexp(mixture_scores + np.log(weight), axis=1)) < found.fun + 1e-7
    np.testing.assert_allclose(weight, twin, atol=1e-4)
    # standard error of a share with 2,000 draws: .010
    np.testing.assert_allclose(weight, [0.7, 0.3, 0.0, 0.0], atol=0.03)
    assert weight.sum() == pytest.approx(1)


def test_stacking_weights_of_far_log_likelihoods(mixture_scores):
    """Hundreds of nats per row underflow in exp; a common shift of a row's models changes nothing."""
    shift = np.linspace(-2000.0, 2000.0, len(mixture_scores))[:, None]
    expected = stacking_weights(mixture_scores)
    np.testing.assert_allclose(stacking_weights(mixture_scores + shift), expected, atol=1e-8)
    np.testing.assert_allclose(stacking_weights(np.array([[-1e4, 0.0]] * 3)), [0, 1])


def test_paired_errors_by_hand(counts):
    models = {"low": Poisson(0.8), "right": Poisson(), "high": Poisson(1.4)}
    result = compare(models, counts, cv=4, random_state=0)
    table, rows = result.table, {name: np.full(60, np.nan) for name in models}
    for train, test in KFold(4, shuffle=True, random_state=0).split(counts):
        for name, model in models.items():
            mean = model.factor * (counts[train].mean(axis=0) + 0.1)
            rows[name][test] = [sum(poisson.logpmf(counts[i], mean)) for i in test]
    assert list(table.index) == ["right", "low", "high"]
    for name in models:
        np.testing.assert_allclose(result.log_likelihood[name], rows[name])
        difference = rows[name] - rows["right"]
        assert table.loc[name, "score"] == pytest.approx(np.mean(rows[name]))
        error = np.std(rows[name], ddof=1) / np.sqrt(60)
        assert table.loc[name, "standard_error"] == pytest.approx(error)
        assert table.loc[name, "difference"] == pytest.approx(np.mean(difference))
        error = np.std(difference, ddof=1) / np.sqrt(60)
        assert table.loc[name, "difference_standard_error"] == pytest.approx(error)
    weight = stacking_weights(result.log_likelihood.to_numpy())
    np.testing.assert_allclose(table.loc[list(models), "weight"], weight)
    assert "latent_dim" not in table


def test_errors_clustered_by_groups():
    values = np.random.default_rng(0).standard_normal((40, 2))
    plain = standard_error(values)
    np.testing.assert_allclose(standard_error(values, np.arange(40)), plain)
    # three copies of every row tell no more than one
    copies = standard_error(np.repeat(values, 3, axis=0), np.repeat(np.arange(40), 3))
    np.testing.assert_allclose(copies, plain)
    assert np.all(np.isnan(standard_error(values, np.zeros(40))))


# ------------------------------------------------------------------ splits


@pytest.mark.parametrize("cv", [3, GroupKFold(3)])
def test_groups_stay_together_and_cluster_the_errors(counts, cv):
    groups = np.array(list("abcdef")).repeat(10)

    class Remembers(Poisson):
        def fit(self, X, y=None):
            self.seen_ = {tuple(row) for row in X}
            return super().fit(X)

        def score_samples(self, X):
            assert self.seen_.isdisjoint(tuple(row) for row in X)
            return super().score_samples(X)

    marked = np.column_stack([counts, np.arange(60) // 10])  # the group is part of the row
    marked[:, :3] = marked[::10, :3].repeat(10, axis=0)
    models = {"a": Remembers(), "b": Remembers(1.3)}
    result = compare(models, marked, cv=cv, groups=groups, random_state=0)
    values = (result.log_likelihood["b"] - result.log_likelihood["a"]).to_numpy()
    # rows of a group are equal: so many groups, not rows
    expected = np.std(values[::10], ddof=1) / np.sqrt(6)
    assert result.table["difference_standard_error"].max() == pytest.approx(expected)


def test_rows_in_several_test_sets_and_in_none(counts):
    repeated = compare(
        [Poisson()], counts, cv=RepeatedKFold(n_splits=3, n_repeats=2, random_state=0)
    )
    splits = list(RepeatedKFold(n_splits=3, n_repeats=2, random_state=0).split(counts))
    halves = [compare([Poisson()], counts, cv=splits[i : i + 3]).log_likelihood for i in (0, 3)]
    assert not np.allclose(*halves)
    np.testing.assert_allclose(repeated.log_likelihood, (halves[0] + halves[1]) / 2)
    one = compare([Poisson()], counts, cv=[(np.arange(40), np.arange(50, 60))])
    assert one.log_likelihood.index.tolist() == list(range(50, 60))


def test_the_order_of_rows_is_no_split(counts):
    """Rows sorted by type: folds of consecutive rows would hold types that no training row has."""
    ordered = np.concatenate([counts, 10 + counts])
    shuffled, blocks = (
        compare([Poisson()], ordered, cv=cv, random_state=0) for cv in (2, KFold(2))
    )
    assert shuffled.table["score"].item() > blocks.table["score"].item() + 1


def test_every_model_has_its_own_covariates(counts):
    models = {"with": Poisson(), "without": Poisson(), "other": Poisson()}
    ages, table = np.linspace(0, 1, 60), pd.DataFrame({"age": np.linspace(0, 1, 60)})
    compare(models, counts, cv=2, covariates={"with": ages, "other": table})
    with pytest.raises(TypeError, match="offset"):  # passed on, and not known to this model
        compare(models, counts, cv=2, offset=ages)


# ------------------------------------------------------------------ genes


def test_scores_of_genes_are_those_of_the_held_out_rows(simulated):
    frame = pd.DataFrame(simulated.toarray(), columns=[f"g{i}" for i in range(24)])
    halves = [(np.arange(75), np.arange(75, 150)), (np.arange(75, 150), np.arange(60))]
    models = {"factors": NBLNEstimator(2, random_state=0), "other": Poisson()}
    found = compare(models, frame, cv=halves).gene_scores
    assert list(found.index) == list(frame.columns)
    parts = [
        len(test)
        * NBLNEstimator(2, random_state=0).fit(frame.iloc[train]).score_genes(frame.iloc[test])
        for train, test in halves
    ]
    np.testing.assert_allclose(found["factors"], sum(parts) / 135, rtol=1e-12)
    assert found["other"].isna().all()


def test_models_given_totals_have_no_scores_of_genes(simulated):
    models = {
        "multinomial": NBLNEstimator(2, observation="multinomial", random_state=0),
        "nb": NBVCPEstimator(random_state=0),
    }
    found = compare(models, simulated, cv=2, given_totals=True, random_state=0).gene_scores
    assert found["multinomial"].isna().all() and found["nb"].notna().all()


# ------------------------------------------------------------------ models


@pytest.fixture(scope="module")
def simulated():
    return make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=3).data


def test_models_of_counts(simulated):
    """Factors are found, a nested source is fitted to the training rows, scores are those of `score`."""
    halves = [(np.arange(75), np.arange(75, 150))]
    train, test = simulated[:75], simulated[75:]
    source = NBVCPEstimator(random_state=0).fit(test)  # cloned: what it has seen does not matter
    models = {
        "independent": NBVCPEstimator(random_state=0),
        "factors": NBLNEstimator(2, informative_prior_estimator=source, random_state=0),
    }
    result = compare(models, simulated, cv=halves)
    assert list(result.table.index) == ["factors", "independent"]
    by_hand = NBLNEstimator(
        2, informative_prior_estimator=NBVCPEstimator(random_state=0), random_state=0
    )
    expected = by_hand.fit(train).score_samples(test)
    np.testing.assert_allclose(result.log_likelihood["factors"], expected, rtol=1e-10)
    last = result.table.loc["independent"]
    assert last["difference"] < -3 * last["difference_standard_error"]
    np.testing.assert_array_equal(result.table["latent_dim"], [2, np.nan])

    # frozen fits are scored as they are; the capture prior of each is from the rows of its own fit
    frozen = {"factors": FrozenEstimator(by_hand), "elsewhere": FrozenEstimator(source)}
    with pytest.warns(UserWarning, match="prior of 'elsewhere' differs .* Pass given_totals=True"):
        result = compare(frozen, simulated, cv=halves)
    np.testing.assert_array_equal(result.log_likelihood["factors"], expected)
    result = compare(frozen, simulated, cv=halves, given_totals=True)  # without a warning
    expected = by_hand.score_samples(test, given_totals=True)
    np.testing.assert_array_equal(result.log_likelihood["factors"], expected)


def test_models_of_others(counts):
    models = {"two": GaussianMixture(2, random_state=0), "one": GaussianMixture(random_state=0)}
    result = compare(models, counts.astype(float), cv=2, random_state=0)
    assert result.table["latent_dim"].to_dict() == {"one": 1, "two": 2}


def test_refusals(counts):
    class Short(Poisson):
        def score_samples(self, X):
            return super().score_samples(X)[1:]

    class Impossible(Poisson):
        def score_samples(self, X):
            return np.full(len(X), -np.inf)

    with pytest.raises(TypeError, match=r"'x' \(KFold\) has no score_samples"):
        compare({"x": KFold()}, counts)
    with pytest.raises(ValueError, match="Two estimators are named Poisson: give a dict"):
        compare([Poisson(), Poisson(2.0)], counts)
    with pytest.raises(ValueError, match="no estimator to compare"):
        compare({}, counts)
    with pytest.raises(ValueError, match=r"'Short' returned .* \(29,\) .* expected 30"):
        compare([Short()], counts, cv=2)
    with pytest.raises(ValueError, match="30 values that are not finite"):
        compare([Impossible()], counts, cv=2)
    multinomial = NBLNEstimator(observation="multinomial")
    with pytest.raises(ValueError, match=r"'NBLNEstimator' is given each row's total.* Pass given"):
        compare([NBVCPEstimator(), multinomial], counts)


# ------------------------------------------------------------------ thinning


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1000),
    share=st.floats(0.01, 0.99),
    dispersion=st.sampled_from([None, 1e-8, 0.3, 50.0, 1e300, np.inf]),
    make=st.sampled_from([np.asarray, sp.csr_matrix, sp.coo_array, pd.DataFrame]),
)
def test_thinned_counts_sum_to_the_counts(seed, share, dispersion, make):
    X = np.random.default_rng(seed).poisson([0.2, 2.0, 300.0], (7, 3))
    before = X.copy()
    splits = ThinningSplit(2, test_share=share, dispersion=dispersion, random_state=seed)
    given = make(X)
    pairs = list(splits.split(given))
    assert len(pairs) == splits.get_n_splits() == 2
    for train, test in pairs:
        assert train.dtype == test.dtype == np.int64
        np.testing.assert_array_equal((train + test).toarray(), before)
        assert np.all(train.data > 0) and np.all(test.data > 0)
    np.testing.assert_array_equal(X, before)
    again = list(splits.split(given))
    assert all((one != other).nnz == 0 for one, other in zip(pairs[1], again[1], strict=True))
    assert splits.offset == pytest.approx(np.log(share / (1 - share)))


def test_thinning_leaves_the_callers_matrix_alone():
    X = sp.csr_array(
        ([2.0, 0.0, 3.0], [1, 0, 1], [0, 3]), shape=(1, 2)
    )  # a zero, and one entry twice
    [(train, test)] = ThinningSplit(1, random_state=0).split(X)
    assert (train + test).toarray().tolist() == [[0, 5]]
    assert X.data.tolist() == [2.0, 0.0, 3.0]


N_DRAWS, MEAN, SIZE, SHARE = 20_000, 5.0, 2.0, 0.3


@pytest.fixture(scope="module")
def overdispersed():
    """Negative binomial counts of one gene with N_DRAWS rows, and Poisson counts of another."""
    rng = np.random.default_rng(0)
    rates = rng.gamma(SIZE, MEAN / SIZE, N_DRAWS)
    return np.column_stack([rng.poisson(rates), rng.poisson(MEAN, N_DRAWS)])


def thin(X, dispersion):
    pair = next(ThinningSplit(1, test_share=SHARE, dispersion=dispersion, random_state=1).split(X))
    return [part.toarray() for part in pair]


def correlations(train, test):
    return np.array([np.corrcoef(train[:, j], test[:, j])[0, 1] for j in range(2)])


def test_parts_are_independent_with_the_moments_of_negative_binomials(overdispersed):
    train, test = thin(overdispersed, [SIZE, np.inf])
    # standard error of a correlation of independent numbers: 1 / sqrt(N) = .007
    assert np.all(np.abs(correlations(train, test)) < 0.03)
    # and so is the square, as of independent and not only of uncorrelated parts
    assert np.all(np.abs(correlations(train**2.0, test**2.0)) < 0.03)
    for part, share in ((train, 1 - SHARE), (test, SHARE)):
        m, r = share * MEAN, share * SIZE
        np.testing.assert_allclose(part.mean(axis=0), m, rtol=0.04)  # standard errors up to .9 %
        np.testing.assert_allclose(part.var(axis=0), [m + m**2 / r, m], rtol=0.08)  # up to 2 %


def test_parts_depend_where_the_dispersion_is_wrong(overdispersed):
    """With r as it is 0; as Poisson counts covariance e (1 - e) m^2 / r; with r too small negative."""
    covariance = SHARE * (1 - SHARE) * MEAN**2 / SIZE
    train, test = thin(overdispersed, None)
    assert np.cov(train[:, 0], test[:, 0])[0, 1] == pytest.approx(covariance, rel=0.15)
    assert correlations(train, test)[0] > 0.4 > 0.03 > abs(correlations(train, test)[1])
    assert correlations(*thin(overdispersed, 0.5))[0] < -0.15


def test_thinning_refuses_what_it_cannot_split():
    for wrong in ([[0.5]], [[-1.0]]):
        with pytest.raises(ValueError, match="expects counts: found values that are negative or"):
            next(ThinningSplit().split(wrong))
    with pytest.raises(ValueError, match="contains NaN"):
        next(ThinningSplit().split([[np.nan]]))
    for wrong in (0.0, -1.0, np.nan, [1.0, 1.0]):
        with pytest.raises(
            ValueError, match="expected a positive number, or one for each of the 1"
        ):
            next(ThinningSplit(dispersion=wrong).split([[3]]))
    with pytest.raises(ValueError, match="test_share"):
        next(ThinningSplit(test_share=1.0).split([[3]]))
    with pytest.raises(ValueError, match="n_splits"):
        next(ThinningSplit(0).split([[3]]))

"""The units of `transform`, `posterior_scores` and `inverse_transform`: nats, or standardized scores."""

import pickle

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone

from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln.datasets import make_nbln_counts

N, G, K = 150, 24, 2


@pytest.fixture(scope="module")
def counts():
    return make_nbln_counts(n_cells=N, n_genes=G, n_factors=K, random_state=3).data


@pytest.fixture(scope="module")
def fitted(counts):
    source = NBVCPEstimator(random_state=0).fit(counts)
    return NBLNEstimator(K, informative_prior_estimator=source, random_state=0).fit(counts)


@pytest.fixture
def model(fitted):
    """The fit, safe to change."""
    return pickle.loads(pickle.dumps(fitted))


def with_a_zero_component(model):
    """Zero loadings in the last component but for a level common to all genes, which is not in W_perp."""
    model.loadings_[:, -1] = 0.3
    model.components_[-1] = 0.0
    return model


def norms(model):
    return np.linalg.norm(model.components_, axis=1)


def standardized(model, X):
    """Posterior mean and covariance of the standardized scores."""
    rows = model._solve(model._validated(X))
    return rows.scores, rows.score_covariance


def test_coordinates_are_scores_times_the_norms_of_their_components(model, counts):
    scores, covariance = standardized(model, counts)
    lengths = norms(model)
    assert lengths.min() > 1.2  # so that nats and standardized scores differ
    assert model.whiten is False
    assert_array_equal(model.transform(counts), scores * lengths)
    mean, found = model.posterior_scores(counts)
    assert_array_equal(mean, scores * lengths)
    assert_allclose(found, covariance * np.outer(lengths, lengths), rtol=1e-14)

    model.set_params(whiten=True)
    assert_array_equal(model.transform(counts), scores)
    mean, found = model.posterior_scores(counts)
    assert_array_equal(mean, scores)
    assert_array_equal(found, covariance)
    # of variance 1 in the model: squared posterior mean plus posterior variance
    assert_allclose(np.mean(mean**2 + np.einsum("cii->ci", found), axis=0), 1.0, atol=0.2)


def test_distances_in_nats_are_those_of_the_compositional_log_rates(model, counts):
    Z = model.transform(counts)
    log_rates = standardized(model, counts)[0] @ model.components_
    assert_allclose(
        np.linalg.norm(Z[1:] - Z[:-1], axis=1),
        np.linalg.norm(log_rates[1:] - log_rates[:-1], axis=1),
        rtol=1e-9,
    )


@pytest.mark.parametrize("whiten", [False, True])
def test_inverse_transform_gives_the_log_rates(model, counts, whiten):
    model.set_params(whiten=whiten)
    expected = model.mean_ + standardized(model, counts)[0] @ model.loadings_.T
    assert_allclose(model.inverse_transform(model.transform(counts)), expected, rtol=1e-12)
    assert_array_equal(model.inverse_transform(np.zeros((1, K))), model.mean_[None])
    with_names = pd.DataFrame(model.transform(counts), columns=model.get_feature_names_out())
    assert_allclose(model.inverse_transform(with_names), expected, rtol=1e-12)


@pytest.mark.parametrize("whiten", [False, True])
def test_a_component_that_is_zero_has_zero_coordinates(model, counts, whiten):
    with_a_zero_component(model).set_params(whiten=whiten)
    assert np.any(standardized(model, counts)[0][:, -1])  # a level of the rows
    Z = model.transform(counts)
    assert np.all(Z[:, :-1].std(0) > 0.5)
    assert_array_equal(Z[:, -1], 0.0)
    mean, covariance = model.posterior_scores(counts)
    assert_array_equal(mean, Z)
    assert np.all(np.isfinite(covariance))
    if not whiten:
        assert_array_equal(covariance[:, -1], 0.0)
    anywhere = Z + [0.0, 3.0]
    assert_array_equal(model.inverse_transform(anywhere), model.inverse_transform(Z))
    assert np.all(np.isfinite(model.inverse_transform(Z)))


def test_the_last_of_as_many_components_as_genes_is_zero():
    """W_perp has at most n_genes - 1 dimensions: the norm of the last row is rounding error."""
    X = make_nbln_counts(n_cells=60, n_genes=4, n_factors=2, random_state=3).data
    model = NBLNEstimator(4, random_state=0).fit(X)
    assert norms(model)[-1] < 1e-12
    Z = model.transform(X)
    assert_array_equal(Z[:, -1], 0.0)
    assert_array_equal(model.posterior_scores(X)[1][:, -1], 0.0)
    far = Z + [0.0, 0.0, 0.0, 1.0]
    assert_array_equal(model.inverse_transform(far), model.inverse_transform(Z))


def test_inverse_transform_refuses_other_shapes_and_missing_values(model):
    with pytest.raises(ValueError, match="Z has 3 columns, expected 2: one per component"):
        model.inverse_transform(np.zeros((5, 3)))
    with pytest.raises(ValueError, match="Expected 2D array, got 1D array"):
        model.inverse_transform(np.zeros(K))
    with pytest.raises(ValueError, match="Input Z contains NaN"):
        model.inverse_transform(np.full((1, K), np.nan))


def test_whiten_does_not_change_the_fit(fitted, counts):
    given = {"informative_prior_estimator": fitted.informative_prior_estimator_, "whiten": True}
    again = clone(fitted).set_params(**given).fit(counts)
    assert_array_equal(again.components_, fitted.components_)
    assert_array_equal(again.get_distributions()["z"].loc, fitted.get_distributions()["z"].loc)
    with pytest.raises(ValueError, match="The 'whiten' parameter"):
        again.set_params(whiten="yes").fit(counts)


@pytest.mark.parametrize("whiten", [False, True])
def test_frames_and_pickles_keep_the_units(model, counts, whiten):
    Z = model.set_params(whiten=whiten).transform(counts)
    again = pickle.loads(pickle.dumps(model))
    assert again.whiten is whiten
    assert_array_equal(again.transform(counts), Z)
    frame = again.set_output(transform="pandas").transform(counts)
    assert list(frame.columns) == list(model.get_feature_names_out())
    assert_array_equal(frame.to_numpy(), Z)
    assert_array_equal(again.inverse_transform(frame), model.inverse_transform(Z))

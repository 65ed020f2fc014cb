"""The estimators behave as scikit-learn's do."""

import inspect
import pickle
import re

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln.datasets import load_immune_cells, make_nbln_counts

LEVELS = [(), ("r",), ("r", "eta"), ("r", "mu", "eta")]


@pytest.fixture(scope="module")
def counts():
    return make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=3).data


@pytest.fixture(scope="module")
def source(counts):
    return NBVCPEstimator(random_state=0).fit(counts)


@pytest.fixture(scope="module")
def fitted(counts, source):
    return NBLNEstimator(3, informative_prior_estimator=source, random_state=0).fit(counts)


#: weights are repetitions in all sums over rows, see test_weights.py. But the variational fit of NBVCP draws
#: random numbers for each row, so that it agrees with that of repeated rows within its noise only.
STOCHASTIC = dict.fromkeys(
    (
        "check_sample_weight_equivalence_on_dense_data",
        "check_sample_weight_equivalence_on_sparse_data",
    ),
    "random numbers are drawn for each row",
)


# The checks feed fractional, tiny and random matrices: what the estimators say of those is tested
# elsewhere.
@pytest.mark.filterwarnings("ignore:.*whole numbers:UserWarning")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks(
    [NBVCPEstimator(), NBLNEstimator(latent_dim=2)], expected_failed_checks=lambda _: STOCHASTIC
)
def test_scikit_learn_check(estimator, check):
    check(estimator)


def test_pipeline_predicts_labels():
    cells = load_immune_cells()
    pipeline = make_pipeline(
        NBLNEstimator(latent_dim=4, random_state=0), StandardScaler(), LogisticRegression()
    )
    accuracy = cross_val_score(pipeline, cells.data, cells.target, cv=3)
    # The largest class holds 39 % of the cells. Four factors tell macrophages from T cells, CD4 from
    # CD8 less well: measured 0.71, and 0.75 for four principal components of log1p counts.
    assert accuracy.mean() > 0.6


def test_grid_search_fits_the_source_once_per_fold(counts, tmp_path, monkeypatch):
    calls = []
    original = NBVCPEstimator._maximum
    monkeypatch.setattr(
        NBVCPEstimator, "_maximum", lambda self, *args: calls.append(1) or original(self, *args)
    )
    grid = GridSearchCV(
        NBLNEstimator(
            informative_prior_estimator=NBVCPEstimator(random_state=0),
            memory=str(tmp_path),
            random_state=0,
        ),
        {"latent_dim": [1, 3], "informative_priors_freeze": LEVELS},
        cv=2,
        refit=False,
        error_score="raise",
    ).fit(counts)
    assert len(calls) == 2
    assert np.all(np.isfinite(grid.cv_results_["mean_test_score"]))


def test_grid_search_in_two_processes_gives_the_same(counts, tmp_path):
    def search(n_jobs):
        return GridSearchCV(
            NBLNEstimator(
                informative_prior_estimator=NBVCPEstimator(random_state=0),
                memory=str(tmp_path / str(n_jobs)),
                random_state=0,
            ),
            {"latent_dim": [1, 2]},
            cv=2,
            n_jobs=n_jobs,
            error_score="raise",
        ).fit(counts)

    np.testing.assert_allclose(
        search(2).cv_results_["mean_test_score"],
        search(1).cv_results_["mean_test_score"],
        rtol=1e-9,
    )


@pytest.mark.parametrize("container", [sp.csr_matrix, sp.csr_array, sp.csc_array, np.asarray])
def test_containers_give_the_same_numbers(counts, fitted, source, container):
    X = counts.toarray() if container is np.asarray else container(counts)
    before = X.copy()
    again = clone(fitted).set_params(informative_prior_estimator=source).fit(X)
    np.testing.assert_array_equal(again.components_, fitted.components_)
    np.testing.assert_array_equal(again.transform(X), fitted.transform(counts))
    np.testing.assert_array_equal(again.score_samples(X), fitted.score_samples(counts))
    if container is np.asarray:
        np.testing.assert_array_equal(X, before)
    else:
        assert (X != before).nnz == 0


def test_data_frames_in_and_out(counts, fitted):
    frame = pd.DataFrame(counts.toarray(), columns=[f"gene{i}" for i in range(counts.shape[1])])
    model = NBLNEstimator(3, random_state=0).set_output(transform="pandas")
    scores = model.fit_transform(frame)
    assert list(scores.columns) == ["nblnestimator0", "nblnestimator1", "nblnestimator2"]
    assert list(model.informative_prior_estimator_.feature_names_in_) == list(frame.columns)
    np.testing.assert_allclose(scores.to_numpy(), fitted.transform(counts), atol=1e-8)


@pytest.mark.parametrize("freeze", LEVELS)
def test_training_rows_and_new_rows_are_treated_alike(counts, source, freeze):
    model = NBLNEstimator(
        2, informative_prior_estimator=source, informative_priors_freeze=freeze, random_state=0
    )
    at_once = clone(model).set_params(informative_prior_estimator=source).fit_transform(counts)
    model.fit(counts)
    np.testing.assert_allclose(at_once, model.transform(counts), atol=1e-6)
    few = model.transform(counts[:7])
    np.testing.assert_allclose(few, at_once[:7], atol=1e-6)


@pytest.mark.parametrize("name", ["source", "fitted"])
def test_pickle_is_bit_equal(name, counts, request):
    model = request.getfixturevalue(name)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.transform(counts), model.transform(counts))
    np.testing.assert_array_equal(again.score_samples(counts), model.score_samples(counts))
    np.testing.assert_array_equal(again.dispersion_, model.dispersion_)


def test_same_seed_same_bits_and_batch_size_sets_memory_only(counts):
    first = NBLNEstimator(2, random_state=5).fit(counts)
    again = NBLNEstimator(2, random_state=5).fit(counts)
    np.testing.assert_array_equal(first.components_, again.components_)
    small = NBLNEstimator(2, batch_size=40, random_state=5).fit(counts)
    np.testing.assert_allclose(small.transform(counts), first.transform(counts), atol=1e-8)


def test_a_fitted_source_is_used_as_it_is(counts, source):
    before = pickle.dumps(source)
    model = NBLNEstimator(
        2, informative_prior_estimator=source, cascade="parameter", random_state=0
    ).fit(counts)
    assert model.informative_prior_estimator_ is source
    np.testing.assert_array_equal(model.dispersion_, source.dispersion_)
    np.testing.assert_array_equal(model.capture_offset_, source.capture_offset_)
    assert pickle.dumps(source) == before


def test_a_clone_of_a_fitted_source_is_fitted_on_its_own_rows(counts, source):
    model = clone(NBLNEstimator(2, informative_prior_estimator=source, random_state=0))
    model.fit(counts[:80])
    assert model.informative_prior_estimator_ is not source
    assert model.informative_prior_estimator_.capture_offset_.shape == (80,)


def test_frozen_estimator_reuses_one_fit(counts, source):
    model = clone(
        NBLNEstimator(2, informative_prior_estimator=FrozenEstimator(source), random_state=0)
    )
    model.fit(counts[:80])
    assert model.informative_prior_estimator_ is source


def test_one_line_is_the_recommended_pipeline(counts):
    model = NBLNEstimator(2, random_state=0).fit(counts)
    source = NBVCPEstimator(random_state=0).fit(counts)
    explicit = NBLNEstimator(2, informative_prior_estimator=source, random_state=0).fit(counts)
    np.testing.assert_array_equal(model.components_, explicit.components_)


def test_not_converged_is_said(counts, source):
    model = NBLNEstimator(
        2, informative_prior_estimator=source, max_iter=1, tol=0.0, random_state=0
    )
    with pytest.warns(ConvergenceWarning, match="max_iter=1 sweeps were done"):
        model.fit(counts)
    assert not model.converged_


def test_other_sources_are_refused(counts):
    with pytest.raises(TypeError, match="NBVCPEstimator"):
        NBLNEstimator(2, informative_prior_estimator=StandardScaler()).fit(counts)


@pytest.mark.parametrize("estimator", [NBVCPEstimator(), NBLNEstimator()], ids=repr)
def test_what_needs_a_fit_says_so(estimator):
    """Every public method but those of the parameters, of callbacks, and those that fit."""
    others = r"fit|fit_transform|get_params|set_\w+|get_metadata_routing"
    names = [
        name
        for name in dir(type(estimator))
        if callable(getattr(type(estimator), name)) and not re.fullmatch(rf"_.*|{others}", name)
    ]
    assert {"transform", "score_samples", "sample_posterior"} <= {*names}
    for name in names:
        method = getattr(clone(estimator), name)
        required = [
            p
            for p in inspect.signature(method).parameters.values()
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        with pytest.raises(NotFittedError):
            found = method(*[np.ones((5, 3))] * len(required))
            next(found)  # of what yields

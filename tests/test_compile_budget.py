"""How many kernels are compiled: a fixed number by the first fit, none by those like it."""

import numpy as np
import pytest
from sklearn.base import clone

from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln.datasets import make_nbln_counts

# of widths and row buckets that no other test uses, so that nothing is compiled already
N_GENES, BUCKET = 23, 320
CAPTURE = (np.log(300.0), 0.4)


@pytest.fixture(scope="module")
def counts():
    return make_nbln_counts(BUCKET, N_GENES, n_factors=2, random_state=3).data


def fit_and_use(model, X):
    model.fit(X)
    model.transform(X)
    model.score(X)


def test_a_fit_compiles_a_fixed_number_and_another_like_it_nothing(compiled, counts):
    source = NBVCPEstimator(capture_efficiency=CAPTURE, random_state=0)
    compiled()
    source.fit(counts)
    source.score(counts)
    # the solution of rows, for all of up to 8 factors; the variational step, and the zeros of Adam's state
    assert 2 <= compiled() <= 6
    model = NBLNEstimator(3, informative_prior_estimator=source, random_state=0, max_iter=3)
    with pytest.warns(UserWarning, match="did not converge"):
        fit_and_use(model, counts)
    # sums for the start (2), products of scores
    assert compiled() == 3

    others = [
        dict(random_state=7),
        dict(latent_dim=4),
        dict(latent_dim="auto"),
        dict(cascade="parameter"),
        dict(cascade="parameter", informative_priors_freeze=()),
        dict(latent_dim=2, informative_priors_freeze=("eta",), informative_priors_tau=np.inf),
        dict(loadings_prior="ard"),
        dict(loadings_prior={"type": "horseshoe_columnwise", "tau_scale": 0.3}),
        dict(cascade="marginal", informative_priors_freeze=("r",)),
        dict(observation="poisson"),
        dict(observation="multinomial"),
        dict(capture_efficiency=(CAPTURE[0] + 0.5, 0.3)),
    ]
    for params in others:
        other = clone(model).set_params(informative_prior_estimator=source, **params)
        with pytest.warns(UserWarning, match="did not converge"):
            fit_and_use(other, counts)
        assert compiled() == 0, params


def test_other_numbers_of_rows_of_the_bucket_compile_nothing(compiled, counts):
    """Folds of a cross-validation differ by a row or two, and in how many rows sit at the bound 0."""
    model = NBLNEstimator(
        3,
        informative_prior_estimator=NBVCPEstimator(capture_efficiency=CAPTURE, random_state=0),
        random_state=0,
        max_iter=3,
    )
    with pytest.warns(UserWarning, match="did not converge"):
        fit_and_use(model, counts)
    compiled()
    for n in (BUCKET - 1, BUCKET - 30, BUCKET - 63):
        with pytest.warns(UserWarning, match="did not converge"):
            fit_and_use(clone(model).set_params(random_state=n), counts[:n])
        assert compiled() == 0, n


def test_covariates_need_as_many_kernels_and_other_values_of_them_none(compiled, counts):
    """One more of each kernel for a number of covariates, whatever they are."""
    rng = np.random.default_rng(0)
    kernels = []
    for seed in (0, 1):
        age = rng.normal(size=BUCKET)
        source = NBVCPEstimator(capture_efficiency=CAPTURE, random_state=seed)
        model = NBLNEstimator(3, informative_prior_estimator=source, random_state=seed, max_iter=3)
        compiled()
        with pytest.warns(UserWarning, match="did not converge"):
            model.fit(counts, covariates=age)
        model.transform(counts, covariates=age)
        model.score(counts, covariates=age)
        kernels.append(compiled())
    # the source's solution of rows and step, and the four of the model; what zeros of Adam's state take
    assert 6 <= kernels[0] <= 8 and kernels[1] == 0

"""Small fits that all pictures are drawn from."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln.datasets import make_nbln_counts

from .displays import N_CELLS, N_GENES


@pytest.fixture(scope="package")
def counts():
    sim = make_nbln_counts(n_cells=N_CELLS, n_genes=N_GENES, n_factors=2, random_state=3)
    return pd.DataFrame(sim.data.toarray(), columns=[f"G{i:02d}" for i in range(N_GENES)])


@pytest.fixture(scope="package")
def source(counts):
    return NBVCPEstimator(random_state=0).fit(counts)


@pytest.fixture(scope="package")
def model(counts, source):
    return NBLNEstimator(3, informative_prior_estimator=source, random_state=0).fit(counts)


@pytest.fixture(scope="package")
def shrunk(counts, source):
    return NBLNEstimator(
        3,  # as of the other: compiled once
        informative_prior_estimator=source,
        informative_priors_freeze=("eta",),
        informative_priors_tau=np.inf,
        loadings_prior="ard",
        random_state=0,
    ).fit(counts)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")

"""The first sweeps over many counts are in single precision; what a fit ends with is in double."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

from sknbln import NBLNEstimator, NBVCPEstimator, _rows
from sknbln._jax import float64
from sknbln._passes import Sweeper
from sknbln._rows import RowBatches
from sknbln.datasets import make_nbln_counts
from sknbln.solver.marginal import solve_cells
from sknbln.solver.params import Params

N, G, BATCH = 300, 40, 128


@pytest.fixture(scope="module")
def counts():
    return make_nbln_counts(n_cells=N, n_genes=G, n_factors=2, random_state=1).data


@pytest.fixture(scope="module")
def source(counts):
    return NBVCPEstimator(batch_size=BATCH, random_state=0).fit(counts)


@pytest.fixture
def precisions(monkeypatch):
    """Every fit begins in single precision; a list of the precision of every pass."""
    monkeypatch.setattr(_rows, "FEW_ENTRIES", 0)
    passes, original = [], Sweeper.__call__

    def noted(self, params):
        before = self.rounding
        sums = original(self, params)
        passes.append("single" if before > 1e-10 else "double")
        return sums

    monkeypatch.setattr(Sweeper, "__call__", noted)
    return passes


def estimator(source, **options):
    return NBLNEstimator(
        informative_prior_estimator=source, batch_size=BATCH, random_state=0, **options
    )


def random_params(rng, scale=0.3):
    return Params(
        rng.normal(1.0, 0.5, G),
        scale * rng.standard_normal((G, 8)),
        np.full(G, 0.1),
        np.full(G, 0.2),
    )


@pytest.mark.usefixtures("strict_jax")
@float64
def test_cells_in_single_precision_agree(counts):
    batches = RowBatches(counts, np.zeros(N), np.full(N, 0.3), batch_size=BATCH)
    cells = batches.cells(batches.slices()[0])
    params, zeta = random_params(np.random.default_rng(0)), np.zeros((batches.rows, 9))
    _, results, sums = solve_cells(cells, params, zeta, 1e-10, block=batches.rows)
    single = jax.tree.map(lambda a: np.asarray(a, np.float32), (cells, params, zeta))
    _, other, other_sums = solve_cells(*single, 1e-4, block=batches.rows)
    assert other.zeta.dtype == np.float32
    assert other_sums.log_marginal.dtype == other_sums.genes.gradient_mean.dtype == np.float64
    assert_allclose(other_sums.log_marginal, sums.log_marginal, rtol=1e-6)
    assert_allclose(other.zeta, results.zeta, atol=2e-3)
    for one, two in zip(other_sums.genes, sums.genes, strict=True):
        assert_allclose(one, two, rtol=1e-2, atol=1e-3 * np.max(np.abs(two), initial=1.0))


@pytest.mark.parametrize("latent_dim", ["auto", 3])
def test_a_fit_ends_in_double_precision_at_the_same_optimum(
    counts, source, precisions, monkeypatch, latent_dim
):
    model = estimator(source, latent_dim=latent_dim).fit(counts)
    n_single = precisions.count("single")
    assert n_single > 3 and precisions == sorted(precisions, reverse=True)  # single, then double
    assert precisions.count("double") >= 2
    assert model.n_iter_ == model.objective_history_.size - 1
    precisions.clear()
    monkeypatch.setattr(_rows, "FEW_ENTRIES", np.inf)
    plain = estimator(source, latent_dim=latent_dim).fit(counts)
    assert "single" not in precisions
    assert model.converged_ and plain.converged_
    assert model.latent_dim_ == plain.latent_dim_
    found, expected = (m.objective_history_[-1] for m in (model, plain))
    assert_allclose(found, expected, atol=2 * model.tol_ * abs(expected))
    assert_allclose(model.score(counts), plain.score(counts), atol=0.05)


def test_the_last_sweep_allowed_is_in_double_precision(counts, source, precisions):
    with pytest.warns(UserWarning, match="did not converge"):
        estimator(source, latent_dim=3, max_iter=4).fit(counts)
    # the start and three sweeps, the same point again, the fourth sweep
    assert precisions == ["single"] * 4 + ["double"] * 2


def test_a_start_that_overflows_is_evaluated_in_double_precision(counts):
    batches = RowBatches(counts, np.zeros(N), np.zeros(N), batch_size=BATCH)
    params = random_params(np.random.default_rng(0))._replace(dispersion=np.full(G, 1e60))
    sweeper = Sweeper(batches, 8, single=True)
    assert np.isfinite(sweeper(params).log_marginal)
    assert not sweeper.refine()  # it was in double already

"""Small problems for tests of the solver, all of the same shape, so that they share one compilation."""

import numpy as np

from sknbln.solver.marginal import solve_cells
from sknbln.solver.params import Cells, Params

from .csr import csr

K_ROWS = 3  # latent dimension of `rows`
N_CELLS, N_GENES, RANK = 8, 12, 4


def problem(seed=0, *, poisson=False, capture="mixed"):
    """Counts of a few cells (a `Cells`) drawn from globals (a `Params`), and the sizes r.

    ``capture`` is "fixed" (known offsets), "free" (a Gaussian prior), "mixed" (every other cell) or "flat".
    """
    rng = np.random.default_rng(seed)
    mean = rng.uniform(0.0, 4.0, N_GENES)
    loadings = 0.4 * rng.standard_normal((N_GENES, RANK))
    noise = rng.uniform(0.05, 0.3, N_GENES)
    r = np.full(N_GENES, np.inf) if poisson else np.exp(rng.uniform(-1.0, 4.0, N_GENES))
    offset = rng.uniform(0.2, 1.5, N_CELLS)
    scale = np.full(N_CELLS, 0.5)
    precision = np.ones(N_CELLS)
    if capture == "fixed":
        scale[:] = 0.0
    elif capture == "mixed":
        scale[::2] = 0.0
    elif capture == "flat":
        scale[:], precision[:] = 1.0, 0.0
    y = mean - offset[:, None] + rng.standard_normal((N_CELLS, RANK)) @ loadings.T
    y += np.sqrt(noise) * rng.standard_normal((N_CELLS, N_GENES))
    y -= (0.5 * rng.standard_normal(N_CELLS))[:, None]
    gamma = np.ones_like(y) if poisson else rng.gamma(r, 1 / r, y.shape)
    counts = rng.poisson(np.exp(y) * gamma).astype(float)
    cells = Cells(counts, offset, scale, precision, np.ones(N_CELLS))
    return cells, Params(mean, loadings, noise, 1.0 / r), r


def zeros(cells, params):
    """Start of the scores."""
    return np.zeros((cells.counts.shape[0], params.loadings.shape[1] + 1))


def solved(cells, params):
    """Alpha and results of the kernel, started from scores of zero."""
    return solve_cells(cells, params, zeros(cells, params))[:2]


def rows(n=20, seed=60):
    """A matrix of n rows with its capture data, and globals of latent dimension `K_ROWS`."""
    parts = [problem(seed + i)[0] for i in range(-(-n // N_CELLS))]
    counts, offset, scale, precision, *_ = (np.concatenate(a)[:n] for a in zip(*parts, strict=True))
    params = problem(seed)[1]
    params = params._replace(loadings=params.loadings[:, :K_ROWS])
    return csr(counts), offset, scale, precision, params

"""A small objective with a bad start, for tests of the ascent."""

import numpy as np

from sknbln._counts import CountHistogram
from sknbln._passes import Sweeper
from sknbln._rows import RowBatches
from sknbln.solver.objective import Objective
from sknbln.solver.params import GaussianPrior, Params, noise_coordinate

from . import small
from .csr import csr

K = 2
N = small.N_CELLS
BLOCKS = Params._fields


def problem(seed, coupling=None):
    """Objective and a bad start: far means, random loadings, extreme noise and sizes."""
    cells, params, _ = small.problem(seed)
    X = csr(cells.counts)
    G = small.N_GENES
    # eight cells say little of twelve genes: priors keep the optimum inside
    evaluate = Objective(
        Sweeper(RowBatches(X, cells.offset, cells.scale), K),
        CountHistogram(X),
        GaussianPrior(np.full(G, 2.0), np.full(G, 0.25)),
        GaussianPrior(np.full(G, 1.0), np.full(G, 1.0)),
        coupling,
    )
    rng = np.random.default_rng(seed)
    start = Params(
        params.mean + 2 * rng.standard_normal(G),
        rng.standard_normal((G, K)),
        noise_coordinate(np.exp(rng.uniform(np.log(1e-4), np.log(5.0), G))),
        rng.uniform(-4.0, 6.0, G),
    )
    return evaluate, start

"""How an NBLN fit begins: the number of factors, the start coordinates, the first sweeps."""

import numpy as np

from ._passes import sum_over_batches
from ._rows import RowBatches, in_single, pad_columns, random_rows
from ._spectrum import MOST_FACTORS, score_spectrum
from .solver.coupling import MarginalCoupling
from .solver.gene_priors import EVEN, NEARLY_ALL_IN_NOISE, NEARLY_ALL_IN_R
from .solver.start import loadings_from_scores, start_coordinates

#: a median over genes of the overdispersion that the loadings leave, nats squared. Above it gamma and
#: log-normal overdispersion differ, and a fit looks at both; below it they are nearly the same.
SMALL_OVERDISPERSION = 0.5


#: counts, zeros included, by which the better of two starts is told
LOOK_ENTRIES = 2**23


def rows_to_look_at(n_cells, n_genes, rng):
    """Positions of a random sample that tells the better of two starts; None where it is most of the rows."""
    size = -(-LOOK_ENTRIES // n_genes)
    return random_rows(n_cells, size, rng) if 2 * size < n_cells else None


def number_of_factors(X, offsets, known, source, most, rng):
    """Number of factors of all genes and start loadings of groups of few genes, from the scores.

    Both together are at most ``most`` and `MOST_FACTORS`. The third result is the `rank_diagnostics_`.
    """
    spectrum = score_spectrum(
        X, source.mean, source.dispersion, offsets.loc, rng, known, source.coef
    )
    most = min(most, MOST_FACTORS)
    k = min(spectrum.n_factors, most)
    groups = spectrum.groups[:, : most - k]
    return (
        k,
        groups,
        {
            "score_eigenvalues": spectrum.eigenvalues,
            "null_eigenvalues": spectrum.null,
            "null_threshold": spectrum.threshold,
            "score_rank": spectrum.n_factors,
            "n_groups": spectrum.groups.shape[1],
            "column_information": None,
            "noise_edge": None,
        },
    )


def start_loadings(X, offsets, known, source, k, groups, batch_size, rng):
    """Loadings at the start: k columns from the moments of the scores, and those of the groups of genes.

    One column of zeros where there are none.
    """
    n_cells, n_genes = X.shape
    zero = np.zeros(n_cells)
    batches = RowBatches(X, offsets.loc, zero, batch_size=batch_size, known=known)
    # single precision is enough for a start; a fit to few counts is the same to rounding for all batch sizes
    dtype = np.float32 if in_single(n_cells, n_genes) else float
    sums = sum_over_batches(batches, source.params, dtype)
    broad = loadings_from_scores(sums, known.total_weight, n_genes, k, rng)
    loadings = np.concatenate([broad, groups], 1)
    return pad_columns(loadings, max(loadings.shape[1], 1))


def candidates(objective, source, total, loadings, free, channel):
    """Objectives and start coordinates that a fit looks at: one, or two where overdispersion is large.

    Where r is free and the split of overdispersion between d and r has a prior, the prior is centred at an
    even split; where overdispersion is large, at nearly all in r (gamma), or at nearly all in d (log-normal).
    """
    log_mean, log_r = np.log(source.mean), np.log(source.dispersion)
    left = total(log_r) - np.sum(loadings**2, 1)
    splits = (None,)
    if channel != "nb":
        splits = (np.inf,)
    elif free.dispersion and objective.gene_priors.split is not None:
        splits = (EVEN,)
        if np.median(left) > SMALL_OVERDISPERSION:
            splits = NEARLY_ALL_IN_R, NEARLY_ALL_IN_NOISE
    coupled = isinstance(objective.coupling, MarginalCoupling)
    return [
        (
            objective if split is None else objective.with_split(split),
            start_coordinates(log_mean, log_r, loadings, free, coupled, total, split, source.coef),
        )
        for split in splits
    ]

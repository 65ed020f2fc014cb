"""Warnings at the end of an NBLN fit: each function returns a sentence, or None if nothing is wrong."""

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from ._counts import user_stacklevel
from ._spectrum import MOST_FACTORS
from .solver.ascent import magnitude

#: largest plausible variance of a log-rate, nats squared: one standard deviation is a factor of exp(7) in
#: the rate, and the mean rate is far above every observed count
LARGEST_VARIANCE = 50.0
#: range of the mean square of a real column's scores, 1 in the model, without a warning
MEAN_SQUARE_RANGE = (0.5, 2.0)
#: r frozen at the source's value: warn if at least this share of the genes favours a larger r ...
NEARLY_ALL = 0.95
#: ... and the slope of the log-likelihood is at least this, nats per cell and unit of log r
LEAST_SLOPE = 1.0
#: genes for each row above which a loadings prior may outweigh the rows
MANY_GENES = 5
_MOST_NAMES = 10


def say(model, outcome, rows):
    """Issue the warnings of a fit that has just ended, from its `Outcome` and `RowPosterior`."""
    n_cells, n_genes = model.capture_offset_.size, model.mean_.size
    for sentence in (
        not_converged(outcome, n_cells, model.tol_),
        modes_not_found(outcome.point.sums.n_unconverged, n_cells),
    ):
        _warn(sentence, ConvergenceWarning)
    names = getattr(model, "feature_names_in_", np.arange(n_genes))
    variance = np.sum(model.loadings_**2, 1) + model.noise_variance_
    _warn(heavy_tails(variance, names))
    if model.latent_dim == "auto":
        _warn(no_factor(model.latent_dim_))
        _warn(more_factors_than_looked_for(model.rank_diagnostics_))
    if not model.converged_:
        return  # the checks below hold at a maximum only
    rank = model.w_prior_diagnostics_["effective_rank"]
    _warn(scores_off_scale(rows.scores[:, :rank], rows.score_covariance[:, :rank, :rank]))
    if model.latent_dim != "auto" and model.rank_diagnostics_ is not None:
        _warn(rank_is_a_bound(rank, model.latent_dim_, model.rank_diagnostics_["score_rank"]))
    if outcome.columns is not None and n_genes > MANY_GENES * n_cells:
        _warn(factors_taken_away(rank, outcome.columns.variance.size))
    if "r" in model.frozen_params_ and model.cascade == "parameter":
        _warn(dispersion_counted_twice(model.dispersion_gradient_, n_cells))


def _warn(sentence, category=UserWarning):
    if sentence is not None:
        warnings.warn(sentence, category, stacklevel=user_stacklevel())


def not_converged(outcome, n_cells, tol):
    """The sweeps ended before the tolerance was met."""
    if outcome.converged or outcome.stopped:
        return None
    share = outcome.gain / magnitude(outcome.point.value, n_cells)
    return (
        f"NBLNEstimator did not converge: {outcome.reason}; the last one gained {share:.2g} of the "
        f"log-posterior's magnitude, tol={tol:g}. Increase max_iter or tol."
    )


def modes_not_found(n_unconverged, n_cells):
    """Newton's method did not converge to the mode of some cells."""
    if not n_unconverged:
        return None
    return (
        f"The mode of {n_unconverged} of {n_cells} cells was not found to tolerance in the last sweep. Look "
        "for extreme counts in those rows."
    )


def heavy_tails(variance, names):
    """Log-rates with variances far larger than counts can support."""
    beyond = np.flatnonzero(variance > LARGEST_VARIANCE)
    if not beyond.size:
        return None
    largest = beyond[np.argsort(-variance[beyond], kind="stable")]
    return (
        f"The log-rates of {beyond.size} of {variance.size} genes have a variance above "
        f"{LARGEST_VARIANCE:g} nats squared, up to {variance.max():.4g} ({_listed(names[largest])}): their "
        "means and draws are ruled by tails that no count has shown. Leave out genes with few counts, or "
        "give the model less freedom: a smaller latent_dim, a loadings_prior or informative_priors_tau=1."
    )


def scores_off_scale(scores, covariance):
    """Columns whose scores do not have unit variance, which the model assumes.

    The statistic is the mean of ``E[z^2]``, the squared posterior mean *plus* the posterior variance. It is
    1 at a maximum of the likelihood over the lengths of the columns. The mean square of the posterior means
    alone is the reliability of the scores, which is small for a weak real factor.
    """
    squares = np.mean(scores**2 + np.einsum("cii->ci", covariance), axis=0)
    least, most = MEAN_SQUARE_RANGE
    off = np.flatnonzero((squares < least) | (squares > most))
    if not off.size:
        return None
    values = ", ".join(f"{value:.2g}" for value in squares[off][:_MOST_NAMES])
    return (
        f"The mean square of the scores over the training rows, 1 in the model, is {values} in the "
        f"components {_listed(off)}: their loadings are too short or too long by its root. So few rows do "
        'not determine these columns: take a smaller latent_dim, fewer genes or loadings_prior="none".'
    )


def no_factor(latent_dim):
    """The number of factors was looked for, and there is none."""
    if latent_dim:
        return None
    return (
        'latent_dim="auto" found no factor: the counts are those of genes that vary independently. '
        "components_ is one row of zeros, and transform gives one column of zeros. Look at "
        "rank_diagnostics_, or set latent_dim to a number."
    )


def more_factors_than_looked_for(diagnostics):
    """The scores show more factors than a fit looks for by itself."""
    if diagnostics is None or diagnostics["score_rank"] <= MOST_FACTORS:
        return None
    return (
        f'The scores show more than {MOST_FACTORS} factors, the most that latent_dim="auto" takes. Set '
        "latent_dim to a larger number to fit more."
    )


def rank_is_a_bound(rank, latent_dim, score_rank):
    """All columns are real, and the scores show more factors."""
    if rank < latent_dim or score_rank <= latent_dim:
        return None
    return (
        f"All {latent_dim} columns of the loadings are real, and the scores show {score_rank} factors: "
        "effective_rank is bounded by latent_dim and not found by the loadings_prior. Fit again with a "
        'larger latent_dim, or with latent_dim="auto".'
    )


def factors_taken_away(rank, n_factors):
    """A loadings prior took columns to zero that the scores show, with many more genes than rows."""
    if rank >= n_factors:
        return None
    return (
        f"The loadings_prior took {n_factors - rank} of {n_factors} columns to zero that the scores show as "
        "factors. With many more genes than rows a prior of the columns outweighs what the rows say of them: "
        'take loadings_prior="none".'
    )


def dispersion_counted_twice(gradient, n_cells):
    """Nearly all genes favour a larger r than the source's, at which it is frozen."""
    share, slope = np.mean(gradient > 0), gradient.sum() / n_cells
    if share < NEARLY_ALL or slope < LEAST_SLOPE:
        return None
    return (
        "Overdispersion is counted twice: r is frozen at the source's, which holds the variance of the "
        f"factors too, and {100 * share:.0f} % of the genes want a larger r ({slope:.2g} nats per cell and "
        'unit of log r). Use cascade="marginal", or informative_priors_freeze=("eta",) with '
        "informative_priors_tau=inf."
    )


def _listed(names):
    return ", ".join(map(str, names[:_MOST_NAMES])) + (", ..." if len(names) > _MOST_NAMES else "")

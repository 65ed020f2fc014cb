"""The capture model: priors and posteriors of the cells' capture offsets, and the held-out score."""

import reprlib
import warnings
from numbers import Real
from typing import NamedTuple

import numpy as np
from scipy.special import gammaln, log_ndtr, logsumexp

from ._blocks import as_rows
from ._counts import CountHistogram, row_constants, user_stacklevel
from ._known import Known
from ._passes import left_out_densities, solve_rows
from ._rows import RowBatches
from .solver.params import dispersion

#: prior total mRNA of a cell, counts
ORGANISMS = {"human": 200_000.0, "mouse": 200_000.0, "yeast": 60_000.0, "ecoli": 3_000.0}
_DEFAULT_SIGMA = 0.5
#: largest |log M0| and range of sigma; far beyond these, offsets overflow in floating point
_LARGEST_LOG_M0 = 50.0
_SIGMA_RANGE = (1e-8, 1e8)
#: offset of a row without counts under a flat prior, nats: the capture probability is practically 0
_NO_CAPTURE = 500.0


class CapturePrior(NamedTuple):
    """Log-normal prior of a cell's total mRNA: ``eta ~ TruncNormal(log_m0 - log L, sigma, low=0)``."""

    log_m0: float
    sigma: float

    def rows(self, library_size):
        """Location and scale of each row's offset prior, before truncation."""
        loc = self.log_m0 - np.log(np.maximum(library_size, 1.0))
        return loc, np.full(loc.shape, self.sigma)


def library_sizes(X):
    """Row totals, shape (n_cells,)."""
    return as_rows(X).totals


def resolve(capture_efficiency, X, weight=None):
    """The capture prior that `capture_efficiency` specifies for the training counts X; None for no capture.

    Rows without a weight have no part in it.

    Raises
    ------
    ValueError
        If a name is unknown, or a pair is not (log_M0, sigma_M) with sigma_M > 0 and both in range.
    """
    if capture_efficiency is None:
        return None
    if isinstance(capture_efficiency, str):
        if capture_efficiency == "auto":
            sizes = library_sizes(X)
            largest = max(float((sizes if weight is None else sizes[weight > 0]).max()), 1.0)
            return CapturePrior(np.log(largest) + 3 * _DEFAULT_SIGMA, _DEFAULT_SIGMA)
        if capture_efficiency not in ORGANISMS:
            raise ValueError(
                f"capture_efficiency={capture_efficiency!r} is not known: expected 'auto', None, a "
                f"pair (log_M0, sigma_M), or one of {sorted(ORGANISMS)}."
            )
        return CapturePrior(float(np.log(ORGANISMS[capture_efficiency])), _DEFAULT_SIGMA)
    pair = tuple(capture_efficiency)
    shown = reprlib.repr(pair)  # shortened: a user may pass a whole vector of library sizes
    if (
        len(pair) != 2
        or not all(isinstance(v, Real) and np.isfinite(v) for v in pair)
        or pair[1] <= 0
    ):
        raise ValueError(
            f"capture_efficiency={shown} of length {len(pair)}: expected two finite numbers "
            "(log_M0, sigma_M) with sigma_M > 0, e.g. (np.log(1e5), 0.5)."
        )
    low, high = _SIGMA_RANGE
    if abs(pair[0]) > _LARGEST_LOG_M0 or not low <= pair[1] <= high:
        raise ValueError(
            f"capture_efficiency={shown}: expected log_M0 between {-_LARGEST_LOG_M0:g} and "
            f"{_LARGEST_LOG_M0:g}, the logarithm of a number of molecules, and sigma_M between {low:g} and "
            f"{high:g} nats."
        )
    return CapturePrior(float(pair[0]), float(pair[1]))


def warn_about_truncation(prior, X):
    """Warn if more than a few cells have more counts than M0, the prior total mRNA of a cell."""
    if prior is None:
        return
    sizes = library_sizes(X)
    above = int(np.sum(np.log(np.maximum(sizes, 1.0)) > prior.log_m0))
    # with few cells, more than half of them
    if above > min(max(3, 0.01 * sizes.size), sizes.size / 2):
        warnings.warn(
            f"{above} of {sizes.size} cells have more counts than the prior total mRNA of a cell (M0 of "
            f"capture_efficiency), {np.exp(prior.log_m0):.4g} (the largest has {sizes.max():.4g}). Their "
            "capture offset is held near 0 by its truncation. Fit with a larger log_M0.",
            UserWarning,
            stacklevel=user_stacklevel(),
        )


def row_prior(prior, X):
    """Location and scale of the offset prior of each row of X; zeros without a capture model."""
    if prior is None:
        return np.zeros(X.shape[0]), np.zeros(X.shape[0])
    return prior.rows(library_sizes(X))


class OffsetPosterior(NamedTuple):
    """Posterior of the capture offset of each row: a Gaussian truncated to eta >= 0."""

    loc: np.ndarray  # mode, >= 0
    scale: np.ndarray
    raw_loc: np.ndarray  # mode before truncation; negative where the bound is active

    def chosen(self, positions):
        """Those of the rows at these positions."""
        return OffsetPosterior(*(a[positions] for a in self))


def same_offsets(one, other):
    """Whether two posteriors belong to the same rows, that is, agree in every row up to rounding."""
    return one.loc.shape == other.loc.shape and all(
        np.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(one, other, strict=True)
    )


def refined(source, source_prior, prior, tau):
    r"""Location and scale of free offsets: the capture prior, counted once, and the source's likelihood.

    The source's posterior of an offset, with precision `p` and location `m`, already includes its capture
    prior, with `p_s` and `m_s`. The remainder is the likelihood, whose precision is divided by ``tau^2``:

    .. math:: \mathrm{precision} = p_0 + (p - p_s) / \tau^2

    where `p_0` is the precision of the model's own capture prior. ``tau = 1`` gives the source's posterior
    (if the capture priors are the same), ``tau -> inf`` the capture prior, and ``tau -> 0`` a frozen offset:
    for tau below 1 the location does not move from the source's mode towards that of the likelihood.

    Parameters
    ----------
    source : OffsetPosterior
        The source's posterior of each row. Where its mode is at the bound 0, the offset is held at 0.
    source_prior, prior : tuple of ndarray
        Location and scale of the capture prior of the source and of the model, (n_rows,) each.
    tau : float
        Factor of the scales of the source's likelihood, `informative_priors_tau`.

    Returns
    -------
    loc, scale : ndarray of shape (n_rows,)
    """
    weight = tau**-2.0
    p, p_s, p_0 = source.scale**-2.0, source_prior[1] ** -2.0, prior[1] ** -2.0
    precision = p_0 + weight * np.maximum(p - p_s, 0.0)
    taken = min(weight, 1.0)
    pull = weight * p * source.raw_loc + p_0 * prior[0] - taken * p_s * source_prior[0]
    loc = pull / (weight * p + p_0 - taken * p_s)
    bound = source.raw_loc < 0
    return np.where(bound, 0.0, loc), np.where(bound, 0.0, precision**-0.5)


def given_source(X, found, source_prior, prior, *, frozen, tau):
    """Offset, scale and precision of each row of a model with a source: (n_rows,) each.

    The rule is the same for training rows and new rows. ``found`` is the `OffsetPosterior` of the rows
    given the source. A frozen offset is its mode, with scale 0; a free one follows :func:`refined`; without
    a capture model the offset is 0.
    """
    zeros = np.zeros(X.shape[0])
    if source_prior is None or frozen:
        loc, scale = found.loc, zeros
    elif prior is None:
        loc, scale = zeros, zeros
    else:
        loc, scale = refined(found, row_prior(source_prior, X), row_prior(prior, X), tau)
    return loc, scale, np.ones(X.shape[0])


def flat(X, params, known=None):
    """Offset, scale and precision of rows whose offset has a flat prior: (n_rows,) each.

    A flat prior has no location. The offset returned is the origin of the expansion: the one that explains
    the row's total at its mean log-rates. A row without counts has no information about its scores, which is
    expressed by a fixed offset with a capture probability of practically 0.
    """
    totals, known = library_sizes(X), Known.nothing(X.shape[0]) if known is None else known
    has_counts = totals > 0
    if known.is_nothing:
        expected = logsumexp(params.mean)
    else:
        expected = np.concatenate(
            [
                logsumexp(params.mean + known.chosen(rows).log_scale(params.coef), axis=1)
                for rows in known.blocks()
            ]
        )
    offset = np.where(has_counts, expected - np.log(np.where(has_counts, totals, 1.0)), _NO_CAPTURE)
    return offset, has_counts.astype(float), np.where(has_counts, 0.0, 1.0)


def offset_posterior(X, params, prior, batch_size=None, found=None, known=None):
    """Posterior of each row's capture offset given the parameters, an `OffsetPosterior`.

    It is 0 without a capture model. ``known`` are the rows' covariates and exposures; ``found`` is the
    `RowPosterior` of the rows, computed here if None.
    """
    offset, scale = row_prior(prior, X)
    if prior is None:
        return OffsetPosterior(offset, scale, offset)
    batches = RowBatches(X, offset, scale, batch_size=batch_size, known=known)
    if found is None:
        found = solve_rows(batches, params)
    raw, sd = found.offset.copy(), found.offset_scale
    rows = np.flatnonzero(raw < 0)
    if rows.size:
        gain, curvature, _, _ = _at_zero(
            batches.without_capture(rows), offset[rows], scale[rows], params
        )
        raw[rows], sd[rows] = gain / curvature, 1 / np.sqrt(curvature)
    return OffsetPosterior(np.maximum(raw, 0.0), sd, raw)


def _at_zero(batches, offset, scale, params):
    """Slope and negative curvature of log p(u, eta) at eta = 0, log p(u | eta = 0), and the genes' pull.

    The slope is that of the mode; the pull is what the genes' integrals add to it.
    """
    found = solve_rows(batches, params)
    slope = np.minimum(found.offset_slope + offset / scale**2, 0.0)
    return slope, found.offset_curvature + scale**-2, found.log_marginal, found.offset_pull


def score_rows(X, params, prior, batch_size=None, known=None):
    r"""Laplace marginal ``log p(u_c)`` of every row, constants included, shape (n_cells,).

    Log-rates and the capture offset are both integrated out. The capture prior of the offset is truncated
    at 0: if the mode is above 0, Laplace's method is corrected by the Gaussian's mass above 0; if it is at
    the bound, the quadratic expansion there is integrated above 0. Both expand around the maximum of the
    genes' integrals, which `offset_pull` moves away from the mode (see `solver.second_order`).
    """
    offset, scale = row_prior(prior, X)
    batches = RowBatches(X, offset, scale, batch_size=batch_size, known=known)
    posterior = solve_rows(batches, params)
    value = posterior.log_marginal
    if prior is not None:
        raw, sd = posterior.offset, posterior.offset_scale
        value = value + log_ndtr((raw + scale**2 * posterior.offset_pull) / sd)
        rows = np.flatnonzero(raw < 0)
        if rows.size:
            m, s = offset[rows], scale[rows]
            slope, curvature, at_zero, pull = _at_zero(batches.without_capture(rows), m, s, params)
            slope = slope + pull
            value[rows] = (
                at_zero
                - 0.5 * (m / s) ** 2
                - np.log(s)
                - 0.5 * np.log(curvature)
                + 0.5 * slope**2 / curvature
                + log_ndtr(slope / np.sqrt(curvature))
            )
        value = value - log_ndtr(offset / scale)
    return value + row_constants(X, dispersion(params))


def score_rows_given_totals(X, params, batch_size=None, known=None):
    r"""Laplace marginal ``log p(u_c | total)`` of every row, constants included, shape (n_cells,).

    Given the rates, a row's total is Poisson; under a flat prior on its log-scale the probability of the
    total is ``1 / total``, whatever the rates. The score is therefore the marginal under a flat prior of the
    capture offset, plus ``log total``. It uses no capture prior.

    Laplace's method applied to the offset alone is Stirling's formula for Gamma(total). Its error is known
    and corrected, so that the score of Poisson counts is exact as Sigma -> 0.
    """
    totals = library_sizes(X)
    has_counts = totals > 0
    n = totals[has_counts]
    batches = RowBatches(X, *flat(X, params, known), batch_size=batch_size, known=known)
    log_marginal = solve_rows(batches, params).log_marginal
    stirling = gammaln(n) - (0.5 * np.log(2 * np.pi / n) + n * np.log(n) - n)
    value = np.zeros(X.shape[0])  # log 1: a row without counts has one possible composition
    value[has_counts] = (
        log_marginal[has_counts]
        + row_constants(X, dispersion(params))[has_counts]
        + 0.5 * np.log(2 * np.pi)
        + np.log(n)
        + stirling
    )
    return value


def score_genes(X, params, prior, batch_size=None, known=None):
    """Mean over rows of ``log p(u_cg | the other counts of the row)``, (n_genes,); NaN for genes not seen.

    The bound of the offset at 0 is left out: of a cell's genes it is the same for all but one.
    """
    batches = RowBatches(X, *row_prior(prior, X), batch_size=batch_size, known=known)
    total = left_out_densities(batches, params)
    total = total + CountHistogram(X).log_constants(dispersion(params))
    n_seen = np.full(X.shape[1], float(X.shape[0]))
    if batches.known.missing is not None:
        n_seen -= batches.known.missing.getnnz(axis=0)
    with np.errstate(invalid="ignore"):
        return np.where(n_seen > 0, total / n_seen, np.nan)

"""The capture model: from the user's `capture_efficiency` to a prior on each cell's offset."""

import reprlib
import warnings
from numbers import Real
from typing import NamedTuple

import numpy as np
from scipy.special import gammaln, log_ndtr, logsumexp

from ._counts import row_constants, user_stacklevel
from ._rows import RowBatches, solve_rows
from .solver.params import dispersion

#: prior total mRNA of a cell, counts
ORGANISMS = {"human": 200_000.0, "mouse": 200_000.0, "yeast": 60_000.0, "ecoli": 3_000.0}
_DEFAULT_SIGMA = 0.5
#: the largest |log M0|, and the range of sigma: far beyond, offsets leave the range of floating point
_LARGEST_LOG_M0 = 50.0
_SIGMA_RANGE = (1e-8, 1e8)
#: offset of a row without counts whose prior is flat, nats: nothing is captured
_NO_CAPTURE = 500.0


class CapturePrior(NamedTuple):
    """Log-normal prior of a cell's total mRNA: ``eta ~ TruncNormal(log_m0 - log L, sigma, low=0)``."""

    log_m0: float
    sigma: float

    def rows(self, library_size):
        """Location and scale of the offset's prior (before truncation) per row."""
        loc = self.log_m0 - np.log(np.maximum(library_size, 1.0))
        return loc, np.full(loc.shape, self.sigma)


def library_sizes(X):
    """Row totals, shape (n_cells,)."""
    return np.asarray(X.sum(axis=1), float).ravel()


def resolve(capture_efficiency, X):
    """The prior that the parameter stands for, given the training counts; None is no capture.

    Raises
    ------
    ValueError
        For an unknown name or a pair that is not (log_M0, sigma_M) with sigma_M > 0, or far out of range.
    """
    if capture_efficiency is None:
        return None
    if isinstance(capture_efficiency, str):
        if capture_efficiency == "auto":
            largest = max(float(library_sizes(X).max()), 1.0)
            return CapturePrior(np.log(largest) + 3 * _DEFAULT_SIGMA, _DEFAULT_SIGMA)
        if capture_efficiency not in ORGANISMS:
            raise ValueError(
                f"capture_efficiency={capture_efficiency!r} is not known: expected 'auto', None, a "
                f"pair (log_M0, sigma_M), or one of {sorted(ORGANISMS)}."
            )
        return CapturePrior(float(np.log(ORGANISMS[capture_efficiency])), _DEFAULT_SIGMA)
    pair = tuple(capture_efficiency)
    shown = reprlib.repr(pair)  # a vector of libraries is not printed whole
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
    """Say so when more than a few cells have more counts than the prior total mRNA of a cell."""
    if prior is None:
        return
    sizes = library_sizes(X)
    above = int(np.sum(np.log(np.maximum(sizes, 1.0)) > prior.log_m0))
    # of few cells, a half
    if above > min(max(3, 0.01 * sizes.size), sizes.size / 2):
        warnings.warn(
            f"{above} of {sizes.size} cells have more counts than the prior total mRNA of a cell (M0 of "
            f"capture_efficiency), {np.exp(prior.log_m0):.4g} (the largest has {sizes.max():.4g}). Their "
            "capture offset is held near 0 by its truncation. Fit with a larger log_M0.",
            UserWarning,
            stacklevel=user_stacklevel(),
        )


def row_prior(prior, X):
    """Location and scale per row of X; zeros without a capture model."""
    if prior is None:
        return np.zeros(X.shape[0]), np.zeros(X.shape[0])
    return prior.rows(library_sizes(X))


class OffsetPosterior(NamedTuple):
    """Posterior of capture offsets: a Gaussian truncated to eta >= 0, per row."""

    loc: np.ndarray  # mode, >= 0
    scale: np.ndarray
    raw_loc: np.ndarray  # of the Gaussian before truncation; negative where the bound is active


def same_offsets(one, other):
    """Whether two posteriors are of the same rows: nothing else agrees in every row to rounding."""
    return one.loc.shape == other.loc.shape and all(
        np.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(one, other, strict=True)
    )


def refined(source, source_prior, prior, tau):
    r"""Location and scale of offsets that are not frozen: the capture prior once, and a source's counts.

    The source's posterior of an offset, precision `p` and location `m`, already holds its capture
    prior, `p_s` and `m_s`. The rest is its likelihood, whose precision counts by ``1 / tau^2``:

    .. math:: \mathrm{precision} = p_0 + (p - p_s) / \tau^2

    with `p_0` of the model's own capture prior. ``tau = 1`` is the source's posterior (where the capture
    priors are the same), ``tau -> inf`` the capture prior, ``tau -> 0`` the freeze: below 1 the location
    does not go on from the source's mode towards the likelihood's.

    Parameters
    ----------
    source : OffsetPosterior
        The source's posterior of each row. Where its mode is at the bound 0, the offset is held there.
    source_prior, prior : tuple of ndarray
        Location and scale of the source's and of the model's capture prior, (n_rows,) each.
    tau : float

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

    One rule for training rows and new rows. ``found`` are the offsets' posteriors given the source
    (`OffsetPosterior`). Frozen: their mode, scale 0. Otherwise as :func:`refined`; without a capture
    model there is no offset.
    """
    held = np.zeros(X.shape[0])
    if source_prior is None or frozen:
        loc, scale = found.loc, held
    elif prior is None:
        loc, scale = held, held
    else:
        loc, scale = refined(found, row_prior(source_prior, X), row_prior(prior, X), tau)
    return loc, scale, np.ones(X.shape[0])


def flat(X, mean):
    """Offset, scale and precision of rows whose offset has a flat prior: (n_rows,) each.

    It is expanded around the offset that explains the total at the mean log-rates. A row without counts says
    nothing, which is what a vanishing capture says.
    """
    totals = library_sizes(X)
    some = totals > 0
    offset = np.where(some, logsumexp(mean) - np.log(np.where(some, totals, 1.0)), _NO_CAPTURE)
    return offset, some.astype(float), np.where(some, 0.0, 1.0)


def offset_posterior(X, params, prior, batch_size=None, found=None):
    """Posterior of each row's capture offset given the parameters; ``found`` the rows' solutions if known.

    Returns an `OffsetPosterior` of zeros where there is no capture model.
    """
    offset, scale = row_prior(prior, X)
    if prior is None:
        return OffsetPosterior(offset, scale, offset)
    batches = RowBatches(X, offset, scale, batch_size=batch_size)
    if found is None:
        found = solve_rows(batches, params)
    raw, sd = found.offset.copy(), found.offset_scale
    rows = np.flatnonzero(raw < 0)
    if rows.size:
        gain, curvature, _ = _at_zero(
            batches.without_capture(rows), offset[rows], scale[rows], params
        )
        raw[rows], sd[rows] = gain / curvature, 1 / np.sqrt(curvature)
    return OffsetPosterior(np.maximum(raw, 0.0), sd, raw)


def _at_zero(batches, offset, scale, params):
    """Slope and curvature of log p(u, eta) at eta = 0, and log p(u | eta = 0)."""
    found = solve_rows(batches, params)
    slope = np.minimum(found.offset_slope + offset / scale**2, 0.0)
    return slope, found.offset_curvature + scale**-2, found.log_marginal


def score_rows(X, params, prior, batch_size=None):
    r"""Laplace marginal ``log p(u_c)`` of every row, constants included, shape (n_cells,).

    Log-rates and the capture offset are both integrated, the offset under its capture prior, which
    is truncated at 0: where the mode of the offset is inside, by the Gaussian's mass above 0; where
    it is at the bound, by the integral of the expansion there.
    """
    offset, scale = row_prior(prior, X)
    batches = RowBatches(X, offset, scale, batch_size=batch_size)
    found = solve_rows(batches, params)
    value = found.log_marginal
    if prior is not None:
        raw, sd = found.offset, found.offset_scale
        value = value + log_ndtr(raw / sd)
        rows = np.flatnonzero(raw < 0)
        if rows.size:
            m, s = offset[rows], scale[rows]
            slope, curvature, at_zero = _at_zero(batches.without_capture(rows), m, s, params)
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


def score_rows_given_totals(X, params, batch_size=None):
    r"""Laplace marginal ``log p(u_c | total)`` of every row, constants included, shape (n_cells,).

    Given the rates a row's total is Poisson, and with a flat log-scale its probability is ``1 / total``
    whatever the rates: the marginal under a flat capture offset, plus ``log total``. No capture prior enters.

    Laplace's method on the offset alone is Stirling's formula of Gamma(total); its error is known and
    taken out, so that the score of Poisson counts is exact as Sigma -> 0.
    """
    totals = library_sizes(X)
    some = totals > 0
    n = totals[some]
    batches = RowBatches(X, *flat(X, params.mean), batch_size=batch_size)
    found = solve_rows(batches, params).log_marginal
    stirling = gammaln(n) - (0.5 * np.log(2 * np.pi / n) + n * np.log(n) - n)
    value = np.zeros(X.shape[0])  # a row without counts has one composition
    value[some] = (
        found[some]
        + row_constants(X[some], dispersion(params))
        + 0.5 * np.log(2 * np.pi)
        + np.log(n)
        + stirling
    )
    return value

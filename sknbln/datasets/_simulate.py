"""Count matrices drawn from the two models, returned with their true parameters."""

from numbers import Integral, Real

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse
from scipy.special import log_ndtr
from scipy.stats import truncnorm
from sklearn.utils import Bunch, check_random_state
from sklearn.utils._param_validation import Interval, validate_params

from .._typing import Seed, keeping_hints

# Number of dense entries drawn at a time: about 16 MB per array, whatever n_cells is.
_CHUNK_ENTRIES = 2**21

# Dispersions lie within these multiples of their median: 1.5 to 30 at the default median of 6.3.
_DISPERSION_CLIP = (1.5 / 6.3, 30.0 / 6.3)

_COMMON_CONSTRAINTS = {
    "n_cells": [Interval(Integral, 1, None, closed="left")],
    "n_genes": [Interval(Integral, 1, None, closed="left")],
    "mean_range": [tuple, list],
    "dispersion": [tuple, list],
    "capture_mean": [Interval(Real, 0, None, closed="left")],
    "capture_sd": [Interval(Real, 0, None, closed="left")],
    "offset": ["array-like", None],
    "random_state": ["random_state"],
}


@keeping_hints(validate_params(_COMMON_CONSTRAINTS, prefer_skip_nested_validation=True))
def make_nbvcp_counts(
    n_cells: int = 500,
    n_genes: int = 200,
    *,
    mean_range: tuple[float, float] = (0.05, 30.0),
    dispersion: tuple[float, float] = (6.3, 0.6),
    capture_mean: float = 3.0,
    capture_sd: float = 0.35,
    offset: ArrayLike | None = None,
    random_state: Seed = None,
) -> Bunch:
    """Draw counts of independent genes, negative binomial with a capture probability per cell.

    ``u_cg ~ NB(mean = m_g exp(-eta_c + o_cg), size r_g)``, with variance ``mean + mean**2 / r_g``
    given ``eta_c``, and ``eta_c ~ TruncNormal(capture_mean, capture_sd**2, low=0)``.

    Parameters
    ----------
    n_cells : int, default=500
        Number of rows.

    n_genes : int, default=200
        Number of columns.

    mean_range : tuple (low, high) of float, default=(0.05, 30.0)
        The expected count of a gene, averaged over the distribution of the capture offsets, is
        log-uniform between these two.

    dispersion : tuple (median, log_sd) of float, default=(6.3, 0.6)
        The sizes r are log-normal with this median and this standard deviation of the logarithm,
        clipped to (0.238, 4.76) times the median: 1.5 to 30 at the default. An infinite median
        gives Poisson counts.

    capture_mean : float, default=3.0
        Location of the capture offsets, in nats.

    capture_sd : float, default=0.35
        Scale of the capture offsets. With 0 every offset is `capture_mean`; with both at 0 there
        is no capture.

    offset : array-like of shape (n_cells,) or (n_cells, n_genes), default=None
        What is added to the log-rates of the counts, o: logarithms of known exposures, or what
        covariates do, ``covariates @ coef.T``. With the same `random_state`, the true parameters
        and scores are the same with and without it.

    random_state : int, RandomState instance or None, default=None
        Determines every draw. Pass an int for the same result in each call.

    Returns
    -------
    counts : :class:`~sklearn.utils.Bunch`
        Dictionary-like object, with the attributes

        data : CSR array of shape (n_cells, n_genes), int32
            The counts.
        mean : ndarray of shape (n_genes,)
            Biological mean expression m, before capture.
        dispersion : ndarray of shape (n_genes,)
            Sizes r.
        capture_offset : ndarray of shape (n_cells,)
            Offsets eta, all >= 0; ``exp(-eta)`` is the capture probability.
        expected_counts : ndarray of shape (n_genes,)
            Expected count of each gene over cells, ``m E[exp(-eta)]``, at offset 0.

    See Also
    --------
    make_nbln_counts : The same with correlated genes.

    Examples
    --------
    >>> from sknbln.datasets import make_nbvcp_counts
    >>> counts = make_nbvcp_counts(n_cells=100, n_genes=20, random_state=0)
    >>> counts.data.shape
    (100, 20)
    >>> counts.dispersion.shape
    (20,)
    """
    low, high = _check_range("mean_range", mean_range, positive=True)
    median, log_sd = _check_dispersion(dispersion)
    log_exposure = _check_offset(offset, n_cells, n_genes)
    rng = check_random_state(random_state)

    expected = np.exp(rng.uniform(np.log(low), np.log(high), n_genes))
    mean = expected * np.exp(-_log_mean_capture(capture_mean, capture_sd))
    r = _draw_dispersion(n_genes, median, log_sd, rng)
    eta = _draw_capture(n_cells, capture_mean, capture_sd, rng)

    log_mean = np.log(mean)
    blocks = [
        _draw_counts(log_mean - eta[rows, None] + log_exposure[rows], r, rng)
        for rows in _row_chunks(n_cells, n_genes)
    ]
    return Bunch(
        data=_stack(blocks),
        mean=mean,
        dispersion=r,
        capture_offset=eta,
        expected_counts=expected,
    )


@keeping_hints(
    validate_params(
        {
            **_COMMON_CONSTRAINTS,
            "n_factors": [Interval(Integral, 0, None, closed="left")],
            "loading_norms": [tuple, list],
            "noise_variance": [tuple, list],
            "depth": [Interval(Real, 0, None, closed="neither")],
            "return_log_rates": ["boolean"],
        },
        prefer_skip_nested_validation=True,
    )
)
def make_nbln_counts(
    n_cells: int = 500,
    n_genes: int = 200,
    *,
    n_factors: int = 4,
    loading_norms: tuple[float, float] = (0.3, 0.8),
    noise_variance: tuple[float, float] = (0.05, 0.2),
    mean_range: tuple[float, float] = (0.05, 30.0),
    dispersion: tuple[float, float] = (6.3, 0.6),
    capture_mean: float = 3.0,
    capture_sd: float = 0.35,
    depth: float = 1.0,
    offset: ArrayLike | None = None,
    return_log_rates: bool = False,
    random_state: Seed = None,
) -> Bunch:
    """Draw counts from the negative binomial log-normal factor model.

    ``x_c = mu + W z_c + sqrt(d) * e_c`` with standard normal ``z_c`` (n_factors) and ``e_c``
    (n_genes), so that ``x_c ~ N(mu, Sigma)`` with ``Sigma = W W' + diag(d)``, and
    ``u_cg ~ NB(mean = exp(x_cg - eta_c + o_cg), size r_g)``. Rates are in nats.

    The columns of W sum to zero over genes and are of unequal strength, and
    ``eta_c ~ TruncNormal(capture_mean - log(depth), capture_sd**2, low=0)``.

    Parameters
    ----------
    n_cells : int, default=500
        Number of rows.

    n_genes : int, default=200
        Number of columns.

    n_factors : int, default=4
        Number k of latent factors, below `n_genes`. With 0 the genes are independent, and
        ``Sigma = diag(d)``.

    loading_norms : tuple (low, high) of float, default=(0.3, 0.8)
        The norms of the rows of W are (close to) uniform between these two: the standard deviations
        of the log-rates that are due to the factors.

    noise_variance : tuple (low, high) of float, default=(0.05, 0.2)
        The variances d are uniform between these two.

    mean_range : tuple (low, high) of float, default=(0.05, 30.0)
        The expected count of a gene over cells at ``depth=1`` is log-uniform between these two.

    dispersion : tuple (median, log_sd) of float, default=(6.3, 0.6)
        The sizes r are log-normal with this median and this standard deviation of the logarithm,
        clipped to (0.238, 4.76) times the median: 1.5 to 30 at the default. An infinite median
        gives Poisson log-normal counts.

    capture_mean : float, default=3.0
        Location of the capture offsets at ``depth=1``, in nats.

    capture_sd : float, default=0.35
        Scale of the capture offsets. With 0 every offset is ``capture_mean - log(depth)``.

    depth : float, default=1.0
        Sequencing depth: 0.1 gives a tenth of the counts at the same `mean`. At most
        ``exp(capture_mean)``, where every molecule is captured.

    offset : array-like of shape (n_cells,) or (n_cells, n_genes), default=None
        What is added to the log-rates of the counts, o: logarithms of known exposures, or what
        covariates do, ``covariates @ coef.T``. With the same `random_state`, the true parameters
        and scores are the same with and without it.

    return_log_rates : bool, default=False
        If True, also return the dense matrix of log-rates x.

    random_state : int, RandomState instance or None, default=None
        Determines every draw. Pass an int for the same result in each call.

    Returns
    -------
    counts : :class:`~sklearn.utils.Bunch`
        Dictionary-like object, with the attributes

        data : CSR array of shape (n_cells, n_genes), int32
            The counts.
        mean : ndarray of shape (n_genes,)
            Mean mu of the log-rates.
        loadings : ndarray of shape (n_genes, n_factors)
            Loadings W.
        noise_variance : ndarray of shape (n_genes,)
            Variances d of the log-rates that no factor explains.
        dispersion : ndarray of shape (n_genes,)
            Sizes r.
        capture_offset : ndarray of shape (n_cells,)
            Offsets eta, all >= 0; ``exp(-eta)`` is the capture probability.
        scores : ndarray of shape (n_cells, n_factors)
            Factor scores z.
        expected_counts : ndarray of shape (n_genes,)
            Expected count of each gene over cells, ``exp(mu + Sigma_gg / 2) E[exp(-eta)]``, at
            offset 0.
        log_rates : ndarray of shape (n_cells, n_genes)
            Log-rates x, before capture and offset. Only if `return_log_rates`.

    Raises
    ------
    ValueError
        If `n_factors` is not below `n_genes`, if `depth` exceeds ``exp(capture_mean)``, if a range
        is not (low, high), or if `offset` has another shape or is not finite.

    See Also
    --------
    make_nbvcp_counts : Independent genes without the log-normal layer.

    Notes
    -----
    Given ``eta_c = 0`` the moments are ``E u = exp(mu + Sigma_gg / 2)``,
    ``Var u = E u + (E u)**2 (exp(Sigma_gg) - 1) + exp(2 mu + 2 Sigma_gg) / r`` and
    ``Cov(u_g, u_h) = E u_g E u_h (exp(Sigma_gh) - 1)``.

    Examples
    --------
    >>> from sknbln.datasets import make_nbln_counts
    >>> counts = make_nbln_counts(n_cells=100, n_genes=20, n_factors=2, random_state=0)
    >>> counts.data.shape
    (100, 20)
    >>> counts.loadings.shape
    (20, 2)
    """
    low, high = _check_range("mean_range", mean_range, positive=True)
    loading_norms = _check_range("loading_norms", loading_norms)
    noise_variance = _check_range("noise_variance", noise_variance)
    median, log_sd = _check_dispersion(dispersion)
    log_exposure = _check_offset(offset, n_cells, n_genes)
    if n_factors >= n_genes:
        raise ValueError(
            f"n_factors={n_factors} must be below n_genes={n_genes}: the columns of the loadings "
            "sum to zero over genes."
        )
    capture_location = capture_mean - np.log(depth)
    if capture_location < 0:
        raise ValueError(
            f"depth={depth} exceeds exp(capture_mean)={np.exp(capture_mean):g}, where every "
            "molecule is captured. Lower depth or raise capture_mean."
        )
    rng = check_random_state(random_state)

    W = _draw_loadings(n_genes, n_factors, loading_norms, rng)
    d = rng.uniform(*noise_variance, n_genes)
    half_variance = 0.5 * ((W**2).sum(axis=1) + d)
    mu = rng.uniform(np.log(low), np.log(high), n_genes)
    mu -= half_variance + _log_mean_capture(capture_mean, capture_sd)
    r = _draw_dispersion(n_genes, median, log_sd, rng)
    eta = _draw_capture(n_cells, capture_location, capture_sd, rng)
    z = rng.standard_normal((n_cells, n_factors))

    log_rates = np.empty((n_cells, n_genes)) if return_log_rates else None
    blocks = []
    for rows in _row_chunks(n_cells, n_genes):
        x = rng.standard_normal((len(z[rows]), n_genes)) * np.sqrt(d)
        x += mu + z[rows] @ W.T
        if log_rates is not None:
            log_rates[rows] = x
        blocks.append(_draw_counts(x - eta[rows, None] + log_exposure[rows], r, rng))

    log_expected = mu + half_variance + _log_mean_capture(capture_location, capture_sd)
    counts = Bunch(
        data=_stack(blocks),
        mean=mu,
        loadings=W,
        noise_variance=d,
        dispersion=r,
        capture_offset=eta,
        scores=z,
        expected_counts=np.exp(log_expected),
    )
    if return_log_rates:
        counts["log_rates"] = log_rates
    return counts


def _check_range(name, value, *, positive=False):
    """(low, high) as two floats; ValueError if they are not such a range."""
    least = "0 < low" if positive else "0 <= low"
    try:
        low, high = (float(v) for v in value)
        ok = (low > 0 if positive else low >= 0) and low <= high < np.inf
    except (TypeError, ValueError):
        ok = False
    if not ok:
        raise ValueError(f"{name} must be two numbers (low, high), {least} <= high, got {value!r}.")
    return low, high


def _check_dispersion(value):
    """(median, log_sd) as two floats; ValueError if they are not."""
    try:
        median, log_sd = (float(v) for v in value)
        ok = median > 0 and 0 <= log_sd < np.inf
    except (TypeError, ValueError):
        ok = False
    if not ok:
        raise ValueError(
            "dispersion must be two numbers (median, log_sd), median > 0 and log_sd >= 0, "
            f"got {value!r}."
        )
    return median, log_sd


def _check_offset(value, n_cells, n_genes):
    """Offset as (n_cells, 1) or (n_cells, n_genes); ValueError if it is neither, or not finite."""
    offset = np.zeros(n_cells) if value is None else np.asarray(value, float)
    if offset.shape not in ((n_cells,), (n_cells, n_genes)) or not np.isfinite(offset).all():
        raise ValueError(
            f"offset must be finite, of shape ({n_cells},) or ({n_cells}, {n_genes}), got shape "
            f"{offset.shape} with {np.sum(~np.isfinite(offset))} values that are not finite."
        )
    return offset.reshape(n_cells, -1)


def _draw_loadings(n_genes, n_factors, norms, rng):
    """Loadings with zero column sums, row norms (close to) uniform, unequal column norms."""
    W = rng.standard_normal((n_genes, n_factors)) * np.linspace(1.25, 0.75, n_factors)
    target = rng.uniform(*norms, n_genes)
    if n_factors == 0:
        return W
    # Alternate between the two conditions. Centring comes last, so it holds exactly.
    for _ in range(50):
        W *= (target / np.maximum(np.linalg.norm(W, axis=1), np.finfo(float).tiny))[:, None]
        W -= W.mean(axis=0)
    return W - W.mean(axis=0)


def _draw_dispersion(n_genes, median, log_sd, rng):
    """Log-normal sizes, clipped to fixed multiples of their median."""
    multiple = np.exp(rng.normal(0.0, log_sd, n_genes))
    return median * np.clip(multiple, *_DISPERSION_CLIP)


def _draw_capture(n_cells, location, scale, rng):
    """Capture offsets, normal truncated below at 0."""
    if scale == 0:
        return np.full(n_cells, float(location))
    return truncnorm.rvs(
        -location / scale, np.inf, loc=location, scale=scale, size=n_cells, random_state=rng
    )


def _log_mean_capture(location, scale):
    """Log of the mean capture probability, ``log E[exp(-eta)]`` of the truncated normal."""
    if scale == 0:
        return -location
    truncation = log_ndtr(location / scale - scale) - log_ndtr(location / scale)
    return -location + 0.5 * scale**2 + truncation


def _row_chunks(n_cells, n_genes):
    """Slices of rows that hold about `_CHUNK_ENTRIES` entries each."""
    step = max(1, _CHUNK_ENTRIES // n_genes)
    return [slice(start, min(start + step, n_cells)) for start in range(0, n_cells, step)]


def _draw_counts(log_rate, r, rng):
    """Negative binomial counts (gamma-Poisson) of one chunk of rows, as CSR."""
    rate = np.exp(log_rate)
    if np.isfinite(r).all():
        rate *= rng.gamma(r, 1.0 / r, rate.shape)
    if rate.max() > 2**30:
        raise ValueError(
            f"A simulated rate is {rate.max():.3g}, too large for int32 counts. Lower mean_range, "
            "loading_norms, noise_variance or offset."
        )
    return sparse.csr_array(rng.poisson(rate).astype(np.int32))


def _stack(blocks):
    """One CSR array with sorted indices."""
    data = sparse.vstack(blocks, format="csr")
    data.sort_indices()
    return data

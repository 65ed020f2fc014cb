r"""The count channel: negative binomial in its mean form, Poisson as its limit.

With overdispersion ``phi = 1/r`` and log-rate ``y``

.. math:: \log p(u \mid y) = u y - (u + 1/\phi) \log(1 + \phi e^y) + c(u, \phi) - \log u!,
          \qquad c(u, \phi) = \sum_{j<u} \log(1 + j \phi)

Every term has a finite limit at ``phi = 0``, which is the Poisson channel: Poisson is a value of
``phi`` and not another code path. The part that does not depend on ``y`` (``c`` and ``log u!``) is
computed on the host, once per distinct count of a gene, and never inside a Newton iteration.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import digamma, gammaln, polygamma

# Above this r the differences of gamma functions are taken from Stirling's series, which does not
# cancel; below it the library functions are exact to rounding.
_STIRLING = 30.0
# From here on r counts as infinite: its term u^2 / 2r is below rounding for every count.
_POISSON = 1e30
# Log-rates are cut off here: far beyond any count, and the products of the exponential are finite.
MAX_LOG_RATE, _MAX_LOG_RATE_SINGLE = 600.0, 60.0
# Smallest overdispersion that is not 0: its reciprocal is finite, and its effect on any count is below
# rounding.
SMALLEST_OVERDISPERSION, _SMALLEST_OVERDISPERSION_SINGLE = 1e-280, 1e-35
_SQRT_HALF_BITS = np.int64(0x3FE6A09E00000000)  # of a number just below sqrt(1/2)
_TWO_52_BITS = np.int64(0x4330000000000000)
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_LOG_SERIES = (
    6.666666666666735130e-01,
    3.999999999940941908e-01,
    2.857142874366239149e-01,
    2.222219843214978396e-01,
    1.818357216161805012e-01,
    1.531383769920937332e-01,
    1.479819860511658591e-01,
)
# of the digamma function, from the highest power of 1 / z^2
_DIGAMMA_SERIES = 691 / 32760, 1 / 132, 1 / 240, 1 / 252, 1 / 120, 1 / 12


class ChannelTerms(NamedTuple):
    """Derivatives of the log-likelihood in the log-rate, elementwise, (n_cells, n_genes)."""

    gradient: jnp.ndarray  # d log p / dy
    curvature: jnp.ndarray  # -d^2 log p / dy^2, >= 0
    keep: jnp.ndarray  # 1 / (1 + phi exp(y)), the probability of failure
    rate: jnp.ndarray  # exp(y)
    odds: jnp.ndarray  # phi exp(y)
    fitted: jnp.ndarray  # (1 + u phi) exp(y) / (1 + phi exp(y)); u - gradient


def channel_terms(u, y, phi):
    """First and second derivative of ``log p(u | y)`` in ``y``.

    Parameters are ``u`` and ``y`` of shape (n_cells, n_genes) and ``phi`` of shape (1, n_genes).
    """
    return terms_at(u, jnp.exp(_cut_off(y)), phi)


def _is_single(x):
    return x.dtype == jnp.float32


def _cut_off(y):
    return jnp.minimum(y, _MAX_LOG_RATE_SINGLE if _is_single(y) else MAX_LOG_RATE)


def terms_at(u, rate, phi):
    """:func:`channel_terms` from the rate ``exp(y)``."""
    odds = phi * rate
    keep = 1.0 / (1.0 + odds)
    fitted = (1.0 + u * phi) * rate * keep
    return ChannelTerms(u - fitted, fitted * keep, keep, rate, odds, fitted)


def log_odds_terms(phi, terms):
    """``log(1 + phi e^y)`` and ``log(1 + phi e^y) / phi``, which at ``phi = 0`` is ``e^y``."""
    # the barrier makes XLA compute the logarithm once and not in each of its uses
    log1p = jax.lax.optimization_barrier(log1p_of_positive(terms.odds))
    least = _SMALLEST_OVERDISPERSION_SINGLE if _is_single(phi) else SMALLEST_OVERDISPERSION
    positive = phi >= least
    return log1p, jnp.where(positive, log1p / jnp.where(positive, phi, 1.0), terms.rate)


def log_likelihood_terms(u, y, logs):
    """``u y - (u + 1/phi) log(1 + phi e^y)``: the part of the log-likelihood that depends on y."""
    log1p, entropy = logs
    return u * (_cut_off(y) - log1p) - entropy


@jax.custom_jvp
def log1p_of_positive(x):
    """``log(1 + x)`` for x >= 0, within two units in the last place; NaN and inf are kept.

    The library's function is not vectorized in double precision and takes four times as long. With
    ``1 + x = 2^n m`` and m near 1, and ``s = f / (2 + f)``, ``f = m - 1``, the series of
    ``log m = 2 artanh s`` is FreeBSD's.
    """
    if _is_single(x):
        return jnp.log1p(x)
    bits = jax.lax.bitcast_convert_type(1.0 + x, jnp.int64)
    above = bits - _SQRT_HALF_BITS
    n = jax.lax.shift_right_logical(above, np.int64(52))
    m = jax.lax.bitcast_convert_type(bits - jax.lax.shift_left(n, np.int64(52)), x.dtype)
    n = jax.lax.bitcast_convert_type(n | _TWO_52_BITS, x.dtype) - 2.0**52
    f = jnp.where(n > 0, m - 1.0, x)  # for small x, 1 + x has lost digits of x
    s = f / (2.0 + f)
    z = s * s
    series = jnp.zeros_like(z)
    for c in reversed(_LOG_SERIES):
        series = z * (c + series)
    half = 0.5 * f * f
    log = n * _LN2_HIGH - ((half - (s * (half + series) + n * _LN2_LOW)) - f)
    return jnp.where(x < jnp.inf, log, x)


@log1p_of_positive.defjvp
def _log1p_slope(primals, tangents):
    return log1p_of_positive(*primals), tangents[0] / (1.0 + primals[0])


def third_derivative(terms):
    """Derivative of the curvature in ``y``."""
    return terms.curvature * (1.0 - terms.odds) * terms.keep


def dispersion_terms(u, phi, terms, logs):
    """Derivatives in ``log r = -log phi`` at fixed y, elementwise, of the part that depends on y.

    Returns the first and second derivative of ``log p``, and the derivatives of its gradient and of its
    curvature in y.
    """
    prob = terms.odds * terms.keep
    share = u * phi / (1.0 + u * phi)
    _, entropy = logs
    score = terms.fitted - entropy
    d_gradient = terms.fitted * (share - prob)
    second = terms.rate * terms.keep - entropy - d_gradient
    d_curvature = terms.curvature * (2.0 * prob - share)
    return score, second, d_gradient, d_curvature


# ------------------------------------------------------------------ constants


def log_rising_slope(u, r):
    """Derivative of :func:`log_rising` in ``log r``, elementwise, r finite and above 0.

    ``r (digamma(u + r) - digamma(r)) - u``, by Stirling's series six further on. The differences are taken
    term by term, so that nothing cancels but u, where r is large.
    """
    z = u + r
    zs, rs = z + 6.0, r + 6.0
    difference = log1p_of_positive(u / rs) + 0.5 * u / (zs * rs)
    difference = difference + _digamma_tail(zs) - _digamma_tail(rs)
    return r * (difference + _six_reciprocals(r) - _six_reciprocals(z)) - u


def _digamma_tail(z):
    """``digamma(z) - log z + 1 / 2z``, for z of at least 6."""
    x, series = 1.0 / z**2, 0.0
    for c in _DIGAMMA_SERIES:
        series = x * (c - series)
    return -series


def _six_reciprocals(z):
    """``1 / z + ... + 1 / (z + 5)``, with one division."""
    q = z * (z + 5.0)
    return (2.0 * z + 5.0) * (3.0 * q**2 + 20.0 * q + 24.0) / (q * (q + 4.0) * (q + 6.0))


# ... on the host


def log_rising(u, r):
    r"""``sum_{j<u} log(1 + j/r) = lgamma(u+r) - lgamma(r) - u log r``, stable for every r.

    Accepts ``r = inf`` (the Poisson limit, 0). Fractional ``u`` is allowed.
    """
    u, r = np.broadcast_arrays(np.asarray(u, float), np.asarray(r, float))
    out = np.zeros(u.shape)
    small = r < _STIRLING
    us, rs = u[small], r[small]
    out[small] = gammaln(us + rs) - gammaln(rs) - us * np.log(rs)
    big = ~small & (r < _POISSON)
    ub, rb = u[big], r[big]
    out[big] = (
        (ub + rb - 0.5) * np.log1p(ub / rb) - ub + _stirling_tail(ub + rb) - _stirling_tail(rb)
    )
    return out


def log_rising_derivatives(u, r, gene=None):
    """First and second derivative of :func:`log_rising` in ``log r``.

    With positions ``gene`` of the same length as ``u``, the r of an entry is ``r[gene]``; the functions of r
    alone are then evaluated once for every gene.
    """
    if gene is None:
        u, r = np.broadcast_arrays(np.asarray(u, float), np.asarray(r, float))
        shape, u, r, gene = u.shape, u.ravel(), r.ravel(), np.arange(u.size)
        return tuple(a.reshape(shape) for a in log_rising_derivatives(u, r, gene))
    first, second = np.zeros(u.shape), np.zeros(u.shape)
    small = (r < _STIRLING)[gene]
    us, of = u[small], gene[small]
    rs = r[of]
    slope = digamma(us + rs) - digamma(r)[of] - us / rs
    first[small] = rs * slope
    second[small] = rs * slope + rs**2 * (polygamma(1, us + rs) - polygamma(1, r)[of] + us / rs**2)
    rb = r[gene]
    big = ~small & (rb < _POISSON)
    ub, rb = u[big], rb[big]
    z = ub + rb
    # r (d/dr), once and twice, of (u+r-1/2) log1p(u/r) - u + tail(u+r) - tail(r)
    log1p = np.log1p(ub / rb)
    t1z, t2z = _stirling_tail_derivatives(z)
    t1r, t2r = _stirling_tail_derivatives(rb)
    # (u+r-1/2) d log1p(u/r)/dr = -(u/r) (u+r-1/2)/(u+r)
    slope = log1p - ub / rb + 0.5 * ub / (rb * z) + t1z - t1r
    curve = -ub / (rb * z) + ub / rb**2 - 0.5 * ub * (z + rb) / (rb * z) ** 2 + t2z - t2r
    first[big] = rb * slope
    second[big] = rb * slope + rb**2 * curve
    return first, second


def _stirling_tail(z):
    """``lgamma(z) - ((z - 1/2) log z - z + log(2 pi)/2)``."""
    return 1 / (12 * z) - 1 / (360 * z**3) + 1 / (1260 * z**5)


def _stirling_tail_derivatives(z):
    return (
        -1 / (12 * z**2) + 1 / (120 * z**4) - 1 / (252 * z**6),
        1 / (6 * z**3) - 1 / (30 * z**5) + 1 / (42 * z**7),
    )


def log_factorial(u):
    """``log u!``."""
    return gammaln(np.asarray(u, float) + 1.0)

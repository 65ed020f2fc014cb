"""Moments of counts in closed form."""

import warnings

import numpy as np
from sklearn.utils import Bunch


def count_moments(params, offset):
    """Mean, variance and covariance of NB counts with log-normal rates.

    Computed in logarithms: a moment is inf only where it overflows itself.
    """
    mean, loadings, noise, phi, _ = params
    S = loadings @ loadings.T
    variance = np.diag(S) + noise
    log_mean = mean - offset + variance / 2
    with np.errstate(over="ignore", divide="ignore"):
        expected = np.exp(log_mean)
        # |exp(S) - 1| = exp(max(S, 0)) (1 - exp(-|S|))
        log_size = np.maximum(S, 0.0) + np.log(-np.expm1(-np.abs(S)))
        covariance = np.sign(S) * np.exp(log_size + log_mean[:, None] + log_mean[None, :])
        log_noise = np.log(-np.expm1(-variance)) + variance + 2 * log_mean
        burst = np.exp(np.log(phi) + 2 * (mean - offset) + 2 * variance)
        total = expected + np.exp(log_noise) + burst
    np.fill_diagonal(covariance, total)
    n_overflow = int(np.sum(np.isinf(total)))
    if n_overflow:
        warnings.warn(
            f"The moments of {n_overflow} of {total.size} genes overflow and are returned as inf (the "
            f"largest variance of a log-rate is {variance.max():.4g} nats squared). Look at noise_variance_ "
            "and loadings_ of these genes.",
            RuntimeWarning,
            stacklevel=3,
        )
    return Bunch(mean=expected, variance=total, covariance=covariance)

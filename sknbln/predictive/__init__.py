"""Posterior predictive draws of counts, and checks of a fit against them.

Everything here takes a fitted `NBVCPEstimator` or `NBLNEstimator`.
"""

from ._checks import predictive_check, quantile_residuals
from ._draws import compositional_samples, iter_posterior_predictive, posterior_predictive

__all__ = [
    "compositional_samples",
    "iter_posterior_predictive",
    "posterior_predictive",
    "predictive_check",
    "quantile_residuals",
]

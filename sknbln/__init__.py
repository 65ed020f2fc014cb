"""Negative binomial log-normal latent factor models of count matrices, for scikit-learn."""

from . import model_selection, tl
from ._jax import warn_about_jaxlib as _warn_about_jaxlib
from ._nbln import NBLNEstimator
from ._nbvcp import NBVCPEstimator
from ._pairs import CorrelationTest

__version__ = "0.1.0"
__all__ = [
    "CorrelationTest",
    "NBLNEstimator",
    "NBVCPEstimator",
    "datasets",
    "exceptions",
    "model_selection",
    "network",
    "plotting",
    "predictive",
    "tl",
]

_warn_about_jaxlib()

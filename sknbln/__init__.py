"""Negative binomial log-normal latent factor models of count matrices."""

__version__ = "0.1.0"

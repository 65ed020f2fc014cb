"""Laplace solver of the negative binomial log-normal model.

Pure functions of arrays; nothing in this package knows scikit-learn or changes JAX's modes.
Every function is meant to run in float64 (see ``sknbln._jax.float64``).

======================  ==================================================================
``likelihood``          the count channel: log-likelihood, derivatives, normalizing constants
``lowrank``             algebra of ``diag + F F'`` batched over cells
``mode``                the per-cell Newton iteration
``marginal``            the Laplace marginal and the sums over cells of its exact gradient
``start``               start values from the moments of the scores
``sweeps``              one update of the global parameters from those sums
``driver``              the loop over sweeps with its monotone guard
======================  ==================================================================
"""

"""Laplace solver of the negative binomial log-normal model.

Pure functions of arrays: no scikit-learn, and JAX's configuration is never changed.
Every function is written to run in float64 (see ``sknbln._jax.float64``).

==================  ======================================================================
``params``          the parameters, the data of a batch of cells, Gaussian priors
``channel``         the count channel: log-likelihood, derivatives, normalizing constants
``lowrank``         algebra of ``diag + F F'`` batched over cells
``second_order``    the next term of Laplace's expansion, its leading part
``mode``            the per-cell Newton iteration
``marginal``        the Laplace marginal and the sums over cells of its exact gradient
``left_out``        the density of each count given the others of its row
``rates``           draws of a cell's log-rates from its Laplace posterior
``start``           start values from the moments of the scores
``coupling``        the coordinates of the ascent; the marginal-preserving coupling
``objective``       the log-posterior in the coordinates of the ascent
``overdispersion``  T(r), what a dispersion adds to the variance of a log-rate
``gene_priors``     priors of the genes' noise variances and dispersions
``metric``          the metric of the ascent, and steps of the parameters
``columns``         a common change of all loadings
``line_search``     steps that go too far, shortened gene by gene
``ascent``          the loop over sweeps with its monotone guard
``column_priors``   priors of the loadings' columns
``gauge``           W_perp, its singular basis, the effective rank of the loadings
==================  ======================================================================
"""

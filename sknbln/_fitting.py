"""From an NBLN estimator's parameters and its source to one Laplace problem, and its solution."""

import inspect
from numbers import Real
from typing import NamedTuple

import numpy as np

from . import _capture, _cascade
from ._batches import RowBatches, Sweeper, sum_over_batches
from ._laplace.driver import Free, ascend
from ._laplace.likelihood import CountHistogram
from ._laplace.objective import Identity, MarginalCoupling, Objective
from ._laplace.shrinkage import TYPES, ascend_with_prior
from ._laplace.start import loadings_from_scores
from ._laplace.sweeps import NOISE_UNIT, GaussianPrior, Parameters
from ._nbvcp import weak_dispersion_prior, weak_mean_prior
from ._posterior import curvature

_START_NOISE = 0.05
#: hyper-parameters of a loadings prior lie between these, and their squares far from overflow
HYPER_PARAMETER_RANGE = (1e-8, 1e8)


class RowPosterior(NamedTuple):
    """Gaussian posterior of rows: scores in the basis of the components, and offset."""

    scores: np.ndarray  # (n_cells, k)
    score_covariance: np.ndarray  # (n_cells, k, k)
    offset: np.ndarray  # (n_cells,) before truncation at 0
    offset_scale: np.ndarray  # (n_cells,)


def row_posterior(rows):
    """From the cell solver's answer."""
    return RowPosterior(
        rows["scores"],
        rows["score_covariance"],
        rows["offset"],
        np.sqrt(rows["offset_variance"]),
    )


def row_capture(source, X, observation, frozen, tau, capture_prior, mean, found=None):
    """Offset, scale and precision of each row's capture; ``found`` are the source's offsets of X."""
    if observation != "multinomial":
        offset, scale = _cascade.row_offsets(
            source,
            X,
            frozen="eta" in frozen,
            tau=tau,
            capture_prior=capture_prior,
            found=found,
        )
        return offset, scale, np.ones(X.shape[0])
    return _capture.flat_rows(X, mean)


def less_overdispersion(log_r, variance):
    """Log dispersion when log-rates of this variance explain their share of the overdispersion.

    At least a tenth of it is left: a start for where r is free.
    """
    phi = np.exp(-log_r)
    return -np.log(np.maximum((1.0 + phi) * np.exp(-variance) - 1.0, 0.1 * phi))


class NBLNProblem:
    """One fit: what is free, under which priors, from which start."""

    def __init__(self, estimator, source, frozen, capture_prior, strategy, X, rng, previous=None):
        self.estimator, self.X = estimator, X
        n_cells, n_genes = X.shape
        k = min(estimator.latent_dim, n_cells, n_genes)
        coupled = estimator.cascade == "marginal"
        negative_binomial = estimator.observation == "nb"
        self.frozen, self.coupled = frozen, coupled
        self.strategy = strategy
        self.free = Free(
            mean="mu" not in frozen,
            loadings=True,
            log_noise=True,
            log_r=negative_binomial and "r" not in frozen,
        )
        flat = GaussianPrior.flat(n_genes)
        priors = _cascade.SoftPriors(flat, flat)
        if self.free.mean or self.free.log_r:
            priors = _cascade.soft_priors(
                source,
                estimator.informative_priors_tau,
                estimator.informative_priors_n_samples,
                rng,
            )
        log_mean = np.log(source.mean_)
        log_r = np.log(source.dispersion_) if negative_binomial else np.full(n_genes, np.inf)
        offsets = source._offsets(X)
        self.source = _cascade.on_rows(source, X, offsets)
        known = RowBatches(X, offsets.loc, np.zeros(n_cells), batch_size=estimator.batch_size)
        if previous is None:
            sums = sum_over_batches(known, log_mean, 1.0 / source.dispersion_)
            loadings = loadings_from_scores(sums, n_cells, n_genes, k, rng)
        else:
            loadings = previous.loadings
        variance = np.sum(loadings**2, 1) + _START_NOISE
        if self.free.log_r:
            log_r = less_overdispersion(log_r, variance)
        self.start = Parameters(
            log_mean - variance / 2 if self.free.mean and not coupled else log_mean,
            loadings,
            np.full(n_genes, np.log1p(_START_NOISE / NOISE_UNIT)),
            log_r,
        )
        if previous is not None:
            self.start = self._resumed(previous)
        rows = row_capture(
            source,
            X,
            estimator.observation,
            frozen,
            estimator.informative_priors_tau,
            capture_prior,
            log_mean,
            offsets,
        )
        self.batches = RowBatches(X, *rows, batch_size=estimator.batch_size)
        self.objective = Objective(
            Sweeper(self.batches, k),
            CountHistogram(X),
            priors.log_mean.times(weak_mean_prior(log_mean)) if self.free.mean else flat,
            priors.log_r if self.free.log_r else flat,
            MarginalCoupling("r" in frozen) if coupled else Identity(),
            weak_dispersion_prior(n_genes) if negative_binomial else flat,
        )

    def _resumed(self, previous):
        """The start with the previous fit's coordinates of all that is free."""
        known = np.isfinite(previous.log_r)  # the previous fit may have been a Poisson channel's
        return self.start._replace(
            mean=previous.mean if self.free.mean else self.start.mean,
            log_noise=previous.log_noise,
            log_r=np.where(known & self.free.log_r, previous.log_r, self.start.log_r),
        )

    def parameters(self, x):
        """The model's parameters at coordinates x; what is frozen literally is the source's."""
        params = self.objective.coupling.expand(x)
        if "mu" in self.frozen and not self.coupled:
            params = params._replace(mean=np.log(self.source.mean_))
        return params

    def dispersion(self, params):
        """The model's r; bit for bit the source's where it is frozen literally."""
        if "r" in self.frozen and not self.coupled:
            return self.source.dispersion_.copy()
        return np.exp(params.log_r)

    def coordinate_variance(self, x):
        """``|w|^2 + d`` of the coordinates, from which the coupling makes Sigma_gg."""
        return np.sum(x.loadings**2, 1) + x.noise

    def curvature(self, params):
        """Standard deviations of mu, W and log r, and the rows' solutions."""
        objective = self.objective
        return curvature(
            self.batches,
            objective.sweep.scores,
            params,
            self.free,
            objective.prior_mean.precision,
            objective.prior_log_r.precision + objective.weak_log_r.precision,
            objective.penalty.precision,
        )

    def run(self):
        """Maximize the objective. Returns the driver's outcome and the columns' scales, or None."""
        estimator = self.estimator
        n_cells = self.X.shape[0]

        def report(iteration, point):
            print(
                f"[NBLNEstimator] sweep {iteration}: {point.value / n_cells:.4f} nats per cell",
                flush=True,
            )

        options = dict(
            n_cells=n_cells,
            tol=estimator.tol_,
            max_iter=estimator.max_iter,
            report=report if estimator.verbose else None,
        )
        self.objective.sweep.tol = estimator.tol_
        if self.strategy.type == "none":
            return ascend(self.objective, self.start, self.free, **options), None
        return ascend_with_prior(self.objective, self.strategy, self.start, self.free, **options)


def default_tol(strategy, cascade):
    """Tolerance of a fit whose `tol` is None: smaller where late sweeps still matter."""
    if strategy.type != "none":
        return 1e-6
    return 1e-5 if cascade == "marginal" else 1e-4


def loadings_strategy(loadings_prior):
    """The strategy that the parameter names.

    Raises
    ------
    ValueError
        For an unknown type or hyper-parameter, and for a value that is no number from 1e-8 to 1e8.
    """
    given = {"type": loadings_prior} if isinstance(loadings_prior, str) else dict(loadings_prior)
    name = given.pop("type", None)
    if not isinstance(name, str) or name not in TYPES:
        raise ValueError(
            f"loadings_prior={loadings_prior!r}: expected a type out of {sorted(TYPES)}, as a string or as "
            'a dict {"type": ..., hyper-parameters}.'
        )
    known = inspect.signature(TYPES[name]).parameters
    for key, value in given.items():
        if key not in known:
            raise ValueError(
                f"loadings_prior: {name!r} has no hyper-parameter {key!r}; it has {sorted(known)}."
            )
        least, most = HYPER_PARAMETER_RANGE
        if not isinstance(value, Real) or not least <= value <= most:
            raise ValueError(
                f"loadings_prior: {key}={value!r}, expected a positive finite number between {least:g} "
                f"and {most:g}."
            )
    return TYPES[name](**given)

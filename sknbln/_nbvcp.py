"""NBVCPEstimator: independent genes, negative binomial counts, a capture probability per cell."""

import warnings
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin, _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Bunch, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted

from . import _capture, _svi
from ._base import CountModelMixin, lazy_with_dask, whole_or_nothing
from ._blocks import as_rows
from ._counts import CountHistogram, checked_n_samples, user_stacklevel, validated_rows
from ._design import Design
from ._known import Known, checked_weight, refuse_genes_not_seen
from ._nbvcp_posterior import NBVCPPosterior, SourceModel, independent_params
from ._passes import Sweeper, solve_rows
from ._progress import Progress, of_steps, of_sweep
from ._rows import RowBatches, sample_of_rows
from ._typing import CaptureEfficiency, CountsLike, Covariates, Seed, keeping_hints
from .exceptions import FitInterrupted
from .predictive._replicates import ParameterDraws
from .solver.ascent import ascend
from .solver.metric import least_squares_matrix
from .solver.objective import (
    LOG_DISPERSION_PRIOR,
    LOG_MEAN_PRIOR_SCALE,
    Objective,
    weak_coef_prior,
)
from .solver.params import GaussianPrior, Params, in_model_units

_MAP_TOL = 1e-10
_SAMPLE_TOL = 1e-7  # of the fit to a sample of many rows, whose noise is far above
_MAP_MAX_ITER = 100
_PIN_ROUNDS = 3


class NBVCPEstimator(
    OneToOneFeatureMixin, CountModelMixin, SourceModel, TransformerMixin, BaseEstimator
):
    r"""Negative binomial with a capture probability per cell; genes are independent.

    .. math:: u_{cg} \sim NB(\mathrm{mean} = m_g e^{-\eta_c}, \mathrm{size} = r_g), \qquad
              \mathrm{variance} = \mathrm{mean} + \mathrm{mean}^2 / r_g

    With covariates and known log-exposures of the rows (see :meth:`fit`) the mean is ``m_g exp(B_g c_c + o_cg
    - eta_c)``: a negative binomial regression per gene, with capture.

    ``exp(-eta_c)`` is the capture probability of cell c, with the prior ``eta_c ~ TruncNormal(log M0 -
    log L_c, sigma_M, low=0)``, ``L_c`` the cell's library size (its row total) and ``M0`` the prior total
    mRNA of a cell. Weak priors keep the estimates of every gene finite: ``log m_g`` is normal around the
    genes' average with standard deviation 4, ``log r_g`` is normal(2, 1), and coefficients are normal around
    0 with standard deviation 2 nats per standard deviation of their covariate.

    Parameters
    ----------
    capture_efficiency : {"auto", "human", "mouse", "yeast", "ecoli"}, (float, float) or None, default="auto"
        Capture prior, as the pair ``(log_M0, sigma_M)``. An organism's name stands for a typical M0 (human
        and mouse 200,000; yeast 60,000; ecoli 3,000) with sigma_M 0.5. ``"auto"`` takes sigma_M 0.5 and
        log_M0 = log(largest library) + 3 sigma_M, so that the truncation at 0 has no effect. ``None`` means
        no capture model: eta = 0. To choose between settings by held-out rows use
        ``score(X, given_totals=True)``.
    n_steps : int, default=1000
        Maximum number of steps of stochastic variational inference.
    learning_rate : float, default=0.02
        Learning rate of Adam, in posterior standard deviations; above 0, at most 1.
    tol : float, default=1e-3
        Tolerance of the ELBO, in nats per cell. The variational fit stops when 50 steps raise the smoothed
        ELBO by less than this, or by less than its noise.
    n_posterior_samples : int, default=1000
        Default number of draws of :meth:`sample_posterior`.
    batch_size : int or None, default=None
        Approximate number of rows that are made dense at a time. It changes memory use, not results. None
        chooses by the number of genes.
    random_state : int, RandomState instance or None, default=None
        Seed of the variational fit.
    verbose : int, default=0
        1 says how far the fit is, 2 says more, as in `NBLNEstimator`.
    warm_start : bool, default=False
        When True, `fit` starts from the previous fit of this estimator, which must have the same genes.

    Attributes
    ----------
    mean_ : ndarray of shape (n_genes,)
        Mean expression m_g: expected counts at full capture (posterior median), at the mean of the covariates
        and an exposure of 1.
    dispersion_ : ndarray of shape (n_genes,)
        Dispersion (size) r_g (posterior median).
    capture_offset_ : ndarray of shape (n_cells,)
        Capture offset eta_c of the training rows, in nats: the mode given ``mean_`` and
        ``dispersion_``. The capture probability is ``exp(-capture_offset_)``.
    coef_ : ndarray of shape (n_genes, n_coefficients)
        Coefficients B of the covariates, nats per unit (posterior means); no columns without covariates.
    coef_standard_error_ : ndarray of shape (n_genes, n_coefficients)
        Their posterior standard deviations, without that of a common shift of all genes' coefficients, which
        cannot be told from one of the capture offsets. See :meth:`coef_test`.
    covariate_names_in_ : ndarray of shape (n_coefficients,)
        Names of the coefficients, such as "age" and "batch[B]".
    capture_prior_ : tuple (log_M0, sigma_M) or None
        Capture prior of the fit.
    loss_curve_ : ndarray of shape (n_iter,)
        Negative ELBO at each step, nats per cell.
    n_iter_ : int
        Number of variational steps.
    converged_ : bool
        Whether both stages, the maximum a posteriori (MAP) estimate and the ELBO, met their tolerances.
    n_features_in_ : int
        Number of genes.
    feature_names_in_ : ndarray of shape (n_genes,)
        Gene names; defined only when X has column names that are all strings.

    See Also
    --------
    NBLNEstimator : The model with correlated genes; takes this estimator as its source.

    Notes
    -----
    The MAP estimate, with the capture offsets integrated out by Laplace's method, takes a few passes over the
    data; of more than 30,000 rows it starts from that of a random sample of 20,000. A Gaussian guide that
    starts there is then fitted by NumPyro's stochastic variational inference. The guide is independent except
    for the common shift of all ``log m_g`` and ``eta_c``, which only the priors identify:
    :meth:`sample_posterior` draws the two together. Memory is that of one batch plus the sparse matrix.

    Examples
    --------
    >>> from sknbln import NBVCPEstimator
    >>> from sknbln.datasets import make_nbvcp_counts
    >>> sim = make_nbvcp_counts(n_cells=150, n_genes=24, random_state=0)
    >>> model = NBVCPEstimator(random_state=0).fit(sim.data)
    >>> model.transform(sim.data).shape
    (150, 24)
    """

    _parameter_constraints: dict = {
        "capture_efficiency": [StrOptions({"auto", *_capture.ORGANISMS}), "array-like", None],
        "n_steps": [Interval(Integral, 1, None, closed="left")],
        "learning_rate": [Interval(Real, 0, 1, closed="right")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "n_posterior_samples": [Interval(Integral, 1, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left"), None],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
        "warm_start": ["boolean"],
    }

    def __init__(
        self,
        *,
        capture_efficiency: CaptureEfficiency = "auto",
        n_steps: int = 1000,
        learning_rate: float = 0.02,
        tol: float = 1e-3,
        n_posterior_samples: int = 1000,
        batch_size: int | None = None,
        random_state: Seed = None,
        verbose: int = 0,
        warm_start: bool = False,
    ) -> None:
        self.capture_efficiency = capture_efficiency
        self.n_steps = n_steps
        self.learning_rate = learning_rate
        self.tol = tol
        self.n_posterior_samples = n_posterior_samples
        self.batch_size = batch_size
        self.random_state = random_state
        self.verbose = verbose
        self.warm_start = warm_start

    @keeping_hints(_fit_context(prefer_skip_nested_validation=True))
    @whole_or_nothing
    def fit(
        self,
        X: CountsLike,
        y: Any = None,
        *,
        covariates: Covariates | None = None,
        offset: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> Self:
        """Fit the model to counts.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_cells, n_genes)
            Counts. They need not be in memory: a Dask array in chunks of rows, or a dataset of h5py, zarr or
            AnnData (``read_h5ad(path, backed="r").X``), is read block by block in every pass over the rows.
        y : Ignored
            Present for scikit-learn's conventions.
        covariates : array-like of shape (n_cells,) or (n_cells, n_covariates) or DataFrame, default=None
            Known covariates of the rows. Numeric columns are used as they are; categorical, string and
            boolean ones become contrasts with their first level. New rows need theirs: pass them to every
            method that takes rows.
        offset : array-like of shape (n_cells,) or (n_cells, n_genes), default=None
            Known log-exposures, added to the log-means. One usually sets ``capture_efficiency=None`` beside.
        sample_weight : array-like of shape (n_cells,) or None, default=None
            How often each row counts. A weight of 2 stands for two equal rows, one of 0 for a row that is
            left out of the fit and only has its offset computed.

        Returns
        -------
        self : object
            The fitted estimator.

        Raises
        ------
        ValueError
            If counts are negative, not finite or not numbers; if `capture_efficiency` is neither a known name
            nor a pair of finite numbers with sigma_M > 0; if covariates are linearly dependent, constant or
            missing in some rows; under `warm_start`, if the number of genes or the covariates differ from the
            previous fit.
        TypeError
            If X is an object that holds a matrix and is none, such as AnnData, or has no slices of rows.
        FitInterrupted
            After Ctrl-C, if at least one sweep over all rows is complete: the fitted attributes are those of
            the last complete sweep or variational step. An earlier Ctrl-C, or a second one, leaves the
            estimator unchanged.

        Warns
        -----
        ConvergenceWarning
            If a stage did not meet its tolerance.
        UserWarning
            If counts are fractional, do not look like counts (a common divisor in most rows, one total for
            all rows) or are all zero; if more than a few cells have more counts than M0; if the offset looks
            like the exposure itself, or stands beside a capture model.
        """
        given = dict(covariates=covariates, offset=offset, sample_weight=sample_weight)
        progress = Progress(self, 2, X, y, **given)
        X, missing = validated_rows(self, X, reset=True, missing=True)
        weight = checked_weight(sample_weight, X.shape[0])
        refuse_genes_not_seen(self, missing, weight)
        design = Design.learned(covariates, X.shape[0], weight)
        rng = check_random_state(self.random_state)
        prior = _capture.resolve(self.capture_efficiency, X, weight)
        _capture.warn_about_truncation(prior, X)
        histogram = CountHistogram(X, weight)
        previous = self._previous(X.shape[1], design)
        self._design = design
        self._known = known = self._known_at_fit(X, covariates, offset, weight, missing)
        problem = _problem(X, prior, histogram, known)
        with progress.stage("maximum", of_sweep) as stage:
            outcome, scores = self._maximum(X, problem, histogram, previous, known, stage, rng)
        point = outcome.point
        batches = RowBatches(X, *problem.row_prior, batch_size=self.batch_size, known=known)
        rows = solve_rows(batches, in_model_units(point.x), scores)
        start = self._curvature_guide(X, prior, point, rows, known)
        if previous is not None:
            start = _svi.resumed(start, previous)
        self.capture_prior_ = prior
        with progress.stage(
            "variational fit", of_steps(self.n_steps), NBVCPEstimator._at_step
        ) as stage:
            variational_fit = _svi.fit(
                X,
                problem,
                start,
                # the part of the log-likelihood that is estimated from minibatches
                rows.log_marginal - _linear(X, point.x, known),
                n_steps=0 if outcome.interrupted else self.n_steps,
                learning_rate=self.learning_rate,
                tol=self.tol,
                rng=rng,
                watch=stage,
                known=known,
            )
        self._library_size = _capture.library_sizes(X)
        self._set_parameters(variational_fit.guide)
        self._training_offsets = _capture.offset_posterior(
            X, self._params(), prior, self.batch_size, known=known
        )
        self.capture_offset_ = self._training_offsets.loc
        self.loss_curve_ = variational_fit.losses
        self.n_iter_ = int(variational_fit.losses.size)
        self.converged_ = bool(outcome.converged and variational_fit.converged)
        if outcome.interrupted or variational_fit.interrupted:
            raise FitInterrupted(self)
        for stage, result, advice in (
            ("maximum a posteriori", outcome, "Look for extreme counts or genes."),
            ("variational fit", variational_fit, "Increase n_steps or tol."),
        ):
            if not (result.converged or result.stopped):
                warnings.warn(
                    f"The {stage} of NBVCPEstimator did not converge: {result.reason}. {advice}",
                    ConvergenceWarning,
                    stacklevel=user_stacklevel(),
                )
        progress.end()
        return self

    def _set_parameters(self, guide):
        """Set the fitted parameters from the `Guide`."""
        self.mean_ = np.exp(guide.log_mean[0])
        self.dispersion_ = np.exp(guide.log_dispersion[0])
        self._guide = guide
        self._set_coef(guide.coef_mean, guide.coef_scale)

    def _at_step(self, step, loss, guide):
        """Set what methods for new rows need, as if the fit had ended with this step."""
        self._set_parameters(guide())

    def _previous(self, n_genes, design):
        """The guide of the fit that `warm_start` continues from, or None."""
        guide = getattr(self, "_guide", None)
        if not self.warm_start or guide is None:
            return None
        if guide.log_mean[0].size != n_genes:
            raise ValueError(
                f"warm_start=True goes on from a fit of {guide.log_mean[0].size} genes, X has {n_genes}. "
                "Give the same genes, or set warm_start=False to start anew."
            )
        self._refuse_other_covariates(design)
        return guide

    def _maximum(self, X, problem, histogram, previous=None, known=None, watch=None, rng=None):
        """MAP estimate of log m, log r and B, with the offsets integrated out by Laplace's method.

        With ``rng`` a random sample of many rows is fitted first. Returns the `Outcome` of the ascent, and
        the rows' scores as start values of their modes.
        """
        n_cells, n_genes = X.shape
        known = Known.nothing(n_cells) if known is None else known
        offset, scale = (a.copy() for a in problem.row_prior)
        coef = np.zeros((n_genes, known.design.shape[1]))
        x = Params(
            _level(problem.column_totals, known, offset),
            np.zeros((n_genes, 0)),
            np.zeros(n_genes),
            problem.dispersion_prior[0].copy(),
            coef,
        )
        if previous is not None:
            x = Params(
                previous.log_mean[0],
                x.loadings,
                x.noise,
                previous.log_dispersion[0],
                previous.coef_mean,
            )
        elif rng is not None and (sample := sample_of_rows(n_cells, rng)) is not None:
            some, of_some = X.chosen(sample).in_memory(), known.chosen(sample)
            count = CountHistogram(some, of_some.weight)
            rows = offset[sample], scale[sample]
            outcome, _ = self._ascent(some, *rows, x, problem, count, of_some, watch, _SAMPLE_TOL)
            if outcome.interrupted:
                raise KeyboardInterrupt  # no sweep over all rows is complete
            x = outcome.point.x
        for _ in range(_PIN_ROUNDS):
            outcome, scores = self._ascent(X, offset, scale, x, problem, histogram, known, watch)
            x = outcome.point.x
            # the prior of an offset is truncated at 0: a mode below 0 is moved to 0 and held there
            below = (scale > 0) & (offset - scale * scores[:, -1] < 0)
            if outcome.interrupted or outcome.stopped or not below.any():
                break
            offset[below] = scale[below] = 0.0
        return outcome, scores

    def _ascent(self, X, offset, scale, x, problem, histogram, known, watch, tol=_MAP_TOL):
        """The `Outcome` of an ascent from coordinates x, and the rows' scores."""
        n_cells = known.total_weight
        priors = (
            GaussianPrior(loc, sd**-2) for loc, sd in (problem.mean_prior, problem.dispersion_prior)
        )
        sweeper = Sweeper(RowBatches(X, offset, scale, batch_size=self.batch_size, known=known), 0)
        objective = Objective(sweeper, histogram, *priors, prior_coef=weak_coef_prior(x.coef.shape))
        outcome = ascend(
            [(objective, x)],
            Params(mean=True, loadings=False, noise=False, dispersion=True),
            n_cells=n_cells,
            tol=tol,
            max_iter=_MAP_MAX_ITER,
            watch=watch,
        )
        return outcome, sweeper.scores

    def _curvature_guide(self, X, prior, point, rows, known=None):
        """Gaussian guide from the curvature at the MAP estimate, one parameter at a time."""
        x, metric = point.x, point.metric
        log_mean = x.mean, 1 / np.sqrt(metric.moments[:, 0])
        # the precision of the prior is a lower bound of the information
        least = LOG_DISPERSION_PRIOR[1] ** -2
        information = np.maximum(metric.dispersion, least)
        missing = point.sums.genes.missing_log_r
        observed_share = np.maximum(metric.dispersion - missing, least) / information
        log_r = x.dispersion, information**-0.5
        shared = self._common_shift(metric), observed_share, *_of_coefficients(x, metric)
        if prior is None:
            return _svi.Guide(log_mean, log_r, None, *shared)
        offsets = _capture.offset_posterior(
            X, in_model_units(x), prior, self.batch_size, rows, known
        )
        return _svi.Guide(log_mean, log_r, (offsets.raw_loc, offsets.scale), *shared)

    def _common_shift(self, metric):
        """Shares of the likelihood in each log m, and the standard deviation of their common shift.

        Integrating the offsets out subtracts ``kappa a a'`` from the information ``diag(D)`` of log m, with
        ``a`` the likelihood's part of D. ``metric.shift`` is ``1'D - kappa (1'a)^2`` and determines kappa.
        The inverse of the remaining information is ``1/D + sigma^2 (a/D)(a/D)'``.
        """
        total = metric.moments[:, 0]
        share = _svi.likelihood_share(total**-0.5, LOG_MEAN_PRIOR_SCALE)
        kappa = max(total.sum() - metric.shift, 0.0) / (total @ share) ** 2
        return share, np.sqrt(kappa / (1.0 - kappa * (share @ (total * share))))

    def _posterior(self):
        """The `NBVCPPosterior` of the fit."""
        return NBVCPPosterior(
            self.mean_, self.dispersion_, self._guide, self._training_offsets, self.capture_prior_
        )

    _independent = _posterior

    def _params(self):
        """The parameters in the form that the cell solver takes."""
        return independent_params(self.mean_, self.dispersion_, self._guide.coef_mean)

    _OF_TRAINING_ROWS = ()

    def _for_new_rows(self):
        model, posterior = super()._for_new_rows(), self._posterior().without_rows()
        model._guide, model._training_offsets = posterior.guide, posterior.rows
        return model

    def _offset_prior(self):
        """The capture prior of the rows' offsets."""
        return self.capture_prior_

    @lazy_with_dask
    def transform(
        self,
        X: CountsLike,
        *,
        covariates: Covariates | None = None,
        offset: ArrayLike | None = None,
    ) -> np.ndarray:
        """Denoised log-expression: log of the posterior mean of each rate at full capture.

        Given the capture offset, the rate ``lambda_cg`` of gene g in cell c has a gamma posterior with
        mean ``(r_g + u_cg) / (r_g / m_cg + exp(o_cg - eta_c))``, with ``m_cg = m_g exp(B_g c_c)``. So the
        rates include what covariates do, and not the exposures.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_cells, n_genes)
            Counts.
        covariates, offset
            Of the rows, as in :meth:`fit`.

        Returns
        -------
        ndarray of shape (n_cells, n_genes)
            Log-expression in nats (natural logarithm of expected counts at full capture). A Dask array, not
            computed yet, where X is one.
        """
        check_is_fitted(self)
        X, known = self._given_rows(X, covariates, offset, self.capture_prior_)
        offsets = self._posterior().offsets(X, self.batch_size, known).loc
        return X.of_rows(lambda rows, U: self._denoised(U, known.chosen(rows), offsets[rows]))

    def _denoised(self, X, known, offsets):
        """Logarithms of the posterior means of the rates of a few rows."""
        capture = np.exp(-offsets)[:, None]
        r, mean = self.dispersion_, self.mean_
        exposure = known.dense().exposure
        if exposure.shape[1]:
            capture = capture * np.exp(exposure)
        if known.design.shape[1]:
            mean = mean * np.exp(known.design @ self._guide.coef_mean.T)
        return np.log((r + X.toarray()) / (r / mean + capture))

    def sample_posterior(
        self,
        n_samples: int | None = None,
        X: CountsLike | None = None,
        *,
        random_state: Seed = None,
        covariates: Covariates | None = None,
        offset: ArrayLike | None = None,
    ) -> Bunch:
        """Draws from the posterior.

        Parameters
        ----------
        n_samples : int or None, default=None
            Number of draws; None takes ``n_posterior_samples``.
        X : {array-like, sparse matrix} of shape (n_rows, n_genes) or None, default=None
            Rows whose offsets are drawn, from the posterior of each offset given ``mean_`` and
            ``dispersion_``. For the training rows, with X None or equal to them, the offsets come from the
            variational posterior.
        random_state : int, RandomState instance or None, default=None
            Seed of the draws; None takes the estimator's.
        covariates, offset
            Of the rows of X, as in :meth:`fit`.

        Returns
        -------
        Bunch
            ``r`` (n_samples, n_genes) dispersion, ``mu`` (n_samples, n_genes) mean expression in the
            units of ``mean_``, ``eta`` (n_samples, n_rows) capture offset in nats; with covariates ``coef``
            (n_samples, n_genes, n_coefficients) in the units of ``coef_``.
        """
        check_is_fitted(self)
        known = None
        if X is not None:
            X, known = self._given_rows(X, covariates, offset, self.capture_prior_)
        n_samples = checked_n_samples(self.n_posterior_samples if n_samples is None else n_samples)
        rng = check_random_state(self.random_state if random_state is None else random_state)
        draws = self._posterior().draws(n_samples, rng, X, self.batch_size, known=known)
        return self._with_coef(draws, draws.pop("coef"))

    def _log_expected(self, X, known):
        """Logarithms of the expected counts of rows given their offsets, (n_rows, n_genes)."""
        offsets = self._posterior().offsets(X, self.batch_size, known).loc
        shift = known._replace(missing=None).log_scale(self._guide.coef_mean)
        return np.log(self.mean_) + shift - offsets[:, None]

    def _posterior_draws(self, n_samples, X, rng, *, eta, known=None):
        """Parameter draws for replicated counts; without offsets if `eta` is None."""
        draws = self._posterior().draws(
            n_samples, rng, X, self.batch_size, offsets=eta is not None, known=known
        )
        return ParameterDraws(draws.r, np.log(draws.mu), draws.eta, coef=draws.coef)


def _level(columns, known, offset):
    """Logarithms of the genes' means at full capture, from their totals at these offsets of the rows."""
    nothing = np.zeros((columns.size, known.design.shape[1]))
    return np.log(columns + 0.5) - np.log(known.sum_of_scales(offset, nothing))


def _linear(X, x, known):
    """``sum_g u (log m + B c + o)`` of each row."""
    return X.of_rows(lambda rows, U: U @ x.mean + known.chosen(rows).totals(U, x.coef))


def _of_coefficients(x, metric):
    """Of the guide: location and scale of the coefficients, and the share of their information that is left.

    The scales are those of each coefficient with all else known. In the share the gene's mean and its other
    coefficients are unknown. A common shift of all genes' coefficients, which the prior of the offsets alone
    holds, is left out: coefficients are relative to the level of the cells.
    """
    p = x.coef.shape[1]
    if not p:
        return None, None
    A = least_squares_matrix(metric.moments)
    information = np.einsum("gii->gi", A)[:, 1:]
    variance = np.einsum("gii->gi", np.linalg.inv(A))[:, 1:]
    return (x.coef, information**-0.5), 1.0 / (information * variance)


def _problem(X, prior, histogram, known=None):
    """The fixed part of the variational problem: priors and totals."""
    known = Known.nothing(X.shape[0]) if known is None else known
    X, n_genes = as_rows(X), X.shape[1]
    offset, scale = _capture.row_prior(prior, X)
    columns, coef_totals, exposure_total = _column_sums(X, known)
    level = _level(columns, known, offset)
    return _svi.Problem(
        (np.full(n_genes, level.mean()), np.full(n_genes, LOG_MEAN_PRIOR_SCALE)),
        tuple(np.full(n_genes, v) for v in LOG_DISPERSION_PRIOR),
        (offset, scale),
        _capture.library_sizes(X),
        columns,
        histogram.gene,
        histogram.count,
        histogram.times,
        histogram.log_factorials,
        float(known.total_weight),
        coef_totals if known.design.shape[1] else None,
        exposure_total,
    )


def _column_sums(X, known):
    """Sums over the weighted rows of counts, (n_genes,), of counts times covariates, and log-exposures."""
    sums = [0.0, 0.0, 0.0]
    for rows, block in X:
        part = known.chosen(rows)
        if part.weight is not None:
            block = block.multiply(part.weight[:, None]).tocsr()
        sums[0] += np.asarray(block.sum(axis=0), float).ravel()
        sums[1] += block.T @ part.design
        if part.exposure.shape[1]:
            sums[2] += float(block.multiply(part.exposure).sum())
    return sums

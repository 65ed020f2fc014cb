"""NBVCPEstimator: independent genes, negative binomial counts, a capture probability per cell."""

import warnings
from numbers import Integral, Real

import numpy as np
from scipy.stats import truncnorm
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin, _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Bunch, check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted

from . import _capture, _svi
from ._base import CountModelMixin, whole_or_nothing
from ._counts import CountHistogram, checked_n_samples, user_stacklevel, validate_counts
from ._rows import RowBatches, Sweeper, solve_rows
from .exceptions import FitInterrupted
from .predictive._replicates import ParameterDraws
from .solver.ascent import ascend
from .solver.objective import LOG_DISPERSION_PRIOR, LOG_MEAN_PRIOR_SCALE, Objective
from .solver.params import GaussianPrior, Params, in_model_units

_MAP_TOL = 1e-10
_MAP_MAX_ITER = 100
_PIN_ROUNDS = 3


class NBVCPEstimator(OneToOneFeatureMixin, CountModelMixin, TransformerMixin, BaseEstimator):
    r"""Negative binomial with a capture probability per cell; genes are independent.

    .. math:: u_{cg} \sim NB(\mathrm{mean} = m_g e^{-\eta_c}, \mathrm{size} = r_g), \qquad
              \mathrm{variance} = \mathrm{mean} + \mathrm{mean}^2 / r_g

    ``exp(-eta_c)`` is the capture probability of cell c, with the prior ``eta_c ~ TruncNormal(log M0 -
    log L_c, sigma_M, low=0)``, ``L_c`` the cell's library size (its row total) and ``M0`` the prior total
    mRNA of a cell. Weak priors keep every gene finite: ``log m_g`` is normal around the genes' average
    with standard deviation 4, ``log r_g`` is normal(2, 1).

    Parameters
    ----------
    capture_efficiency : {"auto", "human", "mouse", "yeast", "ecoli"}, (float, float) or None, default="auto"
        The pair ``(log_M0, sigma_M)``. An organism's name stands for a known M0 (human and mouse
        200,000; yeast 60,000; ecoli 3,000) with sigma 0.5. ``"auto"`` takes sigma 0.5 and log M0 =
        log(largest library) + 3 sigma, so that the truncation never bites. ``None`` means no capture
        model: eta = 0. To choose between settings by held-out rows use ``score(X, given_totals=True)``.
    n_steps : int, default=1000
        Steps of stochastic variational inference at most.
    learning_rate : float, default=0.02
        Learning rate of Adam, in posterior standard deviations; above 0, at most 1.
    tol : float, default=1e-3
        The variational fit stops when 50 steps raise the smoothed ELBO by less than this, in nats per
        cell, or by less than its noise.
    n_posterior_samples : int, default=1000
        Default number of draws of :meth:`sample_posterior`.
    batch_size : int or None, default=None
        Rows that are made dense at a time, about; it sets memory and no result. None chooses by the number of
        genes.
    random_state : int, RandomState instance or None, default=None
        Seed of the variational fit.
    verbose : int, default=0
        1 reports progress.
    warm_start : bool, default=False
        When True, `fit` starts from the previous fit of this estimator, on the same genes, instead of anew.

    Attributes
    ----------
    mean_ : ndarray of shape (n_genes,)
        Biological mean expression m_g: expected counts at full capture (posterior median).
    dispersion_ : ndarray of shape (n_genes,)
        Dispersion (size) r_g (posterior median).
    capture_offset_ : ndarray of shape (n_cells,)
        Capture offset eta_c of the training rows, in nats: the mode given ``mean_`` and
        ``dispersion_``. The capture probability is ``exp(-capture_offset_)``.
    capture_prior_ : tuple (log_M0, sigma_M) or None
        The capture prior that was used.
    loss_curve_ : ndarray of shape (n_iter,)
        Minus the ELBO per step, nats per cell.
    n_iter_ : int
        Variational steps done.
    converged_ : bool
        Whether both stages, the maximum a posteriori and the ELBO, met their tolerances.
    n_features_in_ : int
        Number of genes.
    feature_names_in_ : ndarray of shape (n_genes,)
        Gene names, where X has names that are all strings.

    See Also
    --------
    NBLNEstimator : Correlated genes; takes this estimator fitted as its source.

    Notes
    -----
    The maximum a posteriori (capture offsets integrated by Laplace's method) is found first, in a few
    passes; a Gaussian guide started there is then fitted by NumPyro's stochastic variational
    inference. It is independent up to the common shift of all ``log m_g`` and ``eta_c``, which only the
    priors hold: :meth:`sample_posterior` draws the two together. Memory is that of one batch plus the
    sparse matrix.

    Examples
    --------
    >>> from sknbln import NBVCPEstimator
    >>> from sknbln.datasets import make_nbvcp_counts
    >>> sim = make_nbvcp_counts(n_cells=200, n_genes=30, random_state=0)
    >>> model = NBVCPEstimator(random_state=0).fit(sim.data)
    >>> model.transform(sim.data).shape
    (200, 30)
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
        capture_efficiency="auto",
        n_steps=1000,
        learning_rate=0.02,
        tol=1e-3,
        n_posterior_samples=1000,
        batch_size=None,
        random_state=None,
        verbose=0,
        warm_start=False,
    ):
        self.capture_efficiency = capture_efficiency
        self.n_steps = n_steps
        self.learning_rate = learning_rate
        self.tol = tol
        self.n_posterior_samples = n_posterior_samples
        self.batch_size = batch_size
        self.random_state = random_state
        self.verbose = verbose
        self.warm_start = warm_start

    @_fit_context(prefer_skip_nested_validation=True)
    @whole_or_nothing
    def fit(self, X, y=None):
        """Fit the model to counts.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_cells, n_genes)
            Counts.
        y : Ignored
            Present for scikit-learn's conventions.

        Returns
        -------
        self : object
            The fitted estimator.

        Raises
        ------
        ValueError
            For counts that are negative, not finite or not numbers, and for a `capture_efficiency` that is
            neither a known name nor a pair of finite numbers with sigma_M > 0; under `warm_start`, for
            another number of genes than before.
        TypeError
            For what holds a matrix and is none in memory, as AnnData and Dask arrays.
        FitInterrupted
            After Ctrl-C, once there was a complete sweep: the fitted attributes are those of the last
            one, or of the last variational step. An earlier Ctrl-C, or a second one, leaves the
            estimator as it was.

        Warns
        -----
        ConvergenceWarning
            When a stage did not meet its tolerance.
        UserWarning
            When counts are fractional or look like no counts (a common divisor in most rows, one total for
            all rows), when there are none, or when more than a few cells exceed M0.
        """
        X = validate_counts(self, X, reset=True)
        rng = check_random_state(self.random_state)
        prior = _capture.resolve(self.capture_efficiency, X)
        _capture.warn_about_truncation(prior, X)
        histogram = CountHistogram(X)
        problem = _problem(X, prior, histogram)
        previous = self._previous(X.shape[1])
        outcome, scores = self._maximum(X, problem, histogram, previous)
        point = outcome.point
        batches = RowBatches(X, *problem.row_prior, batch_size=self.batch_size)
        rows = solve_rows(batches, in_model_units(point.x), scores)
        start = self._curvature_guide(X, prior, point, rows)
        if previous is not None:
            start = _svi.resumed(start, previous)
        found = _svi.fit(
            X,
            problem,
            start,
            # the parts of the log-likelihood that are estimated from minibatches
            rows.log_marginal - X @ point.x.mean,
            n_steps=0 if outcome.interrupted else self.n_steps,
            learning_rate=self.learning_rate,
            tol=self.tol,
            rng=rng,
            report=self._report("ELBO step") if self.verbose else None,
        )
        self.capture_prior_ = prior
        self._library_size = _capture.library_sizes(X)
        self.mean_ = np.exp(found.guide.log_mean[0])
        self.dispersion_ = np.exp(found.guide.log_dispersion[0])
        self._guide = found.guide
        self._training_offsets = self._offsets(X)
        self.capture_offset_ = self._training_offsets.loc
        self.loss_curve_ = found.losses
        self.n_iter_ = int(found.losses.size)
        self.converged_ = bool(outcome.converged and found.converged)
        if outcome.interrupted or found.interrupted:
            raise FitInterrupted(self)
        for stage, result, advice in (
            ("maximum a posteriori", outcome, "Look for extreme counts or genes."),
            ("variational fit", found, "Increase n_steps or tol."),
        ):
            if not result.converged:
                warnings.warn(
                    f"The {stage} of NBVCPEstimator did not converge: {result.reason}. {advice}",
                    ConvergenceWarning,
                    stacklevel=user_stacklevel(),
                )
        return self

    def _previous(self, n_genes):
        """The guide of the fit that `warm_start` goes on from, or None."""
        guide = getattr(self, "_guide", None)
        if not self.warm_start or guide is None:
            return None
        if guide.log_mean[0].size != n_genes:
            raise ValueError(
                f"warm_start=True goes on from a fit of {guide.log_mean[0].size} genes, X has {n_genes}. "
                "Give the same genes, or set warm_start=False to start anew."
            )
        return guide

    def _report(self, what):
        def report(step, value):
            print(f"[NBVCPEstimator] {what} {step}: {value:.4f} nats per cell", flush=True)

        return report

    def _maximum(self, X, problem, histogram, previous=None):
        """Maximum of the posterior of log m and log r, the offsets integrated by Laplace.

        Returns the driver's outcome, and the rows' scores as a start.
        """
        n_cells, n_genes = X.shape
        offset, scale = (a.copy() for a in problem.row_prior)
        priors = [
            GaussianPrior(loc, sd**-2) for loc, sd in (problem.mean_prior, problem.dispersion_prior)
        ]
        x = Params(
            np.log(problem.column_totals + 0.5) - np.log(np.sum(np.exp(-offset))),
            np.zeros((n_genes, 0)),
            np.zeros(n_genes),
            problem.dispersion_prior[0].copy(),
        )
        if previous is not None:
            x = x._replace(mean=previous.log_mean[0], dispersion=previous.log_dispersion[0])
        report = self._report("maximum a posteriori, sweep") if self.verbose else None
        for _ in range(_PIN_ROUNDS):
            sweeper = Sweeper(RowBatches(X, offset, scale, batch_size=self.batch_size), 0)
            outcome = ascend(
                Objective(sweeper, histogram, *priors),
                x,
                Params(mean=True, loadings=False, noise=False, dispersion=True),
                n_cells=n_cells,
                tol=_MAP_TOL,
                max_iter=_MAP_MAX_ITER,
                report=None if report is None else lambda i, p: report(i, p.value / n_cells),
            )
            x = outcome.point.x
            # the truncation of the offsets' prior: a mode below 0 is held at 0
            below = (scale > 0) & (offset - scale * sweeper.scores[:, -1] < 0)
            if outcome.interrupted or not below.any():
                break
            offset[below] = scale[below] = 0.0
        return outcome, sweeper.scores

    def _curvature_guide(self, X, prior, point, rows):
        """Normal posterior by the curvature at the maximum, one parameter at a time."""
        x, metric = point.x, point.metric
        log_mean = x.mean, 1 / np.sqrt(metric.moments[:, 0])
        # never less than the prior has
        least = LOG_DISPERSION_PRIOR[1] ** -2
        information = np.maximum(metric.dispersion, least)
        missing = point.sums.genes.missing_log_r
        known = np.maximum(metric.dispersion - missing, least) / information
        log_r = x.dispersion, information**-0.5
        shared = self._common_shift(metric), known
        if prior is None:
            return _svi.Guide(log_mean, log_r, None, *shared)
        offsets = _capture.offset_posterior(X, in_model_units(x), prior, self.batch_size, rows)
        return _svi.Guide(log_mean, log_r, (offsets.raw_loc, offsets.scale), *shared)

    def _common_shift(self, metric):
        """Shares of the likelihood in each log m, and the standard deviation of their common shift.

        The offsets, integrated, take ``kappa a a'`` of the information ``diag(D)`` of log m, ``a`` the
        likelihood's part of D; ``metric.shift`` says how much: ``1'D - kappa (1'a)^2``. Inverted,
        that is ``1/D + sigma^2 (a/D)(a/D)'``.
        """
        total = metric.moments[:, 0]
        share = _svi.likelihood_share(total**-0.5, LOG_MEAN_PRIOR_SCALE)
        taken = max(total.sum() - metric.shift, 0.0) / (total @ share) ** 2
        return share, np.sqrt(taken / (1.0 - taken * (share @ (total * share))))

    def _params(self):
        """The parameters as the cell solver takes them: no loadings, no noise beyond the counts'."""
        n_genes = self.mean_.size
        nothing = np.zeros((n_genes, 0)), np.zeros(n_genes)
        return Params(np.log(self.mean_), *nothing, 1.0 / self.dispersion_)

    def _offsets(self, X):
        """Posterior of the capture offsets of the rows of X given the globals."""
        return _capture.offset_posterior(X, self._params(), self.capture_prior_, self.batch_size)

    def _offset_prior(self):
        """The capture prior that bounds the rows' offsets."""
        return self.capture_prior_

    def transform(self, X):
        """Denoised log-expression: log of the posterior mean of each biological rate.

        Given the capture offset, the rate ``lambda_cg`` of gene g in cell c has a gamma posterior with
        mean ``(r_g + u_cg) / (r_g / m_g + exp(-eta_c))``.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_cells, n_genes)
            Counts.

        Returns
        -------
        ndarray of shape (n_cells, n_genes)
            In nats (natural logarithm of expected counts at full capture).
        """
        check_is_fitted(self)
        X = self._validated(X, self.capture_prior_)
        capture = np.exp(-self._offsets(X).loc)
        r = self.dispersion_
        return np.log((r + X.toarray()) / (r / self.mean_ + capture[:, None]))

    def sample_posterior(self, n_samples=None, X=None, *, random_state=None):
        """Draws from the posterior.

        Parameters
        ----------
        n_samples : int or None, default=None
            None takes ``n_posterior_samples``.
        X : {array-like, sparse matrix} of shape (n_rows, n_genes) or None, default=None
            Rows whose offsets are drawn, by their one-dimensional problem given the globals. Those of the
            training rows, None or the same rows given, come from the variational posterior.
        random_state : int, RandomState instance or None, default=None
            None takes the estimator's.

        Returns
        -------
        Bunch
            ``r`` (n_samples, n_genes) dispersion, ``mu`` (n_samples, n_genes) mean expression in the
            unit of ``mean_``, ``eta`` (n_samples, n_rows) capture offset in nats.
        """
        check_is_fitted(self)
        X = None if X is None else self._validated(X, self.capture_prior_)
        n_samples = checked_n_samples(self.n_posterior_samples if n_samples is None else n_samples)
        rng = check_random_state(self.random_state if random_state is None else random_state)
        return self._draw(n_samples, X, rng)

    def _draw(self, n_samples, X, rng, *, offsets=True):
        """Draws of :meth:`sample_posterior` for validated counts; eta is None if `offsets` is False."""
        logs = self._log_draws(n_samples, rng)
        guide = self._guide
        draws = Bunch(r=np.exp(logs["r"]), mu=np.exp(logs["mu"]), eta=None)
        if not offsets:
            return draws
        n_rows = self.capture_offset_.size if X is None else X.shape[0]
        if guide.capture_offset is None:
            draws["eta"] = np.zeros((n_samples, n_rows))
            return draws
        loc, scale = guide.capture_offset
        rows = self._training_offsets if X is None else self._offsets(X)
        if not _capture.same_offsets(rows, self._training_offsets):
            loc, scale = rows.raw_loc, rows.scale
        centre, sd = guide.log_mean
        shift = _svi.shift_of(logs["mu"] - centre, sd, guide.common_shift[0])
        loc = loc + shift[:, None] * _svi.likelihood_share(scale, self.capture_prior_.sigma)
        draws["eta"] = truncnorm.rvs(
            -loc / scale, np.inf, loc, scale, size=(n_samples, n_rows), random_state=rng
        )
        return draws

    def _posterior_draws(self, n_samples, X, rng, *, eta):
        """Draws that replicated counts are made with; without offsets where `eta` is None."""
        draws = self._draw(n_samples, X, rng, offsets=eta is not None)
        return ParameterDraws(draws.r, np.log(draws.mu), draws.eta)

    def _log_draws(self, n_samples, rng):
        """Posterior draws of log r and log mu, a dict of two arrays (n_samples, n_genes)."""
        guide = self._guide
        normals = {
            "r": (guide.log_dispersion[0], guide.log_dispersion_scale),
            "mu": guide.log_mean,
        }
        draws = {
            name: loc + scale * rng.standard_normal((n_samples, loc.size))
            for name, (loc, scale) in normals.items()
        }
        share, sigma = guide.common_shift
        draws["mu"] += sigma * share * rng.standard_normal((n_samples, 1))
        return draws


def _problem(X, prior, histogram):
    """The fixed part of the variational problem: priors and totals."""
    n_genes = X.shape[1]
    offset, scale = _capture.row_prior(prior, X)
    columns = np.asarray(X.sum(axis=0), float).ravel()
    level = np.log(columns + 0.5) - np.log(np.sum(np.exp(-offset)))
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
        float(X.shape[0]),
    )

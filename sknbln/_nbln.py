"""NBLNEstimator: the negative binomial log-normal factor model."""

from functools import partial
from numbers import Integral, Real
from typing import Any, Literal, Self

import numpy as np
from joblib import Memory
from numpy.typing import ArrayLike
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    _fit_context,
)
from sklearn.frozen import FrozenEstimator
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import HasMethods, Interval, StrOptions

from . import _capture, _fit_warnings, _posterior, _source
from ._base import CountModelMixin, whole_or_nothing
from ._blocks import CSRRows
from ._correlation import with_prior_of_noise
from ._counts import validated_rows
from ._covariance import CovarianceMixin
from ._design import Design
from ._draws import PosteriorMixin
from ._embedding import EmbeddingMixin
from ._known import checked_weight, refuse_genes_not_seen
from ._maximum import Maximization, Table
from ._nbvcp import NBVCPEstimator
from ._passes import solve_rows
from ._progress import Progress, of_sweep
from ._rows import RowBatches
from ._typing import CaptureEfficiency, CountsLike, Covariates, Seed, keeping_hints
from .exceptions import FitInterrupted
from .solver import column_priors
from .solver.ascent import Tolerance
from .solver.coupling import Identity, MarginalCoupling
from .solver.gauge import compositional, effective_rank, singular_basis
from .solver.gene_priors import (
    EVEN,
    NOISE_EXPONENTIAL,
    NOISE_POOL,
    GenePriors,
    SplitPrior,
)
from .solver.params import GaussianPrior, Params, in_model_units, noise_variance

#: what each cascade freezes by default
_RECOMMENDED_FREEZE = {"marginal": ("eta",), "parameter": ("r", "eta")}


#: nats; what a parameter costs that is a sixteenth of its standard deviation off
_LEAST_GAIN = 0.002


def _default_tolerance(cascade, column_prior):
    """Tolerance of a fit whose `tol` is None."""
    if column_prior is not None:
        return Tolerance(1e-6)
    return Tolerance(1e-4) if cascade == "parameter" else Tolerance(1e-5, _LEAST_GAIN)


class NBLNEstimator(
    ClassNamePrefixFeaturesOutMixin,
    PosteriorMixin,
    CovarianceMixin,
    CountModelMixin,
    EmbeddingMixin,
    BaseEstimator,
):
    r"""Negative binomial log-normal factor model of counts.

    .. math:: x_c \sim N(\mu, \Sigma), \quad \Sigma = W W' + \mathrm{diag}(d), \qquad
              u_{cg} \sim NB(\mathrm{mean} = e^{x_{cg} - \eta_c}, \mathrm{size} = r_g)

    With covariates ``c_c`` and known log-exposures ``o_cg`` of the rows (see :meth:`fit`)
    ``x_c ~ N(mu + B c_c, Sigma)``, and the mean is ``exp(x_cg + o_cg - eta_c)``. The factors then hold what
    the covariates do not explain.

    Parameters
    ----------
    latent_dim : int or "auto", default="auto"
        Number of factors k, the columns of W. ``"auto"`` finds it before the fit, at most 50: by parallel
        analysis of the scores at the source's fit [1]_ and, with 200 rows or more, by dropping after a few
        sweeps the columns that noise explains. See `rank_diagnostics_`.
    informative_prior_estimator : NBVCPEstimator or None, default=None
        The source of the cascade. A fitted one is used as it is; an unfitted one is cloned and fitted
        on the same rows; ``sklearn.frozen.FrozenEstimator(fitted)`` is used as it is under
        cross-validation too. None fits an `NBVCPEstimator` with the same `capture_efficiency`,
        `batch_size` and seed.
    informative_priors_freeze : tuple or list of str, or None, default=None
        Parameters that are held at the source's values: ``"r"`` (or ``"dispersion"``), ``"mu"``
        (``"expression"``, ``"mean_expression"``), ``"eta"`` (``"capture_efficiency"``). Coefficients of
        covariates are frozen with ``"mu"``. What is not frozen is refined under a Gaussian prior from the
        source's posterior. None takes what the cascade recommends: ``("eta",)`` for ``"marginal"``,
        ``("r", "eta")`` for ``"parameter"``.
    informative_priors_tau : float, default=1.0
        Factor that multiplies the source's standard deviations in those priors, at least 1e-4 (to fix a
        parameter, freeze it). ``inf`` removes the priors; the capture offset keeps its capture prior.
    informative_priors_n_samples : int, default=1000
        Number of posterior draws of the source from which the moments of those priors are computed under
        ``cascade="parameter"``; under ``"marginal"`` they are computed without draws.
    cascade : {"marginal", "parameter"}, default="marginal"
        Meaning of the source's m and r. ``"marginal"``: they describe each gene's marginal mean,
        ``log m = mu + Sigma_gg/2``, and total overdispersion, ``T(r_source) = Sigma_gg + T(r)``, with the
        function T of the Notes. What is not frozen has these as priors; frozen, they hold exactly.
        ``"parameter"``: they are the mu and r of this model. Frozen, the overdispersion of the data is then
        counted twice, in r and in Sigma.
    observation : {"nb", "poisson", "multinomial"}, default="nb"
        The count channel. ``"poisson"`` is the Poisson log-normal model (r = inf); ``"multinomial"`` the
        logistic-normal multinomial: Poisson with a flat prior on the capture offset; its score is
        conditional on the row totals.
    loadings_prior : str or dict, default="none"
        Prior of the columns of W_perp, ``N(0, lambda_k^2)`` each: ``"none"``; ``"gaussian"`` (fixed
        ``sigma``, 1); ``"horseshoe_columnwise"`` (``tau_scale`` 1, ``lambda_min`` 1e-3, and ``tau_min``, the
        least tau, by default ``lambda_min``); ``"neg_columnwise"`` (``alpha`` 1, ``beta`` 1, ``lambda_min``
        1e-3); ``"ard"``, empirical-Bayes scales of at least 1e-3, which shrink columns of noise to zero and
        leave real columns unshrunk. A dict ``{"type": ..., hyper-parameters}`` sets hyper-parameters, each
        from 1e-8 to 1e8. SCRIBE's names are taken too: ``scale`` for ``sigma``, and ``psi_min``, a variance,
        for the square of ``lambda_min`` under ``"neg_columnwise"``.
    capture_efficiency : {"auto", "human", "mouse", "yeast", "ecoli"}, (float, float) or None, default="auto"
        Capture prior of the held-out score, and of offsets that are not frozen: see `NBVCPEstimator`.
        ``"auto"`` takes the source's. None means no capture model: eta = 0.
    whiten : bool, default=False
        Units of `transform`, `posterior_scores` and `inverse_transform`. False: nats, each score times the
        norm of its component, so that distances between rows are distances of log-rates. True: standardized
        scores, with variance 1 in the model. It has no part in the fit.
    max_iter : int, default=200
        Maximum number of sweeps; with more than 30,000 rows, of the sample of them and of all rows each.
    tol : float or None, default=None
        Relative tolerance of the log-posterior. The fit stops when the predicted gain of the next sweep
        (half the slope along its step) is less than half this fraction of the log-posterior's magnitude, or
        when two sweeps in a row raised it by less than this fraction. None takes 1e-5 or, where that is more,
        .002 nats for each parameter, what a sixteenth of its standard deviation costs; 1e-4 under
        ``cascade="parameter"``; and 1e-6 with a `loadings_prior`, under which the lengths of columns converge
        slowly: standard errors of a fit that stopped early are too small.
    batch_size : int or None, default=None
        Approximate number of rows that are made dense at a time. It changes memory use, not results.
    memory : str, joblib.Memory or None, default=None
        Cache for the fit of an unfitted source, so that a grid search fits it once per fold.
    random_state : int, RandomState instance or None, default=None
        Seed of the source's fit, of its posterior draws, and of the randomized range finder for the start
        values.
    verbose : int, default=0
        1 says after each sweep the objective, what the next one promises, the number of factors and the
        seconds; 2 says more. The lines go to the logger ``"sknbln"``, and are printed where no logging is set
        up.
    warm_start : bool, default=False
        When True, `fit` starts the free parameters from the previous fit of this estimator, which must have
        the same genes and the same `latent_dim`. A source that was fitted inside `fit` continues from its
        own previous fit. Other parameters may change between the two fits.

    Attributes
    ----------
    components_ : ndarray of shape (latent_dim, n_genes)
        W_perp', the loadings minus their mean over genes, in their singular basis: rows are orthogonal,
        with descending norms, and the entry of largest magnitude in each row is positive. Invariant under
        the exchange of log-rate level and capture offset within a cell.
    loadings_ : ndarray of shape (n_genes, latent_dim)
        W itself in the same basis; it depends on how the level of a cell is split between log-rate and
        capture offset.
    components_standard_error_ : ndarray of shape (latent_dim, n_genes)
        Standard errors of the entries of `components_`, up to a common rotation. They combine the outer
        products of the cells' exact gradients with the sampling variance of the scores.
    explained_variance_ : ndarray of shape (latent_dim,)
        Variance of the log-rates along each component, summed over genes: the squared norms of
        `components_`, nats squared.
    explained_variance_ratio_ : ndarray of shape (latent_dim,)
        `explained_variance_` divided by the trace of the compositional covariance
        ``P (W W' + diag d) P``.
    mean_ : ndarray of shape (n_genes,)
        Mean log-rates mu, nats, at the mean of the covariates.
    coef_ : ndarray of shape (n_genes, n_coefficients)
        Coefficients B of the covariates, nats per unit; no columns without covariates.
    coef_standard_error_ : ndarray of shape (n_genes, n_coefficients)
        Their standard errors, given the capture offsets. See :meth:`coef_test`.
    covariate_names_in_ : ndarray of shape (n_coefficients,)
        Names of the coefficients, such as "age" and "batch[B]".
    noise_variance_ : ndarray of shape (n_genes,)
        Noise variances d, nats squared.
    dispersion_ : ndarray of shape (n_genes,)
        Dispersion (size) r; inf for Poisson channels.
    capture_offset_ : ndarray of shape (n_cells,)
        Capture offset eta of the training rows, nats, >= 0.
    capture_prior_ : tuple (log_M0, sigma_M) or None
        Capture prior of the held-out score.
    frozen_params_ : tuple of str
        Canonical names of the frozen parameters.
    informative_prior_estimator_ : NBVCPEstimator
        The fitted source.
    latent_dim_ : int
        Number of factors of the fit: `latent_dim`, at most min(n_cells, n_genes), or the number found. 0
        where none was found: then `components_` is one row of zeros, and `transform` one column of zeros.
    rank_diagnostics_ : dict or None
        How the number of factors was found; None where it was given. ``score_eigenvalues``, the leading
        eigenvalues of the scores at the source's fit; ``null_eigenvalues``, the largest of each permutation
        of them; ``null_threshold``, above which a factor is; ``score_rank``, the number of factors by it;
        ``n_groups``, the number of groups of few genes beside them;
        ``column_information``, ``w' B w`` of the columns after a few sweeps, with B the genes' information
        per cell, and ``noise_edge``, the largest of noise spread over all genes; None with fewer than 200
        rows.
    dispersion_gradient_ : ndarray of shape (n_genes,)
        Derivative of the marginal log-likelihood with respect to log r at the fit. Where r is frozen at the
        source's value (``cascade="parameter"``), a large positive sum means that the data favour less
        overdispersion: the variance that Sigma explains is counted twice. See
        :meth:`get_dispersion_diagnostics`.
    w_prior_diagnostics_ : dict
        ``strategy_type``; ``column_frobenius_compositional``, the norms of the rows of `components_`;
        ``column_norm_effective_rank`` and its alias ``effective_rank``, the number of norms that exceed 5 %
        of the largest and 0.01 nats per gene (root mean square). With a loadings prior also ``sigma_k``,
        the columns' scales lambda_k, and ``scale_effective_rank``; with a horseshoe also its ``tau``.
    newton_decrement_ : ndarray of shape (n_cells,)
        Newton decrement of each training row at the fit: the slope along the last step, nats. Below 1e-9
        where the row's mode has converged.
    tol_ : float
        Tolerance of the fit, as a fraction of the log-posterior's magnitude.
    objective_history_ : ndarray of shape (n_iter + 1,)
        Log-posterior per cell at the start and after each sweep. It never decreases, except where a
        loadings prior is updated between sweeps. If no step of the last sweep was accepted, the
        last value repeats the one before it.
    promised_gain_ : float
        Predicted gain of another sweep when the fit ended, nats per cell: half the slope along its step.
    n_iter_ : int
        Number of sweeps. With more than 30,000 rows the first are over a random sample of 20,000 rows, until
        they have converged; all rows go on from there.
    converged_ : bool
        Whether the tolerance was met and every cell's mode converged.
    n_features_in_ : int
        Number of genes.
    feature_names_in_ : ndarray of shape (n_genes,)
        Gene names; defined only when X has column names that are all strings.

    See Also
    --------
    NBVCPEstimator : The model with independent genes; source of the cascade.

    Notes
    -----
    What the source says of the means and the total overdispersions has standard deviations of `tau` times
    the source's posterior and 0.1 nats, which the coupling itself is wrong by. There

    .. math:: T(r) = 2 w (\log r - \psi(r)) + (1 - w) \log(1 + 1/r), \qquad w = m / (m + r_{source})

    with m the gene's mean count: the likelihood of a gene with many counts matches the mean of log counts,
    that of one with few factorial moments.

    Weak priors keep the estimates finite for genes with few counts: mu is normal around the genes' average
    with standard deviation 4. Under ``cascade="marginal"`` log d is normal with a centre and a width, 0.5 at
    least, that are estimated from the genes; overdispersion that the factors leave is split between d and
    T(r), ``log(d / T(r)) ~ N(c, 1)``: evenly, c = 0; where its median is above 0.5 the fit looks at nearly
    all in r and nearly all in d, and keeps the more likely. Under ``"parameter"``, ``d ~ Exponential(2)`` and
    ``log r ~ N(2, 1)``.

    The log-rates are integrated out by Laplace's method, with the leading part of the next term of its
    expansion. The parameters maximize the resulting marginal likelihood by its exact gradient, preconditioned
    by the least squares of each gene on the scores.
    A sweep costs about ``n_cells n_genes latent_dim^2`` operations; memory is one batch of rows.

    References
    ----------
    .. [1] Horn, J. L. (1965). A rationale and test for the number of factors in factor analysis.
       Psychometrika 30, 179-185.

    Examples
    --------
    >>> from sknbln import NBLNEstimator
    >>> from sknbln.datasets import make_nbln_counts
    >>> sim = make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=0)
    >>> model = NBLNEstimator(random_state=0).fit(sim.data)
    >>> model.transform(sim.data).shape
    (150, 2)
    >>> model.components_.shape
    (2, 24)
    """

    _parameter_constraints: dict = {
        "latent_dim": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "informative_prior_estimator": [HasMethods(["fit", "transform"]), None],
        "informative_priors_freeze": "no_validation",  # _source.canonical_freeze
        # below 1e-4 the priors' precision swamps the data in each gene's least squares
        "informative_priors_tau": [Interval(Real, 1e-4, None, closed="both")],
        "informative_priors_n_samples": [Interval(Integral, 2, None, closed="left")],
        "cascade": [StrOptions({"parameter", "marginal"})],
        "observation": [StrOptions({"nb", "poisson", "multinomial"})],
        "loadings_prior": [StrOptions(set(column_priors.TYPES)), dict],
        "capture_efficiency": NBVCPEstimator._parameter_constraints["capture_efficiency"],
        "whiten": ["boolean"],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left"), None],
        "batch_size": [Interval(Integral, 1, None, closed="left"), None],
        "memory": [str, HasMethods(["cache"]), None],
        "random_state": ["random_state"],
        "verbose": ["verbose"],
        "warm_start": ["boolean"],
    }

    def __init__(
        self,
        latent_dim: int | Literal["auto"] = "auto",
        *,
        informative_prior_estimator: NBVCPEstimator | FrozenEstimator | None = None,
        informative_priors_freeze: tuple[str, ...] | list[str] | None = None,
        informative_priors_tau: float = 1.0,
        informative_priors_n_samples: int = 1000,
        cascade: Literal["marginal", "parameter"] = "marginal",
        observation: Literal["nb", "poisson", "multinomial"] = "nb",
        loadings_prior: str | dict[str, Any] = "none",
        capture_efficiency: CaptureEfficiency = "auto",
        whiten: bool = False,
        max_iter: int = 200,
        tol: float | None = None,
        batch_size: int | None = None,
        memory: str | Memory | None = None,
        random_state: Seed = None,
        verbose: int = 0,
        warm_start: bool = False,
    ) -> None:
        self.latent_dim = latent_dim
        self.informative_prior_estimator = informative_prior_estimator
        self.informative_priors_freeze = informative_priors_freeze
        self.informative_priors_tau = informative_priors_tau
        self.informative_priors_n_samples = informative_priors_n_samples
        self.cascade = cascade
        self.observation = observation
        self.loadings_prior = loadings_prior
        self.capture_efficiency = capture_efficiency
        self.whiten = whiten
        self.max_iter = max_iter
        self.tol = tol
        self.batch_size = batch_size
        self.memory = memory
        self.random_state = random_state
        self.verbose = verbose
        self.warm_start = warm_start

    # ------------------------------------------------------------------ fit

    # informative_prior_estimator validates its own parameters when it is fitted
    @keeping_hints(_fit_context(prefer_skip_nested_validation=False))
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
            Known covariates of the rows, such as ``adata.obs[["batch"]]``. Numeric columns are used as they
            are; categorical, string and boolean ones become contrasts with their first level. A source that
            is fitted here gets them too; a fitted one has to have been fitted with the same. New rows need
            theirs: pass them to every method that takes rows.
        offset : array-like of shape (n_cells,) or (n_cells, n_genes), default=None
            Known log-exposures, added to the log-rates. One usually sets ``capture_efficiency=None`` beside.
        sample_weight : array-like of shape (n_cells,) or None, default=None
            How often each row counts. A weight of 2 stands for two equal rows, one of 0 for a row that is
            left out of the fit and only has its offset computed. A source that is fitted here gets the
            weights too.

        Returns
        -------
        self : object
            The fitted estimator.

        Raises
        ------
        ValueError
            If counts are negative, not finite or not numbers; if a freeze name, loadings prior or
            hyper-parameter is unknown; if genes of X are missing from the source, or it was fitted with other
            covariates; if covariates are linearly dependent, constant or missing in some rows; under
            `warm_start`, if the number of genes or factors, or the covariates, differ from the previous fit.
        FitInterrupted
            After Ctrl-C, if at least one sweep over all rows is complete: the fitted attributes are those of
            the last complete sweep. An earlier Ctrl-C, or a second one, leaves the estimator unchanged.
        TypeError
            If `informative_prior_estimator` is not an NBVCPEstimator, or X is an object that holds a matrix
            and is none, such as AnnData, or has no slices of rows.

        Warns
        -----
        ConvergenceWarning
            If `max_iter` sweeps did not meet `tol`, or if the modes of some cells did not converge.
        UserWarning
            If counts are fractional, do not look like counts, or are all zero; if rows have more counts than
            the M0 of the source's capture prior; if the offset looks like the exposure itself, or stands
            beside a capture model; if ``latent_dim="auto"`` finds no factor, or more than 50;
            if a gene's log-rate has a variance above 50 nats squared.
            After convergence also if the scores of a real column have a mean square outside 0.5 to 2, if a
            `loadings_prior` that selects the rank kept all `latent_dim` columns where the scores show more
            factors, or took some to zero with many more genes than rows, and if freezing r at the source's
            value counts overdispersion twice.
        """
        self.frozen_params_ = frozen = self._frozen()
        prior_name, column_prior = column_priors.named(self.loadings_prior)
        if self.tol is None:
            tol = _default_tolerance(self.cascade, column_prior)
        else:
            tol = Tolerance(self.tol)
        free = Params(
            mean="mu" not in frozen,
            loadings=True,
            noise=True,
            dispersion=self.observation == "nb" and "r" not in frozen,
        )
        rng = check_random_state(self.random_state)
        given = dict(covariates=covariates, offset=offset, sample_weight=sample_weight)
        progress = Progress(self, 2, X, y, **given)
        source, X, previous = self._fit_source(X, **given, around=progress.nested("source"))
        known = self._known
        offsets = source.offsets(X, self.batch_size, known)
        self._source = source.with_rows(offsets)
        self._library_size = _capture.library_sizes(X)

        self._total = _source.total_overdispersion(source, offsets, known)
        with progress.stage("maximum", of_sweep, NBLNEstimator._at_sweep) as stage:
            outcome, rows = self._maximum(
                X, source, offsets, free, column_prior, tol, previous, rng, stage
            )
        objective = outcome.objective
        objective.rotate(self._set_parameters(objective, outcome.point))
        self._set_rows(objective, rows, free, outcome)
        self.w_prior_diagnostics_ = self._prior_diagnostics(prior_name, outcome.columns)
        self.objective_history_ = np.asarray(outcome.history)
        self.promised_gain_, self.tol_ = outcome.promised, outcome.tol
        self.n_iter_ = outcome.n_iter
        self.converged_ = bool(outcome.converged and outcome.point.sums.n_unconverged == 0)
        if outcome.interrupted:
            raise FitInterrupted(self)
        _fit_warnings.say(self, outcome, self._rows)
        progress.end()
        return self

    def _fit_source(self, X, covariates, offset, sample_weight, around):
        """The source's posterior of the genes of X, X as canonical counts, and the `warm_start` coordinates.

        Sets `informative_prior_estimator_`, `capture_prior_`, and what is known of the rows.
        """
        source = self.informative_prior_estimator
        if source is None:
            source = NBVCPEstimator(
                capture_efficiency=self.capture_efficiency,
                batch_size=self.batch_size,
                random_state=self.random_state,
                verbose=self.verbose,
            )
        # a source that is fitted here issues the warnings about counts itself
        fitted_here = _source.needs_fit(source)
        X_original = X
        X, missing = validated_rows(self, X, reset=True, warn=not fitted_here, missing=True)
        if self.memory is not None and not isinstance(X, CSRRows):
            raise ValueError(
                f"memory={self.memory!r} keeps the source's fit by the values of X, and X is not in memory. "
                "Set memory=None, or fit the source first and give it as informative_prior_estimator."
            )
        names = getattr(self, "feature_names_in_", None)
        weight = checked_weight(sample_weight, X.shape[0])
        refuse_genes_not_seen(self, missing, weight)
        design = Design.learned(covariates, X.shape[0], weight)
        previous = self._previous(X, design)
        given = dict(covariates=covariates, offset=offset, sample_weight=weight)
        source = _source.fitted_source(
            source,
            X.X if isinstance(X, CSRRows) and names is None and missing is None else X_original,
            self.memory,
            None if previous is None else self.informative_prior_estimator_,
            {name: value for name, value in given.items() if value is not None},
            around,
        )
        _source.refuse_other_known(source, design, offset)
        self.informative_prior_estimator_ = source
        # coded as in the source's fit, which may be of other rows: its mu and B are those of its own centre
        self._design = source._design
        self._known = source._known
        if not fitted_here:
            self._known = self._known_at_fit(X, covariates, offset, weight, missing)
        if self.observation != "multinomial" and not fitted_here:
            _capture.warn_about_truncation(source.capture_prior_, X)
        self.capture_prior_ = source.capture_prior_
        if not (isinstance(self.capture_efficiency, str) and self.capture_efficiency == "auto"):
            self.capture_prior_ = _capture.resolve(self.capture_efficiency, X, weight)
        return _source.posterior_of_genes(source, X.shape[1], names), X, previous

    def _maximum(self, X, source, offsets, free, column_prior, tol, previous, rng, watch):
        """The `Outcome` of the ascent, and the rows that it was over. Sets `rank_diagnostics_`."""
        task = Maximization(
            source=source,
            total=self._total,
            # before the number of factors is looked for, which takes random numbers too: with the same seed
            # the priors are the same whether it is given, found or continued
            priors=self._priors(source, free, rng),
            free=free,
            column_prior=column_prior,
            tol=tol,
            latent_dim=None if self.latent_dim == "auto" else self.latent_dim,
            selects=self._selects(),
            observation=self.observation,
            row_capture=partial(self._row_capture, params=source.params),
            batch_size=self.batch_size,
            max_iter=self.max_iter,
            watch=watch,
        )
        table = Table(X, offsets, self._known)
        if previous is not None:
            self.rank_diagnostics_ = getattr(self, "rank_diagnostics_", None)
            return task.go_on(table, previous, self._split)
        some = task.sample(table, rng)
        loadings, self.rank_diagnostics_ = task.start(some, rng)
        outcome, rows, of_columns = task.anew(table, some, loadings, rng)
        if of_columns is not None:
            self.rank_diagnostics_ |= of_columns
        return outcome, rows

    def _selects(self):
        """Whether the fit finds the number of factors, or how many of the given number are real."""
        name, _ = column_priors.named(self.loadings_prior)
        return self.latent_dim == "auto" or name in column_priors.CHOOSE_RANK

    def _priors(self, source, free, rng):
        """Priors of mean and log r, the coupling, and other priors, as `Objective` takes them."""
        tau = self.informative_priors_tau
        coupled = self.cascade == "marginal"
        coef = _source.coef_prior(source, free, self.informative_priors_tau, coupled)
        if not coupled:
            n_samples = self.informative_priors_n_samples
            mean, dispersion = _source.priors(source, free, tau, n_samples, rng)
            return mean, dispersion, Identity(), GenePriors(NOISE_EXPONENTIAL), coef
        mean, of_total = _source.marginal_priors(source, self._total, free, tau)
        flat, hard = GaussianPrior.flat(source.mean.size), "r" in self.frozen_params_
        coupling = MarginalCoupling(self._total if hard else None)
        split = SplitPrior(self._total, EVEN) if self.observation == "nb" else None
        genes = GenePriors(NOISE_POOL, split, None if hard else of_total)
        return mean, flat, coupling, genes, coef

    def _set_parameters(self, objective, point):
        """Set the fitted parameters; those frozen at the source's values equal them bit for bit.

        Returns the rotation of the loadings to their singular basis.
        """
        x = objective.coupling.expand(point.x)
        self._coordinates = point.x
        self._split = objective.split  # of the candidate that was kept
        # the coupling computes Sigma_gg from this variance
        self._coordinate_variance = np.sum(point.x.loadings**2, 1) + noise_variance(point.x)
        literal = self.frozen_params_ if self.cascade == "parameter" else ()
        self.mean_ = np.log(self._source.mean) if "mu" in literal else x.mean
        self.dispersion_ = np.exp(x.dispersion)
        if "r" in literal:
            self.dispersion_ = self._source.dispersion.copy()
        self.noise_variance_ = noise_variance(x)
        rotation = singular_basis(x.loadings)
        self.loadings_ = x.loadings @ rotation
        self.components_ = np.ascontiguousarray(compositional(self.loadings_).T)
        self._n_features_out = self.components_.shape[0]
        self.latent_dim_ = self._n_features_out
        if self.latent_dim == "auto" and not np.any(self.loadings_):
            self.latent_dim_ = 0
        self.explained_variance_ = np.sum(self.components_**2, axis=1)
        noise = (1 - 1 / self.noise_variance_.size) * self.noise_variance_.sum()
        total = self.explained_variance_.sum() + noise
        self.explained_variance_ratio_ = self.explained_variance_ / max(total, 1e-300)
        self.dispersion_gradient_ = point.gradient_log_r
        return rotation

    def _at_sweep(self, outcome):
        """Set what methods for new rows need, as if the fit had ended with this `Outcome`."""
        self._set_parameters(outcome.objective, outcome.point)
        coef = outcome.objective.coupling.expand(outcome.point.x).coef
        self._set_coef(coef, np.full_like(coef, np.nan))

    def _set_rows(self, objective, rows, free, outcome):
        """Set the posterior of the training rows and the standard errors, by one more pass over the rows."""
        k, precision = self.loadings_.shape[1], 0.0
        if outcome.columns is not None:
            precision = outcome.columns.penalty.precision
            precision = np.pad(precision, (0, k - precision.size), constant_values=1.0)
        own = objective.coupling.expand(outcome.point.x)
        params = own._replace(mean=self.mean_, loadings=self.loadings_)
        self._standard_deviation, of_variances, self._rows = _posterior.standard_deviations(
            rows,
            objective.sweep.scores,
            in_model_units(params),
            free,
            objective.prior_mean.precision,
            objective.prior_log_r.precision + objective.gene_priors.dispersion_precision(own),
            precision,
            objective.prior_coef.precision,
        )
        self._gene_covariance = with_prior_of_noise(
            of_variances, objective.gene_priors.noise_precision(own)
        )
        of_coef = self._source.guide.coef_scale
        if free.coef and of_coef.shape[1]:
            moments = outcome.point.sums.genes.moments
            of_coef = _posterior.coef_standard_deviations(moments, self.loadings_, self._known)
        self._standard_deviation = self._standard_deviation._replace(coef=of_coef)
        self._set_coef(params.coef, of_coef)
        self.components_standard_error_ = np.ascontiguousarray(self._standard_deviation.loadings.T)
        self.newton_decrement_ = self._rows.decrement
        self.capture_offset_ = np.maximum(self._rows.offset, 0.0)

    def _previous(self, X, design):
        """The coordinates of the fit that `warm_start` continues from, or None."""
        if not self.warm_start or not hasattr(self, "_coordinates"):
            return None
        previous_shape = self._coordinates.loadings.shape
        k = previous_shape[1] if self.latent_dim == "auto" else min(self.latent_dim, *X.shape)
        shape = X.shape[1], k
        if previous_shape != shape:
            raise ValueError(
                f"warm_start=True goes on from a fit of {previous_shape[0]} genes with {previous_shape[1]} "
                f"factors, found X of {shape[0]} genes and {shape[1]} factors asked for. Give the same, or "
                "set warm_start=False to start anew."
            )
        self._refuse_other_covariates(design)
        return self._coordinates

    def _frozen(self):
        names = self.informative_priors_freeze
        recommended = _RECOMMENDED_FREEZE[self.cascade]
        frozen = recommended if names is None else _source.canonical_freeze(names)
        # Poisson counts have no dispersion; conditional on row totals there is no capture offset either
        absent = {"nb": (), "poisson": ("r",), "multinomial": ("r", "eta")}[self.observation]
        named = [name for name in frozen if name in absent]
        if named and frozen != _RECOMMENDED_FREEZE["parameter"] and names is not None:
            raise ValueError(
                f"informative_priors_freeze={self.informative_priors_freeze!r} freezes {named}, which "
                f"observation={self.observation!r} does not have. Leave {named} out."
            )
        return tuple(name for name in frozen if name not in absent)

    def _prior_diagnostics(self, name, columns):
        norms, n_genes = np.linalg.norm(self.components_, axis=1), self.components_.shape[1]
        diagnostics = {
            "strategy_type": name,
            "column_frobenius_compositional": norms,
            "column_norm_effective_rank": effective_rank(norms, n_genes),
            "effective_rank": effective_rank(norms, n_genes),
        }
        if columns is not None:
            scales = np.sqrt(columns.variance)
            diagnostics["sigma_k"] = np.pad(scales, (0, norms.size - scales.size))
            diagnostics["scale_effective_rank"] = effective_rank(diagnostics["sigma_k"], 1)
            if columns.tau is not None:
                diagnostics["tau"] = columns.tau
        return diagnostics

    # ------------------------------------------------------------------ rows

    def _row_capture(self, X, known=None, params=None, offsets=None):
        """Offset, scale and prior precision of each row, by one rule for training rows and new rows.

        `fit` passes parameters of the start and the source's offsets of X, which it already has.
        """
        if self.observation == "multinomial":
            return _capture.flat(X, self._params() if params is None else params, known)
        return _capture.given_source(
            X,
            self._source.offsets(X, self.batch_size, known) if offsets is None else offsets,
            self._source.capture_prior,
            self.capture_prior_,
            frozen="eta" in self.frozen_params_,
            tau=self.informative_priors_tau,
        )

    _OF_TRAINING_ROWS = "_rows", "newton_decrement_", "informative_prior_estimator_"

    def _for_new_rows(self):
        model = super()._for_new_rows()
        model.informative_prior_estimator = None
        model._source = self._source.without_rows()
        return model

    def _offset_prior(self):
        """The capture prior of the rows' offsets; None for a channel without one."""
        return None if self.observation == "multinomial" else self._source.capture_prior

    def _independent(self):
        """The `NBVCPPosterior` of independent genes: the source's."""
        return self._source

    def _params(self):
        """The parameters in the form that the cell solver takes."""
        coef = self.coef_ * self._design.scale
        return Params(
            self.mean_, self.loadings_, self.noise_variance_, 1.0 / self.dispersion_, coef
        )

    def _solve(self, X, known=None):
        capture = self._row_capture(X, known)
        batches = RowBatches(X, *capture, batch_size=self.batch_size, known=known)
        return solve_rows(batches, self._params())

    def _log_expected(self, X, known):
        """Logarithms of the expected counts of genes that a row does not show, (n_rows, n_genes).

        ``y = mu + B c + o + W z - eta`` plus noise is Gaussian given the genes that it shows.
        """
        rows, params = self._solve(X, known), self._params()
        W = params.loadings
        mean = params.mean + rows.scores @ W.T - rows.offset[:, None]
        mean = mean + known._replace(missing=None).log_scale(params.coef)
        variance = np.einsum("gi,cij,gj->cg", W, rows.score_covariance, W, optimize=True)
        variance += params.noise + rows.offset_variance[:, None]
        return mean + variance / 2 - rows.score_offset_covariance @ W.T

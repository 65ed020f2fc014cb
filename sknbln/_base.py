"""What both estimators share: validated rows, the held-out score, all-or-nothing fits, versioned pickles."""

import copy
import functools
import warnings
from typing import Any, cast

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from sklearn.utils.validation import check_is_fitted, validate_data

from . import _capture
from ._counts import validate_counts, validated_rows
from ._dask import is_dask, transformed
from ._design import checked_offset
from ._differential import coefficient_table
from ._known import Known, checked_weight
from ._pairs import PairTestMixin
from ._progress import CallbackSupportMixin
from ._typing import CountsLike, Covariates, F
from .exceptions import FitInterrupted, InconsistentVersionWarning
from .predictive._mixin import PredictiveMixin

_VERSION = "_sknbln_version"
#: what scikit-learn sets during a fit with callbacks, and takes away after it
_CALLBACK_STATE = ("_callback_fit_ctx", "_skl_callbacks_to_teardown")


def whole_or_nothing(fit: F) -> F:
    """Decorate `fit` so that a call that fails leaves the estimator unchanged.

    The attributes of the estimator are restored after any exception, Ctrl-C included. Only after a
    `FitInterrupted` of this same estimator are they kept: its state is complete.

    Raises
    ------
    KeyboardInterrupt
        If the fit of a nested estimator was interrupted.
    """

    @functools.wraps(fit)
    def wrapped(self, X, y=None, **known):
        before = vars(self).copy()
        try:
            return fit(self, X, y, **known)
        except BaseException as error:
            after = vars(self)
            # scikit-learn tells the callbacks after this that the fit has ended
            before |= {name: after[name] for name in _CALLBACK_STATE if name in after}
            if not isinstance(error, FitInterrupted):
                self.__dict__ = before
                raise
            if error.estimator is self:
                raise
            self.__dict__ = before
            raise KeyboardInterrupt(
                f"interrupted while {type(self).__name__}.fit fitted its {type(error.estimator).__name__}; "
                f"the {type(self).__name__} is as it was before."
            ) from error

    return cast(F, wrapped)


def lazy_with_dask(transform: F) -> F:
    """Decorate `transform` so that it returns a Dask array, not computed yet, where X is one."""

    @functools.wraps(transform)
    def wrapped(self, X, *, covariates=None, offset=None):
        if not is_dask(X):
            return transform(self, X, covariates=covariates, offset=offset)
        check_is_fitted(self)
        validate_data(self, X, reset=False, skip_check_array=True)
        self._known_of(X, covariates, offset)  # the errors about them
        n_columns = len(self.get_feature_names_out())
        return transformed(self._for_new_rows(), X, covariates, offset, n_columns)

    return cast(F, wrapped)


class VersionedStateMixin:
    """Store the version of this library in pickles, as scikit-learn does for its own estimators.

    Warns
    -----
    InconsistentVersionWarning
        If a pickle of another version is loaded.
    """

    def __getstate__(self):
        from . import __version__

        return {**super().__getstate__(), _VERSION: __version__}

    def __setstate__(self, state):
        from . import __version__

        state = dict(state)
        written_by = state.pop(_VERSION, "of an unknown version")
        if written_by != __version__:
            warnings.warn(
                InconsistentVersionWarning(type(self).__name__, written_by, __version__),
                stacklevel=2,
            )
        super().__setstate__(state)


class CountModelMixin(VersionedStateMixin, CallbackSupportMixin, PairTestMixin, PredictiveMixin):
    """Tags, validated rows, held-out scores, versioned pickles and replicated counts of both estimators."""

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.positive_only = True
        tags.input_tags.allow_nan = True
        return tags

    def _for_new_rows(self):
        """A copy without what is as long as the training rows, to be sent to workers."""
        model = copy.copy(self)
        for name in ("_library_size", "capture_offset_", *self._OF_TRAINING_ROWS):
            delattr(model, name)
        vars(model).pop("feature_names_in_", None)  # chunks have none
        model._known = self._known.chosen(slice(0, 0))
        return model

    def _validated(self, X, prior=None):
        """Counts as canonical CSR; warns if rows have more counts than the M0 of the capture prior."""
        check_is_fitted(self)
        X = validate_counts(self, X, reset=False)
        _capture.warn_about_truncation(prior, X)
        return X

    def _given(self, X, covariates, offset, prior=None):
        """Counts as canonical CSR, and the `Known` of their rows; NaN is a count that was not seen."""
        check_is_fitted(self)
        return self._with_known(validate_counts, X, covariates, offset, prior)

    def _given_rows(self, X, covariates, offset, prior=None):
        """The same with counts as `Rows`, which need not be in memory."""
        check_is_fitted(self)
        return self._with_known(validated_rows, X, covariates, offset, prior)

    def _with_known(self, validated, X, covariates, offset, prior):
        X, missing = validated(self, X, reset=False, missing=True)
        _capture.warn_about_truncation(prior, X)
        return X, self._known_of(X, covariates, offset, missing)

    def impute(
        self,
        X: CountsLike,
        *,
        covariates: Covariates | None = None,
        offset: ArrayLike | None = None,
    ) -> np.ndarray:
        """Fill missing counts in with their expectation given the other counts of the row.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_cells, n_genes)
            Counts, NaN where they were not seen.
        covariates, offset
            Of the rows, as in :meth:`fit`.

        Returns
        -------
        ndarray of shape (n_cells, n_genes)
            The counts, and posterior means of those that are missing.
        """
        X, known = self._given(X, covariates, offset)
        filled = X.toarray()
        if known.missing is not None:
            where = known.missing.nonzero()
            filled[where] = np.exp(self._log_expected(X, known)[where])
        return filled

    def _known_at_fit(self, X, covariates, offset, weight, missing):
        """`Known` of the rows of a fit, coded by the `Design` of the fit."""
        offset = checked_offset(offset, X.shape, self.capture_efficiency)
        return Known.coded(self._design, covariates, offset, X.shape[0], weight, missing)

    def _known_of(self, X, covariates, offset, missing=None):
        """`Known` of these rows, coded as in the fit.

        Raises
        ------
        ValueError
            If the fit had covariates or an offset and these rows have none; if a covariate or a level is not
            one of the fit.
        """
        offset = checked_offset(offset, X.shape, None)
        if offset is None and self._known.exposure.shape[1]:
            raise ValueError(
                "The fit had an offset, and these rows have none: pass offset=, their log-exposures (zeros "
                "for an exposure of 1)."
            )
        return Known.coded(self._design, covariates, offset, X.shape[0], missing=missing)

    def _refuse_other_covariates(self, design):
        """Raise ValueError where `warm_start` goes on from a fit with other covariates."""
        if design.names != self._design.names:
            raise ValueError(
                f"warm_start=True goes on from a fit with the coefficients {list(self._design.names)}, found "
                f"{list(design.names)}. Give the same covariates, or set warm_start=False to start anew."
            )

    def _set_coef(self, coef, standard_error):
        """Set the coefficients, from those per standard deviation of each covariate."""
        scale = self._design.scale
        self.coef_, self.coef_standard_error_ = coef / scale, standard_error / scale
        self.covariate_names_in_ = np.array(self._design.names, dtype=object)

    def _with_coef(self, draws, coef):
        """Posterior draws with those of the coefficients, in the units of `coef_`, where there are any."""
        if coef.shape[-1]:
            draws.coef = coef / self._design.scale
        return draws

    def coef_test(self) -> pd.DataFrame:
        """Wald test of every coefficient: which genes depend on which covariates.

        Returns
        -------
        DataFrame
            A row per gene and coefficient: ``gene``, ``covariate``, ``coefficient`` (nats per unit of the
            covariate), ``standard_error``, ``statistic`` (their ratio), two-sided ``p_value`` of the normal
            distribution, and ``q_value``, Benjamini and Hochberg's over the genes of a covariate.

        Raises
        ------
        ValueError
            If the model was fitted without covariates.
        """
        check_is_fitted(self)
        if not self.coef_.shape[1]:
            raise ValueError(
                "The fit had no covariates, so that there is no coefficient to test: fit with covariates."
            )
        names = getattr(self, "feature_names_in_", None)
        return coefficient_table(
            self.coef_, self.coef_standard_error_, self.covariate_names_in_, names
        )

    def fit_transform(
        self,
        X: CountsLike,
        y: Any = None,
        *,
        covariates: Covariates | None = None,
        offset: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> np.ndarray:
        """Fit to the rows and transform them.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_cells, n_genes)
            Counts.
        y : Ignored
            Present for scikit-learn's conventions.
        covariates, offset, sample_weight
            Of the rows, see :meth:`fit`.

        Returns
        -------
        ndarray
            What :meth:`transform` returns.
        """
        known = dict(covariates=covariates, offset=offset)
        return self.fit(X, y, sample_weight=sample_weight, **known).transform(X, **known)

    def score_samples(
        self,
        X: CountsLike,
        *,
        given_totals: bool = False,
        covariates: Covariates | None = None,
        offset: ArrayLike | None = None,
    ) -> np.ndarray:
        r"""Laplace marginal log-likelihood of each row, constants included.

        Log-rates and capture offset are both integrated out, the offset under the capture prior even where
        it was frozen in the fit. Scores are therefore comparable between estimators, freeze sets and latent
        dimensions. They are not comparable between values of `capture_efficiency`: the prior is centred on
        the scored row's own total, so that a smaller sigma_M alone gives a better score. Comparable between
        these is

        .. math:: \log p(u_c \mid \textstyle\sum_g u_{cg})

        the log-likelihood of a row's composition (``given_totals=True``). It uses no capture prior;
        `capture_efficiency` enters through the fitted parameters alone. ``observation="multinomial"`` has
        this score only.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_cells, n_genes)
            Counts.
        given_totals : bool, default=False
            True for the log-likelihood given each row's total.
        covariates, offset
            Of the rows, as in :meth:`fit`.

        Returns
        -------
        ndarray of shape (n_cells,)
            Log-likelihoods in nats.

        Warns
        -----
        UserWarning
            If rows have more counts than the M0 of the capture prior (not with `given_totals`).
        """
        check_is_fitted(self)
        given_totals = given_totals or self._given_totals
        prior = None if given_totals else self.capture_prior_
        X, known = self._given_rows(X, covariates, offset, prior)
        params = self._params()
        if given_totals:
            return _capture.score_rows_given_totals(X, params, self.batch_size, known)
        return _capture.score_rows(X, params, self.capture_prior_, self.batch_size, known)

    def score(
        self,
        X: CountsLike,
        y: Any = None,
        *,
        given_totals: bool = False,
        covariates: Covariates | None = None,
        offset: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> float:
        """Mean log-likelihood of the rows, see :meth:`score_samples`; higher is better.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_cells, n_genes)
            Counts.
        y : Ignored
            Present for scikit-learn's conventions.
        given_totals : bool, default=False
            True for the score given each row's total: see :meth:`score_samples`. For a search over
            `capture_efficiency` pass
            ``scoring=lambda model, X, y=None: model.score(X, given_totals=True)``.
        covariates, offset
            Of the rows, as in :meth:`fit`.
        sample_weight : array-like of shape (n_cells,) or None, default=None
            Weights of the rows in the mean.

        Returns
        -------
        float
            Score in nats per cell.
        """
        known = dict(covariates=covariates, offset=offset)
        scores = self.score_samples(X, given_totals=given_totals, **known)
        weight = checked_weight(sample_weight, scores.size)
        return float(np.mean(scores) if weight is None else np.average(scores, weights=weight))

    def score_genes(
        self,
        X: CountsLike,
        *,
        covariates: Covariates | None = None,
        offset: ArrayLike | None = None,
    ) -> np.ndarray:
        r"""Mean log-density of each gene's counts given the other genes of the row; higher is better.

        .. math:: s_g = \frac 1n \sum_c \log p(u_{cg} \mid u_{c,-g})

        Which genes a model predicts from the others, and which it does not: a gene without correlations has
        the score that it has under independent genes. The scores do not add up to :meth:`score`, in which
        each gene is given those before it only.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_cells, n_genes)
            Counts.
        covariates, offset
            Of the rows, as in :meth:`fit`.

        Returns
        -------
        ndarray of shape (n_genes,)
            Nats per cell, the mean over the rows in which the gene was seen; NaN without any.

        Raises
        ------
        ValueError
            With ``observation="multinomial"``: given the total and the other counts a count is known.

        Notes
        -----
        One pass over the rows: the gene's own count is taken out of the Laplace posterior of its log-rate
        [1]_, and its likelihood integrated under what is left by quadrature. The capture prior is centred
        on the row's total, to which the gene belongs.

        References
        ----------
        .. [1] Vehtari, A. et al. (2016). Bayesian leave-one-out cross-validation approximations for Gaussian
           latent variable models. Journal of Machine Learning Research 17 (103).

        Examples
        --------
        >>> from sknbln import NBVCPEstimator
        >>> from sknbln.datasets import make_nbvcp_counts
        >>> X = make_nbvcp_counts(n_cells=150, n_genes=24, random_state=0).data
        >>> NBVCPEstimator(random_state=0).fit(X[:100]).score_genes(X[100:]).shape
        (24,)
        """
        check_is_fitted(self)
        if self._given_totals:
            raise ValueError(
                "observation='multinomial' is conditional on totals, and given the total and the other genes "
                "a count is known: there is no score of single genes. Use observation='nb' or 'poisson'."
            )
        X, known = self._given_rows(X, covariates, offset, self.capture_prior_)
        return _capture.score_genes(X, self._params(), self.capture_prior_, self.batch_size, known)

"""What both estimators share: validated rows, the held-out score, all-or-nothing fits, versioned pickles."""

import functools
import warnings

import numpy as np
from sklearn.utils.validation import check_is_fitted

from . import _capture
from ._counts import validate_counts
from .exceptions import FitInterrupted, InconsistentVersionWarning
from .predictive._mixin import PredictiveMixin

_VERSION = "_sknbln_version"


def whole_or_nothing(fit):
    """Decorate `fit` so that a call that fails leaves the estimator unchanged.

    The attributes of the estimator are restored after any exception, Ctrl-C included. Only after a
    `FitInterrupted` of this same estimator are they kept: its state is complete.

    Raises
    ------
    KeyboardInterrupt
        If the fit of a nested estimator was interrupted.
    """

    @functools.wraps(fit)
    def wrapped(self, X, y=None):
        before = vars(self).copy()
        try:
            return fit(self, X, y)
        except BaseException as error:
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

    return wrapped


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


class CountModelMixin(VersionedStateMixin, PredictiveMixin):
    """Tags, validated rows, held-out scores, versioned pickles and replicated counts of both estimators."""

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.positive_only = True
        return tags

    def _validated(self, X, prior=None):
        """Counts as canonical CSR; warns if rows have more counts than the M0 of the capture prior."""
        check_is_fitted(self)
        X = validate_counts(self, X, reset=False)
        _capture.warn_about_truncation(prior, X)
        return X

    def score_samples(self, X, *, given_totals=False):
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
        X = self._validated(X, None if given_totals else self.capture_prior_)
        if given_totals:
            return _capture.score_rows_given_totals(X, self._params(), self.batch_size)
        return _capture.score_rows(X, self._params(), self.capture_prior_, self.batch_size)

    def score(self, X, y=None, *, given_totals=False):
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

        Returns
        -------
        float
            Score in nats per cell.
        """
        return float(np.mean(self.score_samples(X, given_totals=given_totals)))

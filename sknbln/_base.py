"""What both estimators share: validated rows, the held-out score, whole state, versions of pickles."""

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
    """Make a `fit` that does not end leave the estimator as it was before the call.

    Every attribute that it set is taken back, after an exception and after Ctrl-C, unless it raised
    `FitInterrupted` for this estimator, having written a complete state.

    Raises
    ------
    KeyboardInterrupt
        When an estimator inside was interrupted.
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
    """Pickles that carry the version of this library, as scikit-learn's own estimators carry theirs.

    Warns
    -----
    InconsistentVersionWarning
        On loading a pickle of another version.
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
    """What both estimators share: tags, the held-out score, versioned pickles, replicated counts."""

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.positive_only = True
        return tags

    def _validated(self, X, prior=None):
        """Counts as canonical CSR; said where rows exceed the M0 of a capture prior that is used on them."""
        check_is_fitted(self)
        X = validate_counts(self, X, reset=False)
        _capture.warn_about_truncation(prior, X)
        return X

    def score_samples(self, X, *, given_totals=False):
        r"""Laplace marginal log-likelihood of each row, constants included.

        Log-rates and capture offset are both integrated, the offset under the capture prior whatever was
        frozen: the numbers compare between estimators, freeze sets and latent dimensions. They do not
        compare between values of `capture_efficiency`: the prior is centred on the scored row's own total,
        and a smaller sigma_M scores better for that alone. What compares is

        .. math:: \log p(u_c \mid \textstyle\sum_g u_{cg})

        the likelihood of a row's composition (``given_totals=True``). It takes no capture prior, and
        `capture_efficiency` enters through the fitted parameters alone. For ``observation="multinomial"``
        it is the only score that there is.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_cells, n_genes)
            Counts.
        given_totals : bool, default=False
            True for the log-likelihood given each row's total.

        Returns
        -------
        ndarray of shape (n_cells,)
            Nats.

        Warns
        -----
        UserWarning
            When rows have more counts than the M0 of the capture prior (not with `given_totals`).
        """
        check_is_fitted(self)
        given_totals = given_totals or self._given_totals
        X = self._validated(X, None if given_totals else self.capture_prior_)
        if given_totals:
            return _capture.score_rows_given_totals(X, self._params(), self.batch_size)
        return _capture.score_rows(X, self._params(), self.capture_prior_, self.batch_size)

    def score(self, X, y=None, *, given_totals=False):
        """Mean over rows of :meth:`score_samples`; higher is better.

        Parameters
        ----------
        X : {array-like, sparse matrix} of shape (n_cells, n_genes)
            Counts.
        y : Ignored
            Present for scikit-learn's conventions.
        given_totals : bool, default=False
            True for the score given each row's total: see :meth:`score_samples`. A search over
            `capture_efficiency` takes it by
            ``scoring=lambda model, X, y=None: model.score(X, given_totals=True)``.

        Returns
        -------
        float
            Nats per cell.
        """
        return float(np.mean(self.score_samples(X, given_totals=given_totals)))

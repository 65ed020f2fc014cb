"""The state of an estimator: fits that end whole or not at all, pickles that know their version."""

import functools
import warnings

from .exceptions import FitInterrupted, InconsistentVersionWarning

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

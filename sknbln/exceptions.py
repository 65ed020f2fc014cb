"""Exceptions and warnings of this library."""

from sklearn.base import BaseEstimator

__all__ = ["FitInterrupted", "InconsistentVersionWarning"]


class FitInterrupted(KeyboardInterrupt):
    """Ctrl-C during `fit`, after at least one complete sweep.

    The estimator holds the parameters of the last complete sweep, with ``converged_ = False``; with
    ``warm_start=True`` another `fit` continues from there. After a `KeyboardInterrupt` that is not a
    `FitInterrupted` the estimator is unchanged.

    Parameters
    ----------
    estimator : estimator instance
        Estimator whose `fit` was interrupted.

    Attributes
    ----------
    estimator : estimator instance
        Estimator whose `fit` was interrupted.

    Examples
    --------
    >>> from sknbln import NBVCPEstimator
    >>> from sknbln.exceptions import FitInterrupted
    >>> isinstance(FitInterrupted(NBVCPEstimator()), KeyboardInterrupt)
    True
    """

    def __init__(self, estimator: BaseEstimator) -> None:
        super().__init__(estimator)
        self.estimator = estimator

    def __str__(self) -> str:
        return (
            f"{type(self.estimator).__name__}.fit was interrupted. The estimator holds the last complete "
            "sweep, with converged_ = False; set warm_start=True and call fit again to go on from there."
        )


class InconsistentVersionWarning(UserWarning):
    """A pickled estimator is loaded under another version of this library.

    Parameters
    ----------
    estimator_name : str
        Class name of the estimator.
    original_version : str
        Version of this library that wrote the pickle.
    current_version : str
        Version of this library that loads it.

    Attributes
    ----------
    estimator_name, original_version, current_version : str
        As the parameters.

    Examples
    --------
    >>> import warnings
    >>> from sknbln.exceptions import InconsistentVersionWarning
    >>> warnings.simplefilter("error", InconsistentVersionWarning)  # refuse such pickles
    """

    def __init__(self, estimator_name: str, original_version: str, current_version: str) -> None:
        super().__init__(estimator_name, original_version, current_version)
        self.estimator_name = estimator_name
        self.original_version = original_version
        self.current_version = current_version

    def __str__(self) -> str:
        return (
            f"{self.estimator_name} was pickled by sknbln {self.original_version} and is loaded by "
            f"{self.current_version}. Attributes may be missing or mean something else: fit it again, or "
            "load it with the version that wrote it."
        )

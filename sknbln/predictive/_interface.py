"""What posterior predictive draws need of an estimator."""

from abc import ABC, abstractmethod

import numpy as np

from .._known import Known
from .._typing import Seed


class PredictiveModel(ABC):
    """A model of counts that replicates can be drawn from.

    Besides the methods below, a fitted model has these parameters and attributes.
    """

    random_state: Seed
    batch_size: int | None
    n_features_in_: int
    capture_prior_: tuple[float, float] | None  # None without a capture model
    capture_offset_: np.ndarray  # (n_cells,) of the training rows
    _library_size: np.ndarray  # (n_cells,) totals of the training rows
    _known: Known  # their covariates and exposures

    @abstractmethod
    def _params(self):
        """The fitted parameters, a `Params` in log-rates."""

    @abstractmethod
    def _validated(self, X, prior=None):
        """Counts as canonical CSR, with a warning for rows whose totals exceed the M0 of `prior`."""

    @abstractmethod
    def _offset_prior(self):
        """The capture prior of the rows' offsets; None where offsets do not enter."""

    @abstractmethod
    def _given(self, X, covariates, offset, prior=None):
        """Counts as canonical CSR, and the `Known` of their rows; it warns as `_validated` does."""

    @abstractmethod
    def _posterior_draws(self, n_samples, X, rng, *, eta, known=None):
        """`ParameterDraws`, with no offsets (`eta` None), with those that are frozen, or with all.

        X is validated counts, with their `Known`, or None for the training rows.
        """

    def _row_capture(self, X, known=None):
        """Offset, scale and prior precision of each row: for models whose offsets may be free."""
        raise NotImplementedError

    @property
    def _given_totals(self):
        """Whether the model is conditional on the totals of rows."""
        return getattr(self, "observation", "nb") == "multinomial"

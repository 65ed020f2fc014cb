"""Course of a fit."""

from typing import Self

import numpy as np

from .._nbln import NBLNEstimator
from .._typing import Panels
from ..predictive._interface import PredictiveModel
from ..solver.ascent import magnitude
from ..solver.mode import DECREMENT_TOL
from ._common import (
    BLUE,
    GREY,
    ORANGE,
    VERMILLION,
    fitted,
    grid_of_axes,
    legend_inside,
    tidy,
)

#: decrements below this are rounding errors and drawn at this value
_SMALLEST_DECREMENT = 1e-16
#: steps of the running mean of the noisy ELBO
_WINDOW = 25


class ConvergenceDisplay:
    """Course of the objective of a fit and, for NBLN, the Newton decrements of its rows.

    For `NBLNEstimator`, left: the distance of the objective (log-posterior per cell) from its last value,
    the gain of each sweep and the predicted gain of another one, on a logarithmic axis. The dashed line is
    the tolerance: two gains in a row below it end the fit, as does a predicted gain below half of it. The
    objective may fall where a loadings prior is updated, and such falls are marked. Right: the sorted
    Newton decrements of the training rows, with the limit below which a row's mode counts as found. For
    `NBVCPEstimator`: minus the ELBO per step, which is noisy, with its running mean.

    Parameters
    ----------
    objective : ndarray of shape (n_iter + 1,) or (n_iter,)
        ``objective_history_`` or ``loss_curve_``, nats per cell.
    converged : bool
        Whether the fit met its tolerances.
    newton_decrement : ndarray of shape (n_cells,) or None, default=None
        Newton decrements of the training rows, nats. None where `objective` is a loss curve.
    tol : float or None, default=None
        Tolerance of the gain per sweep, as a fraction of the objective's magnitude.
    promised_gain : float or None, default=None
        Predicted gain of another sweep, nats per cell.
    name : str, default=""
        Name of the estimator, for the title.

    Attributes
    ----------
    axes_ : ndarray of shape (1, 2) or (1, 1)
        Axes of the picture.
    figure_ : matplotlib Figure
        Figure of the picture.

    Examples
    --------
    >>> from sknbln import NBLNEstimator
    >>> from sknbln.datasets import make_nbln_counts
    >>> from sknbln.plotting import ConvergenceDisplay
    >>> X = make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=0).data
    >>> model = NBLNEstimator(latent_dim=2, cascade="marginal", random_state=0).fit(X)
    >>> ConvergenceDisplay.from_estimator(model).axes_.shape
    (1, 2)
    """

    def __init__(
        self,
        objective: np.ndarray,
        converged: bool,
        *,
        newton_decrement: np.ndarray | None = None,
        tol: float | None = None,
        promised_gain: float | None = None,
        name: str = "",
    ) -> None:
        self.objective = objective
        self.converged = converged
        self.newton_decrement = newton_decrement
        self.tol = tol
        self.promised_gain = promised_gain
        self.name = name

    @classmethod
    def from_estimator(cls, estimator: PredictiveModel, *, ax: Panels | None = None) -> Self:
        """Draw the course of a fit.

        Parameters
        ----------
        estimator : NBLNEstimator or NBVCPEstimator
            Fitted estimator.
        ax : Figure, Axes, array of Axes or None, default=None
            Where to draw: see :meth:`plot`.

        Returns
        -------
        ConvergenceDisplay
            The display that was drawn.
        """
        model = fitted(cls, estimator)
        name = type(model).__name__
        if isinstance(model, NBLNEstimator):
            display = cls(
                model.objective_history_,
                model.converged_,
                newton_decrement=model.newton_decrement_,
                tol=model.tol_,
                promised_gain=model.promised_gain_,
                name=name,
            )
        else:
            display = cls(model.loss_curve_, model.converged_, name=name)
        return display.plot(ax=ax)

    def plot(self, ax: Panels | None = None) -> Self:
        """Draw the picture.

        Parameters
        ----------
        ax : Figure, Axes, array of Axes or None, default=None
            None for a new figure; a figure, to which axes are added; one axes, which is divided
            where two are needed; or as many axes as the picture needs.

        Returns
        -------
        ConvergenceDisplay
            The display itself.
        """
        sweeps = self.newton_decrement is not None
        size = (9.0, 3.8) if sweeps else (5.6, 3.8)
        self.figure_, self.axes_ = grid_of_axes(ax, 1, 1 + sweeps, size)
        if sweeps:
            _draw_sweeps(self.axes_[0, 0], np.asarray(self.objective), self.tol, self.promised_gain)
            _draw_decrements(self.axes_[0, 1], np.asarray(self.newton_decrement))
            steps, unit = len(self.objective) - 1, "sweeps"
        else:
            _draw_loss(self.axes_[0, 0], np.asarray(self.objective))
            steps, unit = len(self.objective), "steps"
        state = "converged" if self.converged else "NOT converged"
        title = f"{self.name}: {state} after {steps} {unit}".removeprefix(": ")
        self.axes_[0, 0].set_title(title, fontsize="medium")
        for each in self.axes_.flat:
            tidy(each)
        return self


def _draw_sweeps(ax, objective, tol, promised):
    """Distance from the last value, gain of each sweep, and predicted gain of another one."""
    sweep = np.arange(objective.size)
    distance, change = np.abs(objective - objective[-1]), np.diff(objective)
    positive = distance > 0
    ax.plot(sweep[positive], distance[positive], color=BLUE, label="distance from the last value")
    rise, fall = change > 0, change < 0
    ax.plot(sweep[1:][rise], change[rise], "o", color=ORANGE, markersize=4, label="gain of a sweep")
    if fall.any():
        style = dict(color=VERMILLION, markersize=5, markerfacecolor="none")
        label = "fall (loadings prior updated)"
        ax.plot(sweep[1:][fall], -change[fall], "v", label=label, **style)
    if promised is not None and promised > 0:
        style = dict(color=ORANGE, markersize=5, markerfacecolor="none")
        ax.plot([objective.size], [promised], "o", label="promise of another sweep", **style)
    if tol:
        # as in the fit: the magnitude is one nat at least
        smallest = tol * magnitude(objective[-1], 1)
        label = f"tol = {tol:g} of the objective"
        ax.axhline(smallest, color=GREY, linestyle="--", linewidth=1.2, label=label)
    ax.set_yscale("log")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set(xlabel="sweep", ylabel="objective (nats per cell)")
    legend_inside(ax)


def _draw_decrements(ax, decrement):
    """Sorted Newton decrements against the fraction of rows."""
    ordered = np.sort(np.maximum(decrement, _SMALLEST_DECREMENT))
    fraction = np.arange(1, ordered.size + 1) / ordered.size
    style = dict(color=BLUE, drawstyle="steps-mid")
    ax.plot(fraction, ordered, label=f"rows, sorted ({_SMALLEST_DECREMENT:g} or more)", **style)
    label = f"limit {DECREMENT_TOL:g}"
    ax.axhline(DECREMENT_TOL, color=GREY, linestyle="--", linewidth=1.2, label=label)
    above = int(np.sum(decrement > DECREMENT_TOL))
    ax.set_yscale("log")
    ax.set(xlim=(0, 1), ylim=(_SMALLEST_DECREMENT / 3, None))
    ax.set_title(f"mode not found: {above} of {ordered.size} rows", fontsize="medium")
    ax.set(xlabel="fraction of rows", ylabel="Newton decrement (nats)")
    legend_inside(ax)


def _draw_loss(ax, loss):
    """Loss per step and its running mean."""
    step = np.arange(1, loss.size + 1)
    ax.plot(step, loss, color=GREY, linewidth=0.6, alpha=0.8, label="each step")
    if loss.size > _WINDOW:
        mean = np.convolve(loss, np.full(_WINDOW, 1 / _WINDOW), mode="valid")
        middle = step[_WINDOW // 2 : _WINDOW // 2 + mean.size]
        ax.plot(middle, mean, color=BLUE, linewidth=1.8, label=f"mean of {_WINDOW} steps")
    ax.set(xlabel="step", ylabel="minus ELBO (nats per cell)")
    legend_inside(ax)

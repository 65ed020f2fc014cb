"""Capture offsets against their prior."""

from typing import Any, Self

import numpy as np

from .._typing import Axes
from ..predictive._interface import PredictiveModel
from ._common import (
    BLACK,
    BLUE,
    at_least_a_decade,
    fitted,
    legend_inside,
    one_axes,
    show_markers,
    tidy,
)

#: points of the line, which has a corner where it meets 0
_GRID = 400


class CaptureDisplay:
    r"""Capture offsets of the training rows against their library sizes, with the capture prior.

    The line is the location of the prior of a cell with library size L, :math:`\log M_0 - \log L`, and
    the band is one :math:`\sigma_M` to each side, both cut off at 0, as the prior is. The counts fix
    the offsets relative to each other, and the prior fixes their level: points follow the line where
    library sizes alone explain the offsets, and leave it where a cell's composition explains its library
    size. Offsets at 0 are of cells with about M0 counts or more.

    Parameters
    ----------
    library_size : ndarray of shape (n_cells,)
        Row totals. Rows without counts are drawn at 1.
    capture_offset : ndarray of shape (n_cells,)
        Capture offsets, nats.
    capture_prior : tuple (log_M0, sigma_M)
        Their prior.

    Attributes
    ----------
    ax_ : matplotlib Axes
        Axes of the picture.
    figure_ : matplotlib Figure
        Figure of the picture.

    Examples
    --------
    >>> from sknbln import NBVCPEstimator
    >>> from sknbln.datasets import make_nbvcp_counts
    >>> from sknbln.plotting import CaptureDisplay
    >>> X = make_nbvcp_counts(n_cells=150, n_genes=24, random_state=0).data
    >>> model = NBVCPEstimator(random_state=0).fit(X)
    >>> display = CaptureDisplay.from_estimator(model)
    >>> display.capture_offset.shape
    (150,)
    """

    def __init__(
        self,
        library_size: np.ndarray,
        capture_offset: np.ndarray,
        capture_prior: tuple[float, float],
    ) -> None:
        self.library_size = library_size
        self.capture_offset = capture_offset
        self.capture_prior = capture_prior

    @classmethod
    def from_estimator(cls, estimator: PredictiveModel, *, ax: Axes | None = None) -> Self:
        """Draw the capture offsets of a fit.

        Parameters
        ----------
        estimator : NBLNEstimator or NBVCPEstimator
            Fitted estimator. Frozen offsets are drawn with the prior of the source.
        ax : matplotlib Axes or None, default=None
            Where to draw; None for a new figure.

        Returns
        -------
        CaptureDisplay
            The display that was drawn.

        Raises
        ------
        ValueError
            When the fit has no capture model.
        """
        estimator = fitted(cls, estimator)
        prior = estimator.capture_prior_
        # frozen offsets have the source's prior, those of a model given totals none
        if "eta" in getattr(estimator, "frozen_params_", ()) or estimator._given_totals:
            prior = estimator._offset_prior()
        if prior is None:
            raise ValueError(
                f"{cls.__name__} draws capture offsets against their prior; found an "
                f"{type(estimator).__name__} without a capture model. Fit with capture_efficiency='auto' or "
                "a pair (log_M0, sigma_M), and with observation='nb' or 'poisson'."
            )
        return cls(estimator._library_size, estimator.capture_offset_, prior).plot(ax=ax)

    def plot(self, ax: Axes | None = None) -> Self:
        """Draw the picture.

        Parameters
        ----------
        ax : matplotlib Axes or None, default=None
            Where to draw; None for a new figure.

        Returns
        -------
        CaptureDisplay
            The display itself.
        """
        self.figure_, self.ax_ = _, ax = one_axes(ax, (5.2, 4.2))
        size = np.maximum(self.library_size, 1.0)
        n = size.size
        style: dict[str, Any] = dict(
            s=float(np.clip(6000 / n, 3, 22)), alpha=0.4, linewidths=0, rasterized=n > 5000
        )
        ax.scatter(size, self.capture_offset, color=BLACK, label=f"cells ({n})", **style)
        log_m0, sigma = self.capture_prior
        limits = at_least_a_decade((size.min() / 1.1, size.max() * 1.1))
        grid = np.geomspace(limits[0], limits[1], _GRID)
        low, centre, high = (
            np.maximum(log_m0 + shift - np.log(grid), 0.0) for shift in (-sigma, 0.0, sigma)
        )
        band: dict[str, Any] = dict(color=BLUE, alpha=0.2, linewidth=0)
        ax.plot(grid, centre, color=BLUE, label="prior, log M0 - log L")
        ax.fill_between(grid, low, high, label="one sigma_M to each side", **band)
        ax.set(
            xscale="log",
            xlim=limits,
            xlabel="library size L, counts",
            ylabel="capture offset, nats",
        )
        title = f"capture prior: log M0 = {log_m0:.3g}, sigma_M = {sigma:.3g}"
        ax.xaxis.set_minor_formatter("")  # powers of ten are enough
        ax.set_title(title, fontsize="medium")
        show_markers(legend_inside(ax), 20)
        tidy(ax)
        return self

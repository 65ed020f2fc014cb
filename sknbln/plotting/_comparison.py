"""Differences of held-out log-likelihood between models."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from .._typing import Axes
from ..model_selection import Comparison
from ._common import BLUE, GREY, one_axes, tidy


class ComparisonDisplay:
    """Differences of the held-out log-likelihood to the best model, with their standard errors.

    The best model is at the top, at 0. A bar is one standard error of the paired difference on either side.

    Parameters
    ----------
    difference : array-like of shape (n_models,)
        Score minus that of the best, nats per row, the best first.
    standard_error : array-like of shape (n_models,)
        Standard errors of the differences, nats per row.
    names : sequence of str
        Names of the models.

    Attributes
    ----------
    errorbar_ : matplotlib ErrorbarContainer
        Points and bars.
    ax_ : matplotlib Axes
        Axes of the picture.
    figure_ : matplotlib Figure
        Figure of the picture.

    Examples
    --------
    >>> from sknbln import NBLNEstimator, NBVCPEstimator
    >>> from sknbln.datasets import make_nbln_counts
    >>> from sknbln.model_selection import compare
    >>> from sknbln.plotting import ComparisonDisplay
    >>> X = make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=0).data
    >>> models = {
    ...     "independent": NBVCPEstimator(random_state=0),
    ...     "factors": NBLNEstimator(2, random_state=0),
    ... }
    >>> result = compare(models, X, cv=2, random_state=0)
    >>> display = ComparisonDisplay.from_comparison(result)
    >>> [label.get_text() for label in display.ax_.get_yticklabels()]
    ['factors', 'independent']
    """

    def __init__(
        self, difference: ArrayLike, standard_error: ArrayLike, names: Sequence[str]
    ) -> None:
        self.difference = difference
        self.standard_error = standard_error
        self.names = names

    @classmethod
    def from_comparison(cls, comparison: Comparison, *, ax: Axes | None = None) -> Self:
        """Draw a comparison.

        Parameters
        ----------
        comparison : Comparison
            What :func:`sknbln.model_selection.compare` returned.
        ax : Axes or None, default=None
            Where to draw; a new figure if None.

        Returns
        -------
        ComparisonDisplay
            The display that was drawn.

        Raises
        ------
        TypeError
            If it is not a `Comparison`.
        """
        if not isinstance(comparison, Comparison):
            raise TypeError(
                "ComparisonDisplay draws a Comparison: expected what sknbln.model_selection.compare "
                f"returned; found {type(comparison).__name__}."
            )
        table = comparison.table
        difference, error = table["difference"], table["difference_standard_error"]
        names = [str(name) for name in table.index]
        return cls(difference.to_numpy(), error.to_numpy(), names).plot(ax=ax)

    def plot(self, ax: Axes | None = None) -> Self:
        """Draw the picture.

        Parameters
        ----------
        ax : Axes or None, default=None
            Where to draw; a new figure if None.

        Returns
        -------
        ComparisonDisplay
            The display itself.
        """
        difference, error = np.asarray(self.difference), np.asarray(self.standard_error)
        place = np.arange(difference.size)
        self.figure_, self.ax_ = one_axes(ax, (6.4, 1.2 + 0.55 * difference.size))
        ax = self.ax_
        ax.axvline(0, color=GREY, linestyle="--", linewidth=1.2)
        style: dict[str, Any] = dict(fmt="o", color=BLUE, capsize=3)
        self.errorbar_ = ax.errorbar(difference, place, xerr=error, **style)
        for at, value, own in zip(place[1:], difference[1:], error[1:], strict=True):
            ax.annotate(
                _in_words(value, own),
                (value, at),
                (0, 7),
                textcoords="offset points",
                ha="center",
                fontsize="small",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            )
        ax.set_yticks(place, self.names)
        ax.set_ylim(difference.size - 0.5, -0.5)
        ax.margins(x=0.12)
        ax.set(xlabel="difference to the best, held out (nats per row)")
        tidy(ax)
        return self


def _in_words(value, error):
    """A difference with its standard error, to two digits of the error."""
    known = np.isfinite(error) and error > 0
    digits = max(0, 1 - int(np.floor(np.log10(error)))) if known else 2
    return f"{value:.{digits}f} ± {error:.{digits}f}".replace("-", "\N{MINUS SIGN}")

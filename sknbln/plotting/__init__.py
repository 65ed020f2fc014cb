"""Pictures of fitted estimators, as Display classes like those of scikit-learn.

Each has ``from_estimator(estimator, ...)``, or ``from_test``, ``from_network`` or ``from_comparison``, which
computes and draws, and ``plot()``, which draws again from what was computed. matplotlib is imported when
something is drawn, not before (``pip install sknbln[plot]``).
"""

from ._calibration import CalibrationDisplay
from ._capture import CaptureDisplay
from ._comparison import ComparisonDisplay
from ._convergence import ConvergenceDisplay
from ._corner import CompositionalCornerDisplay
from ._correlation import CorrelationDisplay
from ._count_corner import CountCornerDisplay
from ._embedding import EmbeddingDisplay
from ._grid import CompositionalGridDisplay
from ._loadings import LoadingsSpectrumDisplay
from ._pairs import NetworkDisplay, VolcanoDisplay
from ._ppc import PPCDisplay

__all__ = [
    "CalibrationDisplay",
    "CaptureDisplay",
    "ComparisonDisplay",
    "CompositionalCornerDisplay",
    "CompositionalGridDisplay",
    "ConvergenceDisplay",
    "CorrelationDisplay",
    "CountCornerDisplay",
    "EmbeddingDisplay",
    "LoadingsSpectrumDisplay",
    "NetworkDisplay",
    "PPCDisplay",
    "VolcanoDisplay",
]

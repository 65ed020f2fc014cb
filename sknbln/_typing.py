"""Types that recur in the signatures of the public API."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import FigureBase
    from networkx import Graph
else:  # extras, which need not be installed: hints resolve without them
    AnnData = Axes = Colormap = FigureBase = Graph = Any


class StoredCounts(Protocol):
    """Counts that are read block by block: a dataset of h5py, zarr or AnnData, or a Dask array."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def __getitem__(self, rows: slice, /) -> Any: ...


class Splitter(Protocol):
    """A splitter of scikit-learn."""

    def split(self, X: Any, y: Any = None, groups: Any = None) -> Iterable[tuple[Any, Any]]: ...


#: a matrix of counts, a row per cell
CountsLike: TypeAlias = ArrayLike | sp.spmatrix | sp.sparray | pd.DataFrame | StoredCounts
#: known covariates of the rows
Covariates: TypeAlias = ArrayLike | pd.DataFrame
#: what `sklearn.utils.check_random_state` takes
Seed: TypeAlias = int | np.random.RandomState | None

CaptureEfficiency: TypeAlias = (
    Literal["auto", "human", "mouse", "yeast", "ecoli"] | tuple[float, float] | None
)
#: scales of correlations, and which pairs have small p-values
Scale: TypeAlias = Literal["compositional", "log_rate", "expression"]
Alternative: TypeAlias = Literal["two-sided", "greater", "less"]
#: options of replicated counts
Level: TypeAlias = Literal["marginal", "library_anchored", "per_cell"]
Capture: TypeAlias = Literal["posterior", "prior"]
Latent: TypeAlias = Literal["posterior", "mode"]
#: where a picture of several panels is drawn
Panels: TypeAlias = FigureBase | Axes | np.ndarray | Sequence[Axes]

F = TypeVar("F", bound=Callable[..., Any])


def keeping_hints(decorator: Callable[..., Any]) -> Callable[[F], F]:
    """An untyped decorator, such as scikit-learn's, for type checkers: what it decorates keeps its type."""
    return decorator

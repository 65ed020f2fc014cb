"""Simulated count matrices with their truth, and one small real data set."""

from ._real import load_immune_cells
from ._simulate import make_nbln_counts, make_nbvcp_counts

__all__ = ["load_immune_cells", "make_nbln_counts", "make_nbvcp_counts"]

"""The maximum of an NBLN fit: its ascents over a sample of many rows, and over all."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from . import _opening
from ._blocks import Rows
from ._capture import OffsetPosterior
from ._counts import CountHistogram
from ._known import Known
from ._passes import Sweeper
from ._rows import RowBatches, in_single, sample_of_rows
from .solver.ascent import LOOK_SWEEPS, Tolerance, ascend
from .solver.gauge import LEAST_ROWS, noise_edges
from .solver.objective import Objective
from .solver.params import Params
from .solver.start import resumed


class Table(NamedTuple):
    """Counts, the offsets of their rows by the source, and what else is known of the rows."""

    X: Rows
    offsets: OffsetPosterior
    known: Known

    def chosen(self, positions):
        """Some of the rows, in memory."""
        X, offsets, known = (part.chosen(positions) for part in self)
        return Table(X.in_memory(), offsets, known)


@dataclass(frozen=True, kw_only=True)
class Maximization:
    """What all ascents of one fit share."""

    source: Any  # `NBVCPPosterior` of the genes
    total: Any  # what a dispersion adds to a log-rate's variance, T(log r)
    priors: tuple  # of mean and log r, the coupling and other priors, as `Objective` takes them
    free: Params  # of bool
    column_prior: Callable | None
    tol: Tolerance
    latent_dim: int | None  # None finds it
    selects: bool  # whether columns of noise are dropped
    observation: str
    row_capture: Callable  # of X, known and offsets: offset, scale and precision of each row
    batch_size: int | None
    max_iter: int
    watch: Any

    def sample(self, table, rng):
        """The rows that are fitted first: all, or a sample of many."""
        positions = sample_of_rows(table.X.shape[0], rng)
        return table if positions is None else table.chosen(positions)

    def anew(self, table, some, loadings, rng):
        """The `Outcome`, the `RowBatches` that it is over, and what decided which columns are noise.

        Some rows are fitted first, from these loadings, and all rows go on from there.
        """
        outcome, rows, of_columns = self._opened(some, loadings, rng)
        if some is not table:
            if outcome.interrupted:
                raise KeyboardInterrupt  # no sweep over all rows is complete
            stages = outcome.stages
            outcome, rows = self.go_on(table, outcome.point.x, outcome.objective.split)
            outcome = outcome._replace(stages=[*stages, *outcome.stages])
        return self._of_all_columns(outcome, table), rows, of_columns

    def go_on(self, table, previous, split):
        """The `Outcome` and its rows, from the coordinates of a fit and its split of overdispersion."""
        # the rest of a fit is a few sweeps, and of few counts compiling takes longer
        candidates, rows = self._candidates(table, previous.loadings, single=False)
        objective, start = candidates[0]
        if split is not None:
            objective = objective.with_split(split)
        start = resumed(start, previous, self.free)
        outcome = self._climb([(objective, start)], table, column_prior=self.column_prior)
        return self._of_all_columns(outcome, table), rows

    def _of_all_columns(self, outcome, table):
        """With columns that are not real as zeros, where the number of factors is given."""
        if self.latent_dim is None:
            return outcome
        return outcome.with_columns(min(self.latent_dim, *table.X.shape))

    def start(self, table, rng):
        """Loadings at the start, and the `rank_diagnostics_`: how their number was found."""
        most = min(table.X.shape)
        if self.latent_dim is not None:
            most = min(most, self.latent_dim)
        k, groups, diagnostics = most, np.zeros((table.X.shape[1], 0)), None
        if self.selects:
            k, groups, diagnostics = _opening.number_of_factors(*table, self.source, most, rng)
        loadings = _opening.start_loadings(*table, self.source, k, groups, self.batch_size, rng)
        return loadings, diagnostics

    def _opened(self, table, loadings, rng):
        """The `Outcome`, its rows, and what decided which columns are noise, if that was looked for.

        Of two starts the better is taken: where there are many counts, by some of the rows.
        """
        single = in_single(*table.X.shape)
        candidates, rows = self._candidates(table, loadings, single)
        if len(candidates) > 1:
            positions = _opening.rows_to_look_at(*table.X.shape, rng)
            if positions is not None:
                some = table.chosen(positions)
                look, _ = self._candidates(some, loadings, single)
                look = self._climb(look, some, max_iter=min(LOOK_SWEEPS + 1, self.max_iter))
                if look.interrupted:
                    raise KeyboardInterrupt  # no sweep over all rows is complete
                candidates = [c for c in candidates if c[0].split == look.objective.split]
        edges, n_cells = None, table.known.total_weight
        if self.selects and np.any(loadings) and n_cells >= LEAST_ROWS:
            edges = noise_edges(table.X.shape[1], n_cells)
        outcome = self._climb(candidates, table, edges=edges, column_prior=self.column_prior)
        if outcome.information is None:
            return outcome, rows, None
        return outcome, rows, {"column_information": outcome.information, "noise_edge": edges[-1]}

    def _candidates(self, table, loadings, single):
        """Objectives over rows, with the coordinates of the start under each, and the rows."""
        X, offsets, known = table
        capture = self.row_capture(X, known, offsets=offsets)
        rows = RowBatches(X, *capture, batch_size=self.batch_size, known=known)
        sweeper = Sweeper(rows, loadings.shape[1], self.tol.share, single)
        objective = Objective(sweeper, CountHistogram(X, known.weight), *self.priors)
        return _opening.candidates(
            objective, self.source, self.total, loadings, self.free, self.observation
        ), rows

    def _climb(self, candidates, table, **options):
        has_columns = bool(np.any(candidates[0][1].loadings))
        climb = partial(ascend, max_iter=self.max_iter, tol=self.tol, watch=self.watch)
        free = self.free._replace(loadings=has_columns)
        return climb(candidates, free=free, n_cells=table.known.total_weight, **options)

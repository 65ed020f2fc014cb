"""The line search of an ascent: a move that lowers the objective is shortened gene by gene."""

import numpy as np

from .params import Params, moved

SHORTEST, ALIKE = 0.1, 0.35  # lengths of moves that went too far: of a gene, of all genes
KEPT = 0.7  # most of what a move promised that is kept of it


def change(x, step):
    """Coordinates after a step, and their changes."""
    new = moved(x, step)
    with np.errstate(invalid="ignore"):  # inf - inf of blocks that are not free
        return new, Params(*(a - b for a, b in zip(new, x, strict=True)))


def search(evaluate, point, step, cuts):
    """The first point along the step that does not lower the objective, and the move to it; or None, None.

    What went too far is shortened gene by gene.
    """
    for _ in range(cuts):
        x, move = change(point.x, step)
        trial = evaluate(x)
        if np.isfinite(trial.value) and trial.value >= point.value - point.rounding:
            return trial, move
        step = shortened(move, point.gradient, trial.gradient)
    return None, None


def shortened(move, before, after):
    """The move with a length of its own for each gene, by the slopes along it at its two ends.

    The lengths are those at which the slopes would be 0 if they were linear, at least `SHORTEST`. At given
    scores the genes are independent: most of those with many counts can keep their moves, while those with
    few, whose likelihood is far from quadratic, went too far. All lengths together promise at most `KEPT` of
    what the move did, so that a few cuts reach a move that is small. Where they promise next to nothing,
    because genes that lose are not shortened, all are shortened alike: what is tried next has to rise.
    """
    move = Params(*(np.nan_to_num(a) for a in move))  # inf - inf where a block is not free
    with np.errstate(all="ignore"):  # a move may end beyond all numbers: its length is the shortest
        slope, end = (_by_gene(move, gradient) for gradient in (before, after))
        turn = slope / (slope - end)
        length = np.clip(np.where(turn > 0, turn, 1.0), SHORTEST, 1.0)
    length = np.where(np.isfinite(end), length, SHORTEST)
    promised, kept = float(np.sum(slope)), float(np.sum(length * slope))
    if promised <= 0 or kept < SHORTEST * promised:
        length = np.full(length.shape, ALIKE)
    elif kept > KEPT * promised:
        length *= KEPT * promised / kept
    return Params(*(a * (length if a.ndim == 1 else length[:, None]) for a in move))


def _by_gene(move, gradient):
    """The product of a move and a gradient of each gene, (n_genes,)."""
    products = (np.where(m != 0, m * g, 0.0) for m, g in zip(move, gradient, strict=True))
    return sum(p if p.ndim == 1 else p.sum(1) for p in products)

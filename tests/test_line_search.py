"""The line search: moves that went too far are shortened gene by gene, and always end uphill."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sknbln.solver.line_search import KEPT, SHORTEST, search, shortened
from sknbln.solver.params import NOISE_RANGE, Params


def by_gene(b, far):
    """Something of each gene times a block of parameters."""
    return b * (far if b.ndim == 1 else far[:, None])


@pytest.mark.parametrize("beyond", [False, True])
def test_genes_that_went_too_far_are_shortened_alone(beyond):
    """Independent genes, each quadratic along its move, which went 2 to 5 times as far as its optimum.

    Each then goes to its optimum, and one that went beyond all numbers a tenth of the way.
    """
    rng = np.random.default_rng(0)
    far = rng.uniform(2.0, 5.0, 40)
    move = Params(*(rng.standard_normal(s) for s in ((40,), (40, 2), (40,), (40,), (40, 0))))
    after = Params(*(by_gene(b, 1 - far) for b in move))  # at the start the gradient is the move
    if beyond:
        after.mean[0], far[0] = np.nan, 1 / SHORTEST
    for block, whole in zip(shortened(move, move, after), move, strict=True):
        assert_allclose(block, by_gene(whole, 1 / far))


def test_a_move_that_went_too_far_keeps_a_share_of_its_promise():
    """However few genes went too far, so that cuts end."""
    far = np.r_[4.0, np.ones(39)]
    move = Params(np.ones(40), np.zeros((40, 0)), np.zeros(40), np.zeros(40))
    lengths = shortened(move, move, move._replace(mean=1 - far)).mean
    assert_allclose(lengths.sum(), KEPT * 40)
    assert_allclose(lengths / lengths[-1], 1 / far)


def test_genes_that_lose_do_not_turn_a_move_downhill():
    """``f = -a + 2 b - 51 b^2`` rises from 0 along (1, 1), and falls where b alone is cut to a tenth."""

    class At:
        rounding = 0.0

        def __init__(self, x):
            a, b = x.mean
            self.x, self.value = x, -a + 2 * b - 51 * b**2
            self.gradient = x._replace(mean=np.array([-1.0, 2 - 102 * b]))

    zero = Params(np.zeros(2), np.zeros((2, 0)), np.zeros(2), np.zeros(2))
    found, move = search(At, At(zero), zero._replace(mean=np.ones(2)), 12)
    assert found.value > 0
    assert_array_equal(found.x.mean, move.mean)


def test_genes_at_their_bounds_do_not_count_for_the_lengths():
    """d is at its floor and pulls further; the mean of the same gene went 30 times too far."""
    d = np.r_[NOISE_RANGE[0], np.ones(9)]

    class At:
        rounding = 0.0

        def __init__(self, x):
            self.x, self.value = x, 30 * x.mean[0] - 450 * x.mean[0] ** 2 - 1e3 * x.noise[0]
            self.gradient = Params(
                np.r_[30 - 900 * x.mean[0], np.zeros(9)],
                np.zeros((10, 0)),
                np.r_[-1e3, np.zeros(9)],
                np.full(10, np.nan),  # log r is infinite, and not free
            )

    start = Params(np.zeros(10), np.zeros((10, 0)), d, np.full(10, np.inf))
    step = start._replace(
        mean=np.ones(10), noise=np.r_[-0.75, np.zeros(9)], dispersion=np.zeros(10)
    )
    found, move = search(At, At(start), step, 3)
    assert 0 < found.x.mean[0] < 1 / 15
    assert_array_equal(move.noise, 0.0)

"""The ascent: it is monotone, reports how it ended, and leaves frozen blocks alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy import optimize
from scipy.stats import ortho_group

from sknbln._counts import CountHistogram
from sknbln._passes import Sweeper
from sknbln._rows import RowBatches
from sknbln.datasets import make_nbln_counts
from sknbln.solver import ascent
from sknbln.solver.ascent import Tolerance, ascend
from sknbln.solver.coupling import MarginalCoupling
from sknbln.solver.gauge import noise_edges
from sknbln.solver.metric import product
from sknbln.solver.objective import Objective
from sknbln.solver.params import (
    LOG_DISPERSION_RANGE,
    NOISE_RANGE,
    NOISE_UNIT,
    GaussianPrior,
    Params,
    noise_coordinate,
    noise_variance,
)

from .reference import small
from .reference.ascent import BLOCKS, K, N, problem
from .reference.coupling import total
from .reference.csr import csr
from .reference.watched import Watched

ALL = Params(True, True, True, True)


def run(evaluate, start, free=ALL, *, tol=1e-6, max_iter=100, **options):
    if not hasattr(evaluate, "refine"):  # a function around an objective
        evaluate.refine = lambda: False
    return ascend([(evaluate, start)], free, n_cells=N, tol=tol, max_iter=max_iter, **options)


def largest_gradient(point, free=ALL):
    blocks = zip(point.gradient, free, strict=True)
    return max(float(np.max(np.abs(b), initial=0.0)) for b, f in blocks if f)


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_monotone_from_bad_starts(seed, coupled):
    free = ALL if not coupled else Params(True, True, True, False)
    evaluate, start = problem(seed, MarginalCoupling(total()) if coupled else None)
    start = start._replace(dispersion=np.minimum(start.dispersion, 0.0)) if coupled else start
    outcome = run(evaluate, start, free, max_iter=500)
    history = np.array(outcome.history)
    assert np.all(np.diff(history) >= -2 * outcome.point.rounding / N)
    assert history[-1] > history[0] + 1.0
    assert outcome.converged, outcome.reason
    assert outcome.point.sums.n_unconverged == 0
    # the history is of the objective, per cell, and the outcome is its last point
    assert_allclose(history[0] * N, evaluate(start).value, rtol=1e-10)
    assert outcome.point.value == history[-1] * N
    assert len(history) == outcome.n_iter + 1


def test_scales_that_run_away_stop_at_their_bounds():
    """Without priors eight Poisson-like cells drive some d to nothing and some r to infinity."""
    evaluate, start = problem(0)
    evaluate.prior_log_r = GaussianPrior.flat(small.N_GENES)
    free = Params(False, False, True, True)
    params = run(evaluate, start, free, tol=1e-9, max_iter=60).point.x
    for values, (low, high) in (
        (params.noise, NOISE_RANGE),
        (params.dispersion, LOG_DISPERSION_RANGE),
    ):
        assert np.all((values >= low) & (values <= high))
    assert np.any(params.noise == NOISE_RANGE[0]) or np.any(
        params.dispersion == LOG_DISPERSION_RANGE[1]
    )


def test_noise_reaches_its_floor_in_one_step():
    """Counts that vary less than Poisson: d = NOISE_UNIT is log 2 from nothing, less than a step is long."""
    G = small.N_GENES
    X = csr(np.full((N, G), 30.0))
    flat = GaussianPrior.flat(G)
    evaluate = Objective(
        Sweeper(RowBatches(X, np.zeros(N), np.zeros(N)), K), CountHistogram(X), flat, flat
    )
    start = Params(
        np.full(G, np.log(30.0)),
        np.zeros((G, K)),
        noise_coordinate(np.full(G, NOISE_UNIT)),
        np.full(G, np.inf),
    )
    outcome = run(evaluate, start, Params(False, False, True, False))
    assert_array_equal(outcome.point.x.noise, NOISE_RANGE[0])
    first = run(evaluate, start, Params(False, False, True, False), max_iter=1)
    assert_array_equal(first.point.x.noise, NOISE_RANGE[0])
    assert_allclose(noise_variance(first.point.x), 1e-6, rtol=1e-10)
    # at the floor the gradient pulls further, and nothing moves: that is an optimum
    assert np.all(outcome.point.gradient.noise < 0)
    assert outcome.converged and outcome.n_iter <= 3
    assert outcome.point.value == first.point.value


def test_optimum_is_that_of_scipy():
    """The same objective handed to SciPy's L-BFGS from the same start."""
    evaluate, start = problem(5)
    free = Params(True, False, False, True)  # concave enough to have one optimum
    start = start._replace(
        loadings=0.3 * start.loadings,
        noise=noise_coordinate(np.full(small.N_GENES, np.exp(-2.0))),
    )

    def negative(v):
        point = evaluate(start._replace(mean=v[: small.N_GENES], dispersion=v[small.N_GENES :]))
        return -point.value, -np.r_[point.gradient.mean, point.gradient.dispersion]

    outcome = run(evaluate, start, free, tol=1e-10)
    found = optimize.minimize(
        negative, np.r_[start.mean, start.dispersion], jac=True, method="L-BFGS-B", tol=1e-12
    )
    assert_allclose(outcome.point.value, -found.fun, rtol=0, atol=1e-6)
    assert_allclose(np.r_[outcome.point.x.mean, outcome.point.x.dispersion], found.x, atol=2e-3)
    assert largest_gradient(outcome.point, free) < 1e-3


@pytest.mark.parametrize(
    "free",
    [
        Params(True, False, False, False),
        Params(False, True, False, False),
        Params(False, False, True, False),
        Params(False, False, False, True),
        Params(False, True, True, False),
        Params(True, False, True, True),
    ],
    ids=lambda f: "+".join(n for n, v in zip(BLOCKS, f, strict=True) if v),
)
def test_blocks_that_are_not_free_keep_their_bits(free):
    evaluate, start = problem(6)
    outcome = run(evaluate, start, free, max_iter=4)
    assert outcome.point.value > evaluate(start).value
    for name, moved in zip(BLOCKS, free, strict=True):
        before, after = getattr(start, name), getattr(outcome.point.x, name)
        assert np.all(before != after) if moved else np.array_equal(before, after), name


def test_nothing_free_is_an_optimum():
    evaluate, start = problem(6)
    outcome = run(evaluate, start, Params(False, False, False, False))
    assert outcome.converged
    for before, after in zip(start, outcome.point.x, strict=True):
        assert_array_equal(before, after)


@pytest.mark.parametrize("noise", [0.0, noise_coordinate(0.1)], ids=["no noise", "noise"])
def test_poisson_counts_and_no_noise_stay(noise):
    """Poisson counts (``log_r = inf``) and no noise (``log_noise = 0``) are not free, and stay.

    Without noise there are no loadings either: that is the independent-gene model.
    """
    evaluate, start = problem(7)
    evaluate.prior_log_r = GaussianPrior.flat(small.N_GENES)
    start = start._replace(
        loadings=(noise > 0) * start.loadings,
        noise=np.full(small.N_GENES, noise),
        dispersion=np.full(small.N_GENES, np.inf),
    )
    outcome = run(evaluate, start, Params(True, bool(noise > 0), False, False), max_iter=5)
    assert_array_equal(outcome.point.x.noise, noise)
    assert_array_equal(outcome.point.x.dispersion, np.inf)
    assert outcome.point.value > evaluate(start).value


def test_what_watches_may_stop_the_ascent():
    evaluate, start = problem(8)
    watch = Watched(lambda o: o.n_iter == 2)
    outcome = run(evaluate, start, tol=0.0, watch=watch)
    assert outcome.stopped and not outcome.converged and not outcome.interrupted
    assert outcome.reason == "a callback stopped it"
    assert outcome.n_iter == watch.begun == 2
    two = run(evaluate, start, tol=0.0, max_iter=2)
    assert_allclose(outcome.point.x.mean, two.point.x.mean, rtol=1e-9)


def test_max_iter_is_kept_and_reported():
    evaluate, start = problem(8)
    seen = []
    outcome = run(
        evaluate,
        start,
        max_iter=3,
        tol=0.0,
        watch=Watched(lambda o: seen.append((o.n_iter, o.point))),
    )
    assert not outcome.converged
    assert outcome.reason == "max_iter=3 sweeps were done"
    assert outcome.n_iter == 3
    assert len(outcome.history) == 4
    assert [i for i, _ in seen] == [1, 2, 3]
    assert seen[-1][1] is outcome.point
    assert_allclose(outcome.gain, outcome.history[-1] - outcome.history[-2], rtol=1e-8)


@pytest.mark.parametrize("tol", [1e-2, 1e-3, 1e-5])
def test_small_gains_stop_it(tol, monkeypatch):
    """Either the next step promises less than half the tolerance, or two sweeps in a row gained less."""
    evaluate, start = problem(8)
    promises, next_step = [], ascent._next_step

    def recorded(point, memory, free):
        step, promised = next_step(point, memory, free)
        promises.append((point.value, promised / small.N_CELLS))
        return step, promised

    monkeypatch.setattr(ascent, "_next_step", recorded)
    outcome = run(evaluate, start, tol=tol)
    # where the memory promises little the metric is asked too, and the larger promise counts
    values = np.array([v for v, _ in promises])
    promises = np.array([p for _, p in promises])
    promises = [
        promises[np.isclose(values, v * small.N_CELLS, rtol=1e-12)].max() for v in outcome.history
    ]
    assert outcome.promised == promises[-1]
    bound = tol * np.maximum(np.abs(outcome.history[:-1]), 1.0)
    gains = np.diff(outcome.history)
    little = gains < bound
    twice = little & np.r_[False, little[:-1]]
    quasi_newton = np.arange(1, outcome.n_iter + 1) > ascent.PLAIN_SWEEPS
    stop = twice | (quasi_newton & (np.array(promises[1:]) < 0.5 * bound))
    assert outcome.converged and f"tol={tol:g}" in outcome.reason
    assert ("two sweeps" in outcome.reason) == twice[-1]
    assert np.flatnonzero(stop).tolist() == [outcome.n_iter - 1]
    assert outcome.gain == pytest.approx(gains[-1], rel=1e-6)


def test_a_promise_is_what_a_step_gains_near_the_optimum():
    """The promise is half the slope along the step; coordinates at the end of their range promise nothing."""
    evaluate, start = problem(9)
    outcome = run(evaluate, start, tol=1e-7, max_iter=300)
    best = run(evaluate, outcome.point.x, tol=1e-10, max_iter=300).point.value
    params = outcome.point.x
    moved = params._replace(mean=params.mean + 0.01)
    point = evaluate(moved)
    _, promised = ascent._next_step(point, ascent._Memory(), Params(True, False, False, False))
    assert 0.3 < promised / (best - point.value) < 1.5
    floor = params._replace(noise=np.full(small.N_GENES, NOISE_RANGE[0]))
    point = evaluate(floor)
    gradient = point.gradient._replace(noise=np.full(small.N_GENES, -1e3))
    point = point._replace(gradient=gradient)
    only_noise = Params(False, False, True, False)
    assert ascent._next_step(point, ascent._Memory(), only_noise)[1] == 0.0


def scaled(evaluate, factor, constant=0.0):
    """The objective times a factor, as for that many times the rows, plus a constant."""

    def function(x):
        point = evaluate(x)
        columns = point.metric.columns
        columns = columns._replace(
            observed=tuple(factor * a for a in columns.observed),
            complete=tuple(factor * a for a in columns.complete),
            precision=factor * columns.precision,
            lengths=factor * columns.lengths,
        )
        parts = {n: factor * a for n, a in point.metric._asdict().items() if n != "columns"}
        return point._replace(
            value=factor * point.value + constant,
            gradient=Params(*(factor * g for g in point.gradient)),
            metric=point.metric._replace(**parts, columns=columns),
        )

    return function


def test_tol_is_a_fraction_of_the_objectives_magnitude():
    """The same objective in other units takes the same path and stops at the same sweep."""
    evaluate, start = problem(8)
    plain = run(evaluate, start, tol=1e-4)
    large = run(scaled(evaluate, 1000.0), start, tol=1e-4)
    assert plain.converged and large.converged
    assert plain.n_iter == large.n_iter < 100
    assert_allclose(large.history, 1000.0 * np.array(plain.history), rtol=1e-6)
    assert "the next sweep promises less" in large.reason
    assert large.promised < 0.5 * 1e-4 * abs(large.history[-2])
    # with an absolute tolerance it would have gone on
    assert large.promised > 0.5 * 1e-4 and np.diff(large.history)[-1] > 1e-4


def test_a_tolerance_for_each_parameter():
    """The larger of the two counts, and parameters that are held do not."""
    evaluate, start = problem(8)
    n = sum(block.size for block in start)
    for each in (1e-4, 0.1):
        found = run(evaluate, start, tol=Tolerance(0.0, each))
        assert found.converged and found.promised * N < each * n
        assert_allclose(found.tol, each * n / max(abs(found.point.value), N))
        assert found.n_iter == run(evaluate, start, tol=Tolerance(1e-9, each)).n_iter
    point = evaluate(start)
    relative = Tolerance(0.0, 1.0).relative(point, HELD_DISPERSION, N)
    assert_allclose(relative * max(abs(point.value), N), n - start.dispersion.size)
    assert Tolerance(0.01).relative(point, ALL, N) == 0.01


def test_tol_is_of_one_nat_where_the_objective_is_about_zero():
    evaluate, start = problem(8)
    best = run(evaluate, start, tol=1e-9, max_iter=300).point.value
    outcome = run(scaled(evaluate, 1.0, -best), start, tol=1e-4)
    gains = np.diff(outcome.history)
    assert outcome.converged and abs(outcome.history[-2]) < 1.0
    # as with a magnitude of 1; relative to its own, which is about 0, it would have gone on
    one = run(scaled(evaluate, 1.0, 1.0 - best), start, tol=1e-4)
    assert outcome.n_iter == one.n_iter
    assert gains[-1] > 1e-4 * abs(outcome.history[-1])


def test_stops_at_an_optimum():
    evaluate, start = problem(9)
    first = run(evaluate, start, tol=1e-9, max_iter=300)
    assert first.converged
    again = run(evaluate, first.point.x, tol=1e-6)
    assert again.converged
    assert again.n_iter <= 3
    assert_allclose(again.point.value, first.point.value, rtol=0, atol=1e-5)


def test_memory_changes_the_path_only(monkeypatch):
    """Without a memory the direction is the preconditioned gradient; the optimum is the same."""
    evaluate, start = problem(10)
    free = Params(True, False, False, True)
    start = start._replace(
        loadings=0.3 * start.loadings,
        noise=noise_coordinate(np.full(small.N_GENES, np.exp(-2.0))),
    )
    with_memory = run(evaluate, start, free, tol=1e-9, max_iter=300)
    monkeypatch.setattr(ascent._Memory, "add", lambda self, s, y, expected: None)
    without = run(evaluate, start, free, tol=1e-9, max_iter=300)
    assert with_memory.converged and without.converged
    assert with_memory.n_iter < without.n_iter
    assert_allclose(with_memory.point.value, without.point.value, rtol=0, atol=1e-5)
    assert_allclose(with_memory.point.x.mean, without.point.x.mean, atol=1e-2)


def test_first_steps_stay_out_of_the_memory(monkeypatch):
    """Only steps after them are remembered, each with its change of the gradient and the metric's."""
    evaluate, start = problem(10)
    added, seen = [], []
    monkeypatch.setattr(ascent._Memory, "add", lambda self, *pair: added.append(pair))
    outcome = run(
        evaluate, start, tol=0.0, max_iter=7, watch=Watched(lambda o: seen.append(o.point))
    )
    assert outcome.n_iter == 7
    assert len(added) == 7 - ascent.PLAIN_SWEEPS
    for (s, y, expected), before, after in zip(added[::-1], seen[-2::-1], seen[::-1], strict=False):
        step = Params(*(b - a for a, b in zip(before.x, after.x, strict=True)))
        assert_allclose(s, np.concatenate([b.ravel() for b in step]), rtol=1e-12, atol=1e-14)
        change = [b - a for b, a in zip(before.gradient, after.gradient, strict=True)]
        assert_allclose(y, np.concatenate([b.ravel() for b in change]), rtol=1e-12, atol=1e-12)
        change = product(before.gradient, before.metric, step, ALL)
        assert_allclose(expected, np.concatenate([b.ravel() for b in change]), rtol=1e-12)


def test_a_start_that_is_not_finite_is_refused():
    evaluate, start = problem(11)
    with pytest.raises(FloatingPointError, match="not a finite number"):
        run(evaluate, start._replace(mean=np.full(small.N_GENES, np.nan)))


def test_a_failed_step_is_reported():
    """An objective whose gradient points the wrong way: the ascent stops and does not claim success."""
    evaluate, start = problem(12)

    def wrong(x):
        point = evaluate(x)
        return point._replace(gradient=point.gradient._replace(mean=-point.gradient.mean))

    outcome = run(wrong, start, Params(True, False, False, False))
    assert not outcome.converged
    assert "no damped step raises the objective" in outcome.reason
    assert_array_equal(outcome.point.x.mean, start.mean)
    # the failed sweep has its entry too
    assert outcome.history == [outcome.point.value / N] * (outcome.n_iter + 1)


def test_the_tolerance_is_no_less_than_the_rounding_error():
    """An objective with errors of 1e-3 nats: the ascent converges with a tolerance far below them."""
    evaluate, start = problem(9)
    rng = np.random.default_rng(0)
    error = 1e-3

    def rounded(x):
        point = evaluate(x)
        return point._replace(value=point.value + error * rng.uniform(-0.5, 0.5), rounding=error)

    best = run(evaluate, start, tol=1e-10, max_iter=300).point.value
    for tol in (1e-10, 0.0):
        outcome = run(rounded, start, tol=tol, max_iter=300)
        assert outcome.converged, outcome.reason
        assert best - outcome.point.value < 10 * error
        # where the rounding error is small the tolerance is kept
        exact = run(evaluate, start, tol=tol, max_iter=300)
        assert exact.point.rounding < 1e-12 * abs(best)
        assert outcome.n_iter < exact.n_iter


def test_unconverged_cells_of_the_last_point_are_kept():
    evaluate, start = problem(12)

    def unconverged(x):
        point = evaluate(x)
        return point._replace(sums=point.sums._replace(n_unconverged=3))

    outcome = run(unconverged, start, max_iter=1)
    assert outcome.point.sums.n_unconverged == 3


# ------------------------------------------------------------------ the opening


def test_of_several_candidates_the_most_likely_is_kept():
    """The log-likelihood after the first sweeps decides: neither the start's, nor that of the priors."""
    evaluate, start = problem(8)

    def held(x):
        """Under a prior that moves the means from where the counts want them; its density is high."""
        point = evaluate(x)
        pull = -1e3 * (x.mean - start.mean)
        value = point.value + 1e6 + 0.5 * np.sum(pull * (x.mean - start.mean))
        moments = point.metric.moments.copy()
        moments[:, 0] += 1e3
        return point._replace(
            value=value,
            gradient=point.gradient._replace(mean=point.gradient.mean + pull),
            metric=point.metric._replace(moments=moments),
        )

    alone = run(evaluate, start, tol=1e-7, max_iter=200)
    near = alone.point.x
    assert evaluate(near).log_likelihood > evaluate(start).log_likelihood + 10
    for candidates in ([(held, near), (evaluate, start)], [(evaluate, start), (held, near)]):
        seen = []
        outcome = ascend(
            candidates,
            ALL,
            n_cells=N,
            tol=1e-7,
            max_iter=200,
            watch=Watched(lambda o, seen=seen: seen.append(o.point)),
        )
        assert outcome.objective is evaluate
        assert outcome.converged
        assert_allclose(outcome.point.value, alone.point.value, atol=1e-3)
        # the sweeps of the other do not count, though they are reported
        assert len(outcome.stages[0]) == ascent.LOOK_SWEEPS + 1
        assert_allclose(outcome.history[0] * N, evaluate(start).value, rtol=1e-10)
        assert np.all(np.diff(outcome.history) >= -1e-9)
        assert len(seen) > outcome.n_iter


def test_the_opening_leaves_one_of_few_sweeps():
    evaluate, start = problem(8)
    outcome = ascend([(evaluate, start)] * 2, ALL, n_cells=N, tol=0.0, max_iter=5)
    assert [len(stage) - 1 for stage in outcome.stages] == [4, 1]
    assert outcome.reason == "max_iter=5 sweeps were done" and not outcome.converged
    (only,) = ascend([(evaluate, start)] * 2, ALL, n_cells=N, tol=0.0, max_iter=1).stages[1:]
    assert len(only) == 2


@pytest.fixture(scope="module")
def two_factors():
    """Objective of counts with two factors, and start coordinates with four columns."""
    sim = make_nbln_counts(n_cells=150, n_genes=24, n_factors=2, random_state=3)
    X = csr(sim.data.toarray())
    flat = GaussianPrior.flat(24)
    rng = np.random.default_rng(0)
    variance = np.sum(sim.loadings**2, 1) + sim.noise_variance
    start = Params(
        np.log(X.toarray().mean(0) + 0.1) + sim.capture_offset.mean() - variance / 2,
        np.c_[sim.loadings, 0.1 * rng.standard_normal((24, 2))]
        @ ortho_group.rvs(4, random_state=0),
        noise_coordinate(sim.noise_variance),
        np.log(sim.dispersion),
    )

    def objective():
        rows = RowBatches(X, sim.capture_offset, np.zeros(150))
        return Objective(Sweeper(rows, 4), CountHistogram(X), flat, flat)

    return objective, start


HELD_DISPERSION = Params(True, True, True, False)


def select(objective, start, edges, **options):
    options = {"tol": 1e-5, "max_iter": 100} | options
    return ascend([(objective, start)], HELD_DISPERSION, n_cells=150, edges=edges, **options)


def test_columns_of_noise_are_dropped_after_the_first_sweeps(two_factors):
    objective, start = two_factors
    function, edges = objective(), noise_edges(24, 150)
    outcome = select(function, start, edges)
    assert outcome.converged
    assert outcome.point.x.loadings.shape == (24, 2)
    assert len(outcome.stages[0]) == ascent.PLAIN_SWEEPS + 1
    assert outcome.information.shape == (4,)
    assert np.all(np.diff(outcome.information) < 0)
    assert outcome.information[1] > edges[-1] > outcome.information[2]
    # what is left is the optimum of the smaller problem
    fresh = objective()
    fresh.rotate(np.eye(4, 2))
    alone = ascend([(fresh, outcome.point.x)], HELD_DISPERSION, n_cells=150, tol=1e-7, max_iter=100)
    assert 0 <= alone.point.value - outcome.point.value < 150 * 1e-2
    # and columns of zeros do not change it
    padded = outcome.with_columns(4)
    assert outcome.with_columns(2) is outcome
    assert_array_equal(padded.point.x.loadings[:, 2:], 0.0)
    assert_array_equal(padded.point.x.loadings[:, :2], outcome.point.x.loadings)
    assert_allclose(function(padded.point.x).value, outcome.point.value, rtol=1e-10)


def test_without_real_columns_the_genes_are_independent(two_factors):
    objective, start = two_factors
    outcome = select(objective(), start, np.full(24, np.inf))
    assert outcome.converged
    assert_array_equal(outcome.point.x.loadings, np.zeros((24, 1)))
    assert outcome.information.shape == (4,)
    # at the optimum of what is left
    gradient = outcome.point.gradient
    assert np.abs(gradient.mean).max() < 5.0
    assert np.abs(gradient.loadings).max() == 0.0


def test_without_edges_all_columns_are_kept(two_factors):
    objective, start = two_factors
    outcome = select(objective(), start, None, max_iter=2)
    assert outcome.point.x.loadings.shape == (24, 4)
    assert outcome.information is None and len(outcome.stages) == 1


# ------------------------------------------------------------------ the steps


def damped(s, y, expected):
    """The change of the gradient on the line from y to the expected one that shows just enough curvature."""
    missing = ascent.LEAST_CURVATURE * (s @ expected) - s @ y
    if missing <= 0:
        return y
    return y + missing / (s @ (expected - y)) * (expected - y)


@pytest.mark.parametrize("shift", [10.0, -4.0], ids=["convex", "indefinite"])
def test_memory_is_the_dense_bfgs_update_of_damped_pairs(shift):
    """The two-loop recursion against the matrix ``(I - s y'/sy) H (I - y s'/sy) + s s'/sy``."""
    rng = np.random.default_rng(0)
    A = rng.standard_normal((5, 5))
    A = A @ A.T + shift * np.eye(5)
    inverse = np.diag(rng.uniform(0.1, 2.0, 5))
    initial, memory, n_damped = inverse.copy(), ascent._Memory(), 0
    for _ in range(6):
        s = rng.standard_normal(5)
        expected = np.linalg.solve(initial, s)
        y = damped(s, A @ s, expected)
        n_damped += bool(np.any(y != A @ s))
        memory.add(s, A @ s, expected)
        left = np.eye(5) - np.outer(s, y) / (s @ y)
        inverse = left @ inverse @ left.T + np.outer(s, s) / (s @ y)
    # the initial matrix is at most 10
    assert (n_damped == 0) if shift > 0 else (0 < n_damped < 6)
    g = rng.standard_normal(5)
    assert_allclose(memory.direction(g, lambda q: initial @ q), inverse @ g, rtol=1e-10)
    # the damped matrix is positive whatever the objective: every direction ascends
    assert np.all(np.linalg.eigvalsh(inverse) > 0)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-6.0, 6.0), st.floats(-3.0, 3.0))
def test_pairs_of_the_memory_show_curvature(seed, size, along):
    """Powell's damping: ``s'y >= LEAST_CURVATURE s'Bs`` for the pair that enters, whatever y is."""
    rng = np.random.default_rng(seed)
    s, metric = rng.standard_normal(4), rng.uniform(0.1, 10.0, 4)
    expected = metric * s
    y = 10.0**size * rng.standard_normal(4) + along * expected
    memory = ascent._Memory()
    memory.add(s, y, expected)
    ((s_kept, y_kept, sy),) = memory.pairs
    least = ascent.LEAST_CURVATURE * (s @ expected)
    # the mixed terms cancel: a rounding error of their size
    slack = 1e-14 * np.linalg.norm(s) * (np.linalg.norm(y) + np.linalg.norm(expected))
    assert sy >= least - slack
    assert sy == s @ y_kept
    assert_array_equal(s_kept, s)
    if s @ y >= least:
        assert_array_equal(y_kept, y)
    else:
        assert_allclose(sy, least, rtol=0, atol=slack)


def test_memory_refuses_steps_without_expected_curvature_and_forgets():
    memory = ascent._Memory()
    s = np.array([1.0, 0.0])
    memory.add(s, s, 0.0 * s)
    memory.add(s, s, -s)
    memory.add(s, s, np.nan * s)
    assert memory.pairs == []
    for i in range(ascent.MEMORY + 3):
        memory.add((i + 1.0) * s, s, s)
    assert len(memory.pairs) == ascent.MEMORY
    assert memory.pairs[-1][0][0] == ascent.MEMORY + 3

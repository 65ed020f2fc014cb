"""Displays: what is drawn is what the estimators say, on the caller's axes, with matplotlib only then."""

import subprocess
import sys
import textwrap

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.contour import ContourSet
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.utils import Bunch

from sknbln import NBLNEstimator, NBVCPEstimator, plotting
from sknbln.datasets import make_nbln_counts
from sknbln.plotting import (
    CalibrationDisplay,
    CompositionalCornerDisplay,
    ConvergenceDisplay,
    CorrelationDisplay,
    EmbeddingDisplay,
    LoadingsSpectrumDisplay,
    PPCDisplay,
)
from sknbln.plotting._common import VERMILLION
from sknbln.predictive import (
    compositional_samples,
    posterior_predictive,
    predictive_check,
    quantile_residuals,
)

N_CELLS, N_GENES = 120, 20


@pytest.fixture(scope="module")
def counts():
    sim = make_nbln_counts(n_cells=N_CELLS, n_genes=N_GENES, n_factors=2, random_state=3)
    return pd.DataFrame(sim.data.toarray(), columns=[f"G{i:02d}" for i in range(N_GENES)])


@pytest.fixture(scope="module")
def source(counts):
    return NBVCPEstimator(random_state=0).fit(counts)


@pytest.fixture(scope="module")
def model(counts, source):
    return NBLNEstimator(3, informative_prior_estimator=source, random_state=0).fit(counts)


@pytest.fixture(scope="module")
def shrunk(counts, source):
    return NBLNEstimator(
        3,  # as of the other: compiled once
        informative_prior_estimator=source,
        informative_priors_freeze=("eta",),
        informative_priors_tau=np.inf,
        loadings_prior="ard",
        random_state=0,
    ).fit(counts)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def legend_texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def line(ax, label):
    """The line whose label starts so."""
    (found,) = [each for each in ax.lines if str(each.get_label()).startswith(label)]
    return found


# name -> draws it; all that is drawn from the small fits
DRAW = {
    "spectrum": lambda model, X, **k: LoadingsSpectrumDisplay.from_estimator(model, **k),
    "correlation": lambda model, X, **k: CorrelationDisplay.from_estimator(model, **k),
    "convergence": lambda model, X, **k: ConvergenceDisplay.from_estimator(model, **k),
    "embedding": lambda model, X, **k: EmbeddingDisplay.from_estimator(model, X, **k),
    "ppc": lambda model, X, **k: PPCDisplay.from_estimator(model, X, n_genes=4, n_samples=5, **k),
    "corner": lambda model, X, **k: CompositionalCornerDisplay.from_estimator(
        model, X, n_genes=2, n_samples=100, **k
    ),
    "calibration": lambda model, X, **k: CalibrationDisplay.from_estimator(
        model, X, n_samples=5, **k
    ),
}
SHAPE = {"convergence": (1, 2), "ppc": (2, 2), "corner": (2, 2), "calibration": (1, 2)}
NEED_LOADINGS = ["spectrum", "correlation", "embedding"]
NEED_COUNTS = ["embedding", "ppc", "corner", "calibration"]
every_display = pytest.mark.parametrize("name", sorted(DRAW))


def drawn_axes(display):
    return list(display.axes_.flat) if hasattr(display, "axes_") else [display.ax_]


# ------------------------------------------------------------------ what all have in common


def test_every_display_is_tested_here():
    assert len(plotting.__all__) == len(DRAW)
    assert all(name.endswith("Display") and hasattr(plotting, name) for name in plotting.__all__)


@every_display
def test_a_new_figure_has_a_layout_and_nothing_global_changes(name, model, counts):
    before = matplotlib.rcParams.copy()
    display = DRAW[name](model, counts)
    assert type(display.figure_.get_layout_engine()).__name__ == "ConstrainedLayoutEngine"
    axes = drawn_axes(display)
    assert len(axes) == np.prod(SHAPE.get(name, 1))
    assert all(ax.figure is display.figure_ for ax in axes)
    lowest = axes[-SHAPE.get(name, (1, 1))[1] :]
    assert all(ax.get_xlabel() or ax.get_xticklabels()[0].get_text() for ax in lowest)
    assert plt.get_fignums() == [display.figure_.number]
    display.figure_.canvas.draw()
    assert matplotlib.rcParams == before


@every_display
def test_draws_on_the_callers_axes(name, model, counts):
    figure, axes = plt.subplots(*SHAPE.get(name, (1, 2)))
    axes = axes if name in SHAPE else axes[1]
    display = DRAW[name](model, counts, ax=axes)
    assert display.figure_ is figure
    assert drawn_axes(display) == list(np.atleast_1d(axes).flat)
    assert plt.get_fignums() == [figure.number]
    figure.canvas.draw()
    # drawn again elsewhere, from the same numbers
    again = display.plot()
    assert again is display and display.figure_ is not figure
    elsewhere = plt.figure().subplots(*SHAPE.get(name, (1, 1)))
    assert display.plot(elsewhere).figure_ is plt.gcf()  # the first argument, as in scikit-learn


@every_display
def test_says_how_to_get_matplotlib(name, model, counts, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install sknbln\[plot\]"):
        DRAW[name](model, counts)


@every_display
def test_refuses_what_is_not_fitted_or_not_ours(name, counts):
    with pytest.raises(NotFittedError):
        DRAW[name](NBLNEstimator(), counts)
    with pytest.raises(TypeError, match="found DataFrame"):
        DRAW[name](counts, counts)


@every_display
def test_takes_a_frozen_estimator(name, model, counts):
    assert DRAW[name](FrozenEstimator(model), counts).figure_ is not None


@pytest.mark.parametrize("name", NEED_LOADINGS)
def test_independent_genes_have_no_loadings(name, source, counts):
    with pytest.raises(TypeError, match="takes an NBLNEstimator; found NBVCPEstimator"):
        DRAW[name](source, counts)


@pytest.mark.parametrize("name", NEED_COUNTS)
def test_asks_for_the_counts(name, model):
    with pytest.raises(ValueError, match="needs X"):
        DRAW[name](model, None)


def test_import_does_not_import_matplotlib():
    code = """
        import sys
        import sknbln.plotting as plotting
        assert not [m for m in sys.modules if m.split(".")[0] == "matplotlib"]
        sys.modules["matplotlib"] = None
        try:
            plotting.LoadingsSpectrumDisplay([1.0], 1, 4).plot()
        except ImportError as error:
            assert "pip install sknbln[plot]" in str(error), error
        else:
            raise AssertionError("drawn without matplotlib")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=300)


# ------------------------------------------------------------------ genes and grids


@pytest.mark.parametrize("display", [CorrelationDisplay, PPCDisplay, CompositionalCornerDisplay])
def test_unknown_genes(model, counts, display):
    with pytest.raises(ValueError, match="unknown entries \\['nobody'\\]"):
        display.from_estimator(model, counts, genes=["G03", "nobody"])
    with pytest.raises(ValueError, match="unknown entries \\[20\\]: expected positions 0 to 19"):
        display.from_estimator(model, counts, genes=[3, 20])


def test_genes_without_names_are_named_by_position(counts):
    model = NBVCPEstimator(random_state=0).fit(counts.to_numpy())
    display = PPCDisplay.from_estimator(model, counts.to_numpy(), genes=[7], n_samples=2)
    assert display.axes_[0, 0].get_title().startswith("gene 7\nmean ")


def test_grids_take_a_figure_one_axes_or_as_many_as_needed(model):
    figure = plt.figure()
    display = ConvergenceDisplay.from_estimator(model, ax=figure)
    assert display.figure_ is figure and len(figure.axes) == 2

    half = plt.figure().subfigures(1, 2)[1]
    assert ConvergenceDisplay.from_estimator(model, ax=half).figure_ is half

    figure, (left, right) = plt.subplots(1, 2)
    display = ConvergenceDisplay.from_estimator(model, ax=right)
    assert not right.axison and left.axison
    assert len(figure.axes) == 4 and display.axes_.shape == (1, 2)
    edges = right.get_position()
    assert all(edges.x0 - 1e-9 <= ax.get_position().x0 for ax in display.axes_.flat)
    with pytest.raises(ValueError, match="cannot be divided"):
        ConvergenceDisplay.from_estimator(model, ax=right)

    with pytest.raises(ValueError, match="ax holds 3 axes, this picture needs 2"):
        ConvergenceDisplay.from_estimator(model, ax=plt.subplots(1, 3)[1])


# ------------------------------------------------------------------ spectrum


def test_spectrum_draws_norms_threshold_and_rank(model):
    display = LoadingsSpectrumDisplay.from_estimator(model)
    norms = np.linalg.norm(model.components_, axis=1)
    x, y = line(display.ax_, "counted").get_data()
    assert x.tolist() == [1, 2, 3]
    np.testing.assert_allclose(y, norms)
    assert display.threshold == pytest.approx(0.05 * norms[0])
    np.testing.assert_allclose(line(display.ax_, "5% of").get_ydata(), display.threshold)
    np.testing.assert_allclose(line(display.ax_, "effective rank 3 of 3").get_xdata(), 3.5)
    assert display.ax_.get_yscale() == "log"
    assert "prior" not in " ".join(legend_texts(display.ax_))


def test_spectrum_draws_the_scales_of_a_prior(shrunk):
    display = LoadingsSpectrumDisplay.from_estimator(shrunk)
    found = shrunk.w_prior_diagnostics_
    rank = found["effective_rank"]
    assert rank == 2  # of the simulation: what was pruned is below the axis
    _, y = line(display.ax_, "prior scale").get_data()
    np.testing.assert_allclose(y, found["sigma_k"][:rank] * np.sqrt(N_GENES - 1))
    assert "below the axis" in legend_texts(display.ax_)
    low = display.ax_.get_ylim()[0]
    below = [
        each for each in display.ax_.lines if each.get_marker() == "v" and len(each.get_xdata())
    ]
    assert sorted(len(each.get_xdata()) for each in below) == [1, 1]
    assert all(np.all(each.get_ydata() == low) for each in below)


def test_spectrum_of_vanishing_loadings():
    display = LoadingsSpectrumDisplay(np.zeros(2), 0, 100).plot()
    assert display.threshold == pytest.approx(0.1)
    assert "0.01 nats per gene" in legend_texts(display.ax_)
    assert "counted" not in legend_texts(display.ax_)


# ------------------------------------------------------------------ correlation


def test_correlation_is_the_estimators_in_another_order(model):
    display = CorrelationDisplay.from_estimator(model)
    assert sorted(display.genes) == list(range(N_GENES))
    expected = model.get_correlation()[np.ix_(display.genes, display.genes)]
    np.testing.assert_array_equal(np.asarray(display.im_.get_array()), expected)
    low, high = display.im_.get_clim()
    assert low == -high
    names = [label.get_text() for label in display.ax_.get_xticklabels()]
    assert names == list(model.feature_names_in_[display.genes])
    assert display.colorbar_.ax.get_ylabel() == "correlation"


def test_correlation_of_factors(model):
    display = CorrelationDisplay.from_estimator(model, kind="factors")
    S = model.components_.T @ model.components_
    expected = S / np.sqrt(np.outer(np.diag(S), np.diag(S)))
    order = np.ix_(display.genes, display.genes)
    np.testing.assert_allclose(display.correlation, expected[order], atol=1e-12)
    with pytest.raises(ValueError, match="'kind' parameter"):
        CorrelationDisplay.from_estimator(model, kind="counts")


def test_correlation_of_chosen_and_of_the_most_connected_genes(model):
    display = CorrelationDisplay.from_estimator(model, genes=["G05", "G02", "G11", "G07"])
    assert sorted(display.names) == ["G02", "G05", "G07", "G11"]
    C = model.get_correlation()
    np.testing.assert_array_equal(display.correlation, C[np.ix_(display.genes, display.genes)])
    assert "4 of 20 genes" in display.ax_.get_title()

    display = CorrelationDisplay.from_estimator(model, n_genes=6)
    connected = np.sum((C - np.eye(N_GENES)) ** 2, axis=1)
    assert set(display.genes) == set(np.argsort(-connected)[:6])
    assert "6 most connected of 20 genes" in display.ax_.get_title()
    with pytest.raises(ValueError, match="'n_genes' parameter"):
        CorrelationDisplay.from_estimator(model, n_genes=0)


def test_correlation_puts_the_members_of_a_module_side_by_side(model):
    from sknbln.plotting._correlation import _seriation

    module = np.random.default_rng(0).integers(0, 3, 40)
    C = np.where(module[:, None] == module, 0.8, -0.3)
    np.fill_diagonal(C, 1.0)
    assert np.count_nonzero(np.diff(module[_seriation(C)])) == 2


def test_correlation_of_many_genes_is_not_named():
    rng = np.random.default_rng(0)
    C = np.corrcoef(rng.standard_normal((2000, 5)))
    display = CorrelationDisplay(C, [f"gene {i}" for i in range(2000)]).plot(vmax=0.5)
    assert len(display.ax_.get_xticks()) == 0
    assert display.ax_.get_xlabel() == "2000 genes"
    assert display.im_.get_clim() == (-0.5, 0.5) and display.colorbar_.extend == "both"


# ------------------------------------------------------------------ convergence


def test_convergence_draws_the_history_and_the_decrements(model):
    display = ConvergenceDisplay.from_estimator(model)
    left, right = display.axes_[0]
    history = model.objective_history_
    x, y = line(left, "distance").get_data()
    np.testing.assert_allclose(y, history[-1] - history[:-1])
    assert x.tolist() == list(range(model.n_iter_))
    np.testing.assert_allclose(line(left, "gain").get_ydata(), np.diff(history))
    # the line is where the fit stopped: its last two gains are below, no two in a row before, or the
    # promise of another sweep is below half of it
    smallest = line(left, f"tol = {model.tol_:g} of the objective").get_ydata()[0]
    below = np.diff(history) < smallest
    x, y = line(left, "promise").get_data()
    assert x == [model.n_iter_ + 1] and y == [model.promised_gain_]
    assert below[-2:].all() or 0 < model.promised_gain_ < smallest / 2
    assert not np.any(below[:-2] & below[1:-1])
    assert smallest == pytest.approx(model.tol_ * abs(history[-1]), rel=1e-3)
    assert left.get_title() == f"NBLNEstimator: converged after {model.n_iter_} sweeps"
    decrement = right.lines[0].get_ydata()
    np.testing.assert_allclose(decrement, np.sort(np.maximum(model.newton_decrement_, 1e-16)))
    assert right.get_title() == f"mode not found: 0 of {N_CELLS} rows"
    assert left.get_yscale() == right.get_yscale() == "log"


def test_convergence_says_what_did_not_converge():
    objective, decrement = np.array([-3.0, -2.0, -2.2]), np.array([1e-12, 1e-3, 0.0])
    display = ConvergenceDisplay(objective, False, newton_decrement=decrement, tol=1e-3).plot()
    left, right = display.axes_[0]
    assert left.get_title() == "NOT converged after 2 sweeps"
    np.testing.assert_allclose(line(left, "fall").get_data(), [[2], [0.2]])
    np.testing.assert_allclose(line(left, "distance").get_ydata(), [0.8, 0.2])
    np.testing.assert_allclose(line(left, "tol").get_ydata(), 1e-3 * 2.2)
    assert right.get_title() == "mode not found: 1 of 3 rows"


def test_convergence_of_the_variational_fit(source):
    display = ConvergenceDisplay.from_estimator(source)
    assert display.axes_.shape == (1, 1)
    ax = display.axes_[0, 0]
    np.testing.assert_array_equal(line(ax, "each step").get_ydata(), source.loss_curve_)
    x, y = line(ax, "mean of 25").get_data()
    assert x[0] == 13 and y[0] == pytest.approx(source.loss_curve_[:25].mean())
    assert ax.get_title().startswith("NBVCPEstimator: ")
    # one axes is enough for one panel
    ax = plt.subplots()[1]
    assert ConvergenceDisplay.from_estimator(source, ax=ax).axes_[0, 0] is ax


# ------------------------------------------------------------------ embedding


def test_embedding_draws_the_scores(model, counts):
    display = EmbeddingDisplay.from_estimator(model, counts, components=(2, 0))
    scores = model.transform(counts)[:, [2, 0]]
    np.testing.assert_array_equal(display.scatters_[0].get_offsets(), scores)
    share = model.explained_variance_ratio_
    assert display.ax_.get_xlabel() == f"component 3 ({share[2]:.1%} of variance)"
    assert display.ax_.get_ylabel() == f"component 1 ({share[0]:.1%} of variance)"
    assert display.legend_ is None and display.ax_.get_legend() is None


@pytest.mark.parametrize("components", [(0, 3), (0, 0), (0,), (0.0, 1.0), "01", (-1, 0)])
def test_embedding_refuses_components_that_are_not_there(model, counts, components):
    with pytest.raises(ValueError, match="expected two different columns"):
        EmbeddingDisplay.from_estimator(model, counts, components=components)


def test_embedding_groups(model, counts):
    kind = pd.Series(np.where(np.arange(N_CELLS) % 3 == 0, "b", "a"), name="kind", dtype=object)
    kind[5] = None
    display = EmbeddingDisplay.from_estimator(model, counts, groups=kind)
    assert legend_texts(display.ax_) == ["a (79)", "b (40)", "missing (1)"]
    assert display.legend_.get_title().get_text() == "kind"
    scores = model.transform(counts)[:, :2]
    for scatter, rows in zip(
        display.scatters_, [kind == "a", kind == "b", kind.isna()], strict=True
    ):
        np.testing.assert_array_equal(scatter.get_offsets(), scores[rows])
    colours = {tuple(scatter.get_facecolor()[0]) for scatter in display.scatters_}
    assert len(colours) == 3
    with pytest.raises(ValueError, match="groups has 3 entries, the embedding has 120 cells"):
        EmbeddingDisplay.from_estimator(model, counts, groups=["a", "b", "c"])


def test_embedding_categories_keep_their_order(model, counts):
    kind = pd.Categorical(["low", "high"] * (N_CELLS // 2), categories=["low", "high", "none"])
    display = EmbeddingDisplay.from_estimator(model, counts, groups=kind)
    assert legend_texts(display.ax_) == ["low (60)", "high (60)"]


def test_embedding_many_groups_are_told_apart():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(50), np.arange(1, 51)).astype(str)
    display = EmbeddingDisplay(rng.standard_normal((groups.size, 2)), groups=groups).plot()
    texts = legend_texts(display.ax_)
    assert len(texts) == 30 and texts[-1] == f"21 other groups ({21 * 22 // 2})"
    looks = {
        (tuple(s.get_facecolor()[0]), s.get_paths()[0].vertices.tobytes())
        for s in display.scatters_
    }
    assert len(looks) == 30
    assert sum(len(s.get_offsets()) for s in display.scatters_) == groups.size


def test_embedding_numbers_are_a_scale(model, counts):
    depth = counts.sum(axis=1).astype(float).rename("depth")
    depth[3] = np.nan
    display = EmbeddingDisplay.from_estimator(model, counts, groups=depth)
    np.testing.assert_array_equal(display.scatters_[1].get_array(), depth.dropna())
    assert display.colorbar_.ax.get_ylabel() == "depth"
    assert legend_texts(display.ax_) == ["missing (1)"]
    few = EmbeddingDisplay.from_estimator(model, counts, groups=np.arange(N_CELLS) % 4)
    assert few.colorbar_ is None and len(few.scatters_) == 4


def test_embedding_ellipses_are_the_posterior(model, counts):
    display = EmbeddingDisplay.from_estimator(model, counts, components=(0, 2), ellipses=7)
    mean, covariance = model.posterior_scores(counts)
    found = display.ellipses_
    assert len(found.get_offsets()) == 7
    rows = np.linspace(0, N_CELLS - 1, 7).astype(int)
    np.testing.assert_array_equal(found.get_offsets(), mean[rows][:, [0, 2]])
    angles = np.linspace(0, 2 * np.pi, 9)
    sizes = found.get_widths(), found.get_heights(), np.radians(found.get_angles())
    for i, (width, height, turn) in zip(rows, zip(*sizes, strict=True), strict=True):
        along, across = width / 2 * np.cos(angles), height / 2 * np.sin(angles)
        edge = np.array(
            [
                along * np.cos(turn) - across * np.sin(turn),
                along * np.sin(turn) + across * np.cos(turn),
            ]
        )
        block = covariance[i][np.ix_([0, 2], [0, 2])]
        squared = np.einsum("ij,ij->j", edge, np.linalg.solve(block, edge))
        np.testing.assert_allclose(squared, -2 * np.log(0.1))  # chi-square, two degrees, 90 %
    low, high = display.ax_.get_xlim()
    assert low < mean[0, 0] - np.sqrt(4.6 * covariance[0, 0, 0]) < high  # nothing is cut off
    assert legend_texts(display.ax_) == ["90% of the posterior, 7 cells"]
    with pytest.raises(ValueError, match="ellipses need the posterior covariances"):
        EmbeddingDisplay(mean[:, :2]).plot(ellipses=True)


# ------------------------------------------------------------------ posterior predictive


def test_ppc_draws_the_histograms_of_counts_and_replicates(model, counts):
    options = dict(level="marginal", n_samples=40, random_state=5)
    display = PPCDisplay.from_estimator(model, counts, genes=["G07", "G02"], **options)
    draws = posterior_predictive(model, counts, genes=["G07", "G02"], **options)
    assert [panel.name for panel in display.panels] == ["G07", "G02"]
    for j, (panel, ax) in enumerate(zip(display.panels, display.axes_.flat, strict=True)):
        observed = counts[panel.name].to_numpy()
        edges = panel.edges
        assert edges[0] == 0 and edges[-1] == np.inf and len(np.unique(np.diff(edges[:-1]))) == 1
        np.testing.assert_allclose(panel.observed, np.histogram(observed, edges)[0] / N_CELLS)
        predicted = [np.histogram(draw[:, j], edges)[0] / N_CELLS for draw in draws]
        np.testing.assert_allclose(panel.predicted, predicted)
        x, y = line(ax, "observed").get_data()
        np.testing.assert_allclose(y, panel.observed)
        middles = (edges[:-2] + edges[1:-1] - 1) / 2  # of the whole numbers in a bin
        np.testing.assert_allclose(x[:-1], middles)
        wide, narrow, median = [each.get_data() for each in ax.patches]
        low, high = np.quantile(predicted, [0.05, 0.95], axis=0)
        np.testing.assert_allclose((wide.baseline, wide.values), (low, high), atol=1e-12)
        low, high = np.quantile(predicted, [0.25, 0.75], axis=0)
        np.testing.assert_allclose((narrow.baseline, narrow.values), (low, high), atol=1e-12)
        np.testing.assert_allclose(median.values, np.median(predicted, axis=0))
        assert ax.get_title() == f"{panel.name}\nmean {observed.mean():.3g}"
        assert ax.get_xticklabels()[-1].get_text() == f"≥{edges[-2]:.0f}"
    (legend,) = display.figure_.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "predicted, 90% of replicates",
        "predicted, 50% of replicates",
        "predicted, median",
        "observed",
    ]
    assert display.figure_.get_suptitle().endswith("marginal\n40 replicates")


def test_ppc_spreads_genes_over_mean_expression(model, counts):
    counts = counts.copy()
    counts["G04"] = 0  # never counted: not chosen
    display = PPCDisplay.from_estimator(model, counts, n_genes=7, n_samples=2, n_cols=4)
    order = counts.mean().sort_values().index.drop("G04")
    places = [order.get_loc(panel.name) for panel in display.panels]
    assert places == [0, 3, 6, 9, 12, 15, 18]
    assert display.axes_.shape == (2, 4)
    visible = [ax.get_visible() for ax in display.axes_.flat]
    assert visible == [True] * 7 + [False]
    everything = PPCDisplay.from_estimator(model, counts, n_genes=50, n_samples=2)
    assert len(everything.panels) == N_GENES - 1
    with pytest.raises(ValueError, match="there are no genes to choose"):
        PPCDisplay.from_estimator(model, counts * 0, n_samples=2)


def test_ppc_one_huge_count_does_not_set_the_bins(model, counts):
    extreme = counts.copy()
    extreme.loc[0, "G07"] = 10**6
    (panel,) = PPCDisplay.from_estimator(model, extreme, genes=["G07"], n_samples=2).panels
    assert panel.edges[-2] <= 2 * counts["G07"].max()
    assert panel.observed[-1] > 0 and panel.observed.sum() == pytest.approx(1)


def test_ppc_takes_more_axes_than_genes(source, counts):
    axes = plt.subplots(2, 3)[1]
    display = PPCDisplay.from_estimator(source, counts, n_genes=4, n_samples=2, ax=axes)
    assert display.axes_.shape == (2, 3) and not display.figure_.legends
    assert [ax.get_visible() for ax in axes.flat] == [True] * 4 + [False] * 2
    with pytest.raises(ValueError, match="ax holds 6 axes, this picture needs 7"):
        PPCDisplay.from_estimator(source, counts, n_genes=7, n_samples=2, ax=plt.subplots(2, 3)[1])


# ------------------------------------------------------------------ compositions


def test_corner_draws_cells_zeros_and_pseudobulk(model, counts):
    genes = ["G01", "G05", "G11"]
    display = CompositionalCornerDisplay.from_estimator(
        model, counts, genes=genes, n_samples=300, random_state=1
    )
    found = compositional_samples(model, counts, n_samples=300, genes=genes, random_state=1)
    np.testing.assert_array_equal(display.model, found.model)
    assert display.axes_.shape == (3, 3)
    for row, col in np.ndindex(3, 3):
        ax = display.axes_[row, col]
        assert (ax.get_visible() and ax.axison) == (row >= col)
        if row <= col:
            continue
        drawn = ax.collections[0].get_offsets()
        some = found.cells > 0
        for j, gene, limit in ((0, col, ax.get_xlim()[0]), (1, row, ax.get_ylim()[0])):
            seen, zero = some[:, gene], ~some[:, gene]
            np.testing.assert_allclose(drawn[seen, j], np.log10(found.cells[seen, gene]))
            # zeros are inside the axes and apart from all that has a logarithm
            assert np.all(drawn[zero, j] > limit)
            if zero.any():
                assert drawn[zero, j].max() < drawn[seen, j].min()
        expected = np.log10(counts.sum() / counts.to_numpy().sum())
        across, up = (each for each in ax.lines if each.get_color() == VERMILLION)
        np.testing.assert_allclose(across.get_xdata(), expected[genes[col]])
        np.testing.assert_allclose(up.get_ydata(), expected[genes[row]])
    for j, gene in enumerate(genes):
        zeros = (counts[gene] == 0).mean()
        diagonal = display.axes_[j, j]
        (heights,) = [each.get_data() for each in diagonal.patches if hasattr(each, "get_data")]
        area = np.sum(heights.values * np.diff(heights.edges))
        assert area == pytest.approx(1 - zeros) and heights.values.max() < diagonal.get_ylim()[1]
        title = diagonal.get_title()
        assert title == (f"{gene}\n{zeros:.1%} of cells are 0" if zeros else gene)
        assert display.axes_[2, j].get_xlabel() == f"{gene}\nlog10 share"
    texts = legend_texts(display.axes_[0, 2])  # in the empty half
    assert texts[0] == f"cells, counts / total ({N_CELLS})"
    assert "zeros (strips at the edge)" in texts


def test_corner_contours_hold_their_share_of_the_model():
    rng = np.random.default_rng(0)
    log = rng.multivariate_normal([-2, -3], [[0.1, 0.06], [0.06, 0.08]], 20_000)
    display = CompositionalCornerDisplay(10**log, 10 ** log[:50], 10 ** log[0], ["a", "b"]).plot()
    (contours,) = [
        each
        for each in display.axes_[1, 0].collections
        if isinstance(each, ContourSet) and not each.filled
    ]
    inside = [np.mean(path.contains_points(log)) for path in contours.get_paths()]
    # smoothing widens them a little, more where there are fewer points
    np.testing.assert_allclose(inside, [0.9, 0.5], atol=0.03)
    texts = [text.get_text() for text in display.figure_.legends[0].get_texts()]
    assert not any("zeros" in text for text in texts)


def test_corner_chooses_genes_that_can_be_read(model, source, counts):
    often = (counts > 0).mean() >= 0.5
    display = CompositionalCornerDisplay.from_estimator(source, counts, n_genes=3, n_samples=10)
    assert list(display.names) == list(counts.mean()[often].nlargest(3).index)
    display = CompositionalCornerDisplay.from_estimator(model, counts, n_genes=3, n_samples=10)
    length = pd.Series(np.linalg.norm(model.components_, axis=0), counts.columns)
    assert list(display.names) == list(length[often].nlargest(3).index)
    rare = counts * (np.arange(N_CELLS) % 3 == 0)[:, None]
    display = CompositionalCornerDisplay.from_estimator(model, rare, n_genes=2, n_samples=10)
    assert set(display.names) == set((rare > 0).mean().nlargest(2).index)
    with pytest.raises(ValueError, match="'n_genes' parameter"):
        CompositionalCornerDisplay.from_estimator(model, counts, n_genes=1)
    with pytest.raises(ValueError, match="two genes or more; found 1"):
        CompositionalCornerDisplay.from_estimator(model, counts, genes=["G03"])


def test_corner_of_a_gene_that_was_never_counted(model, counts):
    counts = counts.copy()
    counts["G04"] = 0
    display = CompositionalCornerDisplay.from_estimator(model, counts, genes=["G04", "G01", "G02"])
    assert display.axes_[0, 0].get_title() == "G04\n100.0% of cells are 0"
    display.figure_.canvas.draw()
    assert "pseudobulk" in legend_texts(display.axes_[0, 2])  # of the other two


# ------------------------------------------------------------------ calibration


def test_calibration_draws_residuals_and_variances(model, counts):
    display = CalibrationDisplay.from_estimator(model, counts, n_samples=20, random_state=4)
    rng = np.random.RandomState(4)
    residuals = quantile_residuals(model, counts, n_samples=20, random_state=rng)
    check = predictive_check(model, counts, n_samples=20, random_state=rng)
    np.testing.assert_array_equal(display.residuals, residuals)
    left, right = display.axes_[0]
    grid, median = line(left, "median gene").get_data()
    below = np.mean(residuals[:, :, None] <= grid, axis=0)
    np.testing.assert_allclose(median, np.median(below - grid, axis=0), atol=1e-12)
    for scatter, what in zip(right.collections, [check.observed, check.predicted], strict=True):
        expected = np.column_stack([what.mean, what.variance])
        np.testing.assert_allclose(scatter.get_offsets(), expected)
    assert right.get_xscale() == right.get_yscale() == "log"
    assert f"{display.fraction_outside_:.1%} of 20 genes" in left.get_title()


def test_calibration_of_few_genes_draws_each(model, counts):
    display = CalibrationDisplay.from_estimator(model, counts, genes=["G03", "G00"], n_samples=5)
    left, right = display.axes_[0]
    grid, curve = line(left, "each gene").get_data()
    expected = np.mean(display.residuals[:, 0, None] <= grid, axis=0) - grid
    np.testing.assert_allclose(curve, expected, atol=1e-12)
    assert not any("median" in text for text in legend_texts(right))


def moments(n_genes):
    values = np.linspace(1, 5, n_genes)
    return Bunch(mean=values, variance=2 * values)


def test_calibration_band_holds_95_percent_of_uniform_curves():
    uniform = np.random.default_rng(1).uniform(size=(150, 2000))
    display = CalibrationDisplay(uniform, moments(2000), moments(2000)).plot()
    # binomial: 0.05 +- 0.005; the band's level comes from 2,000 simulated curves: +- 0.005; and
    # counts are whole numbers, so that the band is a little too wide
    assert 0.025 < display.fraction_outside_ < 0.07
    low, high = [
        each.get_ydata() for each in display.axes_[0, 0].lines if each.get_linestyle() == "--"
    ]
    assert np.all(low <= 0) and np.all(high >= 0)


@pytest.mark.parametrize("shape", [(0.6, 0.6), (2.0, 2.0), (1.0, 1.6)])
def test_calibration_sees_residuals_that_are_not_uniform(shape):
    residuals = np.random.default_rng(1).beta(*shape, size=(400, 20))
    display = CalibrationDisplay(residuals, moments(20), moments(20)).plot()
    assert display.fraction_outside_ > 0.9
    middle = line(display.axes_[0, 0], "median gene").get_ydata()
    quarter, three_quarters = middle[16], middle[48]
    # wider, narrower, smaller than predicted: as the docstring reads the curve
    assert (quarter > 0, three_quarters > 0) == {
        0.6: (True, False),
        2.0: (False, True),
        1.6: (True, True),
    }[shape[1]]

"""Displays: what is drawn is what the estimators say, on the caller's axes, with matplotlib only then."""

import subprocess
import sys
import textwrap

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator

from sknbln import NBLNEstimator, NBVCPEstimator, plotting
from sknbln.datasets import make_nbln_counts
from sknbln.plotting import (
    ConvergenceDisplay,
    CorrelationDisplay,
    EmbeddingDisplay,
    LoadingsSpectrumDisplay,
)
from sknbln.plotting._common import gene_names, gene_positions

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
}
N_AXES = {"spectrum": 1, "correlation": 1, "convergence": 2, "embedding": 1}
every_display = pytest.mark.parametrize("name", sorted(DRAW))


def drawn_axes(display):
    return list(display.axes_.flat) if hasattr(display, "axes_") else [display.ax_]


# ------------------------------------------------------------------ what all have in common


def test_every_display_is_tested_here():
    assert len(plotting.__all__) == len(DRAW)
    assert all(issubclass(getattr(plotting, name), object) for name in plotting.__all__)


@every_display
def test_a_new_figure_has_a_layout_and_nothing_global_changes(name, model, counts):
    before = matplotlib.rcParams.copy()
    display = DRAW[name](model, counts)
    assert type(display.figure_.get_layout_engine()).__name__ == "ConstrainedLayoutEngine"
    assert len(drawn_axes(display)) == N_AXES[name]
    assert all(ax.figure is display.figure_ for ax in drawn_axes(display))
    assert all(ax.get_xlabel() or len(ax.get_xticklabels()) for ax in drawn_axes(display))
    assert plt.get_fignums() == [display.figure_.number]
    display.figure_.canvas.draw()
    assert matplotlib.rcParams == before


@every_display
def test_draws_on_the_callers_axes(name, model, counts):
    figure, axes = plt.subplots(1, 2)
    axes = axes if N_AXES[name] == 2 else axes[1]
    display = DRAW[name](model, counts, ax=axes)
    assert display.figure_ is figure
    assert drawn_axes(display) == list(np.atleast_1d(axes))
    assert plt.get_fignums() == [figure.number]
    figure.canvas.draw()
    # drawn again elsewhere, from the same numbers
    again = display.plot()
    assert again is display and display.figure_ is not figure


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


@pytest.mark.parametrize("name", ["spectrum", "correlation", "embedding"])
def test_independent_genes_have_no_loadings(name, source, counts):
    with pytest.raises(TypeError, match="takes an NBLNEstimator; found NBVCPEstimator"):
        DRAW[name](source, counts)


@pytest.mark.parametrize("name", ["embedding"])
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


def test_genes_by_name_position_and_mask(model):
    assert gene_positions(model, ["G03", "G00"]).tolist() == [3, 0]
    assert gene_positions(model, [3, -1]).tolist() == [3, N_GENES - 1]
    assert gene_positions(model, np.arange(N_GENES) < 2).tolist() == [0, 1]
    assert gene_names(model)[3] == "G03"


@pytest.mark.parametrize(
    ("genes", "message"),
    [
        (["G03", "nobody"], "Unknown genes nobody. Use the names in feature_names_in_"),
        ([3, 20], r"Unknown genes \[20\]: positions run from 0 to 19"),
        ([True, False], "mask of genes needs 20 entries"),
        ([], "genes is empty"),
        (["G03", "G03"], "more than once"),
    ],
)
def test_unknown_genes(model, genes, message):
    with pytest.raises(ValueError, match=message):
        CorrelationDisplay.from_estimator(model, genes=genes)


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
    np.testing.assert_allclose(line(left, "tol").get_ydata(), model.tol)
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

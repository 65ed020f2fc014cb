"""Lines about a fit: to the logger, or printed where no logging is set up."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest

from sknbln._progress import Progress


class Model:
    """An estimator."""


@pytest.fixture
def outcome():
    loadings = np.ones((5, 3))
    loadings[:, 2] = 0.0
    point = SimpleNamespace(
        x=SimpleNamespace(loadings=loadings), sums=SimpleNamespace(n_unconverged=np.int64(1))
    )
    return SimpleNamespace(n_iter=3, history=[-12.0, -10.25], promised=0.5, gain=1.75, point=point)


@pytest.mark.parametrize("verbose", [0, 1, 2])
def test_a_line_per_sweep_is_printed_if_asked_for(outcome, verbose, capsys):
    Progress(Model(), verbose).sweeps()(outcome)
    line = capsys.readouterr().out
    if not verbose:
        assert line == ""
        return
    start = "[Model] sweep 3: -10.2500 nats per cell, the next promises 0.5, 2 factors, "
    assert line.startswith(start) and line.endswith(" s\n")
    assert ("gained 1.8, 1 cells without a mode" in line) == (verbose == 2)


def test_where_logging_is_set_up_lines_go_there(outcome, caplog, capsys):
    with caplog.at_level(logging.INFO, logger="sknbln"):
        Progress(Model(), 1).sweeps("pass")(outcome)
        Progress(Model(), 0).sweeps("silent")(outcome)
    assert capsys.readouterr().out == ""
    assert "[Model] pass 3" in caplog.text and "silent" not in caplog.text
    with caplog.at_level(logging.DEBUG, logger="sknbln"):
        Progress(Model(), 0).sweeps("silent")(outcome)
    assert "silent" in caplog.text


def test_the_time_left_is_that_of_the_steps_so_far(monkeypatch, capsys):
    clock = iter([0.0, 10.0, 14.0, 14.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    Progress(Model(), 1).steps("step", 100)(20, 3.0)
    assert capsys.readouterr().out == (
        "[Model] step 20: -3.0000 nats per cell, at most 16 s left, 14.0 s\n"
    )

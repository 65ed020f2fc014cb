"""The parts that replicated counts are made of."""

import numpy as np
import pytest
from scipy import stats

from sknbln._capture import CapturePrior
from sknbln.predictive import _replicates
from sknbln.predictive._replicates import (
    capture_offsets,
    log_gamma_noise,
    poisson,
    random_streams,
    softmax,
)

from .reference import truth

# Fixed seeds: a right sampler fails a test at this level with this probability, once and for all.
LEVEL = 1e-4


@pytest.fixture
def streams():
    return random_streams(np.random.RandomState(0))


def test_gamma_noise_is_gamma(streams):
    r = np.array([0.02, 0.3, 1.0, 4.0, 1e3, np.inf])
    noise = log_gamma_noise(r, 4000, streams)
    assert np.all(np.isfinite(noise))
    assert np.all(noise[:, -1] == 0)
    for g in range(5):
        # loggamma: the logarithm of a gamma variable of scale 1
        assert stats.kstest(noise[:, g] + np.log(r[g]), stats.loggamma(r[g]).cdf).pvalue > LEVEL


@pytest.mark.parametrize("loc", [-8.0, -1.0, 0.0, 0.4, 6.0])
def test_offsets_follow_the_truncated_capture_prior(streams, loc):
    prior = CapturePrior(np.log(1e4), 0.5)
    eta = capture_offsets(prior, np.full(4000, np.exp(prior.log_m0 - loc)), streams.offset)
    expected = stats.truncnorm(-loc / 0.5, np.inf, loc, 0.5)
    assert eta.min() >= 0
    assert stats.kstest(eta, expected.cdf).pvalue > LEVEL


def test_no_capture_is_no_offset(streams):
    np.testing.assert_array_equal(capture_offsets(None, np.ones(3), streams.offset), np.zeros(3))


def test_softmax_takes_any_level():
    x = np.array([[0.0, 1.0], [1e4, 1e4 + 1], [-1e4, -1e4 + 1]])
    p = 1 / (1 + np.e)
    np.testing.assert_allclose(softmax(x), [[p, 1 - p]] * 3, rtol=1e-12)


def test_rates_beyond_counts_are_refused_by_name(streams):
    with pytest.raises(ValueError, match=r"1 of 3 genes \(positions \[1\]\)"):
        poisson(np.array([[0.0, 800.0, 1.0], [0.0, 1.0, 1.0]]), streams.count)


@pytest.mark.parametrize("level", ["marginal", "library_anchored", "per_cell"])
def test_chunks_do_not_change_a_draw(level, monkeypatch):
    rng = np.random.default_rng(0)
    prior = CapturePrior(np.log(200.0), 0.4)
    counts = rng.poisson(4.0, (20, 6))
    size = counts.sum(1)
    mean, r = np.full(6, 3.0), np.full(6, 2.0)
    options = dict(capture_prior=prior, library_size=size)
    models = {
        rows: truth.nbln(
            mean, 0.3 * np.eye(6)[:, :2], np.full(6, 0.2), r, batch_size=rows, **options
        )
        for rows in (8, 20)
    }
    whole = models[20].posterior_predictive(counts, level=level, n_samples=3, random_state=0)
    monkeypatch.setattr(_replicates, "_CHUNK_ENTRIES", 7 * 6)
    parts = models[8].posterior_predictive(counts, level=level, n_samples=3, random_state=0)
    np.testing.assert_array_equal(whole, parts)

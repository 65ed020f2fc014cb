"""Replicated counts of rows: one posterior draw per replicate, rows in chunks.

Every level draws log-intensities ``l = log-rate + log Gamma(r, 1/r)`` of a chunk of rows, then
counts, since ``NB(exp(y), r) = Poisson(exp(y) Gamma(r, 1/r))``:

* given an offset, ``Poisson(exp(l))``;
* given a total, ``Multinomial(total, softmax(l))``.

Normals, gamma noise and counts come from random streams of their own, each read row by row and gene
by gene, so that neither the chunks nor the selection of genes change a draw.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import log_ndtr, ndtri_exp
from sklearn.utils import Bunch, check_random_state

from .. import _capture
from .._jax import float64
from .._rows import RowBatches, with_padded_rank
from ..solver.params import Params, dispersion
from ..solver.rates import draw_rates

#: levels, and which capture offsets they draw from the posterior (per_cell integrates free ones)
LEVELS = {"marginal": "all", "library_anchored": None, "per_cell": "frozen"}
#: distributions that marginal replicates can draw the rows' capture offsets from
CAPTURE = ("posterior", "prior")
#: where per_cell replicates take the rows' log-rates from
LATENT = ("posterior", "mode")
_CHUNK_ENTRIES = 2**18  # 2 MB an array
_LARGEST_RATE = 1e18  # counts are 64-bit integers


def random_streams(rng):
    """Independent random streams seeded from a RandomState, a `Bunch` with one per kind of variable."""
    kinds = "normal", "gamma", "exponential", "offset", "count"
    seed = np.random.SeedSequence(rng.randint(2**31 - 1, size=4).tolist())
    children = seed.spawn(len(kinds))
    return Bunch(
        **{kind: np.random.default_rng(child) for kind, child in zip(kinds, children, strict=True)}
    )


class ParameterDraws(NamedTuple):
    """Posterior draws of the parameters, one per replicate."""

    r: np.ndarray  # (n_samples, n_genes); inf for Poisson channels
    log_mean: np.ndarray  # (n_samples, n_genes) mu, log-rates
    eta: np.ndarray | None  # (n_samples, n_rows) capture offsets; None where not drawn
    inflation: np.ndarray | None = None  # (n_samples, n_genes) factor of Sigma_gg; None is 1
    coef: np.ndarray | None = None  # (n_samples, n_genes, p) coefficients per sd of each covariate


def degenerate(params):
    """Whether the log-rates do not vary: independent genes."""
    return params.loadings.shape[1] == 0 and not params.noise.any()


def log_gamma_noise(r, n_rows, streams):
    """Logarithms of Gamma(r, 1/r) variables, (n_rows, n_genes); 0 where r is infinite.

    ``Gamma(r) = Gamma(r + 1) U^(1/r)``, in logarithms: no underflow for small r.
    """
    out = np.zeros((n_rows, r.size))
    finite = np.isfinite(r)
    if finite.any():
        r = r[finite]
        shape = (n_rows, r.size)
        out[:, finite] = np.log(streams.gamma.standard_gamma(r + 1.0, shape)) - np.log(r)
        out[:, finite] -= streams.exponential.standard_exponential(shape) / r
    return out


def capture_offsets(prior, library_size, stream):
    """Draws of ``TruncNormal(log M0 - log L, sigma_M, low=0)``, one per row; 0 without capture."""
    if prior is None:
        return np.zeros(library_size.size)
    loc, scale = prior.rows(library_size)
    # the upper tail, in logarithms: exact however far below 0 loc lies
    log_tail = -stream.standard_exponential(loc.size) + log_ndtr(loc / scale)
    return np.maximum(loc - scale * ndtri_exp(log_tail), 0.0)


def softmax(log_weights):
    """Points on the simplex, row by row."""
    weights = np.exp(log_weights - log_weights.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def poisson(log_rates, stream):
    """Poisson counts.

    Raises
    ------
    ValueError
        When a rate is beyond 64-bit counts.
    """
    with np.errstate(over="ignore"):
        rates = np.exp(log_rates)
    if not np.all(rates < _LARGEST_RATE):
        genes = np.flatnonzero(~np.all(rates < _LARGEST_RATE, axis=0))
        raise ValueError(
            f"Expected counts above {_LARGEST_RATE:.0e} were drawn for {genes.size} of {rates.shape[1]} "
            f"genes (positions {genes[:10].tolist()}): their log-rates vary too much for counts to be "
            "drawn. Look at noise_variance_, loadings_ and converged_; level='library_anchored' needs "
            "compositions only."
        )
    return stream.poisson(rates)


@float64
def _draw_batch(batches, cells, params, zeta, score_noise, gene_noise):
    alpha, results, _ = batches.solve(cells, params, zeta)
    y = draw_rates(cells, params, results.zeta, alpha, score_noise, gene_noise)
    return np.asarray(results.zeta), np.asarray(y)


class Replicates:
    """Replicated counts of rows at one level, as a stream of chunks.

    Parameters
    ----------
    model : PredictiveModel
        Fitted.
    X : csr_matrix of shape (n_rows, n_genes) or None
        Validated counts; None stands for the training rows, by their library sizes.
    level : one of `LEVELS`
    n_samples : int
    random_state : int, RandomState instance or None
    capture : one of `CAPTURE`
    latent : one of `LATENT`
    known : Known
        Covariates and exposures of the rows.
    """

    def __init__(self, model, X, level, n_samples, random_state, capture, latent, known):
        self.rng = check_random_state(model.random_state if random_state is None else random_state)
        self.model, self.X, self.level, self.known = model, X, level, known
        self._at_mode = latent == "mode"
        self.library_size = model._library_size if X is None else _capture.library_sizes(X)
        self.n_rows, self.n_genes = self.library_size.size, model.n_features_in_
        per_cell = level == "per_cell"
        eta = None if capture == "prior" else LEVELS[level]
        self._draws = model._posterior_draws(n_samples, X, self.rng, eta=eta, known=known)
        self._streams = random_streams(self.rng)
        self._totals = np.rint(self.library_size).astype(np.int64)
        self.given_totals = level == "library_anchored" or (per_cell and model._given_totals)
        self._scores = None
        if per_cell and self._draws.eta is None:
            self._capture = model._row_capture(X, known)

    def params(self, s):
        """The parameters of posterior draw s."""
        params, draws = self.model._params(), self._draws
        loadings, noise = params.loadings, params.noise
        if draws.inflation is not None:
            loadings = loadings * np.sqrt(draws.inflation[s])[:, None]
            noise = noise * draws.inflation[s]
        coef = params.coef if draws.coef is None else draws.coef[s]
        return Params(draws.log_mean[s], loadings, noise, 1.0 / draws.r[s], coef)

    def fresh_rates(self, params, rows):
        """``x ~ N(mu, W W' + diag(d))`` for a number of rows, (rows, n_genes), at the mean covariates."""
        k, normal = params.loadings.shape[1], self._streams.normal
        if degenerate(params):
            return np.broadcast_to(params.mean, (rows, params.mean.size))
        noise = normal.standard_normal((rows, k + params.mean.size))
        return params.mean + noise[:, :k] @ params.loadings.T + np.sqrt(params.noise) * noise[:, k:]

    def chunks(self, s):
        """Yield (slice of rows, counts of shape (rows, n_genes)) of replicate s.

        Call it for s = 0, 1, ... in order: the random streams go on from one replicate to the next.
        """
        params = self.params(s)
        parts = self._posterior_rates if self.level == "per_cell" else self._prior_rates
        for rows, log_rates in parts(params, s):
            noise = log_gamma_noise(dispersion(params), rows.stop - rows.start, self._streams)
            log_intensity = log_rates + noise
            if self.given_totals:
                p = softmax(log_intensity)
                yield rows, self._streams.count.multinomial(self._totals[rows], p)
            else:
                yield rows, poisson(log_intensity, self._streams.count)

    def counts(self, s, genes, out=None):
        """Replicate s of the genes at these positions, (n_rows, n_genes_selected), written to `out`."""
        if out is None:
            out = np.empty((self.n_rows, genes.size), np.int64)
        for rows, counts in self.chunks(s):
            out[rows] = counts[:, genes]
        return out

    def row_chunks(self):
        """Slices of rows whose dense arrays are small."""
        step = max(_CHUNK_ENTRIES // self.n_genes, 1)
        for start in range(0, self.n_rows, step):
            yield slice(start, min(start + step, self.n_rows))

    def _prior_rates(self, params, s):
        offset = np.zeros(self.n_rows)
        if self._draws.eta is not None:
            offset = self._draws.eta[s]
        elif self.level == "marginal":
            prior = self.model.capture_prior_
            offset = capture_offsets(prior, self.library_size, self._streams.offset)
        for rows in self.row_chunks():
            x = self.fresh_rates(params, rows.stop - rows.start)
            yield rows, x + self._shift(params, rows) - offset[rows, None]

    def _shift(self, params, rows):
        """``B c + o`` of these rows."""
        return self.known.chosen(rows).log_scale(params.coef)

    def _posterior_rates(self, params, s):
        if self._draws.eta is None:
            capture = self._capture
        else:
            capture = self._draws.eta[s], np.zeros(self.n_rows), np.ones(self.n_rows)
        k, n_genes = params.loadings.shape[1], self.n_genes
        if degenerate(params):
            for rows in self.row_chunks():
                yield rows, params.mean + self._shift(params, rows) - capture[0][rows, None]
            return
        batches = RowBatches(self.X, *capture, batch_size=self.model.batch_size, known=self.known)
        params = with_padded_rank(params, batches)
        padded = params.loadings.shape[1]
        if self._scores is None:
            self._scores = np.zeros((self.n_rows, padded + 1))
        for rows, cells in batches:
            n = rows.stop - rows.start
            normal = np.zeros((n, k + 1 + n_genes))
            if not self._at_mode:
                normal = self._streams.normal.standard_normal(normal.shape)
            score_noise = np.zeros((n, padded + 1))
            score_noise[:, :k], score_noise[:, -1] = normal[:, :k], normal[:, k]
            padded_rows = (self._scores[rows], score_noise, normal[:, k + 1 :])
            zeta, y = _draw_batch(batches, cells, params, *(batches.padded(a) for a in padded_rows))
            # the next replicate starts from the last finite scores
            self._scores[rows] = np.where(np.isfinite(zeta[:n]), zeta[:n], 0.0)
            yield rows, y[:n]

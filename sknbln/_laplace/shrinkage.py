r"""Priors of the loadings' columns, and the loop that alternates them with sweeps.

Every prior acts on the columns of ``W_perp`` (loadings less their mean over genes) as a Gaussian with
``G - 1`` degrees of freedom and standard deviation ``lambda_k``; the strategies differ in how
``lambda_k`` is found from the column's ``S_k = |W_perp[:, k]|^2``. The solver sees a `ColumnPenalty`
and none of the names.

**What the posterior mode of W gets wrong, and "ard" does not.** At the mode of (W, lambda) the prior
pulls every column along its own direction with a force of ``G - 1`` degrees of freedom, while the
``n`` cells determine the length of a factor by ``2 n`` only: real columns come out short by
``(G - 1) / 2 n`` in log length. The posterior *volume* of W undoes this. What the cells say of
a gene's loading, ``A``, is its weight times the squares of the scores' means: with ``q = w' B w``, ``B =
mean_c b_cg`` and the reliability ``rho = q / (1 + q)`` those go as ``q / (1 + q)^2``, so that shortening a
column whose scores are well known (rho near 1) sharpens every gene's regression on them, and shortening
one of noise (rho < 1/2) does not. Keeping ``- (1/2) log det (A + 1 / lambda^2)`` of Laplace's integral
over W gives a force of ``gamma_k (2 rho_k - 1)`` along the column,

.. math:: \gamma_k = \sum_g (1 - \mathrm{Var}(w_{gk}) / \lambda_k^2)

(MacKay's number of well-determined loadings) against the prior's ``gamma_k``. It is applied, where
positive, as the gradient of ``(v_k / 2) log(1 + q_k)``, ``v_k = gamma_k (2 rho_k - 1) / rho_k``. A column
that the data support is left at its length, and its genes are shrunk against each other by how much is known
of each; a column of noise is not protected and goes to zero.

What ``q_k`` is once the sweeps move the loadings: the k-th eigenvalue of ``W' B W``. A rotation changes none
of them, and of the prior's density nothing at first order, the columns being orthogonal. With ``w_k' B w_k``
a rotation would gain: the sweeps would turn the columns, every update of the scales would turn them back, and
the two would not come to rest.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

from .driver import ascend
from .sweeps import least_squares_matrix

_SCALE_ROUNDS = 200


def compositional(loadings):
    """``W_perp``: the loadings less their mean over genes."""
    return loadings - loadings.mean(0)


class ColumnPenalty(NamedTuple):
    """Log-density of the loadings as the solver sees it, up to constants."""

    precision: np.ndarray  # (k,) 1 / lambda_k^2
    volume: np.ndarray  # (k,) v, of the eigenvalues of W' B W, ascending; 0 without the volume term
    weight: np.ndarray  # (n_genes,) B

    def value(self, loadings):
        """Penalty at the loadings, nats."""
        W = compositional(loadings)
        eigenvalues = np.linalg.eigvalsh(W.T @ (self.weight[:, None] * W))
        return 0.5 * float(
            self.volume @ np.log1p(np.maximum(eigenvalues, 0.0))
            - np.sum(self.precision * np.sum(W**2, 0))
        )

    def gradient(self, loadings):
        """Its gradient in the loadings, (n_genes, k)."""
        W = compositional(loadings)
        weighted = self.weight[:, None] * W
        eigenvalues, basis = np.linalg.eigh(W.T @ weighted)
        pull = basis * (self.volume / (1.0 + np.maximum(eigenvalues, 0.0))) @ basis.T
        return compositional(weighted) @ pull - self.precision * W


class Evidence(NamedTuple):
    """What a scale update may look at."""

    squared_norm: np.ndarray  # (k,) S_k
    #: (k,) q / (1 + q), q = w' B w: the squared correlation of a score and its mean
    reliability: np.ndarray
    information: np.ndarray  # (n_genes, k) of each loading given the others
    weight: np.ndarray  # (n_genes,) B, the means over cells of b

    @property
    def dof(self):
        """Degrees of freedom of a column of W_perp."""
        return max(self.information.shape[0] - 1, 1)


class NoPrior:
    """No shrinkage."""

    type = "none"
    smallest = 0.0  # that a variance may be

    def update(self, evidence):
        """Variances lambda_k^2 and the volume terms gamma_k of the columns."""
        k = evidence.squared_norm.size
        return np.full(k, np.inf), np.zeros(k)

    def diagnostics(self):
        """Global scale, where there is one."""
        return {}


class Gaussian(NoPrior):
    """``w_gk ~ N(0, sigma^2)`` with a fixed ``sigma``."""

    type = "gaussian"

    def __init__(self, sigma=1.0):
        self.sigma = sigma

    def update(self, evidence):
        """The same variance whatever the evidence."""
        k = evidence.squared_norm.size
        return np.full(k, self.sigma**2), np.zeros(k)


class HorseshoeColumnwise(NoPrior):
    r"""``w_gk ~ N(0, lambda_k^2)``, ``lambda_k ~ HalfCauchy(tau)``, ``tau ~ HalfCauchy(tau_scale)``.

    lambda is a standard deviation, at least ``lambda_min``: the joint mode is unbounded as W and
    lambda vanish together.
    """

    type = "horseshoe_columnwise"

    def __init__(self, tau_scale=1.0, lambda_min=1e-3):
        self.tau_scale, self.lambda_min = tau_scale, lambda_min
        self.smallest = lambda_min**2
        self.tau = tau_scale

    def column_variance(self, S, dof, tau):
        """Mode of ``lambda^2`` given S and tau: a quadratic equation."""
        a, b, c = -(dof + 2.0), S - dof * tau**2, S * tau**2
        v = (-b - np.sqrt(b**2 - 4 * a * c)) / (2 * a)
        return np.maximum(v, self.smallest)

    def update(self, evidence):
        """Joint mode of lambda and tau, alternating."""
        S, dof = evidence.squared_norm, evidence.dof

        def minus_log_density(log_tau, v):
            tau = np.exp(log_tau)
            return np.sum(np.log(tau) + np.log1p(v / tau**2)) + np.log1p(
                (tau / self.tau_scale) ** 2
            )

        for _ in range(_SCALE_ROUNDS):
            before = self.tau
            v = self.column_variance(S, dof, before)
            limits = np.log(self.lambda_min), np.log(max(1e3 * self.tau_scale, self.lambda_min))
            found = minimize_scalar(minus_log_density, bounds=limits, args=(v,), method="bounded")
            self.tau = float(np.exp(found.x))
            if abs(np.log(self.tau / before)) < 1e-6:
                break
        return self.column_variance(S, dof, self.tau), np.zeros(S.size)

    def diagnostics(self):
        """The global scale tau."""
        return {"tau": self.tau}


class NEGColumnwise(NoPrior):
    """Normal-exponential-gamma: variance ``psi_k ~ Exponential(gamma_k)``, ``gamma_k ~ Gamma(alpha, beta)``.

    ``sqrt(psi)`` is at least ``lambda_min``.
    """

    type = "neg_columnwise"

    def __init__(self, alpha=1.0, beta=1.0, lambda_min=1e-3):
        self.alpha, self.beta, self.lambda_min = alpha, beta, lambda_min
        self.smallest = lambda_min**2

    def update(self, evidence):
        """Joint mode of psi and gamma, alternating."""
        S, dof = evidence.squared_norm, evidence.dof
        psi = np.maximum(S / dof, self.smallest)
        for _ in range(_SCALE_ROUNDS):
            rate = self.alpha / (psi + self.beta)
            # 2 gamma psi^2 + dof psi - S = 0, in the form that does not cancel
            new = 2.0 * S / (dof + np.sqrt(dof**2 + 8.0 * rate * S))
            new = np.maximum(new, self.smallest)
            if np.all(np.abs(new - psi) <= 1e-8 * psi):
                break
            psi = new
        return new, np.zeros(S.size)


class ARD(NoPrior):
    """Empirical-Bayes variances that count the posterior variance of W, and its volume.

    ``lambda_k^2 = (S_k + sum_g Var(w_gk)) / (G - 1)``, at least 1e-6, iterated to its fixed point. Both
    the variance and the volume count as far as the column's scores are known: times ``(2 rho - 1) / rho``,
    at least 0.
    """

    type = "ard"
    #: of a variance: scales of 1e-3 at least, as of the other priors. A column of W_perp that is far
    #: more tightly held ties the genes to each other where its all-ones part is not small, and the
    #: sweeps, which step gene by gene, no longer get anywhere.
    smallest = 1e-6

    def update(self, evidence):
        """Fixed point of the variances, and gamma_k there."""
        S, information, dof = evidence.squared_norm, evidence.information, evidence.dof
        # 1 for scores that are known exactly, 0 where the reliability is below 1/2
        support = np.maximum(2.0 - 1.0 / np.maximum(evidence.reliability, 1e-300), 0.0)
        v = np.maximum(S / dof, self.smallest)
        for _ in range(_SCALE_ROUNDS):
            variance = 1.0 / (information + 1.0 / v)
            new = np.maximum((S + support * variance.sum(0)) / dof, self.smallest)
            if np.all(np.abs(new - v) <= 1e-6 * v):
                break
            v = new
        gamma = np.sum(1.0 - 1.0 / (1.0 + information * v), 0)
        return v, gamma * support


TYPES = {c.type: c for c in (NoPrior, Gaussian, HorseshoeColumnwise, NEGColumnwise, ARD)}


def evidence_at(loadings, moments, n_cells):
    """`Evidence` from the sums over cells at the loadings."""
    k = loadings.shape[1]
    A = least_squares_matrix(moments, k)[:, 1:, 1:]
    inverse = np.linalg.inv(A + 1e-8 * np.eye(k))
    information = 1.0 / np.maximum(np.einsum("gii->gi", inverse), 1e-300)
    squares = compositional(loadings) ** 2
    weight = moments[:, 0] / n_cells
    spread = weight @ squares
    return Evidence(np.sum(squares, 0), spread / (1.0 + spread), information, weight)


SWEEPS_PER_STAGE = 6
#: a stage under scales that stay goes on: every other one starts without a memory of the steps
SWEEPS_OF_SETTLED_STAGE = 60
#: columns below this fraction of the largest are not counted
RANK_FRACTION = 0.05
#: nor columns whose root mean square is below this, nats: where all vanish, none is real
SMALLEST_LOADING = 0.01
_SETTLED = 0.02  # relative change of a column's lambda
LONGEST_REACH = 4.0  # of an update of a column's log variance, times what was found


class Relaxation:
    """Over-relaxation of the columns' variances, on their logarithms.

    An update of the variances goes a small part of the way for a column that the data let go. A change that
    keeps its sign from stage to stage is taken twice, then `LONGEST_REACH` times.
    """

    def __init__(self):
        self.change, self.reach = 0.0, 1.0

    def __call__(self, before, found, smallest):
        """Variances to go on with, from those of the last stage and those found at its end."""
        change = np.log(found / before)
        persists = change * self.change > 0
        self.reach = np.where(persists, np.minimum(2.0 * self.reach, LONGEST_REACH), 1.0)
        self.change = change
        return np.maximum(before * np.exp(self.reach * change), smallest)


def singular_basis(loadings):
    """Rotation (k, k) to the singular basis of W_perp, with signs.

    In it the columns of W_perp are orthogonal, their norms descend, and the entry of largest
    magnitude of each is positive. ``scores @ rotation`` are the scores in that basis.
    """
    centred = compositional(loadings)
    Vt = np.linalg.svd(centred, full_matrices=centred.shape[0] < centred.shape[1])[2]
    rotated = centred @ Vt.T
    largest = rotated[np.argmax(np.abs(rotated), 0), np.arange(rotated.shape[1])]
    return Vt.T * np.where(largest < 0, -1.0, 1.0)


def effective_rank(norms, n_genes):
    """Number of columns above 5 % of the largest that move the genes at all."""
    least = max(RANK_FRACTION * norms.max(initial=0.0), SMALLEST_LOADING * np.sqrt(n_genes))
    return int(np.sum(norms > least))


def ascend_with_prior(objective, strategy, params, free, *, n_cells, tol, max_iter, report=None):
    """Alternate sweeps under a fixed penalty with updates of the columns' scales.

    Between stages the loadings are rotated to their singular basis, in which the scales are found.
    Arguments and result as of ``driver.ascend``, with the scales ``lambda_k`` beside it.
    """
    found = None
    try:
        for stage in _stages(objective, strategy, params, free, n_cells, tol, max_iter, report):
            found = stage
    except KeyboardInterrupt:
        if found is None:
            raise
        outcome, scales = found
        return outcome.stopped(), scales
    return found


def _stages(objective, strategy, params, free, n_cells, tol, max_iter, report):
    """Yield the `Outcome` and the scales after each stage, as if it were the last."""
    history, done, before = [], 0, None
    relaxation = Relaxation()
    while True:
        rotation = singular_basis(objective.coupling.expand(params).loadings)
        params = params._replace(loadings=params.loadings @ rotation)
        objective.rotate(rotation)
        point = objective(params)
        natural = objective.coupling.expand(params).loadings
        evidence = evidence_at(natural, point.moments, n_cells)
        found, volume = strategy.update(evidence)
        real = found > (RANK_FRACTION / 2) ** 2 * found.max()
        settled = before is not None and np.all(
            np.abs(np.sqrt(found[real] / before[real]) - 1.0) < _SETTLED
        )
        v = found if before is None else relaxation(before, found, strategy.smallest)
        ascending = volume[np.argsort(evidence.reliability)]
        objective.penalty = ColumnPenalty(1.0 / v, ascending, evidence.weight)
        most = SWEEPS_OF_SETTLED_STAGE if settled else SWEEPS_PER_STAGE
        outcome = ascend(
            objective,
            params,
            free,
            n_cells=n_cells,
            tol=tol,
            max_iter=min(most, max_iter - done),
            report=None if report is None else lambda i, p, done=done: report(done + i, p),
        )
        history += outcome.history if not history else outcome.history[1:]
        done += outcome.n_iter
        params = outcome.point.params
        converged = bool(outcome.converged and settled)
        # a stage that did not move, under scales that did not: so would be all that follow
        stuck = (
            outcome.n_iter == 1
            and outcome.gain == 0.0
            and before is not None
            and np.allclose(v, before, rtol=1e-9, atol=0.0)
        )
        before = v
        reason = f"max_iter={max_iter} sweeps were done"
        if converged or stuck or outcome.interrupted:
            reason = outcome.reason
        yield (
            outcome._replace(
                converged=converged, reason=reason, history=list(history), n_iter=done
            ),
            np.sqrt(v),
        )
        if converged or stuck or outcome.interrupted or done >= max_iter:
            return

r"""Priors of the loadings' columns: updates of their scales between sweeps.

Every prior acts on the columns of ``W_perp`` (loadings less their mean over genes) as a Gaussian with
``G - 1`` degrees of freedom and standard deviation ``lambda_k``. The priors differ in their update of
``lambda_k``, which is a function of the `Evidence`, foremost of ``S_k = |W_perp[:, k]|^2``. The objective
takes a `ColumnPenalty`, whatever the prior.

**What the posterior mode of W gets wrong, and "ard" does not.** At the mode of (W, lambda) the prior
pulls every column along its own direction with a force of ``G - 1`` degrees of freedom, while the
``n`` cells determine the length of a factor by ``2 n`` only: real columns come out short by
``(G - 1) / 2 n`` in log length. The posterior *volume* of W undoes this. The information ``A`` of the cells
in a gene's loading is the gene's weight times the squares of the posterior means of the scores. With
``q = w' B w``, ``B = mean_c b_cg`` and the reliability ``rho = q / (1 + q)`` those are proportional to
``q / (1 + q)^2``: shortening a column whose scores are well known (rho near 1) sharpens every gene's
regression on them, and shortening a column of noise (rho < 1/2) does not. Keeping
``- (1/2) log det (A + 1 / lambda^2)`` of Laplace's integral over W gives a force of ``gamma_k (2 rho_k - 1)``
along the column,

.. math:: \gamma_k = \sum_g (1 - \mathrm{Var}(w_{gk}) / \lambda_k^2)

(MacKay's number of well-determined loadings) against the prior's ``gamma_k``. It is applied, where
positive, as the gradient of ``(v_k / 2) log(1 + q_k)``, ``v_k = gamma_k (2 rho_k - 1) / rho_k``. A column
that the data support keeps its length, and its genes are shrunk relative to each other, each by how well it
is known; a column of noise goes to zero.

While the sweeps move the loadings, ``q_k`` is the k-th eigenvalue of ``W' B W``. A rotation does not change
the eigenvalues, nor, because the columns are orthogonal, the density of the prior at first order. With
``w_k' B w_k`` instead a rotation would raise the objective: the sweeps would turn the columns, every update
of the scales would turn them back, and the fit would not converge.
"""

import inspect
from functools import partial
from numbers import Real
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

from .gauge import RANK_FRACTION, compositional, singular_basis
from .metric import least_squares_matrix

#: rounds of the iteration by which an update finds its scales, at most
_SCALE_ROUNDS = 200
_SETTLED = 0.01  # relative change of a column's lambda by an update
LONGEST_REACH = 4.0  # largest factor by which a change of a column's log variance is lengthened


class ColumnPenalty(NamedTuple):
    """Log-density of the loadings at fixed scales, up to constants."""

    precision: np.ndarray  # (k,) 1 / lambda_k^2
    volume: (
        np.ndarray
    )  # (k,) v, in ascending order of the eigenvalues of W' B W; 0 without the term
    weight: np.ndarray  # (n_genes,) B

    def value(self, loadings):
        """Log-density at the loadings, nats."""
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
    """Summary of the loadings and of the counts, for updates of the scales."""

    squared_norm: np.ndarray  # (k,) S_k
    #: (k,) q / (1 + q), q = w' B w: the squared correlation of a score and its mean
    reliability: np.ndarray
    information: np.ndarray  # (n_genes, k) in each loading, the others unknown too
    weight: np.ndarray  # (n_genes,) B, mean of b over cells

    @property
    def dof(self):
        """Degrees of freedom of a column of W_perp."""
        return max(self.information.shape[0] - 1, 1)


class ColumnScales(NamedTuple):
    """Scales of the columns: as an update makes them, and then as the next sweep uses them."""

    variance: np.ndarray  # (k,) lambda_k^2; of a sweep: over-relaxed
    volume: np.ndarray  # (k,) coefficients v of the volume term; 0 without it
    smallest: float = 0.0  # lower bound of a variance
    tau: float | None = None  # the global scale, where there is one
    change: np.ndarray | float = 0.0  # (k,) of log variances since the last sweep
    reach: np.ndarray | float = 1.0  # (k,) factor by which the next change is lengthened
    penalty: ColumnPenalty | None = None  # of the sweep
    settled: bool = False  # whether the scales of real columns are those of the last sweep
    unchanged: bool = False  # whether all scales are, to rounding


def gaussian(evidence, last=None, *, sigma=1.0):
    """``w_gk ~ N(0, sigma^2)`` with a fixed ``sigma``."""
    k = evidence.squared_norm.size
    return ColumnScales(np.full(k, sigma**2), np.zeros(k))


def horseshoe_variance(S, dof, tau, smallest=0.0):
    """Mode of ``lambda^2`` given S and tau under the horseshoe: a quadratic equation."""
    a, b, c = -(dof + 2.0), S - dof * tau**2, S * tau**2
    v = (-b - np.sqrt(b**2 - 4 * a * c)) / (2 * a)
    return np.maximum(v, smallest)


def horseshoe(evidence, last=None, *, tau_scale=1.0, lambda_min=1e-3, tau_min=None):
    r"""``w_gk ~ N(0, lambda_k^2)``, ``lambda_k ~ HalfCauchy(tau)``, ``tau ~ HalfCauchy(tau_scale)``.

    The joint mode of lambda and tau, alternating. lambda is a standard deviation, at least ``lambda_min``:
    the joint mode is unbounded as W and lambda vanish together. tau is at least ``tau_min``, by default
    ``lambda_min``.
    """
    S, dof, smallest = evidence.squared_norm, evidence.dof, lambda_min**2
    least = lambda_min if tau_min is None else tau_min
    limits = np.log(least), np.log(max(1e3 * tau_scale, least))

    def minus_log_density(log_tau, v):
        tau = np.exp(log_tau)
        return np.sum(np.log(tau) + np.log1p(v / tau**2)) + np.log1p((tau / tau_scale) ** 2)

    tau = tau_scale if last is None else last.tau
    for _ in range(_SCALE_ROUNDS):
        before = tau
        v = horseshoe_variance(S, dof, before, smallest)
        best = minimize_scalar(minus_log_density, bounds=limits, args=(v,), method="bounded")
        tau = float(np.exp(best.x))
        if abs(np.log(tau / before)) < 1e-6:
            break
    v = horseshoe_variance(S, dof, tau, smallest)
    return ColumnScales(v, np.zeros(S.size), smallest, tau)


def normal_exponential_gamma(evidence, last=None, *, alpha=1.0, beta=1.0, lambda_min=1e-3):
    """Variance ``psi_k ~ Exponential(gamma_k)``, ``gamma_k ~ Gamma(alpha, beta)``: their joint mode.

    ``sqrt(psi)`` is at least ``lambda_min``.
    """
    S, dof, smallest = evidence.squared_norm, evidence.dof, lambda_min**2
    psi = np.maximum(S / dof, smallest)
    for _ in range(_SCALE_ROUNDS):
        rate = alpha / (psi + beta)
        # 2 gamma psi^2 + dof psi - S = 0, in the form that does not cancel
        new = 2.0 * S / (dof + np.sqrt(dof**2 + 8.0 * rate * S))
        new = np.maximum(new, smallest)
        if np.all(np.abs(new - psi) <= 1e-8 * psi):
            break
        psi = new
    return ColumnScales(new, np.zeros(S.size), smallest)


#: smallest variance under "ard": lambda is at least 1e-3, as under the other priors. A column of W_perp that
#: is held far more tightly ties its genes together, unless its all-ones part is small, and steps gene by gene
#: no longer move it.
SMALLEST_ARD_VARIANCE = 1e-6


def ard(evidence, last=None):
    """Empirical-Bayes variances, with the posterior variance and the posterior volume of W.

    ``lambda_k^2 = (S_k + sum_g Var(w_gk)) / (G - 1)``, at least `SMALLEST_ARD_VARIANCE`, iterated to its
    fixed point. The posterior variance and the volume are multiplied by ``(2 rho - 1) / rho``, at least 0:
    they count as far as the scores of the column are known.
    """
    S, information, dof = evidence.squared_norm, evidence.information, evidence.dof
    # 1 for scores that are known exactly, 0 where the reliability is below 1/2
    support = np.maximum(2.0 - 1.0 / np.maximum(evidence.reliability, 1e-300), 0.0)
    v = np.maximum(S / dof, SMALLEST_ARD_VARIANCE)
    for _ in range(_SCALE_ROUNDS):
        variance = 1.0 / (information + 1.0 / v)
        new = np.maximum((S + support * variance.sum(0)) / dof, SMALLEST_ARD_VARIANCE)
        if np.all(np.abs(new - v) <= 1e-6 * v):
            break
        v = new
    gamma = np.sum(1.0 - 1.0 / (1.0 + information * v), 0)
    return ColumnScales(v, gamma * support, SMALLEST_ARD_VARIANCE)


#: update of the scales by the name of the prior; None without a prior
TYPES = {
    "none": None,
    "gaussian": gaussian,
    "horseshoe_columnwise": horseshoe,
    "neg_columnwise": normal_exponential_gamma,
    "ard": ard,
}
#: SCRIBE's names of hyper-parameters, by prior: the name here, and the value here as a function of SCRIBE's
ALIASES = {
    "gaussian": {"scale": ("sigma", float)},
    "neg_columnwise": {"psi_min": ("lambda_min", np.sqrt)},  # psi is a variance
}
#: priors under which columns of noise vanish
CHOOSE_RANK = ("ard", "horseshoe_columnwise", "neg_columnwise")
#: range of the hyper-parameters of a loadings prior; their squares stay far from overflow
HYPER_PARAMETER_RANGE = (1e-8, 1e8)


def hyper_parameters(name):
    """Names of the hyper-parameters of a prior."""
    parameters = {} if TYPES[name] is None else inspect.signature(TYPES[name]).parameters
    return sorted(p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY)


def named(loadings_prior):
    """Name of a loadings prior and update of its scales, from a string or a dict.

    Raises
    ------
    ValueError
        For an unknown type or hyper-parameter, for a value that is not a number from 1e-8 to 1e8, and for a
        hyper-parameter that is given by its name and by its alias.
    """
    options = {"type": loadings_prior} if isinstance(loadings_prior, str) else dict(loadings_prior)
    name = options.pop("type", None)
    if not isinstance(name, str) or name not in TYPES:
        raise ValueError(
            f"loadings_prior={loadings_prior!r}: expected a type out of {sorted(TYPES)}, as a string or as "
            'a dict {"type": ..., hyper-parameters}.'
        )
    known, aliases = hyper_parameters(name), ALIASES.get(name, {})
    for key, value in options.items():
        if key not in known and key not in aliases:
            raise ValueError(
                f"loadings_prior: {name!r} has no hyper-parameter {key!r}; it has {known}."
            )
        least, most = HYPER_PARAMETER_RANGE
        if not isinstance(value, Real) or not least <= value <= most:
            raise ValueError(
                f"loadings_prior: {key}={value!r}, expected a positive finite number between {least:g} "
                f"and {most:g}."
            )
    for alias in aliases.keys() & options.keys():
        key, translated = aliases[alias]
        if key in options:
            raise ValueError(
                f"loadings_prior: {alias!r} is another name of {key!r}, found both. Give one of them."
            )
        options[key] = translated(options.pop(alias))
    return name, None if TYPES[name] is None else partial(TYPES[name], **options)


def evidence_at(loadings, moments, n_cells):
    """`Evidence` from the sums over cells at the loadings."""
    k = loadings.shape[1]
    A = least_squares_matrix(moments)[:, -k:, -k:]
    inverse = np.linalg.inv(A + 1e-8 * np.eye(k))
    information = 1.0 / np.maximum(np.einsum("gii->gi", inverse), 1e-300)
    squares = compositional(loadings) ** 2
    weight = moments[:, 0] / n_cells
    spread = weight @ squares
    return Evidence(np.sum(squares, 0), spread / (1.0 + spread), information, weight)


def relaxed(update, last):
    """The `ColumnScales` of an update with over-relaxed variances.

    An update moves the variance of a column that the data let go only a small part of the way. A change that
    keeps its sign from sweep to sweep is taken twice, then `LONGEST_REACH` times.
    """
    if last is None:
        return update
    change = np.log(update.variance / last.variance)
    persists = change * last.change > 0
    reach = np.where(persists, np.minimum(2.0 * last.reach, LONGEST_REACH), 1.0)
    variance = np.maximum(last.variance * np.exp(reach * change), update.smallest)
    return update._replace(variance=variance, change=change, reach=reach)


def next_scales(objective, x, column_prior, last, n_cells):
    """Coordinates in the singular basis of W_perp, the `ColumnScales` of the next sweep, and the rotation.

    ``last`` are those of the last sweep, None before the first.
    """
    rotation = singular_basis(objective.coupling.expand(x).loadings)
    x = x._replace(loadings=x.loadings @ rotation)
    objective.rotate(rotation)
    own = objective.coupling.expand(x)
    evidence = evidence_at(own.loadings, objective.moments(own), n_cells)
    update = column_prior(evidence, last)
    scales = relaxed(update, last)
    if last is not None:
        real = update.variance > (RANK_FRACTION / 2) ** 2 * update.variance.max()
        ratio = np.sqrt(update.variance[real] / last.variance[real])
        scales = scales._replace(
            settled=bool(np.all(np.abs(ratio - 1.0) < _SETTLED)),
            unchanged=np.allclose(scales.variance, last.variance, rtol=1e-9, atol=0.0),
        )
    ascending = update.volume[np.argsort(evidence.reliability)]
    penalty = ColumnPenalty(1.0 / scales.variance, ascending, evidence.weight)
    return x, scales._replace(penalty=penalty), rotation

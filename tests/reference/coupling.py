"""The marginal coupling of one gene by its formulas, in extended precision where NumPy has it."""

import numpy as np
from scipy import optimize
from scipy.special import digamma

from sknbln.solver.overdispersion import TotalOverdispersion
from sknbln.solver.params import NOISE_UNIT

from . import small

LD = np.longdouble


def total(n_genes=small.N_GENES):
    """`TotalOverdispersion` of genes from those with few counts (w = 0) to those with many (w = 1)."""
    return TotalOverdispersion(np.linspace(0.0, 1.0, n_genes))


def overdispersion(log_r, weight):
    """``T(r) = 2 w (log r - digamma(r)) + (1 - w) log(1 + 1/r)``, in double precision."""
    return 2 * weight * (log_r - digamma(np.exp(log_r))) + (1 - weight) * np.log1p(np.exp(-log_r))


def inverse_overdispersion(level, weight):
    """Log r at which T is ``level``, by bisection of its logarithm."""
    return optimize.brentq(
        lambda log_r: np.log(overdispersion(log_r, weight)) - np.log(level), -30.0, 16.0, xtol=1e-13
    )


def expand_gene(mean, loadings, log_noise, log_r, weight):
    """Parameters (mu, w, d, log r) of the model from a gene's coordinates; that of d is log(1 + d / unit).

    Nothing cancels: with ``t = T(r_m)`` the variance is ``t (1 - exp(-S / t))``, which leaves the
    overdispersion ``T(r) = t exp(-S / t)``. A weight of None couples the mean alone.
    """
    mean, loadings, log_noise = (np.asarray(a, LD) for a in (mean, loadings, log_noise))
    d = LD(NOISE_UNIT) * np.expm1(log_noise)
    S = np.sum(loadings**2) + d
    if weight is None:
        return mean - S / 2, loadings, d, LD(log_r)
    t = LD(overdispersion(float(log_r), weight))
    variance = -t * np.expm1(-S / t)
    c = variance / S
    left = inverse_overdispersion(float(t * np.exp(-S / t)), weight)
    return mean - variance / 2, np.sqrt(c) * loadings, c * d, LD(left)


def gradient_gene(weights, x, weight):
    """Gradient in (mean, loadings, noise) of ``sum(weights * expand_gene(x))``, by differences.

    ``weights`` and ``x`` are four arrays each, (mean, loadings, noise, log_r).
    """

    def parts(at):
        expanded = expand_gene(*at, weight)
        return [np.sum(np.asarray(w, LD) * p) for w, p in zip(weights, expanded, strict=True)]

    # steps are small beside the row and beside d; the dispersion is in double precision, with longer steps
    size = {1: np.sqrt(np.sum(np.square(x[1]))), 2: float(x[2])}
    out = []
    for block in range(3):
        base = np.atleast_1d(np.asarray(x[block], LD))
        slope = np.zeros(base.size)
        for i in range(base.size):

            def at(k, h, i=i, block=block, base=base):
                moved = base.copy()
                moved[i] += k * h
                return parts([*x[:block], moved.reshape(np.shape(x[block])), *x[block + 1 :]])

            for step, which in ((1e-3, slice(0, 3)), (2e-2, slice(3, 4))):
                h = LD(step) * min(1.0, size.get(block, 1.0))
                first, second = (sum(at(k, h)[which]) - sum(at(-k, h)[which]) for k in (1, 2))
                slope[i] += (8 * first - second) / (12 * h)
        out.append(slope.reshape(np.shape(x[block])))
    return out

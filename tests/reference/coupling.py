"""The marginal coupling of one gene by its formulas, in extended precision where NumPy has it."""

import numpy as np

from sknbln.solver.params import NOISE_UNIT

LD = np.longdouble


def expand_gene(mean, loadings, log_noise, log_r, couple_dispersion):
    """Parameters (mu, w, d, log r) of the model from a gene's coordinates; that of d is log(1 + d / unit).

    Nothing cancels: with ``t = S / S_max`` the variance is ``S_max (1 - exp(-t))``, which leaves the
    overdispersion ``phi = exp(S_max exp(-t)) - 1``.
    """
    mean, loadings, log_noise, log_r = (
        np.asarray(a, LD) for a in (mean, loadings, log_noise, log_r)
    )
    d = LD(NOISE_UNIT) * np.expm1(log_noise)
    S = np.sum(loadings**2) + d
    if not couple_dispersion:
        return mean - S / 2, loadings, d, log_r
    S_max = np.log1p(np.exp(-log_r))
    t = S / S_max
    variance = -S_max * np.expm1(-t)
    c = variance / S
    phi = np.expm1(S_max * np.exp(-t))
    return mean - variance / 2, np.sqrt(c) * loadings, c * d, -np.log(phi)


def gradient_gene(weights, x, couple_dispersion):
    """Gradient in the coordinates of ``sum(weights * expand_gene(x))``, by differences.

    ``weights`` and ``x`` are four arrays each, (mean, loadings, noise or log_noise, log_r).
    """

    def value(at):
        expanded = expand_gene(*at, couple_dispersion)
        return sum(np.sum(np.asarray(w, LD) * p) for w, p in zip(weights, expanded, strict=True))

    # steps are small beside the row and beside d
    size = {1: np.sqrt(np.sum(np.square(x[1]))), 2: float(x[2])}
    out = []
    for block in range(4):
        base = np.atleast_1d(np.asarray(x[block], LD))
        h = LD(1e-3) * min(1.0, size.get(block, 1.0))
        slope = np.zeros(base.size)
        for i in range(base.size):

            def at(k, i=i, block=block, base=base, h=h):
                moved = base.copy()
                moved[i] += k * h
                return value([*x[:block], moved.reshape(np.shape(x[block])), *x[block + 1 :]])

            slope[i] = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h)
        out.append(slope.reshape(np.shape(x[block])))
    return out

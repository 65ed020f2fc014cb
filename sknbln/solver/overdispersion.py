r"""What a gene's dispersion adds to the variance of its log-rate: the overdispersion ``T(r)``.

An independent-gene fit describes all overdispersion of a gene by its own dispersion ``r_source``. Here the
variance ``Sigma_gg`` of the log-rate explains a part, so that

.. math:: \Sigma_{gg} + T_g(r_g) = T_g(r_{\mathrm{source},g}), \qquad
          T_g(r) = 2 w_g (\log r - \psi(r)) + (1 - w_g) \log(1 + 1/r)

For a gene with many counts the negative binomial likelihood matches the mean of ``log u`` (the first term),
for one with few counts factorial moments (the second). The weight ``w = m / (m + r_source)`` at the mean
count m is a rule of thumb.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import jax.scipy.special as jsp
import numpy as np
import scipy.special as sp

from .channel import SMALLEST_OVERDISPERSION

#: sizes above this take the asymptotic series of ``log r - digamma(r)``, which has no cancellation
_LARGE = 1e3
_INVERSE_ROUNDS = 8  # of Newton's method, at most; all of them under JAX
_INVERSE_ACCURACY = 1e-8  # of log r: the last step, whose square is the error


def _functions(x):
    """The special functions and the array module for x: those of JAX, or of NumPy and SciPy."""
    is_numpy = isinstance(x, (np.ndarray, float, np.floating))
    return (np, sp) if is_numpy else (jnp, jsp)


@dataclass(frozen=True, eq=False)
class TotalOverdispersion:
    """``T(r)`` of each gene, nats squared, as a function of log r; for NumPy or JAX arrays."""

    weight: np.ndarray  # (n_genes,) w

    @classmethod
    def at(cls, mean_count, r):
        """From the genes' mean counts and their dispersion when they are independent, (n_genes,) each."""
        return cls(mean_count / (mean_count + r))

    def __call__(self, log_r):
        """T, shape (..., n_genes); 0 where log r is inf."""
        xp, special = _functions(log_r)
        inverse = xp.exp(-log_r)
        r = 1.0 / xp.maximum(inverse, 1.0 / _LARGE)
        exact = 2.0 * (xp.log(r) - special.digamma(r))
        log_moment = xp.where(inverse * _LARGE < 1.0, inverse + inverse**2 / 6.0, exact)
        return self.weight * log_moment + (1.0 - self.weight) * xp.log1p(inverse)

    def slope(self, log_r):
        """Derivative of T in log r, negative."""
        xp, special = _functions(log_r)
        inverse = xp.exp(-log_r)
        r = 1.0 / xp.maximum(inverse, 1.0 / _LARGE)
        exact = 2.0 * (1.0 - r * special.polygamma(1, r))
        log_moment = xp.where(inverse * _LARGE < 1.0, -inverse - inverse**2 / 3.0, exact)
        return self.weight * log_moment - (1.0 - self.weight) * inverse / (1.0 + inverse)

    def inverse(self, level):
        """Log r at which T is `level`; at most that of `SMALLEST_OVERDISPERSION`.

        Log T is nearly linear in log r, with a slope of about -1: Newton's method takes five or six rounds.
        """
        xp, _ = _functions(level)
        level = xp.maximum(level, SMALLEST_OVERDISPERSION)
        # lower bounds of the root, since T is at least w / r and at least log(1 + 1/r)
        log_r = xp.maximum(
            -(level + xp.log(-xp.expm1(-level))), xp.log(xp.maximum(self.weight, 1e-300) / level)
        )
        for _ in range(_INVERSE_ROUNDS):
            total = self(log_r)
            step = xp.log(level / total) * total / self.slope(log_r)
            log_r = log_r + step
            if xp is np and np.max(np.abs(step), initial=0.0) < _INVERSE_ACCURACY:
                break
        return xp.minimum(log_r, -np.log(SMALLEST_OVERDISPERSION))

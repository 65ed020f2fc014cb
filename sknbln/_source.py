"""What an NBLN fit takes from its NBVCP source: frozen values, soft priors, capture offsets."""

import copy
from contextlib import nullcontext

import numpy as np
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.utils.validation import check_is_fitted, check_memory

from ._nbvcp_posterior import SourceModel
from .solver.gene_priors import OverdispersionPrior
from .solver.objective import weak_coef_prior, weak_dispersion_prior, weak_mean_prior
from .solver.overdispersion import TotalOverdispersion
from .solver.params import GaussianPrior, Params

#: canonical names and their aliases
FREEZE_NAMES = {
    "r": ("dispersion",),
    "mu": ("expression", "mean_expression"),
    "eta": ("capture_efficiency",),
}

#: standard deviation of what the cascade's marginal mean and total overdispersion are wrong by, nats
COUPLING_ERROR = 0.1
_QUADRATURE_NODES = 31


def canonical_freeze(names):
    """Canonical freeze names in the order r, mu, eta.

    Raises
    ------
    ValueError
        If `names` is a string, or a name is unknown, or a parameter is named twice (by name and alias).
    """
    allowed = "; ".join(
        f"{name!r} (or {', '.join(map(repr, a))})" for name, a in FREEZE_NAMES.items()
    )
    if isinstance(names, str) or not isinstance(names, (tuple, list)):
        raise ValueError(
            f"informative_priors_freeze={names!r}: expected a tuple or list of names. Allowed: {allowed}."
        )
    meaning = {alias: name for name, aliases in FREEZE_NAMES.items() for alias in (name, *aliases)}
    name_used = {}
    for label in names:
        if not isinstance(label, str) or label not in meaning:
            raise ValueError(
                f"informative_priors_freeze names {label!r}, which is not a parameter. Allowed: {allowed}."
            )
        name = meaning[label]
        if name in name_used:
            raise ValueError(
                f"informative_priors_freeze names {name_used[name]!r} and {label!r}, which are the same "
                f"parameter. Name it once. Allowed: {allowed}."
            )
        name_used[name] = label
    return tuple(name for name in FREEZE_NAMES if name in name_used)


def needs_fit(source):
    """Whether the source is not fitted yet."""
    try:
        check_is_fitted(unwrapped(source))
    except NotFittedError:
        return True
    return False


def unwrapped(source):
    """The estimator inside a `FrozenEstimator`, or the source itself."""
    return source.estimator if isinstance(source, FrozenEstimator) else source


def _fit_source(source, X, known, around):
    """Fit the source; a module-level function, so that joblib can cache it."""
    with around(source):
        return source.fit(X, **known)


def fitted_source(source, X, memory, previous=None, known=None, around=nullcontext):
    """The fitted source: the given one if it is fitted, otherwise a clone fitted on X (cached by `memory`).

    ``known`` are the other arguments of its `fit`, what is known of the rows. If `previous`, a source from an
    earlier fit, is given, its fit is continued instead. ``around`` makes a context for an estimator's fit.

    Raises
    ------
    TypeError
        If the source is not an NBVCPEstimator.
    """
    if not isinstance(unwrapped(source), SourceModel):
        raise TypeError(
            "informative_prior_estimator has to be an NBVCPEstimator, fitted or not, possibly inside "
            f"sklearn.frozen.FrozenEstimator; found {type(unwrapped(source)).__name__}."
        )
    if needs_fit(source):
        if isinstance(source, FrozenEstimator):
            raise NotFittedError(
                "informative_prior_estimator is a FrozenEstimator of an estimator that is not fitted. "
                "Fit it before freezing, or give it without FrozenEstimator."
            )
        if previous is not None:
            resumed = copy.deepcopy(previous).set_params(**source.get_params())
            return _fit_source(resumed.set_params(warm_start=True), X, known or {}, around)
        cached = check_memory(memory).cache(_fit_source, ignore=["around"])
        return cached(clone(source), X, known or {}, around)
    return unwrapped(source)


def refuse_other_known(source, design, offset):
    """Raise ValueError if the source's fit had other covariates than a `Design`, or alone had an offset."""
    found, expected = list(source.covariate_names_in_), list(design.names)
    if found != expected:
        raise ValueError(
            f"informative_prior_estimator was fitted with the coefficients {found or 'of no covariates'}, "
            f"this fit has {expected or 'none'}: what covariates explain is in the source's dispersion or "
            "is not. Fit both with the same covariates, with the same levels."
        )
    if bool(source._known.exposure.shape[1]) != (offset is not None):
        had, has = ("no", "one") if offset is not None else ("an", "none")
        raise ValueError(
            f"informative_prior_estimator was fitted with {had} offset, this fit has {has}: their means are "
            "of different units. Give both fits the log-exposures of their rows, or neither."
        )


def posterior_of_genes(source, n_genes, names):
    """The posterior of a fitted source, an `NBVCPPosterior`, for the genes of X in their order.

    Genes are matched by name if both have names, so that the source may have more genes than X.

    Raises
    ------
    ValueError
        If a gene of X is missing from the source (the message names the first ten), or, without names, if
        the numbers of genes differ.
    """
    source_names = getattr(source, "feature_names_in_", None)
    if source_names is None or names is None:
        if source.n_features_in_ != n_genes:
            raise ValueError(
                f"informative_prior_estimator was fitted on {source.n_features_in_} genes, X has {n_genes}. "
                "Fit the source on the same genes, or fit both on DataFrames, whose column names let a "
                "source of more genes be cut to those of X."
            )
        return source._posterior()
    position = {name: i for i, name in enumerate(source_names)}
    missing = [str(name) for name in names if name not in position]
    if missing:
        raise ValueError(
            f"informative_prior_estimator was not fitted on {len(missing)} of the {n_genes} genes of X: "
            f"{', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''}. Fit the source on a set "
            "of genes that contains those of X."
        )
    genes = np.array([position[name] for name in names])
    if np.array_equal(genes, np.arange(source.n_features_in_)):
        return source._posterior()
    return source._posterior().with_genes(genes)


def soft_priors(source, tau, n_samples, rng):
    """Gaussian priors of log m, log r and B, the three blocks of `Params` that the source has.

    Means and standard deviations are those of draws of the source, an `NBVCPPosterior`; the latter are
    multiplied by `tau`.
    """
    draws = source.log_draws(n_samples, rng)
    mean, dispersion = (
        GaussianPrior(log.mean(0), (tau * np.maximum(log.std(0), 1e-8)) ** -2.0)
        for log in (draws.mu, draws.r)
    )
    return Params(mean, None, None, dispersion, _coef_prior(source, tau, 0.0))


def _coef_prior(source, tau, error):
    """Gaussian prior of the coefficients from the source's posterior; ``error`` is its own, nats."""
    scale = np.maximum(source.guide.coef_scale, 1e-8)
    return GaussianPrior(source.coef, 1.0 / (tau**2 * scale**2 + error**2))


def coef_prior(source, free, tau, coupled):
    """Prior of the coefficients: the soft and the weak prior; flat where they are frozen.

    ``coupled`` is whether the cascade is the marginal one, which is wrong by `COUPLING_ERROR`.
    """
    shape = source.coef.shape
    if not free.coef:
        return GaussianPrior.flat(shape)
    soft = _coef_prior(source, tau, COUPLING_ERROR if coupled else 0.0)
    return soft.times(weak_coef_prior(shape))


def priors(source, free, tau, n_samples, rng):
    """Priors of the mean and log r: the soft priors, with the weak prior of the mean; flat where frozen."""
    flat = GaussianPrior.flat(source.mean.size)
    if not (free.mean or free.dispersion):
        return flat, flat
    soft = soft_priors(source, tau, n_samples, rng)
    mean = soft.mean.times(weak_mean_prior(np.log(source.mean)))
    dispersion = soft.dispersion.times(weak_dispersion_prior(source.mean.size))
    return mean if free.mean else flat, dispersion if free.dispersion else flat


def total_overdispersion(source, offsets, known):
    """`TotalOverdispersion` of the source's genes on rows with these capture offsets and this `Known`."""
    scale = known.sum_of_scales(offsets.loc, source.coef) / known.total_weight
    return TotalOverdispersion.at(source.mean * scale, source.dispersion)


def marginal_priors(source, total, free, tau):
    """Priors of the marginal log-mean and of the log of the total overdispersion; flat where frozen.

    Their standard deviations are `tau` times those of the source's posterior, and `COUPLING_ERROR` for what
    the coupling itself is wrong by. That of log T(r) is integrated over the normal posterior of log r by
    Gauss-Hermite quadrature.
    """
    flat, guide = GaussianPrior.flat(source.mean.size), source.guide

    def anchored(loc, variance):
        return GaussianPrior(loc, 1.0 / (tau**2 * variance + COUPLING_ERROR**2))

    loc, scale = guide.log_dispersion[0], guide.log_dispersion_scale
    nodes, weights = np.polynomial.hermite_e.hermegauss(_QUADRATURE_NODES)
    level = np.log(total(loc + nodes[:, None] * scale))
    weights = weights / weights.sum()
    of_level = weights @ (level - weights @ level) ** 2
    mean = anchored(np.log(source.mean), guide.log_mean_scale**2)
    mean = mean.times(weak_mean_prior(np.log(source.mean)))
    of_total = anchored(np.log(total(np.log(source.dispersion))), of_level)
    return mean if free.mean else flat, OverdispersionPrior(total, of_total)

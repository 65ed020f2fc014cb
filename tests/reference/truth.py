"""Estimators with the true parameters of a simulation: no fit, no posterior uncertainty."""

import numpy as np

from sknbln import NBLNEstimator, NBVCPEstimator
from sknbln._capture import CapturePrior, OffsetPosterior
from sknbln._design import Design
from sknbln._known import Known
from sknbln._svi import Guide
from sknbln.solver.params import Params

#: standard deviation of a posterior that is a point: below rounding, and its square is not 0
POINT = 1e-17


def nbvcp(mean, r, *, capture_prior=None, library_size=(), **params):
    """An `NBVCPEstimator` in its fitted state with these parameters; every posterior is a point."""
    model = NBVCPEstimator(**params)
    point, n_rows = np.full(len(mean), POINT), len(library_size)
    offsets = None
    model.capture_prior_ = None if capture_prior is None else CapturePrior(*capture_prior)
    model.capture_offset_ = np.zeros(n_rows)
    if capture_prior is not None:
        loc = capture_prior[0] - np.log(library_size)
        model.capture_offset_ = np.maximum(loc, 0.0)
        offsets = (loc, np.full(n_rows, POINT))
    model.mean_, model.dispersion_ = np.array(mean, float), np.array(r, float)
    model.n_features_in_ = len(mean)
    model._library_size = np.asarray(library_size, float)
    model._design, model._known = Design.learned(None, n_rows), Known.nothing(n_rows)
    model.coef_ = np.zeros((len(mean), 0))
    model._training_offsets = OffsetPosterior(
        model.capture_offset_,
        np.full(n_rows, POINT),
        model.capture_offset_ if offsets is None else offsets[0],
    )
    model._guide = Guide(
        log_mean=(np.log(mean), point),
        log_dispersion=(np.log(r), point),
        capture_offset=offsets,
        common_shift=(np.ones(len(mean)), 0.0),
        dispersion_known=np.ones(len(mean)),
    )
    return model


def nbln(mean, loadings, noise, r, *, frozen=("r", "mu", "eta"), **params):
    """An `NBLNEstimator` in its fitted state with these parameters; ``mean`` are log-rates.

    Its source is that of :func:`nbvcp`, with the ``capture_prior`` and ``library_size`` in ``params``.
    """
    source = {
        name: params.pop(name) for name in ("capture_prior", "library_size") if name in params
    }
    params = {"cascade": "parameter", **params}  # frozen values are the model's own
    model = NBLNEstimator(latent_dim=max(loadings.shape[1], 1), **params)
    finite = np.where(np.isfinite(r), r, 1.0)
    source = nbvcp(np.exp(mean), finite, **source)
    model.informative_prior_estimator_, model._source = source, source._posterior()
    model.mean_, model.loadings_, model.noise_variance_ = mean, loadings, noise
    model.dispersion_ = np.broadcast_to(np.asarray(r, float), mean.shape)
    model.components_ = (loadings - loadings.mean(0)).T
    model.latent_dim_ = loadings.shape[1]
    if not np.all(np.isfinite(r)):
        frozen = tuple(name for name in frozen if name != "r")
    model.frozen_params_ = frozen
    none = np.zeros(mean.size)
    model._standard_deviation = Params(none, np.zeros(loadings.shape), none, none)
    for name in (
        *("capture_prior_", "capture_offset_", "n_features_in_"),
        *("_library_size", "_design", "_known", "coef_"),
    ):
        setattr(model, name, getattr(source, name))
    return model

"""What a diagnosis measures, and the error that this predicts for every estimator.

Everything here is a pure function of numbers. "Measured" arrays hold a number and its leave-one-out
replicates (see ``jackknife``), so that every prediction has a standard error, and two predictions
from the same probes share their noise. All gradients are compared with that of the smoothed J,
g = E[gradient], at the sigma of the measurement; e is an episode, and g_e its own gradient.
"""

from typing import Any, NamedTuple

import numpy as np

from unrollgrad.diagnostics.jackknife import leave_one_out, squared_norm_of_mean, standard_error
from unrollgrad.diagnostics.windows import Windows, of_different_episodes

__all__ = ["Candidate", "Derivatives", "Measurements", "StepCost", "candidates", "derivatives_of"]

HEAVY_TAIL = 1e4
"""Squared gradients of single episodes that reach so many medians have no usable mean."""

AGREEMENT = 0.1
"""Derivatives stand for the smoothed gradient if it differs by less of E|g_e|^2, surely."""


class Derivatives(NamedTuple):
    """What backpropagation gives, as measured numbers.

    Attributes:
        squared_bias: |E g_e - g|^2, with g the gradient of the smoothed J: the effect of smoothing,
            or of jumps that a derivative does not see, or of chaos.
        episode_norm: E|g_e|^2.
        squared_norm: |E g_e|^2.
        truncated_bias: |E g_e - g|^2 with the g_e of ``tbptt``, along the directions.
        truncated_loss: |E (g_e of ``tbptt`` - g_e)|^2, what truncation loses; it is known better.
        truncated_error: E|g_e - h_e|^2 with the g_e of ``tbptt`` and the smoothed h_e of
            ``truncated_es``: the effect of smoothing, or of chaos, within windows.
        truncated_norm: E|g_e|^2 of ``tbptt``.
        truncated_squared_norm: |E g_e|^2 of ``tbptt``.
        tail: The largest |g_e|^2 over the median one; a plain number.
        nonfinite: The share of episodes whose gradient is not finite; a plain number.
    """

    squared_bias: np.ndarray
    episode_norm: np.ndarray
    squared_norm: np.ndarray
    truncated_bias: np.ndarray
    truncated_loss: np.ndarray
    truncated_error: np.ndarray
    truncated_norm: np.ndarray
    truncated_squared_norm: np.ndarray
    tail: float = 1.0
    nonfinite: float = 0.0


def derivatives_of(
    whole: np.ndarray, truncated: np.ndarray, along: np.ndarray, windows: Windows
) -> Derivatives:
    """Makes ``Derivatives`` from the gradients of all episodes.

    Args:
        whole: (D, E, P), of ``bptt``: E episodes for each of D random directions.
        truncated: (D, E, P), of ``tbptt``.
        along: (2, D, E), the derivatives of both along the directions.
        windows: The slopes of antithetic pairs along them, in the same episodes.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.sum(whole**2, axis=2)
        good = np.isfinite(norms) & np.isfinite(np.sum(truncated**2, axis=2))
    if not good.all():
        x = np.full(1 + len(good), np.nan)
        return Derivatives(x, x, x, x, x, x, x, x, nonfinite=float(1 - good.mean()))
    middle = np.median(norms)
    tail = float(norms.max() / middle) if middle > 0 else 1.0
    away, forgetful = along - windows.slope()
    own = along[1] - windows.own.sum(axis=2)
    return Derivatives(
        leave_one_out(of_different_episodes(away, away)),
        leave_one_out(norms.mean(axis=1)),
        squared_norm_of_mean(whole),
        leave_one_out(of_different_episodes(forgetful, forgetful)),
        squared_norm_of_mean(truncated - whole),
        leave_one_out(np.mean(own**2, axis=1)),
        leave_one_out(np.sum(truncated**2, axis=2).mean(axis=1)),
        squared_norm_of_mean(truncated),
        tail,
    )


class StepCost(NamedTuple):
    """Seconds and bytes, measured on this device.

    Attributes:
        forward: Seconds of one inner step of one trajectory.
        backward: Seconds of one inner step forwards and back; NaN if not differentiable.
        tangent: Seconds that a tangent adds to an inner step; NaN if not differentiable.
        state_bytes: Bytes of the inner state.
        theta_bytes: Bytes of theta.
        backprop_bytes: Bytes that backpropagation through an episode holds; None: not known.
    """

    forward: float
    backward: float
    tangent: float
    state_bytes: int = 0
    theta_bytes: int = 0
    backprop_bytes: int | None = None


class Measurements(NamedTuple):
    """All that ``recommend`` knows about a problem.

    Attributes:
        horizon: T, inner steps in an episode.
        truncation: K, inner steps in a window.
        num_workers: The workers of one estimate; they set the budget.
        windows: How the windows influence one another, measured at sigma.
        derivatives: What backpropagation gives; None if the step cannot be differentiated.
        cost: Seconds and bytes.
        obstacle: Why there are no derivatives, in words.
        static_horizon: Whether every episode has the same length.
        memory_limit: Bytes that all workers together may hold; None: no limit.
        details: What else was measured, for the table: the exponent, the sweep of sigma, the cost.
    """

    horizon: int
    truncation: int
    num_workers: int
    windows: Windows
    derivatives: Derivatives | None
    cost: StepCost
    obstacle: str = ""
    static_horizon: bool = True
    memory_limit: int | None = None
    details: Any = None

    def calibrated(self) -> bool:
        """Whether derivatives give the norm of g, which they know better than random directions."""
        d = self.derivatives
        if d is None or d.nonfinite or d.tail > HEAVY_TAIL:
            return False
        away = d.squared_bias[0] + 2 * standard_error(d.squared_bias)
        return bool(away <= AGREEMENT * d.episode_norm[0])

    def episode_norm(self) -> np.ndarray:
        """E|g_e|^2, a measured number."""
        if self.derivatives is not None and self.calibrated():
            return self.derivatives.episode_norm
        return self.windows.measured(np.mean(self.windows.slope() ** 2, axis=1))

    def squared_norm(self) -> np.ndarray:
        """|g|^2, a measured number."""
        if self.derivatives is not None and self.calibrated():
            return self.derivatives.squared_norm
        slope = self.windows.slope()
        return self.windows.measured(of_different_episodes(slope, slope))


class Candidate(NamedTuple):
    """An estimator at some settings, and what is predicted for one of its workers.

    Attributes:
        name: As in ``ug.REGISTRY``.
        settings: What its factory takes besides truncation and sigma.
        squared_bias: |E ghat - g|^2, a measured number.
        variance: The trace of the covariance of the mean over one episode, a measured number.
        seconds: Seconds for one episode.
        bytes: Bytes that the worker holds; None: not known.
    """

    name: str
    settings: dict[str, Any]
    squared_bias: np.ndarray
    variance: np.ndarray
    seconds: float
    bytes: int | None


def candidates(m: Measurements) -> list[Candidate]:
    """What the measurements predict for every estimator, whether it is admissible or not."""
    return [*_evolution(m), *_mixed(m), *_derivatives(m)]


def _spread(m: Measurements) -> np.ndarray:
    """The variance of g_e over episodes, which every unbiased estimator has on top."""
    return np.maximum(m.episode_norm() - m.squared_norm(), 0.0)


def _given_episode(m: Measurements, measured: np.ndarray) -> np.ndarray:
    """A variance of ``windows``, which is proportional to E|g_e|^2, with that norm as known best.

    The ratio of the two has much less noise than either: they are from the same directions.
    """
    if not m.calibrated():
        return measured
    seen = m.windows.measured(np.mean(m.windows.slope() ** 2, axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(seen > 0, measured / seen * m.episode_norm(), measured)


def _evolution(m: Measurements) -> list[Candidate]:
    """The estimators that only run forwards."""
    w, cost, dim = m.windows, m.cost, m.windows.dim
    pair, spread = 2 * m.horizon * cost.forward, _spread(m)
    zero = np.zeros_like(spread)
    small = 2 * cost.state_bytes + 3 * cost.theta_bytes
    one_draw = (dim + 1) * m.episode_norm() + spread
    found = [Candidate("es_single", {}, zero, one_draw, pair, small)]
    number = m.horizon // m.truncation
    for stretches in _periods(w.influence.shape[-1], w.windows_per_stretch):
        period = max(stretches, 1) * w.windows_per_stretch if stretches else 1
        if period >= number:
            continue
        name, settings = ("pes", {}) if period == 1 else ("gpes", {})
        if name == "gpes":
            settings = {"noise_period": period * m.truncation}
        variance = _given_episode(m, w.variance(stretches)) + spread
        bytes_ = small + cost.theta_bytes
        found.append(Candidate(name, settings, zero, variance, pair, bytes_))
    found.append(Candidate("full_es", {}, zero, one_draw, pair, small))
    own, slope = w.own.sum(axis=2), w.slope()
    bias = w.measured(of_different_episodes(own - slope, own - slope))
    moment = w.measured(np.mean(own**2, axis=1))
    mean = w.measured(of_different_episodes(own, own))
    variance = _given_episode(m, w.truncated_variance() + np.maximum(moment - mean, 0.0))
    bytes_ = 3 * cost.state_bytes + 3 * cost.theta_bytes
    bias = _given_episode(m, bias)
    found.append(Candidate("truncated_es", {}, bias, variance, 1.5 * pair, bytes_))
    return found


def _periods(stretches: int, windows_per_stretch: int) -> list[int]:
    """Noise periods in stretches: those that divide the episode, or powers of two; 0 is ``pes``."""
    dividing = [r for r in range(1, stretches) if stretches % r == 0]
    powers = [2**i for i in range(8) if 2**i < stretches]
    periods = dividing if len(dividing) >= min(len(powers), 3) else powers
    return periods if windows_per_stretch == 1 else [0, *periods]


def _mixed(m: Measurements) -> list[Candidate]:
    """PES with backpropagation through a window."""
    if m.derivatives is None or m.windows.windows_per_stretch > 1:
        return []
    cost, spread, found = m.cost, _spread(m), []
    seconds = m.horizon * (2 * cost.forward + cost.backward)
    window_bytes = None
    if cost.backprop_bytes is not None:
        window_bytes = cost.backprop_bytes * m.truncation // m.horizon
        window_bytes += 3 * cost.state_bytes + 5 * cost.theta_bytes
    for name, replacement in (("pes_analytic", False), ("pes_analytic_replacement", True)):
        given = m.windows.variance_with_backprop(replacement)
        assert given is not None
        variance = _given_episode(m, given) + spread
        wrong = m.derivatives.truncated_error
        bias = wrong if replacement else np.zeros_like(wrong)
        variance = variance + (m.windows.dim + 2) * wrong  # weighed by noise
        found.append(Candidate(name, {}, bias, variance, seconds, window_bytes))
    return found


def _derivatives(m: Measurements) -> list[Candidate]:
    """The estimators of the derivative itself."""
    d, cost, dim, horizon = m.derivatives, m.cost, m.windows.dim, m.horizon
    if d is None:
        return []
    spread = np.maximum(d.episode_norm - d.squared_norm, 0.0)
    truncated = np.maximum(d.truncated_norm - d.truncated_squared_norm, 0.0)
    bias = np.maximum(d.squared_bias, 0.0)
    forgotten = bias + d.truncated_loss if m.calibrated() else d.truncated_bias
    held = cost.backprop_bytes
    window = None if held is None else held * m.truncation // horizon
    along = 2 * (cost.state_bytes + cost.theta_bytes)
    all_along = dim * (cost.state_bytes + cost.theta_bytes)
    one, backwards = horizon * (cost.forward + cost.tangent), horizon * cost.backward
    every = horizon * (cost.forward + dim * cost.tangent)
    dodge = (dim - 1) * d.episode_norm + spread
    return [
        Candidate("bptt", {}, bias, spread, backwards, held),
        Candidate("tbptt", {}, forgotten, truncated, backwards, window),
        Candidate("forward_mode", {}, bias, spread, every, all_along),
        Candidate("dodge", {}, bias, dodge, one, along),
    ]

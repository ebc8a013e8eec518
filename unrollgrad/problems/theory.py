"""Closed forms for quadratic losses: the gradient, and the variance of every ES estimator.

``influence`` is an array (T, T, P), for example from ``linear_recurrence``: its entry [t, tau] is
the derivative of the loss of step t with respect to the theta used in step tau (zero for tau > t).
``truncation`` is K; ``noise_period`` is the number of steps between draws of the noise, or None for
one draw per episode. Variances are traces of covariances for one antithetic pair with Gaussian
noise; N pairs divide them by N.

What ``gpes``'s variance depends on (``pes`` and ``es_single`` included). The mean over an episode
is sum_{i,j} u_i (c[i, j].u_j), with u_j the noise of period j of m, and c[i, j] the influence of
period j on J through the losses of periods max(i, j) and later, which u_i weighs. So its variance
is

    P sum_{i,j} |c[i, j]|^2 + sum_{i,j} c[i, j].c[j, i],

a function of the periods alone: windows that are shorter than a period change nothing, and ``gpes``
with m periods has the variance of ``pes`` with m windows. Only the terms with i = j have a mean.

- One period, ``es_single``: (P + 1) |g|^2.
- Without influence across periods, G_j = c[j, j] being period j's share of g, it is
  sum_{j=1..m} (P j + 1) |G_j|^2: later shares are weighed by more noise. Equal shares give about
  (P/2) |g|^2; shares that fall, less; shares that cancel, any multiple of |g|^2.
- At fixed g its least value is ``least_ratio(m, P)`` times ``es_single``'s, for large P about
  1 / (1 + ln m). There is no largest one.
- If the windows' gradients have a mean mu and vary independently by S^2 = E|h_k - mu|^2 around it,
  it is about (P (m + 1)/2 + 1) (1/m + S^2/(n |mu|^2)) |mu|^2, least at m = sqrt(n) |mu| / S, up to
  a factor sqrt(1 + 2/P): the signal-to-noise ratio of the episode's mean gradient. A ratio of at
  most 1 asks for ``es_single``, one of n or more for ``pes``, and one in between for ``gpes`` with
  that many periods, whose variance is then below both.
"""

import numpy as np

__all__ = [
    "best_noise_period",
    "episode_variance",
    "gradient",
    "least_ratio",
    "truncated_gradient",
    "truncated_variance",
    "window_variance",
]


def gradient(influence: np.ndarray) -> np.ndarray:
    """The gradient of J = (1/T) sum_t loss_t, shape (P,)."""
    return influence.sum(axis=(0, 1)) / len(influence)


def truncated_gradient(influence: np.ndarray, truncation: int) -> np.ndarray:
    """The mean of ``tbptt`` and of ``truncated_es``: the influence within the same window only."""
    return np.einsum("kkp->p", _windows(influence, truncation)) / (len(influence) // truncation)


def truncated_variance(influence: np.ndarray, truncation: int) -> float:
    """The variance of the mean of ``truncated_es`` over the windows of one episode.

    It is (1/n^2) sum_k (P + 1) |h[k, k]|^2, where h[k, k] is the influence of window k on its own
    mean loss: the windows have independent noise and one mean state.
    """
    windows = _windows(influence, truncation)
    own = np.einsum("kkp->kp", windows)
    return float((own.shape[1] + 1) * np.sum(own**2) / len(own) ** 2)


def episode_variance(
    influence: np.ndarray, truncation: int, noise_period: int | None = None
) -> float:
    """The variance of the mean of ``gpes`` over the windows of one episode.

    It is P sum_{i,j} |c[i, j]|^2 + sum_{i,j} c[i, j].c[j, i] over the noise periods, the Wick
    contraction of sum_{i,j} u_i (c[i, j].u_j) minus the squared mean; see the top of this module
    for c and for what follows. One period gives (P + 1)|g|^2, full ES and ES-Single;
    ``noise_period=truncation`` is PES.
    """
    blocks, periods = _blocks(influence, truncation, noise_period)
    m = periods[-1] + 1
    of_period = np.eye(m)[:, periods] / len(blocks)
    later = np.cumsum((of_period @ blocks.reshape(len(blocks), -1))[::-1], axis=0)[::-1]
    later = np.tril(np.ones((m, m)))[..., None] * later.reshape(m, m, -1)  # c[i, j] for i >= j
    own = np.einsum("jjp->jp", later)  # c[i, j] for i <= j
    squares = np.sum(later**2) + np.arange(m) @ np.sum(own**2, axis=1)
    products = 2 * np.einsum("ijp,ip->", later, own) - np.sum(own**2)
    return float(influence.shape[-1] * squares + products)


def best_noise_period(influence: np.ndarray, truncation: int) -> int | None:
    """The noise period of ``gpes`` with the least ``episode_variance``, as ``gpes`` takes it.

    It is one of the multiples of ``truncation`` that divide the horizon; None: a draw per episode.
    """
    horizon = len(influence)
    periods = [r for r in range(truncation, horizon, truncation) if horizon % r == 0]
    return min([None, *periods], key=lambda r: episode_variance(influence, truncation, r))


def least_ratio(num_periods: int, dim: int) -> float:
    """The least variance of ``gpes`` over ``es_single``'s, whatever the influences are.

    It is 1 / sum_{j=0..m-1} 1 / (1 + j (1 - 1/P)), for the mean over an episode with m noise
    periods (``pes``: m windows). In the terms of this module's top it is reached where c[i, j] =
    -c[i, i] / P for i > j, and c[j, j] is proportional to 1 / (1 + j (1 - 1/P)), j from 0. Without
    influence across periods the least ratio is 1 / ((P + 1) sum_{j=1..m} 1 / (P j + 1)), which is
    nearly the same unless P is small.
    """
    return float(1 / np.sum(1 / (1 + np.arange(num_periods) * (1 - 1 / dim))))


def window_variance(
    influence: np.ndarray, truncation: int, noise_period: int | None = None
) -> float:
    """The variance of ``gpes`` for one window at a uniformly random place of the episode.

    It is (1/n) sum_k [(P + 2) |g_k|^2 + (P/2) sum_{j,j' <= J(k)} |h[k, j] - h[k, j']|^2] - |g|^2,
    with g_k = sum_j h[k, j] (Li et al. 2023), and smallest with a single period.
    """
    blocks, periods = _blocks(influence, truncation, noise_period)
    dim = influence.shape[-1]
    total = 0.0
    for block, period in zip(blocks, periods, strict=True):
        h = block[: period + 1]
        spread = np.sum((h[:, None] - h[None]) ** 2)
        total += (dim + 2) * np.sum(h.sum(axis=0) ** 2) + dim / 2 * spread
    return total / len(blocks) - float(np.sum(gradient(influence) ** 2))


def _windows(influence: np.ndarray, truncation: int) -> np.ndarray:
    """The influence of the theta used in window i on the mean loss of window k, at [k, i]."""
    n = len(influence) // truncation
    split = influence.reshape(n, truncation, n, truncation, -1)
    return split.sum(axis=(1, 3)) / truncation


def _blocks(
    influence: np.ndarray, truncation: int, noise_period: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """The influence of noise period j on window k, at [k, j], and the period of each window."""
    windows = _windows(influence, truncation)
    per_period = (noise_period or len(influence)) // truncation
    periods = np.arange(len(windows)) // per_period
    blocks = np.zeros((len(windows), periods[-1] + 1, windows.shape[-1]))
    for i, j in enumerate(periods):
        blocks[:, j] += windows[:, i]
    return blocks, periods

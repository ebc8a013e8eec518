"""Closed forms for quadratic losses: the gradient, and the variance of every ES estimator.

``influence`` is an array (T, T, P), for example from ``linear_recurrence``: its entry [t, tau] is
the derivative of the loss of step t with respect to the theta used in step tau (zero for tau > t).
``truncation`` is K; ``noise_period`` is the number of steps between draws of the noise, or None for
one draw per episode. Variances are traces of covariances for one antithetic pair with Gaussian
noise; N pairs divide them by N.
"""

import numpy as np


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

    With h[k, j] the influence of noise period j on the mean loss of window k, and J(k) the period
    of window k, it is

        (1/n^2) sum_{k,s} [P min(J(k), J(s)) sum_{j <= min} h[k, j].h[s, j]
                           + (sum_{j <= min} h[s, j]).(sum_{j <= min} h[k, j])],

    the Wick contraction of sum_k xi_k (sum_j h[k, j].u_j) minus the squared mean. One period gives
    (P + 1)|g|^2, full ES and ES-Single; ``noise_period=truncation`` is PES.
    """
    blocks, periods = _blocks(influence, truncation, noise_period)
    n, dim = len(blocks), influence.shape[-1]
    until = np.cumsum(blocks, axis=1)
    inner = np.cumsum(np.einsum("kjp,sjp->ksj", blocks, blocks), axis=2)
    total = 0.0
    for k in range(n):
        for s in range(n):
            j = min(periods[k], periods[s])
            total += dim * (j + 1) * inner[k, s, j] + until[s, j] @ until[k, j]
    return total / n**2


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

"""The closed form for n workers that stand at different windows of their episodes."""

import functools

import numpy as np

from unrollgrad.problems import theory


def staggered_variance(
    influence: np.ndarray, truncation: int, noise_period: int | None, updates: int
) -> float:
    """The variance of the mean of consecutive updates of ``gpes`` with n workers, one per window.

    Worker i begins at window i of an episode and continues into further episodes with noise of
    their own. It sees a range of windows of each episode, and ranges of different episodes are
    independent. The variance of a range's sum is the variance of an episode whose other windows
    have zero loss.

    Args:
        influence: The influence, shape (T, T, P), as everywhere in ``theory``.
        truncation: Inner steps per window (K); n = T/K.
        noise_period: Steps between draws of noise; None: one draw per episode.
        updates: The number U of updates that are averaged.

    Returns:
        The trace of the variance times U; U updates take U episode-pairs (n workers, 1/n of an
        episode each).
    """
    n = len(influence) // truncation

    @functools.cache
    def of_range(first: int, end: int) -> float:
        rows = np.arange(len(influence)) // truncation
        kept = influence * ((first <= rows) & (rows < end))[:, None, None]
        return theory.episode_variance(kept, truncation, noise_period)

    total = 0.0
    for worker in range(n):
        ends = [*range(n, worker + updates, n), worker + updates]
        for first, end in zip([worker, *ends[:-1]], ends, strict=True):
            episode = first // n * n
            total += of_range(first - episode, end - episode)
    return total / updates

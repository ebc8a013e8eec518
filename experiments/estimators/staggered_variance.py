"""The closed form for n workers that stand at different windows of their episodes."""

import functools

import numpy as np

from unrollgrad.problems import theory


def staggered_variance(
    influence: np.ndarray, truncation: int, noise_period: int | None, updates: int
) -> float:
    """The variance of the mean of consecutive updates of ``gpes``, n workers, one per window.

    Worker i begins at window i of an episode and goes on into others, whose noise is its own. What
    it sees of each episode is a range of windows, and ranges of different episodes are independent;
    the variance of a range's sum is that of an episode whose other windows have no losses.

    Args:
        influence: Shape (T, T, P), as everywhere in ``theory``.
        truncation: K; n = T/K.
        noise_period: Steps between draws; None: one draw per episode.
        updates: U, how many are averaged.

    Returns:
        The trace of the variance times U, the episode-pairs (n workers, 1/n of an episode each)
        that U updates take.
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

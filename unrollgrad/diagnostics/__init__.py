"""What is wrong with an unroll: growth of small changes, and estimators side by side."""

from unrollgrad.diagnostics.compare import Comparison, compare
from unrollgrad.diagnostics.lyapunov import (
    Lyapunov,
    episode_map,
    lyapunov,
    lyapunov_by_distance,
    lyapunov_of_map,
)

__all__ = [
    "Comparison",
    "Lyapunov",
    "compare",
    "episode_map",
    "lyapunov",
    "lyapunov_by_distance",
    "lyapunov_of_map",
]

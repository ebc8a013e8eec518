"""What may differ in a run that goes on: lengths and seeds may grow, little else may change."""

import dataclasses
from collections.abc import Sequence
from typing import Any


def fixed(settings: Any, may_change: Sequence[str]) -> dict[str, Any]:
    """The settings that a run that goes on must share, as JSON has them."""
    return {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in dataclasses.asdict(settings).items()
        if k not in may_change
    }


def check_same(
    settings: Any, before: dict[str, Any], may_change: Sequence[str], length: str
) -> None:
    """Compares settings with those that a run was begun with.

    Args:
        settings: A dataclass with a field ``seeds``.
        before: Of the run, as JSON has them.
        may_change: Fields that may differ; ``length`` and "seeds" are among them.
        length: The field that may grow.

    Raises:
        ValueError: With the differences; also if the length has shrunk or a seed is missing.
    """
    now = fixed(settings, may_change)
    differences = [f"{k}: {before[k]} -> {v}" for k, v in now.items() if before[k] != v]
    if getattr(settings, length) < before[length]:
        differences.append(f"{length}: {before[length]} -> {getattr(settings, length)}")
    if set(before["seeds"]) - set(settings.seeds):
        differences.append(f"seeds: {before['seeds']} -> {list(settings.seeds)}")
    if differences:
        raise ValueError(
            f"`--resume` goes on with what was begun; changed are {', '.join(differences)}. Leave "
            "these flags out, or begin anew without --resume. "
            f"(--{length.replace('_', '-')} and --seeds may grow.)"
        )

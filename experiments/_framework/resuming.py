"""Checks of the settings of a resumed run: lengths and seeds may grow, little else may change."""

import dataclasses
from collections.abc import Sequence
from typing import Any


def fixed(settings: Any, may_change: Sequence[str]) -> dict[str, Any]:
    """The settings that must not change when a run is resumed, in their JSON form."""
    return {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in dataclasses.asdict(settings).items()
        if k not in may_change
    }


def check_same(
    settings: Any, before: dict[str, Any], may_change: Sequence[str], length: str
) -> None:
    """Checks that settings fit the run that they resume.

    Args:
        settings: The settings of the resumed run.
        before: The settings of the run so far, in their JSON form.
        may_change: Fields that may differ, among them ``length`` and "seeds".
        length: The field that may grow.

    Raises:
        ValueError: If other settings differ, the length has shrunk or a seed is missing; the
            message lists the differences.
    """
    now = fixed(settings, may_change)
    differences = [f"{k}: {before[k]} -> {v}" for k, v in now.items() if before[k] != v]
    if getattr(settings, length) < before[length]:
        differences.append(f"{length}: {before[length]} -> {getattr(settings, length)}")
    if set(before["seeds"]) - set(settings.seeds):
        differences.append(f"seeds: {before['seeds']} -> {list(settings.seeds)}")
    if differences:
        raise ValueError(
            f"`--resume` goes on with what was begun; these differ: {', '.join(differences)}. "
            "Leave these flags out, or begin anew without --resume. "
            f"(--{length.replace('_', '-')} and --seeds may grow.)"
        )

"""The settings that all experiments share."""

import dataclasses
from pathlib import Path
from typing import Literal, Self


@dataclasses.dataclass(frozen=True)
class CommonSettings:
    """Settings of every experiment; a subclass adds its own, or declares one again to explain it.

    A setting has the same name in all experiments, and the library's name where it has one:
    ``num_steps`` counts updates, ``learning_rate`` is the step size of the optimizer that an
    experiment is about, ``budget`` counts inner steps, and ``num_episodes`` the
    episodes that measure J.
    """

    scale: Literal["smoke", "cpu", "paper"] = "cpu"
    """Sets the defaults of all other settings."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seed is a whole run. A claim that compares methods rests on five or more."""
    out: Path = Path("results")
    """The results go to a new folder in here."""

    def without_run(self) -> Self:
        """The settings that all seeds share, to cache by: without ``seeds`` and ``out``."""
        return dataclasses.replace(self, seeds=(), out=Path())


@dataclasses.dataclass(frozen=True)
class ResumableSettings(CommonSettings):
    """Settings of an experiment that can be resumed after an interruption."""

    resume: Path | None = None
    """Continue the run in this folder, with its settings."""

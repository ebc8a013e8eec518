"""The command line that repeats a run."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import jax

from experiments._framework.settings import CommonSettings

ROOT = Path(__file__).parents[2]

PLACES = ("out", "resume")
"""Settings that say where the files are, not what is computed."""


def command_line(name: str, scales: dict[str, Any], settings: CommonSettings) -> str:
    """The command that repeats a run: its scale, and every setting that differs from the scale's.

    It is made from the settings, so it is right whatever started the run: the command line, a
    script, a notebook or a test. A run that was resumed is repeated from its beginning.

    Args:
        name: The experiment's name on the command line.
        scales: The experiment's settings by scale.
        settings: The settings of the run.
    """
    words = ["python", "-m", "experiments", name]
    if settings.scale != "cpu":
        words += ["--scale", settings.scale]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        given = field.name not in ("scale", *PLACES)
        if given and value != getattr(scales[settings.scale], field.name):
            words += _flag(field.name.replace("_", "-"), value)
    if jax.process_count() > 1:
        words += ["--processes", str(jax.process_count()), "--process", str(jax.process_index())]
    return shlex.join(words)


def from_root(path: Path) -> str:
    """A path as text, from the repository's root if it is inside: the same in every clone."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _flag(name: str, value: Any) -> list[str]:
    """A setting as words of the command line."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    values = value if isinstance(value, tuple) else (value,)
    return [f"--{name}", *map(_word, values)]


def _word(value: Any) -> str:
    if isinstance(value, Path):
        return from_root(value)
    return value if isinstance(value, str) else repr(value)

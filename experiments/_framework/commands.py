"""The command line that repeats a run."""

import dataclasses
import shlex
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

if TYPE_CHECKING:
    from experiments._framework.experiment import Experiment
    from experiments._framework.settings import CommonSettings

ROOT = Path(__file__).parents[2]

PLACES = ("out", "resume")
"""Settings that say where the files are, not what is computed."""


def command_line(experiment: "Experiment", settings: "CommonSettings") -> str:
    """The command that repeats a run: its scale, and every setting that differs from the scale's.

    It is made from the settings, so it is right whatever started the run: the command line, a
    script, a notebook or a test. A run that was resumed is repeated from its beginning.

    Args:
        experiment: The experiment.
        settings: The settings of the run, before ``fill``.
    """
    words = ["python", "-m", "experiments", experiment.name]
    if settings.scale != "cpu":
        words += ["--scale", settings.scale]
    for name in _differing(experiment, settings):
        words += _flag(name.replace("_", "-"), getattr(settings, name))
    if jax.process_count() > 1:
        words += ["--processes", str(jax.process_count()), "--process", str(jax.process_index())]
    return shlex.join(words)


def recorded_command(experiment: "Experiment", config: dict[str, Any]) -> str | None:
    """The command that repeats a recorded run with the present defaults.

    Args:
        experiment: The experiment.
        config: The content of the record's ``config.json``.

    Returns:
        The command, or None if the experiment now has other settings than the record.
    """
    types = typing.get_type_hints(experiment.settings)
    values = {k: _typed(v, types.get(k)) for k, v in config.items() if k != "experiment"}
    if set(values) - set(PLACES) != set(types) - set(PLACES):
        return None
    settings = experiment.settings(**values)
    wanted = _filled(experiment, settings)
    if wanted is None:
        return None
    for name in _differing(experiment, settings):  # some follow from others, by ``fill``
        usual = {name: getattr(experiment.scales[settings.scale], name)}
        shorter = dataclasses.replace(settings, **usual)
        if _filled(experiment, shorter) == wanted:
            settings = shorter
    return command_line(experiment, settings)


def as_json(value: Any) -> Any:
    """A setting as JSON has it: tuples as lists, paths as text, the same in every clone."""
    if isinstance(value, list | tuple):
        return [as_json(x) for x in value]
    return from_root(value) if isinstance(value, Path) else value


def from_root(path: Path) -> str:
    """A path as text, from the repository's root if it is inside: the same in every clone."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def _differing(experiment: "Experiment", settings: "CommonSettings") -> list[str]:
    """The settings that differ from those of the scale, as JSON has them."""
    usual = experiment.scales[settings.scale]
    names = [f.name for f in dataclasses.fields(settings) if f.name not in ("scale", *PLACES)]
    return [n for n in names if as_json(getattr(settings, n)) != as_json(getattr(usual, n))]


def _filled(experiment: "Experiment", settings: "CommonSettings") -> dict[str, Any] | None:
    """The settings after ``fill``, as JSON has them; None if they do not fit together.

    The number of devices is left out: a run has all of the machine's unless it is given, and
    computes the same on any number.
    """
    try:
        filled = dataclasses.asdict(experiment.fill(settings))
    except (ValueError, OSError):
        return None
    left_out = PLACES if isinstance(filled.get("devices"), list | tuple) else (*PLACES, "devices")
    return {k: as_json(v) for k, v in filled.items() if k not in left_out}


def _typed(value: Any, hint: Any) -> Any:
    """A value of JSON as the setting with this type."""
    if isinstance(value, list):
        return tuple(_typed(x, hint) for x in value)
    return Path(value) if isinstance(value, str) and "Path" in str(hint) else value


def _flag(name: str, value: Any) -> list[str]:
    """A setting as words of the command line."""
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *_words(value)]


def _words(value: Any) -> list[str]:
    if isinstance(value, list | tuple):
        return [word for part in value for word in _words(part)]
    return [str(as_json(value)) if isinstance(value, str | Path) else repr(value)]

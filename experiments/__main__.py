"""The command line: ``python -m experiments COMMAND [flags]``."""

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from experiments._framework import experiment as framework
from experiments._framework import pages as markdown
from experiments._framework import report, results
from experiments._framework.discovery import by_topic
from experiments._framework.experiment import SCALES, Experiment
from experiments._framework.processes import Processes, join
from experiments._framework.settings import ResumableSettings
from experiments._framework.tables import Records
from experiments.problems import PROBLEMS
from unrollgrad import running

TOPICS = by_topic()
EXPERIMENTS = {name: one for topic in TOPICS.values() for name, one in topic.items()}

RECORDED = Path("experiments/results")


def listing() -> None:
    """List the experiments by topic, and the problems that `variance` and `train` accept."""
    console = running.console()
    topics = {topic: {n: e.about for n, e in found.items()} for topic, found in TOPICS.items()}
    problems = {name: case.about for name, case in PROBLEMS.items()}
    for title, lines in {
        **topics,
        "problems (diagnose, variance, train --problem NAME)": problems,
    }.items():
        table = running.need("rich.table", "rich").Table(
            title=title, title_justify="left", box=None
        )
        for name, about in lines.items():
            table.add_row(name, about)
        console.print(table, "")


def plot(folder: Annotated[Path, tyro.conf.Positional]) -> None:
    """Draw the figure.png of a run again, from its metrics.csv.

    Args:
        folder: The folder of the run.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a folder of results: it has no config.json.")
    name = results.read_json(folder / "config.json").get("experiment")
    if name not in EXPERIMENTS:
        raise ValueError(f"{folder} is of an experiment that is not known here: {name!r}.")
    print(framework.redraw(EXPERIMENTS[name], folder))


def record(folder: Annotated[Path, tyro.conf.Positional], variant: str = "") -> None:
    """Record a finished run in place of the experiment's previous record.

    Args:
        folder: The folder of the run.
        variant: A suffix that keeps this record beside the experiment's main one, such as
            `cart_pole`.
    """
    title = re.sub(r"-\d{8}-\d{6}(-\d+)?$", "", folder.name)
    kept = results.record(folder, RECORDED, f"{title}-{variant}" if variant else title)
    print(f"{kept}; now: python -m experiments report")


def write_report(
    folder: Path = RECORDED,
    out: Path = Path("experiments/RESULTS.md"),
    pages: tuple[Path, ...] = (Path("README.md"), Path("docs")),
) -> None:
    """Write RESULTS.md from the recorded runs, and the numbers and tables of other pages.

    Args:
        folder: The folder of all recorded runs; `record` adds to it.
        out: The file to write: claims, numbers, seeds, device, time, pictures.
        pages: Markdown files, and folders of such, with markers; see `_framework/tables.py`.
    """
    written = {out: report.contents(TOPICS, folder, out)}
    for page in markdown.files(pages):
        written[page] = markdown.filled(page.read_text(), Records(TOPICS, folder))
    for path, text in written.items():
        path.write_text(text)
        print(path)


def command(experiment: Experiment, default: Any, about: str) -> Callable[..., Path | None]:
    """The experiment as a function of its settings with these defaults; ``about`` is its help."""
    spreads = any(field.name == "devices" for field in dataclasses.fields(experiment.settings))
    sweeps = spreads and isinstance(default.devices, tuple)

    def main(settings: Any, group: Any) -> Path | None:
        if spreads:
            join(group, max(settings.devices, default=None) if sweeps else settings.devices)
        return framework.execute(experiment, settings)

    main.__annotations__ = {
        "settings": Annotated[experiment.settings, tyro.conf.arg(name="")],
        "group": Annotated[
            Processes, tyro.conf.arg(name="") if spreads and not sweeps else tyro.conf.Suppress
        ],
    }
    main.__defaults__ = (default, Processes())
    main.__doc__ = about
    return main


def scale(arguments: list[str]) -> str:
    """The last scale among the arguments; it sets the defaults of all other settings."""
    found = _last(arguments, "--scale")
    return found if found in SCALES else "cpu"  # tyro reports an unknown scale


def _last(arguments: list[str], flag: str) -> str | None:
    found = None
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == flag:
            found = value if equals else "".join(arguments[i + 1 : i + 2])
    return found


def resumed(arguments: list[str]) -> Any:
    """The settings of the run to resume, which become the defaults; None if no run is resumed."""
    folder = _last(arguments, "--resume")
    experiment = EXPERIMENTS.get(arguments[0]) if arguments else None
    if (
        folder is None
        or experiment is None
        or not issubclass(experiment.settings, ResumableSettings)
    ):
        return None
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a folder of results: it has no config.json.")
    config = results.read_json(path)
    name = config.pop("experiment", None)
    fields = {field.name for field in dataclasses.fields(EXPERIMENTS[arguments[0]].settings)}
    if name != arguments[0]:
        raise ValueError(f"{folder} is a run of {name}, not of {arguments[0]}.")
    if set(config) != fields - {"resume"}:
        odd = ", ".join(sorted(set(config) ^ (fields - {"resume"})))
        raise ValueError(f"{folder} was made by another version of {name}, which differs in {odd}.")
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    config["out"] = Path(str(config["out"]))
    if "devices" in config:
        config["devices"] = None
    return EXPERIMENTS[name].settings(**config)


def keep_programs() -> None:
    """Keeps compiled programs in a folder of the user's caches, unless JAX is told another one."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(caches / "unrollgrad"))


COMMANDS: dict[str, Callable[..., None]] = {
    "list": listing,
    "plot": plot,
    "record": record,
    "report": write_report,
}
PROGRAM = "python -m experiments"


def main(arguments: list[str]) -> None:
    """Runs the command; several values may also be given as 1,2,4 or pes,es_single."""
    arguments = [part for given in arguments for part in _parts(given)]
    arguments = _of_all_problems(arguments)
    asked = arguments[0].replace("-", "_") if arguments else ""
    if asked in EXPERIMENTS:
        experiment = EXPERIMENTS[asked]
        default, before = experiment.scales[scale(arguments)], resumed(arguments)
        if before is not None:
            default = before
        if asked not in TOPICS["cost"]:  # these measure how long compilation takes
            keep_programs()
        run = command(experiment, default, experiment.settings.__doc__ or "")
        tyro.cli(run, args=arguments[1:], prog=f"{PROGRAM} {asked}")
    elif asked in COMMANDS:
        tyro.cli(COMMANDS[asked], args=arguments[1:], prog=f"{PROGRAM} {asked}")
    elif asked and not asked.startswith("_"):
        near = difflib.get_close_matches(asked, [*EXPERIMENTS, *COMMANDS])
        meant = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"there is no command {asked!r}.{meant} `{PROGRAM} list` shows them all.")
    else:
        _print_commands()


def _of_all_problems(arguments: list[str]) -> list[str]:
    """``variance --problem all`` is the leaderboard, which has a table for every problem."""
    if arguments[:1] != ["variance"] or _last(arguments, "--problem") != "all":
        return arguments
    rest, given = [], iter(arguments[1:])
    for argument in given:
        if argument == "--problem":
            next(given)
        elif not argument.startswith("--problem="):
            rest.append(argument)
    return ["leaderboard", *rest]


def _parts(given: str) -> list[str]:
    """The values of a list with commas; paths, dates and text stay as they are."""
    return given.split(",") if re.fullmatch(r"[\w.-]+(,[\w.-]+)+", given) else [given]


def _print_commands() -> None:
    """The help of the whole command line."""
    print(f"usage: {PROGRAM} COMMAND [flags]; `{PROGRAM} COMMAND --help` explains the flags\n")
    for name, run in COMMANDS.items():
        print(f"  {name:<25} {(run.__doc__ or '').splitlines()[0]}")
    for topic, experiments in TOPICS.items():
        print(f"\n{topic}")
        for name, experiment in experiments.items():
            print(f"  {name:<25} {experiment.about}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, ArithmeticError, OSError, ImportError, RuntimeError) as error:
        sys.exit("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]))
    except KeyboardInterrupt:
        sys.exit("interrupted")

"""The command line: ``python -m experiments COMMAND [flags]``."""

import dataclasses
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
    for title, lines in {**topics, "problems (variance, train --problem NAME)": problems}.items():
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


def main(arguments: list[str]) -> None:
    """Runs the command; several numbers may also be given as 1,2,4."""
    arguments = [
        part
        for given in arguments
        for part in (given.split(",") if re.fullmatch(r"\d+(,\d+)+", given) else [given])
    ]
    app = tyro.extras.SubcommandApp()
    before, asked = resumed(arguments), arguments[0].replace("-", "_") if arguments else ""
    if asked in EXPERIMENTS and asked not in TOPICS["cost"]:  # these measure how long it takes
        keep_programs()
    for name, experiment in EXPERIMENTS.items():
        default = experiment.scales[scale(arguments)]
        if isinstance(before, experiment.settings):
            default = before
        about = (experiment.settings.__doc__ or "") if name == asked else experiment.about
        app.command(name=name)(command(experiment, default, about))
    app.command(name="list")(listing)
    app.command(name="plot")(plot)
    app.command(name="record")(record)
    app.command(name="report")(write_report)
    app.cli(
        args=arguments,
        prog="python -m experiments",
        description="Experiments with gradients through unrolled computation.",
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, ArithmeticError, OSError, ImportError, RuntimeError) as error:
        sys.exit("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]))
    except KeyboardInterrupt:
        sys.exit("interrupted")

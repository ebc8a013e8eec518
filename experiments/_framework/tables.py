"""What a marker in a Markdown page may ask for: functions from recorded runs to Markdown.

A page says ``<!-- report: NAME ARGUMENTS -->``; ``pages.py`` calls the function of this name with
the recorded runs and the arguments, which are words.
"""

import contextlib
import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import unrollgrad as ug
from experiments._framework import evidence, report, results
from experiments._framework.experiment import Experiment


class Records(NamedTuple):
    """All recorded runs.

    Attributes:
        topics: The experiments by topic.
        folder: The folder that has a folder for each record.
    """

    topics: Mapping[str, Mapping[str, Experiment]]
    folder: Path


def printed(records: Records, name: str) -> str:
    """What a record's experiment prints at its end, as a block of code.

    Args:
        records: All recorded runs.
        name: The record.
    """
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        _experiment(records, name).show(results.read(records.folder / name))
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    return "\n".join(["```", *lines, "```"])


def _experiment(records: Records, name: str) -> Experiment:
    """The experiment of a record."""
    asked = results.read_json(records.folder / name / "config.json")["experiment"]
    (experiment,) = (found[asked] for found in records.topics.values() if asked in found)
    return experiment


def claim(records: Records, name: str, says: str) -> str:
    """Whether a claim of a record holds, with its numbers.

    Args:
        records: All recorded runs.
        name: The record.
        says: The claim, in the words of RESULTS.md.

    Raises:
        ValueError: If the record does not make this claim.
    """
    summary = results.read_summary(records.folder / name)
    made = {claim.says: claim for claim in _experiment(records, name).claims(summary)}
    if says not in made:
        raise ValueError(f"{name} does not claim {says!r}, but: {'; '.join(made) or 'nothing'}.")
    return f"{report.MARKS[made[says].holds]}, {made[says].ours}"


def number(
    records: Records, name: str, metric: str, times: str = "1", decimals: str = "", **labels: str
) -> str:
    """One number of a record, with its standard error over seeds.

    Args:
        records: All recorded runs.
        name: The record.
        metric: The metric in ``summary.json``.
        times: A factor, such as 100 for percents.
        decimals: Digits after the point; by default three digits, and one of the standard error.
        labels: The labels of the series, such as ``estimator=pes``.

    Raises:
        ValueError: If the record has no such number.
    """
    summary = results.read_summary(records.folder / name)
    found = summary.find(metric, **labels)
    if found is None:
        raise ValueError(f"{name} has no {metric} with {labels}: see its summary.json.")
    mean, se = (None if x is None else float(times) * x for x in (found["mean"], found["se"]))
    if decimals and mean is not None and math.isfinite(mean):
        parts = [f"{x:.{int(decimals)}f}" for x in (mean, se) if x is not None]
        return " ± ".join(parts)
    return evidence.number({"mean": mean, "se": se})


def verdicts(records: Records, topic: str) -> str:
    """A table of a topic's records: how many of the claims hold, linked to RESULTS.md.

    Args:
        records: All recorded runs.
        topic: The topic.
    """
    found = report.recorded(records.topics, records.folder, Path("RESULTS.md"))
    rows = [
        f"| [{run.name}](../experiments/RESULTS.md#{run.name.lower()}) | {run.about} "
        f"| {report.verdict(run.claims)} |"
        for run in found
        if run.topic == topic
    ]
    if not rows:
        raise ValueError(f"no record of the topic {topic!r}, but of {', '.join(records.topics)}.")
    return "\n".join(["| record | what it shows | claims |", "|---|---|---|", *rows])


def pictures(records: Records, topic: str) -> str:
    """The pictures of a topic's records, each below its name and what it shows.

    Args:
        records: All recorded runs.
        topic: The topic.
    """
    found = report.recorded(records.topics, records.folder, Path("RESULTS.md"))
    parts = [
        f"### {run.name}\n\n{run.about} Claims: {report.verdict(run.claims)} "
        f"([all numbers](../experiments/RESULTS.md#{run.name.lower()})).\n\n"
        f"![{run.name}: {run.about}](../experiments/results/{run.name}/figure.png)"
        for run in found
        if run.topic == topic and (records.folder / run.name / "figure.png").exists()
    ]
    if not parts:
        raise ValueError(f"no picture of the topic {topic!r}.")
    return "\n\n".join(parts)


def estimators(records: Records) -> str:
    """The table of estimators, from the library's registry.

    Args:
        records: All recorded runs; not used.
    """
    head = "| estimator | unbiased for | variance | inner steps per call | memory | paper |"
    rows = [
        f"| `{name}` | {row.unbiased_for} | {row.variance} | {row.time} | {row.memory} "
        f"| {row.paper} |"
        for name, row in ug.REGISTRY.items()
    ]
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


FUNCTIONS: dict[str, Callable[..., str]] = {
    function.__name__: function
    for function in (printed, number, claim, verdicts, pictures, estimators)
}

"""``report``: RESULTS.md from recorded summaries."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from experiments._framework import results
from experiments._framework.commands import recorded_command
from experiments._framework.experiment import Claim, Experiment
from experiments._framework.results import Summary

HEAD = """# Results

Written by `python -m experiments report` from the folders beside it; do not edit. A number is the
mean over seeds ± its standard error; the standard error of a bias or variance is over the samples
of each seed's run. A comparison is a one-sided t-test over the seeds (Welch's, for two methods) and
prints its p: yes where p is at most 0.05, **does not reproduce** where it is at least 0.95 (the
opposite holds), and cannot tell in between, for one seed, and where a run diverged. Times and sizes
of one machine are compared as they are. Details are below the tables.
"""

MARKS = {True: "yes", False: "**does not reproduce**", None: "cannot tell"}
OWN = "our target"
OVERVIEW = ("experiment", "source", "verdict", "what it shows", "what would change our mind")


class Recorded(NamedTuple):
    """A recorded run, ready for the report.

    Attributes:
        name: The name of its folder.
        topic: The topic of its experiment; "other" if the experiment is not known.
        about: The experiment's description in one line.
        would_change: The result that would overturn our verdict.
        summary: The run's summary.
        claims: The papers' claims and our results.
        picture: The picture's path, relative to the report.
        command: The command that repeats the run; None if the settings have changed since.
    """

    name: str
    topic: str
    about: str
    would_change: str
    summary: Summary
    claims: list[Claim]
    picture: str
    command: str | None = None


def contents(topics: Mapping[str, Mapping[str, Experiment]], folder: Path, path: Path) -> str:
    """The report on every folder of results in ``folder``: tables by topic, then details.

    Args:
        topics: The experiments by topic.
        folder: The folder of all recorded runs.
        path: Where the report will be, for its links to pictures.

    Raises:
        FileNotFoundError: If there are no results.
    """
    runs = recorded(topics, folder, path)
    parts = [HEAD]
    for topic in dict.fromkeys(run.topic for run in runs):
        rows = [_overview(run) for run in runs if run.topic == topic]
        head = [_row(*OVERVIEW), "|---" * len(OVERVIEW) + "|"]
        parts.append("\n".join([f"## {topic}", "", *head, *rows, ""]))
    parts += [section(run) for run in runs]
    return "\n".join(parts)


def recorded(
    topics: Mapping[str, Mapping[str, Experiment]], folder: Path, path: Path
) -> list[Recorded]:
    """All recorded runs in the order of the report; the arguments are those of ``contents``."""
    found = sorted(p.parent for p in folder.glob("*/summary.json"))
    if not found:
        raise FileNotFoundError(f"no results in {folder}: run an experiment and `record` it first.")
    runs = [_read(topics, one, path) for one in found]
    names = [*topics, "other"]
    return sorted(runs, key=lambda run: (names.index(run.topic), run.name))


def _read(topics: Mapping[str, Mapping[str, Experiment]], folder: Path, path: Path) -> Recorded:
    try:
        summary = results.read_summary(folder)
    except ValueError as error:
        raise ValueError(f"{folder}/summary.json cannot be read: {error}.") from error
    name = summary.about["experiment"]
    picture = Path(os.path.relpath(folder, path.parent)).as_posix() + "/figure.png"
    for topic, experiments in topics.items():
        if one := experiments.get(name):
            command = recorded_command(one, summary.about["config"])
            words, claims = (one.about, one.would_change), one.claims(summary)
            return Recorded(folder.name, topic, *words, summary, claims, picture, command)
    return Recorded(folder.name, "other", "", "", summary, [], picture)


def verdict(claims: list[Claim]) -> str:
    """A verdict on all claims: reproduced, in part, not, or cannot tell. Own targets are "met".

    Claims about which the seeds cannot tell are counted beside it.
    """
    if not claims:
        return "measured, no claim"
    own = all(claim.source.startswith(OWN) for claim in claims)
    told = [claim.holds for claim in claims if claim.holds is not None]
    untold = f"; {n} cannot be told" if (n := len(claims) - len(told)) else ""
    if not told:
        return "cannot tell"
    if all(told):
        return ("own target, met" if own else "reproduced") + untold
    if not any(told):
        return ("**own target, not met**" if own else "**not reproduced**") + untold
    part = f"in part ({sum(told)} of {len(told)})"
    return f"{'own target, met' if own else 'reproduced'} {part}{untold}"


def _overview(run: Recorded) -> str:
    sources = "; ".join(dict.fromkeys(claim.source for claim in run.claims))
    name = f"[{run.name}](#{run.name.lower()})"
    return _row(name, sources, verdict(run.claims), run.about, run.would_change)


def section(run: Recorded) -> str:
    """One run's section of the report."""
    about = run.summary.about
    environment = about["environment"]
    code = f"unrollgrad {environment['unrollgrad']}, {revision(environment['git_revision'])}"
    lines = [f"## {run.name}", ""]
    if about["status"] != "complete":
        lines += [f"**Not complete: {about['status']}.**", ""]
    if run.claims:
        lines += ["| claim | source | ours | holds |", "|---|---|---|---|"]
        lines += [_row(c.says, c.source, c.ours, MARKS[c.holds]) for c in run.claims]
        lines.append("")
    seeds = ", ".join(map(str, about["seeds"]))
    lines += [
        f"Seeds {seeds}; scale {about['scale']}; {environment['device']} × "
        f"{environment['num_devices']}; {about['seconds'] / 60:.1f} minutes, "
        f"{about['compile_seconds'] / 60:.1f} of them compiling; jax {environment['jax']}, {code}.",
        "",
        f"    {run.command or about['command']}",
        "",
        *(
            []
            if run.command
            else ["The settings have changed since: the command needs this revision.", ""]
        ),
        f"![{run.name}]({run.picture})",
        "",
    ]
    return "\n".join(lines)


def revision(found: str | None) -> str:
    """A revision in ten digits; a run of code that differed from the commit says so."""
    if found is None:
        return "revision unknown"
    differs = "+ (the code differed from the commit)" if found.endswith("+") else ""
    return f"revision {found[:10]}{differs}"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
